r"""
What the sampling caches of all families share.

A cache computes each activation of a growing image once, when its last input becomes known: what depends on rows above
for a whole row when the row begins ([`~SamplingCache.start_row`]), the rest pixel by pixel and channel by channel
([`~SamplingCache.parameters_at`]). It is the network's forward pass in another order, so a whole image costs about as
much arithmetic as one forward. Callers that choose levels themselves (logits processors, the codec) ask for the
parameters one dimension at a time. Plain sampling uses [`~SamplingCache.draw_pixels`], which draws a whole row in one
call, captured where the device can replay it. Caches of caching_spans_causal_image.py also draw several pixels at once.

[`SamplingCache`] knows no network; [`ForwardCache`], the default of a family, runs forward passes; the fast caches
derive from [`EncodedRowCache`], those of networks that begin with a k×k convolution from [`MaskedConvCache`].

All buffers are allocated once and written in place; every slice of them that a pixel needs is made once, too, because
making it costs as much as a small matrix product. Where steps are captured, a cache is kept for the next request of its
shape ([`sampling_cache`]), which writes its own weights and zeros into the same memory. A row of features lies as
`(..., (reach + width) * features)`, with zeros for the padding on its left: the taps that end at a pixel, then the
pixel's own groups, are one run of memory, so "all left taps and the earlier channels" is one matrix product.
"""

import contextlib
import weakref
from collections.abc import Callable, Hashable, Iterable, Iterator
from itertools import pairwise

import torch
import torch.nn.functional as F
from transformers.utils import logging

from .weights_causal_image import changed_methods, device_of, on_one_device, pointwise_matrix, seen_by_channel

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
        parameters = self.model.scored_parameters(self.rows, self.class_ids)
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


def cache_class_of(model) -> type[SamplingCache]:
    """
    The `sampling_cache_class` of a model; [`ForwardCache`] where its class changes what that computes, and does not
    name a cache itself.
    """
    cache_class = model.sampling_cache_class
    if cache_class is not ForwardCache and (changed := changed_methods(model)):
        logger.warning_once(
            f"`{changed[0]}` is not the method that {cache_class.__name__} was written for, so `sampler='cached'` and "
            f"the codec run forward passes, which is slow. If the logits are the same, say `sampling_cache_class = "
            f"{cache_class.__name__}` in {type(model).__name__}."
        )
        return ForwardCache
    return cache_class


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
    cache_class = cache_class_of(model)
    source = on_one_device(model) if cache_class.reads_weights else model
    cache = cache_class(source, batch, height, width, class_ids)
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
    "ALL",
    "EncodedRowCache",
    "ForwardCache",
    "MaskedConvCache",
    "SamplingCache",
    "cache_class_of",
    "sampling_cache",
]
