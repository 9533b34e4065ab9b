"""Pictures that training and its scripts write: rows by class, the seed in the file, losses in bits."""

import math

import numpy as np
import pytest
import torch
from conftest import build_model
from matplotlib.axes import Axes
from PIL import Image

from hf_pixelcnn import PixelCNNImageProcessor, image_grid
from hf_pixelcnn.training import draw_loss_curve, draw_samples, save_picture
from hf_pixelcnn.training.pictures import grid_of_classes


@pytest.fixture
def processor():
    return PixelCNNImageProcessor(num_levels=2, binarization="threshold")


def test_samples_of_a_conditional_model_have_their_classes_and_seed(processor, tmp_path):
    model = build_model("gated_pixelcnn", num_classes=2, image_size=8)
    draw_samples(model, processor, 6, 3, tmp_path / "samples.png")
    picture = Image.open(tmp_path / "samples.png")
    assert picture.text == {"seed": "3"}
    levels = model.generate(class_ids=[0, 0, 0, 1, 1, 1], generator=torch.Generator().manual_seed(3))
    grid = image_grid(processor.post_process(levels), 3)
    left, top = picture.width - grid.width - 12, picture.height - grid.height - 12
    pixels = np.asarray(picture)
    assert np.array_equal(pixels[top : top + grid.height, left : left + grid.width], np.asarray(grid))
    for row in (0, 1):  # its name on the left
        assert (pixels[top + row * grid.height // 2 : top + (row + 1) * grid.height // 2, :left] < 100).any()


def test_classes_in_turn_have_their_names_above_their_columns():
    images = [Image.new("L", (5, 4), shade) for shade in (10, 90, 170, 20, 100, 180)]
    names = ["cat", "dog", "a class of many words, which need more width than its images have"]
    picture = np.asarray(grid_of_classes(images, names))
    grid = picture[28:-12, 12:-12]
    scale = grid.shape[1] // (3 * (5 + 2) - 2)
    shades = grid[scale :: 6 * scale, scale :: 7 * scale]
    assert shades.tolist() == [[10, 90, 170], [20, 100, 180]]
    for column in range(3):
        left = column * grid.shape[1] // 3
        ink = (picture[:28, 12 + left : 12 + left + grid.shape[1] // 3] < 100).any(0)
        assert ink.any()
        assert not ink[-2:].any()  # a name ends before the next begins


@pytest.mark.parametrize("num_classes", [0, 9])
def test_samples_without_rows_of_classes_are_about_a_square(processor, tmp_path, num_classes):
    model = build_model("gated_pixelcnn", num_classes=num_classes, image_size=8)
    draw_samples(model, processor, 9, 0, tmp_path / "samples.png")
    picture = Image.open(tmp_path / "samples.png")
    assert picture.text == {"seed": "0"}
    assert picture.width == picture.height >= 480


def test_pictures_of_other_formats_have_no_text(tmp_path):
    save_picture(Image.new("L", (8, 8)), tmp_path / "picture.jpg", seed=1)
    assert Image.open(tmp_path / "picture.jpg").size == (8, 8)


def test_a_loss_curve_is_in_bits(tmp_path, monkeypatch):
    plotted, plot = [], Axes.plot
    monkeypatch.setattr(Axes, "plot", lambda self, *args, **kw: plotted.append(args[1]) or plot(self, *args, **kw))
    history = [
        {"epoch": 0.75, "step": 3, "loss": math.log(2)},
        {"epoch": 1, "step": 4, "loss": 5 * math.log(2)},  # the one step that is left of the epoch
        {"epoch": 1, "step": 4, "eval_loss": 1.0},
        {"epoch": 1.75, "step": 7, "loss": math.log(2) / 2},
    ]
    draw_loss_curve(history, tmp_path / "curve.png")
    assert plotted[0] == pytest.approx((1, (5 + 3 * 0.5) / 4))  # windows of three steps
    assert plotted[1] == pytest.approx((1 / math.log(2),))
    assert Image.open(tmp_path / "curve.png").width >= 480
