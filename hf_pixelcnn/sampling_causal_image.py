r"""
The three samplers: one pass over the dimensions of a [`Canvas`] each, which decides levels from the model's parameters.

All of them draw the same images, because a level depends on its number and on the parameters of its dimension alone.
"""

import contextlib
from collections.abc import Iterator

import torch

from .caching_causal_image import device_of, sampling_cache
from .canvas_causal_image import Canvas, SampledCanvas
from .checks_causal_image import evaluation_mode


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
    """Every activation once; see [`SamplingCache`]. Without `keep_cache` every call runs the same kernels."""
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


SAMPLERS = {"cached": sample_cached, "fixed_point": sample_fixed_point, "naive": sample_naive}

__all__ = ["SAMPLERS", "sample_cached", "sample_fixed_point", "sample_naive", "sampling_state"]
