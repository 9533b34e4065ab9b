r"""
The sampling cache of the PixelSNAIL.

Keys and values grow by one pixel at a time, those of all layers at once as soon as the pixel's last level is known. A
pixel attends to as many places as there are up to the end of its row, of which those not yet known have a score of
minus infinity; so its operations do not depend on how many are known. Place 0 holds zeros until the first pixel is
known: the attention of the first pixel to it is the zero that it should be.
"""

from collections.abc import Sequence
from itertools import pairwise

import torch
import torch.nn.functional as F

from .caching_blocks_causal_image import CornerBlock, GatedBlockCache
from .caching_causal_image import pointwise_matrix

CAPTURED_PHASES = 4  # lengths of attention per image where steps are captured: each is recorded once


class PointwiseLayers:
    """A 1×1 layer of each of several layers of the network at once: `(layers, batch, in)` to `(layers, batch, out)`."""

    def __init__(self, cache: GatedBlockCache, layers: Sequence, scale: torch.Tensor | float = 1.0):
        self.weight = cache.keep(torch.stack([pointwise_matrix(layer) for layer in layers]) * scale)
        self.bias = cache.keep(torch.stack([layer.bias for layer in layers])[:, None] * scale)

    def __call__(self, x: torch.Tensor) -> torch.Tensor:
        return torch.baddbmm(self.bias, x, self.weight)


class PointwiseBlocks:
    r"""
    A gated residual block of 1×1 kernels of each of several layers of the network at once.

    Args:
        cache ([`GatedBlockCache`]): Sizes.
        blocks (sequence of [`GatedResidualBlock`]): One per layer.
        x, other (`torch.Tensor` of shape `(layers, batch, features)`): What they read; the latter where they do.
    """

    def __init__(self, cache: GatedBlockCache, blocks: Sequence, x: torch.Tensor, other: torch.Tensor | None = None):
        depth, batch, size = x.shape
        parts = [x] if other is None else [x, other]
        weights, biases = [], []
        for block in blocks:
            layers = [block.conv_in] if other is None else [block.conv_in, block.conv_other]
            weights.append(torch.cat([pointwise_matrix(layer) for layer in layers]))
            biases.append(sum(layer.bias for layer in layers))
        self.weight_in, self.bias_in = cache.keep(torch.stack(weights)), cache.keep(torch.stack(biases)[:, None])
        self.weight_out = cache.keep(torch.stack([pointwise_matrix(block.conv_out) for block in blocks]))
        bias_out = torch.stack([block.conv_out.bias for block in blocks])[:, None]  # (layers, 1, 2 * features)
        classes = [bias[:, 0] for block in blocks if (bias := cache.class_bias(block)) is not None]
        if classes:
            bias_out = bias_out + torch.stack(classes)  # (layers, batch, 2 * features)
        self.bias_out = cache.keep(bias_out)

        self.x, self.signs = x, cache.signs
        self.celu = cache.zeros(depth, batch, 2 * sum(part.shape[-1] for part in parts))
        celus = self.celu.split([2 * part.shape[-1] for part in parts], dim=-1)
        self.parts = [(part[:, :, None], celu.unflatten(-1, (2, -1))) for part, celu in zip(parts, celus, strict=True)]
        self.t = cache.zeros(depth, batch, size)
        self.celu_t = cache.zeros(depth, batch, 2 * size)
        self.gated = cache.zeros(depth, batch, 2 * size)
        self.value, self.gate = self.gated.chunk(2, dim=-1)

    def __call__(self, out: torch.Tensor | None = None) -> torch.Tensor:
        for part, celu in self.parts:
            torch.mul(part, self.signs, out=celu)
        F.elu_(self.celu)
        torch.baddbmm(self.bias_in, self.celu, self.weight_in, out=self.t)
        F.elu_(torch.mul(self.t[:, :, None], self.signs, out=self.celu_t.unflatten(-1, (2, -1))))
        torch.baddbmm(self.bias_out, self.celu_t, self.weight_out, out=self.gated)
        return torch.addcmul(self.x, self.value, self.gate.sigmoid_(), out=out)


class EarlierPixels:
    r"""
    Keys and values of the pixels that are known, of all layers, and attention to them.

    Args:
        cache ([`GatedBlockCache`]): Sizes.
        config ([`PixelSNAILConfig`]): Heads, and features of keys and values.
    """

    def __init__(self, cache: GatedBlockCache, config):
        self.depth, self.rows = config.num_hidden_layers, cache.batch * config.num_attention_heads
        self.sizes = [config.key_size, config.value_size]
        key_size, value_size = (size // config.num_attention_heads for size in self.sizes)
        places = cache.height * cache.width
        self.keys = cache.zeros(self.depth, self.rows, key_size, places)
        self.values = cache.zeros(self.depth, self.rows, places, value_size)
        self.is_known = cache.keep(torch.full((1, 1, places), -torch.inf, **cache.factory))  # added to scores
        self.is_known[..., 0] = 0

    def add(self, key_value: torch.Tensor, place: torch.Tensor):
        """Those of one pixel, `(layers, batch, key_size + value_size)`; `place` is its number, `(1,)`."""
        key, value = key_value.split(self.sizes, dim=-1)
        self.keys.index_copy_(3, place, key.reshape(self.depth, self.rows, -1, 1))
        self.values.index_copy_(2, place, value.reshape(self.depth, self.rows, 1, -1))
        self.is_known.index_fill_(2, place, 0)

    def attend(self, layer: int, query: torch.Tensor, num_places: int, out: torch.Tensor):
        """Of queries `(1, batch, key_size)`, already scaled, to the first places: `(1, batch, value_size)`."""
        keys, values = self.keys[layer, :, :, :num_places], self.values[layer, :, :num_places]
        scores = torch.baddbmm(self.is_known[..., :num_places], query.view(self.rows, 1, -1), keys)
        torch.bmm(scores.softmax(-1), values, out=out.view(self.rows, 1, -1))


class Layer:
    r"""
    One layer of the network, pixel by pixel.

    Args:
        cache ([`PixelSNAILCache`]): Sizes.
        layer ([`PixelSNAILLayer`]): The layer.
        number (`int`): Which it is.
        x, out (`torch.Tensor` of shape `(batch, features)`): What it reads and writes.
        query_in (`torch.Tensor` of shape `(1, batch, features + 2)`): What its blocks make, and the position.
    """

    def __init__(self, cache: "PixelSNAILCache", layer, number: int, x, out, query_in):
        width, size, attention = cache.width, cache.size, layer.attention
        self.number, self.query_in, self.out = number, query_in, out[None]
        stream = query_in[..., :size]
        memory = [x, *(cache.zeros(cache.batch, size) for _ in layer.blocks[1:]), stream[0]]
        spans = [lambda start, stop, x=x: x for x in memory]  # all of them single pixels
        self.blocks = [
            CornerBlock(cache, block, width, *pair) for block, pair in zip(layer.blocks, pairwise(spans), strict=True)
        ]
        self.calls = [[call for block in self.blocks for call in block.calls(j, j + 1)] for j in range(width)]
        block = attention.query_block
        self.query_block = None if block is None else PointwiseBlocks(cache, [block], query_in)
        key_size, value_size = cache.earlier.keys.shape[2], cache.earlier.sizes[1]
        self.query = PointwiseLayers(cache, [attention.query], scale=key_size**-0.5)
        self.attended = cache.zeros(1, cache.batch, value_size)
        self.out_block = PointwiseBlocks(cache, [layer.out_block], stream, self.attended)

    def start_row(self):
        for block in self.blocks:
            block.start_row()

    def step(self, column: int, earlier: EarlierPixels, num_places: int):
        """One pixel."""
        for call in self.calls[column]:
            call()
        query = self.query(self.query_in if self.query_block is None else self.query_block())
        earlier.attend(self.number, query, num_places, self.attended)
        self.out_block(self.out)


class PixelSNAILCache(GatedBlockCache):
    r"""
    Row by row the taps of 2×2 kernels on the row above; pixel by pixel the rest of them, and attention over what is
    known; keys and values of a pixel when its last level is known.

    On a CPU, attention is as long as the image down to the row in work, elsewhere as the part of the image that the
    row lies in, so that steps that were captured serve several rows.
    """

    def __init__(self, model, batch, height, width, class_ids=None):
        network = model.model
        super().__init__(model, batch, height, width, class_ids, in_above=network.in_above, in_left=network.in_left)
        layers, device = list(network.layers.children()), self.factory["device"]
        self.rows_per_phase = 1 if self.capture is None else -(-height // CAPTURED_PHASES)
        self.row_number = torch.zeros(1, dtype=torch.long, device=device)
        self.columns, self.places = (torch.arange(width, device=device) for _ in range(2))  # here, and in the image
        self.tensors += [self.row_number, self.places]
        positions = network.positions(height, width, **self.factory)
        self.positions = self.keep(positions[0].permute(1, 2, 0))  # (height, width, 2)
        self.row_positions = self.zeros(width, 2)

        # What keys and values of all layers are made of, [I, x, P], and queries, [x, P].
        self.features = self.zeros(len(layers), batch, self.input_size + self.size + 2)
        self.image, queries = self.features.tensor_split([self.input_size], dim=-1)
        self.position = queries[..., -2:]
        self.earlier = EarlierPixels(self, model.config)
        streams = [self.zeros(batch, self.size) for _ in layers] + [self.hidden]
        self.first = streams[0]
        self.first_layers = [self.first_layer(j, j + 1, self.first) for j in range(width)]
        self.layers = [
            Layer(self, layer, i, streams[i], streams[i + 1], queries[i : i + 1]) for i, layer in enumerate(layers)
        ]
        blocks = [layer.attention.key_value_block for layer in layers]
        self.key_value_block = None if None in blocks else PointwiseBlocks(self, blocks, self.features)
        self.key_value = PointwiseLayers(self, [layer.attention.key_value for layer in layers])

    def start_row(self, row):
        self.row, self.phase = row, row // self.rows_per_phase
        self.num_places = min(self.height, (self.phase + 1) * self.rows_per_phase) * self.width
        self.row_number.fill_(row)
        self.run(("row", row == 0), self.compute_row)

    def compute_row(self):
        self.start_first_layer()
        torch.add(self.columns, self.row_number, alpha=self.width, out=self.places)
        self.row_positions.copy_(self.positions.index_select(0, self.row_number)[0])
        for layer in self.layers:
            layer.start_row()

    def compute_pixel(self, column, channel):
        self.first_layers[column]()
        self.position.copy_(self.row_positions[column])
        for layer in self.layers:
            layer.step(column, self.earlier, self.num_places)

    def observe(self, column, channel, levels):
        super().observe(column, channel, levels)
        if channel == self.num_channels - 1:
            self.image.copy_(self.finished_row[:, column])
            key_value = self.key_value(self.features if self.key_value_block is None else self.key_value_block())
            self.earlier.add(key_value, self.places[column : column + 1])


__all__ = ["PixelSNAILCache"]
