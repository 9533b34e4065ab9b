"""Levels as pictures, pictures side by side, pictures that move, and pictures turned upright."""

import io
import math
from collections.abc import Sequence

import torch
from PIL import ExifTags, Image, ImageOps


def png_of(picture: Image.Image, **options) -> bytes:
    """A picture as the bytes of a PNG file; options are those of PIL's `save`."""
    file = io.BytesIO()
    picture.save(file, "PNG", **options)
    return file.getvalue()


def upright(image: Image.Image) -> Image.Image:
    """An image turned as its EXIF orientation says, as `datasets` turns it; damaged EXIF data say nothing."""
    try:
        is_turned = image.getexif().get(ExifTags.Base.Orientation, 1) != 1
    except Exception:  # what PIL raises depends on the damage
        return image
    return ImageOps.exif_transpose(image) if is_turned else image


class Pictures(list[Image.Image]):
    """A list of images that a notebook shows as a grid."""

    def _repr_png_(self) -> bytes | None:
        if not self or len({(image.mode, image.size) for image in self}) > 1:
            return None
        return png_of(image_grid(self))


def images_of(levels: torch.Tensor, processor, num_levels: int) -> list[Image.Image]:
    r"""
    Pictures of levels.

    Args:
        levels (`torch.LongTensor` of shape `(batch, channels, height, width)`): Images, or codes of one channel.
        processor ([`PixelCNNImageProcessor`], *optional*): Of the model. Codes have none: their pictures are grey, the
            lowest level black and the highest white.
        num_levels (`int`): Levels of the model.
    """
    if processor is not None:
        return processor.post_process(levels)
    grey = levels[:, 0].float().mul(255 / (num_levels - 1)).round().to(torch.uint8)
    return Pictures(Image.fromarray(image) for image in grey.cpu().numpy())


def image_grid(
    images: Sequence[Image.Image], columns: int | None = None, gap: int = 2, least_width: int = 480
) -> Image.Image:
    r"""
    Images of one size side by side, row by row.

    Args:
        images (sequence of `PIL.Image.Image`): At least one image.
        columns (`int`, *optional*): Images in a row; by default about as many as rows.
        gap (`int`): Grey pixels between images, before enlarging.
        least_width (`int`): The grid is enlarged by the whole number that makes it at least this wide.

    Raises:
        ValueError: If there is no image.
    """
    if not images:
        raise ValueError("A grid needs at least one image.")
    columns = min(columns or math.ceil(math.sqrt(len(images))), len(images))
    rows = math.ceil(len(images) / columns)
    width, height = images[0].size
    grid = Image.new(
        images[0].mode,
        (columns * (width + gap) - gap, rows * (height + gap) - gap),
        128 if images[0].mode == "L" else (128, 128, 128),
    )
    for index, image in enumerate(images):
        grid.paste(image, (index % columns * (width + gap), index // columns * (height + gap)))
    scale = math.ceil(least_width / grid.width)
    return grid.resize((grid.width * scale, grid.height * scale), Image.Resampling.NEAREST)


def animation(frames: Sequence[Image.Image], seconds: float = 3.0) -> bytes:
    r"""
    An animated GIF that plays again and again, and rests on its last frame for as long as the others take together.

    Args:
        frames (sequence of `PIL.Image.Image`): At least one, all of one size and mode.
        seconds (`float`): From the first frame to the last, to a hundredth of a second per frame.

    Raises:
        ValueError: If there is no frame.
    """
    if not frames:
        raise ValueError("An animation needs at least one frame.")
    each = max(20, round(100 * seconds / len(frames)) * 10)  # milliseconds; browsers slow down below 20
    file = io.BytesIO()
    durations = [each] * (len(frames) - 1) + [each * len(frames)]
    frames[0].save(file, "GIF", save_all=True, append_images=frames[1:], duration=durations, loop=0)
    return file.getvalue()


__all__ = ["Pictures", "animation", "image_grid", "images_of", "png_of"]
