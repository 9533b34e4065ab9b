"""An image depends on its numbers, the weights and the condition; every sampler draws the same one."""

import gc
import itertools
import threading
import weakref
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from benchmark import noise_rule_violations, peak_bytes
from conftest import (
    FAMILIES,
    KINDS,
    SAMPLERS,
    VARIANTS,
    WITH_CHANNEL_GROUPS,
    build_model,
    conditions,
    for_each,
    random_inputs,
    seeded,
)
from PIL import Image
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map
from transformers import LogitsProcessor

from hf_pixelcnn import (
    LivePreview,
    PixelCNNGenerationConfig,
    PixelCNNImageProcessor,
    caching_causal_image,
    sampling_causal_image,
)
from hf_pixelcnn.caching_causal_image import ForwardCache
from hf_pixelcnn.canvas_causal_image import draw_noise
from hf_pixelcnn.checks_causal_image import evaluation_mode
from hf_pixelcnn.likelihood_causal_image import levels_from_noise
from hf_pixelcnn.sampling_causal_image import FEATURES_PER_THREAD, RowThreads, threads_that_pay


@for_each("variant", VARIANTS)
def test_all_samplers_draw_the_same_images_in_float64(family, variant):
    model = build_model(family, **variant).double()
    settings = {"num_images": 4, "return_dict_in_generate": True, "output_scores": True, **conditions(model, 4)}
    naive = model.generate(**settings, generator=seeded(), sampler="naive")
    cached = model.generate(**settings, generator=seeded())
    assert torch.equal(cached.sequences, naive.sequences)
    del settings["output_scores"]
    fixed_point = model.generate(**settings, generator=seeded(), sampler="fixed_point")
    assert torch.equal(fixed_point.sequences, naive.sequences)
    assert 1 < fixed_point.num_iterations <= naive.sequences[0].numel() + 1
    assert len(set(map(tuple, naive.sequences.flatten(1).tolist()))) == 4  # four different images
    assert len(cached.scores) == naive.sequences[0].numel()
    for a, b in zip(cached.scores, naive.scores, strict=True):
        torch.testing.assert_close(a, b, rtol=0, atol=1e-11)


@for_each(
    "config",
    [
        {"num_hidden_layers": 1},
        {"kernel_size": 1, "num_channels": 3, "num_levels": 3},
        {"num_head_layers": 0, "num_channels": 2},
        {"first_kernel_size": 9, "kernel_size": 7, "image_size": [3, 4]},
        {"image_size": [1, 7]},
        {"image_size": [7, 1], "num_channels": 3},
        {"image_size": [1, 1], "num_levels": 256},
    ],
)
def test_all_samplers_agree_at_the_edges_of_the_configuration(family, config):
    model = build_model(family, **config).double()
    naive, *others = [model.generate(num_images=3, generator=seeded(), sampler=sampler) for sampler in SAMPLERS]
    assert all(torch.equal(naive, images) for images in others)


@pytest.mark.versions
def test_all_samplers_agree_at_another_image_size(family):
    model = build_model(family).double()
    naive, *others = [
        model.generate(num_images=2, image_size=(12, 9), generator=seeded(), sampler=sampler) for sampler in SAMPLERS
    ]
    assert naive.shape == (2, 1, 12, 9)  # taller than the receptive field
    assert all(torch.equal(naive, images) for images in others)


@pytest.mark.slow
@for_each("kind", KINDS)
def test_lower_precision_obeys_the_noise_rule_within_its_tolerance(family, kind):
    model = build_model(family, **kind)
    inputs = conditions(model, 3)
    for (dtype, tolerance), (sampler, image_size) in itertools.product(
        [(torch.float32, 1e-5), (torch.bfloat16, 0.1)], [("cached", (5, 6)), ("naive", (3, 5))]
    ):
        output = model.to(dtype).generate(
            num_images=3,
            image_size=image_size,
            generator=seeded(),
            sampler=sampler,
            output_scores=True,
            return_dict_in_generate=True,
            **inputs,
        )
        noise = draw_noise(seeded(), 3, output.sequences[0].numel(), output.sequences.device)
        assert noise_rule_violations(model, output, noise, tolerance, **inputs) == 0


def test_the_check_of_the_noise_rule_notices_a_wrong_level_and_a_wrong_score():
    model = build_model("gated_pixelcnn").double()
    noise = draw_noise(seeded(), 2, 30, torch.device("cpu"))
    output = model.generate(num_images=2, generator=seeded(), output_scores=True, return_dict_in_generate=True)
    assert noise_rule_violations(model, output, noise, 1e-9) == 0
    scores = output.scores
    output.scores = (scores[0] + 0.01, *scores[1:])
    assert noise_rule_violations(model, output, noise, 1e-9) == 2
    output.scores = scores
    output.sequences[1, 0, 4, 5] = 1 - output.sequences[1, 0, 4, 5]  # the last level: it changes no probability
    assert noise_rule_violations(model, output, noise, 1e-9) == 1


def test_an_image_does_not_depend_on_its_batch(family):
    model = build_model(family, num_channels=3, num_levels=4).double()
    together = model.generate(num_images=4, generator=seeded())
    continuing = seeded()
    alone = torch.cat([model.generate(generator=continuing) for _ in range(4)])
    assert torch.equal(together, alone)
    of_list = model.generate(generator=[seeded(seed) for seed in (7, 8, 9)])
    assert torch.equal(of_list[1:2], model.generate(generator=seeded(8)))
    assert not torch.equal(of_list[0], of_list[1])


@for_each("sampler", SAMPLERS)
def test_a_request_split_into_parts_gives_the_same_images(family, sampler):
    model = build_model(family, num_classes=3).double()
    request = {"class_ids": [0, 1, 2, -1, 0], "pixel_values": random_inputs(model, batch=5)["pixel_values"]}
    request["known_mask"] = torch.rand(5, 1, 5, 6, generator=seeded()) < 0.3
    whole = model.generate(**request, generator=seeded(), sampler=sampler, return_dict_in_generate=True)
    parts = model.generate(
        **request, generator=seeded(), sampler=sampler, return_dict_in_generate=True, max_batch_size=2
    )
    assert torch.equal(parts.sequences, whole.sequences)
    assert (parts.num_iterations is None) == (sampler != "fixed_point")


def test_scores_of_a_request_split_into_parts_are_in_order(family):
    model = build_model(family).double()
    settings = {"num_images": 3, "output_scores": True, "return_dict_in_generate": True}
    whole, parts = (model.generate(**settings, generator=seeded(), max_batch_size=size) for size in (None, 2))
    for a, b in zip(whole.scores, parts.scores, strict=True):
        torch.testing.assert_close(a, b)


@pytest.mark.parametrize("sampler", SAMPLERS)
def test_a_streamer_gets_every_row_once_and_finished(sampler):
    model = build_model("gated_pixelcnn", num_channels=3, num_levels=4)
    canvas = torch.full((5, 3, 5, 6), -1)
    order = []

    def streamer(images, row, levels):
        assert (canvas[images, :, row] == -1).all()
        canvas[images, :, row] = levels
        order.append((images.start, row))

    images = model.generate(num_images=5, generator=seeded(), sampler=sampler, max_batch_size=3, streamer=streamer)
    assert torch.equal(canvas, images)
    assert order == [(start, row) for start in (0, 3) for row in range(5)]


def test_a_live_preview_shows_the_picture_growing():
    model = build_model("gated_pixelcnn", num_channels=3, num_levels=4)
    processor = PixelCNNImageProcessor(num_levels=4, num_channels=3)
    pictures = []
    preview = LivePreview(processor, num_images=3, image_size=(5, 6), every=2, show=pictures.append)
    levels = model.generate(num_images=3, generator=seeded(), max_batch_size=2, streamer=preview)
    assert [picture.size for picture in pictures] == [(322, 276)] * 6  # after rows 2, 4 and 5, for both parts
    first, last = (torch.tensor(np.asarray(pictures[i]))[::23, ::23] for i in (0, -1))  # 23 times enlarged
    drawn = processor.post_process(levels, output_type="pt").permute(0, 2, 3, 1)
    assert torch.equal(first[:2, :6], drawn[0, :2])
    assert (first[2:5] == 128).all()
    assert torch.equal(last[:5, 8:], drawn[1])  # a gap of two pixels
    assert torch.equal(last[7:, :6], drawn[2])
    assert (last[7:, 8:] == 128).all()  # there is no fourth image


def test_a_live_preview_of_nothing_or_outside_a_notebook():
    for wrong in ({"num_images": 0}, {"every": 0}, {"num_images": 2.0}):
        with pytest.raises((ValueError, TypeError), match=f"`{next(iter(wrong))}` must be"):
            LivePreview(PixelCNNImageProcessor(), **{"num_images": 3, "image_size": 5, **wrong})
    with pytest.raises(RuntimeError, match="shows its pictures in a notebook, and this is none"):
        LivePreview(PixelCNNImageProcessor(), num_images=3, image_size=5)


def test_an_error_of_the_streamer_is_the_users_own_and_the_next_call_is_right():
    model = build_model("gated_pixelcnn").train()
    expected = model.generate(num_images=2, generator=seeded())

    def streamer(images, row, levels):
        if row == 2:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        model.generate(num_images=2, generator=seeded(), streamer=streamer)
    assert model.training
    assert torch.equal(model.generate(num_images=2, generator=seeded()), expected)


OVERRIDABLE = ["forward", "distribution_parameters", "scored_parameters"]
FAST = [name for name, record in FAMILIES.items() if record.causal_class.sampling_cache_class is not ForwardCache]


def emphatic(method):
    """The method, with what it gives times 2."""

    def changed(self, *args, **kwargs):
        result = method(self, *args, **kwargs)
        if isinstance(result, tuple):
            return (result[0] * 2, *result[1:])
        if isinstance(result, torch.Tensor):
            return result * 2
        result.logits = result.logits * 2
        return result

    return changed


@pytest.mark.slow
@for_each("name", [*OVERRIDABLE, "backbone_features"])
@pytest.mark.parametrize("family", FAST)
def test_a_subclass_that_changes_the_network_is_drawn_as_it_is(family, name, monkeypatch):
    told = []
    monkeypatch.setattr(caching_causal_image.logger, "warning_once", told.append)
    base = FAMILIES[family].causal_class
    if name == "backbone_features":
        network = base.backbone_class
        members = {"backbone_class": type("Network", (network,), {name: emphatic(network.backbone_features)})}
    else:
        members = {name: emphatic(getattr(base, name))}
    model = build_model(family).double()
    changed = type("Changed", (base,), members)(model.config).double().eval()
    changed.load_state_dict(model.state_dict())
    naive, cached = (changed.generate(num_images=4, generator=seeded(), sampler=s) for s in ("naive", "cached"))
    if name != "scored_parameters":  # which `naive` does not score with
        assert torch.equal(cached, naive)
        assert not torch.equal(naive, model.generate(num_images=4, generator=seeded()))
    assert f"{name}` is not the method" in told[0]
    told.clear()
    monkeypatch.setattr(type(changed), "sampling_cache_class", model.sampling_cache_class, raising=False)
    if name != "backbone_features":  # who names a cache vouches for it
        assert caching_causal_image.cache_class_of(changed) is model.sampling_cache_class
        assert not told


@pytest.mark.parametrize("family", FAST)
def test_hooks_on_the_model_itself_are_refused(family):
    model = build_model(family)
    hook = model.register_forward_hook(lambda *_: None)
    with pytest.raises(ValueError, match="the model itself has hooks"):
        model.generate()
    hook.remove()
    forward = model.forward
    model.forward = lambda *args, **kwargs: forward(*args, **kwargs)
    with pytest.raises(ValueError, match="the model itself has hooks"):
        model.generate()
    del model.forward
    model.generate()


def test_the_last_of_several_threads_sets_training_mode_back():
    model = build_model("pixelcnn", dropout=0.5).train()
    with evaluation_mode(model):
        other = evaluation_mode(model)
        other.__enter__()
    assert not any(module.training for module in model.modules())
    other.__exit__(None, None, None)
    assert all(module.training for module in model.modules())


def test_numbers_of_numpy_are_numbers():
    model = build_model("pixelcnn")
    expected = model.generate(num_images=2, image_size=[3, 4], temperature=0.5, generator=seeded())
    request = {
        "num_images": np.int64(2),
        "image_size": np.array([3, 4]),
        "temperature": np.float32(0.5),
        "do_sample": np.bool_(True),
        "max_batch_size": np.int32(1),
    }
    assert torch.equal(model.generate(**request, generator=seeded()), expected)


def test_running_out_of_memory_names_max_batch_size(monkeypatch):
    model = build_model("gated_pixelcnn")

    def fail(*args, **kwargs):
        raise torch.OutOfMemoryError("tried to allocate 1 TiB")

    monkeypatch.setattr(type(model).sampling_cache_class, "__init__", fail)
    with pytest.raises(torch.OutOfMemoryError, match=r"`max_batch_size`.*tried to allocate 1 TiB"):
        model.generate(num_images=2)


def test_the_global_seed_is_used_without_a_generator():
    model = build_model("gated_pixelcnn")
    torch.manual_seed(3)
    first = model.generate(num_images=2)
    torch.manual_seed(3)
    assert torch.equal(first, model.generate(num_images=2))


@pytest.mark.slow
def test_frequencies_are_the_probabilities_of_the_model(family):
    model = build_model(family, image_size=2).double()
    images = torch.tensor(list(itertools.product((0, 1), repeat=4))).view(16, 1, 2, 2)
    with torch.no_grad():
        probabilities = model.log_prob(images).sum(dim=(1, 2, 3)).exp()
    torch.testing.assert_close(probabilities.sum(), torch.tensor(1.0, dtype=torch.float64))
    drawn = model.generate(num_images=20_000, generator=seeded()).flatten(1) @ torch.tensor([8, 4, 2, 1])
    counts = torch.bincount(drawn, minlength=16)
    chi_squared = ((counts - 20_000 * probabilities) ** 2 / (20_000 * probabilities)).sum()
    assert chi_squared < 37.7  # 99.9th percentile with 15 degrees of freedom


@pytest.mark.slow
@pytest.mark.parametrize("distribution", ["categorical", "logistic_mixture"])
def test_frequencies_of_a_colour_pixel_are_the_probabilities_of_the_model(family, distribution):
    if distribution != "logistic_mixture" and family not in WITH_CHANNEL_GROUPS:
        pytest.skip(FAMILIES[family].lacks["colour_without_mixture"])
    config = {"image_size": 1, "num_channels": 3, "num_levels": 3, "output_distribution": distribution}
    model = build_model(family, **config).double()
    pixels = torch.tensor(list(itertools.product(range(3), repeat=3))).view(27, 3, 1, 1)
    with torch.no_grad():
        probabilities = model.log_prob(pixels).sum(dim=(1, 2, 3)).exp()
    torch.testing.assert_close(probabilities.sum(), torch.tensor(1.0, dtype=torch.float64))
    drawn = model.generate(num_images=20_000, generator=seeded()).flatten(1) @ torch.tensor([9, 3, 1])
    counts = torch.bincount(drawn, minlength=27)
    chi_squared = ((counts - 20_000 * probabilities) ** 2 / (20_000 * probabilities)).sum()
    assert chi_squared < 54.1  # 99.9th percentile with 26 degrees of freedom


@pytest.mark.parametrize("family", WITH_CHANNEL_GROUPS)
def test_with_a_mixture_a_pixel_takes_one_step_and_otherwise_one_a_channel(family, monkeypatch):
    steps = []
    for distribution in ("categorical", "logistic_mixture"):
        config = {"num_channels": 3, "num_levels": 4, "output_distribution": distribution}
        model = build_model(family, **config)
        step, calls = model.sampling_cache_class.compute_pixel, []
        counted = lambda *args, s=step, c=calls: (c.append(args[1:]), s(*args))[1]  # noqa: E731
        with monkeypatch.context() as patch:
            patch.setattr(model.sampling_cache_class, "compute_pixel", counted)
            model.generate(num_images=2, output_scores=True)  # pixel by pixel
        steps.append(len(calls))
    assert steps == [90, 30]


def test_the_level_is_the_first_whose_cumulative_probability_exceeds_the_number():
    scores = torch.tensor([[0.0, 0.0, 0.0, 0.0, -torch.inf]]).expand(6, -1)  # steps at 1/4, 1/2, 3/4, 1, exactly
    noise = torch.tensor([0.0, 0.2499, 0.25, 0.4999, 0.5, 1 - 2**-53], dtype=torch.float64)
    assert levels_from_noise(scores, noise).tolist() == [0, 0, 1, 1, 2, 3]


def test_the_last_possible_level_is_taken_where_rounding_leaves_none():
    scores = torch.tensor([[0.1] * 7 + [0.0]], dtype=torch.float64).log()
    total = scores.softmax(-1).cumsum(-1)[0, -1]
    assert levels_from_noise(scores, total[None]).tolist() == [6]


def test_the_last_level_is_drawn_by_numbers_next_to_1():
    scores = torch.tensor([[1 - 2**-45, 2**-45, 0.0]], dtype=torch.float64).log().expand(3, -1)
    noise = torch.tensor([1 - 2**-44, 1 - 2**-46, 1 - 2**-53], dtype=torch.float64)
    assert levels_from_noise(scores, noise).tolist() == [0, 1, 1]


def test_a_level_of_probability_zero_is_never_drawn():
    scores = torch.tensor([[0.0, 1.0, 0.0]]).log()
    assert levels_from_noise(scores, torch.zeros(1, dtype=torch.float64)).tolist() == [1]


def test_broken_probabilities_are_an_error_and_no_picture(family):
    for sampler in SAMPLERS:
        for do_sample in (True, False):
            model = build_model(family)
            model.head.layers[-1].bias.data.fill_(torch.nan)
            with pytest.raises(ValueError, match="the model's weights are not finite, or a logits processor"):
                model.generate(sampler=sampler, do_sample=do_sample)
    model = build_model(family)
    with pytest.raises(ValueError, match="a logits processor forbids all levels"):
        model.generate(logits_processor=[lambda levels, scores: torch.full_like(scores, -torch.inf)])


aten = torch.ops.aten
# What a CUDA graph cannot hold: looks of the host at values, shapes that depend on values, constants made on the host.
NOT_RECORDED = (
    aten._local_scalar_dense,
    aten.nonzero,
    aten.masked_select,
    aten.lift_fresh,
    aten.unique_dim,
    aten._unique2,
)
INDEXING = (aten.index, aten.index_put, aten.index_put_)


class RecordedOperations(TorchDispatchMode):
    """Stands for a CUDA graph on any device: repeats operations on the very tensors that they were recorded with."""

    def __init__(self):
        super().__init__()
        self.num_replays = 0

    def __call__(self, call):
        self.operations = operations = []
        with self:
            call()
        is_first = True

        def replay():
            nonlocal is_first
            if is_first:  # recording has computed it
                is_first = False
                return
            self.num_replays += 1
            for operation, args, kwargs, results in operations:
                for result, new in zip(tree_leaves(results), tree_leaves(operation(*args, **kwargs)), strict=True):
                    if isinstance(result, torch.Tensor) and result.data_ptr() != new.data_ptr():
                        result.copy_(new)

        return replay

    def __torch_dispatch__(self, operation, types, args=(), kwargs=None):
        assert operation.overloadpacket not in NOT_RECORDED, operation
        if operation.overloadpacket in INDEXING:
            assert not any(index.dtype == torch.bool for index in args[1] if index is not None), operation
        results = operation(*args, **(kwargs or {}))
        memory = lambda x: x.detach() if isinstance(x, torch.Tensor) else x  # noqa: E731 - wherever `x.data` goes later
        self.operations.append((operation, *tree_map(memory, (args, kwargs or {}, results))))
        return results


@pytest.fixture
def recordings(monkeypatch):
    """The recordings of all caches, in order, as if the CPU had graphs."""
    recordings = []

    def capture(device):
        recordings.append(RecordedOperations())
        return recordings[-1]

    monkeypatch.setitem(caching_causal_image.CAPTURES, "cpu", capture)
    return recordings


@for_each("kind", KINDS)
def test_steps_can_be_recorded_and_replayed(family, kind, recordings, monkeypatch):
    model = build_model(family, **kind).double()
    request = {"num_images": 3, "image_size": (12, 4), **conditions(model, 3)}
    recordings.clear()
    with monkeypatch.context() as without:
        without.delitem(caching_causal_image.CAPTURES, "cpu")
        expected = model.generate(**request, generator=seeded(0))
    assert torch.equal(model.generate(**request, generator=seeded(0)), expected)
    assert recordings[0].num_replays >= 7  # most of the last 4 rows: what is above, and all pixels in one go
    by_pixel = {"logits_processor": [lambda levels, scores: scores]}  # whose levels are not the distribution's own
    assert torch.equal(model.generate(**request, **by_pixel, generator=seeded(0)), expected)
    assert recordings[0].num_replays >= 7 + 16
    by_row_and_pixel = {"pixel_values": expected, "known_mask": torch.arange(12)[:, None] % 5 == 1}
    assert torch.equal(model.generate(**{**request, **by_row_and_pixel}, generator=seeded(0)), expected)


@pytest.mark.slow
@for_each("kind", KINDS)
def test_recordings_are_kept_for_requests_of_the_same_shape(family, kind, recordings, monkeypatch):
    model = build_model(family, **kind).double()

    def draw(num_images, seed, **changes):
        request = {"num_images": num_images, "image_size": (8, 4), **conditions(model, num_images), **changes}
        return model.generate(**request, generator=seeded(seed))

    def check(*args, **kwargs):
        with monkeypatch.context() as without:
            without.delitem(caching_causal_image.CAPTURES, "cpu")
            expected = draw(*args, **kwargs)
        assert torch.equal(draw(*args, **kwargs), expected)

    recordings.clear()
    draw(3, seed=0)
    num_operations, first = recordings[0].num_replays, recordings[0]
    check(3, seed=1)
    assert first.num_replays > 2 * num_operations  # the second request records nothing and replays every row
    with torch.no_grad():
        for p in model.parameters():
            p.data = p.data + 0.1 * torch.randn(p.shape, generator=seeded(), dtype=p.dtype)  # elsewhere in memory
    check(3, seed=2)
    if model.config.num_classes:
        check(3, seed=2, class_ids=[-1, 1, 0])
    check(2, seed=3)
    replays = first.num_replays
    check(3, seed=4)
    assert first.num_replays > replays  # two shapes are kept
    check(2, seed=3)
    check(1, seed=3)
    replays = first.num_replays
    check(3, seed=5)
    assert first.num_replays == replays  # and no third one

    reference, model = weakref.ref(model), None
    gc.collect()
    assert reference() is None  # what is kept does not keep the model


def test_an_interrupted_request_leaves_no_recordings_behind(recordings):
    model = build_model("gated_pixelcnn").double()
    draw = lambda **kwargs: model.generate(num_images=2, generator=seeded(0), **kwargs)  # noqa: E731
    expected = draw()

    def stop(images, row, levels):
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        draw(streamer=stop)
    replays = recordings[0].num_replays
    assert torch.equal(draw(), expected)
    assert recordings[0].num_replays == replays  # a new cache


def test_without_captures_the_steps_are_run_one_by_one(monkeypatch, caplog):
    model = build_model("gated_pixelcnn")
    expected = model.generate(num_images=2, generator=seeded(0))

    def refuse(call):
        raise RuntimeError("no graphs here")

    monkeypatch.setitem(caching_causal_image.CAPTURES, "cpu", lambda device: refuse)
    assert torch.equal(model.generate(num_images=2, generator=seeded(0)), expected)
    assert caplog.text.count("no graphs here") <= 1


def test_noise_is_one_call_an_image_in_raster_order():
    noise = draw_noise(seeded(5), 2, 12, torch.device("cpu"))
    generator = seeded(5)
    expected = [torch.rand(12, dtype=torch.float64, generator=generator) for _ in range(2)]
    assert torch.equal(noise, torch.stack(expected, dim=1))


@for_each("sampler", SAMPLERS)
def test_known_pixels_are_kept_image_by_image(family, sampler):
    model = build_model(family, num_channels=3, num_levels=4).double()
    given = random_inputs(model, batch=3)["pixel_values"]
    mask = torch.rand(given.shape, generator=seeded()) < 0.4
    given[~mask] = -7  # whatever stands at free positions is ignored
    images = model.generate(pixel_values=given, known_mask=mask, generator=seeded(), sampler=sampler)
    assert torch.equal(images[mask], given[mask])
    free = model.generate(num_images=3, generator=seeded())
    first = mask.permute(0, 2, 3, 1).flatten(1).int().argmax(1)  # before its first given dimension nothing changes
    for i in range(3):
        a, b = (x[i].permute(1, 2, 0).flatten()[: first[i]] for x in (images, free))
        assert torch.equal(a, b)


def test_completions_are_the_same_for_all_samplers_and_for_one_image_expanded(family):
    model = build_model(family).double()
    given = random_inputs(model, batch=1)["pixel_values"]
    upper = torch.zeros(5, 6, dtype=torch.bool)
    upper[:3] = True
    drawn = [
        model.generate(
            pixel_values=given, known_mask=upper, num_images=4, generator=[seeded(s) for s in range(4)], sampler=sampler
        )
        for sampler in SAMPLERS
    ]
    assert torch.equal(drawn[0], drawn[1])
    assert torch.equal(drawn[0], drawn[2])
    assert torch.equal(drawn[0][:, :, :3], given[:, :, :3].expand(4, -1, -1, -1))
    assert not torch.equal(drawn[0][0], drawn[0][1])
    alone = model.generate(pixel_values=given, known_mask=upper, generator=seeded(2))
    assert torch.equal(alone[0], drawn[0][2])
    picture = Image.fromarray(np.where(upper, 128, 127).astype(np.uint8))
    for mask in (upper.numpy(), upper.tolist(), picture, picture.convert("RGB")):
        assert torch.equal(model.generate(pixel_values=given, known_mask=mask, generator=seeded(2)), alone)


@pytest.mark.versions
def test_settings_change_the_image_in_the_same_way_for_all_samplers(family):
    cases = [
        {"temperature": 0.5},
        {"top_k": 2},
        {"top_p": 0.6},
        {"min_p": 0.3},
        {"do_sample": False},
        {"temperature": 2.0, "top_k": 3, "top_p": 0.9},
    ]
    for settings in cases:
        model = build_model(family, num_levels=6).double()
        images = [model.generate(num_images=3, generator=seeded(), sampler=s, **settings) for s in SAMPLERS]
        assert torch.equal(images[0], images[1])
        assert torch.equal(images[0], images[2])
        assert not torch.equal(images[0], model.generate(num_images=3, generator=seeded()))


@pytest.mark.versions
def test_top_k_leaves_k_levels_and_modes_are_modes():
    model = build_model("pixelcnn", num_levels=6)
    output = model.generate(num_images=2, top_k=2, output_scores=True, return_dict_in_generate=True)
    assert all((score > -torch.inf).sum(-1).tolist() == [2, 2] for score in output.scores)
    output = model.generate(do_sample=False, output_scores=True, return_dict_in_generate=True)
    levels = output.sequences.permute(0, 2, 3, 1).flatten()
    assert levels.tolist() == [score.argmax(-1).item() for score in output.scores]


@pytest.mark.versions
def test_user_processors_see_the_earlier_levels_in_raster_order(family):
    class Recorder(LogitsProcessor):
        def __init__(self):
            self.seen = []

        def __call__(self, levels, scores):
            assert scores.shape == (2, 4)
            self.seen.append(levels.clone())
            return scores.masked_fill(torch.tensor([False, False, False, True]), -torch.inf)

    model = build_model(family, num_channels=3, num_levels=4, image_size=[2, 3])
    for sampler in ("naive", "cached"):
        recorder = Recorder()
        images = model.generate(num_images=2, logits_processor=[recorder], sampler=sampler)
        raster = images.permute(0, 2, 3, 1).flatten(1)
        assert images.max() < 3
        assert [seen.shape[1] for seen in recorder.seen] == list(range(18))
        assert all(torch.equal(seen, raster[:, : seen.shape[1]]) for seen in recorder.seen)


@pytest.mark.versions
def test_generation_settings_are_saved_loaded_and_overridden(family, tmp_path):
    model = build_model(family, num_levels=6)
    assert model.generation_config.to_dict().items() >= {"do_sample": True, "temperature": 1.0, "top_k": 0}.items()
    model.generation_config.temperature = 0.5
    model.generation_config.top_k = 3
    model.save_pretrained(tmp_path)
    loaded = type(model).from_pretrained(tmp_path)
    assert type(loaded.generation_config) is PixelCNNGenerationConfig
    assert loaded.generation_config.temperature == 0.5
    by_file = loaded.generate(num_images=3, generator=seeded())
    assert torch.equal(by_file, model.generate(num_images=3, generator=seeded()))
    true_sample = loaded.generate(num_images=3, generator=seeded(), temperature=1.0, top_k=0)
    assert not torch.equal(by_file, true_sample)
    loaded.generation_config.min_p = 0.9
    own = PixelCNNGenerationConfig()
    assert torch.equal(loaded.generate(num_images=3, generator=seeded(), generation_config=own), true_sample)


@pytest.mark.versions
def test_sampling_switches_dropout_off_and_leaves_the_mode_alone(family):
    model = build_model(family, dropout=0.5).double().train()
    images = [model.generate(num_images=2, generator=seeded(), sampler=s) for s in ("naive", "cached")]
    assert model.training
    model.head.eval()
    model.generate()
    assert model.training
    assert not model.head.training
    assert torch.equal(*images)
    assert torch.equal(images[0], model.eval().generate(num_images=2, generator=seeded()))


@pytest.mark.versions
def test_drawn_levels_can_be_trained_on(family):
    model = build_model(family, input_encoding="embedding")
    levels = model.generate(num_images=2)
    model.train()(levels, labels=levels).loss.backward()
    assert model.model.encoding.embedding.weight.grad.any()


@pytest.mark.versions
def test_use_cache_false_means_naive_and_autocast_changes_nothing():
    model = build_model("gated_pixelcnn")
    calls = []
    hook = model.register_forward_hook(lambda *_: calls.append(1))
    images = model.generate(num_images=2, generator=seeded(), use_cache=False)
    assert len(calls) == 30
    hook.remove()
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert torch.equal(images, model.generate(num_images=2, generator=seeded()))


@pytest.mark.versions
def test_a_progress_bar_counts_rows(capsys):
    model = build_model("pixelcnn")
    model.generate(show_progress=True)
    assert "5/5" in capsys.readouterr().err
    model.generate()
    assert capsys.readouterr().err == ""


@pytest.mark.slow
def test_cached_sampling_needs_less_memory_than_a_forward():
    model = build_model("gated_pixelcnn", image_size=28, hidden_size=32, num_hidden_layers=8)
    pixel_values = random_inputs(model, batch=8)["pixel_values"]
    cpu = torch.device("cpu")
    with torch.inference_mode():
        sampling, forward = (
            peak_bytes(f, cpu) for f in (lambda: model.generate(num_images=8), lambda: model(pixel_values))
        )
    assert sampling < forward


# Threads


@pytest.fixture
def two_threads():
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    yield
    torch.set_num_threads(before)


@pytest.mark.usefixtures("two_threads")
def test_a_small_batch_is_drawn_with_one_thread_and_the_number_is_set_back(family):
    model, seen = build_model(family), []
    model.generate(num_images=2, streamer=lambda *row: seen.append(torch.get_num_threads()))
    assert seen == [1] * 5
    assert torch.get_num_threads() == 2

    def fail(images, row, levels):
        raise KeyError(torch.get_num_threads())

    with pytest.raises(KeyError, match="1"):
        model.generate(num_images=2, streamer=fail)
    assert torch.get_num_threads() == 2


@pytest.mark.usefixtures("two_threads")
def test_a_batch_gets_the_threads_that_pay(family, monkeypatch):
    model = build_model(family)
    images = -(-FEATURES_PER_THREAD // model.config.hidden_size)
    assert [threads_that_pay(model, batch) for batch in (1, images, 2 * images, 100 * images)] == [1, 1, 2, 2]
    torch.set_num_threads(1)
    assert threads_that_pay(model, 100 * images) == 1
    torch.set_num_threads(2)
    monkeypatch.setattr(sampling_causal_image, "device_of", lambda model: torch.device("cuda"))
    assert threads_that_pay(model, 1) == 2
    monkeypatch.undo()
    monkeypatch.setattr(model, "sampling_cache_class", ForwardCache)  # its operations are those of a forward
    assert threads_that_pay(model, 1) == 2


@pytest.mark.usefixtures("two_threads")
def test_a_seeded_sample_is_the_same_with_any_number_of_threads_in_float64(family, monkeypatch):
    model = build_model(family, image_size=[3, 4], hidden_size=64, head_hidden_size=64).double()
    cache_class, images, steps, rows = model.sampling_cache_class, [], [], []
    start_row = cache_class.start_row
    monkeypatch.setattr(
        cache_class, "start_row", lambda cache, row: rows.append(torch.get_num_threads()) or start_row(cache, row)
    )
    for least in (FEATURES_PER_THREAD, 3 * 64 * 2, 1):  # one thread; two for a row of 4 pixels; two
        monkeypatch.setattr(sampling_causal_image, "FEATURES_PER_THREAD", least)
        images.append(
            model.generate(num_images=3, generator=seeded(), streamer=lambda *_: steps.append(torch.get_num_threads()))
        )
    assert steps == [1] * 6 + [2] * 3
    assert rows == [1] * 5 + [2] * 4  # the first two rows have as many as a step
    assert torch.equal(images[1], images[0])
    assert torch.equal(images[2], images[0])


@pytest.mark.parametrize(
    ("seconds", "expected"), [(0.5, [1, 1, 2, 2, 2, 2, 2]), (1.4, [1, 1, 2, 2, 2, 1, 1]), (9.0, [1, 1, 2, 1, 1, 1, 1])]
)
@pytest.mark.usefixtures("two_threads")
def test_rows_begin_with_more_threads_as_long_as_these_do_not_lose_a_row(seconds, expected, monkeypatch):
    clock, found = [0.0], []

    class Cache:
        def start_row(self, row):
            found.append(torch.get_num_threads())
            clock[0] += 1.0 if found[-1] == 1 else seconds

    monkeypatch.setattr(sampling_causal_image, "time", SimpleNamespace(perf_counter=lambda: clock[0]))
    torch.set_num_threads(1)
    threads = RowThreads(2)
    for row in range(7):
        threads.start_row(Cache(), row)
    assert found == expected
    assert torch.get_num_threads() == 1


def test_threads_that_draw_at_once_keep_their_own_numbers(monkeypatch):
    model, meet, found = build_model("gated_pixelcnn"), threading.Barrier(2, timeout=600), {}
    expected = model.generate(num_images=2, generator=seeded())

    def serve(own):
        torch.get_num_threads()  # at its first use of torch a thread takes over the number that was set last, by any
        torch.set_num_threads(own)

        def streamer(images, row, levels):
            found[own, row] = torch.get_num_threads()
            meet.wait()  # both are in the same row

        found[own] = torch.equal(model.generate(num_images=2, generator=seeded(), streamer=streamer), expected)
        found[own, "after"] = torch.get_num_threads()

    workers = [threading.Thread(target=serve, args=(own,)) for own in (2, 3)]
    before = torch.get_num_threads()
    for worker in workers:
        worker.start()
    for worker in workers:
        worker.join()
    for own in (2, 3):
        assert found[own]
        assert [found[own, row] for row in range(5)] == [1] * 5
        assert found[own, "after"] == own
    assert torch.get_num_threads() == before
    torch.set_num_threads(before)  # what threads that are started later begin with
