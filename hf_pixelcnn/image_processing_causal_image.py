"""
The image processor of all PixelCNN models: images to integer levels and back.

A level is what a token is to a language model. With `L = num_levels`, the 8-bit pixel `x` has level
`floor(x * L / 256)`; with two levels a threshold or a coin toss may take the place of that formula (`binarization`).
`post_process` makes images of levels such that the way back gives the same levels again, for every `L` from 2 to 256.
"""

from collections.abc import Iterator, Sequence
from typing import Any, Literal, Unpack, overload

import numpy as np
import torch
from PIL import Image
from transformers.image_processing_backends import PilBackend
from transformers.image_processing_base import BatchFeature
from transformers.image_utils import ChannelDimension, ImageInput, PILImageResampling, SizeDict
from transformers.processing_utils import ImagesKwargs
from transformers.utils.generic import TensorType

from .checks_causal_image import check_memory, some_of
from .configuration_causal_image import MAX_EMBEDDED_LEVELS, is_int
from .pictures_causal_image import Pictures, upright

CHANNELS_FIRST, CHANNELS_LAST = ChannelDimension.FIRST.value, ChannelDimension.LAST.value

# What the base class and the Auto classes may hand to the constructor from a saved file besides the options.
SERVICE_KEYS = {"auto_map", "feature_extractor_type", "image_processor_type", "processor_class"}

# PIL converts these to "L" or "RGB" in two steps only.
PIL_DETOUR = {"La": "LA", "LAB": "RGB"}


def _is_int_in(value: object, lowest: int, highest: float = float("inf")) -> bool:
    return is_int(value) and lowest <= value <= highest


def _check_num_levels(num_levels: object) -> None:
    if not _is_int_in(num_levels, 2, 256):
        codes = " Codes of more levels are no images: their models have `input_encoding='embedding'` and no processor."
        hint = codes if _is_int_in(num_levels, 257, MAX_EMBEDDED_LEVELS) else ""
        raise ValueError(f"`num_levels` must be an integer from 2 to 256, got {num_levels!r}.{hint}")


def _as_int64(values: np.ndarray | torch.Tensor, name: str, upper: int) -> np.ndarray | torch.Tensor:
    """`values` as int64 of the same library, after checking that they are integers from 0 to `upper - 1`."""
    if isinstance(values, torch.Tensor):
        is_integer = not (values.is_floating_point() or values.is_complex() or values.dtype == torch.bool)
        converted = values.long() if is_integer else values
        empty = values.numel() == 0
    elif isinstance(values, np.ndarray):
        is_integer = values.dtype.kind in "iu"
        converted = values.astype(np.int64) if is_integer else values
        empty = values.size == 0
    else:
        raise TypeError(f"`{name}` must be a torch tensor or a numpy array, got {type(values).__name__}.")
    if not is_integer:
        raise TypeError(f"`{name}` must have an integer dtype, got {values.dtype}.")
    if not empty and (converted.min() < 0 or converted.max() >= upper):
        raise ValueError(
            f"`{name}` must lie in 0 … {upper - 1}, got values from {int(converted.min())} to {int(converted.max())}."
        )
    return converted


def quantize(pixels: np.ndarray | torch.Tensor, num_levels: int) -> np.ndarray | torch.Tensor:
    r"""
    Levels of 8-bit pixels: `floor(pixel * num_levels / 256)`, in integer arithmetic.

    Args:
        pixels (`np.ndarray` or `torch.Tensor` of any shape and integer dtype):
            Values from 0 to 255.
        num_levels (`int`):
            Number of levels, 2 to 256. With 256 the levels are the pixels.

    Returns:
        `np.ndarray` or `torch.Tensor`, as `pixels`, int64 of the same shape: levels from 0 to `num_levels - 1`.

    Raises:
        ValueError: If `num_levels` or a pixel is out of range.
        TypeError: If `pixels` is no array or tensor of integers.
    """
    _check_num_levels(num_levels)
    return (_as_int64(pixels, "pixels", 256) * num_levels) >> 8


def dequantize(levels: np.ndarray | torch.Tensor, num_levels: int) -> np.ndarray | torch.Tensor:
    r"""
    An 8-bit pixel for each level, such that `quantize(dequantize(levels, L), L)` is `levels` for every `L`.

    Level `l` becomes `255 * l / (L - 1)`, rounded half up (so the lowest level is black and the highest white), moved
    where necessary to the nearest pixel that `quantize` maps to `l`: those from `ceil(256 * l / L)` to
    `ceil(256 * (l + 1) / L) - 1`. Without the second step the way back fails for most `L` (17, 21, 200, ...).

    Args:
        levels (`np.ndarray` or `torch.Tensor` of any shape and integer dtype):
            Values from 0 to `num_levels - 1`.
        num_levels (`int`):
            Number of levels, 2 to 256.

    Returns:
        `np.ndarray` or `torch.Tensor`, as `levels`, uint8 of the same shape.

    Raises:
        ValueError: If `num_levels` or a level is out of range.
        TypeError: If `levels` is no array or tensor of integers.
    """
    _check_num_levels(num_levels)
    indices = _as_int64(levels, "levels", num_levels)
    level = np.arange(num_levels)
    nearest = (510 * level + num_levels - 1) // (2 * (num_levels - 1))
    lowest = -(-256 * level // num_levels)
    highest = -(-256 * (level + 1) // num_levels) - 1
    table = np.clip(nearest, lowest, highest).astype(np.uint8)
    return torch.from_numpy(table).to(indices.device)[indices] if isinstance(indices, torch.Tensor) else table[indices]


def _flatten(images: Sequence) -> Iterator[Any]:
    for image in images:
        if isinstance(image, Sequence) and not isinstance(image, (str, bytes)):
            yield from _flatten(image)
        else:
            yield image


def _upper_bits(array: np.ndarray, where: str) -> np.ndarray:
    """The upper 8 bits of 16-bit pixels, if any of those is used."""
    low, high = array.min(), array.max()
    if 0 < high <= 255:
        raise ValueError(
            f"{where} has dtype {array.dtype}, 16-bit pixels, but values from {low} to {high}, of which the upper 8"
            " bits are 0: all would be black. Convert 8-bit pixels to an array of dtype uint8; divide 16-bit pixels as"
            " dark as this by 65535; pass `levels=True` with an array of levels."
        )
    return (array >> 8).astype(np.uint8)


def _to_uint8(array: np.ndarray, where: str) -> np.ndarray:
    """8-bit pixels of an array of any dtype that has an unambiguous meaning; the class docstring has the table."""
    kind = array.dtype.kind
    if array.dtype == np.uint8:
        return array
    if kind == "b":
        return np.where(array, np.uint8(255), np.uint8(0))
    if kind == "u" and array.dtype.itemsize == 2:
        return _upper_bits(array, where)
    if kind in "iu":
        low, high = array.min(), array.max()
        if low < 0 or high > 255:
            raise ValueError(
                f"{where} has dtype {array.dtype} and values from {low} to {high}; integer pixels must lie in 0 … 255"
                " (16-bit images are recognised by dtype uint16)."
            )
        return array.astype(np.uint8)
    if kind == "f":
        low, high = array.min(), array.max()
        if not (low >= 0 and high <= 1):  # so written, NaN fails too
            raise ValueError(
                f"{where} has dtype {array.dtype} and values from {low} to {high}; float pixels must lie in [0, 1]."
                + (
                    " Undo what normalised them (`x * std + mean`)."
                    if low < 0
                    else " Convert pixels on a scale of 0 to 255 to uint8 first."
                )
            )
        return np.rint(array.astype(np.float64) * 255).astype(np.uint8)
    raise TypeError(f"{where} has dtype {array.dtype}; pixels must be bool, integers or floats.")


def _check_is_pil(image: Any, levels: bool | None, where: str) -> None:
    """Raise unless what is no array is an image."""
    if not isinstance(image, Image.Image):
        advice = "convert nested lists of numbers with np.asarray(…, dtype=np.uint8)"
        if isinstance(image, (str, bytes)):
            advice = "open files with PIL.Image.open(…)"
        raise TypeError(
            f"{where} must be a PIL image, numpy array or torch tensor, got {type(image).__name__}; {advice}."
        )
    if levels:
        raise TypeError(f"{where} is a PIL image, which holds pixels; `levels=True` is for arrays of integers.")


def _pixels_of_pil(image: Image.Image, num_channels: int, where: str) -> np.ndarray:
    """uint8 `(num_channels, height, width)` of a PIL image of any mode."""
    try:
        image.load()
    except (OSError, SyntaxError, EOFError, ValueError) as error:
        raise ValueError(
            f"{where} cannot be decoded ({error}): the file is truncated or damaged, or was closed before it was read."
        ) from error
    if 0 in image.size:
        raise ValueError(f"{where} has no pixels: its size is {image.width}×{image.height}.")
    image = upright(image)
    if image.mode in ("I", "F") or image.mode.startswith("I;16"):
        pixels = _to_uint8(np.asarray(image), f"{where} (PIL mode {image.mode})")
        return np.repeat(pixels[None], num_channels, axis=0)
    target = "L" if num_channels == 1 else "RGB"
    if image.mode != target:
        detour = PIL_DETOUR.get(image.mode)
        if image.mode == "P" and "transparency" in image.info:
            detour = "RGBA"
        if detour is not None:
            image = image.convert(detour)
        image = image.convert(target)
    pixels = np.asarray(image)
    return pixels[None] if num_channels == 1 else pixels.transpose(2, 0, 1)


def _channels_are_last(shape: tuple, num_channels: int, input_data_format: str | None, where: str) -> bool:
    """Whether an image of this 3-D shape is `(height, width, num_channels)`, not `(num_channels, height, width)`."""
    first = shape[0] == num_channels and input_data_format != CHANNELS_LAST
    last = shape[2] == num_channels and input_data_format != CHANNELS_FIRST
    if first and last and shape != (1, 1, 1):
        raise ValueError(
            f"{where}: an image of shape {shape} with {num_channels} channel(s) can be read as channels first and as"
            " channels last; pass `input_data_format='channels_first'` or 'channels_last'."
        )
    if not (first or last):
        axis = {None: "first or last", CHANNELS_FIRST: "first", CHANNELS_LAST: "last"}[input_data_format]
        raise ValueError(
            f"{where}: an image of shape {shape} does not fit `num_channels={num_channels}`: its {axis} axis must be"
            f" {num_channels} long. Arrays are not converted between grey and colour: pass PIL images for that, or set"
            " `num_channels`."
        )
    return not first


def _layout(shape: tuple, num_channels: int, input_data_format: str | None, where: str, in_list: bool) -> str:
    """How an array of this shape is read, a key of `TO_BATCH`; `in_list`: it is an element of a list."""
    if len(shape) not in (2, 3, 4):
        raise ValueError(
            f"{where} must have 2 to 4 dimensions, (height, width) to (batch, channels, height, width); its shape is"
            f" {shape}."
        )
    if 0 in shape:
        raise ValueError(f"{where} is empty: its shape is {shape}. Pass at least one image of at least one pixel.")
    if len(shape) == 2:
        if num_channels != 1:
            raise ValueError(
                f"{where} has shape {shape}, a grey image, but `num_channels={num_channels}`. Arrays are not converted"
                " between grey and colour: pass a PIL image for that, or set `num_channels=1`."
            )
        return "grey image"
    if len(shape) == 3 and num_channels == 1 and not in_list and input_data_format is None and shape[2] != 1:
        if shape[0] != 1 and shape[2] <= 4:
            raise ValueError(
                f"{where} has shape {shape}: with `num_channels=1` this can be a batch of {shape[0]} grey images, each"
                f" {shape[2]} pixels wide, or one image of {shape[2]} channels. Pass the batch as"
                f" {(shape[0], 1, *shape[1:])}; convert the image to grey first, or pass it as a PIL image."
            )
        return "grey batch"
    channels_last = _channels_are_last(shape[-3:], num_channels, input_data_format, where)
    return f"{'image' if len(shape) == 3 else 'batch'}, channels {'last' if channels_last else 'first'}"


# Views of an array as `(batch, num_channels, height, width)`, by how it is read.
TO_BATCH = {
    "grey image": lambda pixels: pixels[None, None],
    "grey batch": lambda pixels: pixels[:, None],
    "image, channels first": lambda pixels: pixels[None],
    "image, channels last": lambda pixels: pixels.transpose(2, 0, 1)[None],
    "batch, channels first": lambda pixels: pixels,
    "batch, channels last": lambda pixels: pixels.transpose(0, 3, 1, 2),
}


def _as_numpy(image: np.ndarray | torch.Tensor) -> np.ndarray:
    """An array, or the values of a tensor; those of bfloat16, which numpy does not know, as float32."""
    if isinstance(image, np.ndarray):
        return image
    image = image.detach().cpu()
    return (image.float() if image.dtype == torch.bfloat16 else image).numpy()


def _pixels_of_levels(array: np.ndarray, num_levels: int, where: str) -> np.ndarray:
    """The 8-bit pixels that `post_process` makes of levels."""
    try:
        return np.asarray(dequantize(array, num_levels))
    except (TypeError, ValueError) as error:
        raise type(error)(f"{where} with `levels=True`: {error}") from error


def _check_are_pixels(arrays: dict[str, np.ndarray], num_levels: int) -> None:
    """
    Raise if all integers of a call, but not all of them zeros, could be levels: read as pixels they would be dark. 16
    bits are judged elsewhere. `arrays`: the arrays of the call by what messages call them.
    """
    integers = [(where, array) for where, array in arrays.items() if array.dtype.kind in "iu"]
    ranges = [(array.max(), array.min(), where) for where, array in integers if array.dtype.str[1:] != "u2"]
    if num_levels == 256 or not ranges or not 0 < max(ranges)[0] < num_levels or min(low for _, low, _ in ranges) < 0:
        return
    high, low, where = max(ranges)
    raise ValueError(
        f"{where} has dtype {arrays[where].dtype} and values from {low} to {high}, which can be levels of"
        f" `num_levels={num_levels}` or the pixels (0 … 255) of a very dark picture. Pass `levels=True` to the"
        " processor if they are levels and `levels=False` if they are pixels; an array of dtype bool is black and"
        " white."
    )


def _pixels_of(
    images: dict[str, Any],
    num_channels: int,
    num_levels: int,
    levels: bool | None,
    input_data_format: str | None,
    in_list: bool,
) -> list[np.ndarray]:
    r"""
    The images of one call as uint8 `(num_channels, height, width)`.

    Args:
        images (`dict`): Images, or batches in arrays, by what messages call them.
        in_list (`bool`): They are elements of a list.
        num_channels, num_levels, levels, input_data_format: See [`PixelCNNImageProcessor`].
    """
    arrays = {where: image for where, image in images.items() if isinstance(image, (np.ndarray, torch.Tensor))}
    layouts = {
        where: _layout(tuple(array.shape), num_channels, input_data_format, where, in_list)
        for where, array in arrays.items()
    }
    arrays = {where: _as_numpy(array) for where, array in arrays.items()}
    if levels is None:
        _check_are_pixels(arrays, num_levels)
    pixels = []
    for where, image in images.items():
        if where not in arrays:
            _check_is_pil(image, levels, where)
            pixels.append(_pixels_of_pil(image, num_channels, where))
            continue
        array = arrays[where]
        read = _pixels_of_levels(array, num_levels, where) if levels else _to_uint8(array, where)
        pixels.extend(TO_BATCH[layouts[where]](read))
    return pixels


def _sides(size: Any, default_to_square: bool) -> Any:
    """`size` as a dictionary, if it is one of its spellings; nothing is checked."""
    if isinstance(size, int):
        return {"height": size, "width": size} if default_to_square else {"shortest_edge": size}
    if isinstance(size, (list, tuple)) and len(size) == 2:
        return {"height": size[0], "width": size[1]}
    if isinstance(size, SizeDict):
        return {key: value for key, value in vars(size).items() if value is not None}
    return size


def _size_dict(name: str, size: Any, default_to_square: bool, keys: tuple[set, ...]) -> SizeDict | None:
    """`size` in any of its spellings as a checked `SizeDict` that has one of the sets `keys`."""
    if size is None:
        return None
    sides = _sides(size, default_to_square)
    if not isinstance(sides, dict) or set(sides) not in keys or not all(_is_int_in(x, 1) for x in sides.values()):
        spellings = " or ".join("{" + ", ".join(f"'{key}': …" for key in sorted(names)) + "}" for names in keys)
        raise ValueError(
            f"`{name}` must be {spellings} with positive integers, or one or two such integers; got {size!r}."
        )
    return SizeDict(**sides)


def _resized_size(height: int, width: int, size: SizeDict) -> tuple[int, int]:
    """Height and width that an image of `height` × `width` gets from `size`."""
    if size.shortest_edge is None:
        return size["height"], size["width"]
    shortest = min(height, width)
    return height * size.shortest_edge // shortest, width * size.shortest_edge // shortest


def _check_one_size(images: Sequence[np.ndarray], size: SizeDict | None) -> None:
    """Raise unless these `(num_channels, height, width)` have one height and width, after resizing to `size`."""
    sizes = {image.shape[1:] for image in images}
    if size is not None:
        sizes = {_resized_size(height, width, size) for height, width in sizes}
    if len(sizes) > 1:
        listed = [f"{height}×{width}" for height, width in sorted(sizes)]
        raise ValueError(
            f"The images of a batch must have one size, got {some_of(listed)} (height × width); pass"
            " `size={'height': …, 'width': …}` or `crop_size`, or process them one by one."
        )


def _check_one_of(name: str, value: Any, choices: Sequence, text: str, reason: str = "") -> None:
    if value not in choices:
        raise ValueError(f"`{name}` must be {text}, got {value!r}{reason}.")


def _check_level_options(
    num_levels=None, num_channels=None, levels=None, binarization=None, threshold=None, generator=None, **others
) -> None:
    """Check what says how pixels become levels."""
    _check_num_levels(num_levels)
    if not _is_int_in(num_channels, 1) or num_channels not in (1, 3):
        raise ValueError(f"`num_channels` must be 1 (grey) or 3 (red, green, blue), got {num_channels!r}.")
    _check_one_of("levels", levels, (None, True, False), "True, False or None")
    choices = (None, "threshold", "stochastic")
    _check_one_of("binarization", binarization, choices, "None, 'threshold' or 'stochastic'")
    if binarization is not None and num_levels != 2:
        raise ValueError(
            f"`binarization={binarization!r}` makes two levels, but `num_levels` is {num_levels}; pass `num_levels=2`."
        )
    if not _is_int_in(threshold, 0, 255):
        raise ValueError(f"`threshold` must be an integer from 0 to 255, got {threshold!r}.")
    if generator is not None and not isinstance(generator, torch.Generator):
        raise TypeError(f"`generator` must be a torch.Generator or None, got {type(generator).__name__}.")


def _check_size_options(
    do_resize=None, size=None, do_center_crop=None, crop_size=None, resample=None, **others
) -> None:
    """Check what says how images get their size."""
    for name, switch, value_name, value in (
        ("do_resize", do_resize, "size", size),
        ("do_center_crop", do_center_crop, "crop_size", crop_size),
    ):
        _check_one_of(name, switch, (None, True, False), "True, False or None")
        if switch and value is None:
            raise ValueError(f"`{name}=True` needs `{value_name}`, which is None.")
    if isinstance(resample, bool) or resample not in list(PILImageResampling):
        known = ", ".join(f"{int(filter)} ({filter.name})" for filter in sorted(PILImageResampling))
        raise ValueError(f"`resample` must be a PIL.Image.Resampling or its number, {known}; got {resample!r}.")


def _check_format_options(input_data_format=None, data_format=None, return_tensors=None, **others) -> None:
    """Check what says how arrays lie, and that nothing is asked for which has no meaning for levels."""
    text = "None, 'channels_first' or 'channels_last'"
    _check_one_of("input_data_format", input_data_format, (None, CHANNELS_FIRST, CHANNELS_LAST), text)
    reason = ": models read no other"
    _check_one_of("data_format", data_format, (None, CHANNELS_FIRST), "None or 'channels_first'", reason)
    _check_one_of("return_tensors", return_tensors, (None, "pt", "np"), "None, 'pt' or 'np'")
    for name in ("do_convert_rgb", "do_normalize", "do_pad", "do_rescale"):
        if others.get(name):
            raise ValueError(
                f"`{name}={others[name]!r}` has no meaning here: levels are integers that the model scales itself,"
                " colour is `num_channels=3`, and nothing is padded."
            )


class PixelCNNImageProcessorKwargs(ImagesKwargs, total=False):
    r"""
    num_levels (`int`):
        Number of levels, 2 to 256.
    num_channels (`int`):
        1 for grey, 3 for red, green, blue.
    levels (`bool`, *optional*):
        Whether the integers of arrays are levels, `True`, or pixels, `False`.
    binarization (`str`, *optional*):
        `None`, `"threshold"` or `"stochastic"`.
    threshold (`int`):
        The highest pixel that `"threshold"` maps to level 0.
    generator (`torch.Generator`, *optional*):
        Source of randomness of `"stochastic"`. A call-time argument: it cannot be saved.
    """

    num_levels: int
    num_channels: int
    levels: bool | None
    binarization: str | None
    threshold: int
    generator: torch.Generator | None


def check_output_type(output_type: str):
    """Raise unless images can be given so."""
    if output_type not in ("pil", "np", "pt"):
        raise ValueError(f"`output_type` must be 'pil', 'np' or 'pt', got {output_type!r}.")


class PixelCNNImageProcessor(PilBackend):
    r"""
    Turns images into the integer levels that PixelCNN models read and write, and back: their pixel "tokenizer".

    Every option can be given to the constructor, to `from_pretrained` and to a single call; `save_pretrained` saves it.

    Args:
        num_levels (`int`, defaults to 256):
            Number of levels, 2 to 256. Pixel `x` has level `floor(x * num_levels / 256)`.
        num_channels (`int`, defaults to 1):
            1 for grey, 3 for red, green, blue.
        levels (`bool`, *optional*):
            Whether the integers of arrays are levels already (`True`; they come out as they went in, unless resized)
            or pixels (`False`). `None` reads pixels, and asks if they might be levels.
        size (`int`, `tuple` or `dict`, *optional*):
            Resize to `{"height": h, "width": w}`, or to `{"shortest_edge": n}` keeping the aspect ratio. `None`
            leaves images as they are.
        do_resize (`bool`, *optional*):
            `None` resizes when `size` is set; `False` switches resizing off.
        resample (`int` or `PIL.Image.Resampling`, defaults to `BILINEAR`):
            Filter for resizing, applied by PIL to the 8-bit pixels (after the conversion between grey and colour).
        crop_size (`int`, `tuple` or `dict`, *optional*):
            Cut `{"height": h, "width": w}` out of the middle, after resizing. `None` does not crop. Nothing is padded:
            images must be at least that large.
        do_center_crop (`bool`, *optional*):
            `None` crops when `crop_size` is set; `False` switches cropping off.
        binarization (`str`, *optional*):
            How two levels are made (`num_levels` must be 2). `None`: the formula above, which is pixel > 127.
            `"threshold"`: level 1 where pixel > `threshold`. `"stochastic"`: level 1 with probability pixel / 255,
            drawn anew in every call; each image takes one call
            `torch.rand(height * width * channels, dtype=torch.float64, generator=generator)` in raster order (row by
            row, inside a pixel channel by channel) and is 1 where that number * 255 < pixel. So one batch of four
            images gives the same levels as four batches of one on the same generator.
        threshold (`int`, defaults to 127):
            0 to 255, used by `binarization="threshold"`; 0 means "pixel > 0".
        input_data_format (`str`, *optional*):
            `"channels_first"` or `"channels_last"`: where the channel axis of 3-D and 4-D arrays is. `None` infers it.
        generator (`torch.Generator`, *optional*):
            Call-time only, used by `binarization="stochastic"`; `None` takes torch's global generator.
        return_tensors (`str`, *optional*):
            `"pt"`, `"np"`, or `None` for a list with one numpy array per image.

    **What an image may be.** PIL images of any mode, numpy arrays, torch tensors, and lists (or any sequence, nested
    or not) of them. PIL images are converted to grey or RGB by PIL; palettes are looked up; transparency is dropped,
    that is, colours are taken as stored, not blended with a background. Photos are turned upright, as their EXIF
    orientation says. Arrays are never converted between grey and colour.

    | dtype | values | meaning |
    |---|---|---|
    | bool, PIL mode 1 | | black or white: 0 or 255 |
    | uint8, other PIL modes | 0 … 255 | 8-bit pixels |
    | other integers, PIL mode I | 0 … 255, else an error | 8-bit pixels |
    | uint16, PIL modes I;16 | some above 255, or all 0 | 16-bit pixels, of which the upper 8 bits are kept |
    | uint16, PIL modes I;16 | 0 … 255 | an error: 8-bit pixels, levels, or black |
    | floats, PIL mode F | 0 … 1, else an error | multiplied by 255 and rounded |
    | integers in an array, `levels=True` | 0 … `num_levels - 1`, else an error | levels, whatever the dtype |

    With fewer than 256 levels, integers of arrays that are all below `num_levels`, and not all 0, are an error as well
    until `levels` is given: levels and a very dark picture look the same. All arrays of a call are judged together, so
    one dark image in a batch is none. PIL images are not judged, their mode says what they hold. What `post_process`
    returns is never in doubt with up to 16 levels.

    **How the shape of an array is read**, with `C = num_channels`:

    | shape | meaning |
    |---|---|
    | `(H, W)` | a grey image (`C = 1`) |
    | `(N, C, H, W)`, `(N, H, W, C)` | a batch |
    | `(C, H, W)`, `(H, W, C)` | an image, if `C = 3`, if it stands in a list, or if `input_data_format` is given |
    | `(H, W, 1)`, `C = 1`, by itself | an image |
    | any other 3-D, `C = 1`, by itself | `(N, H, W)`: a batch of `N` grey images, also if `N` is 1, 3 or 4 |

    A `ValueError` asks for more where two readings are left: both ends of an image have `C` entries, such as
    `(3, 32, 3)` or `(1, 28, 1)` (pass `input_data_format`), or a grey batch is 2 to 4 pixels wide, as `(28, 28, 3)`
    would be (pass `(N, 1, H, W)`). A grey batch in a list is 4-D as well.

    Example:

    ```python
    >>> from PIL import Image
    >>> processor = PixelCNNImageProcessor(num_levels=4, size=28)
    >>> processor(Image.new("L", (56, 56), 200), return_tensors="pt")["pixel_values"].unique()
    tensor([3])
    ```
    """

    model_input_names = ["pixel_values"]
    valid_kwargs = PixelCNNImageProcessorKwargs

    num_levels = 256
    num_channels = 1
    levels = None
    binarization = None
    threshold = 127
    do_resize = None
    size = None
    resample = PILImageResampling.BILINEAR
    do_center_crop = None
    crop_size = None
    do_rescale = False
    rescale_factor = None
    do_normalize = False

    def __init__(self, **kwargs: Unpack[PixelCNNImageProcessorKwargs]):
        options = {key for key in kwargs if key not in SERVICE_KEYS and not key.startswith("_")}
        self._check_names(options)
        if kwargs.get("generator") is not None:
            raise ValueError("`generator` cannot be saved with the processor; pass it to each call instead.")
        super().__init__(**kwargs)
        self._validate_preprocess_kwargs(**{name: getattr(self, name, None) for name in self._valid_kwargs_names})

    def preprocess(self, images: ImageInput, **kwargs: Unpack[PixelCNNImageProcessorKwargs]) -> BatchFeature:
        r"""
        Levels of one image or of a batch; `processor(images, ...)` is the same.

        Args:
            images (`PIL.Image.Image`, `np.ndarray`, `torch.Tensor` or a sequence of them):
                The images; the class docstring says which shapes and values are read in which way.
            kwargs:
                Options of the class, for this call only.

        Returns:
            `BatchFeature` with `pixel_values`, int64 of shape `(batch, num_channels, height, width)`: a torch tensor on
            the CPU or a numpy array, as `return_tensors` says, or else a list of numpy arrays
            `(num_channels, height, width)`.

        Raises:
            ValueError: If an option or an image is not as described, an image cannot be decoded, the batch is empty,
                or its images are of different sizes and not brought to one size.
            TypeError: If an argument has an unusable type or an unknown name.
        """
        self._check_names(kwargs)
        options = {name: kwargs.get(name, getattr(self, name, None)) for name in self._valid_kwargs_names}
        options = self._standardize_kwargs(**options)
        self._validate_preprocess_kwargs(**options)
        return self._preprocess_image_like_inputs(images, **options)

    @overload
    def post_process(
        self, levels: np.ndarray | torch.Tensor, output_type: Literal["pil"] = "pil"
    ) -> list[Image.Image]: ...

    @overload
    def post_process(self, levels: np.ndarray | torch.Tensor, output_type: Literal["np"]) -> np.ndarray: ...

    @overload
    def post_process(self, levels: np.ndarray | torch.Tensor, output_type: Literal["pt"]) -> torch.Tensor: ...

    @overload
    def post_process(
        self, levels: np.ndarray | torch.Tensor, output_type: str
    ) -> list[Image.Image] | np.ndarray | torch.Tensor: ...

    def post_process(
        self, levels: np.ndarray | torch.Tensor, output_type: str = "pil"
    ) -> list[Image.Image] | np.ndarray | torch.Tensor:
        r"""
        Images of levels, such as `generate` returns. The processor maps them back to the same levels (with
        `binarization="threshold"` for every `threshold` below 255).

        Args:
            levels (`np.ndarray` or `torch.Tensor` of shape `(batch, num_channels, height, width)`):
                Levels from 0 to `num_levels - 1`, of any integer dtype.
            output_type (`str`, defaults to `"pil"`):
                `"pil"`, `"np"` or `"pt"`.

        Returns:
            `"pil"`: a list of PIL images of mode L or RGB, which a notebook shows as a grid. `"np"`: uint8 numpy array
            `(batch, height, width, num_channels)`. `"pt"`: uint8 torch tensor `(batch, num_channels, height, width)`,
            on the device of `levels`.

        Raises:
            ValueError: If `output_type`, the shape or a level is not as described.
            TypeError: If `levels` is no array or tensor of integers.
        """
        check_output_type(output_type)
        shape = tuple(getattr(levels, "shape", ()))
        if isinstance(levels, (np.ndarray, torch.Tensor)) and (len(shape) != 4 or shape[1] != self.num_channels):
            raise ValueError(
                f"`levels` must have shape (batch, {self.num_channels}, height, width), as `num_channels` says, got"
                f" {shape}."
            )
        pixels = dequantize(levels, self.num_levels)
        if output_type == "pt":
            return pixels if isinstance(pixels, torch.Tensor) else torch.from_numpy(pixels)
        if isinstance(pixels, torch.Tensor):
            pixels = pixels.cpu().numpy()
        pixels = np.ascontiguousarray(pixels.transpose(0, 2, 3, 1))
        if output_type == "np":
            return pixels
        return Pictures(Image.fromarray(image[..., 0] if self.num_channels == 1 else image) for image in pixels)

    def process_image(
        self,
        image: ImageInput,
        num_channels: int | None = None,
        input_data_format: str | ChannelDimension | None = None,
        where: str = "`image`",
        **kwargs,
    ) -> np.ndarray:
        r"""
        8-bit pixels of one image, before resizing: uint8 `(num_channels, height, width)`; with the processor's own
        `levels`.

        Args:
            image (`PIL.Image.Image`, `np.ndarray` or `torch.Tensor`):
                One image; arrays have 2 or 3 dimensions.
            num_channels (`int`, *optional*):
                1 or 3; `None` takes the processor's.
            input_data_format (`str`, *optional*):
                `"channels_first"` or `"channels_last"`; `None` infers it.
            where (`str`):
                What error messages call the image.
        """
        if isinstance(image, (np.ndarray, torch.Tensor)) and image.ndim == 4:
            raise ValueError(f"{where} must be one image, got a batch of shape {tuple(image.shape)}.")
        num_channels = self.num_channels if num_channels is None else num_channels
        return _pixels_of({where: image}, num_channels, self.num_levels, self.levels, input_data_format, True)[0]

    def resize(
        self, image: np.ndarray, size: SizeDict, resample: PILImageResampling | int | None = None, **kwargs
    ) -> np.ndarray:
        """Resize uint8 pixels `(channels, height, width)` with PIL."""
        height, width = _resized_size(image.shape[1], image.shape[2], size)
        if (height, width) == image.shape[1:]:
            return image
        check_memory(f"an image of {len(image)}×{height}×{width}", len(image) * height * width, torch.device("cpu"))
        pixels = Image.fromarray(image[0] if len(image) == 1 else np.ascontiguousarray(image.transpose(1, 2, 0)))
        pixels = np.asarray(pixels.resize((width, height), self.resample if resample is None else resample))
        return pixels[None] if pixels.ndim == 2 else pixels.transpose(2, 0, 1)

    def center_crop(self, image: np.ndarray, size: SizeDict, **kwargs) -> np.ndarray:
        """Cut the middle out of `(channels, height, width)`; unlike the base class, never pads."""
        height, width = image.shape[1:]
        if height < size.height or width < size.width:
            raise ValueError(
                f"`crop_size` {size.height}×{size.width} is larger than an image of {height}×{width}; pass a smaller"
                " `crop_size`, or a `size` to enlarge the image first."
            )
        top, left = (height - size.height) // 2, (width - size.width) // 2
        return image[:, top : top + size.height, left : left + size.width]

    def _prepare_image_like_inputs(
        self,
        images: ImageInput,
        *args,
        num_channels: int,
        num_levels: int,
        levels: bool | None = None,
        input_data_format: str | None = None,
        **kwargs,
    ) -> list[np.ndarray]:
        """The images of any accepted input as a list of uint8 `(num_channels, height, width)`."""
        named: dict[str, Any] = {"`images`": images}
        in_list = False
        if isinstance(images, Sequence) and not isinstance(images, (str, bytes)):
            in_list = True
            named = {f"`images[{index}]`": image for index, image in enumerate(_flatten(images))}
        if not named:
            raise ValueError("`images` is empty. Pass at least one image.")
        return _pixels_of(named, num_channels, num_levels, levels, input_data_format, in_list)

    def _preprocess(
        self,
        images: list[np.ndarray],
        num_levels: int,
        binarization: str | None,
        threshold: int,
        generator: torch.Generator | None,
        do_resize: bool | None,
        size: SizeDict | None,
        resample: PILImageResampling | int | None,
        do_center_crop: bool | None,
        crop_size: SizeDict | None,
        return_tensors: str | TensorType | None,
        **kwargs,
    ) -> BatchFeature:
        """Levels of uint8 images `(num_channels, height, width)`."""
        size = size if do_resize is None or do_resize else None
        crop_size = crop_size if do_center_crop is None or do_center_crop else None

        if crop_size is None:
            _check_one_size(images, size)
        if size is not None:
            images = [self.resize(image, size, resample) for image in images]
        if crop_size is not None:
            images = [self.center_crop(image, crop_size) for image in images]
        pixels = np.stack(images)  # (batch, channels, height, width), uint8

        if binarization == "threshold":
            levels = (pixels > threshold).astype(np.int64)
        elif binarization == "stochastic":
            levels = np.stack([_draw_levels(image, generator) for image in pixels])
        else:
            levels = quantize(pixels, num_levels)
        data = {"pixel_values": list(levels) if return_tensors is None else levels}
        return BatchFeature(data=data, tensor_type=return_tensors)

    def _check_names(self, names: Any) -> None:
        unknown = sorted(set(names) - set(self.valid_kwargs.__annotations__))
        if unknown:
            raise TypeError(
                f"{type(self).__name__} got unknown argument(s) {', '.join(map(repr, unknown))}; it knows"
                f" {', '.join(sorted(self.valid_kwargs.__annotations__))}."
            )

    def _standardize_kwargs(self, size=None, crop_size=None, default_to_square=None, **kwargs) -> dict:
        """Sizes in one form, `SizeDict`; called by the base class too."""
        square = default_to_square is not False
        kwargs["size"] = _size_dict("size", size, square, ({"height", "width"}, {"shortest_edge"}))
        kwargs["crop_size"] = _size_dict("crop_size", crop_size, True, ({"height", "width"},))
        return kwargs

    def _validate_preprocess_kwargs(self, **options) -> None:
        """Check all options, alone and together; sizes have been checked by `_standardize_kwargs`."""
        _check_level_options(**options)
        _check_size_options(**options)
        _check_format_options(**options)


def binarize_stochastically(pixels: np.ndarray, noise: np.ndarray) -> np.ndarray:
    r"""
    Levels 0 and 1 of one image: 1 with probability pixel / 255.

    Args:
        pixels (`np.ndarray` of shape `(channels, height, width)`): 8-bit pixels.
        noise (`np.ndarray` of shape `(height * width * channels,)`): Numbers in [0, 1) in raster order.

    Returns:
        `np.ndarray` of the shape of `pixels`, bool.
    """
    channels, height, width = pixels.shape
    return noise.reshape(height, width, channels).transpose(2, 0, 1) * 255 < pixels


def _draw_levels(pixels: np.ndarray, generator: torch.Generator | None) -> np.ndarray:
    """int64 levels of one image `(channels, height, width)`, with one call of `torch.rand`."""
    device = "cpu" if generator is None else generator.device
    noise = torch.rand(pixels.size, dtype=torch.float64, device=device, generator=generator).cpu().numpy()
    return binarize_stochastically(pixels, noise).astype(np.int64)


__all__ = [
    "PixelCNNImageProcessor",
    "PixelCNNImageProcessorKwargs",
    "binarize_stochastically",
    "dequantize",
    "quantize",
]
