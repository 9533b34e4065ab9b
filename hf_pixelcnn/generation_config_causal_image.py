"""How levels are drawn: the settings of `generate`, as `generation_config.json` holds them."""

import math
import sys
from collections.abc import Callable
from typing import Any, NamedTuple

from transformers import (
    GenerationConfig,
    LogitsProcessorList,
    MinPLogitsWarper,
    TemperatureLogitsWarper,
    TopKLogitsWarper,
    TopPLogitsWarper,
)
from transformers.utils import logging

from .checks_causal_image import check_count
from .configuration_causal_image import is_int

logger = logging.get_logger(f"transformers.{__name__}")  # where `transformers.logging.set_verbosity` reaches


class NumberRange(NamedTuple):
    """What a number may be, and how to say so."""

    described: str
    holds: Callable[[float], bool]
    is_whole: bool = False
    hint: str = ""


RANGES = {
    "temperature": NumberRange("above 0", lambda value: value > 0, hint="; use `do_sample=False` for modes"),
    "top_k": NumberRange("at least 0 (0 keeps all levels)", lambda value: value >= 0, is_whole=True),
    "top_p": NumberRange("in (0, 1]", lambda value: 0 < value <= 1),
    "min_p": NumberRange("in [0, 1]", lambda value: 0 <= value <= 1),
    "guidance_scale": NumberRange("a finite number of at least 0", lambda value: 0 <= value < math.inf),
}


def check_number(name: str, value: Any):
    """Raise unless a value is a number of the right type and range."""
    allowed = RANGES[name]
    if not (is_int(value) or (isinstance(value, float) and not allowed.is_whole)):
        raise TypeError(f"`{name}` must be {'an int' if allowed.is_whole else 'a number'}, got {value!r}.")
    if is_int(value) and value > sys.float_info.max and not allowed.is_whole:
        raise ValueError(f"`{name}` must be a number that a float can hold, got one of {value.bit_length()} bits.")
    if not allowed.holds(value):
        raise ValueError(f"`{name}` must be {allowed.described}, got {value}{allowed.hint}.")


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
            take into account what is given after them: approximately, and exactly in the limit of many completions
            (sampling-importance-resampling; Smith & Gelfand 1992, Bayesian Statistics without Tears).
        use_cache (`bool`, defaults to `True`): `False` turns `sampler="cached"` into `"naive"`.
        return_dict_in_generate (`bool`, defaults to `False`): Return a [`PixelCNNGenerateOutput`].
        output_scores (`bool`, defaults to `False`): Keep the scores of every dimension in that output.
    """

    do_sample: bool
    temperature: float
    top_k: int
    top_p: float
    min_p: float
    guidance_scale: float
    num_resamples: int
    use_cache: bool
    return_dict_in_generate: bool
    output_scores: bool

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
        for name in RANGES:
            check_number(name, getattr(self, name))
        if self.num_resamples > 1 and not self.do_sample:
            raise ValueError(
                f"`num_resamples={self.num_resamples}` needs `do_sample=True`: all completions would be the same."
            )

    @classmethod
    def from_dict(cls, config_dict, **kwargs):
        r"""
        Settings of a file; those that only a later version knows are left out with a warning.

        Raises:
            TypeError, ValueError: If they are not a dictionary, or a value has the wrong type or is out of range.
        """
        if not isinstance(config_dict, dict):
            raise TypeError(f"Generation settings must be a dictionary by name, got {type(config_dict).__name__}.")
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


__all__ = ["PixelCNNGenerationConfig"]
