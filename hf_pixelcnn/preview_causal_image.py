"""Pictures that grow while they are drawn."""

from collections.abc import Callable

import torch
from PIL import Image

from .checks_causal_image import check_count
from .configuration_causal_image import as_height_and_width
from .image_processing_causal_image import PixelCNNImageProcessor
from .pictures_causal_image import image_grid


def show_in_notebook() -> Callable[[Image.Image], None]:
    """A function that shows an image in the output of the current notebook cell, in place of the one before."""
    from IPython.display import display

    handle = None

    def show(image: Image.Image):
        nonlocal handle
        if handle is None:
            handle = display(image, display_id=True)
        else:
            handle.update(image)

    return show


class LivePreview:
    r"""
    A `streamer` for `generate` that shows the images growing, row by row.

    Args:
        processor ([`PixelCNNImageProcessor`]): Turns levels into pixels.
        num_images (`int`): Images of the request; with more than 64 only the first 64 are shown.
        image_size (`int` or `(height, width)`): Their size.
        every (`int`, defaults to 1): Show the picture after every so many rows.
        show (callable, *optional*): Called with each `PIL.Image.Image`; by default the notebook cell shows it.

    ```python
    >>> preview = LivePreview(processor, num_images=16, image_size=model.config.image_size)
    >>> levels = model.generate(num_images=16, streamer=preview)
    ```
    """

    def __init__(
        self,
        processor: PixelCNNImageProcessor,
        num_images: int,
        image_size: int | tuple[int, int],
        every: int = 1,
        show: Callable[[Image.Image], None] | None = None,
    ):
        check_count("num_images", num_images)
        check_count("every", every)
        self.processor, self.every = processor, every
        self.show = show_in_notebook() if show is None else show
        self.num_shown = min(num_images, 64)
        height, width = as_height_and_width(image_size)
        # Grey where nothing has been drawn yet.
        self.pixels = torch.full((self.num_shown, height, width, processor.num_channels), 128, dtype=torch.uint8)

    def __call__(self, images: slice, row: int, levels: torch.Tensor):
        shown = slice(images.start, min(images.stop, self.num_shown))
        if shown.start >= shown.stop:
            return
        pixels = self.processor.post_process(levels[:, :, None].cpu(), output_type="pt")[:, :, 0]
        self.pixels[shown, row] = pixels[: shown.stop - shown.start].transpose(1, 2)
        is_last = row == self.pixels.shape[1] - 1
        if is_last or row % self.every == self.every - 1:
            self.show(self.image())

    def image(self) -> Image.Image:
        """The grid as it is now, at least 320 pixels wide."""
        pixels = self.pixels.squeeze(-1) if self.pixels.shape[-1] == 1 else self.pixels
        return image_grid([Image.fromarray(image) for image in pixels.numpy()], least_width=320)


__all__ = ["LivePreview"]
