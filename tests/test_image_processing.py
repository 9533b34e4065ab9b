"""Images to levels and back: exact for every number of levels, one reading for every input, an error for the rest."""

import io
import json
import pickle
import warnings
from fractions import Fraction
from itertools import product
from pathlib import Path

import datasets
import numpy as np
import pytest
import torch
from PIL import Image, ImageCms, features

from hf_pixelcnn.image_processing_causal_image import PixelCNNImageProcessor, dequantize, quantize

pytestmark = pytest.mark.versions

DIGITS = Path(__file__).parent / "data" / "mnist_digits"
ALL_LEVELS = range(2, 257)


def random_pixels(*shape, seed=0):
    return np.random.default_rng(seed).integers(0, 256, shape, dtype=np.uint8)


def levels_of(images, **options):
    options = {"return_tensors": "np", **options}
    return PixelCNNImageProcessor()(images, **options)["pixel_values"]


def png_bytes(image):
    buffer = io.BytesIO()
    image.save(buffer, "PNG")
    return buffer.getvalue()


# Quantisation


def test_quantize_is_the_floor_of_the_fraction_and_reaches_every_level():
    pixels = np.arange(256, dtype=np.uint8)
    for num_levels in ALL_LEVELS:
        expected = [Fraction(x * num_levels, 256).__floor__() for x in range(256)]
        assert quantize(pixels, num_levels).tolist() == expected
        assert set(expected) == set(range(num_levels))


def test_dequantize_gives_the_pixel_nearest_to_an_even_scale_among_those_of_the_level():
    for num_levels in ALL_LEVELS:
        table = dequantize(np.arange(num_levels), num_levels).tolist()
        for level, pixel in enumerate(table):
            candidates = [x for x in range(256) if x * num_levels // 256 == level]
            even = Fraction(255 * level, num_levels - 1)
            assert pixel in candidates
            assert abs(pixel - even) == min(abs(x - even) for x in candidates)
        assert (table[0], table[-1]) == (0, 255)


def test_dequantize_rounds_halves_up():
    assert dequantize(np.arange(7), 7).tolist() == [0, 43, 85, 128, 170, 213, 255]  # 42.5, 127.5 and 212.5


def test_levels_survive_the_way_through_an_image():
    for num_levels in ALL_LEVELS:
        levels = torch.arange(num_levels).reshape(1, 1, 1, num_levels)
        processor = PixelCNNImageProcessor(num_levels=num_levels)
        assert torch.equal(quantize(dequantize(levels, num_levels), num_levels), levels)
        (image,) = processor.post_process(levels)
        image = Image.open(io.BytesIO(png_bytes(image)))
        assert torch.equal(processor(image, return_tensors="pt")["pixel_values"], levels)
        colour = torch.cat([levels, levels.flip(3), levels.roll(1, 3)], 1)  # (1, 3, 1, num_levels)
        processor = PixelCNNImageProcessor(num_levels=num_levels, num_channels=3)
        for output_type, layout in (("pil", None), ("np", "channels_last"), ("pt", "channels_first")):
            images = processor.post_process(colour, output_type)
            again = processor(images, input_data_format=layout, return_tensors="pt")["pixel_values"]
            assert torch.equal(again, colour)


def test_binary_levels_survive_at_every_threshold_and_as_coin_tosses():
    levels = np.array([[[[0, 1], [1, 0]]]])
    for threshold in range(255):
        processor = PixelCNNImageProcessor(num_levels=2, binarization="threshold", threshold=threshold)
        assert np.array_equal(processor(processor.post_process(levels), return_tensors="np")["pixel_values"], levels)
    processor = PixelCNNImageProcessor(num_levels=2, binarization="stochastic")
    assert np.array_equal(processor(processor.post_process(levels), return_tensors="np")["pixel_values"], levels)


def test_numpy_and_torch_give_the_same_levels_and_keep_their_library():
    pixels = random_pixels(2, 3, 5)
    for dtype in (torch.uint8, torch.int16, torch.uint16, torch.int32, torch.int64):
        levels = quantize(torch.from_numpy(pixels).to(dtype), 21)
        assert levels.dtype == torch.int64
        assert np.array_equal(levels.numpy(), quantize(pixels.astype(str(dtype)[6:]), 21))
        assert dequantize(levels.to(dtype), 21).dtype == torch.uint8
    assert quantize(pixels, 21).dtype == np.int64
    assert dequantize(quantize(pixels, 21), 21).dtype == np.uint8


def test_quantize_and_dequantize_refuse_what_they_cannot_map():
    cases = [
        (np.array([256]), 256, ValueError, "0 … 255, got values from 256 to 256"),
        (torch.tensor([-1]), 256, ValueError, "0 … 255, got values from -1 to -1"),
        (np.array([0]), 1, ValueError, "`num_levels` must be an integer from 2 to 256, got 1"),
        (np.array([0.5]), 4, TypeError, "integer dtype, got float64"),
        (torch.tensor([True]), 4, TypeError, "integer dtype, got torch.bool"),
        ([0, 1], 4, TypeError, "torch tensor or a numpy array, got list"),
    ]
    for function in [quantize, dequantize]:
        for values, num_levels, error, message in cases:
            with pytest.raises(error, match=message):
                function(values, num_levels)


# What comes out


def test_output_is_int64_channels_first_in_the_asked_library():
    images = [Image.fromarray(random_pixels(7, 5, seed=i)) for i in range(3)]
    processor = PixelCNNImageProcessor()
    torch_levels = processor(images, return_tensors="pt")["pixel_values"]
    assert (torch_levels.dtype, torch_levels.shape) == (torch.int64, (3, 1, 7, 5))
    numpy_levels = processor(images=images, return_tensors="np").pixel_values
    assert (type(numpy_levels), numpy_levels.dtype) == (np.ndarray, np.int64)
    assert np.array_equal(numpy_levels[:, 0], [np.asarray(image) for image in images])
    listed = processor(images)["pixel_values"]
    assert type(listed) is list
    assert [(type(levels), levels.dtype) for levels in listed] == [(np.ndarray, np.int64)] * 3
    assert np.array_equal(listed, numpy_levels)
    assert np.array_equal(torch_levels, numpy_levels)


def test_post_process_gives_pil_numpy_and_torch_images():
    levels = np.random.default_rng(0).integers(0, 5, (2, 3, 4, 6))
    processor = PixelCNNImageProcessor(num_levels=5, num_channels=3)
    pixels = np.array([0, 64, 128, 191, 255])[levels]
    for given in (levels, levels.astype(np.uint8), torch.from_numpy(levels), torch.from_numpy(levels).to(torch.int16)):
        images = processor.post_process(given)
        assert [(image.mode, image.size) for image in images] == [("RGB", (6, 4))] * 2
        assert np.array_equal([np.asarray(image) for image in images], pixels.transpose(0, 2, 3, 1))
        array = processor.post_process(given, output_type="np")
        assert array.dtype == np.uint8
        assert np.array_equal(array, pixels.transpose(0, 2, 3, 1))
        tensor = processor.post_process(given, output_type="pt")
        assert tensor.dtype == torch.uint8
        assert np.array_equal(tensor, pixels)
    (grey,) = PixelCNNImageProcessor(num_levels=5).post_process(levels[:1, :1])
    assert grey.mode == "L"
    assert np.array_equal(np.asarray(grey), pixels[0, 0])


def test_post_process_refuses_what_are_no_levels():
    cases = [
        (np.zeros((1, 1, 2, 2), int), "jpg", ValueError, "`output_type` must be 'pil', 'np' or 'pt', got 'jpg'"),
        (np.zeros((1, 2, 2), int), "pil", ValueError, r"shape \(batch, 1, height, width\).*got \(1, 2, 2\)"),
        (torch.zeros(1, 3, 2, 2).long(), "pil", ValueError, r"got \(1, 3, 2, 2\)"),
        (np.full((1, 1, 2, 2), 4), "np", ValueError, "`levels` must lie in 0 … 3, got values from 4 to 4"),
        (torch.full((1, 1, 2, 2), -1), "pt", ValueError, "`levels` must lie in 0 … 3"),
        (torch.zeros(1, 1, 2, 2), "pil", TypeError, "integer dtype, got torch.float32"),
        ([[[[0]]]], "pil", TypeError, "`levels` must be a torch tensor or a numpy array, got list"),
    ]
    for levels, output_type, error, message in cases:
        with pytest.raises(error, match=message):
            PixelCNNImageProcessor(num_levels=4).post_process(levels, output_type)


# PIL images


GREY_RAMP = np.arange(256, dtype=np.uint8).reshape(16, 16)


def grey_ramp_in_mode(mode):
    image = Image.fromarray(GREY_RAMP)
    if mode == "I":
        return Image.fromarray(GREY_RAMP.astype(np.int32))
    if mode == "F":
        return Image.fromarray(GREY_RAMP.astype(np.float32) / 255)
    if mode.startswith("I;16"):
        order = ">" if mode == "I;16B" else "<"
        wide = GREY_RAMP.astype(f"{order}u2") * 256 + 77  # the lower byte is dropped
        return Image.frombytes(mode, (16, 16), wide.astype(f"{order}u2").tobytes())
    if mode in ("La", "PA"):
        return image.convert("LA").convert(mode)
    if mode == "RGBa":
        return image.convert("RGBA").convert(mode)
    if mode in ("RGBX", "CMYK", "HSV"):
        return image.convert("RGB").convert(mode)
    return image.convert(mode)


MODES = ["L", "LA", "La", "P", "PA", "RGB", "RGBA", "RGBa", "RGBX", "CMYK", "HSV", "I", "F", "I;16", "I;16L", "I;16B"]


def test_grey_values_are_the_same_in_every_pil_mode():
    for mode in MODES:
        image = grey_ramp_in_mode(mode)
        assert image.mode == mode
        assert np.array_equal(levels_of(image)[0, 0], GREY_RAMP)
        assert np.array_equal(levels_of(image, num_channels=3)[0], np.stack([GREY_RAMP] * 3))


def test_ycbcr_images_become_grey_and_colour():
    image = Image.fromarray(GREY_RAMP).convert("RGB").convert("YCbCr")  # PIL rounds here
    assert np.abs(levels_of(image)[0, 0] - GREY_RAMP.astype(int)).max() <= 1
    assert np.abs(levels_of(image, num_channels=3)[0] - GREY_RAMP.astype(int)).max() <= 1


def test_bilevel_pil_images_are_black_and_white():
    image = Image.fromarray(GREY_RAMP > 100)
    assert image.mode == "1"
    assert np.array_equal(levels_of(image)[0, 0], np.where(GREY_RAMP > 100, 255, 0))
    assert np.array_equal(levels_of(image, num_channels=3)[0, 2], np.where(GREY_RAMP > 100, 255, 0))


def test_colours_are_kept_and_become_grey_by_the_weights_of_pil():
    for mode in ["RGB", "RGBA", "RGBX", "P", "PA"]:
        colours = random_pixels(8, 8, 3)
        image = Image.fromarray(colours)
        image = image.quantize(64).convert("RGB").quantize(64) if mode == "P" else image
        colours = np.asarray(image.convert("RGB"))
        image = image if mode == "P" else image.convert(mode)
        if mode == "PA":
            image = Image.fromarray(colours).quantize(64).convert("PA")
            colours = np.asarray(image.convert("RGB"))
        assert image.mode == mode
        assert np.array_equal(levels_of(image, num_channels=3)[0], colours.transpose(2, 0, 1))
        weights = np.array([299, 587, 114]) / 1000  # ITU-R 601
        assert np.abs(levels_of(image)[0, 0] - colours @ weights).max() < 0.51


@pytest.mark.skipif(not features.check("littlecms2"), reason="PIL was built without LittleCMS")
def test_lab_images_become_grey_and_colour():
    profiles = ImageCms.createProfile("sRGB"), ImageCms.createProfile("LAB")
    to_lab = ImageCms.buildTransform(*profiles, "RGB", "LAB")
    image = ImageCms.applyTransform(Image.fromarray(GREY_RAMP).convert("RGB"), to_lab)
    assert image.mode == "LAB"
    assert np.abs(levels_of(image)[0, 0] - GREY_RAMP.astype(int)).max() <= 3
    assert np.abs(levels_of(image, num_channels=3)[0] - GREY_RAMP.astype(int)).max() <= 3


def test_transparency_is_dropped_and_not_blended():
    alpha = np.zeros((4, 4), np.uint8)
    colours = random_pixels(4, 4, 3)
    rgba = Image.fromarray(np.dstack([colours, alpha]))
    assert np.array_equal(levels_of(rgba, num_channels=3)[0], colours.transpose(2, 0, 1))
    grey_alpha = Image.merge("LA", [Image.fromarray(colours[..., 0]), Image.fromarray(alpha)])
    assert np.array_equal(levels_of(grey_alpha)[0, 0], colours[..., 0])
    palette = Image.fromarray(np.arange(16, dtype=np.uint8).reshape(4, 4)).convert("P")
    palette.putpalette(np.repeat(np.arange(0, 160, 10, dtype=np.uint8), 3).tobytes())
    palette.info["transparency"] = bytes(range(16))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for num_channels in (1, 3):
            assert levels_of(palette, num_channels=num_channels)[0, 0].ravel().tolist() == list(range(0, 160, 10))


def test_sixteen_bit_png_files_keep_their_upper_eight_bits():
    wide = np.random.default_rng(0).integers(0, 65536, (5, 5), dtype=np.uint16)
    image = Image.open(io.BytesIO(png_bytes(Image.fromarray(wide))))
    assert np.array_equal(levels_of(image)[0, 0], wide >> 8)


def test_lists_may_be_nested_and_mixed():
    pixels = random_pixels(4, 3, 5)
    images = [[Image.fromarray(pixels[0])], (pixels[1], [torch.from_numpy(pixels[2])]), pixels[3:, None]]
    assert np.array_equal(levels_of(images)[:, 0], pixels)


def test_a_truncated_file_is_named():
    for cut in [60, 200, 700]:
        data = png_bytes(Image.fromarray(random_pixels(28, 28)))
        whole, broken = Image.open(io.BytesIO(data)), Image.open(io.BytesIO(data[:cut]))
        with pytest.raises(ValueError, match=r"`images\[1\]` cannot be decoded .*truncated or damaged") as caught:
            levels_of([whole, broken])
        assert isinstance(caught.value.__cause__, OSError)


def test_a_closed_file_is_named():
    image = Image.open(io.BytesIO(png_bytes(Image.fromarray(random_pixels(28, 28)))))
    image.close()
    with pytest.raises(ValueError, match=r"`images` cannot be decoded .*closed"):
        levels_of(image)


# Arrays: shapes


@pytest.fixture(params=["numpy", "torch"])
def as_array(request):
    return np.asarray if request.param == "numpy" else torch.from_numpy


def test_a_three_dimensional_array_is_a_batch_of_grey_images_whatever_their_number():
    for as_array in (np.asarray, torch.from_numpy):
        for batch in [1, 2, 3, 4, 5]:
            pixels = random_pixels(batch, 6, 7)
            for given in (pixels, pixels[:, None], pixels[..., None], list(pixels), list(pixels[:, None])):
                given = [as_array(image) for image in given] if isinstance(given, list) else as_array(given)
                levels = levels_of(given)
                assert levels.shape == (batch, 1, 6, 7)
                assert np.array_equal(levels[:, 0], pixels)


def test_one_grey_image_may_have_a_channel_axis_at_either_end_or_none():
    for as_array in (np.asarray, torch.from_numpy):
        pixels = random_pixels(6, 7)
        for given in (pixels, pixels[None], pixels[..., None]):
            assert np.array_equal(levels_of(as_array(given)), pixels[None, None])
            assert np.array_equal(levels_of([as_array(given)] * 2), np.stack([pixels[None]] * 2))
        assert np.array_equal(levels_of(as_array(pixels[None]), input_data_format="channels_first"), pixels[None, None])
        assert np.array_equal(
            levels_of(as_array(pixels[..., None]), input_data_format="channels_last"), pixels[None, None]
        )


def test_narrow_grey_batches_are_read_when_they_have_a_channel_axis():
    for as_array in (np.asarray, torch.from_numpy):
        for width in [5, 1, 2, 3, 4]:
            pixels = random_pixels(9, 1, 6, width)
            options = {"input_data_format": "channels_first"} if width == 1 else {}
            assert np.array_equal(levels_of(as_array(pixels), **options), pixels)


def test_colour_arrays_may_have_their_channels_first_or_last():
    for as_array in (np.asarray, torch.from_numpy):
        pixels = random_pixels(4, 3, 6, 7)
        last = np.ascontiguousarray(pixels.transpose(0, 2, 3, 1))
        assert np.array_equal(levels_of(as_array(pixels), num_channels=3), pixels)
        assert np.array_equal(levels_of(as_array(last), num_channels=3), pixels)
        assert np.array_equal(levels_of(as_array(pixels[0]), num_channels=3), pixels[:1])
        assert np.array_equal(levels_of(as_array(last[0]), num_channels=3), pixels[:1])
        assert np.array_equal(levels_of([as_array(pixels[0]), as_array(last[1])], num_channels=3), pixels[:2])
        assert np.array_equal(levels_of([as_array(pixels[:2]), as_array(last[2:])], num_channels=3), pixels)


def test_two_possible_channel_axes_need_input_data_format():
    for as_array in (np.asarray, torch.from_numpy):
        for shape, num_channels in [
            ((3, 5, 3), 3),
            ((3, 3, 3), 3),
            ((2, 3, 5, 3), 3),
            ((1, 5, 1), 1),
            ((2, 1, 5, 1), 1),
        ]:
            pixels = random_pixels(*shape)
            with pytest.raises(ValueError, match="pass `input_data_format='channels_first'` or 'channels_last'"):
                levels_of(as_array(pixels), num_channels=num_channels)
            batch = pixels.reshape((-1, *shape[-3:]))
            first = levels_of(as_array(pixels), num_channels=num_channels, input_data_format="channels_first")
            assert np.array_equal(first, batch)
            last = levels_of(as_array(pixels), num_channels=num_channels, input_data_format="channels_last")
            assert np.array_equal(last, batch.transpose(0, 3, 1, 2))


def test_a_colour_image_is_not_taken_for_a_batch_of_narrow_grey_ones():
    for as_array in (np.asarray, torch.from_numpy):
        for channels in [2, 3, 4]:
            with pytest.raises(
                ValueError, match=rf"28 grey images, each {channels} pixels wide.*as \(28, 1, 28, {channels}\)"
            ):
                levels_of(as_array(random_pixels(28, 28, channels)))
            assert levels_of(as_array(random_pixels(1, 28, channels))).shape == (1, 1, 28, channels)


def test_a_single_pixel_has_one_reading():
    for as_array in (np.asarray, torch.from_numpy):
        for shape in ((1, 1), (1, 1, 1), (1, 1, 1, 1)):
            assert levels_of(as_array(np.full(shape, 9, np.uint8))).tolist() == [[[[9]]]]


def test_arrays_with_the_wrong_channels_or_rank_are_refused():
    cases = [
        (np.zeros((28, 28), np.uint8), {"num_channels": 3}, r"\(28, 28\), a grey image, but `num_channels=3`"),
        (np.zeros((5, 28, 28), np.uint8), {"num_channels": 3}, "does not fit `num_channels=3`.*first or last axis"),
        (np.zeros((2, 1, 28, 28), np.uint8), {"num_channels": 3}, "does not fit `num_channels=3`"),
        (np.zeros((2, 28, 28, 4), np.uint8), {"num_channels": 3}, "does not fit `num_channels=3`"),
        (np.zeros((2, 3, 28, 28), np.uint8), {}, "does not fit `num_channels=1`"),
        ([np.zeros((3, 28, 28), np.uint8)], {}, r"`images\[0\]`: .*does not fit `num_channels=1`"),
        ([np.zeros((28, 28, 3), np.uint8)], {}, "does not fit `num_channels=1`"),
        (np.zeros((3, 28, 28), np.uint8), {"input_data_format": "channels_first"}, "its first axis must be 1 long"),
        (
            np.zeros((3, 28, 28), np.uint8),
            {"num_channels": 3, "input_data_format": "channels_last"},
            "its last axis must be 3 long",
        ),
        (np.zeros(28, np.uint8), {}, r"2 to 4 dimensions.*\(28,\)"),
        (np.zeros((1, 1, 1, 28, 28), np.uint8), {}, "2 to 4 dimensions"),
        ([np.zeros((), np.uint8)], {}, r"2 to 4 dimensions.*its shape is \(\)"),
    ]
    for images, options, message in cases:
        with pytest.raises(ValueError, match=message):
            levels_of(images, **options)
        tensors = (
            [torch.from_numpy(image) for image in images] if isinstance(images, list) else torch.from_numpy(images)
        )
        with pytest.raises(ValueError, match=message):
            levels_of(tensors, **options)


# Arrays: values


def test_integers_of_any_width_are_pixels_from_0_to_255():
    for dtype in ["int8", "int16", "int32", "int64", "uint32", "uint64"]:
        pixels = np.array([[0, 1, 100, 127]], dtype=dtype)
        assert levels_of(pixels)[0, 0].tolist() == pixels.tolist()
        wrong = {"int8": -1}.get(dtype, 256)
        with pytest.raises(ValueError, match=f"dtype {dtype} and values from .*must lie in 0 … 255"):
            levels_of(np.array([[3, wrong]], dtype=dtype))


def test_booleans_are_black_and_white():
    for as_array in (np.asarray, torch.from_numpy):
        assert levels_of(as_array(np.array([[True, False]])))[0, 0].tolist() == [[255, 0]]
        assert levels_of(as_array(np.array([[True, False]])), num_levels=2)[0, 0].tolist() == [[1, 0]]


def test_uint16_is_sixteen_bit():
    for as_array in (np.asarray, torch.from_numpy):
        assert levels_of(as_array(np.array([[0, 255, 256, 65535]], np.uint16)))[0, 0].tolist() == [[0, 0, 1, 255]]
        assert levels_of(np.array([[255, 65535]], ">u2"))[0, 0].tolist() == [[0, 255]]


def test_integers_that_can_be_levels_or_a_dark_picture_are_not_guessed():
    dtypes = ["uint8", "int8", "int16", "int32", "int64", "uint32", "uint64"]
    settings = [(2, None), (2, "threshold"), (16, None), (100, None)]
    for as_array, dtype, (num_levels, binarization) in product((np.asarray, torch.from_numpy), dtypes, settings):
        options = {"num_levels": num_levels, "binarization": binarization}
        given = (np.arange(60).reshape(1, 1, 6, 10) % num_levels).astype(dtype)
        message = (
            f"`images` has dtype {dtype} and values from 0 to {given.max()}, which can be levels of "
            f"`num_levels={num_levels}` or the pixels .* of a very dark picture. Pass `levels=True` .*`levels=False`"
        )
        for images in (given, given[0], given[0, 0]):
            with pytest.raises(ValueError, match=message):
                levels_of(as_array(images), **options)
            assert np.array_equal(levels_of(as_array(images), levels=True, **options), given)
            dark = levels_of(as_array(images), levels=False, **options)
            assert np.array_equal(dark, 0 * dark if binarization else given.astype(int) * num_levels // 256)
        with pytest.raises(ValueError, match=r"`images\[1\]` has dtype .* can be levels"):
            levels_of([as_array(given // 2), as_array(given)], **options)
        with pytest.raises(ValueError, match=r"`image` has dtype .* can be levels"):
            PixelCNNImageProcessor(**options).process_image(as_array(given[0]))


def test_black_is_black_as_levels_and_as_pixels():
    for as_array in (np.asarray, torch.from_numpy):
        for dtype in ("uint8", "uint16", "int64"):
            for num_levels in (2, 16, 256):
                assert not levels_of(as_array(np.zeros((3, 4), dtype)), num_levels=num_levels).any()


def test_what_can_be_no_levels_are_pixels_and_no_question_is_asked():
    for as_array in (np.asarray, torch.from_numpy):
        dark = np.array([[0, 1], [2, 3]], np.uint8)
        assert np.array_equal(levels_of(as_array(dark))[0, 0], dark)  # 256 levels are the pixels
        assert np.array_equal(levels_of([as_array(dark)] * 2)[:, 0], [dark] * 2)
        assert levels_of(as_array(dark), num_levels=2).sum() == 0  # 3 is no level of two
        batch = np.stack([dark, dark + 200])
        expected = np.stack([0 * dark, np.full((2, 2), 12)])
        for images in (as_array(batch[:, None]), [as_array(image) for image in batch]):  # 200 tells what 1 is
            assert np.array_equal(levels_of(images, num_levels=16)[:, 0], expected)
        assert not levels_of(Image.fromarray(dark), num_levels=16).any()  # mode L says that these are pixels
        assert levels_of(as_array(dark / 15), num_levels=16)[0, 0].tolist() == [[0, 1], [2, 3]]
        with pytest.raises(ValueError, match="values from -1 to 1; integer pixels must lie in 0 … 255"):
            levels_of(as_array(np.array([[-1, 1]])), num_levels=2)


def test_pictures_of_up_to_16_levels_are_never_in_doubt():
    for num_levels in range(2, 17):
        processor = PixelCNNImageProcessor(num_levels=num_levels)
        for highest in range(num_levels):
            levels = np.arange(highest + 1).reshape(1, 1, 1, -1).repeat(5, 2)
            for output_type, layout in (("np", "channels_last"), ("pt", "channels_first")):
                images = processor.post_process(levels, output_type)
                again = processor(images, input_data_format=layout, return_tensors="np")["pixel_values"]
                assert np.array_equal(again, levels)


def test_levels_come_out_as_they_went_in():
    for as_array in (np.asarray, torch.from_numpy):
        for dtype in ["uint8", "int8", "uint16", "int32", "int64"]:
            for num_levels in (2, 3, 16, 100, 128, 200, 256) if dtype != "int8" else (2, 128):
                levels = np.random.default_rng(0).integers(num_levels, size=(2, 3, 6, 7)).astype(dtype)
                options = {"num_levels": num_levels, "num_channels": 3, "levels": True}
                assert np.array_equal(levels_of(as_array(levels), **options), levels)
                last = np.ascontiguousarray(levels.transpose(0, 2, 3, 1))
                assert np.array_equal(levels_of([as_array(image) for image in last], **options), levels)
                assert np.array_equal(levels_of(as_array(levels), crop_size=5, **options), levels[..., :5, 1:6])
            processor = PixelCNNImageProcessor(num_levels=2, levels=True, binarization="threshold", threshold=0)
            assert processor(as_array(np.array([[0, 1]], dtype)))["pixel_values"][0].tolist() == [[[0, 1]]]


def test_what_are_no_levels_is_not_read_as_levels():
    cases = [
        (np.array([[0, 16]]), ValueError, "`images` with `levels=True`: `levels` must lie in 0 … 15, got .* 0 to 16"),
        ([np.array([[-1, 3]])], ValueError, r"`images\[0\]` with `levels=True`: `levels` must lie in 0 … 15"),
        (np.array([[0.0, 1.0]]), TypeError, "`levels` must have an integer dtype, got float64"),
        (torch.tensor([[True, False]]), TypeError, "`levels` must have an integer dtype, got bool"),
        (Image.new("L", (2, 2)), TypeError, "`images` is a PIL image, which holds pixels; `levels=True` is for arrays"),
    ]
    for images, error, message in cases:
        with pytest.raises(error, match=message):
            levels_of(images, num_levels=16, levels=True)


def test_sixteen_bits_that_would_all_be_black_are_refused():
    for as_array in (np.asarray, torch.from_numpy):
        for values in [[0, 1], [200, 255], [0, 15]]:
            wide = np.array([values], np.uint16)
            found = f"16-bit pixels, but values from {values[0]} to {values[1]}"
            message = f"{found}, .* dtype uint8; .* by 65535; .*`levels=True`"
            image = Image.open(io.BytesIO(png_bytes(Image.fromarray(wide))))
            assert image.mode.startswith("I;16")
            for num_levels in (2, 16, 256):
                for levels in (None, False):
                    with pytest.raises(ValueError, match="`images` has dtype uint16, " + message):
                        levels_of(as_array(wide), num_levels=num_levels, levels=levels)
                    with pytest.raises(
                        ValueError, match=r"`images\[0\]` \(PIL mode I;16\) has dtype uint16, " + message
                    ):
                        levels_of([image], num_levels=num_levels, levels=levels)
            assert np.array_equal(levels_of(as_array(wide), levels=True)[0, 0], wide)
            assert np.array_equal(levels_of(as_array(wide.astype(np.uint8)))[0, 0], wide)
            assert levels_of(as_array(wide / 65535)).max() <= 1


def test_floats_from_0_to_1_give_back_their_pixels():
    for as_array in (np.asarray, torch.from_numpy):
        for dtype in ["float16", "float32", "float64"]:
            floats = (np.arange(256) / 255).astype(dtype).reshape(16, 16)
            assert np.array_equal(levels_of(as_array(floats))[0, 0], GREY_RAMP)


def test_bfloat16_tensors_are_read():
    assert levels_of(torch.tensor([[0.0, 0.5, 1.0]], dtype=torch.bfloat16))[0, 0].tolist() == [[0, 128, 255]]


def test_tensors_that_require_gradients_are_read():
    assert levels_of(torch.ones(2, 2, requires_grad=True)).tolist() == [[[[255, 255], [255, 255]]]]


def test_floats_outside_0_to_1_are_refused():
    for as_array in (np.asarray, torch.from_numpy):
        for value in [1.001, 255.0, -0.001, float("nan"), float("inf")]:
            way = "Undo what normalised" if value < 0 else "Convert pixels on a scale"
            found = r"`images` has dtype float32 and values from .*must lie in \[0, 1\]"
            with pytest.raises(ValueError, match=rf"{found}\. {way}"):
                levels_of(as_array(np.array([[0.5, value]], np.float32)))
            with pytest.raises(ValueError, match=r"`images\[0\]` \(PIL mode F\) has dtype float32"):
                levels_of([Image.fromarray(np.array([[0.5, value]], np.float32))])


def test_pil_mode_i_outside_0_to_255_is_refused():
    for value in [-1, 256, 65535]:
        with pytest.raises(ValueError, match=r"`images` \(PIL mode I\) has dtype int32 and values from"):
            levels_of(Image.fromarray(np.array([[1, value]], np.int32)))


# Sizes


def test_images_keep_their_size_unless_one_is_asked_for():
    image = Image.fromarray(random_pixels(10, 20))
    assert levels_of(image).shape == (1, 1, 10, 20)
    assert levels_of(image, size=5).shape == (1, 1, 5, 5)
    assert levels_of(image, size=(5, 6)).shape == (1, 1, 5, 6)
    assert levels_of(image, size={"height": 5, "width": 6}).shape == (1, 1, 5, 6)
    assert levels_of(image, size={"shortest_edge": 5}).shape == (1, 1, 5, 10)
    assert levels_of(image, size=5, default_to_square=False).shape == (1, 1, 5, 10)
    assert levels_of(image, size=5, do_resize=False).shape == (1, 1, 10, 20)
    assert levels_of(image, crop_size=5).shape == (1, 1, 5, 5)
    assert levels_of(image, crop_size=5, do_center_crop=False).shape == (1, 1, 10, 20)
    processor = PixelCNNImageProcessor(size=(5, 6))
    assert processor(image, size=(7, 8), return_tensors="np")["pixel_values"].shape == (1, 1, 7, 8)
    assert processor(image, do_resize=False, return_tensors="np")["pixel_values"].shape == (1, 1, 10, 20)


def test_resizing_is_that_of_pil_on_eight_bit_pixels():
    for resample in list(Image.Resampling):
        colours = random_pixels(12, 10, 3)
        expected = np.asarray(Image.fromarray(colours).resize((7, 5), resample)).transpose(2, 0, 1)
        options = {"num_channels": 3, "size": (5, 7), "resample": resample}
        assert np.array_equal(levels_of(Image.fromarray(colours), **options)[0], expected)
        assert np.array_equal(levels_of(colours, **options)[0], expected)
        assert np.array_equal(levels_of(colours / 255, **options, num_levels=16)[0], expected // 16)
        grey = Image.fromarray(colours[..., 1])
        expected = np.asarray(grey.resize((7, 5), resample))
        assert np.array_equal(levels_of(grey, size=(5, 7), resample=int(resample))[0, 0], expected)


def test_images_of_different_sizes_become_one_batch_by_size_or_crop():
    images = [Image.fromarray(random_pixels(*shape)) for shape in ((10, 20), (30, 12))]
    assert levels_of(images, size=8).shape == (2, 1, 8, 8)
    assert levels_of(images, size={"shortest_edge": 8}, crop_size=8).shape == (2, 1, 8, 8)
    assert levels_of(images, crop_size=(10, 12)).shape == (2, 1, 10, 12)
    for return_tensors in ("pt", "np", None):
        with pytest.raises(ValueError, match=r"must have one size, got 10×20, 30×12 \(height × width\)"):
            levels_of(images, return_tensors=return_tensors)
    with pytest.raises(ValueError, match="must have one size, got 8×16, 20×8"):
        levels_of(images, size={"shortest_edge": 8})


def test_the_crop_is_the_middle_and_never_pads():
    pixels = random_pixels(7, 10)
    assert np.array_equal(levels_of(pixels, crop_size=(3, 4))[0, 0], pixels[2:5, 3:7])
    assert np.array_equal(levels_of(pixels, crop_size=(7, 10))[0, 0], pixels)
    with pytest.raises(ValueError, match="`crop_size` 8×4 is larger than an image of 7×10"):
        levels_of(pixels, crop_size=(8, 4))


# Two levels


def test_a_threshold_is_the_highest_pixel_of_level_0():
    pixels = GREY_RAMP
    for threshold in range(256):
        levels = levels_of(pixels, num_levels=2, binarization="threshold", threshold=threshold)
        assert levels.dtype == np.int64
        assert np.array_equal(levels[0, 0], [[int(x > threshold) for x in row] for row in pixels.tolist()])
    default = levels_of(pixels, num_levels=2, binarization="threshold")
    assert np.array_equal(default, levels_of(pixels, num_levels=2))
    nonzero = levels_of(pixels, num_levels=2, binarization="threshold", threshold=0)
    assert nonzero.sum() == 255


def test_stochastic_levels_are_one_draw_per_image_in_raster_order():
    pixels = random_pixels(3, 3, 4, 5)  # (batch, channels, height, width)
    levels = levels_of(
        pixels, num_channels=3, num_levels=2, binarization="stochastic", generator=torch.Generator().manual_seed(5)
    )
    generator = torch.Generator().manual_seed(5)
    for image, drawn in zip(pixels, levels, strict=True):
        noise = iter(torch.rand(4 * 5 * 3, dtype=torch.float64, generator=generator).tolist())
        for row in range(4):
            for column in range(5):
                for channel in range(3):
                    assert drawn[channel, row, column] == (next(noise) * 255 < image[channel, row, column])


def test_stochastic_levels_do_not_depend_on_how_images_are_batched():
    images = [Image.fromarray(random_pixels(6, 6, seed=i)) for i in range(4)]
    processor = PixelCNNImageProcessor(num_levels=2, binarization="stochastic")
    generator = torch.Generator().manual_seed(0)
    together = processor(images, generator=generator, return_tensors="pt")["pixel_values"]
    generator = torch.Generator().manual_seed(0)
    alone = [processor(image, generator=generator, return_tensors="pt")["pixel_values"] for image in images]
    assert torch.equal(together, torch.cat(alone))
    assert not torch.equal(together, processor(images, generator=generator, return_tensors="pt")["pixel_values"])


def test_stochastic_levels_are_1_with_probability_pixel_over_255():
    pixels = np.repeat(np.array([0, 1, 51, 128, 254, 255], np.uint8)[:, None], 40_000, axis=1)
    generator = torch.Generator().manual_seed(0)
    levels = levels_of(pixels, num_levels=2, binarization="stochastic", generator=generator)[0, 0]
    assert levels.dtype == np.int64
    assert set(np.unique(levels)) == {0, 1}
    probability = pixels[:, 0] / 255
    deviation = np.sqrt(probability * (1 - probability) / 40_000)
    assert (np.abs(levels.mean(1) - probability) <= 4 * deviation).all()  # black and white never vary


def test_black_stays_black_whatever_is_drawn(monkeypatch):
    monkeypatch.setattr(torch, "rand", lambda size, **kwargs: torch.zeros(size, dtype=torch.float64))
    levels = levels_of(np.array([[0, 1]], np.uint8), num_levels=2, levels=False, binarization="stochastic")
    assert levels.tolist() == [[[[0, 1]]]]


def test_without_a_generator_the_global_one_is_used():
    options = {"num_levels": 2, "binarization": "stochastic"}
    with torch.random.fork_rng():
        torch.manual_seed(3)
        levels = levels_of(GREY_RAMP, **options)
    assert np.array_equal(levels, levels_of(GREY_RAMP, **options, generator=torch.Generator().manual_seed(3)))


# Errors


def test_wrong_options_are_refused_when_the_processor_is_made_and_when_it_is_called():
    cases = [
        ({"num_levels": 1}, ValueError, "`num_levels` must be an integer from 2 to 256, got 1"),
        ({"num_levels": 257}, ValueError, "`num_levels` .* got 257"),
        ({"num_levels": 8.0}, ValueError, "`num_levels` .* got 8.0"),
        ({"num_levels": True}, ValueError, "`num_levels` .* got True"),
        ({"num_levels": "8"}, ValueError, "`num_levels` .* got '8'"),
        ({"num_channels": 2}, ValueError, r"`num_channels` must be 1 \(grey\) or 3 .* got 2"),
        ({"num_channels": True}, ValueError, "`num_channels` .* got True"),
        ({"levels": "yes"}, ValueError, "`levels` must be True, False or None, got 'yes'"),
        ({"binarization": "dither", "num_levels": 2}, ValueError, "None, 'threshold' or 'stochastic', got 'dither'"),
        ({"binarization": "threshold"}, ValueError, "`num_levels` is 256; pass `num_levels=2`"),
        ({"binarization": "stochastic", "num_levels": 3}, ValueError, "`num_levels` is 3; pass `num_levels=2`"),
        ({"threshold": 256}, ValueError, "`threshold` must be an integer from 0 to 255, got 256"),
        ({"threshold": -1}, ValueError, "`threshold` .* got -1"),
        ({"threshold": 0.5}, ValueError, "`threshold` .* got 0.5"),
        ({"do_resize": True}, ValueError, "`do_resize=True` needs `size`"),
        ({"do_center_crop": True}, ValueError, "`do_center_crop=True` needs `crop_size`"),
        ({"do_resize": "yes"}, ValueError, "`do_resize` must be True, False or None, got 'yes'"),
        ({"size": 0}, ValueError, "`size` must be .* got 0"),
        ({"size": (28, 28.0)}, ValueError, "`size` must be"),
        ({"size": (28,)}, ValueError, "`size` must be"),
        ({"size": True}, ValueError, "`size` must be .* got True"),
        ({"size": {"height": 28}}, ValueError, "`size` must be {'height': …, 'width': …} or {'shortest_edge': …}"),
        ({"size": {"longest_edge": 28}}, ValueError, "`size` must be"),
        ({"size": "big"}, ValueError, "`size` must be .* got 'big'"),
        ({"crop_size": {"shortest_edge": 28}}, ValueError, "`crop_size` must be {'height': …, 'width': …} with"),
        ({"resample": 99}, ValueError, "`resample` must be .* got 99"),
        ({"resample": "bilinear"}, ValueError, "`resample` must be .* got 'bilinear'"),
        ({"input_data_format": "HWC"}, ValueError, "'channels_first' or 'channels_last', got 'HWC'"),
        ({"data_format": "channels_last"}, ValueError, "`data_format` must be None or 'channels_first'"),
        ({"return_tensors": "tf"}, ValueError, "`return_tensors` must be None, 'pt' or 'np', got 'tf'"),
        ({"do_normalize": True}, ValueError, "`do_normalize=True` has no meaning here"),
        ({"do_rescale": True}, ValueError, "`do_rescale=True` has no meaning here"),
        ({"do_pad": True}, ValueError, "`do_pad=True` has no meaning here"),
        ({"do_convert_rgb": True}, ValueError, "`do_convert_rgb=True` has no meaning here"),
        ({"num_level": 8}, TypeError, "unknown argument.* 'num_level'; it knows .*num_levels"),
    ]
    for options, error, message in cases:
        with pytest.raises(error, match=message):
            PixelCNNImageProcessor(**options)
        with pytest.raises(error, match=message):
            PixelCNNImageProcessor()(Image.new("L", (4, 4)), **options)


def test_a_size_beyond_memory_is_an_error_before_anything_is_resized():
    for size in (10**6, {"shortest_edge": 10**10}):
        with pytest.raises(torch.OutOfMemoryError, match=r"image of 1×10+×10+ takes at least 1[0,]+ bytes"):
            PixelCNNImageProcessor(size=size)(Image.new("L", (4, 4)))


def test_a_generator_must_be_a_generator_and_belongs_to_the_call():
    with pytest.raises(TypeError, match=r"`generator` must be a torch.Generator or None, got int"):
        levels_of(GREY_RAMP, num_levels=2, binarization="stochastic", generator=0)
    with pytest.raises(ValueError, match=r"`generator` cannot be saved.* pass it to each call"):
        PixelCNNImageProcessor(generator=torch.Generator())


def test_an_empty_batch_is_refused():
    cases = [
        [],
        (),
        [[], []],
        np.zeros((0, 1, 28, 28), np.uint8),
        np.zeros((0, 28, 28), np.uint8),
        [np.zeros((0, 1, 28, 28), np.uint8)],
        np.zeros((2, 1, 0, 28), np.uint8),
        torch.zeros(0, 1, 28, 28),
    ]
    for images in cases:
        with pytest.raises(ValueError, match=r"is empty.*[Pp]ass at least one image"):
            levels_of(images)


def test_an_image_without_pixels_is_refused():
    with pytest.raises(ValueError, match="`images` has no pixels: its size is 0×4"):
        levels_of(Image.new("L", (0, 4)))


def test_what_is_no_image_is_refused():
    cases = [
        ("digit.png", r"`images` must be .* got str; open files with PIL.Image.open"),
        (["digit.png"], r"`images\[0\]` must be .* got str; open files with PIL.Image.open"),
        (None, "`images` must be a PIL image, numpy array or torch tensor, got NoneType"),
        ([[0, 255], [255, 0]], r"`images\[0\]` must be .* got int; .*np.asarray"),
        ({"image": 1}, "got dict"),
        (np.zeros((4, 4), complex), "`images` has dtype complex128; pixels must be bool, integers or floats"),
        (np.full((4, 4), "x"), "`images` has dtype <U1"),
    ]
    for images, message in cases:
        with pytest.raises(TypeError, match=message):
            levels_of(images)


def test_options_are_checked_before_images_are_looked_at():
    with pytest.raises(ValueError, match="`num_levels`"):
        PixelCNNImageProcessor()(object(), num_levels=0)


# Saving and loading


def test_options_survive_saving_and_can_be_overridden_on_loading(tmp_path):
    options = {
        "num_levels": 2,
        "num_channels": 3,
        "size": {"shortest_edge": 9},
        "crop_size": {"height": 8, "width": 7},
        "resample": Image.Resampling.BOX,
        "levels": False,
        "binarization": "threshold",
        "threshold": 0,
        "input_data_format": "channels_last",
    }
    processor = PixelCNNImageProcessor(**options)
    processor.save_pretrained(tmp_path)
    saved = json.loads((tmp_path / "preprocessor_config.json").read_text())
    assert saved["image_processor_type"] == "PixelCNNImageProcessor"
    assert options.items() <= saved.items()

    loaded = PixelCNNImageProcessor.from_pretrained(tmp_path)
    assert loaded.to_dict() == processor.to_dict()
    image = random_pixels(12, 10, 3)
    assert np.array_equal(loaded(image, return_tensors="np")["pixel_values"], levels_of(image, **options))

    changed = PixelCNNImageProcessor.from_pretrained(
        tmp_path, num_levels=16, num_channels=1, binarization=None, size=20, resample=Image.Resampling.NEAREST
    )
    assert (changed.num_levels, changed.binarization, changed.threshold) == (16, None, 0)
    grey = Image.fromarray(image)
    options |= {"num_levels": 16, "num_channels": 1, "binarization": None, "size": 20, "resample": 0}
    assert np.array_equal(changed(grey, return_tensors="np")["pixel_values"], levels_of(grey, **options))

    with pytest.raises(ValueError, match="`num_levels=2`"):
        PixelCNNImageProcessor.from_pretrained(tmp_path, num_levels=4)


def test_a_size_given_on_loading_resizes(tmp_path):
    PixelCNNImageProcessor().save_pretrained(tmp_path)
    image = random_pixels(12, 10)
    loaded = PixelCNNImageProcessor.from_pretrained(tmp_path)
    assert loaded(image, return_tensors="np")["pixel_values"].shape == (1, 1, 12, 10)
    loaded = PixelCNNImageProcessor.from_pretrained(tmp_path, size=8)
    assert loaded(image, return_tensors="np")["pixel_values"].shape == (1, 1, 8, 8)


def test_a_call_does_not_change_the_processor():
    processor = PixelCNNImageProcessor(size=8)
    before = processor.to_dict()
    processor(random_pixels(12, 10), num_levels=4, size=9, crop_size=5, input_data_format="channels_last")
    assert processor.to_dict() == before


def test_the_processor_can_be_pickled():
    processor = PixelCNNImageProcessor(num_levels=7, size=8)
    again = pickle.loads(pickle.dumps(processor))
    image = random_pixels(12, 10)
    assert np.array_equal(again(image)["pixel_values"], processor(image)["pixel_values"])


# Real digits


@pytest.fixture(scope="module")
def digits(tmp_path_factory):
    datasets = pytest.importorskip("datasets")
    return datasets.load_dataset(str(DIGITS), cache_dir=str(tmp_path_factory.mktemp("cache")))


def test_the_digits_have_the_expected_rows_and_are_small(digits):
    assert {split: len(rows) for split, rows in digits.items()} == {"train": 11_000, "test": 1_000}
    assert digits["train"].features["label"].names == list("0123456789")
    assert digits["train"][:10]["label"] == [5, 0, 4, 1, 9, 2, 1, 3, 1, 4]  # MNIST begins so
    assert digits["test"][:5]["label"] == [7, 2, 1, 0, 4]
    assert sum(file.stat().st_size for file in DIGITS.iterdir()) <= 1_900_000


def test_a_column_of_a_data_set_is_a_batch(digits):
    rows = digits["test"].select(range(50))
    levels = levels_of(rows["image"])
    assert np.array_equal(levels[:, 0], [np.asarray(row["image"]) for row in rows])
    assert np.array_equal(levels_of(rows[:]["image"]), levels)
    batch = rows.with_format("numpy")[:]["image"]
    assert np.array_equal(levels_of(batch), levels)
    transformed = rows.with_transform(lambda batch: PixelCNNImageProcessor()(batch["image"], return_tensors="pt"))
    assert np.array_equal(transformed[7]["pixel_values"], levels[7])


def test_photos_are_read_upright_as_datasets_does():
    for orientation in range(1, 9):
        pixels = np.random.default_rng(0).integers(256, size=(5, 7, 3), dtype=np.uint8)
        exif, file = Image.Exif(), io.BytesIO()
        exif[0x0112] = orientation
        Image.fromarray(pixels).save(file, "png", exif=exif)
        upright = datasets.Image().decode_example({"bytes": file.getvalue(), "path": None})
        image = Image.open(file)
        levels = PixelCNNImageProcessor(num_channels=3)(image, return_tensors="np")["pixel_values"]
        assert np.array_equal(levels[0].transpose(1, 2, 0), np.asarray(upright))
        assert np.array_equal(np.asarray(image), pixels)  # what was passed in stays as it was


def test_damaged_exif_data_turn_nothing():
    file = io.BytesIO()
    Image.new("L", (3, 2)).save(file, "jpeg", exif=b"Exif\0\0no TIFF header")
    levels = PixelCNNImageProcessor()(Image.open(file), return_tensors="np")["pixel_values"]
    assert levels.shape == (1, 1, 2, 3)
