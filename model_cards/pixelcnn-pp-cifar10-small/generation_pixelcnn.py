r"""
Sampling: `generate`, the noise rule, and the samplers that all follow it.

An image depends on its own random numbers, the weights and the condition, and on nothing else: every image has one
number in [0, 1) for each of its dimensions, in raster order, and a level is the first one whose cumulative probability
exceeds the number. So every sampler draws the same image, at any batch size.
"""

import contextlib
import math
from collections.abc import Callable
from dataclasses import dataclass
from numbers import Integral

import torch
from tqdm.auto import tqdm
from transformers import (
    GenerationConfig,
    LogitsProcessorList,
    MinPLogitsWarper,
    TemperatureLogitsWarper,
    TopKLogitsWarper,
    TopPLogitsWarper,
)
from transformers.utils import ModelOutput, logging

from .caching_causal_image import sampling_cache
from .checks_pixelcnn import check_class_ids, check_count, check_levels, computable
from .configuration_causal_image import as_height_and_width
from .likelihood_pixelcnn import OutputDistribution, choose_levels

logger = logging.get_logger(__name__)


@dataclass
class PixelCNNGenerateOutput(ModelOutput):
    r"""
    Args:
        sequences (`torch.LongTensor` of shape `(batch, channels, height, width)`):
            The drawn levels.
        scores (`tuple[torch.FloatTensor]`, *optional*, returned when `output_scores=True`):
            For each dimension in raster order the scores after all processors, `(batch, num_levels)`: normalised
            log-probabilities as long as no processor changes them.
        num_iterations (`int`, *optional*):
            Full forwards that an iterative sampler took.
        effective_sample_size (`torch.DoubleTensor` of shape `(batch,)`, *optional*, returned when `num_resamples` is
            above 1): How many equally good completions the weighted ones of an image are worth, (Σw)² / Σw²: from 1,
            where a single one explains what is given, to `num_resamples`.
    """

    sequences: torch.LongTensor | None = None
    scores: tuple[torch.FloatTensor, ...] | None = None
    num_iterations: int | None = None
    effective_sample_size: torch.DoubleTensor | None = None


class PixelCNNGenerationConfig(GenerationConfig):
    r"""
    How levels are drawn. The defaults are a true sample of the model.

    Args:
        do_sample (`bool`, defaults to `True`): Draw levels; `False` takes the most probable level of each dimension.
        temperature (`float`, defaults to 1.0): Divides the log-probabilities.
        top_k (`int`, defaults to 0): Keep only the `top_k` most probable levels; 0 keeps all.
        top_p (`float`, defaults to 1.0): Keep the smallest set of levels whose probability reaches `top_p`.
        min_p (`float`, defaults to 0.0): Keep levels with at least `min_p` times the probability of the most probable.
        guidance_scale (`float`, defaults to 1.0): How strongly images show their class: log-probabilities become
            those without a class plus `guidance_scale` times what the class adds to them, normalised again, before any
            other setting (Ho & Salimans 2021, https://huggingface.co/papers/2207.12598). 1 is the model itself; any
            other value needs a class-conditional model trained with class dropout, and doubles the work.
        num_resamples (`int`, defaults to 1): Completions that are drawn of each image, of which one is kept, with a
            probability in proportion to its weight: the product of the conditional probabilities, in the model (or the
            guided model) before other settings, of the given dimensions that come after a free one. So free dimensions
            heed what is given after them: approximately, and exactly in the limit of many completions
            (sampling-importance-resampling; Smith & Gelfand 1992, Bayesian Statistics without Tears).
        use_cache (`bool`, defaults to `True`): `False` turns `sampler="cached"` into `"naive"`.
        return_dict_in_generate (`bool`, defaults to `False`): Return a [`PixelCNNGenerateOutput`].
        output_scores (`bool`, defaults to `False`): Keep the scores of every dimension in that output.
    """

    def __init__(self, **kwargs):
        # The parent's fields are about text, so its `__init__` is not called: a name not listed here is a mistake.
        for name, default in self._get_default_generation_params().items():
            value = kwargs.pop(name, None)
            setattr(self, name, default if value is None else value)
        self.transformers_version = kwargs.pop("transformers_version", None)
        unknown = [name for name in kwargs if not name.startswith("_")]
        if unknown:
            raise ValueError(
                f"Unknown generation parameters {sorted(unknown)}; known are "
                f"{sorted(self._get_default_generation_params())}."
            )
        self.validate()

    @staticmethod
    def _get_default_generation_params():
        return {
            "do_sample": True,
            "temperature": 1.0,
            "top_k": 0,
            "top_p": 1.0,
            "min_p": 0.0,
            "guidance_scale": 1.0,
            "num_resamples": 1,
            "use_cache": True,
            "return_dict_in_generate": False,
            "output_scores": False,
        }

    def validate(self, strict=False, user_set_attributes=None):
        for name in ("do_sample", "use_cache", "return_dict_in_generate", "output_scores"):
            if not isinstance(getattr(self, name), bool):
                raise TypeError(f"`{name}` must be True or False, got {getattr(self, name)!r}.")
        check_count("num_resamples", self.num_resamples)
        for name in ("temperature", "top_k", "top_p", "min_p", "guidance_scale"):
            value = getattr(self, name)
            if isinstance(value, bool) or not isinstance(value, int if name == "top_k" else int | float):
                raise TypeError(f"`{name}` must be {'an int' if name == 'top_k' else 'a number'}, got {value!r}.")
        if not self.temperature > 0:
            raise ValueError(f"`temperature` must be above 0, got {self.temperature}; use `do_sample=False` for modes.")
        if self.top_k < 0:
            raise ValueError(f"`top_k` must be at least 0 (0 keeps all levels), got {self.top_k}.")
        if not 0 < self.top_p <= 1:
            raise ValueError(f"`top_p` must be in (0, 1], got {self.top_p}.")
        if not 0 <= self.min_p <= 1:
            raise ValueError(f"`min_p` must be in [0, 1], got {self.min_p}.")
        if not 0 <= self.guidance_scale < math.inf:
            raise ValueError(f"`guidance_scale` must be a finite number of at least 0, got {self.guidance_scale}.")
        if self.num_resamples > 1 and not self.do_sample:
            raise ValueError(
                f"`num_resamples={self.num_resamples}` needs `do_sample=True`: all completions would be the same."
            )

    @classmethod
    def from_dict(cls, config_dict, **kwargs):
        """Settings of a file; those that only a later version knows are left out with a warning."""
        known = [*cls._get_default_generation_params(), "transformers_version"]
        unknown = sorted(name for name in config_dict if name not in known and not name.startswith("_"))
        if unknown:
            logger.warning(f"Generation settings that this version does not know are ignored: {unknown}.")
        return super().from_dict({k: v for k, v in config_dict.items() if k not in unknown}, **kwargs)

    @classmethod
    def from_model_config(cls, model_config):
        return cls()  # a model's configuration says nothing about sampling

    def logits_processors(self) -> LogitsProcessorList:
        """The processors that these settings ask for, in the order transformers applies them."""
        processors = LogitsProcessorList()
        if self.do_sample:
            if self.temperature != 1.0:
                processors.append(TemperatureLogitsWarper(float(self.temperature)))
            if self.top_k:
                processors.append(TopKLogitsWarper(self.top_k))
            if self.top_p < 1.0:
                processors.append(TopPLogitsWarper(float(self.top_p)))
            if self.min_p:
                processors.append(MinPLogitsWarper(float(self.min_p)))
        return processors


def draw_noise(
    generator: torch.Generator | list[torch.Generator] | None,
    num_images: int,
    num_dims: int,
    device: torch.device,
    num_resamples: int = 1,
) -> torch.Tensor:
    r"""
    The random numbers of a request: for each image one call `torch.rand(num_dims, dtype=torch.float64)`; with
    `num_resamples` above 1 as many calls as that, one a completion, and then `torch.rand(1, dtype=torch.float64)` for
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


def device_of(model) -> torch.device:
    """Where the weights of a model lie; of one that is offloaded in part, those that are in memory."""
    device = next((parameter.device for parameter in model.parameters() if not parameter.is_meta), None)
    if device is None:  # where accelerate computes if all are offloaded
        device = getattr(getattr(model, "_hf_hook", None), "execution_device", None)
    if device is None:
        raise ValueError("The model is on the meta device: it has no weights to draw with.")
    return torch.device(device)


@contextlib.contextmanager
def sampling_state(model):
    """Evaluation mode, set back afterwards; no gradients; no autocast, as products write in place in the own dtype."""
    training_modules = [module for module in model.modules() if module.training]
    model.eval()
    try:
        with torch.inference_mode(), torch.autocast(device_of(model).type, enabled=False):
            yield
    finally:
        for module in training_modules:
            module.training = True


class Canvas:
    r"""
    The images of one pass over all dimensions, and the order of the pass.

    How a level is decided is left to a subclass: the samplers draw it, the codec takes it from an image or a stream.
    Dimensions are numbered in raster order; `levels` is `(batch, height * width * channels)`.

    Args:
        distribution ([`OutputDistribution`]): What parameters mean.
        shape (`(batch, channels, height, width)`): Of the images.
        device (`torch.device`): Of the levels.
        on_row (callable): Called with `(row, levels)`, `(batch, channels, width)`, when a row is finished.
    """

    copies = 1  # of every image in the batch of the network

    def __init__(self, distribution, shape, device, on_row):
        batch, self.channels, self.height, self.width = shape
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
                "There is a dimension none of whose levels has a probability: the model's weights are not finite, or a "
                "logits processor forbids all levels, or the temperature is too close to 0."
            )
        return self.levels.view(-1, self.height, self.width, self.channels).permute(0, 3, 1, 2).contiguous()

    def row_dimensions(self, row: int) -> slice:
        """The dimensions of a row."""
        size = self.width * self.channels
        return slice(row * size, (row + 1) * size)

    def raster(self, row: int):
        """`(column, channel, dimension)` of a row in raster order."""
        start = self.row_dimensions(row).start
        for n in range(self.width * self.channels):
            yield *divmod(n, self.channels), start + n

    def free_noise(self, row: int) -> torch.Tensor | None:
        """The numbers `(width * channels, batch)` of a row whose levels follow from them alone; `None` of another."""
        return None

    def finish_rows(self, start: int, end: int):
        """Report rows that will not change any more."""
        for row in range(start, end):
            levels = self.levels[:, self.row_dimensions(row)].unflatten(1, (self.width, self.channels))
            self.on_row(row, levels.transpose(1, 2))


class GuidedDistribution(OutputDistribution):
    r"""
    What guidance makes of an output distribution: log-probabilities without a class plus `scale` times what the class
    adds to them, normalised. The parameters of a batch are those with classes, then those without.
    """

    def __init__(self, distribution: OutputDistribution, scale: float):
        super().__init__(distribution.num_channels, distribution.num_levels)
        self.distribution, self.scale = distribution, scale

    def level_logits(self, parameters, channel, previous_channels=None):
        both = None if previous_channels is None else torch.cat((previous_channels, previous_channels))
        logits = self.distribution.level_logits(parameters, channel, both)
        with_class, without = logits.chunk(2)
        return (without + self.scale * (with_class - without)).log_softmax(-1)


class SampledCanvas(Canvas):
    r"""
    Images being drawn, by the noise rule.

    Args:
        distribution, shape, on_row: See [`Canvas`].
        noise (`torch.DoubleTensor` of shape `(dims, batch)`): See [`draw_noise`].
        known (`torch.BoolTensor` of the shape of the images, *optional*), given (`torch.LongTensor`, likewise):
            Where levels are given, and which.
        processors (`LogitsProcessorList`): Applied to the log-probabilities.
        guidance_scale (`float`): With a value other than 1 the network sees every image twice, first all with their
            classes, then all without; see [`PixelCNNGenerationConfig`].
        do_sample (`bool`): Draw levels by the noise rule, or take the most probable ones.
        keep_scores (`bool`): Whether to keep the processed log-probabilities of every dimension.
        keep_weights (`bool`): Whether to keep the log-probabilities of given dimensions that come after free ones.
    """

    def __init__(
        self,
        distribution,
        shape,
        noise,
        known,
        given,
        processors,
        guidance_scale,
        do_sample,
        keep_scores,
        keep_weights,
        on_row,
    ):
        if guidance_scale != 1:
            distribution, self.copies = GuidedDistribution(distribution, guidance_scale), 2
        super().__init__(distribution, shape, noise.device, on_row)
        self.noise, self.processors, self.do_sample = noise.contiguous(), processors, do_sample
        self.is_plain = do_sample and not processors  # the distribution itself says what a number stands for
        self.scores = [] if keep_scores else None
        self.known = None
        self.noise_of = self.noise.unbind(0)
        if known is not None:
            self.known, given = (x.permute(0, 2, 3, 1).flatten(1).to(noise.device) for x in (known, given))
            self.levels.copy_(given)  # 0 where free
            self.any_known = self.known.any(0).tolist()
        self.weighed = None
        if keep_weights:
            self.weighed = self.known & ((~self.known).cumsum(1) > 0)  # given, after the first free one
            self.any_weighed = self.weighed.any(0).tolist()
            self.given_log_prob = torch.zeros_like(self.levels, dtype=torch.float64)
        self.levels_of = self.levels.unbind(1)

    def free_noise(self, row):
        dimensions = self.row_dimensions(row)
        is_given = self.known is not None and any(self.any_known[dimensions])
        if is_given or not self.is_plain or self.scores is not None or self.copies > 1:
            return None
        return self.noise[dimensions]

    def choose(self, scores: torch.Tensor, noise: torch.Tensor) -> torch.Tensor:
        """Levels `(...)` of processed scores `(..., num_levels)` and numbers `(...)`."""
        if self.do_sample:
            return choose_levels(scores, noise)
        highest, level = scores.max(-1)
        return torch.where(highest.isfinite(), level, -1)

    def decide(self, parameters: torch.Tensor, dimension: int) -> torch.Tensor:
        """Draw one dimension of all images."""
        channel, noise = dimension % self.channels, self.noise_of[dimension]
        weighs = self.weighed is not None and self.any_weighed[dimension]
        scores = None
        if weighs or self.scores is not None or not self.is_plain:
            scores = self.level_logits(parameters, dimension)
            if weighs:
                self.given_log_prob[:, dimension] = scores.gather(1, self.levels[:, dimension, None])[:, 0]
            if self.processors:
                shape = scores.shape
                scores = self.processors(self.levels[:, :dimension].clone(), scores)
                if scores.shape != shape:
                    raise ValueError(
                        "A logits processor must keep the shape of the scores, "
                        f"{tuple(shape)}, got {tuple(scores.shape)}."
                    )
            if self.scores is not None:
                self.scores.append(scores)
        if self.is_plain:
            previous = self.levels[:, dimension - channel : dimension]
            level = self.distribution.icdf(parameters, channel, noise, previous, scores)
        else:
            level = self.choose(scores, noise)
        if self.known is not None and self.any_known[dimension]:
            level = torch.where(self.known[:, dimension], self.levels_of[dimension], level)
        return self.levels_of[dimension].copy_(level)

    def decide_rows(self, pixels: torch.Tensor, first_row: int) -> torch.Tensor:
        """Draw all rows from `first_row` on at once, given their pixels' parameters; returns levels `(batch, n)`."""
        start = first_row * self.width * self.channels
        levels = self.levels[:, start:].unflatten(1, (*pixels.shape[1:3], self.channels)).clone()
        noise = self.noise[start:].T.view_as(levels)
        known = None if self.known is None else self.known[:, start:].view_as(levels)
        for channel in range(self.channels):
            numbers, previous, scores = noise[..., channel].contiguous(), levels[..., :channel], None
            if self.weighed is not None or not self.is_plain:
                scores = self.distribution.level_logits(pixels, channel, previous)
            if self.weighed is not None:
                given_log_prob = scores.gather(-1, levels[..., channel, None])[..., 0]
                self.given_log_prob[:, start + channel :: self.channels] = given_log_prob.flatten(1)
            if self.is_plain:
                level = self.distribution.icdf(pixels, channel, numbers, previous, scores)
            else:
                scores = self.processors(None, scores.flatten(0, -2))
                level = self.choose(scores, numbers.flatten()).view_as(numbers)
            if known is not None:
                level = torch.where(known[..., channel], levels[..., channel], level)
            levels[..., channel] = level
        return levels.flatten(1)

    def log_weights(self) -> torch.Tensor:
        """log p of the given dimensions after free ones, of each image, given their past: `(batch,)`, float64."""
        return torch.where(self.weighed, self.given_log_prob, 0).sum(1)


class PixelCNNGenerationMixin:
    r"""
    Adds `generate` to a model with `forward`, `output_distribution` and `sampling_cache_class`.

    Not transformers' `GenerationMixin`, whose unit is a growing sequence of tokens: an image has a fixed size, is drawn
    in place and may be given in part.
    """

    output_modalities = ("image",)

    def generate(
        self,
        pixel_values: torch.LongTensor | None = None,
        known_mask: torch.BoolTensor | None = None,
        class_ids: torch.LongTensor | list[int] | int | None = None,
        num_images: int | None = None,
        image_size: int | tuple[int, int] | None = None,
        generation_config: GenerationConfig | None = None,
        logits_processor: LogitsProcessorList | list | None = None,
        generator: torch.Generator | list[torch.Generator] | None = None,
        sampler: str = "cached",
        show_progress: bool = False,
        return_dict_in_generate: bool | None = None,
        max_batch_size: int | None = None,
        streamer: Callable[[slice, int, torch.Tensor], None] | None = None,
        **kwargs,
    ) -> torch.LongTensor | PixelCNNGenerateOutput:
        r"""
        Draw images, or complete given ones.

        The network runs in evaluation mode and is set back afterwards; so several threads may draw from one model only
        if it is in evaluation mode already.

        Args:
            pixel_values (`torch.LongTensor` of shape `(batch, channels, height, width)`, *optional*):
                Images given in part; needs `known_mask`. A batch of one expands to `num_images`.
            known_mask (`torch.BoolTensor`, broadcastable to `pixel_values`):
                True where a level is given and kept; values elsewhere are ignored. Exact conditioning when all given
                dimensions precede all free ones in raster order; otherwise a free dimension is drawn given its past
                alone, whatever is given after it; `num_resamples` then draws several completions and keeps a good one.
            class_ids (`torch.LongTensor` of shape `(batch,)`, a list or an `int`, *optional*):
                Classes for a conditional model, -1 for none. One class expands to `num_images`.
            num_images (`int`, *optional*):
                Images to draw; by default as many as `class_ids`, `generator` or `pixel_values` say, else 1.
            image_size (`int` or `(height, width)`, *optional*):
                Defaults to the size of `pixel_values`, else to `config.image_size`.
            generation_config ([`PixelCNNGenerationConfig`], *optional*):
                Settings; defaults to the model's own. Keywords win over it.
            logits_processor (`LogitsProcessorList`, *optional*):
                Called before the settings' own processors with the earlier levels in raster order `(batch, n)` and the
                log-probabilities `(batch, num_levels)` of the next dimension.
            generator (`torch.Generator` or a list of them, one an image, *optional*):
                Source of the noise: one `torch.rand(height * width * channels, dtype=torch.float64)` an image, in
                raster order, given dimensions included (with `num_resamples`, see [`draw_noise`]). With one generator,
                `generate(num_images=4)` equals four calls with `num_images=1`; with a list, image i is what its own
                generator gives alone.
            sampler (`str`, defaults to `"cached"`):
                `"cached"` computes every activation once, at the cost of about one forward pass an image. `"naive"`,
                the reference, runs a full forward for every dimension. `"fixed_point"` runs full forwards on the same
                noise until nothing changes (Song et al. 2021, https://huggingface.co/papers/2002.03629, Jacobi
                iteration). All draw the same images; in float32 and bfloat16 rounding may rarely move a level.
                `"cached"` works on the layers' weights, so hooks and parametrisations put on layers from outside act in
                the other two only.
            show_progress (`bool`, defaults to `False`):
                Show a progress bar over rows.
            return_dict_in_generate (`bool`, *optional*):
                Return a [`PixelCNNGenerateOutput`] instead of the levels alone.
            max_batch_size (`int`, *optional*):
                Draw at most so many images at a time (each of `num_resamples` completions is one). The noise of all is
                drawn first, so the images are the same.
            streamer (callable, *optional*):
                Called with `(images, row, levels)` as soon as a row is finished: which images (a `slice` of the
                request), the number of the row, and its levels, `torch.LongTensor` `(n, channels, width)`.
            kwargs:
                Any field of [`PixelCNNGenerationConfig`], for this call.

        Returns:
            `torch.LongTensor` of shape `(batch, channels, height, width)`, or [`PixelCNNGenerateOutput`].

        Raises:
            ValueError, TypeError: If arguments contradict each other, the model or their documentation.
        """
        config = self._generation_settings(generation_config, return_dict_in_generate, kwargs)
        samplers = {"cached": self._sample_cached, "naive": self._sample_naive, "fixed_point": self._sample_fixed_point}
        if sampler not in samplers:
            raise ValueError(f"`sampler` must be one of {sorted(samplers)}, got {sampler!r}.")
        if sampler == "fixed_point" and (logits_processor or config.output_scores):
            raise ValueError(
                "`sampler='fixed_point'` draws all dimensions at once, so it takes no `logits_processor` and gives no "
                "scores; use 'cached'."
            )
        if sampler == "cached" and not config.use_cache:
            sampler = "naive"
        if max_batch_size is not None:
            check_count("max_batch_size", max_batch_size)
        if logits_processor is not None and not isinstance(logits_processor, list | tuple):
            raise TypeError(f"`logits_processor` must be a list, got {type(logits_processor).__name__}.")
        processors = LogitsProcessorList([*(logits_processor or []), *config.logits_processors()])
        device = device_of(self)
        shape = self._request_shape(pixel_values, class_ids, num_images, image_size, generator)
        class_ids = self._request_class_ids(class_ids, shape[0])
        if config.guidance_scale != 1 and (class_ids is None or class_ids.min() < 0):
            what = "an unconditional model" if class_ids is None else "images of class -1, which means no class"
            raise ValueError(
                f"`guidance_scale={config.guidance_scale}` compares a class with no class, so it cannot go with {what}."
            )
        known, given = self._request_known(pixel_values, known_mask, shape)
        num_dims, resamples = shape[1] * shape[2] * shape[3], config.num_resamples
        if resamples > 1 and (known is None or streamer is not None):
            what = "`pixel_values` and `known_mask`: it weighs" if known is None else "no `streamer`: it chooses from"
            raise ValueError(f"`num_resamples={resamples}` needs {what} finished completions of given images.")
        noise = draw_noise(generator, shape[0], num_dims, device, resamples)
        if resamples > 1:  # from here on every completion is an image
            shape = (shape[0] * resamples, *shape[1:])
            known, given, class_ids = (
                None if x is None else x.repeat_interleave(resamples, dim=0) for x in (known, given, class_ids)
            )
            choice = noise[-1]
            noise = noise[:-1].unflatten(0, (resamples, num_dims)).permute(1, 2, 0).flatten(1)

        sequences, scores, log_weights, num_iterations = [], [], [], None
        progress = tqdm(total=shape[0] * shape[2], desc="Sampling", unit="row", disable=not show_progress)
        try:
            step = max_batch_size or shape[0]
            for images in (slice(i, min(i + step, shape[0])) for i in range(0, shape[0], step)):
                count = images.stop - images.start

                def on_row(row, levels, images=images, count=count):
                    progress.update(count)
                    if streamer is not None:
                        with torch.inference_mode(False):  # the user gets a normal tensor
                            streamer(images, row, levels.clone())

                part = [None if x is None else x[images] for x in (known, given, class_ids)]
                with sampling_state(self):
                    canvas = SampledCanvas(
                        self.output_distribution,
                        (count, *shape[1:]),
                        noise[:, images],
                        *part[:2],
                        processors,
                        config.guidance_scale,
                        config.do_sample,
                        config.output_scores,
                        resamples > 1,
                        on_row,
                    )
                    if canvas.copies > 1:
                        part[2] = torch.cat((part[2], torch.full_like(part[2], -1)))
                    iterations = samplers[sampler](canvas, part[2])
                if iterations is not None:
                    num_iterations = max(iterations, num_iterations or 0)
                sequences.append(canvas.images())
                scores.append(canvas.scores)
                if resamples > 1:
                    log_weights.append(canvas.log_weights())
        except RuntimeError as error:
            if isinstance(error, torch.OutOfMemoryError) or "can't allocate memory" in str(error):
                raise torch.OutOfMemoryError(
                    f"Out of memory while drawing {step} images of {shape[1:]} at a time; pass a smaller "
                    f"`max_batch_size` (the images stay the same). {error}"
                ) from error
            raise
        finally:
            progress.close()
        levels = torch.cat(sequences)  # a normal tensor, outside inference mode: training may use it
        scores = tuple(map(torch.cat, zip(*scores, strict=True))) if config.output_scores else None
        sample_size = None
        if resamples > 1:
            log_weights = torch.cat(log_weights).view(-1, resamples)  # (images, completions)
            chosen = choose_levels(log_weights, choice)
            if chosen.min() < 0:
                raise ValueError(
                    "There is an image none of whose completions has a probability above 0 together with what is given."
                )
            chosen += torch.arange(0, len(levels), resamples, device=chosen.device)
            levels = levels[chosen]
            scores = None if scores is None else tuple(x[chosen] for x in scores)
            sample_size = 1 / log_weights.softmax(1).square().sum(1)
        if not config.return_dict_in_generate:
            return levels
        return PixelCNNGenerateOutput(
            sequences=levels, scores=scores, num_iterations=num_iterations, effective_sample_size=sample_size
        )

    def _sample_naive(self, canvas: Canvas, class_ids: torch.Tensor | None):
        """The reference: one full forward for every dimension."""
        for row in range(canvas.height):
            for column, _, dimension in canvas.raster(row):
                parameters = self(canvas.for_network(canvas.images()), class_ids=class_ids, return_dict=True).logits
                canvas.decide(self.output_distribution.pixels(parameters)[:, row, column], dimension)
            canvas.finish_rows(row, row + 1)

    def _sample_cached(self, canvas: Canvas, class_ids: torch.Tensor | None, keep_cache: bool = True):
        """Every activation once; see [`SamplingCache`]. A cache of its own runs the same kernels in every call."""
        if any(parameter.is_meta for parameter in self.parameters()):
            raise ValueError("`sampler='cached'` needs all weights in memory, some are offloaded; use 'fixed_point'.")
        batch = canvas.copies * len(canvas.levels)
        with sampling_cache(self, batch, canvas.width, class_ids, keep_cache) as cache:
            for row in range(canvas.height):
                noise = canvas.free_noise(row)
                if noise is not None:
                    canvas.levels[:, canvas.row_dimensions(row)] = cache.draw_row(row, noise)
                else:
                    cache.start_row(row)
                    for column, channel, dimension in canvas.raster(row):
                        level = canvas.decide(cache.parameters(column, channel), dimension)
                        cache.observe(column, channel, canvas.for_network(level))
                canvas.finish_rows(row, row + 1)

    def _sample_fixed_point(self, canvas: Canvas, class_ids: torch.Tensor | None) -> int:
        """
        Decide all dimensions from a full forward on the last images, until they stay as they are.

        A row before which nothing has changed is final, so only rows from the first change on are computed again, with
        as many rows above as they can see.
        """
        final_rows = iterations = 0
        row_size = canvas.width * canvas.channels
        while final_rows < canvas.height:
            top = self.config.first_row_seen(final_rows)
            parameters = self(
                canvas.for_network(canvas.images())[:, :, top:], class_ids=class_ids, return_dict=True
            ).logits
            pixels = self.output_distribution.pixels(parameters)[:, final_rows - top :]
            levels = canvas.decide_rows(pixels, final_rows)
            changed = (levels != canvas.levels[:, final_rows * row_size :]).any(0)
            canvas.levels[:, final_rows * row_size :] = levels
            still = int(changed.int().argmax()) if changed.any() else len(changed)
            canvas.finish_rows(final_rows, final_rows + still // row_size)
            final_rows += still // row_size
            iterations += 1
        return iterations

    def adjust_generation_fn(
        self,
        generation_config,
        from_auto_class,
        from_pipeline,
        pretrained_model_name_or_path,
        cache_dir,
        force_download,
        proxies,
        local_files_only,
        token,
        revision,
        subfolder,
        trust_remote_code,
        **kwargs,
    ):
        """Called by `from_pretrained`: read `generation_config.json`, if there is one, as our own type."""
        if generation_config is not None:
            names = PixelCNNGenerationConfig._get_default_generation_params()
            self.generation_config = PixelCNNGenerationConfig(
                **{name: getattr(generation_config, name, None) for name in names}
            )
        elif pretrained_model_name_or_path is not None:
            # A checkpoint without the file keeps the defaults.
            with contextlib.suppress(OSError):
                self.generation_config = PixelCNNGenerationConfig.from_pretrained(
                    pretrained_model_name_or_path,
                    cache_dir=cache_dir,
                    force_download=force_download,
                    proxies=proxies,
                    local_files_only=local_files_only,
                    token=token,
                    revision=revision,
                    subfolder=subfolder,
                    _from_auto=from_auto_class,
                    _from_pipeline=from_pipeline,
                )

    def _generation_settings(self, generation_config, return_dict_in_generate, kwargs) -> PixelCNNGenerationConfig:
        """Call keywords over the given configuration over the model's own over the defaults."""
        names = PixelCNNGenerationConfig._get_default_generation_params()
        unknown = sorted(set(kwargs) - set(names))
        if unknown:
            raise ValueError(
                f"generate() got unknown arguments {unknown}; besides its own it takes the generation settings "
                f"{sorted(names)}."
            )
        if not isinstance(generation_config, GenerationConfig | None):
            raise TypeError(f"`generation_config` must be a GenerationConfig, got {type(generation_config).__name__}.")
        sources = [self.generation_config] if generation_config is None else [generation_config, self.generation_config]
        settings = {}
        for name in names:
            values = [kwargs.get(name), *(getattr(source, name, None) for source in sources)]
            settings[name] = next((value for value in values if value is not None), None)
        if return_dict_in_generate is not None:
            settings["return_dict_in_generate"] = return_dict_in_generate
        return PixelCNNGenerationConfig(**settings)

    def _request_shape(self, pixel_values, class_ids, num_images, image_size, generator) -> tuple[int, int, int, int]:
        """`(batch, channels, height, width)` of a request; everything that says a number of images must agree."""
        generators = generator if isinstance(generator, (list, tuple)) else [generator]
        for g in generators:
            if not isinstance(g, torch.Generator | None):
                raise TypeError(f"`generator` must be a torch.Generator or a list of them, got {type(g).__name__}.")
        if num_images is not None:
            check_count("num_images", num_images)
        if class_ids is not None and not isinstance(class_ids, int | list | tuple | torch.Tensor):
            raise TypeError(f"`class_ids` must be a LongTensor, a list or an int, got {type(class_ids).__name__}.")
        if isinstance(class_ids, list | tuple):
            for class_id in class_ids:
                if not isinstance(class_id, Integral):
                    raise TypeError(f"`class_ids` must be numbers of classes, got {class_id!r}.")
        if class_ids is not None and torch.as_tensor(class_ids).ndim > 1:
            shape = tuple(torch.as_tensor(class_ids).shape)
            raise ValueError(f"`class_ids` must be one number or a list of them, got shape {shape}.")
        if pixel_values is not None and not (isinstance(pixel_values, torch.Tensor) and pixel_values.ndim == 4):
            got = tuple(pixel_values.shape) if isinstance(pixel_values, torch.Tensor) else type(pixel_values).__name__
            raise ValueError(
                f"`pixel_values` must be a tensor of shape (batch, {self.config.num_channels}, height, width), got "
                f"{got}."
            )
        counts = {
            "num_images": num_images,
            "generator": len(generators) if generators is generator else None,
            "class_ids": None if class_ids is None else torch.as_tensor(class_ids).numel(),
            "pixel_values": None if pixel_values is None else len(pixel_values),
        }
        counts = {name: count for name, count in counts.items() if count is not None}
        batch = max(counts.values(), default=1)
        for name, count in counts.items():
            if count != batch and not (count == 1 and name in ("class_ids", "pixel_values")):
                raise ValueError(
                    f"Arguments disagree about the number of images: {counts}. Only a single one of `class_ids` or "
                    "`pixel_values` stands for all."
                )
        if 0 in counts.values():
            raise ValueError(f"Nothing to draw: {counts}.")

        size = as_height_and_width(self.config.image_size) if pixel_values is None else list(pixel_values.shape[2:])
        if image_size is not None:
            asked = as_height_and_width(image_size) if isinstance(image_size, int | list | tuple) else []
            if len(asked) != 2 or not all(type(length) is int and length > 0 for length in asked):
                raise ValueError(f"`image_size` must be a positive int or (height, width), got {image_size!r}.")
            if pixel_values is not None and asked != size:
                raise ValueError(f"`image_size` {asked} is not the size of `pixel_values`, {size}.")
            size = asked
        return batch, self.config.num_channels, *size

    def _request_class_ids(self, class_ids, batch: int) -> torch.Tensor | None:
        if class_ids is not None:
            class_ids = torch.as_tensor(class_ids, device=device_of(self)).reshape(-1)
            class_ids = class_ids.expand(batch) if len(class_ids) == 1 else class_ids
        check_class_ids(class_ids, batch, self.config)
        return class_ids

    def _request_known(self, pixel_values, known_mask, shape) -> tuple[torch.Tensor | None, torch.Tensor | None]:
        """The mask of given dimensions and their levels, both of the full shape."""
        if (pixel_values is None) != (known_mask is None):
            given, missing = ("known_mask", "pixel_values") if pixel_values is None else ("pixel_values", "known_mask")
            raise ValueError(f"`{given}` needs `{missing}`: the levels to keep, and a mask of where to keep them.")
        if known_mask is None:
            return None, None
        if not isinstance(known_mask, torch.Tensor) or known_mask.dtype != torch.bool:
            kind = known_mask.dtype if isinstance(known_mask, torch.Tensor) else type(known_mask).__name__
            raise ValueError(f"`known_mask` must be a torch.BoolTensor, got {kind}.")
        try:
            known = known_mask.expand(shape)
        except RuntimeError:
            raise ValueError(
                f"`known_mask` must be broadcastable to the images drawn, {shape}, got {tuple(known_mask.shape)}."
            ) from None
        if pixel_values.shape[1] != shape[1]:
            raise ValueError(f"`pixel_values` must have {shape[1]} channels, got {pixel_values.shape[1]}.")
        given = torch.where(known.to(pixel_values.device), computable(pixel_values).expand(shape), 0)
        check_levels("pixel_values", given, self.config)
        return known, given.long()


__all__ = ["PixelCNNGenerateOutput", "PixelCNNGenerationConfig", "PixelCNNGenerationMixin"]
