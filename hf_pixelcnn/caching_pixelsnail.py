r"""
The sampling cache of the PixelSNAIL.

Keys and values of a pixel need its own levels, which only later pixels may see. So a span begins with those of the
pixel before it, of all layers at once; those of its own pixels but the last follow layer by layer, from their guessed
levels, as soon as the layer has made its features.

A pixel attends to as many places as there are up to the end of its row, of which those that it must not see have a
score of minus infinity; so its operations do not depend on how many it sees. Place 0 is before the first pixel, which
alone sees it: its value is the zero that the attention of the first pixel should be. Pixel n has place n + 1.
"""

from collections.abc import Callable, Sequence
from functools import partial
from itertools import pairwise

import torch
import torch.nn.functional as F

from .caching_blocks_causal_image import CornerBlock, GatedBlockCache, columns, signed
from .weights_causal_image import pointwise_matrix

CAPTURED_PHASES = 4  # lengths of attention per image where steps are captured: each is recorded once
ALL_LAYERS = slice(None)


class PointwiseLayers:
    """A 1×1 layer of each of several layers of the network."""

    def __init__(self, cache: GatedBlockCache, layers: Sequence, scale: torch.Tensor | float = 1.0):
        self.weight = cache.keep(torch.stack([pointwise_matrix(layer) for layer in layers]) * scale)
        self.bias = cache.keep(torch.stack([layer.bias for layer in layers])[:, None] * scale)

    def call(self, x: torch.Tensor, out: torch.Tensor, layers: slice = ALL_LAYERS) -> Callable[[], object]:
        """What computes some layers, `(layers, columns, batch, in)` to `(layers, columns, batch, out)`."""
        return partial(torch.baddbmm, self.bias[layers], x.flatten(1, 2), self.weight[layers], out=out.flatten(1, 2))


class PointwiseBlocks:
    r"""
    A gated residual block of 1×1 kernels of each of several layers of the network.

    Args:
        cache ([`PixelSNAILCache`]): Sizes.
        blocks (sequence of [`GatedResidualBlock`]): One per layer.
        sizes (`list[int]`): Features of what they read: of x, and of something else where they do.
    """

    def __init__(self, cache: "PixelSNAILCache", blocks: Sequence, sizes: list[int]):
        weights, biases = [], []
        for block in blocks:
            layers = [block.conv_in] if len(sizes) == 1 else [block.conv_in, block.conv_other]
            weights.append(torch.cat([pointwise_matrix(layer) for layer in layers]))
            biases.append(sum(layer.bias for layer in layers))
        self.weight_in, self.bias_in = cache.keep(torch.stack(weights)), cache.keep(torch.stack(biases)[:, None])
        self.weight_out = cache.keep(torch.stack([pointwise_matrix(block.conv_out) for block in blocks]))
        bias_out = torch.stack([block.conv_out.bias for block in blocks])[:, None]  # (layers, 1, 2 * features)
        classes = [bias[:, 0] for block in blocks if (bias := cache.class_bias(block)) is not None]
        if classes:
            bias_out = bias_out + torch.stack(classes)  # (layers, batch, 2 * features)
        self.bias_out = cache.keep(bias_out)

        self.sizes, self.celu = sizes, cache.celu
        size = sizes[0]
        self.memory = [cache.memory(x, len(blocks)) for x in (2 * sum(sizes), size, 2 * size, 2 * size)]

    def calls(self, parts: list[torch.Tensor], out: torch.Tensor, layers: slice = ALL_LAYERS) -> list[Callable]:
        """What computes some layers, of which all tensors are `(layers, columns, batch, features)`."""
        depth, number = parts[0].shape[:2]
        inputs, t, celu_t, gated = (memory(depth, number) for memory in self.memory)
        flat_inputs, flat_t, flat_celu, flat_gated = (x.flatten(1, 2) for x in (inputs, t, celu_t, gated))
        value, gate = gated.chunk(2, dim=-1)
        both = inputs.split([2 * size for size in self.sizes], dim=-1)
        calls: list[Callable] = [call for pair in zip(parts, both, strict=True) for call in signed(*pair)]
        calls += [
            partial(F.elu_, inputs),
            partial(torch.baddbmm, self.bias_in[layers], flat_inputs, self.weight_in[layers], out=flat_t),
            *self.celu(t, celu_t),
        ]
        bias = self.bias_out[layers]
        if number > 1 and bias.shape[1] > 1:  # of each image another one
            calls.append(partial(gated.copy_, bias[:, None]))
            bias = flat_gated
        return [
            *calls,
            partial(torch.baddbmm, bias, flat_celu, self.weight_out[layers], out=flat_gated),
            gate.sigmoid_,
            partial(torch.addcmul, parts[0], value, gate, out=out),
        ]


class EarlierPixels:
    r"""
    Keys and values of earlier pixels, of all layers, and attention to them.

    Args:
        cache ([`PixelSNAILCache`]): Sizes.
        config ([`PixelSNAILConfig`]): Heads, and features of keys and values.
        layers (sequence of [`PixelSNAILLayer`]): Of the network.
        features (`torch.Tensor` of shape `(layers, width, batch, in)`): What keys and values are made of.
    """

    def __init__(self, cache: "PixelSNAILCache", config, layers: Sequence, features: torch.Tensor):
        depth, width, batch, in_channels = features.shape
        device, heads = features.device, config.num_attention_heads
        self.features, self.rows = features, batch * heads
        self.sizes = [config.key_size, config.value_size]
        key_size, value_size = (size // heads for size in self.sizes)
        self.width, places = width, 1 + cache.height * width
        self.keys = cache.zeros(depth, batch, heads, key_size, places)
        self.values = cache.zeros(depth, batch, heads, places, value_size)
        self.numbers, self.columns = torch.arange(places, device=device), torch.arange(width, device=device)
        self.places = torch.arange(width, device=device)  # of the pixels of the row
        cache.tensors.append(self.places)
        self.hidden = cache.zeros(width, places)  # what is added to scores

        blocks = [layer.attention.key_value_block for layer in layers]
        self.block = None if None in blocks else PointwiseBlocks(cache, blocks, [in_channels])
        self.block_out = cache.memory(in_channels, depth)
        self.key_value = PointwiseLayers(cache, [layer.attention.key_value for layer in layers])
        self.key_values = cache.memory(sum(self.sizes), depth)

    def start_row(self, row: torch.Tensor):
        """Note the places of a row, the number of which is `(1,)`, and what each of its pixels must not see."""
        torch.add(self.columns, row, alpha=self.width, out=self.places).add_(1)
        last = self.places[:, None] - 1  # place that a pixel sees
        is_hidden = (self.numbers > last) | (self.numbers < last.clamp(max=1))
        self.hidden.zero_().masked_fill_(is_hidden, -torch.inf)

    def see(self, num_places: int):
        """Let attention be to the first places."""
        self.seen = [
            (keys.flatten(0, 1)[..., :num_places], values.flatten(0, 1)[:, :num_places])
            for keys, values in zip(self.keys, self.values, strict=True)
        ]
        self.seen_hidden = self.hidden[:, :num_places]

    def add_calls(self, start: int, stop: int, layers: slice = ALL_LAYERS) -> list[Callable]:
        """What adds the keys and values that some layers have of some columns."""
        x = self.features[layers, start:stop]
        depth, number, batch, _ = x.shape
        calls = []
        if self.block is not None:
            out = self.block_out(depth, number)
            calls, x = self.block.calls([x], out, layers), out
        key_values, places = self.key_values(depth, number), self.places[start:stop]
        key, value = (
            part.unflatten(-1, (self.rows // batch, -1)).permute(0, 2, 3, 4, 1)  # (layers, batch, heads, size, columns)
            for part in key_values.split(self.sizes, dim=-1)
        )
        return [
            *calls,
            self.key_value.call(x, key_values, layers),
            partial(self.keys[layers].index_copy_, 4, places, key),
            partial(self.values[layers].index_copy_, 3, places, value.transpose(3, 4)),
        ]

    def attend(self, layer: int, query: torch.Tensor, start: int, stop: int, out: torch.Tensor):
        """Of the queries of some columns `(rows, columns, size)`, already scaled: `(rows, columns, value_size)`."""
        keys, values = self.seen[layer]
        scores = torch.baddbmm(self.seen_hidden[start:stop], query, keys)
        torch.bmm(scores.softmax(-1), values, out=out)


class Layer:
    r"""
    One layer of the network, span by span.

    Args:
        cache ([`PixelSNAILCache`]): Sizes.
        layer ([`PixelSNAILLayer`]): The layer.
        number (`int`): Which it is.
    """

    def __init__(self, cache: "PixelSNAILCache", layer, number: int):
        size, attention = cache.size, layer.attention
        self.cache, self.number, self.earlier = cache, number, cache.earlier
        self.query_in = cache.features[number : number + 1, :, :, cache.input_size :]
        self.stream = self.query_in[..., :size]
        last = partial(columns, self.stream[0].transpose(0, 1))
        spans = [partial(cache.stream, number), *(cache.scratch(size) for _ in layer.blocks[1:]), last]
        self.blocks = [
            CornerBlock(cache, block, cache.width, *pair)
            for block, pair in zip(layer.blocks, pairwise(spans), strict=True)
        ]
        block, query_size = attention.query_block, size + 2
        self.query_block = None if block is None else PointwiseBlocks(cache, [block], [query_size])
        self.block_out = cache.memory(query_size)
        key_size, value_size = self.earlier.sizes
        self.query = PointwiseLayers(cache, [attention.query], scale=self.earlier.keys.shape[3] ** -0.5)
        self.queries, self.attended = cache.memory(key_size), cache.memory(value_size)
        self.out_block = PointwiseBlocks(cache, [layer.out_block], [size, value_size])

    def start_row(self):
        for block in self.blocks:
            block.start_row()

    def calls(self, start: int, stop: int) -> list[Callable]:
        """What computes a span."""
        calls: list[Callable] = [call for block in self.blocks for call in block.calls(start, stop)]
        if stop - start > 1:
            calls += self.earlier.add_calls(start, stop - 1, slice(self.number, self.number + 1))
        query_in, number = self.query_in[:, start:stop], stop - start
        if self.query_block is not None:
            calls += self.query_block.calls([query_in], self.block_out(1, number))
            query_in = self.block_out(1, number)
        queries, attended = self.queries(1, number), self.attended(1, number)
        query, out = (x.reshape(number, self.earlier.rows, -1).transpose(0, 1) for x in (queries, attended))
        return [
            *calls,
            self.query.call(query_in, queries),
            partial(self.earlier.attend, self.number, query, start, stop, out),
            *self.out_block.calls(
                [self.stream[:, start:stop], attended], self.cache.streams[self.number + 1](1, number)
            ),
        ]


class PixelSNAILCache(GatedBlockCache):
    r"""
    Row by row the taps of 2×2 kernels on the row above, and what a pixel may see; span by span the rest of the kernels,
    and attention. `features` are of all layers what keys and values of the row are made of, [I, x, P].

    On a CPU, attention is as long as the image down to the row in work, elsewhere as the part of the image that the
    row lies in, so that steps that were captured serve several rows.
    """

    phases_share_steps = True  # a call looks up how long attention is

    def __init__(self, model, batch, height, width, class_ids=None):
        network = model.model
        super().__init__(model, batch, height, width, class_ids, in_above=network.in_above, in_left=network.in_left)
        layers, device = list(network.layers.children()), self.factory["device"]
        self.rows_per_phase = 1 if self.capture is None else -(-height // CAPTURED_PHASES)
        self.row_number = torch.zeros(1, dtype=torch.long, device=device)
        self.tensors.append(self.row_number)
        positions = network.positions(height, width, **self.factory)
        self.positions = self.keep(positions[0].permute(1, 2, 0))  # (height, width, 2)
        self.features = self.zeros(len(layers), width, batch, self.input_size + self.size + 2)
        self.images = self.features[..., : self.input_size]
        last = self.head_streams[0]
        self.streams = [self.memory(self.size) for _ in layers]
        self.streams.append(lambda depth, number: last[: number * batch].view(depth, number, batch, -1))
        self.earlier = EarlierPixels(self, model.config, layers, self.features)
        self.layers = [Layer(self, layer, i) for i, layer in enumerate(layers)]
        self.last_of_row = [self.image_call(width - 1, width), *self.earlier.add_calls(width - 1, width)]

    def memory(self, features: int, depth: int = 1) -> Callable[[int, int], torch.Tensor]:
        """Memory of a span in one layer, or of a pixel in `depth` layers: `(layers, columns, batch, features)`."""
        rows = self.zeros(max(depth, self.columns_at_once) * self.batch, features)
        return lambda depth, number: rows[: depth * number * self.batch].view(depth, number, self.batch, features)

    def stream(self, layer: int, start: int, stop: int) -> torch.Tensor:
        """What a layer reads of a span, as [`columns`] gives it."""
        return columns(self.streams[layer](1, stop - start)[0].transpose(0, 1), 0, stop - start)

    def image_call(self, start: int, stop: int) -> Callable[[], object]:
        """What takes in the levels of some columns, decided or guessed."""
        return partial(self.images[:, start:stop].copy_, self.finished_row[:, start:stop].transpose(0, 1))

    def start_row(self, row):
        self.row, self.phase = row, row // self.rows_per_phase
        self.earlier.see(1 + min(self.height, (self.phase + 1) * self.rows_per_phase) * self.width)
        self.row_number.fill_(row)
        self.run(("row", row == 0), self.compute_row)

    def compute_row(self):
        self.start_first_layer()
        if self.row > 0:
            for call in self.last_of_row:
                call()
        self.earlier.start_row(self.row_number)
        self.features[..., -2:] = self.positions.index_select(0, self.row_number)[0][:, None]
        for layer in self.layers:
            layer.start_row()

    def prepare_step(self, start, stop, channel):
        before = max(0, start - 1)
        calls: list[Callable] = [self.image_call(before, stop - 1)] if stop > 1 else []
        if start > 0:
            calls += self.earlier.add_calls(before, start)
        calls.append(self.first_layer(start, stop, self.stream(0, start, stop)))
        return [*calls, *(call for layer in self.layers for call in layer.calls(start, stop))]


__all__ = ["PixelSNAILCache"]
