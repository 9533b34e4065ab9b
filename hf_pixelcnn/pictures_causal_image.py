"""Levels as pictures, and pictures side by side."""

import math
from collections.abc import Sequence

import torch
from PIL import Image

from .image_processing_causal_image import PixelCNNImageProcessor


def images_of(levels: torch.Tensor, processor: PixelCNNImageProcessor | None, num_levels: int) -> list[Image.Image]:
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
    return [Image.fromarray(image) for image in grey.cpu().numpy()]


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


__all__ = ["image_grid", "images_of"]
