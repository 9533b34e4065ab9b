r"""
The three samplers: one pass over the dimensions of a [`Canvas`] each, which decides levels from the model's parameters.

All of them draw the same images, because a level depends on its number and on the parameters of its dimension alone.

The cached sampler is thousands of small operations per row, one after the other, and a few larger ones when the row
begins. An operation that several threads share waits for the last of them. On a machine with nothing else to do that
costs microseconds; where others also use the cores, a whole time slice, many times what a small operation takes. So
[`threads_that_pay`] says how many threads an operation of a size gets on a CPU.
"""

import contextlib
import math
import time
from collections.abc import Iterator
from functools import partial

import torch

from .caching_causal_image import ForwardCache, SamplingCache, cache_class_of, sampling_cache
from .caching_spans_causal_image import SpanCache
from .canvas_causal_image import Canvas, SampledCanvas
from .checks_causal_image import evaluation_mode
from .weights_causal_image import device_of

# Pixels × features of a thread: so many that a second thread has something to save in the products of a step even where
# the cores have other work.
FEATURES_PER_THREAD = 8192


def threads_that_pay(model, pixels: int) -> int:
    r"""
    Threads for operations on so many pixels at once: as many as have 8,192 of the numbers `pixels * hidden_size` each,
    at least one, at most torch's own number. So fewer than 16,384 numbers, which are 256 pixels with 64 features, get
    one.

    A step of the cached sampler, as of the codec, is one pixel of each image; what it computes when a row begins, a row
    of each.

    Torch's own number wherever this rule does not hold: on other devices than the CPU, and in families without a cache
    of their own, which run forward passes.

    Args:
        model: A `...ForCausalImageModeling`.
        pixels (`int`): Of all images that are drawn at a time.
    """
    own = torch.get_num_threads()
    if device_of(model).type != "cpu" or cache_class_of(model) is ForwardCache:
        return own
    return max(1, min(own, pixels * model.config.hidden_size // FEATURES_PER_THREAD))


@contextlib.contextmanager
def num_threads(threads: int) -> Iterator[None]:
    r"""
    Let torch use so many threads on the CPU, and as many as before afterwards, also after errors.

    Several threads of a program may do this at once: in builds with OpenMP, as torch's wheels are, the number belongs
    to the thread that sets it (`torch.set_num_threads`), and each gets its own back. Only a thread that uses torch for
    the first time meanwhile starts with the number that was set last; a server that also runs forward passes in such
    threads should call `torch.set_num_threads` at their start.
    """
    before = torch.get_num_threads()
    torch.set_num_threads(threads)  # also if it is the same: a number that was never set is one that MKL may lower
    try:
        yield
    finally:
        torch.set_num_threads(before)


@contextlib.contextmanager
def sampling_state(model) -> Iterator[None]:
    """Evaluation mode, no gradients, and no autocast, as products write in place in the weights' own dtype."""
    with evaluation_mode(model), torch.inference_mode(), torch.autocast(device_of(model).type, enabled=False):
        yield


def sample_naive(model, canvas: Canvas, class_ids: torch.Tensor | None):
    """The reference: one full forward for every dimension."""
    for row in range(canvas.height):
        for column, _, dimension in canvas.raster(row):
            parameters = model(canvas.for_network(canvas.images()), class_ids=class_ids, return_dict=True).logits
            canvas.decide(model.output_distribution.pixels(parameters)[:, row, column], dimension)
        canvas.finish_rows(row, row + 1)


class PassBudget:
    r"""
    When to draw a row by passes over what is open of it, see [`SpanCache`], and when pixel by pixel. Passes live on
    what they have gained, and on three hundredths of what pixels cost, two of them at the start; so they pay, or cost
    next to nothing, whatever the images are. Costs are reckoned, not timed: a seed leads to the same operations
    everywhere.

    Args:
        cache ([`SpanCache`]): Says what a pass costs, in steps of a pixel, which are the unit here.

    Attributes:
        left (`float`): What passes may lose. A pass draws one pixel at least; where the rest of its cost is more than
            this, pixels are drawn until it is not.
        most (`float`): What of gains is kept: four passes that draw next to nothing end them, after any number of good
            ones.
    """

    share = 0.01

    def __init__(self, cache: SpanCache):
        self.pass_cost = cache.pass_cost
        self.left = 2 * self.share * cache.height * cache.width
        self.most = max(self.left, 4 * self.pass_cost(cache.width))

    def pixels_before_pass(self, columns: int) -> int:
        """How many of the last columns of a row to draw pixel by pixel before the next pass."""
        cost = self.pass_cost(columns)
        if cost >= columns:
            return columns
        return min(columns, max(0, math.ceil((cost - 1 - self.left) / self.share)))

    def count_pixels(self, columns: int):
        """Columns were drawn pixel by pixel."""
        self.left = min(self.most, self.left + self.share * columns)

    def count_pass(self, computed: int, drawn: int):
        """A pass computed the last columns of a row, and drew some."""
        self.left = min(self.most, self.left + drawn - self.pass_cost(computed))


class RowThreads:
    r"""
    Threads for what is computed when a row begins. Whether several are faster depends on other work, which only a clock
    can tell: the first rows have as many as torch is set to, later rows `most`, as long as these lose no more time than
    they have gained and one row takes.

    Args:
        most (`int`): Threads that pay where nothing else runs.
    """

    def __init__(self, most: int):
        self.most, self.left, self.usual = most, 0.0, 0.0  # seconds: what may be lost; of a row without more threads

    def start_row(self, cache: SamplingCache, row: int):
        began, has_more = time.perf_counter(), self.left > 0
        with num_threads(self.most if has_more else torch.get_num_threads()):
            cache.start_row(row)
        seconds = time.perf_counter() - began
        if row == 1:  # row 0 is also the first to use some memory
            self.usual = self.left = seconds
        elif has_more:
            self.left = min(self.usual, self.left + self.usual - seconds)


def sample_cached(
    model, canvas: Canvas, class_ids: torch.Tensor | None, keep_cache: bool = True, row_threads: int | None = None
):
    """
    Every activation once, or a few times where that is faster; see [`SamplingCache`] and [`SpanCache`]. Without
    `keep_cache` every call runs the same kernels. Uses as many threads as torch is set to, or up to `row_threads` for
    what is computed when a row begins, see [`RowThreads`].
    """
    threads = RowThreads(row_threads or torch.get_num_threads())
    batch = canvas.copies * len(canvas.levels)
    with sampling_cache(model, batch, canvas.height, canvas.width, class_ids, keep_cache) as cache:
        if isinstance(cache, SpanCache) and isinstance(canvas, SampledCanvas) and canvas.can_decide_pixels:
            draw = partial(draw_spans, cache, canvas, PassBudget(cache))
        else:
            draw = partial(draw_pixels, cache, canvas, range(canvas.width))
        for row in range(canvas.height):
            threads.start_row(cache, row)
            noise = canvas.free_noise(row)
            if noise is not None:
                cache.row_noise.copy_(noise)
            draw(row, by_noise=noise is not None)
            if noise is not None:
                canvas.levels[:, canvas.row_dimensions(row)] = cache.row_levels
            canvas.finish_rows(row, row + 1)


def draw_pixels(cache: SamplingCache, canvas: Canvas, columns: range, row: int, by_noise: bool):
    """Draw some columns pixel by pixel: `by_noise` the cache decides, otherwise the canvas."""
    if by_noise:
        cache.draw_pixels(columns.start, columns.stop)
        return
    for column, channel, dimension in canvas.raster(row, columns):
        level = canvas.decide(cache.parameters_at(column, channel), dimension)
        cache.observe(column, channel, canvas.for_network(level))


def draw_spans(cache: SpanCache, canvas: SampledCanvas, budget: PassBudget, row: int, by_noise: bool):
    """Draw a row by passes over what is open of it, and pixel by pixel where these do not pay."""
    column, is_guessed = 0, False
    while column < canvas.width:
        pixels = budget.pixels_before_pass(canvas.width - column)
        if pixels and by_noise and cache.capture is not None:  # recorded as a whole
            column, pixels = 0, canvas.width
        if pixels:
            draw_pixels(cache, canvas, range(column, column + pixels), row, by_noise)
            budget.count_pixels(pixels)
            column += pixels
            continue
        if not is_guessed:
            guess = canvas.for_network(canvas.guess_row(row))
            cache.observe_rest(column, guess[:, column * canvas.channels :])
            is_guessed = True
        first = cache.first_of_pass(column)
        open_column = cache.draw_rest(column) if by_noise else decide_rest(cache, canvas, row, column)
        budget.count_pass(canvas.width - first, open_column - column)
        column = open_column


def decide_rest(cache: SpanCache, canvas: SampledCanvas, row: int, column: int) -> int:
    """One pass from a column on, decided by the canvas; returns the column that is open then."""
    first = cache.first_of_pass(column)
    levels = canvas.decide_pixels(cache.parameters_from(first), row * canvas.width + first)
    levels = levels[:, (column - first) * canvas.channels :]
    canvas.levels[:, canvas.row_dimensions(row)][:, column * canvas.channels :] = levels
    cache.take_rest(column, canvas.for_network(levels))
    return cache.open_column()


def draw_cached(model, canvas: Canvas, class_ids: torch.Tensor | None):
    """[`sample_cached`] with the threads that pay."""
    batch = canvas.copies * len(canvas.levels)
    row_threads = threads_that_pay(model, batch * canvas.width)
    with num_threads(threads_that_pay(model, batch)):
        sample_cached(model, canvas, class_ids, row_threads=row_threads)


def sample_fixed_point(model, canvas: SampledCanvas, class_ids: torch.Tensor | None) -> int:
    """
    Decide all dimensions from a full forward on the last images, until they stay as they are; returns the number of
    forwards.

    A row before which nothing has changed is final, so only rows from the first change on are computed again, with as
    many rows above as they can see.
    """
    final_rows = iterations = 0
    row_size = canvas.width * canvas.channels
    while final_rows < canvas.height:
        top = model.model.first_row_seen(final_rows)
        seen = canvas.for_network(canvas.images())[:, :, top:]
        parameters = model(seen, class_ids=class_ids, return_dict=True).logits
        pixels = model.output_distribution.pixels(parameters)[:, final_rows - top :]
        levels = canvas.decide_pixels(pixels.flatten(1, 2), final_rows * canvas.width)
        changed = (levels != canvas.levels[:, final_rows * row_size :]).any(0)
        canvas.levels[:, final_rows * row_size :] = levels
        still = int(changed.int().argmax()) if changed.any() else len(changed)
        canvas.finish_rows(final_rows, final_rows + still // row_size)
        final_rows += still // row_size
        iterations += 1
    return iterations


SAMPLERS = {"cached": draw_cached, "fixed_point": sample_fixed_point, "naive": sample_naive}

__all__ = [
    "SAMPLERS",
    "draw_cached",
    "num_threads",
    "sample_cached",
    "sample_fixed_point",
    "sample_naive",
    "sampling_state",
    "threads_that_pay",
]
