"""Pictures that grow, and that notebooks show: the same images as `generate` returns, and an end when asked for."""

import io
import threading
import time

import numpy as np
import pytest
import sample
import torch
from conftest import VARIANTS, build_model, for_each, random_inputs, seeded
from PIL import Image

from hf_pixelcnn import PixelCNNImageProcessor, PixelCNNPipelineOutput, animation, image_grid, rows_as_drawn
from hf_pixelcnn.receptive_field_causal_image import regions_of


def opened(data):
    picture = Image.open(io.BytesIO(data))
    picture.load()
    return picture


def test_rows_come_as_they_are_drawn_and_end_in_what_generate_returns():
    model = build_model("gated_pixelcnn", num_levels=3)
    expected = model.generate(num_images=3, generator=seeded())
    levels, rows = torch.zeros_like(expected), []

    def read():
        returned = yield from rows_as_drawn(model, num_images=3, generator=seeded(), max_batch_size=2)
        rows.append(returned)

    for images, row, row_levels in read():
        levels[images, :, row] = row_levels
    assert torch.equal(levels, expected)
    assert torch.equal(rows[0], expected)
    with pytest.raises(ValueError, match="unknown arguments"):
        next(rows_as_drawn(model, number=3))


def test_a_reader_who_leaves_ends_the_drawing():
    model = build_model("gated_pixelcnn", image_size=64)
    before = threading.active_count()
    rows = rows_as_drawn(model, generator=seeded())
    next(rows)
    rows.close()
    deadline = time.monotonic() + 1  # all 64 rows take longer
    while threading.active_count() > before and time.monotonic() < deadline:
        time.sleep(0.01)
    assert threading.active_count() == before


def test_an_animation_ends_with_the_whole_picture_and_rests_there():
    frames = [Image.new("RGB", (20, 10), (0, 0, value)) for value in (0, 0, 100, 200)]  # equal ones become one
    moving = opened(animation(frames, seconds=0.4))
    assert moving.info["loop"] == 0
    durations = []
    for index in range(moving.n_frames):
        moving.seek(index)
        durations.append(moving.info["duration"])
    assert durations == [200, 100, 400]
    assert np.array_equal(np.asarray(moving.convert("RGB")), np.asarray(frames[-1]))
    with pytest.raises(ValueError, match="at least one frame"):
        animation([])


def test_the_script_writes_an_animation_of_the_same_images(tmp_path):
    build_model("gated_pixelcnn", num_classes=2).save_pretrained(tmp_path)
    PixelCNNImageProcessor(num_levels=2).save_pretrained(tmp_path)
    words = ["--model", str(tmp_path), "--num_images", "4", "--seed", "3"]
    for name in ("grow.gif", "whole.png"):
        sample.main([*words, "--output", str(tmp_path / name)])
    moving, whole = Image.open(tmp_path / "grow.gif"), Image.open(tmp_path / "whole.png")
    moving.seek(moving.n_frames - 1)
    whole = whole.crop((12, 28, whole.width - 12, whole.height - 12))  # without the margin that names the classes
    small = [np.asarray(picture.convert("L").resize((14, 12), Image.Resampling.BOX)) for picture in (moving, whole)]
    assert np.array_equal(*small)  # the two are enlarged by different whole numbers
    with pytest.raises(SystemExit, match=r"a .gif shows at most 64 new images"):
        sample.main([*words, "--num_images", "65", "--output", str(tmp_path / "grow.gif")])


def test_a_notebook_shows_a_batch_as_a_grid():
    for channels in (1, 3):
        levels = torch.randint(4, (3, channels, 5, 6), generator=seeded())
        processor = PixelCNNImageProcessor(num_levels=4, num_channels=channels)
        images = processor.post_process(levels)
        grid = np.asarray(image_grid(images))
        assert np.array_equal(np.asarray(opened(images._repr_png_())), grid)
        for output_type in ("pil", "np", "pt"):
            output = PixelCNNPipelineOutput(images=processor.post_process(levels, output_type=output_type))
            assert np.array_equal(np.asarray(opened(output._repr_png_())), grid), output_type
    assert PixelCNNPipelineOutput()._repr_png_() is None


@for_each("variant", VARIANTS)
def test_the_distribution_of_one_level_is_that_of_the_likelihood(family, variant):
    model = build_model(family, **variant).double()
    inputs = random_inputs(model)
    levels = inputs["pixel_values"]
    with torch.no_grad():
        log_prob = model.log_prob(**inputs)
        for row, column, channel in [(0, 0, 0), (2, 3, levels.shape[1] - 1), (4, 5, 0)]:
            found = model.level_log_prob(levels, row, column, channel, class_ids=inputs.get("class_ids"))
            assert torch.allclose(found.exp().sum(-1), torch.ones(2, dtype=torch.float64))
            true = found.gather(1, levels[:, channel, row, column, None])[:, 0]
            assert torch.allclose(true, log_prob[:, channel, row, column])
        for place in [(-1, 0, 0), (0, 6, 0), (0, 0, -1), (0, 0, levels.shape[1])]:
            with pytest.raises(IndexError, match="There is no dimension of `channel`"):
                model.level_log_prob(levels, *place, class_ids=inputs.get("class_ids"))


def test_regions_are_those_of_the_picture_drawn_by_hand():
    seen = torch.zeros(4, 5, dtype=torch.bool)
    seen[1, :3] = seen[2, 0] = True
    future, beyond, field, blind, pixel = range(5)
    assert regions_of(seen, row=2, column=1).tolist() == [
        [beyond] * 5,
        [field, field, field, beyond, beyond],
        [field, pixel, future, future, future],
        [future] * 5,
    ]
    seen[1, 2] = False
    seen[1, 3] = True
    assert regions_of(seen, row=2, column=1).tolist()[1] == [field, field, blind, field, beyond]
