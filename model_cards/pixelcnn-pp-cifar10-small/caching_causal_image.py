r"""
What the sampling caches of all families share.

A cache computes each activation of a growing image once, when its last input becomes known: what depends on rows above
for a whole row when the row begins ([`~SamplingCache.start_row`]), the rest pixel by pixel and channel by channel
([`~SamplingCache.parameters`]). It is the network's forward pass in another order, so a whole image costs about as much
arithmetic as one forward. A family says what is computed in `compute_row` and `compute_pixel`. Whoever decides levels
asks for the parameters of each dimension; where nothing but the noise rule does, [`~SamplingCache.draw_row`] draws a
row without coming back to Python in between, if the device can replay captured steps.

All buffers are allocated once and written in place; every slice of them that a pixel needs is made once, too, because
making it costs as much as a small matrix product. Where steps are captured, a cache is kept for the next request of its
shape ([`sampling_cache`]), which writes its own weights and zeros into the same memory. A row of features lies as
`(..., (reach + width) * features)`, with zeros for the padding on its left: the taps that end at a pixel, then the
pixel's own groups, are one run of memory, so "all left taps and the earlier channels" is one matrix product.
"""

import contextlib
import weakref
from collections.abc import Callable, Hashable, Iterable

import torch
import torch.nn.functional as F
from transformers.utils import logging

from .masking_pixelcnn import feature_groups

logger = logging.get_logger(__name__)


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


CAPTURES = {"cuda": CUDAGraphCapture}  # by type of device; elsewhere operations are launched one by one
MOST_KEPT = 2  # caches a model: a request that is drawn in parts has a batch, and a smaller one at its end
kept_caches = weakref.WeakKeyDictionary()  # model to {shape: cache}


def group_rows(num_features: int, num_channels: int, channel: int, num_parts: int = 1) -> torch.Tensor:
    """Indices of the features that belong to a channel, in order."""
    return (feature_groups(num_features, num_channels, num_parts) == channel).nonzero().flatten()


def pointwise_weights(layer, num_channels: int, lead_with_bias: bool = False) -> list[torch.Tensor]:
    r"""
    A 1×1 layer as one matrix a channel: `((channel + 1) * in_group, out_group)`, from the groups it may see.

    `lead_with_bias` puts the bias before the first row, for inputs that begin with a constant 1.
    """
    weight = layer.visible_weight()[:, :, 0, 0]
    in_group = weight.shape[1] // num_channels
    matrices = [rows[:, : (c + 1) * in_group].T for c, rows in enumerate(weight.chunk(num_channels))]
    if lead_with_bias:
        biases = layer.bias.chunk(num_channels)
        return [torch.cat((bias[None], matrix)) for bias, matrix in zip(biases, matrices, strict=True)]
    return [matrix.contiguous() for matrix in matrices]


def row_weights(
    layer, reach: int, num_channels: int, num_parts: int = 1
) -> tuple[list[torch.Tensor], list[torch.Tensor]]:
    r"""
    The centre row of a causal kernel, a channel at a time.

    Returns:
        Two lists of matrices, one a channel. Known: `(reach * in + channel * in_group, out_group)`, the left taps and
        the centre tap's earlier groups, in memory order. Own: `(in_group, out_group)`, the centre tap's own group.
    """
    row = layer.visible_weight()[:, :, -1]  # (out, in, columns)
    in_group = row.shape[1] // num_channels
    known, own = [], []
    for c in range(num_channels):
        weight = row[group_rows(row.shape[0], num_channels, c, num_parts).to(row.device)]
        left = weight[:, :, :reach].permute(2, 1, 0).flatten(0, 1)
        centre = weight[:, :, reach : reach + 1].sum(-1).T  # zeros where the kernel has no centre tap
        known.append(torch.cat((left, centre[: c * in_group])))
        own.append(centre[c * in_group : (c + 1) * in_group].contiguous())
    return known, own


def stack_layers(per_layer: list[list[torch.Tensor]]) -> list[torch.Tensor]:
    """`[layer][channel]` matrices to one `(layers, in, out)` tensor a channel."""
    return [torch.stack(matrices) for matrices in zip(*per_layer, strict=True)]


class SamplingCache:
    r"""
    Input rows, first-layer taps on rows above, and head.

    Args:
        model: A `...ForCausalImageModeling`.
        batch (`int`), width (`int`): Images and columns.

    The constructor of a family takes `class_ids`, as in `forward`, after these.
    """

    def __init__(self, model, batch: int, width: int):
        config = model.config
        self.batch, self.width = batch, width
        self.num_channels, self.num_groups = config.num_channels, config.num_channel_groups
        self.reach = config.kernel_size // 2
        self.first_reach = config.first_kernel_size // 2
        self.factory = {"dtype": model.dtype, "device": model.device}
        self.capture = CAPTURES[model.device.type](model.device) if model.device.type in CAPTURES else None
        self.has_run, self.replays = set(), {}
        self.phase = 0  # rows of different phases compute different things
        self.tensors = []  # all memory that a step reads or writes, see `renew`

        self.tables = self.keep(model.model.encoding.table(**self.factory)).unbind(0)  # a channel: (levels, features)
        self.input_group = model.model.encoding.features
        self.input_size = self.num_channels * self.input_group
        self.input_row = self.zeros(batch, (self.first_reach + width) * self.input_size)
        pixels = self.input_row[:, self.first_reach * self.input_size :]
        self.input_slots = pixels.split(self.input_group, dim=1)  # one a dimension of the row
        self.input_above = self.zeros(batch, self.first_reach, width, self.input_size)

        self.hidden_group = config.hidden_size // self.num_groups
        self.outputs = self.zeros(batch, model.output_distribution.num_parameters)
        self.distribution = distribution = model.output_distribution
        self.pixel_parameters = distribution.pixels(distribution.parameters(self.outputs[:, :, None, None]))[:, 0, 0]
        dims = width * self.num_channels
        self.row_noise = torch.zeros(dims, batch, dtype=torch.float64, device=model.device)
        self.row_levels = torch.zeros(batch, dims, dtype=torch.long, device=model.device)
        channels = [n % self.num_channels for n in range(dims)]
        previous = [self.row_levels[:, n - c : n] for n, c in enumerate(channels)]
        self.draws = list(zip(channels, self.row_noise.unbind(0), previous, self.row_levels.unbind(1), strict=True))
        self.hidden = self.zeros(batch, config.hidden_size)  # residual stream after the last layer
        self.prepare_head(model.head)

    def zeros(self, *shape: int) -> torch.Tensor:
        """A buffer."""
        self.tensors.append(torch.zeros(*shape, **self.factory))
        return self.tensors[-1]

    def keep(self, prepared: torch.Tensor | Iterable):
        """A buffer or prepared weights, or lists of them, in memory of the cache's own."""
        if not isinstance(prepared, torch.Tensor):
            return [self.keep(part) for part in prepared]
        own = prepared.clone()
        self.tensors.append(own)
        return own

    def renew(self, fresh: "SamplingCache"):
        """Become equal to a cache that was just made with the same sizes; captured steps stay valid."""
        for own, new in zip(self.tensors, fresh.tensors, strict=True):
            own.copy_(new)

    def prepare_head(self, head):
        relus = [self.zeros(self.batch, layer.in_channels) for layer in head.layers]
        streams = [self.hidden, *relus[1:], self.outputs]  # what a layer reads, and the last one writes
        weights = self.keep(pointwise_weights(layer, self.num_groups) for layer in head.layers)
        biases = self.keep(layer.bias.chunk(self.num_groups) for layer in head.layers)
        self.head_steps = [
            [
                (
                    self.own_group(streams[i], c),
                    self.own_group(relus[i], c),
                    biases[i][c],
                    relus[i][:, : (c + 1) * relus[i].shape[1] // self.num_groups],
                    weights[i][c],
                    self.own_group(streams[i + 1], c),
                )
                for i in range(len(head.layers))
            ]
            for c in range(self.num_groups)
        ]

    def own_group(self, features: torch.Tensor, channel: int, start: int = 0) -> torch.Tensor:
        """The features of one channel, of all features from `start` on."""
        group = (features.shape[-1] - start) // self.num_groups
        return features[..., start + channel * group : start + (channel + 1) * group]

    def known_inputs(self, column: int, channel: int) -> torch.Tensor:
        """Encoded pixels to the left and earlier channels of this one, `(batch, taps)`."""
        start = column * self.input_size
        return self.input_row[:, start : start + self.first_reach * self.input_size + channel * self.input_group]

    def shift_input_rows(self):
        """The row just finished becomes the nearest row above; before the first row, zeros do."""
        finished = self.input_row[:, self.first_reach * self.input_size :].unflatten(1, (self.width, self.input_size))
        for i in range(self.first_reach - 1):
            self.input_above[:, i] = self.input_above[:, i + 1]
        if self.first_reach:
            self.input_above[:, -1] = finished

    def rows_above(self, rows: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor:
        """One row of a convolution: `(batch, rows, width, in)` to `(batch, width, out)`."""
        out = F.conv2d(rows.permute(0, 3, 1, 2), weight, bias, padding=(0, weight.shape[-1] // 2))
        return out[:, :, 0].transpose(1, 2)

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
        self.run("row", self.compute_row)

    def parameters(self, column: int, channel: int) -> torch.Tensor:
        """Parameters of the pixel; those of `channel` are valid. Channels and columns must be asked for in order."""
        if channel < self.num_groups:  # with a single group the first channel has put out all
            self.run((column, channel, self.phase), lambda: self.compute_parameters(column, channel))
        return self.pixel_parameters

    def draw_row(self, row: int, noise: torch.Tensor) -> torch.Tensor:
        r"""
        Draw a row by the noise rule.

        Args:
            row (`int`): Its number; rows must be asked for in order.
            noise (`torch.DoubleTensor` of shape `(width * channels, batch)`): One number in [0, 1) a dimension.

        Returns:
            `torch.LongTensor` of shape `(batch, width * channels)`: levels, valid until the next row is drawn.
        """
        self.start_row(row)
        self.row_noise.copy_(noise)
        self.run(("draw", self.phase), self.compute_draws)
        return self.row_levels

    def compute_draws(self):
        """All draws of a row; may be recorded and replayed, as `compute_row`."""
        for n, (channel, noise, previous, levels) in enumerate(self.draws):
            column = n // self.num_channels
            if channel < self.num_groups:
                self.compute_parameters(column, channel)
            levels.copy_(self.distribution.icdf(self.pixel_parameters, channel, noise, previous))
            self.observe(column, channel, levels)

    def compute_parameters(self, column: int, channel: int):
        self.compute_pixel(column, channel)
        for source, relu, bias, seen, weight, target in self.head_steps[channel]:
            torch.clamp_min(source, 0, out=relu)
            torch.addmm(bias, seen, weight, out=target)

    def compute_row(self):
        """What depends on finished rows only. No Python state may change: this may be recorded and replayed."""
        raise NotImplementedError

    def compute_pixel(self, column: int, channel: int):
        """The residual stream of one channel of one pixel, into `self.hidden`; may be recorded likewise."""
        raise NotImplementedError

    def observe(self, column: int, channel: int, levels: torch.Tensor):
        """Take in the levels `(batch,)` that were drawn or given for one dimension."""
        features = self.tables[channel].index_select(0, levels.clamp_min(0))  # -1: broken, and noticed at the end
        self.input_slots[column * self.num_channels + channel].copy_(features)


@contextlib.contextmanager
def sampling_cache(model, batch: int, width: int, class_ids: torch.Tensor | None, keep: bool):
    r"""
    A [`SamplingCache`] that is ready for the first row.

    With `keep`, where steps are captured, it is one of an earlier request of the same shape, if there was one; its
    memory stays in use until `model` is deleted, or has drawn `MOST_KEPT` other shapes. Nobody else gets it meanwhile,
    and one whose request was interrupted is not used again.
    """
    cache = model.sampling_cache_class(model, batch, width, class_ids)
    if cache.capture is None or not keep:
        yield cache
        return
    kept = kept_caches.setdefault(model, {})
    key = (batch, width, cache.factory["dtype"], cache.factory["device"], tuple(x.shape for x in cache.tensors))
    earlier = kept.pop(key, None)
    if earlier is not None:
        earlier.renew(cache)
        cache = earlier
    yield cache
    kept[key] = cache
    for oldest in list(kept)[:-MOST_KEPT]:  # other threads may draw with this model, too
        kept.pop(oldest, None)


__all__ = ["SamplingCache", "group_rows", "pointwise_weights", "row_weights", "sampling_cache", "stack_layers"]
