r"""
What the models of all families share: pixel encoding, class conditioning, head, initialisation, likelihood.

A family subclasses [`CausalImagePreTrainedModel`] once for its configuration, [`CausalImageBackbone`] for its network
and [`CausalImageModeling`] for the model with a likelihood, and ends in a [`Family`], the record of what the rest of
the project asks about it.
"""

import math
import pickle
import sys
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from itertools import pairwise
from typing import TYPE_CHECKING, Any, NamedTuple

import torch
import torch.nn.functional as F
from safetensors import SafetensorError
from torch import nn
from torch.utils.checkpoint import checkpoint
from transformers import PreTrainedModel
from transformers import initialization as init
from transformers.utils import logging
from transformers.utils.generic import ModelOutput, can_return_tuple

from .adapters_causal_image import AdaptedConv2d, watch_peft
from .caching_causal_image import ForwardCache, SamplingCache
from .checks_causal_image import (
    check_asked_of_classes,
    check_class_ids,
    check_levels,
    class_ids_for,
    evaluation_mode,
    some_of,
)
from .configuration_causal_image import CausalImageModelingConfig
from .generation_causal_image import CausalImageGenerationMixin
from .generation_config_causal_image import PixelCNNGenerationConfig
from .likelihood_causal_image import OutputDistribution, at_least_float32, distribution_of
from .masking_causal_image import CausalConv2d, MaskedConv2d
from .weights_causal_image import classes_by_name

logger = logging.get_logger(f"transformers.{__name__}")  # where `transformers.logging.set_verbosity` reaches


@dataclass
class CausalImageModelingOutput(ModelOutput):
    r"""
    Args:
        loss (`torch.FloatTensor` of shape `(1,)`, *optional*, returned when `labels` are given):
            Mean negative log-likelihood in nats per dimension; divide by ln 2 for bits per dimension.
        logits (`torch.FloatTensor`):
            Parameters of the output distribution: `(batch, channels, height, width)` for `"bernoulli"`,
            `(batch, channels, height, width, num_levels)` for `"categorical"`, `(batch, height, width, parameters)` for
            `"logistic_mixture"`.
        hidden_states (`tuple[torch.FloatTensor]`, *optional*, returned when `output_hidden_states=True`):
            What enters the first layer, and the features after each layer; see [`CausalImageBackbone`].
    """

    loss: torch.Tensor | None = None
    logits: torch.Tensor | None = None
    hidden_states: tuple[torch.Tensor, ...] | None = None


@dataclass
class BackboneOutput(ModelOutput):
    r"""
    Args:
        last_hidden_state (`torch.FloatTensor` of shape `(batch, hidden_size, height, width)`):
            The residual stream after the last layer; the head reads it.
        hidden_states (`tuple[torch.FloatTensor]`, *optional*, returned when `output_hidden_states=True`):
            What enters the first layer, and the features after each layer; see [`CausalImageBackbone`].
    """

    last_hidden_state: torch.Tensor | None = None
    hidden_states: tuple[torch.Tensor, ...] | None = None


class PixelEncoding(nn.Module):
    r"""
    Levels `(batch, channels, height, width)` to features `(batch, channels * features, height, width)`.

    `"scaled"`: one feature per channel, `2 * level / (num_levels - 1) - 1`. `"embedding"`: a learned vector of
    `hidden_size // num_channels` features for every level of every channel. Features of a channel are neighbours.
    """

    def __init__(self, config: CausalImageModelingConfig):
        super().__init__()
        self.num_levels, self.num_channels = config.num_levels, config.num_channels
        self.embedding = None
        self.features_per_channel = 1
        if config.input_encoding == "embedding":
            self.features_per_channel = config.hidden_size // config.num_channels
            self.embedding = nn.Embedding(config.num_channels * config.num_levels, self.features_per_channel)

    def table(self, dtype: torch.dtype, device: torch.device) -> torch.Tensor:
        """What each level of each channel becomes: `(num_channels, num_levels, features)`."""
        if self.embedding is None:
            levels = torch.arange(self.num_levels, device=device)
            return self.scale(levels, dtype)[:, None].expand(self.num_channels, -1, -1)
        return self.embedding.weight.unflatten(0, (self.num_channels, self.num_levels))

    def scale(self, levels: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
        exact = torch.promote_types(dtype, torch.float32)
        return (levels.to(exact) * 2 / (self.num_levels - 1) - 1).to(dtype)

    def forward(self, pixel_values: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
        if self.embedding is None:
            return self.scale(pixel_values, dtype)
        first = torch.arange(self.num_channels, device=pixel_values.device) * self.num_levels
        features = self.embedding(pixel_values.long() + first[:, None, None])  # (batch, channels, h, w, features)
        return features.movedim(-1, 2).flatten(1, 2)


class ClassEmbedding(nn.Embedding):
    """A bias for every class: `(batch,)` class ids to `(batch, features, 1, 1)`; id -1, no class, is a zero vector."""

    def forward(self, class_ids: torch.Tensor) -> torch.Tensor:
        bias = super().forward(class_ids.clamp(min=0)) * (class_ids >= 0).to(self.weight.dtype)[:, None]
        return bias[:, :, None, None]


class ClassPrior(nn.Module):
    """Learned log-probabilities of classes, `(num_classes,)`; equal at the start."""

    def __init__(self, num_classes: int):
        super().__init__()
        self.logits = nn.Parameter(torch.zeros(num_classes))

    def forward(self) -> torch.Tensor:
        return at_least_float32(self.logits).log_softmax(-1)


class PixelHead(nn.Module):
    r"""
    `num_head_layers` times activation and 1×1, then activation and the 1×1 that outputs the distribution's parameters.

    Args:
        config ([`CausalImageModelingConfig`]): Sizes.
        num_parameters (`int`): Parameters of a pixel.
        activation (callable): Applied before each layer; takes `inplace`, as `F.relu` does.
        options: Of the layers, see [`CausalConv2d`].
    """

    def __init__(
        self,
        config: CausalImageModelingConfig,
        num_parameters: int,
        activation: Callable[..., torch.Tensor] = F.relu,
        **options,
    ):
        super().__init__()
        self.activation = activation
        sizes = [config.hidden_size] + [config.head_hidden_size] * config.num_head_layers + [num_parameters]
        self.layers = nn.ModuleList(
            MaskedConv2d(size, next_size, 1, mask_type="B", num_groups=config.num_channel_groups, **options)
            for size, next_size in pairwise(sizes)
        )

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        for layer in self.layers:
            x = layer(self.activation(x))
        return x


def mean_of(total: torch.Tensor, count: torch.Tensor | int) -> torch.Tensor:
    """A loss: a sum over what was counted, by a number or a tensor on any device."""
    return total / (count.to(total.device) if isinstance(count, torch.Tensor) else count)


def _with_a_gradient(run: Callable, layer: Callable, x: torch.Tensor, *args):
    """
    A layer through a reentrant checkpoint, which computes gradients of weights only on the way to an input's: pixels
    have none, and neither has what frozen layers make of them.
    """
    needs_one = torch.is_grad_enabled() and not any(isinstance(a, torch.Tensor) and a.requires_grad for a in (x, *args))
    return run(layer, x.detach().requires_grad_() if needs_one else x, *args)


def _own_name(name: str) -> str:
    """The name of a tensor without what wrappers of the model, or of a part of it, put into it."""
    return name.replace("_orig_mod.", "").removeprefix("module.")


class CausalImagePreTrainedModel(PreTrainedModel):
    """Loading, saving and initialisation for all families."""

    if TYPE_CHECKING:  # transformers takes a class's annotation of `config` for its `config_class`
        config: CausalImageModelingConfig
    base_model_prefix = "model"
    main_input_name = "pixel_values"
    input_modalities = ("image",)  # pyright: ignore[reportAssignmentType] - a tuple in transformers' own models, too
    supports_gradient_checkpointing = True
    _keys_to_ignore_on_load_unexpected = [r"^class_prior\."]  # which only a classifier has
    accepts_loss_kwargs = True  # `forward` divides by `num_items_in_batch`, so accumulation and processes add up

    def head_options(self) -> dict:
        """What the family's head has besides its sizes; see [`PixelHead`]."""
        return {}

    def __init__(self, config, *args, **kwargs):
        config.validate()  # fields may have been assigned since it was made
        super().__init__(config, *args, **kwargs)

    @property
    def peft_config(self) -> dict[str, Any]:
        """Adapters by name, if there are any. The first thing that `peft` asks a model for, whatever the method is."""
        if "peft" in sys.modules:
            watch_peft()
        if "_peft_config" not in vars(self):
            raise AttributeError(f"{type(self).__name__} has no adapters.")
        return vars(self)["_peft_config"]

    @peft_config.setter
    def peft_config(self, adapters: dict[str, Any]):
        vars(self)["_peft_config"] = adapters

    @peft_config.deleter
    def peft_config(self):
        del vars(self)["_peft_config"]

    def add_adapter(self, adapter_config, adapter_name: str | None = None):
        r"""
        As in transformers, for LoRA on masked convolutions; without `target_modules` on all of them.

        Args:
            adapter_config (`peft.LoraConfig`): Settings: rank, alpha, initial weights, layers, classes to save.
            adapter_name (`str`, *optional*): Defaults to `"default"`.

        Raises:
            ValueError: If it is another method, or has other settings or layers. The model is as it was.
        """
        loaded = self._hf_peft_config_loaded
        try:
            super().add_adapter(adapter_config, adapter_name)
        except Exception:
            self._hf_peft_config_loaded = loaded  # which transformers has set before it tries
            raise

    def load_adapter(self, peft_model_id: str | None = None, *args, **kwargs):
        r"""
        As in transformers, but a file that lacks tensors of the adapter is an error.

        Raises:
            OSError: If there is no such adapter, or tensors are missing.
            ValueError: If it is no LoRA on masked convolutions.
        """
        report = super().load_adapter(peft_model_id, *args, **kwargs)
        if missing := sorted(report.missing_keys):
            raise OSError(
                f"The adapter {str(peft_model_id)!r} lacks {len(missing)} tensors, {some_of(missing)}: it is damaged, "
                "or of another model."
            )
        return report

    @torch.no_grad()
    def _init_weights(self, module):
        r"""
        Convolutions: N(0, 1 / fan_in), where fan_in counts the inputs that an output really sees behind its mask (LeCun
        et al. 1998, Efficient BackProp, section 4.6), so that activations start with the variance of the image
        whatever the kernel. Biases 0. Embeddings of levels N(0, 1), the scale of a normalised pixel; embeddings of
        classes N(0, 0.02²), so that all classes start almost equal; a learned prior starts uniform. All other modules
        start as transformers starts them. Also refills mask buffers, which `from_pretrained` leaves uninitialised.

        With weight normalisation directions are N(0, 0.05²), as in the code of PixelCNN++, and gains give the same
        variance; [`~CausalImagePreTrainedModel.initialize_from_data`] then fits gains and biases to images.
        """
        if isinstance(module, CausalConv2d):
            visible = torch.ones_like(module.kernel(module.weight), dtype=torch.bool)
            if module.mask is not None and (mask := module.build_mask()) is not None:
                visible = mask.to(module.mask.device)
                init.copy_(module.mask, visible)
            if not getattr(module.weight, "_is_hf_initialized", False):  # loaded already: draw nothing
                fan_in = module.share_of_taps * visible.sum(dim=(1, 2, 3), keepdim=True)
                std = module.init_scale * fan_in.rsqrt() if module.gain is None else 0.05
                module.weight.zero_()
                module.kernel(module.weight).normal_().mul_(visible * std)
            if module.gain is not None:
                init.constant_(module.gain, module.init_scale * module.share_of_taps**-0.5)
            if module.bias is not None:
                init.zeros_(module.bias)
        elif isinstance(module, nn.Embedding):
            init.normal_(module.weight, std=0.02 if isinstance(module, ClassEmbedding) else 1.0)
        elif isinstance(module, ClassPrior):
            init.zeros_(module.logits)
        else:
            super()._init_weights(module)

    @torch.no_grad()
    def initialize_from_data(self, pixel_values: torch.Tensor, *, class_ids: torch.Tensor | None = None):
        r"""
        Data-dependent initialisation of weight-normalised layers: sets gains and biases so that every output of each
        layer has mean 0 and standard deviation `init_scale` on these images. Other layers stay as they are, so a model
        without weight normalisation does not change.

        Args:
            pixel_values (`torch.LongTensor` of shape `(batch, channels, height, width)`): Some training images.
            class_ids (`torch.LongTensor` of shape `(batch,)`, *optional*): Their classes.

        Reference: Salimans & Kingma 2016, Weight Normalization, section 3, https://huggingface.co/papers/1602.07868
        """

        def normalise(layer, inputs, options, output):
            std, mean = torch.std_mean(output.float(), dim=(0, 2, 3), correction=0)
            scale = torch.where(std > 1e-6, layer.init_scale / std, 1.0)  # what never varies keeps its gain
            layer.gain.mul_(scale)
            layer.bias.sub_(mean).mul_(scale)
            return layer.forward(*inputs, **options)

        layers = [m for m in self.modules() if isinstance(m, CausalConv2d) and m.gain is not None]
        if not layers:
            return
        hooks = [layer.register_forward_hook(normalise, with_kwargs=True) for layer in layers]
        try:
            with evaluation_mode(self):  # no dropout
                getattr(self, "log_prob", self)(pixel_values, class_ids=class_ids)
        finally:
            for hook in hooks:
                hook.remove()

    def get_input_embeddings(self) -> nn.Module:
        r"""
        The vectors of levels: `nn.Embedding` of `num_channels * num_levels` rows, those of a channel one after another.

        Raises:
            NotImplementedError: If the model reads levels as numbers.
        """
        encoding: Any = getattr(self, self.base_model_prefix, self).encoding
        if encoding.embedding is None:
            raise NotImplementedError("With `input_encoding='scaled'` levels are numbers, and no table of vectors.")
        return encoding.embedding

    def enable_input_require_grads(self):
        """Does nothing: frozen layers and pixels without gradients are seen to where layers are checkpointed."""
        self._require_grads_hooks = []

    def _set_gradient_checkpointing(self, enable=True, gradient_checkpointing_func=checkpoint, **options):
        """As in transformers, which passes what runs the layers; reentrant checkpoints train the first layers too."""
        if getattr(gradient_checkpointing_func, "keywords", {}).get("use_reentrant") is not False:
            gradient_checkpointing_func = partial(_with_a_gradient, gradient_checkpointing_func)
        super()._set_gradient_checkpointing(enable, gradient_checkpointing_func, **options)

    @classmethod
    def from_pretrained(cls, *args, use_safetensors: bool | None = True, **kwargs):
        r"""
        As in transformers, but only an explicit `use_safetensors=False` reads a `.bin` file, and pickled code in it is
        never run. A tensor that the file lacks starts anew, and transformers says so, only where that is meant: with
        `ignore_mismatched_sizes=True`, a learned prior of classes, or the head on top of a saved `...Model`. A tensor
        that the model lacks is left out, likewise, only with `ignore_mismatched_sizes=True`, or as the head by a
        `...Model`.

        Raises:
            OSError: If there is no such model, or its weights are damaged, incomplete, more than the config says, or
                not there as safetensors.
            ValueError: If the weights have other shapes than the config says, without `ignore_mismatched_sizes=True`.
        """
        name = args[0] if args else kwargs.get("pretrained_model_name_or_path")
        may_differ = kwargs.pop("ignore_mismatched_sizes", False)
        wants_report = kwargs.pop("output_loading_info", False)
        try:
            loaded: Any = super().from_pretrained(
                *args,
                use_safetensors=use_safetensors is not False,
                ignore_mismatched_sizes=True,  # reported below, with names
                output_loading_info=True,
                **kwargs,
            )
            model, report = loaded
            if not may_differ:
                model._check_loaded(str(name), report)
            return (model, report) if wants_report else model
        except SafetensorError as error:
            raise OSError(
                f"The weights of {str(name)!r} are damaged or cut off ({error}): download or copy them again "
                "(from the Hub with `force_download=True`)."
            ) from error
        except pickle.UnpicklingError as error:
            raise OSError(
                f"The weights of {str(name)!r} contain pickled code, which could do anything and is not run. Where you "
                "trust their author, `model = AutoModel.from_config(config)`, `model.load_state_dict(torch.load(file, "
                "weights_only=False))` and `model.save_pretrained(folder)` convert them to safetensors."
            ) from error
        except OSError as error:
            if use_safetensors is not False and "model.safetensors" in str(error):
                raise OSError(
                    f"{error} Weights in a `.bin` file are read only when asked for, with `use_safetensors=False`; "
                    "`save_pretrained` then converts them."
                ) from error
            raise

    def _check_loaded(self, name: str, report: dict):
        """Raise if a model just loaded and its file have other tensors, except where its class adds or drops some."""
        remedy = "Where they are meant to start anew, as for other classes, pass `ignore_mismatched_sizes=True`."
        may_be_new = ["class_prior."]
        backbone_class = getattr(self, "backbone_class", None)
        if backbone_class is not None and self.config.architectures == [backbone_class.__name__]:
            may_be_new.append("head.")
        missing = sorted(key for key in report["missing_keys"] if not key.startswith(tuple(may_be_new)))
        if missing:
            unknown = sorted(report["unexpected_keys"])
            cause = "They are those of another class or config."
            if not unknown:
                cause = "Unless the config is another one than they were saved with, download or copy them again."
            instead = f" and hold {some_of(unknown)}, which the model does not have" if unknown else ""
            raise OSError(
                f"The weights of {name!r} lack {len(missing)} of the {len(self.state_dict())} tensors of a "
                f"{type(self).__name__}, {some_of(missing)}{instead}. {cause} {remedy}"
            )
        shapes = [f"{key} is {tuple(was)}, not {tuple(new)}" for key, was, new in sorted(report["mismatched_keys"])]
        if shapes:
            raise ValueError(
                f"The weights of {name!r} have other shapes than the config says: {some_of(shapes)}. {remedy}"
            )
        dropped = "head." if isinstance(self, CausalImageBackbone) else ()
        if unused := sorted(key for key in report["unexpected_keys"] if not key.startswith(dropped)):
            raise OSError(
                f"The weights of {name!r} hold {len(unused)} tensors that a {type(self).__name__} of this config does "
                f"not have, {some_of(unused)}: the config is not the one that the model was trained with. Where they "
                "are meant to be left out, as those of classes, pass `ignore_mismatched_sizes=True`."
            )

    def masked_state_dict(self, state_dict: dict | None = None) -> dict:
        r"""
        The weights, or others of this model, with zeros where a mask hides them: what a saved file contains.

        Names lose what `torch.compile` (`_orig_mod.`) and `DataParallel` (`module.`) put into them.
        """
        state_dict = {
            _own_name(name): w for name, w in (self.state_dict() if state_dict is None else state_dict).items()
        }
        for module_name, module in self.named_modules():
            if isinstance(module, CausalConv2d) and module.mask is not None:
                own_name = _own_name(module_name)
                for name in {f"{own_name}.weight", f"{own_name.removesuffix('.base_layer')}.weight"}:  # as if merged
                    if name in state_dict:
                        state_dict[name] = module.masked(state_dict[name])
        return state_dict

    def acting_state_dict(self) -> dict:
        """[`~CausalImagePreTrainedModel.masked_state_dict`] of the model as it is with all active adapters merged."""
        state_dict = self.state_dict()
        for name, module in self.named_modules():
            if isinstance(module, AdaptedConv2d):
                for key in [key for key in state_dict if key.startswith(f"{name}.")]:
                    tensor, (own, _, rest) = state_dict.pop(key), key.removeprefix(f"{name}.").partition(".")
                    if own == "base_layer":
                        state_dict[f"{name}.{rest}"] = tensor
                state_dict[f"{name}.weight"] = module.adapted_weight().detach()
        return self.masked_state_dict(state_dict)

    def non_finite_weights(self, state_dict: dict | None = None) -> list[str]:
        """
        Names of the tensors that hold a NaN or an infinite number, of those that a saved file contains: of
        [`~CausalImagePreTrainedModel.masked_state_dict`], or of what that has returned.
        """
        state_dict = self.masked_state_dict() if state_dict is None else state_dict
        return [name for name, weight in state_dict.items() if not weight.is_meta and not weight.isfinite().all()]

    def _auto_map(self) -> dict[str, str]:
        """The classes, by Auto class, that load this model's weights out of the code that is saved with them."""
        own, module = type(self), sys.modules[type(self).__module__]
        if own._auto_class is None:
            return {}
        if own.__module__ == "__main__" or getattr(module, own.__name__, None) is not own:
            logger.warning(
                f"The code of {own.__name__} is not saved, because no module defines it: a file of its own could be."
            )
            own._auto_class = None  # transformers would say the same, with the whole model in the message
            return {}
        file = own.__module__.split(".")[-1]
        known = (getattr(self.config, "auto_map", None) or {}).items()  # remote code registers only what was loaded
        known = [(auto_class, name.split("--")[-1]) for auto_class, name in known]
        return {auto_class: name for auto_class, name in known if name.split(".")[0] == file} | {
            cls._auto_class: f"{file}.{cls.__name__}"
            for cls in vars(module).values()
            if isinstance(cls, type)
            and cls.__module__ == own.__module__
            and vars(cls).get("_auto_class")
            and getattr(cls, "config_class", None) is own.config_class  # not of another family
        }

    def save_pretrained(self, save_directory, is_main_process: bool = True, state_dict: dict | None = None, **kwargs):
        r"""
        As in transformers; in the file, weights that a mask hides are zero. `auto_map` names the Auto classes of the
        module that defines the model, whose code is saved too; none if that is `__main__`.

        A `state_dict` may come from the model in `torch.compile` or `DataParallel`. Weights that are not finite are
        saved with a warning, so that a run can be looked into.

        Raises:
            ValueError: If adapters are in the model that only its `PeftModel` can save.
        """
        if not self._hf_peft_config_loaded and any(isinstance(module, AdaptedConv2d) for module in self.modules()):
            raise ValueError(
                "This model holds adapters of a `PeftModel`: save them with its `save_pretrained`, or put them into "
                "the weights first, with its `merge_and_unload`."
            )
        state_dict = self.masked_state_dict(state_dict)
        if (broken := self.non_finite_weights(state_dict)) and is_main_process:
            logger.warning(
                f"THE MODEL IS BROKEN: {len(broken)} of its {len(state_dict)} tensors, {some_of(broken)}, hold NaN or "
                f"infinite numbers. It is saved to {str(save_directory)!r} only to find out why."
            )
        self.config.auto_map = self._auto_map()
        return super().save_pretrained(save_directory, is_main_process, state_dict, **kwargs)


class CausalImageBackbone(CausalImagePreTrainedModel):
    r"""
    The network without its head: what `...Model` of every family does around its own `backbone_features`.

    Hidden states are one more than there are layers: the first is what enters the first of them, the others are the
    features after each, so the last is `last_hidden_state`. All are `(batch, features, height, width)`, with
    `hidden_size` features at the height and width of the image unless a family says otherwise; its `backbone_features`
    calls `collect` with each of them, in order.

    Attributes:
        encoding ([`PixelEncoding`]): Of a family's constructor: what its first layers read.
        rows_seen_above (`int`, or `math.inf`): How many rows above its own a dimension can depend on, at most.
        row_alignment (`int`): The network run on the lower part of an image is right if that begins at a multiple of so
            many rows.
        reads_image_size (`bool`): Whether features depend on the height and width of the image itself. If so, the
            network is right only when it runs on all of the image.
    """

    encoding: PixelEncoding
    row_alignment = 1
    reads_image_size = False

    @property
    def rows_seen_above(self) -> int | float:
        return math.inf

    def first_row_seen(self, row: int) -> int:
        """The row to begin at so that the network run on the lower part of an image is right from `row` on."""
        first = max(0, row - self.rows_seen_above)
        return int(first - first % self.row_alignment)

    def make_monotone(self):
        """Change positive weights where that is needed for features to increase in all inputs that they depend on."""

    def backbone_features(
        self, pixel_values: torch.Tensor, class_ids: torch.Tensor | None, collect: Callable[[torch.Tensor], None]
    ) -> torch.Tensor:
        """Levels to the features that the head reads; `collect` is called with each hidden state, the last included."""
        raise NotImplementedError

    @can_return_tuple
    def forward(
        self,
        pixel_values: torch.Tensor,
        *,
        class_ids: torch.Tensor | None = None,
        output_hidden_states: bool | None = None,
    ) -> BackboneOutput:
        r"""
        Levels `(batch, channels, height, width)` to features `(batch, hidden_size, height, width)`.

        Features of pictures: `pipeline("image-feature-extraction", model=network, image_processor=folder)`, with a
        network of this class such as `GatedPixelCNNModel.from_pretrained(folder)`. Of `model=folder` alone that
        pipeline would load what `AutoModel` is, the model with its head, which gives logits or asks for classes.

        Args:
            pixel_values (`torch.LongTensor` of shape `(batch, channels, height, width)`): Integer levels.
            class_ids (`torch.LongTensor` of shape `(batch,)`, *optional*):
                Class of each image, -1 for none, for a conditional model; without them no image has a class.
            output_hidden_states (`bool`, *optional*): Whether to return all hidden states.

        Raises:
            ValueError, TypeError: If an argument has the wrong dtype, shape or range.
        """
        check_levels("pixel_values", pixel_values, self.config)
        if class_ids is None and self.config.num_classes:
            class_ids = torch.full(pixel_values.shape[:1], -1, device=pixel_values.device)
        check_class_ids(class_ids, pixel_values.shape[0], self.config)
        keep = self.config.output_hidden_states if output_hidden_states is None else output_hidden_states
        states = []
        x = self.backbone_features(pixel_values, class_ids, states.append if keep else lambda state: None)
        return BackboneOutput(last_hidden_state=x, hidden_states=tuple(states) if keep else None)


class CausalImageLikelihood(CausalImagePreTrainedModel):
    r"""
    p(image) out of a backbone and a head: what the models with a likelihood share.

    Attributes:
        backbone_class (`type[CausalImageBackbone]`): The network of the family.
        output_distribution ([`OutputDistribution`]): What the head's outputs mean.
        classes_as_built (`dict[str, type]`): Class of each module by its name, when the model was made.
    """

    backbone_class: type[CausalImageBackbone]
    output_distribution: OutputDistribution
    classes_as_built: dict[str, type]

    def __init__(self, config: CausalImageModelingConfig):
        super().__init__(config)
        self.model = self.backbone_class(config)
        self.output_distribution = distribution_of(config)
        self.head = PixelHead(config, self.output_distribution.num_parameters, **self.head_options())
        self.post_init()

    def post_init(self):
        super().post_init()
        self.classes_as_built = classes_by_name(self)  # what a cache is written for

    def distribution_parameters(
        self, pixel_values: torch.Tensor, class_ids: torch.Tensor | None, output_hidden_states: bool | None = None
    ) -> tuple[torch.Tensor, tuple[torch.Tensor, ...] | None]:
        """Parameters of the output distribution of every dimension, and the hidden states if asked for."""
        otherwise = (
            " In training, `class_column` of the collator says where they are. Features need no class, but the network "
            'without its head: `pipeline("image-feature-extraction", '
            f"model={type(self.model).__name__}.from_pretrained(folder), image_processor=folder)`."
        )
        check_asked_of_classes(class_ids, self.config, otherwise)
        features = self.model(
            pixel_values, class_ids=class_ids, output_hidden_states=output_hidden_states, return_dict=True
        )
        return self.output_distribution.from_outputs(self.head(features.last_hidden_state)), features.hidden_states

    def scored_parameters(self, pixel_values: torch.Tensor, class_ids: torch.Tensor | None) -> torch.Tensor:
        """What `log_prob` scores with."""
        return self.distribution_parameters(pixel_values, class_ids)[0]

    def _read_class_ids(self, class_ids: object | None, pixel_values: torch.Tensor) -> torch.Tensor | None:
        """What a user calls classes, as `forward` takes them."""
        if class_ids is None or isinstance(class_ids, torch.Tensor):
            return class_ids
        return class_ids_for(class_ids, len(pixel_values), self.config, getattr(pixel_values, "device", self.device))

    def log_prob(
        self, pixel_values: torch.Tensor, *, class_ids: torch.Tensor | list[int | str] | int | str | None = None
    ) -> torch.Tensor:
        r"""
        Exact log-likelihood of every dimension given its past, in nats.

        In training mode dropout acts, as it must for gradients, and numbers are random: call `model.eval()` for scores.
        A model from `from_pretrained` is in evaluation mode, a new one in training mode.

        Args:
            pixel_values (`torch.LongTensor` of shape `(batch, channels, height, width)`): Integer levels.
            class_ids (`torch.LongTensor` of shape `(batch,)`, a list, an `int` or a `str`, *optional*):
                Class of each image, by id or by name, or one for all; -1 for none. Needed by a conditional model,
                refused by others.

        Returns:
            `torch.FloatTensor` of shape `(batch, channels, height, width)`, at least float32, on the device of
            `pixel_values`. The log-likelihood of an image is the sum over its dimensions. Gradients flow; wrap in
            `torch.no_grad()` for scoring alone.

        Raises:
            ValueError, TypeError: If an argument has the wrong dtype, shape or range (unless `log_prob` is compiled).
        """
        is_for_scores = not (torch.is_grad_enabled() or torch.compiler.is_compiling())
        if self.training and self.config.dropout > 0 and is_for_scores:
            logger.warning_once("`log_prob` of a model in training mode is random, by dropout: call `model.eval()`.")
        parameters = self.scored_parameters(pixel_values, self._read_class_ids(class_ids, pixel_values))
        levels = pixel_values.to(parameters.device)  # which are where the head is, of a model on several devices
        return self.output_distribution.log_prob(parameters, levels).to(pixel_values.device)

    def level_log_prob(
        self,
        pixel_values: torch.Tensor,
        row: int,
        column: int,
        channel: int = 0,
        *,
        class_ids: torch.Tensor | list[int | str] | int | str | None = None,
    ) -> torch.Tensor:
        r"""
        What one dimension may be, given its past: the log-probability of each level, in nats.

        Args:
            pixel_values (`torch.LongTensor` of shape `(batch, channels, height, width)`):
                Integer levels; those of the dimension and of what comes after it play no part.
            row (`int`), column (`int`), channel (`int`, defaults to 0): The dimension, counted from 0.
            class_ids: As for `log_prob`.

        Returns:
            `torch.FloatTensor` of shape `(batch, num_levels)`; at the true level it is what `log_prob` gives there.

        Raises:
            ValueError, TypeError: As `log_prob`.
            IndexError: If there is no such dimension.
        """
        parameters, _ = self.distribution_parameters(pixel_values, self._read_class_ids(class_ids, pixel_values))
        shape = tuple(pixel_values.shape[1:])
        if not all(0 <= index < size for index, size in zip((channel, row, column), shape, strict=True)):
            raise IndexError(
                f"There is no dimension of `channel` {channel}, `row` {row}, `column` {column} in images of {shape}."
            )
        pixel = self.output_distribution.pixels(parameters)[:, row, column]
        return self.output_distribution.level_logits(pixel, channel, pixel_values[:, :channel, row, column].long())


class CausalImageModeling(CausalImageLikelihood, CausalImageGenerationMixin):
    r"""
    The likelihood of every dimension, and `generate`: what `...ForCausalImageModeling` of every family is, given
    `backbone_class`.

    Attributes:
        sampling_cache_class (`type[SamplingCache]`): How `sampler="cached"` computes; by default by forward passes. The
            class that names it vouches for it; a subclass that overrides `forward` gets the default.
    """

    generation_config_class = PixelCNNGenerationConfig
    sampling_cache_class: type[SamplingCache] = ForwardCache

    def scored_parameters(self, pixel_values, class_ids):
        return self(pixel_values, class_ids=class_ids, return_dict=True).logits  # a call gathers sharded weights

    @can_return_tuple
    def forward(
        self,
        pixel_values: torch.Tensor,
        *,
        class_ids: torch.Tensor | None = None,
        labels: torch.Tensor | None = None,
        output_hidden_states: bool | None = None,
        num_items_in_batch: torch.Tensor | int | None = None,
    ) -> CausalImageModelingOutput:
        r"""
        Args:
            pixel_values (`torch.LongTensor` of shape `(batch, channels, height, width)`):
                Integer levels `0 ... num_levels - 1`, any integer dtype.
            class_ids (`torch.LongTensor` of shape `(batch,)`, *optional*):
                Class of each image, -1 for none; needed by a conditional model, refused by others.
            labels (`torch.LongTensor` of shape `(batch, channels, height, width)`, *optional*):
                Levels to score, as a rule `pixel_values` itself; -100 is left out of the loss.
            output_hidden_states (`bool`, *optional*):
                Whether to return all hidden states.
            num_items_in_batch (`torch.Tensor` or `int`, *optional*):
                What to divide the summed loss by instead of the number of labels; `Trainer` passes the labels of all
                accumulated batches.

        Returns:
            [`CausalImageModelingOutput`], or a tuple with `return_dict=False`.

        Raises:
            ValueError, TypeError: If an argument has the wrong dtype, shape or range. Compiled and exported code does
            not check the range.
        """
        if labels is not None:
            are_tensors = isinstance(pixel_values, torch.Tensor) and isinstance(labels, torch.Tensor)
            if are_tensors and labels.shape != pixel_values.shape:
                hint = " `labels` are the levels to predict; classes are `class_ids`." if labels.ndim == 1 else ""
                raise ValueError(
                    f"`labels` must have the shape of `pixel_values`, {tuple(pixel_values.shape)}, "
                    f"got {tuple(labels.shape)}.{hint}"
                )
            check_levels("labels", labels, self.config, ignored=-100)
            if num_items_in_batch is not None and labels.dtype == torch.uint8 and self.config.num_levels > 156:
                raise TypeError(
                    "`labels` must be signed integers (int64) for Trainer: in uint8 the ignored label -100 is level "
                    "156, which `num_items_in_batch` then leaves out."
                )
        parameters, hidden_states = self.distribution_parameters(pixel_values, class_ids, output_hidden_states)
        loss = None
        if labels is not None:
            labels = labels.to(parameters.device, torch.long)  # in uint8 arithmetic -100 is level 156
            counted = labels != -100
            log_prob = self.output_distribution.log_prob(parameters, torch.where(counted, labels, 0))
            nats = -torch.where(counted, log_prob, 0).sum()
            count = counted.sum().clamp(min=1) if num_items_in_batch is None else num_items_in_batch
            loss = mean_of(nats, count)
        return CausalImageModelingOutput(loss=loss, logits=parameters, hidden_states=hidden_states)


class Family(NamedTuple):
    r"""
    What the rest of the project asks about a family of models: registration, scripts, cards and tests.

    Args:
        name (`str`): As its paper spells it.
        paper (`str`): Where it is described.
        config_class, model_class, causal_class, classifier_class (`type`): `...Config`, `...Model`,
            `...ForCausalImageModeling` and `...ForImageClassification`.
        lacks (`dict`): What it does not promise, of [`PROMISES`], and why.
    """

    name: str
    paper: str
    config_class: type[CausalImageModelingConfig]
    model_class: type[CausalImageBackbone]
    causal_class: type[CausalImageModeling]
    classifier_class: type[CausalImageLikelihood]
    lacks: dict[str, str] = {}

    @property
    def model_type(self) -> str:
        """The key of the family, as in `config.json`."""
        return self.config_class.model_type

    def promises(self, what: str) -> bool:
        """Whether the family keeps a promise of [`PROMISES`]."""
        if what not in PROMISES:
            raise ValueError(f"`what` must be one of {sorted(PROMISES)}, got {what!r}.")
        return what not in self.lacks


PROMISES = {  # what every family promises unless its record says otherwise
    "colour_without_mixture": "bernoulli and categorical levels of several channels, each predicted from earlier ones",
    "full_graph": "`torch.compile(fullgraph=True)`, forward and backward",
    "export_ranges": "`torch.export` with a range of heights and widths; without it by `Dim.AUTO`",
    "mapped_gradients": "`torch.func.vmap` of `torch.func.grad`",
}


__all__ = [
    "PROMISES",
    "BackboneOutput",
    "CausalImageBackbone",
    "CausalImageLikelihood",
    "CausalImageModeling",
    "CausalImageModelingOutput",
    "CausalImagePreTrainedModel",
    "ClassEmbedding",
    "ClassPrior",
    "Family",
    "PixelEncoding",
    "PixelHead",
    "mean_of",
]
