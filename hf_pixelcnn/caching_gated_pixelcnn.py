"""The sampling cache of the Gated PixelCNN."""

import itertools

import torch

from .caching_causal_image import MaskedConvCache, group_rows, pointwise_weights, row_weights, stack_layers


class GatedPixelCNNCache(MaskedConvCache):
    r"""
    Row by row the vertical stack and what it hands to the horizontal one; pixel by pixel the horizontal stack.

    The left taps of all layers, whose inputs are known when a pixel begins, are one batched product; a layer then
    needs two small products, for the centre tap and the 1×1, and a gate.

    The gate is computed as tanh(v) σ(g) = -(σ(g) - 2 σ(2v) σ(g)): one sigmoid of both halves and one product instead of
    a tanh, which takes as long as a small matrix product. The factor 2 lies in the weights that make v, the sign in the
    weights that read the result.
    """

    def __init__(self, model, batch, height, width, class_ids=None):
        super().__init__(model, batch, height, width, class_ids)
        layers, channels, size = model.model.layers, self.num_groups, model.config.hidden_size
        self.size, self.later, self.reach = size, len(layers) - 1, model.config.kernel_size // 2
        self.scale = torch.ones(2 * size, **self.factory)
        self.scale[:size] = 2

        # Vertical stack: kernels and the rows they reach back to.
        convs = [layer.vertical_conv for layer in layers]
        self.vertical_convs = [
            self.keep_all((conv.visible_weight().to(memory_format=torch.channels_last), conv.bias)) for conv in convs
        ]
        self.vertical_rows = self.zeros(self.later, batch, self.reach + 1, width, size)
        self.vertical_features = self.zeros(self.later + 1, batch, width, 2 * size)
        by_channel = torch.cat([group_rows(2 * size, channels, c, num_parts=2) for c in range(channels)])
        by_channel = by_channel.to(self.factory["device"])
        to_horizontal = torch.stack([x.vertical_to_horizontal.visible_weight()[by_channel, :, 0, 0].T for x in layers])
        self.to_horizontal = self.keep(to_horizontal / self.scale[:, None] * self.scale[by_channel])
        horizontal_bias = torch.stack([layer.horizontal_conv.bias[by_channel] for layer in layers])[:, None, None]
        self.class_bias = None
        if class_ids is not None:
            class_bias = torch.stack([layer.class_embedding(class_ids)[:, :, 0, 0] for layer in layers])[:, :, None]
            horizontal_bias = horizontal_bias + class_bias[..., by_channel]
            self.class_bias = self.keep(class_bias * self.scale)
        self.horizontal_bias = self.keep(horizontal_bias * self.scale[by_channel])  # (layers, 1 or batch, 1, 2 * size)
        self.above = self.zeros(self.later + 1, batch, width, 2 * size)

        # Horizontal stack. The gates' outputs are led by a constant 1, which picks up the bias of the 1×1 after them.
        self.rows = self.zeros(self.later, batch, (self.reach + width) * size)
        self.sums = self.zeros(self.later + 1, batch, 2 * self.hidden_group)
        self.gates = self.keep(torch.ones(self.later + 1, batch, 1 + size, **self.factory))
        self.first_left = self.keep_all(self.gate_weights(layers[0].horizontal_conv, self.first_reach)[0])
        if self.later:
            left, own = zip(
                *(self.gate_weights(layer.horizontal_conv, self.reach) for layer in layers[1:]), strict=True
            )
            self.left, self.own = self.keep_all(stack_layers(left)), self.keep_all(stack_layers(own))
        self.out = [
            self.keep_all(pointwise_weights(layer.horizontal_out, channels, lead_with_bias=True)) for layer in layers
        ]
        for matrices in self.out:
            for matrix in matrices:
                matrix[1:].neg_()
        self.steps = [[self.prepare_step(j, c) for c in range(channels)] for j in range(width)]

    def gate_weights(self, conv, reach: int) -> tuple[list[torch.Tensor], list[torch.Tensor]]:
        """[`row_weights`] of a convolution into a gate, with the factor of the gate's first half."""
        matrices = row_weights(conv, reach, self.num_groups, num_parts=2)
        for matrix in itertools.chain(*matrices):
            matrix[:, : self.hidden_group] *= 2
        return matrices

    def prepare_step(self, column: int, channel: int):
        """All slices and matrices that one dimension needs."""
        group, start = self.hidden_group, column * self.size
        seen = 1 + (channel + 1) * group
        above = self.above[:, :, column].unflatten(-1, (self.num_groups, 2 * group))[:, :, channel]
        left_features = self.rows[:, :, start : start + self.reach * self.size + channel * group]
        own = start + self.reach * self.size + channel * group
        streams = [row[:, own : own + group] for row in self.rows] + [self.own_group(self.hidden, channel)]
        layers = []
        for i in range(self.later + 1):
            total, gates = self.sums[i], self.gates[i]
            layers.append(
                (
                    streams[i - 1] if i else None,
                    self.own[channel][i - 1] if i else None,
                    total,
                    *total.chunk(2, dim=-1),
                    self.own_group(gates, channel, start=1),
                    gates[:, :seen],
                    self.out[i][channel],
                    streams[i],
                )
            )
        return above, self.seen_inputs(column, channel), left_features, layers

    def compute_row(self):
        self.shift_input_rows()
        for i in range(self.reach):
            self.vertical_rows[:, :, i] = self.vertical_rows[:, :, i + 1]
        rows = self.input_above
        for i, (weight, bias) in enumerate(self.vertical_convs):
            features = self.vertical_features[i]
            torch.mul(self.convolve_rows(rows, weight, bias), self.scale, out=features)
            if i < self.later:
                rows = self.vertical_rows[i]
                features = features if self.class_bias is None else features + self.class_bias[i]
                value, gate = features.sigmoid().chunk(2, dim=-1)
                torch.addcmul(gate, value, gate, value=-2, out=rows[:, -1]).neg_()
        torch.bmm(self.vertical_features.flatten(1, 2), self.to_horizontal, out=self.above.flatten(1, 2))
        self.above += self.horizontal_bias

    def compute_pixel(self, column, channel):
        above, seen_inputs, left_features, layers = self.steps[column][channel]
        torch.addmm(above[0], seen_inputs, self.first_left[channel], out=self.sums[0])
        if self.later:
            torch.baddbmm(above[1:], left_features, self.left[channel], out=self.sums[1:])
        for stream, own, total, value, gate, gated, seen, out, next_stream in layers:
            if stream is not None:
                total.addmm_(stream, own)
            total.sigmoid_()
            torch.addcmul(gate, value, gate, value=-2, out=gated)
            if stream is None:
                torch.mm(seen, out, out=next_stream)
            else:
                torch.addmm(stream, seen, out, out=next_stream)


__all__ = ["GatedPixelCNNCache"]
