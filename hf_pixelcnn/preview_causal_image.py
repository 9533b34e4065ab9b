"""Pictures that grow while they are drawn."""

import queue
import threading
from collections.abc import Callable, Iterator

import torch
from PIL import Image

from .checks_causal_image import check_count
from .configuration_causal_image import as_height_and_width
from .image_processing_causal_image import PixelCNNImageProcessor
from .pictures_causal_image import image_grid


def show_in_notebook() -> Callable[[Image.Image], None]:
    r"""
    A function that shows an image in the output of the current notebook cell, in place of the one before.

    Raises:
        RuntimeError: If this is no notebook.
    """
    try:
        from IPython import get_ipython
        from IPython.display import display
    except ImportError:
        shell = None
    else:
        shell = get_ipython()
    if not hasattr(shell, "kernel"):
        raise RuntimeError(
            "LivePreview shows its pictures in a notebook, and this is none. Give `show`, a function that is called "
            "with each picture, such as `frames.append` of a list."
        )
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
        num_images (`int`): Images of the request, times its `num_resamples`: all completions that are drawn are shown,
            not the choice among them. With more than 64 only the first 64 are shown.
        image_size (`int` or `(height, width)`): Their size.
        every (`int`, defaults to 1): Show the picture after every so many rows.
        columns (`int`, *optional*): Images in a row; by default about as many as rows.
        show (callable, *optional*): Called with each `PIL.Image.Image`; by default the notebook cell shows it.

    Raises:
        RuntimeError: If `show` is not given outside a notebook.

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
        columns: int | None = None,
    ):
        check_count("num_images", num_images)
        check_count("every", every)
        self.processor, self.every, self.columns = processor, every, columns
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
        return image_grid([Image.fromarray(image) for image in pixels.numpy()], self.columns, least_width=320)


class _Stopped(Exception):  # noqa: N818
    """Ends `generate` from its `streamer`."""


def rows_as_drawn(model, **request) -> Iterator[tuple[slice, int, torch.Tensor]]:
    r"""
    `generate` as an iterator over finished rows, whose reader may stop at any row.

    The images are drawn by a thread of its own, which does not wait for the reader and ends with the row in work when
    the iterator is closed (`close()`, or the end of its last reference).

    Args:
        model: A `...ForCausalImageModeling`.
        request: The arguments of `generate` except `streamer`.

    Yields:
        What a `streamer` gets: which images (a `slice` of the request), the number of the row, and its levels,
        `torch.LongTensor` `(n, channels, width)`.

    Returns:
        What `generate` returns, as the value of the `StopIteration`, which `yield from` gives.

    Raises:
        What `generate` raises.
    """
    rows: queue.SimpleQueue = queue.SimpleQueue()
    stopped = threading.Event()

    def streamer(*row):
        if stopped.is_set():
            raise _Stopped
        rows.put(("row", row))

    def draw():
        try:
            rows.put(("done", model.generate(streamer=streamer, **request)))
        except BaseException as error:  # the reader raises it
            rows.put(("error", error))

    threading.Thread(target=draw, daemon=True).start()
    try:
        while True:
            kind, value = rows.get()
            if kind == "error":
                raise value
            if kind == "done":
                return value
            yield value
    finally:
        stopped.set()


__all__ = ["LivePreview", "rows_as_drawn"]
