r"""
Images in work: their random numbers, and how their levels are decided one dimension after the other.

An image depends on its own random numbers, the weights and the condition, and on nothing else: every image has one
number in [0, 1) for each of its dimensions, in raster order, and a level is the first one whose cumulative probability
exceeds the number. So every sampler draws the same image, at any batch size.
"""

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from typing import NamedTuple

import torch
from transformers import LogitsProcessorList

from .generation_config_causal_image import PixelCNNGenerationConfig
from .likelihood_causal_image import (
    GuidedConditional,
    LevelConditional,
    OutputDistribution,
    from_raster,
    levels_from_noise,
    to_raster,
)


def bytes_to_draw(shape: tuple[int, int, int, int], num_resamples: int = 1) -> int:
    """Bytes that the random numbers and the levels of a request for images `(batch, channels, height, width)` take."""
    return math.prod(shape) * num_resamples * (torch.float64.itemsize + torch.long.itemsize)


def draw_noise(
    generator: torch.Generator | list[torch.Generator] | None,
    num_images: int,
    num_dims: int,
    device: torch.device,
    num_resamples: int = 1,
) -> torch.Tensor:
    r"""
    The random numbers of a request: for each image one call `torch.rand(num_dims, dtype=torch.float64)`; with
    `num_resamples` above 1 as many calls as that, one per completion, and then `torch.rand(1, dtype=torch.float64)` for
    the choice between them.

    Drawn on the generator's device (the CPU without one), so that a CPU generator gives the same numbers to every
    device. A list of generators gives image i what its own generator gives.

    Returns:
        `torch.DoubleTensor` on `device`, of shape `(num_dims, num_images)`, or `(num_resamples * num_dims + 1,
        num_images)` with `num_resamples` above 1.
    """
    generators = generator if isinstance(generator, (list, tuple)) else [generator] * num_images
    sizes = [num_dims] if num_resamples == 1 else [num_dims] * num_resamples + [1]

    def numbers(g):
        where = "cpu" if g is None else g.device
        return torch.cat([torch.rand(size, dtype=torch.float64, generator=g, device=where) for size in sizes])

    return torch.stack([numbers(g) for g in generators], dim=1).to(device)


class Canvas:
    r"""
    The images of one pass over all dimensions, and the order of the pass.

    How a level is decided is left to a subclass: the samplers draw it, the codec takes it from an image or a stream.
    Dimensions are numbered in raster order; `levels` is `(batch, height * width * channels)`.

    Args:
        distribution ([`LevelConditional`]): What parameters mean.
        shape (`(batch, channels, height, width)`): Of the images.
        device (`torch.device`): Of the levels.
        on_row (callable): Called with `(row, levels)`, `(batch, channels, width)`, when a row is finished.
    """

    copies = 1  # of every image in the batch of the network

    def __init__(
        self,
        distribution: LevelConditional,
        shape: tuple[int, int, int, int],
        device: torch.device,
        on_row: Callable[[int, torch.Tensor], object],
    ):
        batch, self.channels, self.height, self.width = self.shape = shape
        self.distribution, self.on_row = distribution, on_row
        dims = self.channels * self.height * self.width
        self.levels = torch.zeros(batch, dims, dtype=torch.long, device=device)

    def level_logits(self, parameters: torch.Tensor, dimension: int) -> torch.Tensor:
        """Log-probabilities `(batch, num_levels)` of a dimension, given the parameters of its pixel."""
        channel = dimension % self.channels
        return self.distribution.level_logits(parameters, channel, self.levels[:, dimension - channel : dimension])

    def decide(self, parameters: torch.Tensor, dimension: int) -> torch.Tensor:
        """Decide one dimension of all images, given the parameters of its pixel; returns the levels `(batch,)`."""
        raise NotImplementedError

    def for_network(self, batch: torch.Tensor) -> torch.Tensor:
        """A batch of images or levels as the network gets it: `copies` times."""
        return batch if self.copies == 1 else torch.cat([batch] * self.copies)

    def images(self) -> torch.Tensor:
        """The canvas as `(batch, channels, height, width)`; the place that notices broken probabilities."""
        if self.levels.min() < 0:
            raise ValueError(
                "No level has a non-zero probability at some dimension: the model's weights are not finite, or a "
                "logits processor forbids all levels, the temperature is too low or the guidance scale too high."
            )
        return from_raster(self.levels, self.shape)

    def row_dimensions(self, row: int) -> slice:
        """The dimensions of a row."""
        size = self.width * self.channels
        return slice(row * size, (row + 1) * size)

    def raster(self, row: int, columns: range | None = None) -> Iterator[tuple[int, int, int]]:
        """`(column, channel, dimension)` of a row, or of some of its columns, in raster order."""
        start, columns = self.row_dimensions(row).start, columns or range(self.width)
        for n in range(columns.start * self.channels, columns.stop * self.channels):
            column, channel = divmod(n, self.channels)
            yield column, channel, start + n

    def free_noise(self, row: int) -> torch.Tensor | None:
        """The numbers `(width * channels, batch)` of a row whose levels follow from them alone; `None` of another."""
        return None

    def finish_rows(self, start: int, end: int):
        """Report rows that will not change any more."""
        for row in range(start, end):
            levels = self.levels[:, self.row_dimensions(row)].unflatten(1, (self.width, self.channels))
            self.on_row(row, levels.transpose(1, 2))


class Given(NamedTuple):
    r"""
    Levels that are given.

    Args:
        mask (`torch.BoolTensor` of the shape of the images): Where.
        levels (`torch.LongTensor`, likewise): Which; 0 elsewhere.
    """

    mask: torch.Tensor
    levels: torch.Tensor


@dataclass(frozen=True)
class DrawRequest:
    r"""
    Images to draw, as the samplers see them; everything is checked.

    Args:
        shape (`(batch, channels, height, width)`): Of the images.
        noise (`torch.DoubleTensor` of shape `(dims, batch)`): See [`draw_noise`].
        settings ([`PixelCNNGenerationConfig`]): How levels are drawn.
        processors (`LogitsProcessorList`): All that are applied to log-probabilities: the user's, then the settings'.
        class_ids (`torch.LongTensor` of shape `(batch,)`, *optional*): Of a conditional model.
        given ([`Given`], *optional*): What is known of the images.
    """

    shape: tuple[int, int, int, int]
    noise: torch.Tensor
    settings: PixelCNNGenerationConfig
    processors: LogitsProcessorList
    class_ids: torch.Tensor | None = None
    given: Given | None = None

    def part(self, images: slice) -> "DrawRequest":
        """The request for some of the images."""
        return replace(
            self,
            shape=(images.stop - images.start, *self.shape[1:]),
            noise=self.noise[:, images],
            class_ids=None if self.class_ids is None else self.class_ids[images],
            given=None if self.given is None else Given(*(part[images] for part in self.given)),
        )


def checked_processor(processor: Callable[[torch.Tensor, torch.Tensor], torch.Tensor]) -> Callable:
    """A logits processor that raises `ValueError` where what it returns cannot be scores."""

    def process(levels: torch.Tensor, scores: torch.Tensor) -> torch.Tensor:
        result = processor(levels, scores)
        if not isinstance(result, torch.Tensor) or result.shape != scores.shape:
            got = tuple(result.shape) if isinstance(result, torch.Tensor) else type(result).__name__
            raise ValueError(f"A logits processor must keep the shape of the scores, {tuple(scores.shape)}, got {got}.")
        return result

    return process


class SampledCanvas(Canvas):
    r"""
    Images being drawn, by the noise rule.

    Args:
        distribution ([`OutputDistribution`]): Of the model.
        request ([`DrawRequest`]): What to draw. With a guidance scale other than 1 the network sees every image twice,
            first all with their classes, then all without.
        on_row (callable): See [`Canvas`].
    """

    def __init__(self, distribution: OutputDistribution, request: DrawRequest, on_row: Callable):
        settings, class_ids = request.settings, request.class_ids
        conditional = distribution
        if settings.guidance_scale != 1:
            if class_ids is None:
                raise ValueError("Guidance needs classes.")
            conditional, self.copies = GuidedConditional(distribution, settings.guidance_scale), 2
            class_ids = torch.cat((class_ids, torch.full_like(class_ids, -1)))
        super().__init__(conditional, request.shape, request.noise.device, on_row)
        self.class_ids = class_ids  # as the network gets them
        self.noise, self.do_sample = request.noise.contiguous(), settings.do_sample
        self.process: Callable[..., torch.Tensor] | None = request.processors or None
        self.is_plain = self.do_sample and self.process is None  # the distribution itself says what a number stands for
        self.scores = [] if settings.output_scores else None
        self.can_decide_pixels = self.scores is None and len(request.processors) == len(settings.logits_processors())
        self.noise_of, self.levels_of = self.noise.unbind(0), self.levels.unbind(1)
        self.given_mask = self.weighed = None
        if request.given is not None:
            self.given_mask = to_raster(request.given.mask).to(self.noise.device)
            self.levels.copy_(to_raster(request.given.levels))  # 0 where free
            self.any_given = self.given_mask.any(0).tolist()
        if settings.num_resamples > 1:
            if self.given_mask is None:
                raise ValueError("Resampling needs given levels.")
            self.weighed = self.given_mask & ((~self.given_mask).cumsum(1) > 0)  # given, after the first free one
            self.any_weighed = self.weighed.any(0).tolist()
            self.given_log_prob = torch.zeros_like(self.levels, dtype=torch.float64)

    def free_noise(self, row):
        dimensions = self.row_dimensions(row)
        is_given = self.given_mask is not None and any(self.any_given[dimensions])
        if is_given or not self.is_plain or self.scores is not None or self.copies > 1:
            return None
        return self.noise[dimensions]

    def levels_of_scores(self, scores: torch.Tensor, noise: torch.Tensor) -> torch.Tensor:
        """Levels `(...)` of processed scores `(..., num_levels)` and numbers `(...)`."""
        if self.do_sample:
            return levels_from_noise(scores, noise)
        highest, level = scores.max(-1)
        return torch.where(highest.isfinite(), level, -1)

    def processed(self, scores: torch.Tensor, dimension: int) -> torch.Tensor:
        """Scores `(batch, num_levels)` of a dimension after all processors."""
        return scores if self.process is None else self.process(self.levels[:, :dimension].clone(), scores)

    def decide(self, parameters, dimension):
        """Draw one dimension of all images."""
        channel, noise = dimension % self.channels, self.noise_of[dimension]
        weighs = self.weighed is not None and self.any_weighed[dimension]
        previous = self.levels[:, dimension - channel : dimension]
        if self.is_plain and self.scores is None and not weighs:
            level = self.distribution.icdf(parameters, channel, noise, previous)
        else:
            scores = self.level_logits(parameters, dimension)
            if weighs:
                self.given_log_prob[:, dimension] = scores.gather(1, self.levels[:, dimension, None])[:, 0]
            scores = self.processed(scores, dimension)
            if self.scores is not None:
                self.scores.append(scores)
            if self.is_plain:
                level = self.distribution.icdf(parameters, channel, noise, previous, scores)
            else:
                level = self.levels_of_scores(scores, noise)
        if self.given_mask is not None and self.any_given[dimension]:
            level = torch.where(self.given_mask[:, dimension], self.levels_of[dimension], level)
        return self.levels_of[dimension].copy_(level)

    def guess_row(self, row: int) -> torch.Tensor:
        """Levels `(batch, dims)` that a row may have: what is given, and else those of the row above."""
        dims, above = self.row_dimensions(row), self.row_dimensions(row - 1 if row else 0)
        if self.given_mask is None:
            return self.levels[:, above]
        return torch.where(self.given_mask[:, dims], self.levels[:, dims], self.levels[:, above])

    def decide_pixels(self, pixels: torch.Tensor, first: int) -> torch.Tensor:
        """
        Draw several pixels at once, the `first` and those after it in raster order, given their parameters `(batch,
        pixels, ...)`; returns levels `(batch, dims)`. Works where no user's processor asks for earlier levels.
        """
        dims = slice(first * self.channels, (first + pixels.shape[1]) * self.channels)
        levels = self.levels[:, dims].unflatten(1, (-1, self.channels)).clone()
        noise = self.noise[dims].T.view_as(levels)
        given_mask = None if self.given_mask is None else self.given_mask[:, dims].view_as(levels)
        for channel in range(self.channels):
            numbers, previous = noise[..., channel].contiguous(), levels[..., :channel]
            if self.is_plain and self.weighed is None:
                level = self.distribution.icdf(pixels, channel, numbers, previous)
            else:
                scores = self.distribution.level_logits(pixels, channel, previous)
                if self.weighed is not None:
                    given_log_prob = scores.gather(-1, levels[..., channel, None])[..., 0]
                    self.given_log_prob[:, dims].unflatten(1, (-1, self.channels))[..., channel] = given_log_prob
                if self.is_plain:
                    level = self.distribution.icdf(pixels, channel, numbers, previous, scores)
                else:
                    scores = scores.flatten(0, -2)
                    scores = scores if self.process is None else self.process(None, scores)
                    level = self.levels_of_scores(scores, numbers.flatten()).view_as(numbers)
            if given_mask is not None:
                level = torch.where(given_mask[..., channel], levels[..., channel], level)
            levels[..., channel] = level
        return levels.flatten(1)

    def log_weights(self) -> torch.Tensor | None:
        """log p of the given dimensions after free ones, of each image, given their past: `(batch,)`, float64."""
        if self.weighed is None:
            return None
        return torch.where(self.weighed, self.given_log_prob, 0).sum(1)


__all__ = ["Canvas", "DrawRequest", "Given", "SampledCanvas", "bytes_to_draw", "checked_processor", "draw_noise"]
