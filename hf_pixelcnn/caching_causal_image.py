r"""
What the sampling caches of all families share.

A cache computes each activation of a growing image once, when its last input becomes known: what depends on rows above
for a whole row when the row begins ([`~SamplingCache.start_row`]), the rest pixel by pixel and channel by channel
([`~SamplingCache.parameters_at`]). It is the network's forward pass in another order, so a whole image costs about as
much arithmetic as one forward. Callers that choose levels themselves (logits processors, the codec) ask for the
parameters one dimension at a time. Plain sampling uses [`~SamplingCache.draw_pixels`], which draws a whole row in one
call, captured where the device can replay it. A [`SpanCache`] also draws several pixels at once.

[`SamplingCache`] knows no network; [`ForwardCache`], the default of a family, runs forward passes; the fast caches
derive from [`EncodedRowCache`], those of networks that begin with a k×k convolution from [`MaskedConvCache`].

All buffers are allocated once and written in place; every slice of them that a pixel needs is made once, too, because
making it costs as much as a small matrix product. Where steps are captured, a cache is kept for the next request of its
shape ([`sampling_cache`]), which writes its own weights and zeros into the same memory. A row of features lies as
`(..., (reach + width) * features)`, with zeros for the padding on its left: the taps that end at a pixel, then the
pixel's own groups, are one run of memory, so "all left taps and the earlier channels" is one matrix product.
"""

import contextlib
import copy
import weakref
from collections.abc import Callable, Hashable, Iterable, Iterator, Sequence
from functools import partial
from itertools import pairwise
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import nn
from torch.nn.utils import parametrize
from transformers.utils import logging

from .adapters_causal_image import unwrapped
from .masking_causal_image import feature_groups

logger = logging.get_logger(f"transformers.{__name__}")  # where `transformers.logging.set_verbosity` reaches


class CUDAGraphCapture:
    r"""
    Records calls as CUDA graphs, so that all their operations are one launch. While they are recorded nothing runs.

    All graphs share one pool of memory: they are replayed one after the other, and nothing but the buffers that they
    were recorded with outlives a replay.
    """

    def __init__(self, device: torch.device):
        self.stream, self.pool = torch.cuda.Stream(device), torch.cuda.graph_pool_handle()

    def __call__(self, call: Callable[[], None]) -> Callable[[], None]:
        graph = torch.cuda.CUDAGraph()
        current = torch.cuda.current_stream(self.stream.device)
        self.stream.wait_stream(current)
        with torch.cuda.stream(self.stream):
            graph.capture_begin(self.pool, capture_error_mode="thread_local")  # other threads may use the GPU
            try:
                call()
            finally:
                graph.capture_end()
        current.wait_stream(self.stream)
        return graph.replay


ALL = -1  # in place of a channel: all of them at once
CAPTURES = {"cuda": CUDAGraphCapture}  # by type of device; elsewhere operations are launched one by one
MOST_KEPT = 2  # caches per model: a request that is drawn in parts has a batch, and a smaller one at its end
kept_caches = weakref.WeakKeyDictionary()  # model to {shape: cache}


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
    known = hasattr(module, "_hf_hook") or hasattr(module, "_orig_mod")  # accelerate moves tensors; `torch.compile`
    return bool(module._forward_pre_hooks or module._forward_hooks or ("forward" in vars(module) and not known))


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
    for name, module_class in model.classes_as_built.items():
        what = None
        if name not in found:
            what = "is gone"
        elif class_within(found[name]) is not module_class:
            outer = type(found[name][0])
            what = f"is a {outer.__module__}.{outer.__name__}, not a {module_class.__name__}"
        elif any(is_hooked(module) for module in found[name]):
            what = "has hooks"
        if what:
            raise ValueError(
                "The cached sampler and the codec compute with the weights of layers as the model was built, but "
                f"`{name}` {what}: use `sampler='naive'`, merge adapters into the weights, or undo the change."
            )


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


class SamplingCache:
    r"""
    Memory, captured steps and drawing, whatever the network is. A family says in `compute_row` and `compute_parameters`
    what is computed. Some caches also compute the rest of a row at once, see [`SpanCache`].

    Args:
        model: A `...ForCausalImageModeling`.
        batch (`int`), height (`int`), width (`int`): Images, rows and columns.
        class_ids (`torch.LongTensor` of shape `(batch,)`, *optional*): As in `forward`.

    Attributes:
        reads_weights (`bool`): Whether it computes with the weights of layers, which then must be in one place.
        columns_at_once (`int`): The most columns of a row that it computes in one pass, see [`SpanCache`].
    """

    reads_weights = False
    columns_at_once = 1

    def __init__(self, model, batch: int, height: int, width: int, class_ids: torch.Tensor | None = None):
        self.batch, self.height, self.width = batch, height, width
        self.num_channels, self.num_groups = model.config.num_channels, model.config.num_channel_groups
        device = device_of(model)
        self.factory = {"dtype": model.dtype, "device": device}
        self.capture = CAPTURES[device.type](device) if device.type in CAPTURES else None
        self.has_run, self.replays = set(), {}
        self.row, self.phase = 0, 0  # rows of different phases compute different things
        self.tensors = []  # all memory that a step reads or writes, see `renew`

        self.distribution = distribution = model.output_distribution
        self.output_rows = self.zeros(self.columns_at_once * batch, distribution.num_parameters)
        self.outputs = self.output_rows[:batch]  # of the pixel in work
        self.pixel_parameters = self.parameters_of(self.outputs)
        dims = width * self.num_channels
        self.row_noise = torch.zeros(dims, batch, dtype=torch.float64, device=device)
        self.row_levels = torch.zeros(batch, dims, dtype=torch.long, device=device)
        self.draws = [self.dimensions_at_once(n) for n in range(0, dims, self.num_channels // self.num_groups)]

    def dimensions_at_once(self, first: int) -> tuple[int, torch.Tensor, torch.Tensor, torch.Tensor]:
        """A channel of the row's dimension; of those that its parameters give: noise, earlier levels, and levels."""
        channel, end = first % self.num_channels, first + self.num_channels // self.num_groups
        previous, levels = self.row_levels[:, first - channel : first], self.row_levels[:, first:end]
        return channel, self.row_noise[first:end], previous, levels

    def parameters_of(self, outputs: torch.Tensor) -> torch.Tensor:
        """Network outputs `(n, num_parameters)` as parameters of n pixels."""
        return self.distribution.pixels(self.distribution.from_outputs(outputs[:, :, None, None]))[:, 0, 0]

    def zeros(self, *shape: int) -> torch.Tensor:
        """A buffer."""
        self.tensors.append(torch.zeros(*shape, **self.factory))
        return self.tensors[-1]

    def keep(self, prepared: torch.Tensor) -> torch.Tensor:
        """A buffer or prepared weights in memory of the cache's own."""
        self.tensors.append(prepared.clone())
        return self.tensors[-1]

    def keep_all(self, prepared: Iterable[torch.Tensor]) -> list[torch.Tensor]:
        """Each of several."""
        return [self.keep(part) for part in prepared]

    def renew(self, fresh: "SamplingCache"):
        """Become equal to a cache that was just made with the same sizes; captured steps stay valid."""
        for own, new in zip(self.tensors, fresh.tensors, strict=True):
            own.copy_(new)

    def run(self, key: Hashable, call: Callable[[], None]):
        r"""
        Run a call that works on the same tensors each time: the first time as it is, the second time it is captured,
        if the device can do that, and replayed from then on.
        """
        if self.capture is not None and key in self.has_run and key not in self.replays:
            try:
                self.replays[key] = self.capture(call)
            except RuntimeError as error:
                logger.warning_once(f"Sampling launches every operation by itself, which is slower: {error}")
                self.capture = None
        self.has_run.add(key)
        self.replays.get(key, call)()

    def start_row(self, row: int):
        """Compute all that depends on finished rows only. Call before the first pixel of each row, in order."""
        self.row = row
        self.run("row", self.compute_row)

    def parameters_at(self, column: int, channel: int) -> torch.Tensor:
        """Parameters of the pixel; those of `channel` are valid. Channels and columns must be asked for in order."""
        if channel < self.num_groups:  # with a single group the first channel has given all
            self.run((column, channel, self.phase), lambda: self.compute_parameters(column, channel))
        return self.pixel_parameters

    def draw_pixels(self, start: int, stop: int):
        r"""
        Draw columns of a row into `row_levels` `(batch, width * channels)` by the noise rule, pixel by pixel, by the
        numbers in `row_noise` `(width * channels, batch)`.
        """
        self.run(("draw", start, stop, self.phase), lambda: self.compute_draws(start, stop))

    def compute_draws(self, start: int, stop: int):
        """All draws of some columns; may be recorded and replayed, as `compute_row`."""
        for n in range(start * self.num_groups, stop * self.num_groups):
            column, (first, noise, previous, levels) = n // self.num_groups, self.draws[n]
            self.compute_parameters(column, first)
            levels.copy_(self.distribution.draw_channels(self.pixel_parameters, noise, previous))
            for channel, level in enumerate(levels.unbind(1), start=first):
                self.observe(column, channel, level)

    def compute_row(self):
        """What depends on finished rows only. No Python state may change: this may be recorded and replayed."""
        raise NotImplementedError

    def compute_parameters(self, column: int, channel: int):
        """The network's outputs for one channel of one pixel, into `self.outputs`; may be recorded likewise."""
        raise NotImplementedError

    def observe(self, column: int, channel: int, levels: torch.Tensor):
        """Take in the levels `(batch,)` that were drawn or given for one dimension."""
        raise NotImplementedError


class ForwardCache(SamplingCache):
    """
    Right for every family and fast for none: a forward pass on the rows that a row can see, for every pixel and channel
    group. It calls the model, so hooks act and it works where weights are offloaded.
    """

    def __init__(self, model, batch, height, width, class_ids=None):
        super().__init__(model, batch, height, width, class_ids)
        self.capture = None  # every row has a shape of its own
        self.model, self.class_ids = model, class_ids
        # Levels of the rows that the row in work can see, its own at `place`, and below it those that are still 0.
        self.place = -1
        self.rows = torch.zeros(batch, self.num_channels, 0, width, dtype=torch.long, device=self.outputs.device)

    def compute_row(self):
        model = self.model.model
        above = self.row - model.first_row_seen(self.row)
        below = self.height - self.row - 1 if model.reads_image_size else 0
        earlier = self.rows[:, :, : self.place + 1]
        self.rows = F.pad(earlier[:, :, earlier.shape[2] - above :], (0, 0, 0, 1 + below))
        self.place = above

    def compute_parameters(self, column, channel):
        parameters, _ = self.model.distribution_parameters(self.rows, self.class_ids)
        pixels = self.distribution.pixels(parameters)[:, self.place, column]
        self.pixel_parameters = pixels.to(self.outputs.device)

    def observe(self, column, channel, levels):
        self.rows[:, channel, self.place, column] = levels.clamp_min(0)  # -1: broken, and noticed at the end


class EncodedRowCache(SamplingCache):
    r"""
    What caches that compute activations one by one share: the encoded pixels of the row in work, and the head.

    A network's residual stream after the last layer is to be written into `self.hidden` by `compute_pixel`.

    Args:
        model, batch, height, width, class_ids: As for all caches.
        pixels_left (`int`): Zero pixels kept to the left of the row, as many as the first layer's kernel reaches.
    """

    reads_weights = True

    def __init__(self, model, batch, height, width, class_ids=None, *, pixels_left: int):
        super().__init__(model, batch, height, width, class_ids)
        encoding, self.pixels_left = model.model.encoding, pixels_left
        self.table = self.keep(encoding.table(**self.factory))  # (channels, levels, features)
        self.tables = self.table.unbind(0)
        self.input_group = encoding.features_per_channel
        self.input_size = self.num_channels * self.input_group
        self.input_row = self.zeros(batch, (pixels_left + width) * self.input_size)
        pixels = self.input_row[:, pixels_left * self.input_size :]
        self.finished_row = pixels.unflatten(1, (width, self.input_size))  # as soon as its last level is known
        self.input_slots = pixels.split(self.input_group, dim=1)  # one per dimension of the row
        self.hidden_group = model.config.hidden_size // self.num_groups
        self.activation = model.head.activation
        self.prepare_head(model.head.layers)

    def prepare_head(self, layers):
        """Memory and weights of the head, and the steps of a pixel."""
        sizes = [layer.in_channels for layer in layers]
        memory = [self.zeros(self.columns_at_once * self.batch, size) for size in sizes]
        self.head_streams = [*memory, self.output_rows]
        self.hidden = self.head_streams[0][: self.batch]
        self.head_weights = [self.matrices_by_channel(self.keep(pointwise_matrix(layer))) for layer in layers]
        self.head_biases = [self.keep(layer.bias) for layer in layers]
        self.head_steps = [self.head_step(1, c) for c in range(self.num_groups)]

    def head_step(self, columns: int, channel: int) -> list[tuple[torch.Tensor, ...]]:
        """Of each layer of the head: input group, bias, what the layer sees, weight, output group."""
        streams = [memory[: columns * self.batch] for memory in self.head_streams]
        return [
            (
                self.own_group(stream, channel),
                self.own_group(self.head_biases[i], channel),
                stream[:, : self.head_weights[i][channel].shape[0]],
                self.head_weights[i][channel],
                self.own_group(next_stream, channel),
            )
            for i, (stream, next_stream) in enumerate(pairwise(streams))
        ]

    def matrices_by_channel(self, matrix: torch.Tensor, lead: int = 0) -> list[torch.Tensor]:
        """[`seen_by_channel`]; last the matrix of `ALL` channels at once."""
        parts = seen_by_channel(matrix, self.num_groups, lead)
        return parts if self.num_groups == 1 else [*parts, matrix]

    def own_group(self, features: torch.Tensor, channel: int, start: int = 0) -> torch.Tensor:
        """The features of one channel, or of `ALL`, of all features from `start` on."""
        if channel == ALL:
            return features[..., start:]
        group = (features.shape[-1] - start) // self.num_groups
        return features[..., start + channel * group : start + (channel + 1) * group]

    def seen_inputs(self, column: int, channel: int) -> torch.Tensor:
        """Encoded pixels to the left and earlier channels of this one, `(batch, taps)`."""
        start = column * self.input_size
        return self.input_row[:, start : start + self.pixels_left * self.input_size + channel * self.input_group]

    def convolve_rows(self, rows: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor:
        """One row of a convolution: `(batch, rows, width, in)` to `(batch, width, out)`."""
        out = F.conv2d(rows.permute(0, 3, 1, 2), weight, bias, padding=(0, weight.shape[-1] // 2))
        return out[:, :, 0].transpose(1, 2)

    def compute_parameters(self, column, channel):
        self.compute_pixel(column, channel)
        self.compute_head(self.head_steps[channel])

    def compute_head(self, step: list[tuple[torch.Tensor, ...]]):
        """The head's outputs, from `self.hidden` on."""
        for own, bias, seen, weight, target in step:
            self.activation(own, inplace=True)
            torch.addmm(bias, seen, weight, out=target)

    def compute_pixel(self, column: int, channel: int):
        """The residual stream of one channel of one pixel, into `self.hidden`; may be recorded and replayed."""
        raise NotImplementedError

    def observe(self, column, channel, levels):
        features = self.tables[channel].index_select(0, levels.clamp_min(0))  # -1: broken, and noticed at the end
        self.input_slots[column * self.num_channels + channel].copy_(features)


class MaskedConvCache(EncodedRowCache):
    """What networks share whose first layer is a k×k convolution: the encoded rows above the row in work."""

    def __init__(self, model, batch, height, width, class_ids=None):
        self.first_reach = model.config.first_kernel_size // 2
        super().__init__(model, batch, height, width, class_ids, pixels_left=self.first_reach)
        self.input_above = self.zeros(batch, self.first_reach, width, self.input_size)

    def shift_input_rows(self):
        """The row just finished becomes the nearest row above; before the first row, zeros do."""
        for i in range(self.first_reach - 1):
            self.input_above[:, i] = self.input_above[:, i + 1]
        self.input_above[:, -1] = self.finished_row


class PassCosts(NamedTuple):
    r"""
    What a pass over some columns of a row costs on a type of device, in steps of a pixel of as many operations: `fixed
    + columns * batch * features² / products`, with the features that k×k kernels read. On a CPU measured with networks
    of 32 to 80 such features; rather too high than too low.
    """

    fixed: float
    products: float


PASS_COSTS = {"cpu": PassCosts(1.8, 1e5)}
OTHER_PASS_COSTS = PassCosts(1.8, 1e7)  # where a call costs much more than what it computes; not measured


class SpanCache(EncodedRowCache):
    r"""
    What caches share that compute a *span* of a row at once: `ALL` channels of the columns from one on to the row's
    end. A single pixel is a span of one column, and mostly of one channel.

    So several columns can be drawn from one pass: guess the rest of the row, compute the parameters of all its
    dimensions, decide all, and keep everything up to the first that is not as guessed. That one included, each has been
    decided from its true past, the rows above being finished (Jacobi iteration within a row, Gauss-Seidel iteration
    over rows: Song et al. 2021, section 4.3, https://huggingface.co/papers/2002.03629).

    Attributes:
        calls_of_pass (`float`): Operations of a pass for each operation of a pixel.
        phases_share_steps (`bool`): Whether what is prepared for some columns serves rows of every phase.
    """

    calls_of_pass = 1.0
    phases_share_steps = False

    def __init__(self, model, batch, height, width, class_ids=None, **options):
        self.pass_costs = PASS_COSTS.get(device_of(model).type, OTHER_PASS_COSTS)
        self.products_per_column = batch * self.kernel_features(model.config) ** 2
        if self.pass_cost(width) < width:
            self.columns_at_once = width
        super().__init__(model, batch, height, width, class_ids, **options)
        self.steps, self.rests = {}, {}
        dims, device = width * self.num_channels, self.outputs.device
        self.dimensions = torch.arange(dims, device=device)
        self.first_change = torch.full((), dims, device=device)
        self.table_rows = torch.arange(self.num_channels, device=device) * self.table.shape[1]
        self.drawn = torch.zeros_like(self.row_levels)

    def kernel_features(self, config) -> int:
        """Features that k×k kernels read after the first layer."""
        return config.hidden_size

    def pass_cost(self, columns: int) -> float:
        """What a pass over so many columns costs, in steps of a pixel."""
        return (
            self.pass_costs.fixed * self.calls_of_pass + columns * self.products_per_column / self.pass_costs.products
        )

    def compute_pixel(self, column, channel):
        self.compute_span(column, column + 1, channel)

    def step(self, start: int, stop: int, channel: int):
        """[`~SpanCache.prepare_step`], once for rows of a phase, or of all phases."""
        key = (start, stop, channel, None if self.phases_share_steps else self.phase)
        if key not in self.steps:
            self.steps[key] = self.prepare_step(start, stop, channel)
        return self.steps[key]

    def prepare_step(self, start: int, stop: int, channel: int):
        """All slices and matrices that `compute_span` needs."""
        raise NotImplementedError

    def compute_span(self, start: int, stop: int, channel: int):
        """
        The residual stream of one channel, or of `ALL`, of some columns, into `self.head_streams[0]`; may be recorded.
        """
        raise NotImplementedError

    def rest(self, start: int):
        """What a pass from a column on needs: head and parameters; noise `(channels, columns, batch)`, and levels."""
        if start not in self.rests:
            columns = self.width - start
            parameters = self.parameters_of(self.output_rows[: columns * self.batch])
            pixels = (self.width, self.num_channels)
            self.rests[start] = (
                self.head_step(columns, ALL),
                parameters.unflatten(0, (columns, self.batch)),
                self.row_noise.unflatten(0, pixels)[start:].transpose(0, 1),
                self.drawn.unflatten(1, pixels)[:, start:].transpose(0, 1),
            )
        return self.rests[start]

    def compute_rest(self, start: int):
        """The network's outputs for all dimensions from a column on; may be recorded."""
        head, *_ = self.rest(start)
        self.compute_span(start, self.width, ALL)
        self.compute_head(head)

    def compute_rest_draws(self, start: int, open_column: int):
        """A pass from a column on, decisions by the noise rule included; may be recorded."""
        self.compute_rest(start)
        _, parameters, noise, levels = self.rest(start)
        levels.copy_(self.distribution.draw_channels(parameters, noise, levels[..., :0]))
        self.take_rest(open_column, self.drawn[:, open_column * self.num_channels :])

    def first_of_pass(self, open_column: int) -> int:
        """Where a pass begins, at few different columns; what is recorded has one shape only."""
        return 0 if self.capture is not None else open_column // 8 * 8

    def draw_rest(self, open_column: int) -> int:
        """Draw by one pass from an open column on, by the numbers in `row_noise`; returns what is open then."""
        start = self.first_of_pass(open_column)
        if self.capture is not None:
            open_column = 0
        self.run(("rest", start, self.phase), lambda: self.compute_rest_draws(start, open_column))
        return self.open_column()

    def parameters_from(self, start: int) -> torch.Tensor:
        """Parameters `(batch, columns, ...)` of the pixels from a column on, by one pass."""
        self.run(("parameters", start, self.phase), lambda: self.compute_rest(start))
        _, parameters, *_ = self.rest(start)
        return parameters.transpose(0, 1)

    def take_rest(self, start: int, levels: torch.Tensor):
        """Take in what is decided from a column on, `(batch, dims)`, and note the first dimension that has changed."""
        own = self.row_levels[:, start * self.num_channels :]
        positions = torch.where(levels != own, self.dimensions[start * self.num_channels :], len(self.dimensions))
        torch.amin(positions, (0, 1), out=self.first_change)
        self.observe_rest(start, levels)

    def observe_rest(self, start: int, levels: torch.Tensor):
        """Take in levels `(batch, dims)` from a column on, decided or guessed."""
        self.row_levels[:, start * self.num_channels :] = levels
        rows = levels.clamp_min(0)  # -1: broken, and noticed at the end
        if self.num_channels > 1:
            rows = rows.unflatten(1, (-1, self.num_channels)) + self.table_rows
        features = self.table.flatten(0, 1).index_select(0, rows.flatten())
        self.finished_row[:, start:] = features.view(self.batch, -1, self.input_size)

    def open_column(self) -> int:
        """
        The first column that the last pass has not drawn: after that of the first change, or, where a pixel's channels
        are predicted one by one, after the change.
        """
        change = int(self.first_change)
        return (change + 1) // self.num_channels if self.num_groups > 1 else change // self.num_channels + 1


class MaskedConvSpanCache(SpanCache, MaskedConvCache):
    """
    What caches of spans share whose layers are k×k kernels, of which the centre row is computed span by span.

    Features of a span lie as `(columns * batch, features)`: any columns of a row are one matrix.
    """

    def first_weights(self, conv, num_parts: int = 1, scale: torch.Tensor | float = 1) -> list[torch.Tensor]:
        """What each channel, and `ALL`, sees in the first layer's centre row, see `seen_windows`."""
        channels = self.num_groups
        left, centre = row_matrices(conv, self.first_reach, channels, num_parts)
        matrix = self.keep(torch.cat((left.flatten(0, 1), centre)) * scale)
        taps, outputs = len(matrix) - len(centre), matrix.shape[1] // channels
        own = [slice(c * outputs, (c + 1) * outputs) for c in range(channels)]
        parts = [matrix[: taps + c * self.input_group, own[c]] for c in range(channels)]
        return parts if channels == 1 else [*parts, matrix]

    def prepare_taps(
        self,
        convs: Sequence,
        size: tuple[int, int],
        reach: int,
        num_parts: int = 1,
        scale: torch.Tensor | float = 1,
    ):
        """
        The centre rows of layers of one `size`, in and out: left taps `(reach, layers, in, out)`; of the centre tap
        what each channel, and `ALL`, sees, `(layers, in, out)`.
        """
        left, centre = self.zeros(reach, len(convs), *size), self.zeros(len(convs), *size)
        for i, conv in enumerate(convs):
            left[:, i], centre[i] = row_matrices(conv, reach, self.num_groups, num_parts)
        left.mul_(scale)
        centre.mul_(scale)
        self.left, self.own = left, self.matrices_by_channel(centre)

    def tap_steps(
        self, start: int, stop: int, channel: int, above: torch.Tensor, sums: torch.Tensor, rows: torch.Tensor
    ) -> tuple[list[Callable], list[list]]:
        r"""
        The products of the centre rows of equal layers, see [`~MaskedConvSpanCache.prepare_taps`], for a span.

        Args:
            above (`torch.Tensor` of shape `(layers, width, batch, out)`): What rows above have given.
            sums (`(layers, columns * batch, out)`): Where the sums of the span go.
            rows (`(last layers, reach + width, batch, in)`, or more columns): Features of the row, zeros on its left.

        Returns:
            Calls for all layers and channels, when the first channel begins; of a single column they compute the left
            taps, which are known then. And of each of the last layers what is to be multiplied and added to its sum.
        """
        columns, reach = stop - start, len(self.left)
        above = above[:, start:stop]
        left = [rows[:, start + t : stop + t].flatten(1, 2) for t in range(reach)]
        own = self.own[channel]
        seen = rows[:, reach + start : reach + stop].flatten(1, 2)[..., : own.shape[1]]
        taps = [[pair] for pair in zip(seen, own, strict=True)]
        if columns == 1 and reach:
            sums, above = sums[len(sums) - len(rows) :], above[len(above) - len(rows) :, 0]
            knowns = [above, *[sums] * (reach - 1)]
            calls = [partial(torch.baddbmm, *args, out=sums) for args in zip(knowns, left, self.left, strict=True)]
        else:
            calls = [partial(sums.unflatten(1, (columns, self.batch)).copy_, above)]
            for t in range(reach):
                for i, pairs in enumerate(taps):
                    pairs.append((left[t][i], self.left[t, i]))
        return calls if channel in (0, ALL) else [], taps

    def of_span(self, memory: torch.Tensor, columns: int) -> torch.Tensor:
        """Of memory for all columns `(layers, columns_at_once * batch, features)` as much as a span needs, in a run."""
        layers, _, features = memory.shape
        return memory.flatten()[: layers * columns * self.batch * features].view(layers, -1, features)

    def seen_windows(self, start: int, stop: int, channel: int) -> torch.Tensor:
        """What [`~EncodedRowCache.seen_inputs`] gives; of several columns `(columns, batch, taps)`."""
        if channel == ALL:
            channel = self.num_channels if self.num_groups > 1 else 0
        taps = self.pixels_left * self.input_size + channel * self.input_group
        windows = self.input_row.unfold(1, taps, self.input_size)[:, start:stop].transpose(0, 1)
        return windows[0] if stop - start == 1 else windows


@contextlib.contextmanager
def sampling_cache(
    model, batch: int, height: int, width: int, class_ids: torch.Tensor | None, keep: bool
) -> Iterator[SamplingCache]:
    r"""
    A [`SamplingCache`] that is ready for the first row.

    With `keep`, where steps are captured, it is one of an earlier request of the same shape, if there was one; its
    memory stays in use until `model` is deleted, or has drawn `MOST_KEPT` other shapes. It is not shared while in use,
    and is discarded if the request raises.
    """
    source = on_one_device(model) if model.sampling_cache_class.reads_weights else model
    cache = model.sampling_cache_class(source, batch, height, width, class_ids)
    if cache.capture is None or not keep:
        yield cache
        return
    kept = kept_caches.setdefault(model, {})
    key = (batch, height, width, cache.factory["dtype"], cache.factory["device"], tuple(x.shape for x in cache.tensors))
    earlier = kept.pop(key, None)
    if earlier is not None:
        earlier.renew(cache)
        cache = earlier
    yield cache
    kept[key] = cache
    for oldest in list(kept)[:-MOST_KEPT]:  # other threads may draw with this model, too
        kept.pop(oldest, None)


__all__ = [
    "EncodedRowCache",
    "ForwardCache",
    "MaskedConvCache",
    "MaskedConvSpanCache",
    "SamplingCache",
    "SpanCache",
    "check_as_built",
    "classes_by_name",
    "device_of",
    "group_rows",
    "on_one_device",
    "pointwise_weights",
    "row_weights",
    "sampling_cache",
    "stack_layers",
]
