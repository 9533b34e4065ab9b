"""What the page does, without a browser: as `generate` and `log_prob` do, and any file is a picture or a sentence."""

import io
import random
import re
import threading

import numpy as np
import pytest
import torch
from conftest import ROOT, bomb, seeded
from PIL import Image

from hf_pixelcnn import receptive_field
from hf_pixelcnn.app import actions, uploads

CARDS = ROOT / "model_cards"


@pytest.fixture(scope="module")
def gated():
    return actions.load_shown_model(CARDS / "gated-pixelcnn-mnist-binary")


@pytest.fixture(scope="module")
def digit(gated):
    with Image.open(ROOT / "hf_pixelcnn" / "app" / "digits.png") as strip:
        return gated.levels_of(strip.crop((84, 0, 112, 28)))  # a 3


def test_models_say_what_they_were_trained_for(gated):
    assert not gated.is_guided
    fashion = actions.load_shown_model(CARDS / "pixelcnn-pp-fashion-mnist")
    assert fashion.is_guided
    assert fashion.class_names[8] == "Bag"
    assert fashion.class_id(actions.ANY) is None
    with pytest.raises(ValueError, match="no class 'Hat'"):
        fashion.class_id("Hat")


def test_what_grows_ends_as_what_generate_draws(gated):
    drawings = list(actions.draw(gated, "7", 3, seed=5, top_p=0.9))
    levels = gated.model.generate(num_images=3, class_ids=7, generator=seeded(5), top_p=0.9)
    last = drawings[-1]
    small = last.picture.resize((58, 58), Image.Resampling.NEAREST)  # 2 × 2 images, a gap between
    assert np.array_equal(np.asarray(small)[:28, :28], np.asarray(gated.picture_of(levels[:1])))
    assert np.array_equal(np.asarray(small)[30:, :28], np.asarray(gated.picture_of(levels[2:])))
    first = np.asarray(drawings[0].picture)
    assert (first[-1] == 128).all()  # nothing there yet
    assert not any(drawing.animation for drawing in drawings[:-1])
    with Image.open(io.BytesIO(last.animation)) as moving:
        moving.seek(moving.n_frames - 1)
        assert np.array_equal(np.asarray(moving.convert("L")), np.asarray(last.picture))
    in_turn = actions.classes_to_draw(gated, actions.ANY, 12)
    assert in_turn.tolist() == [0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 0, 1]


def test_completions_keep_what_is_kept_and_are_those_of_generate(gated, digit):
    known = torch.zeros(28, 28, dtype=torch.bool)
    known[:14] = True
    assert actions.is_exact(known)
    assert not actions.is_exact(known.T)
    request = {"pixel_values": digit, "class_ids": 3, "num_images": 2}
    for candidates, mask in ((1, known), (4, known.T)):
        first, *_, last = actions.complete(gated, digit, mask, 3, 2, candidates, seed=1)
        seen = mask.clone()
        seen[0] = True  # of the first completion, or of all that are drawn together
        for picture, is_drawn in zip(first.pictures, [True, candidates == 1], strict=True):
            assert np.array_equal(np.asarray(picture) == 128, ~(seen if is_drawn else mask).numpy())
        assert not first.is_done
        output = gated.model.generate(
            **request, known_mask=mask, num_resamples=candidates, generator=seeded(1), return_dict_in_generate=True
        )
        for picture, levels in zip(last.pictures, output.sequences, strict=True):
            assert np.array_equal(np.asarray(picture), np.asarray(gated.picture_of(levels[None])))
        assert last.is_done
        sizes = [] if candidates == 1 else output.effective_sample_size.tolist()
        assert last.sample_sizes == pytest.approx(sizes)  # the page has one thread


def test_while_there_are_candidates_the_first_of_them_is_shown(gated, digit, monkeypatch):
    monkeypatch.setattr(actions, "SECONDS_BETWEEN_PICTURES", -1)  # every row
    known = (torch.arange(28) > 13).expand(28, 28)
    *growing, _ = actions.complete(gated, digit, known, 3, 1, 4, seed=1)
    candidates = torch.zeros(4, 1, 28, 28, dtype=torch.long)
    gated.model.generate(
        pixel_values=digit,
        class_ids=3,
        known_mask=known,
        num_resamples=4,
        generator=seeded(1),
        streamer=lambda images, row, levels: candidates[images, :, row].copy_(levels),
    )
    shown = np.asarray(growing[-1].pictures[0])
    expected = [np.array_equal(shown, np.asarray(gated.picture_of(one[None]))) for one in candidates]
    assert expected == [True, False, False, False]


def test_candidates_stop_with_the_row_in_work(gated, digit, monkeypatch):
    generate, is_closed, rows = gated.model.generate, threading.Event(), []

    def slow(streamer, **request):  # nothing is drawn after the first row until the iterator is closed
        def on_row(images, row, levels):
            streamer(images, row, levels)
            rows.append(row)
            is_closed.wait()

        generate(streamer=on_row, **request)

    monkeypatch.setattr(gated.model, "generate", slow)
    others = set(threading.enumerate())
    completions = actions.complete(gated, digit, torch.zeros(28, 28, dtype=torch.bool), 3, 8, 16, seed=0)
    assert not next(completions).is_done
    (drawing,) = set(threading.enumerate()) - others
    completions.close()
    is_closed.set()
    drawing.join(60)
    assert not drawing.is_alive()
    assert rows == [0]


def test_a_score_is_the_likelihood_and_a_look_the_prediction(gated, digit):
    found = actions.score(gated, digit, actions.ANY)
    assert found.class_id == 3
    with torch.no_grad():
        log_prob = gated.model.log_prob(digit, class_ids=torch.tensor([3]))
        probabilities = gated.classifier(digit).logits[0].softmax(-1)
    assert found.nats == pytest.approx(-log_prob.sum().item(), rel=1e-5)
    assert torch.allclose(found.surprise, -log_prob[0, 0], atol=1e-5)
    assert torch.allclose(found.class_probabilities, probabilities, atol=1e-5)
    assert found.payload_bytes == pytest.approx(found.nats / np.log(2) / 8, abs=8)
    assert found.payload_bytes < found.png_bytes < found.stream_bytes
    look = actions.look_inside(gated, digit, 10, 12, 0, "3")
    assert look.counts["receptive field"] == receptive_field(gated.model, 10, 12).sum()
    assert sum(look.counts.values()) == 784
    assert look.probabilities[look.level].log().item() == pytest.approx(log_prob[0, 0, 10, 12].item(), abs=1e-4)


def png_of(size, mode="L", **options):
    file = io.BytesIO()
    Image.new(mode, size, 40 if mode == "L" else None).save(file, "PNG", **options)
    return file.getvalue()


def hostile_files():
    """50 files that are damaged, cut off, too large, of another kind, or pictures of an odd kind."""
    draw = random.Random(0)
    noise = Image.effect_noise((40, 30), 80)
    whole = {}
    for kind in ("PNG", "JPEG", "GIF", "BMP", "WEBP"):
        file = io.BytesIO()
        noise.save(file, kind)
        whole[kind] = file.getvalue()
    files = [data[: len(data) * share // 5] for data in whole.values() for share in range(5)]  # cut off
    for data in whole.values():  # damaged inside
        for _ in range(2):
            damaged = bytearray(data)
            for _ in range(20):
                damaged[draw.randrange(len(damaged))] = draw.randrange(256)
            files.append(bytes(damaged))
    files += [bomb(), png_of((5000, 5000), "1"), b"\0" * (uploads.MAX_BYTES + 1)]
    files += [b"", b"text", b"<svg onload=alert(1)>", b"GIF89a", b"%PDF-1.4", b"PK\3\4" + b"\0" * 40, b"MZ" * 100]
    deep = io.BytesIO()
    Image.fromarray(np.linspace(0, 65535, 1200).astype(np.uint16).reshape(30, 40)).save(deep, "PNG")
    moving = io.BytesIO()
    noise.save(moving, "GIF", save_all=True, append_images=[noise.rotate(90)])
    clear = png_of((9, 50), "RGBA")
    palette = png_of((1, 1), "P", transparency=0)
    return [*files, deep.getvalue(), moving.getvalue(), clear, palette, png_of((1, 3000))]


def test_any_file_is_a_picture_or_a_sentence(tmp_path):
    files, read, sentences = hostile_files(), 0, []
    assert len(files) == 50
    for index, data in enumerate(files):
        path = tmp_path / str(index)
        path.write_bytes(data)
        try:
            picture, _ = uploads.read_picture(path)
        except uploads.UploadError as error:
            sentences.append(str(error))
            continue
        read += 1
        for channels, mode in ((1, "L"), (3, "RGB")):
            fitted, _ = uploads.fit(picture, 28, 32, channels)
            assert (fitted.mode, fitted.size) == (mode, (32, 28))
    assert 5 <= read < 25
    assert any("5000 × 5000 pixels; at most 17 million" in sentence for sentence in sentences)
    assert any("at most 5 MB" in sentence for sentence in sentences)
    assert all(re.fullmatch(r"(This|The) [^\n]*\.", sentence) for sentence in sentences)


def test_a_picture_is_fitted_and_words_say_how(tmp_path):
    deep = np.linspace(0, 65535, 1200).astype(np.uint16).reshape(30, 40)
    Image.fromarray(deep).save(tmp_path / "deep.png")
    picture, done = uploads.read_picture(tmp_path / "deep.png")
    assert done == ["its 16 bits became 8"]
    assert np.array_equal(np.asarray(picture), deep >> 8)
    Image.new("RGBA", (60, 30), (255, 0, 0, 0)).save(tmp_path / "clear.png")
    picture, done = uploads.read_picture(tmp_path / "clear.png")
    assert (done, picture.getpixel((0, 0))) == (["it was put on black"], (0, 0, 0))
    picture.putpixel((30, 15), (255, 0, 0))
    fitted, done = uploads.fit(picture, 28, 28, 1)
    assert fitted.size == (28, 28)
    assert done == ["its colours became grey", "its middle was cut out", "60 × 30 pixels became 28 × 28"]
    assert uploads.fit(fitted, 28, 28, 1)[1] == []
