r"""
The three samplers: one pass over the dimensions of a [`Canvas`] each, which decides levels from the model's parameters.

All of them draw the same images, because a level depends on its number and on the parameters of its dimension alone.

The cached sampler is thousands of small operations, one after the other. Shared by several threads, each of them waits
for the last thread. On a machine with nothing else to do that costs microseconds; where others also use the cores, a
whole time slice, many times what the operation takes. So [`threads_that_pay`] says how many threads a batch gets on a
CPU.
"""

import contextlib
from collections.abc import Iterator

import torch

from .caching_causal_image import ForwardCache, device_of, sampling_cache
from .canvas_causal_image import Canvas, SampledCanvas
from .checks_causal_image import evaluation_mode

# Images × features of a thread: so many that a second thread has something to save in the products of a step even where
# the cores have other work.
FEATURES_PER_THREAD = 8192


def threads_that_pay(model, batch: int) -> int:
    r"""
    Threads that the cached sampler and the codec use: as many as have 8,192 of the numbers `batch * hidden_size` each,
    at least one, at most torch's own number. So batches below 16,384, which are 256 images with 64 features, get one.

    Torch's own number wherever this rule does not hold: on other devices than the CPU, and in families without a cache
    of their own, which run forward passes.

    Args:
        model: A `...ForCausalImageModeling`.
        batch (`int`): Images drawn at a time.
    """
    own = torch.get_num_threads()
    if device_of(model).type != "cpu" or model.sampling_cache_class is ForwardCache:
        return own
    return max(1, min(own, batch * model.config.hidden_size // FEATURES_PER_THREAD))


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


def sample_cached(model, canvas: Canvas, class_ids: torch.Tensor | None, keep_cache: bool = True):
    """
    Every activation once; see [`SamplingCache`]. Without `keep_cache` every call runs the same kernels. Uses as many
    threads as torch is set to.
    """
    batch = canvas.copies * len(canvas.levels)
    with sampling_cache(model, batch, canvas.height, canvas.width, class_ids, keep_cache) as cache:
        for row in range(canvas.height):
            noise = canvas.free_noise(row)
            if noise is not None:
                canvas.levels[:, canvas.row_dimensions(row)] = cache.draw_row(row, noise)
            else:
                cache.start_row(row)
                for column, channel, dimension in canvas.raster(row):
                    level = canvas.decide(cache.parameters_at(column, channel), dimension)
                    cache.observe(column, channel, canvas.for_network(level))
            canvas.finish_rows(row, row + 1)


def draw_cached(model, canvas: Canvas, class_ids: torch.Tensor | None):
    """[`sample_cached`] with the threads that pay."""
    with num_threads(threads_that_pay(model, canvas.copies * len(canvas.levels))):
        sample_cached(model, canvas, class_ids)


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
        levels = canvas.decide_rows(pixels, final_rows)
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
