r"""
LoRA of the package `peft` on convolutions that see the past only.

`peft` adds the output of an adapter to that of the layer, so an adapter of a masked convolution would have to know its
crop, mask and weight normalisation. Here it changes the parameter instead: the layer works with `W + s B A`, which it
crops, masks and normalises as it does `W`. So nothing of the future is seen, and all that reads the layer's visible
weight (the sampling caches, the codec) follows.

`get_peft_model`, and `add_adapter` and `load_adapter` of transformers, do the same. For classes of one's own
`modules_to_save=["class_embedding"]` trains the table of classes, too. Whatever would act beside the mask is refused:
dropout, variants such as DoRA, LoRA on other layers, and other methods of `peft`.

`peft` has a mapping for layers of one's own (`LoraConfig._register_custom_module`), but asks no model before it wraps
layers. So [`watch_peft`], as soon as `peft` first looks at one of our models, puts [`prepare`] before
`BaseTuner.inject_adapter`, by which all its methods come to a model. Other models pass as before. `peft` stays
optional: only a process that has imported it runs any of this.

Reference: Hu et al. 2021, LoRA: Low-Rank Adaptation of Large Language Models, https://huggingface.co/papers/2106.09685
"""

import dataclasses
import functools
import importlib
import math
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import nn

from .masking_causal_image import CausalConv2d

# What may differ from the defaults of `LoraConfig`; new options of `peft` are refused until they are known to be right.
LORA_SETTINGS = {
    "alpha_pattern",
    "auto_mapping",
    "base_model_name_or_path",
    "exclude_modules",
    "inference_mode",
    "init_lora_weights",
    "layers_pattern",
    "layers_to_transform",
    "lora_alpha",
    "modules_to_save",
    "peft_type",
    "peft_version",
    "r",
    "rank_pattern",
    "revision",
    "target_modules",
    "use_rslora",
}
INITIAL_WEIGHTS = (True, False, "gaussian")


class AdaptedConv2d(nn.Module):
    r"""
    A [`CausalConv2d`], `base_layer`, that works with another weight in place of its parameter.

    Input and output are those of the layer. Of its attributes it has those that sampling caches read.
    """

    base_layer: CausalConv2d

    def adapted_weight(self) -> torch.Tensor:
        """What stands in for the parameter of the layer, before crop, mask and normalisation: of its shape."""
        raise NotImplementedError

    def visible_weight(self) -> torch.Tensor:
        """As [`CausalConv2d.visible_weight`], of the adapted weight."""
        return self.base_layer.visible_weight(self.adapted_weight())

    def forward(self, *inputs: torch.Tensor, **options) -> Any:
        return self.base_layer(*inputs, weight=self.adapted_weight(), **options)

    @property
    def in_channels(self) -> int:
        return self.base_layer.in_channels

    @property
    def out_channels(self) -> int:
        return self.base_layer.out_channels

    @property
    def stride(self) -> tuple[int, ...]:
        return self.base_layer.stride

    def upsample(self, *args, **kwargs) -> torch.Tensor:
        """Of an [`UpsamplingConv2d`]: its convolution with a given weight."""
        upsample: Any = self.base_layer.upsample
        return upsample(*args, **kwargs)


def peft_module(name: str) -> Any:
    """A module of `peft`, not by an import statement: loading a model with remote code would demand the package."""
    return importlib.import_module(f"peft.{name}")


class LoraConv2d(AdaptedConv2d):
    """
    A masked convolution of weight `W + s B A`: A `(r, in, rows, columns)`, B `(out, r, 1, 1)`, s = alpha / r (with
    `use_rslora` alpha / √r). With several active adapters their changes add up; merged or disabled ones have none.

    What holds adapters, and says which are active, comes from `LoraLayer` of `peft`, see [`lora_class`].
    """

    r: dict[str, int]
    lora_alpha: dict[str, int]
    scaling: dict[str, float]
    lora_bias: dict[str, bool]
    lora_dropout: nn.ModuleDict
    lora_A: Any  # noqa: N815 - named by `peft`
    lora_B: Any  # noqa: N815
    active_adapters: list[str]
    merged_adapters: list[str]
    merged: bool
    disable_adapters: bool
    reset_lora_parameters: Callable
    set_adapter: Callable
    _move_adapter_to_device_of_base_layer: Callable

    def update_layer(self, adapter_name: str, r: int, lora_alpha: int, config=None, **options):
        """Add an adapter. Its settings come in `config`, in older versions of `peft` one by one."""
        if r < 1:
            raise ValueError(f"`r` must be at least 1, got {r!r}.")
        settings = options if config is None else vars(config)
        base, (rows, columns) = self.base_layer, self.base_layer.kernel_size
        self.r[adapter_name], self.lora_alpha[adapter_name] = r, lora_alpha
        self.scaling[adapter_name] = lora_alpha / (math.sqrt(r) if settings["use_rslora"] else r)
        self.lora_dropout[adapter_name] = nn.Identity()
        self.lora_A[adapter_name] = nn.Conv2d(base.in_channels, r, (rows, columns), bias=False)
        self.lora_B[adapter_name] = nn.Conv2d(r, base.out_channels, 1, bias=False)
        self.lora_bias[adapter_name] = False
        self.reset_lora_parameters(adapter_name, settings["init_lora_weights"])
        self._move_adapter_to_device_of_base_layer(adapter_name)
        self.set_adapter(self.active_adapters)

    def get_delta_weight(self, adapter: str) -> torch.Tensor:
        """`s B A` of an adapter, of the shape of the layer's weight."""
        down, up = self.lora_A[adapter].weight, self.lora_B[adapter].weight
        return (up[:, :, 0, 0] @ down.flatten(1)).view_as(self.base_layer.weight) * self.scaling[adapter]

    def adapted_weight(self) -> torch.Tensor:
        if self.disable_adapters and self.merged:
            self.unmerge()
        weight: torch.Tensor = self.base_layer.weight
        if not (self.disable_adapters or self.merged):
            for adapter in self.active_adapters:
                if adapter in self.lora_A:
                    weight = (weight + self.get_delta_weight(adapter)).to(weight.dtype)
        return weight

    @torch.no_grad()
    def merge(self, safe_merge: bool = False, adapter_names: list[str] | None = None):
        r"""
        Write adapters into the parameter.

        Args:
            safe_merge (`bool`): Whether to refuse what is not finite.
            adapter_names (`list[str]`, *optional*): Which; by default those that are active.
        """
        weight = self.base_layer.weight
        for adapter in peft_module("tuners.tuners_utils").check_adapters_to_merge(self, adapter_names):
            if adapter in self.lora_A:
                merged = (weight + self.get_delta_weight(adapter)).to(weight.dtype)
                if safe_merge and not merged.isfinite().all():
                    raise ValueError(f"The adapter {adapter!r} is broken: merged weights are not finite.")
                weight.copy_(merged)
                self.merged_adapters.append(adapter)

    @torch.no_grad()
    def unmerge(self):
        """Take merged adapters out of the parameter; exact up to rounding."""
        while self.merged_adapters:
            self.base_layer.weight.sub_(self.get_delta_weight(self.merged_adapters.pop()))


@functools.cache
def lora_class() -> type[LoraConv2d]:
    """The class of layers with LoRA, made when `peft` is there to derive from."""
    lora_layer: Any = peft_module("tuners.lora.layer").LoraLayer

    class CausalLoraConv2d(LoraConv2d, lora_layer):
        """See [`LoraConv2d`]."""

        def __init__(self, base_layer: CausalConv2d, adapter_name: str, **options):
            nn.Module.__init__(self)
            channels = base_layer.in_channels, base_layer.out_channels
            lora_layer.__init__(self, nn.Conv2d(*channels, 1, device="meta"))  # a kind of which it knows the sizes
            self.base_layer = base_layer
            self._active_adapter = adapter_name
            self.update_layer(adapter_name, **options)

    CausalLoraConv2d.__qualname__ = CausalLoraConv2d.__name__  # where pickle looks, see `__getattr__`
    return CausalLoraConv2d


def __getattr__(name: str) -> Any:
    if name == "CausalLoraConv2d":
        return lora_class()
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def unwrapped(module: nn.Module) -> list[nn.Module]:
    """A module and what is inside of it, through wrappers that act the same on who calls and who reads a layer."""
    inner: Any = getattr(module, "_orig_mod", None)  # of `torch.compile`
    if isinstance(module, AdaptedConv2d):
        inner = module.base_layer
    elif type(getattr(module, "original_module", None)).__name__ == "ClassEmbedding":  # of `modules_to_save`
        inner = module.original_module  # a cache calls the wrapper
    return [module] if inner is None else [module, *unwrapped(inner)]


def check_settings(config: Any):
    """Raise unless a configuration of `peft` is LoRA as [`lora_class`] computes it."""
    method = getattr(config.peft_type, "value", config.peft_type)
    if method != "LORA":
        raise ValueError(
            f"Adapters of the method {method} are not supported: on masked convolutions they would see the future, or "
            "the cached sampler would not see them. Use `peft.LoraConfig`."
        )
    default = type(config)()
    for field in dataclasses.fields(config):
        value = getattr(config, field.name)
        if field.name not in LORA_SETTINGS and value and value != getattr(default, field.name):
            raise ValueError(
                f"`{field.name}` of `LoraConfig` must be left out, got {value!r}: an adapter here changes the weight "
                "of a masked convolution by a matrix of low rank, and nothing else."
            )
    if config.target_modules == "all-linear":
        raise ValueError("`target_modules` is 'all-linear': there are none. Leave it out to adapt all convolutions.")
    if config.init_lora_weights not in INITIAL_WEIGHTS:
        raise ValueError(f"`init_lora_weights` must be one of {INITIAL_WEIGHTS}, got {config.init_lora_weights!r}.")


def convolutions(model: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    """Names and modules of all masked convolutions, those with adapters included."""
    wrapper = None
    for name, module in model.named_modules():
        if isinstance(module, AdaptedConv2d):
            wrapper = f"{name}."
            yield name, module
        elif isinstance(module, CausalConv2d) and not (wrapper and name.startswith(wrapper)):
            yield name, module


def check_targets(tuner: Any, config: Any, model: nn.Module):
    """Raise if an adapter is meant for other layers than masked convolutions."""
    names = {name for name, _ in convolutions(model)}
    inside = tuple(f"{name}." for name in names)
    for name, module in model.named_modules():
        if name in names or not name or name.startswith(inside):
            continue
        if tuner._check_target_module_exists(config, name):
            short = {".".join(n.split(".")[-2:]) if n.split(".")[-1].isdigit() else n.split(".")[-1] for n in names}
            raise ValueError(
                f"`target_modules` must match masked convolutions only, and matches {name!r}, a "
                f"{type(module).__name__}. What can be named: {', '.join(sorted(short))}."
            )
    for name, module in model.named_modules():
        saved = any(name.endswith(key) for key in config.modules_to_save or ())
        if saved and type(unwrapped(module)[-1]).__name__ != "ClassEmbedding":
            raise ValueError(
                f"`modules_to_save` may name 'class_embedding' only, and matches {name!r}, a {type(module).__name__}."
            )


def prepare(tuner: Any, model: nn.Module, adapter_name: str):
    r"""
    Before `peft` wraps layers of a model with masked convolutions: make it use [`lora_class`] for them, or refuse.
    Without `target_modules` all masked convolutions get an adapter.

    Args:
        tuner (`peft.tuners.tuners_utils.BaseTuner`): The method, with the configuration of the adapter.
        model (`nn.Module`): Any model.
        adapter_name (`str`): Name of the adapter.

    Raises:
        ValueError: If the method is not LoRA, has settings that are not supported, or is meant for other layers. The
            model is as it was.
    """
    if not any(isinstance(module, CausalConv2d) for module in model.modules()):
        return
    config = tuner.peft_config[adapter_name]
    try:
        check_settings(config)
        if not config.target_modules:
            config.target_modules = {name for name, _ in convolutions(model)}
        check_targets(tuner, config, model)
    except ValueError:
        tuner.peft_config.pop(adapter_name)
        raise
    config._register_custom_module({CausalConv2d: lora_class()})


@functools.cache
def watch_peft():
    """Put [`prepare`] before `BaseTuner.inject_adapter`, once in a process."""
    tuner_class = peft_module("tuners.tuners_utils").BaseTuner
    inject_adapter = tuner_class.inject_adapter

    @functools.wraps(inject_adapter)
    def inject_prepared(self, model: nn.Module, adapter_name: str, *args, **kwargs):
        prepare(self, model, adapter_name)
        return inject_adapter(self, model, adapter_name, *args, **kwargs)

    tuner_class.inject_adapter = inject_prepared


__all__ = ["AdaptedConv2d", "lora_class", "unwrapped", "watch_peft"]
