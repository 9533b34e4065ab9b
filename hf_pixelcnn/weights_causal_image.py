r"""
The weights of a network as sampling caches read them: where they lie, whether the network still is what a cache was
written for, and its kernels as matrices.
"""

import copy
import inspect
from collections.abc import Iterator, Sequence

import torch
from torch import nn
from torch.nn.utils import parametrize

from .adapters_causal_image import unwrapped
from .masking_causal_image import feature_groups


def device_of(model) -> torch.device:
    """Where the weights of a model lie; of one that is offloaded in part, those that are in memory."""
    device = next((parameter.device for parameter in model.parameters() if not parameter.is_meta), None)
    if device is None:  # where accelerate computes if all are offloaded
        device = getattr(getattr(model, "_hf_hook", None), "execution_device", None)
    if device is None:
        raise ValueError("The model is on the meta device: it has no weights to draw with.")
    return torch.device(device)


def on_one_device(model):
    r"""
    A model whose weights can be computed with: itself, or of one that is spread over several devices a copy with all
    weights on the first of them.

    Args:
        model: A `...ForCausalImageModeling`.

    Raises:
        ValueError: If weights are offloaded or sharded, or see [`check_as_built`].
    """
    devices = {parameter.device for parameter in model.parameters()}
    if any(hasattr(parameter, "full_tensor") for parameter in model.parameters()):
        raise ValueError(
            "`sampler='cached'` needs whole weights, but those of this model are shared among processes (as by "
            "`fully_shard`): use 'fixed_point' in each of them, with generators of the same seed."
        )
    if any(device.type == "meta" for device in devices):
        raise ValueError("`sampler='cached'` needs all weights in memory, some are offloaded; use 'fixed_point'.")
    check_as_built(model)
    if len(devices) == 1:
        return model
    copied, device = copy.deepcopy(model), device_of(model)
    if any(hasattr(module, "_hf_hook") for module in copied.modules()):
        from accelerate.hooks import remove_hook_from_module  # whose hooks would send what layers read to other devices

        remove_hook_from_module(copied, recurse=True)
    return copied._apply(lambda tensor: tensor.to(device))  # `to` is forbidden where there were hooks


def modules_by_name(module: nn.Module, name: str = "") -> Iterator[tuple[str, list[nn.Module]]]:
    """Names of a module and of all below it, and each with what is in it, see [`unwrapped`]."""
    modules = unwrapped(module)
    yield name, modules
    for child_name, child in modules[-1].named_children():
        yield from modules_by_name(child, f"{name}.{child_name}" if name else child_name)


def class_within(modules: list[nn.Module]) -> type:
    """The class of what [`unwrapped`] found last, without what parametrisation makes of it."""
    return parametrize.type_before_parametrizations(modules[-1])


def classes_by_name(module: nn.Module) -> dict[str, type]:
    """Classes of the modules in a module, without wrappers."""
    return {name: class_within(modules) for name, modules in modules_by_name(module) if name}


def is_hooked(module: nn.Module) -> bool:
    """Whether a call of a module does other things than its class says."""
    # accelerate moves tensors, or puts autocast around `forward`; `torch.compile`
    known = any(hasattr(module, name) for name in ("_hf_hook", "_original_forward", "_orig_mod"))
    own = type(module).forward
    forward = vars(module).get("forward", own)  # where accelerate may have put it back, without its decorators
    is_own = getattr(forward, "__func__", forward) in (own, inspect.unwrap(own))
    return bool(module._forward_pre_hooks or module._forward_hooks or not (is_own or known))


def check_as_built(model):
    r"""
    Raise if the network is not what a cache that works with weights is written for.

    LoRA on masked convolutions and parametrised weights are followed. Whatever else acts when a layer is called would
    act in the forward pass only.

    Args:
        model: A `...ForCausalImageModeling`.

    Raises:
        ValueError: If modules of other classes are in the place of those it was built of, or modules have hooks.
    """
    found = dict(modules_by_name(model))
    for name, module_class in {"": type(model), **model.classes_as_built}.items():
        what = None
        if name not in found:
            what = "is gone"
        elif class_within(found[name]) is not module_class:
            outer = type(found[name][0])
            what = f"is a {outer.__module__}.{outer.__name__}, not a {module_class.__name__}"
        elif any(is_hooked(module) for module in found[name]):
            what = "has hooks"
        if what:
            place = f"`{name}`" if name else "the model itself"
            raise ValueError(
                "The cached sampler and the codec compute with the weights of layers as the model was built, but "
                f"{place} {what}: use `sampler='naive'`, merge adapters into the weights, or undo the change."
            )


def changed_methods(model) -> list[str]:
    """
    Methods that the class of a model, or of its network, overrides, of those that its cache stands for: the cache is
    written for the class that names it as its `sampling_cache_class`.
    """
    written_for = next(cls for cls in type(model).__mro__ if "sampling_cache_class" in vars(cls))
    pairs = (
        (type(model), written_for, ("forward", "distribution_parameters", "scored_parameters")),
        (class_within(unwrapped(model.model)), written_for.backbone_class, ("forward", "backbone_features")),
    )
    return [
        f"{own.__name__}.{name}"
        for own, known, names in pairs
        for name in names
        if getattr(own, name) is not getattr(known, name)
    ]


def group_rows(num_features: int, num_channels: int, channel: int, num_parts: int = 1) -> torch.Tensor:
    """Indices of the features that belong to a channel, in order."""
    return (feature_groups(num_features, num_channels, num_parts) == channel).nonzero().flatten()


def pointwise_matrix(layer, lead_with_bias: bool = False) -> torch.Tensor:
    r"""
    A 1×1 layer as a matrix `(in, out)`.

    `lead_with_bias` puts the bias before the first row, for inputs that begin with a constant 1.
    """
    matrix = layer.visible_weight()[:, :, 0, 0].T.contiguous()
    return torch.cat((layer.bias[None], matrix)) if lead_with_bias else matrix


def row_matrices(layer, reach: int, num_channels: int, num_parts: int = 1) -> tuple[torch.Tensor, torch.Tensor]:
    r"""
    The centre row of a causal kernel; outputs channel by channel.

    Returns:
        The taps to the left, `(reach, in, out)`, and the centre tap, `(in, out)`, zeros where the kernel has none.
    """
    row = layer.visible_weight()[:, :, -1].permute(2, 1, 0)  # (columns, in, out)
    if num_channels > 1:
        order = torch.cat([group_rows(row.shape[2], num_channels, c, num_parts) for c in range(num_channels)])
        row = row[..., order.to(row.device)]
    return row[:reach], row[reach : reach + 1].sum(0)


def seen_by_channel(matrix: torch.Tensor, num_channels: int, lead: int = 0) -> list[torch.Tensor]:
    r"""
    Of matrices `(..., lead + in, out)` what each channel needs: its outputs, and as inputs the first `lead`, those of
    its own group and of earlier ones. A view for each channel.
    """
    inputs, outputs = (matrix.shape[-2] - lead) // num_channels, matrix.shape[-1] // num_channels
    return [matrix[..., : lead + (c + 1) * inputs, c * outputs : (c + 1) * outputs] for c in range(num_channels)]


def pointwise_weights(layer, num_channels: int, lead_with_bias: bool = False) -> list[torch.Tensor]:
    """[`pointwise_matrix`] as one matrix per channel: `((channel + 1) * in_group, out_group)`."""
    return seen_by_channel(pointwise_matrix(layer, lead_with_bias), num_channels, int(lead_with_bias))


def row_weights(
    layer, reach: int, num_channels: int, num_parts: int = 1
) -> tuple[list[torch.Tensor], list[torch.Tensor]]:
    r"""
    [`row_matrices`], a channel at a time.

    Returns:
        Two lists of matrices, one per channel. Left: `(reach * in + channel * in_group, out_group)`, the left taps and
        the centre tap's earlier groups, in memory order. Own: `(in_group, out_group)`, the centre tap's own group.
    """
    left, centre = row_matrices(layer, reach, num_channels, num_parts)
    in_group = centre.shape[0] // num_channels
    lefts, own = [], []
    for c, (left_c, centre_c) in enumerate(
        zip(left.flatten(0, 1).chunk(num_channels, 1), centre.chunk(num_channels, 1), strict=True)
    ):
        lefts.append(torch.cat((left_c, centre_c[: c * in_group])))
        own.append(centre_c[c * in_group : (c + 1) * in_group].contiguous())
    return lefts, own


def stack_layers(per_layer: Sequence[list[torch.Tensor]]) -> list[torch.Tensor]:
    """`[layer][channel]` matrices to one `(layers, in, out)` tensor per channel."""
    return [torch.stack(matrices) for matrices in zip(*per_layer, strict=True)]


__all__ = [
    "changed_methods",
    "check_as_built",
    "classes_by_name",
    "device_of",
    "group_rows",
    "on_one_device",
    "pointwise_matrix",
    "pointwise_weights",
    "row_matrices",
    "row_weights",
    "seen_by_channel",
    "stack_layers",
]
