"""training/demo.py shows digits first, counts training alone, and says so where the time was too short."""

import re
from types import SimpleNamespace

import demo
import numpy as np
import pytest
import torch
from PIL import Image

from hf_pixelcnn import image_grid
from hf_pixelcnn.sampling_causal_image import num_threads
from hf_pixelcnn.training.pictures import add_captions


@pytest.mark.slow
def test_the_demo_draws_published_digits_first_and_says_that_training_was_too_short(tmp_path, capsys):
    threads = torch.get_num_threads()
    demo.main(["--output_dir", str(tmp_path), "--max_seconds", "2", "--max_steps", "6"])
    assert torch.get_num_threads() == threads
    said = capsys.readouterr().out
    assert [line[:2] for line in said.splitlines() if not line.startswith(" ")] == ["1.", "2.", "3.", "4."]
    steps = int(re.search(r"(\d+) steps of 16 digits in", said)[1])
    assert 1 <= steps <= 6
    assert "pixelcnn-pp-mnist" in said
    assert "Many of these are not digits yet" in said
    seconds = re.search(r"--max_seconds (\d+)", said)[1]
    assert int(seconds) > 2
    written = {path.name for path in tmp_path.glob("*.png")}
    assert written == {"published_samples.png", "published_completions.png", "samples.png", "completions.png"}
    assert (tmp_path / "model.safetensors").exists()
    for name in written:
        assert str(tmp_path / name) in said
        pixels = np.asarray(Image.open(tmp_path / name))
        assert min(pixels.shape) >= 480
        assert (pixels[:5] == 255).all()  # the margin
        assert (pixels[5:40] < 128).any()  # its caption
    digits = np.asarray(Image.open(tmp_path / "published_samples.png"))
    assert 0.1 < (digits[60:] > 200).mean() < 0.4  # strokes, not noise


def test_a_copy_without_published_models_is_told_so(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(demo, "PUBLISHED", tmp_path / "model_cards" / "gone")
    demo.show_published(tmp_path, seed=0)
    assert "model_cards/gone, a published model, is not in this copy" in capsys.readouterr().out
    assert not list(tmp_path.iterdir())


class Trainer:
    """Lets steps of given lengths pass before a [`demo.TrainingClock`]."""

    def __init__(self, clock, monkeypatch):
        self.now, self.clock, self.control = 1000.0, clock, SimpleNamespace(should_training_stop=False)
        monkeypatch.setattr(demo, "time", SimpleNamespace(perf_counter=lambda: self.now))
        clock.on_train_begin(None, None, self.control)

    def step(self, seconds):
        self.now += seconds
        self.clock.on_step_end(
            None, SimpleNamespace(global_step=len(self.clock.seconds) + 1, max_steps=9), self.control
        )


@pytest.mark.parametrize(
    ("slower", "expected"), [(0.6, [1, 1, 1, 2, 2, 2, 2]), (1.6, [1, 1, 1, 2, 2, 1, 1]), (9, [1, 1, 1, 2, 1, 1, 1])]
)
def test_training_has_the_threads_that_turn_out_faster(slower, expected, monkeypatch):
    trainer, found = Trainer(demo.TrainingClock(max_seconds=1000, max_threads=2), monkeypatch), []
    with num_threads(1):
        for _ in expected:
            found.append(torch.get_num_threads())
            trainer.step(1 if found[-1] == 1 else slower)
    assert found == expected


def test_training_stops_after_its_own_time_and_says_how_far_it_is(monkeypatch, capsys):
    trainer = Trainer(demo.TrainingClock(max_seconds=60, max_threads=1), monkeypatch)
    for seconds, stops in [(15, False), (15, False), (25, False), (10, True)]:
        trainer.step(seconds)
        assert trainer.control.should_training_stop is stops
    assert capsys.readouterr().out.splitlines() == [
        "   step 2 of at most 9, 30 s",
        "   step 3 of at most 9, 55 s",
    ]


def test_captions_stand_beside_the_grid_that_they_do_not_change():
    grid = image_grid([Image.new("L", (4, 4), 90)] * 6, columns=3)
    picture = add_captions(grid, "a title " * 20, ["0", "one"], ["given", "drawn", "drawn"])
    left, top = picture.width - grid.width - 12, picture.height - grid.height - 12
    pixels = np.asarray(picture)
    assert np.array_equal(pixels[top : top + grid.height, left : left + grid.width], np.asarray(grid))
    column = grid.width // 3
    third = pixels[top - 20 : top, left + 2 * column + 5 :]
    assert (third == 255).all()  # the second "drawn" is not repeated
    assert (pixels[top - 20 : top, left : left + 2 * column] < 100).any()
    for row in (0, 1):
        half = pixels[top + row * grid.height // 2 : top + (row + 1) * grid.height // 2, :left]
        assert (half < 100).any()
    assert len(np.unique(np.flatnonzero((pixels[: top - 20] < 100).any(1)) // 20)) > 1  # a long title has lines
