r"""
`generate`: what a user may ask for, checked and made a [`DrawRequest`], drawn in parts, and chosen from.
"""

import contextlib
import difflib
import inspect
import math
import os
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

import numpy as np
import torch
from huggingface_hub import is_offline_mode, try_to_load_from_cache
from PIL import Image
from tqdm.auto import tqdm
from transformers import GenerationConfig, LogitsProcessorList
from transformers.utils import GENERATION_CONFIG_NAME
from transformers.utils.generic import ModelOutput
from transformers.utils.hub import cached_file

from .canvas_causal_image import DrawRequest, Given, SampledCanvas, bytes_to_draw, checked_processor, draw_noise
from .checks_causal_image import (
    check_count,
    check_levels,
    check_memory,
    class_ids_for,
    class_ids_of,
    computable,
    mask_of,
    plain,
    warn_of_no_class,
)
from .configuration_causal_image import CausalImageModelingConfig, as_height_and_width, is_int
from .generation_config_causal_image import PixelCNNGenerationConfig
from .likelihood_causal_image import OutputDistribution, levels_from_noise
from .sampling_causal_image import SAMPLERS, sampling_state
from .weights_causal_image import device_of

MEANT = {  # what other libraries call it
    "seed": "generator=torch.Generator().manual_seed(seed)",
    "num_return_sequences": "num_images",
    "num_samples": "num_images",
    "batch_size": "num_images`, and to draw a few of them at a time `max_batch_size",
    "class_labels": "class_ids",
    "labels": "class_ids",
    "inputs": "pixel_values` and `known_mask",
    "mask": "known_mask",
    "cfg_scale": "guidance_scale",
}


def names_settings(generate: Callable) -> Callable:
    """Put every generation setting into the signature of a function, for completion and `help()`."""
    signature = inspect.signature(generate)
    *own, _ = signature.parameters.values()
    settings = [
        inspect.Parameter(name, inspect.Parameter.KEYWORD_ONLY, default=None, annotation=type(value) | None)
        for name, value in PixelCNNGenerationConfig._get_default_generation_params().items()
        if name not in signature.parameters
    ]
    generate.__signature__ = signature.replace(parameters=[*own, *settings])  # pyright: ignore
    return generate


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

    sequences: torch.Tensor | None = None
    scores: tuple[torch.Tensor, ...] | None = None
    num_iterations: int | None = None
    effective_sample_size: torch.Tensor | None = None


@dataclass
class Drawn:
    """What a [`DrawRequest`] led to: levels, scores and log-weights of all parts, in the order of the images."""

    levels: torch.Tensor
    scores: tuple[torch.Tensor, ...] | None
    num_iterations: int | None
    log_weights: torch.Tensor | None = None
    effective_sample_size: torch.Tensor | None = None


class CausalImageGenerationMixin(torch.nn.Module):
    r"""
    Adds `generate` to a model with `forward`, `output_distribution` and `sampling_cache_class`.

    Not transformers' `GenerationMixin`, whose unit is a growing sequence of tokens: an image has a fixed size, is drawn
    in place and may be given in part.
    """

    if TYPE_CHECKING:  # transformers takes a class's annotation of `config` for its `config_class`
        config: CausalImageModelingConfig
    output_distribution: OutputDistribution
    generation_config: GenerationConfig
    output_modalities = ("image",)

    @names_settings
    def generate(
        self,
        pixel_values: torch.Tensor | None = None,
        known_mask: torch.Tensor | np.ndarray | Image.Image | None = None,
        class_ids: torch.Tensor | list[int | str] | int | str | None = None,
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
    ) -> torch.Tensor | PixelCNNGenerateOutput:
        r"""
        Draw images, or complete given ones.

        The network runs in evaluation mode and is set back afterwards, by the last of several threads that draw from
        it. On a CPU the cached sampler draws small batches with one thread of torch ([`threads_that_pay`]), because
        more make it slower wherever other work runs, and sets the number back.

        Args:
            pixel_values (integer `torch.Tensor` of shape `(batch, channels, height, width)`, *optional*):
                Images given in part; needs `known_mask`. A batch of one expands to `num_images`.
            known_mask (bool tensor or array, broadcastable to `pixel_values`, or a picture, *optional*):
                True, or at least half white, where a level is given and kept (the other way round than `mask_image` of
                diffusers); values elsewhere are ignored. Exact conditioning when all given dimensions precede all free
                ones in raster order; otherwise a free dimension is drawn given its past alone, whatever is given after
                it; `num_resamples` then draws several completions and keeps a good one.
            class_ids (`torch.LongTensor` of shape `(batch,)`, a list, an `int` or a `str`, *optional*):
                Classes for a conditional model, by id or by name; -1 for none. One class expands to `num_images`.
            num_images (`int`, *optional*):
                Images to draw; by default as many as `class_ids`, `generator` or `pixel_values` say, else 1.
            image_size (`int` or `(height, width)`, *optional*):
                Defaults to the size of `pixel_values`, else to `config.image_size`.
            generation_config ([`PixelCNNGenerationConfig`], *optional*):
                Settings; defaults to the model's own. Keywords win over it.
            logits_processor (`LogitsProcessorList`, *optional*):
                Called before the settings' own processors with the earlier levels in raster order `(batch, n)` and the
                log-probabilities `(batch, num_levels)` of the next dimension.
            generator (`torch.Generator` or a list of them, one per image, *optional*):
                Source of the noise: one `torch.rand(height * width * channels, dtype=torch.float64)` per image, in
                raster order, given dimensions included (with `num_resamples`, see [`draw_noise`]). With one generator,
                `generate(num_images=4)` equals four calls with `num_images=1`; with a list, image i is what its own
                generator gives alone.
            sampler (`str`, defaults to `"cached"`):
                `"cached"` computes every activation once, the arithmetic of one forward pass per image; small batches
                it draws faster where it guesses several pixels right and confirms them at once. `"naive"`, the
                reference, runs a full forward for every dimension. `"fixed_point"` runs full forwards on the same
                noise until nothing changes (Song et al. 2021, https://huggingface.co/papers/2002.03629, Jacobi
                iteration). All draw the same images; in float32 and bfloat16 rounding may rarely move a level, in
                float64 only where levels are equal to the last digits, as top-k may find among guided scores.
                `"cached"` works on the layers' weights: it follows LoRA and parametrised weights, and refuses models
                with hooks or other layers put in from outside, which the other two call. A subclass that overrides
                `forward` or `backbone_features` it draws by forward passes, unless that names a
                `sampling_cache_class` itself.
            show_progress (`bool`, defaults to `False`):
                Show a progress bar over rows.
            return_dict_in_generate (`bool`, *optional*):
                Return a [`PixelCNNGenerateOutput`] instead of the levels alone.
            max_batch_size (`int`, *optional*):
                Draw at most so many images at a time (each of `num_resamples` completions is one). The noise of all is
                drawn first, so the images are the same.
            streamer (callable, *optional*):
                Called with `(images, row, levels)` as soon as a row is finished: which images (a `slice` of the
                request; each of `num_resamples` completions is one), the number of the row, and its levels,
                `torch.LongTensor` `(n, channels, width)`. What it raises ends the drawing.
            kwargs:
                Any field of [`PixelCNNGenerationConfig`], for this call: how levels are drawn.

        Returns:
            `torch.LongTensor` of shape `(batch, channels, height, width)`, or [`PixelCNNGenerateOutput`].

        Raises:
            ValueError, TypeError: If arguments contradict each other, the model or their documentation.
            torch.OutOfMemoryError: If there is not enough memory; where that can be told before anything is drawn, the
                message says how many bytes are needed.
        """
        num_images, image_size, max_batch_size = map(plain, (num_images, image_size, max_batch_size))
        kwargs = {name: plain(value) for name, value in kwargs.items()}
        settings = self._generation_settings(generation_config, return_dict_in_generate, kwargs)
        sampler = self._sampler(sampler, settings, logits_processor)
        if max_batch_size is not None:
            check_count("max_batch_size", max_batch_size)
        if not (streamer is None or callable(streamer)):
            raise TypeError(f"`streamer` must be callable, got {type(streamer).__name__}.")
        shape = self._request_shape(pixel_values, class_ids, num_images, image_size, generator)
        given = self._request_given(pixel_values, known_mask, shape)
        if settings.num_resamples > 1:
            self._check_resampling(settings.num_resamples, given)
        self._check_memory(shape, settings, sampler, max_batch_size)
        request = DrawRequest(
            shape,
            draw_noise(generator, shape[0], shape[1] * shape[2] * shape[3], device_of(self), settings.num_resamples),
            settings,
            LogitsProcessorList([*map(checked_processor, logits_processor or []), *settings.logits_processors()]),
            self._request_class_ids(class_ids, shape[0], settings.guidance_scale),
            given,
        )
        drawn = self._draw(self._completions(request), sampler, max_batch_size, show_progress, streamer)
        if drawn.log_weights is not None:
            drawn = self._choose(drawn, drawn.log_weights, request.noise[-1])
        if not settings.return_dict_in_generate:
            return drawn.levels
        return PixelCNNGenerateOutput(drawn.levels, drawn.scores, drawn.num_iterations, drawn.effective_sample_size)

    def _sampler(self, sampler: str, settings: PixelCNNGenerationConfig, logits_processor: list | None) -> str:
        """The sampler that is used, where the other arguments allow it."""
        if sampler not in SAMPLERS:
            raise ValueError(f"`sampler` must be one of {sorted(SAMPLERS)}, got {sampler!r}.")
        if logits_processor is not None and not isinstance(logits_processor, list | tuple):
            raise TypeError(f"`logits_processor` must be a list, got {type(logits_processor).__name__}.")
        if not all(map(callable, logits_processor or [])):
            raise TypeError(f"`logits_processor` must be a list of callables, got {logits_processor}.")
        if sampler == "fixed_point" and (logits_processor or settings.output_scores):
            raise ValueError(
                "`sampler='fixed_point'` draws all dimensions at once, so it takes no `logits_processor` and gives no "
                "scores; use 'cached'."
            )
        return "naive" if sampler == "cached" and not settings.use_cache else sampler

    def _check_memory(self, shape, settings: PixelCNNGenerationConfig, sampler: str, max_batch_size: int | None):
        """Raise before anything is drawn if a request takes more memory than is free."""
        size, images = bytes_to_draw(shape, settings.num_resamples), shape[0] * settings.num_resamples
        if settings.output_scores:
            size += math.prod(shape) * settings.num_resamples * self.config.num_levels * torch.float32.itemsize
        if sampler != "cached":  # forward passes, which compute the features of all pixels
            pixels = min(images, max_batch_size or images) * shape[2] * shape[3]
            size += pixels * self.config.hidden_size * self.dtype.itemsize
        _, channels, height, width = shape
        check_memory(f"Drawing {images} images of {channels}×{height}×{width}", size, device_of(self))

    @staticmethod
    def _check_resampling(num_resamples: int, given: Given | None):
        if given is None:
            raise ValueError(
                f"`num_resamples={num_resamples}` weighs completions by what is given: it needs `pixel_values` and "
                "`known_mask`."
            )

    @staticmethod
    def _completions(request: DrawRequest) -> DrawRequest:
        """With `num_resamples` above 1: every completion as an image of its own, without the numbers of the choice."""
        resamples = request.settings.num_resamples
        if resamples == 1:
            return request

        def each(values: torch.Tensor) -> torch.Tensor:
            return values.repeat_interleave(resamples, dim=0)

        noise = request.noise[:-1].unflatten(0, (resamples, -1))
        return replace(
            request,
            shape=(request.shape[0] * resamples, *request.shape[1:]),
            noise=noise.permute(1, 2, 0).flatten(1),
            class_ids=None if request.class_ids is None else each(request.class_ids),
            given=None if request.given is None else Given(*map(each, request.given)),
        )

    def _draw(
        self,
        request: DrawRequest,
        sampler: str,
        max_batch_size: int | None,
        show_progress: bool,
        streamer: Callable[[slice, int, torch.Tensor], None] | None,
    ) -> Drawn:
        """Draw all images of a request, `max_batch_size` at a time."""
        num_images, _, height, _ = request.shape
        step = max_batch_size or num_images
        levels, scores, log_weights, iterations = [], [], [], []
        with (
            tqdm(total=num_images * height, desc="Sampling", unit="row", disable=not show_progress) as progress,
            _memory_errors(f"drawing {step} images of {request.shape[1:]} at a time"),
        ):
            for start in range(0, num_images, step):
                images = slice(start, min(start + step, num_images))

                def on_row(row, row_levels, images=images):
                    progress.update(images.stop - images.start)
                    if streamer is not None:
                        with torch.inference_mode(False):  # the user gets a normal tensor
                            streamer(images, row, row_levels.clone())

                with sampling_state(self):
                    canvas = SampledCanvas(self.output_distribution, request.part(images), on_row)
                    iterations.append(SAMPLERS[sampler](self, canvas, canvas.class_ids) or 0)
                levels.append(canvas.images())
                scores.append(canvas.scores)
                if (weights := canvas.log_weights()) is not None:
                    log_weights.append(weights)
        return Drawn(
            torch.cat(levels),  # a normal tensor, outside inference mode: training may use it
            tuple(map(torch.cat, zip(*scores, strict=True))) if request.settings.output_scores else None,
            max(iterations) or None,
            torch.cat(log_weights) if log_weights else None,
        )

    @staticmethod
    def _choose(drawn: Drawn, log_weights: torch.Tensor, choice: torch.Tensor) -> Drawn:
        """Of each image the completion that a number `(images,)` stands for, among completions by their weight."""
        log_weights = log_weights.view(len(choice), -1)  # (images, completions)
        chosen = levels_from_noise(log_weights, choice)
        if chosen.min() < 0:
            raise ValueError(
                "All completions of an image have probability 0 given its known pixels; raise `num_resamples` or check "
                "the mask."
            )
        chosen += torch.arange(len(choice), device=chosen.device) * log_weights.shape[1]
        return Drawn(
            drawn.levels[chosen],
            None if drawn.scores is None else tuple(scores[chosen] for scores in drawn.scores),
            drawn.num_iterations,
            effective_sample_size=1 / log_weights.softmax(1).square().sum(1),
        )

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
            place = {"cache_dir": cache_dir, "revision": revision, "token": token, "subfolder": subfolder or ""}
            place |= {"force_download": force_download, "local_files_only": local_files_only}
            if _has_generation_config(pretrained_model_name_or_path, **place):
                place |= {"_from_auto": from_auto_class, "_from_pipeline": from_pipeline}
                try:
                    self.generation_config = PixelCNNGenerationConfig.from_pretrained(
                        pretrained_model_name_or_path, **place
                    )
                except (TypeError, ValueError) as error:
                    name = f"{GENERATION_CONFIG_NAME} of {str(pretrained_model_name_or_path)!r}"
                    raise OSError(f"The {name} cannot be used: {error}") from error

    def _generation_settings(self, generation_config, return_dict_in_generate, kwargs) -> PixelCNNGenerationConfig:
        """Call keywords over the given configuration over the model's own over the defaults."""
        names = PixelCNNGenerationConfig._get_default_generation_params()
        unknown = sorted(set(kwargs) - set(names))
        if unknown:
            known = inspect.signature(self.generate).parameters
            found = {name: MEANT.get(name) or difflib.get_close_matches(name, known, n=1) for name in unknown}
            meant = " ".join(f"For `{name}` pass `{''.join(found[name])}`." for name in unknown if found[name])
            raise ValueError(
                f"generate() got unknown arguments {unknown}. {meant or f'Settings are {sorted(names)}.'} "
                "See `help(model.generate)`."
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
        """`(batch, channels, height, width)` of a request."""
        if num_images is not None:
            check_count("num_images", num_images)
        if pixel_values is not None and not (isinstance(pixel_values, torch.Tensor) and pixel_values.ndim == 4):
            got = tuple(pixel_values.shape) if isinstance(pixel_values, torch.Tensor) else type(pixel_values).__name__
            hint = f" To draw {pixel_values} images pass `num_images={pixel_values}`." if is_int(pixel_values) else ""
            raise ValueError(
                f"`pixel_values` must be a tensor of shape (batch, {self.config.num_channels}, height, width), got "
                f"{got}.{hint}"
            )
        counts = {
            "num_images": num_images,
            "generator": _count_generators(generator),
            "class_ids": None if class_ids is None else len(class_ids_of(class_ids, self.config)),
            "pixel_values": None if pixel_values is None else len(pixel_values),
        }
        batch = _agreed_count({name: count for name, count in counts.items() if count is not None})
        height, width = as_height_and_width(self.config.image_size if image_size is None else image_size)
        if pixel_values is not None:
            size = tuple(pixel_values.shape[2:])
            if image_size is not None and (height, width) != size:
                raise ValueError(f"`image_size` {[height, width]} is not the size of `pixel_values`, {list(size)}.")
            height, width = size
        return batch, self.config.num_channels, height, width

    def _request_class_ids(self, class_ids, batch: int, guidance_scale: float) -> torch.Tensor | None:
        class_ids = class_ids_for(class_ids, batch, self.config, device_of(self))
        if guidance_scale != 1 and (class_ids is None or class_ids.min() < 0):
            what = "an unconditional model" if class_ids is None else "images of class -1, which means no class"
            raise ValueError(
                f"`guidance_scale={guidance_scale}` compares a class with no class, so it cannot go with {what}."
            )
        if self.config.class_dropout == 0 and guidance_scale != 1:
            warn_of_no_class()
        return class_ids

    def _request_given(self, pixel_values, known_mask, shape) -> Given | None:
        """The mask of given dimensions and their levels, both of the full shape."""
        if (pixel_values is None) != (known_mask is None):
            there, missing = ("known_mask", "pixel_values") if pixel_values is None else ("pixel_values", "known_mask")
            raise ValueError(f"`{there}` needs `{missing}`: the levels to keep, and a mask of where to keep them.")
        if known_mask is None:
            return None
        known_mask = mask_of(known_mask)
        try:
            given_mask = known_mask.expand(shape)
        except RuntimeError:
            raise ValueError(
                f"`known_mask` must be broadcastable to the images drawn, {shape}, got {tuple(known_mask.shape)}."
            ) from None
        if pixel_values.shape[1] != shape[1]:
            raise ValueError(f"`pixel_values` must have {shape[1]} channels, got {pixel_values.shape[1]}.")
        given = torch.where(given_mask.to(pixel_values.device), computable(pixel_values).expand(shape), 0)
        check_levels("pixel_values", given, self.config)
        return Given(given_mask, given.long())


def _agreed_count(counts: dict[str, int]) -> int:
    """The number of images, of everything that says one: all must agree, or be one class or image for all."""
    batch = max(counts.values(), default=1)
    for name, count in counts.items():
        if count != batch and not (count == 1 and name in ("class_ids", "pixel_values")):
            raise ValueError(
                f"Arguments disagree about the number of images: {counts}. Only a single one of `class_ids` or "
                "`pixel_values` stands for all."
            )
    if 0 in counts.values():
        raise ValueError(f"Nothing to draw: {counts}.")
    return batch


def _count_generators(generator) -> int | None:
    """How many images a list of generators stands for; one generator, or none, leaves that open."""
    generators = generator if isinstance(generator, list | tuple) else [generator]
    for g in generators:
        if not isinstance(g, torch.Generator | None):
            raise TypeError(f"`generator` must be a torch.Generator or a list of them, got {type(g).__name__}.")
    return len(generators) if generators is generator else None


def _has_generation_config(path_or_repo_id, *, subfolder: str, local_files_only: bool, **place) -> bool:
    """
    Whether a saved model has a `generation_config.json`: one without it keeps the defaults. That the Hub could not be
    asked is an error, because then images might be drawn by other settings than the model's own.
    """
    path_or_repo_id = str(path_or_repo_id)
    is_offline = local_files_only or is_offline_mode()
    found = cached_file(
        path_or_repo_id,
        GENERATION_CONFIG_NAME,
        subfolder=subfolder,
        local_files_only=is_offline,
        **place,
        _raise_exceptions_for_missing_entries=False,
    )
    if found is None and not is_offline and not os.path.isdir(path_or_repo_id):
        name = "/".join(filter(None, (subfolder, GENERATION_CONFIG_NAME)))
        known = {key: place[key] for key in ("cache_dir", "revision")}
        if try_to_load_from_cache(path_or_repo_id, name, **known) is None:  # the Hub has not said that there is none
            raise OSError(f"The Hub does not say whether {path_or_repo_id} has a {name}: try again.")
    return found is not None


@contextlib.contextmanager
def _memory_errors(what: str):
    """What a device without memory raises, with what would help."""
    try:
        yield
    except RuntimeError as error:
        if isinstance(error, torch.OutOfMemoryError) or "can't allocate memory" in str(error):
            raise torch.OutOfMemoryError(
                f"Out of memory while {what}; pass a smaller `max_batch_size` (the images stay the same). {error}"
            ) from error
        raise


__all__ = ["CausalImageGenerationMixin", "PixelCNNGenerateOutput"]
