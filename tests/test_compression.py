"""Compression: what comes back is what was given, at the size the likelihood says; anything else is a clean error."""

import dataclasses
import json
import math
import random
import struct
import subprocess
import sys
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from conftest import KINDS, VARIANTS, build_model, for_each, random_inputs

import hf_pixelcnn.compressed_stream as container
import hf_pixelcnn.compression as codec
from hf_pixelcnn import CompressedStreamError, compress, decompress, sampling_causal_image
from hf_pixelcnn.compressed_stream import CompressedStream, read_stream, write_stream


@pytest.fixture
def model():
    return build_model("gated_pixelcnn", num_levels=5, image_size=8)


@pytest.fixture
def levels(model):
    return model.generate(num_images=6, generator=torch.Generator().manual_seed(0))


def bits(model, inputs):
    with torch.no_grad():
        return -model.log_prob(**inputs).double().sum().item() / math.log(2)


def forge(data, payload=None, **changes):
    """The stream with other parts and a right checksum: what only malice does."""
    stream = read_stream(data)
    header = dataclasses.replace(stream.header, **changes)
    return write_stream(CompressedStream(header, stream.comment, payload or stream.payload))


def forge_header(data, header):
    """The stream with any bytes as header and a right checksum."""
    stream = read_stream(data)
    facts = (container.MAGIC, container.FORMAT_VERSION, len(header), 0, len(stream.payload))
    digest = container.checksum(container.PREFIX.pack(*facts, b""), header, stream.payload).digest()
    return container.PREFIX.pack(*facts, digest) + header + stream.payload


# What comes back


@for_each("variant", VARIANTS)
def test_what_comes_back_is_what_was_given_at_the_size_the_likelihood_says(family, variant):
    model = build_model(family, **variant)
    class_ids = torch.arange(9) % (model.config.num_classes + 1) - 1 if model.config.num_classes else None
    drawn = model.generate(num_images=9, class_ids=class_ids, generator=torch.Generator().manual_seed(1))
    data = compress(model, drawn.to(torch.int16), class_ids)
    assert torch.equal(decompress(model, data), drawn)
    expected = bits(model, {"pixel_values": drawn} | ({} if class_ids is None else {"class_ids": class_ids}))
    class_bits = 0 if class_ids is None else 9 * math.log2(model.config.num_classes + 1)
    size = 8 * len(read_stream(data).payload)
    assert expected - 1 < size < 1.001 * expected + class_bits + 64  # two words of the coder


@for_each("dtype", [torch.float64, torch.bfloat16])
def test_every_dtype_and_image_size_comes_back(family, dtype):
    model = build_model(family, num_channels=3, num_levels=4).to(dtype)
    inputs = random_inputs(model, batch=3, height=4, width=9)
    assert torch.equal(decompress(model, compress(model, **inputs)), inputs["pixel_values"])


def test_images_are_coded_in_batches_of_one_shape(monkeypatch):
    monkeypatch.setattr(codec, "MAX_COLUMNS", 27)  # four images of 6 columns at a time
    assert codec.batches(11, 6) == (4, [slice(0, 4), slice(4, 8), slice(8, 11)])
    assert codec.batches(9, 6) == (3, [slice(0, 3), slice(3, 6), slice(6, 9)])
    assert codec.batches(1, 27) == (1, [slice(0, 1)])
    model = build_model("gated_pixelcnn", num_levels=5, num_classes=3)
    inputs = random_inputs(model, batch=11)
    shapes = []
    sample = codec.sample_cached
    monkeypatch.setattr(
        codec, "sample_cached", lambda m, c, ids, **kw: shapes.append(len(ids)) or sample(m, c, ids, **kw)
    )
    assert torch.equal(decompress(model, compress(model, **inputs)), inputs["pixel_values"])
    assert shapes == [4] * 6


@pytest.mark.slow
def test_many_images_cost_what_the_model_says(family):
    model = build_model(family, num_levels=5, image_size=8)
    levels = model.generate(num_images=600, generator=torch.Generator().manual_seed(0))
    data = compress(model, levels)
    assert torch.equal(decompress(model, data), levels)
    expected = bits(model, {"pixel_values": levels})
    assert 0.9999 * expected < 8 * len(read_stream(data).payload) < 1.0005 * expected


def test_levels_that_the_model_holds_for_impossible_are_coded_too(model):
    with torch.no_grad():
        model.head.layers[-1].bias[0] = 60.0  # level 0, always: the others have probabilities below 2**-24
    levels = torch.randint(1, 5, (4, 1, 8, 8))
    data = compress(model, levels)
    assert torch.equal(decompress(model, data), levels)
    assert 8 * len(read_stream(data).payload) < 24 * levels.numel() + 64


def test_images_that_cost_next_to_nothing_keep_to_the_limits(model):
    with torch.no_grad():
        model.head.layers[-1].bias[0] = 60.0
    levels = torch.zeros(600, 1, 8, 8, dtype=torch.long)
    data = compress(model, levels)
    assert len(read_stream(data).payload) == 20  # 38,400 dimensions, 2,048 a byte, in words of 4 bytes
    assert torch.equal(decompress(model, data), levels)


def test_classes_that_are_all_the_same_cost_little():
    model = build_model("gated_pixelcnn", num_classes=9)
    levels = torch.randint(2, (256, 1, 5, 6))
    size = {ids: len(compress(model, levels, class_ids=ids)) * 8 for ids in (-1, 3)}
    expected = {ids: bits(model, {"pixel_values": levels, "class_ids": torch.full((256,), ids)}) for ids in (-1, 3)}
    for ids in size:
        overhead = size[ids] - 8 * 400 - expected[ids]  # beyond the header
        assert overhead < 0.5 * 256  # against 3.3 bits an image for one class of ten


def test_the_comment_comes_back(model, levels):
    data = compress(model, levels, comment=b"names")
    assert read_stream(data).comment == b"names"
    assert torch.equal(decompress(model, data), levels)


def test_weights_behind_a_mask_do_not_matter(family, tmp_path):
    model = build_model(family, num_channels=3, num_levels=4)  # these weights are random in memory, zero in a file
    levels = random_inputs(model)["pixel_values"]
    data = compress(model, levels)
    model.save_pretrained(tmp_path)
    assert torch.equal(decompress(type(model).from_pretrained(tmp_path), data), levels)


@pytest.mark.slow
@for_each("dtype", [torch.float32, torch.bfloat16])
def test_streams_do_not_depend_on_the_memory_format_of_the_weights(family, dtype):
    config = {"num_channels": 3, "num_levels": 4, "num_classes": 2, "hidden_size": 96, "first_kernel_size": 7}
    model = build_model(family, **config).to(dtype)
    inputs = random_inputs(model, height=9, width=8)
    data = compress(model, **inputs)
    model.to(memory_format=torch.channels_last)
    tensors = [*model.parameters(), *model.buffers()]
    strides = [x.stride() for x in tensors]
    assert not all(x.is_contiguous() for x in tensors)
    assert compress(model, **inputs) == data
    assert torch.equal(decompress(model, data), inputs["pixel_values"])
    with pytest.raises(CompressedStreamError):
        decompress(model, forge(data, pixels="0"))
    assert [x.stride() for x in tensors] == strides
    with torch.no_grad():
        for parameter in model.parameters():  # laid out in reverse: no format has this order
            parameter.data = (
                parameter.data.permute(*range(parameter.ndim)[::-1]).contiguous().permute(*range(parameter.ndim)[::-1])
            )
    assert torch.equal(decompress(model, data), inputs["pixel_values"])


def test_the_model_stays_as_it_is(model, levels):
    model.train()
    model.head.eval()
    state = [module.training for module in model.modules()]
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    decompress(model, compress(model, levels))
    assert [module.training for module in model.modules()] == state
    assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())


def test_progress_is_shown(model, levels, capsys):
    decompress(model, compress(model, levels, show_progress=True), show_progress=True)
    shown = capsys.readouterr().err
    assert "Compressing" in shown
    assert "Decompressing" in shown
    assert "48/48" in shown  # rows of 6 images


# The coder sees the bits that the sampler computes


@for_each("kind", KINDS)
def test_the_codec_runs_the_samplers_own_steps(family, kind, monkeypatch):
    model = build_model(family, **kind)
    inputs = random_inputs(model, batch=3)
    seen = []
    step = codec.CodedCanvas.level_logits

    def record(canvas, parameters, dimension):
        logits = step(canvas, parameters, dimension)
        seen.append(logits.clone())
        return logits

    with monkeypatch.context() as patch:
        patch.setattr(codec.CodedCanvas, "level_logits", record)
        data = compress(model, **inputs)
        encoded, seen[:] = list(seen), []
        decompress(model, data)
    scores = model.generate(
        **inputs,
        known_mask=torch.ones(inputs["pixel_values"].shape, dtype=torch.bool),
        output_scores=True,
        return_dict_in_generate=True,
    ).scores
    assert len(encoded) == len(seen) == len(scores)
    for written, read, score in zip(encoded, seen, scores, strict=True):
        assert torch.equal(written, read)
        assert torch.equal(written, score)


@pytest.mark.parametrize("threads", [1, 3])
def test_the_number_of_threads_is_restored_and_set_back(model, levels, threads, monkeypatch):
    before = torch.get_num_threads()
    seen = []
    sample = codec.sample_cached
    monkeypatch.setattr(sampling_causal_image, "FEATURES_PER_THREAD", 1)  # so that any number pays
    monkeypatch.setattr(
        codec, "sample_cached", lambda *args, **kw: seen.append(torch.get_num_threads()) or sample(*args, **kw)
    )
    try:
        torch.set_num_threads(threads)
        data = compress(model, levels)
        torch.set_num_threads(2)
        decompress(model, data)
        assert torch.get_num_threads() == 2
        with pytest.raises(CompressedStreamError):
            decompress(model, forge(data, pixels="0"))
        assert torch.get_num_threads() == 2
        assert seen == [threads] * 3
    finally:
        torch.set_num_threads(before)


def test_small_batches_are_coded_with_one_thread(model, levels):
    before = torch.get_num_threads()
    try:
        torch.set_num_threads(2)
        assert read_stream(compress(model, levels)).header.threads == 1
        assert torch.get_num_threads() == 2
    finally:
        torch.set_num_threads(before)


# Refusals that say why


def test_another_model_dtype_machine_or_version_is_named(model, levels):
    data = compress(model, levels)
    with pytest.raises(CompressedStreamError, match="weights are others"):
        decompress(build_model("gated_pixelcnn", seed=1, num_levels=5, image_size=8), data)
    with pytest.raises(CompressedStreamError, match="configuration is another one"):
        decompress(build_model("gated_pixelcnn", num_levels=4), data)
    with pytest.raises(CompressedStreamError, match="configuration is another one"):
        decompress(build_model("pixelcnn", num_levels=5), data)
    model.config.class_temperature = 0.5  # of a classifier alone
    assert torch.equal(decompress(model, data), levels)
    for field, text in [("torch", "torch 9.9"), ("constriction", "constriction 9.9"), ("hardware", "made on 9.9")]:
        with pytest.raises(CompressedStreamError, match=text):
            decompress(model, forge(data, **{field: "9.9"}))
    with pytest.raises(CompressedStreamError, match=r"in float32 and is in float64 here"):
        decompress(model.double(), data)


def test_a_machine_that_computes_other_numbers_is_noticed_at_the_first_row(model, levels, monkeypatch):
    data = compress(model, levels)
    steps = []
    level_logits = codec.CodedCanvas.level_logits

    def a_bit_off(canvas, parameters, dimension):
        steps.append(dimension)
        return level_logits(canvas, parameters, dimension) + 1e-6 * torch.rand(5)

    monkeypatch.setattr(codec.CodedCanvas, "level_logits", a_bit_off)
    with pytest.raises(CompressedStreamError, match=r"computes other probabilities here.*hf_pixelcnn, which was"):
        decompress(model, data)
    assert steps == list(range(9))  # one row of 8, and one pixel


def refuse(symbols, probabilities):
    raise AssertionError("no such word")


@pytest.mark.parametrize(
    ("coder", "off", "text"),
    [
        ({}, 1e-3, "not those that were compressed"),
        ({}, 1.0, "not those that were compressed"),
        ({"bits_left": 0}, 1.0, "too short"),
        ({"decoder": SimpleNamespace(decode=refuse)}, 1.0, r"cannot be decoded \(no such word\)"),
    ],
)
def test_a_machine_that_computes_other_numbers_after_the_first_row_is_told_so(
    model, levels, coder, off, text, monkeypatch
):
    data = compress(model, levels)
    level_logits = codec.CodedCanvas.level_logits

    def off_later(canvas, parameters, dimension):
        if dimension == 9:  # what may happen to the coder then
            vars(canvas.coder).update(coder)
        logits, noise = level_logits(canvas, parameters, dimension), torch.Generator().manual_seed(dimension)
        return logits if dimension < 9 else logits + off * torch.rand(5, generator=noise)

    monkeypatch.setattr(codec.CodedCanvas, "level_logits", off_later)
    with pytest.raises(CompressedStreamError, match=f"{text}.*: the model computes other probabilities here"):
        decompress(model, data)


def test_a_wrong_picture_is_never_returned(model, levels, monkeypatch):
    data = compress(model, levels)
    images = codec.CodedCanvas.images
    monkeypatch.setattr(codec.CodedCanvas, "images", lambda canvas: (images(canvas) + 1) % 5)
    with pytest.raises(CompressedStreamError, match="not those that were compressed"):
        decompress(model, data)
    with pytest.raises(CompressedStreamError, match="not those that were compressed"):
        compress(model, levels, verify=True)


def test_what_is_no_stream_is_refused_by_name(model, levels):
    data = compress(model, levels)
    newer = data[:4] + b"\x02" + data[5:]
    for wrong, text in [
        (b"", "is empty"),
        (b"\x89PNG\r\n\x1a\n" + bytes(100), "Not a compressed stream"),
        (data[:3], "is cut"),
        (data[:20], "is cut"),
        (data[:-1], "is cut"),
        (data + b"\0", "followed by something else"),
        (newer, "format version 2"),
        (data[:-1] + bytes([data[-1] ^ 1]), "is damaged"),
        (forge_header(data, b"{"), "not valid JSON"),
        (forge_header(data, b"[" * 4000), "not valid JSON|fields"),
        (forge_header(data, b"{}"), "fields of this format"),
        (forge_header(data, b" " * 5000 + b"{}"), "Invalid header"),
    ]:
        with pytest.raises(CompressedStreamError, match=text):
            decompress(model, wrong)
    with pytest.raises(TypeError, match="must be bytes"):
        decompress(model, "text")


def test_claims_that_no_payload_holds_are_refused_before_any_work(model, levels, monkeypatch):
    data = compress(model, levels)
    monkeypatch.setattr(codec, "code_images", lambda *args: pytest.fail("began to decode"))
    for shape in (
        [10**9, 1, 8, 8],
        [6, 1, 10**9, 8],
        [6, 1, 8, 10**9],
        [1, 1, 1, 5000],
        [6, 10**6, 8, 8],
        [0, 1, 8, 8],
        [6, 1, -8, 8],
        [6, 1, 8],
        [6, 1, 8, 8.0],
        [6, 1, 8, 10**400],
        [True, 1, 8, 8],
    ):
        with pytest.raises(CompressedStreamError):
            decompress(model, forge(data, shape=shape))
    for threads in (0, -1, 10**6, True, 1.0, "1", None):
        with pytest.raises(CompressedStreamError):
            decompress(model, forge(data, threads=threads))


def test_a_payload_that_is_worth_less_than_claimed_ends_the_work_early(model, levels, monkeypatch):
    data = compress(model, levels)
    payload = read_stream(data).payload
    steps = []
    level_logits = codec.CodedCanvas.level_logits
    monkeypatch.setattr(codec.CodedCanvas, "level_logits", lambda *args: steps.append(args[2]) or level_logits(*args))
    most = codec.MAX_DIMS_PER_BYTE * len(payload) // 8
    for wrong in (payload, bytes(len(payload)), b"\xff" * len(payload)):
        with pytest.raises(CompressedStreamError):
            decompress(model, forge(data, payload=wrong, shape=[1, 1, most, 8], probe="0" * 32))
    monkeypatch.setattr(codec.Probe, "update", lambda *args: None)
    steps.clear()
    for wrong in (payload, bytes(len(payload)), b"\xff" * len(payload)):
        with pytest.raises(CompressedStreamError):
            decompress(model, forge(data, payload=wrong, shape=[1, 1, most, 8]))
    assert len(steps) < 3 * 20 * levels.numel()  # of millions


def huge(model, size=262_000, **changes):
    """A stream of this many bytes that claims one image as large as they allow, in all but its probe well-formed."""
    data = forge(compress(model, torch.zeros(1, 1, 8, 8, dtype=torch.long)), payload=bytes(size // 4 * 4))
    return forge(data, shape=[1, 1, size // 4 * 4, 2048], **changes)


def test_a_small_stream_may_not_claim_more_dimensions_than_the_limit(model, levels, monkeypatch):
    data = huge(model, 16_400)
    text = r"claims 1 images of 1×16400×2048, or 33587200 dimensions; the limit is `max_dims=16777216`.*33587200`"
    assert read_stream(data).header.num_dims == 33_587_200  # to look at it costs nothing
    with pytest.raises(CompressedStreamError, match=text):
        read_stream(data, max_dims=2**24)
    began = []
    monkeypatch.setattr(codec, "code_images", lambda *args: began.append(args) or [])
    with pytest.raises(CompressedStreamError, match=text):
        decompress(model, data)
    assert not began
    for max_dims in (33_587_200, None):
        with pytest.raises(CompressedStreamError, match="not those that were compressed"):
            decompress(model, data, max_dims=max_dims)
    assert len(began) == 2
    for max_dims in (0, -1, 1e9, True, "9"):
        with pytest.raises(ValueError, match="`max_dims` must be a positive int, or None for no limit"):
            decompress(model, data, max_dims=max_dims)


def test_the_limit_is_of_all_images_together_and_verifying_has_none(model, levels, monkeypatch):
    data = compress(model, levels)
    assert torch.equal(decompress(model, data, max_dims=6 * 64), levels)
    with pytest.raises(CompressedStreamError, match="claims 6 images of 1×8×8, or 384 dimensions"):
        decompress(model, data, max_dims=6 * 64 - 1)
    monkeypatch.setattr(codec, "MAX_DIMS", 1)
    monkeypatch.setitem(decompress.__kwdefaults__, "max_dims", 1)
    assert compress(model, levels, verify=True) == data


def test_images_that_memory_does_not_hold_are_refused_with_their_size(model, levels, monkeypatch):
    data = compress(model, levels)
    asked = []
    monkeypatch.setattr(codec, "fits_in_memory", lambda size, device: asked.append((size, str(device))))
    with pytest.raises(
        CompressedStreamError, match=r"6 images of 1×8×8; to decode them takes 3840 bytes of memory on c"
    ):
        decompress(model, data)
    assert asked == [(3840, "cpu")]


def test_what_fits_in_memory_is_told_without_using_it():
    device = torch.device("cpu")
    assert codec.fits_in_memory(2**20, device)
    assert not codec.fits_in_memory(2**50, device)
    assert not codec.fits_in_memory(2**62, device)


@pytest.mark.slow
def test_before_the_probe_is_right_a_stream_takes_little_memory(model):
    script = f"""
import resource, sys
sys.path[:0] = {sys.path!r}
import torch
from test_compression import build_model, codec, decompress, huge
model = build_model("gated_pixelcnn", num_levels=5, image_size=8)
small, large = huge(model, 4000), huge(model, 262_000)
codec.fits_in_memory = lambda size, device: True
used = []
for data in (small, large):
    try:
        decompress(model, data, max_dims=None)
    except codec.CompressedStreamError as error:
        assert "computes other probabilities" in str(error), error
    used.append(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss)
print(used[1] - used[0])
"""
    done = subprocess.run([sys.executable, "-c", script], check=True, capture_output=True, text=True)
    assert int(done.stdout) < 20_000  # kB; the images as int64 are 4.3 GB


def test_while_decoding_a_row_is_kept_as_levels_and_the_rest_in_bytes(model, levels, monkeypatch):
    data = compress(model, levels)
    seen = []
    decide = codec.CodedCanvas.decide

    def look(canvas, parameters, dimension):
        seen.append((tuple(canvas.levels.shape), None if canvas.finished is None else canvas.finished.dtype))
        return decide(canvas, parameters, dimension)

    monkeypatch.setattr(codec.CodedCanvas, "decide", look)
    decompress(model, data)
    assert seen == [((6, 8), None)] * 8 + [((6, 8), torch.uint8)] * 56
    codes = build_model("gated_pixelcnn", num_levels=300, input_encoding="embedding")
    inputs = random_inputs(codes)
    assert torch.equal(decompress(codes, compress(codes, **inputs)), inputs["pixel_values"])


def test_text_of_a_stream_is_shown_in_escapes(model, levels):
    data, nasty = compress(model, levels), "9\x1b]0;owned\x07\x1b[2J\u202e\nx é"
    shown = r"9\x1b]0;owned\x07\x1b[2J\u202e\nx \xe9"
    for field in ("dtype", "config", "weights", "hardware", "torch", "constriction"):
        with pytest.raises(CompressedStreamError) as error:
            decompress(model, forge(data, **{field: nasty}))
        assert shown in str(error.value)
        assert str(error.value).isascii()
    with pytest.raises(CompressedStreamError, match="computes other probabilities") as error:
        decompress(model, forge(data, probe="0" * 32, hf_pixelcnn=nasty))
    assert shown in str(error.value)
    stream = read_stream(forge(data, hf_pixelcnn=nasty, torch=nasty))
    for printed in (str(stream.header), repr(stream)):
        assert shown in printed
        assert printed.isascii()
    header = {**dataclasses.asdict(stream.header), "shape": [nasty, "é", {"\x1b": "\x9b"}]}
    with pytest.raises(CompressedStreamError, match="must be 4 counts, got") as error:
        decompress(model, forge_header(data, json.dumps(header, ensure_ascii=False).encode()))
    assert str(error.value).isascii()


def test_a_deeply_nested_shape_is_refused_at_every_depth(model, levels):
    data = compress(model, levels)
    header = json.dumps({**dataclasses.asdict(read_stream(data).header), "shape": "HERE"})
    for depth in (1, 10, *range(100, 1700, 13)):
        with pytest.raises(CompressedStreamError):
            decompress(model, forge_header(data, header.replace('"HERE"', "[" * depth + "]" * depth).encode()))


@pytest.mark.slow
def test_two_thousand_damaged_streams_are_errors_or_the_right_pixels(levels, model):
    data = compress(model, levels)
    other = compress(model, model.generate(num_images=6, generator=torch.Generator().manual_seed(9)))
    stream, size, draw = read_stream(data), len(data), random.Random(0)

    def flipped(bytes_):
        at = draw.randrange(8 * len(bytes_))
        return bytes_[: at // 8] + bytes([bytes_[at // 8] ^ 1 << at % 8]) + bytes_[at // 8 + 1 :]

    def hostile_header():
        header = dataclasses.asdict(stream.header)
        numbers = [0, -1, 1, 2, 3, 64, 4096, 2**31 - 1, 2**64, 10**30, 1e308, True, None, [], "", {}, "9" * 999]
        for _ in range(draw.randrange(1, 3)):
            key = draw.choice(list(header))
            if key == "shape" and draw.random() < 0.8 and isinstance(header[key], list) and header[key]:
                header[key] = [draw.choice(numbers) if draw.random() < 0.4 else n for n in header[key]]
            elif draw.random() < 0.1:
                header.pop(key)
            else:
                header[key] = draw.choice(numbers)
            if not header or draw.random() < 0.1:
                break
        return forge_header(data, json.dumps(header).encode())

    def spliced_payload():
        at = 4 * draw.randrange(len(stream.payload) // 4)
        return forge(data, payload=stream.payload[:at] + read_stream(other).payload[at:])

    damages = [
        (600, lambda: flipped(data)),
        (200, lambda: data[: draw.randrange(size)]),
        (200, lambda: data[: draw.randrange(size)] + other[draw.randrange(len(other)) :]),
        (200, lambda: data[:at] + draw.randbytes(8) + data[at + 8 :] if (at := draw.randrange(size - 8)) else data),
        (400, hostile_header),
        (150, lambda: forge(data, payload=flipped(stream.payload))),
        (100, lambda: forge(data, payload=stream.payload[: 4 * draw.randrange(1, len(stream.payload) // 4)])),
        (50, spliced_payload),
        (100, lambda: forge_header(data, flipped(json.dumps(dataclasses.asdict(stream.header)).encode()))),
    ]
    assert sum(count for count, _ in damages) == 2000
    refused = 0
    threads = torch.get_num_threads()
    for count, damage in damages:
        for _ in range(count):
            damaged = damage()
            try:
                restored = decompress(model, damaged)
            except CompressedStreamError:
                refused += 1
            else:
                assert torch.equal(restored, levels)
    assert refused > 1800
    assert torch.get_num_threads() == threads


def test_levels_and_classes_that_do_not_fit_the_model_are_refused(model):
    with pytest.raises(ValueError, match="got values from 0 to 5"):
        compress(model, torch.tensor([[[[0, 5]]]]))
    with pytest.raises(ValueError, match=r"must have shape \(batch, 1"):
        compress(model, torch.zeros(1, 3, 8, 8, dtype=torch.long))
    with pytest.raises(TypeError, match="integer levels"):
        compress(model, torch.zeros(1, 1, 8, 8))
    with pytest.raises(ValueError, match="at most 4096 wide"):
        compress(model, torch.zeros(1, 1, 1, 4097, dtype=torch.long))
    with pytest.raises(ValueError, match="unconditional"):
        compress(model, torch.zeros(1, 1, 8, 8, dtype=torch.long), class_ids=[0])
    conditional = build_model("gated_pixelcnn", num_classes=2)
    with pytest.raises(ValueError, match="`class_ids` are needed"):
        compress(conditional, torch.zeros(1, 1, 8, 8, dtype=torch.long))
    with pytest.raises(TypeError, match=r"must be a \.\.\.ForCausalImageModeling, which .* got GatedPixelCNNModel"):
        compress(model.model, torch.zeros(1, 1, 8, 8, dtype=torch.long))


def test_broken_weights_are_an_error(family):
    model = build_model(family, num_levels=5)
    with torch.no_grad():
        model.head.layers[-1].bias.fill_(math.nan)
    with pytest.raises(ValueError, match="weights are not finite"):
        compress(model, random_inputs(model)["pixel_values"])


def test_a_missing_coder_is_named_with_its_extra(model, levels, monkeypatch):
    monkeypatch.setitem(sys.modules, "constriction", None)
    with pytest.raises(ImportError, match=r"hf_pixelcnn\[compression\]"):
        compress(model, levels)
    with pytest.raises(ImportError, match=r"hf_pixelcnn\[compression\]"):
        decompress(model, b"")


def test_the_layout_is_the_documented_one(model, levels):
    data = compress(model, levels, comment=b"xy")
    magic, version, header, comment, payload, _ = struct.unpack("<4sBIIQ16s", data[:37])
    assert (magic, version, comment) == (b"\x89PXC", 1, 2)
    assert len(data) == 37 + header + comment + payload
    assert json.loads(data[37 : 37 + header])["shape"] == [6, 1, 8, 8]
    assert np.frombuffer(data[-payload:], dtype="<u4").size == payload // 4
