"""The sampling cache of the Gated PixelCNN."""

import torch
import torch.nn.functional as F

from .caching_causal_image import ALL
from .caching_spans_causal_image import MaskedConvSpanCache
from .weights_causal_image import group_rows, pointwise_matrix


class GatedPixelCNNCache(MaskedConvSpanCache):
    r"""
    Row by row the vertical stack and what it hands to the horizontal one; span by span the horizontal stack.

    What is known beforehand is computed for all layers in one batched product: when a row begins, the taps of the
    vertical stack on rows above; when a pixel begins, the left taps of the horizontal one.

    The gate is computed as tanh(v) σ(g) = -(σ(g) - 2 σ(2v) σ(g)): one sigmoid of both halves and one product instead of
    a tanh, which takes as long as a small matrix product. The factor 2 lies in the weights that make v, the sign in the
    weights that read the result.
    """

    def __init__(self, model, batch, height, width, class_ids=None):
        super().__init__(model, batch, height, width, class_ids)
        self.size, self.later = model.config.hidden_size, len(model.model.layers) - 1
        self.reach = model.config.kernel_size // 2
        self.scale = torch.ones(2 * self.size, **self.factory)
        self.scale[: self.size] = 2
        self.prepare_vertical(model.model.layers, class_ids)
        self.prepare_horizontal(model.model.layers)

    def prepare_vertical(self, layers, class_ids: torch.Tensor | None):
        """
        Weights and memory of the vertical stack, and of what it hands on. Its steps work on `(batch, features, rows,
        width)`.
        """
        channels, size, batch, width = self.num_groups, self.size, self.batch, self.width
        scale = self.scale[:, None, None, None]
        kernels = [layer.vertical_conv.visible_weight() * (-scale if i else scale) for i, layer in enumerate(layers)]
        kernels = self.keep_all(kernel.to(memory_format=torch.channels_last) for kernel in kernels)
        order = torch.cat([group_rows(2 * size, channels, c, num_parts=2) for c in range(channels)])
        self.order = order = order.to(self.factory["device"])
        handed_on = torch.stack([pointwise_matrix(layer.vertical_to_horizontal) for layer in layers])[..., order]

        vertical_bias = torch.stack([layer.vertical_conv.bias for layer in layers])[:, None]
        horizontal_bias = torch.stack([layer.horizontal_conv.bias for layer in layers])[:, None, order]
        if class_ids is not None:  # what is handed on has no class bias
            class_bias = torch.stack([layer.class_embedding(class_ids)[:, :, 0, 0] for layer in layers])
            vertical_bias = vertical_bias + class_bias
            horizontal_bias = horizontal_bias + class_bias[..., order] - class_bias @ handed_on
        self.vertical_bias = self.keep(vertical_bias * self.scale)[:, :, None]  # (layers, 1 or batch, 1, 2 * size)
        self.horizontal_bias = self.keep(horizontal_bias * self.scale[order])[:, :, None]
        self.handed_on = self.keep(handed_on / self.scale[:, None] * self.scale[order])

        self.vertical_rows = self.zeros(self.later, batch, self.reach + 1, width, size)
        self.vertical = self.zeros(self.later + 1, batch, width, 2 * size)
        self.above = self.zeros(self.later + 1, batch, width, 2 * size)
        self.vertical_gates = self.zeros(batch, width, 2 * size).transpose(1, 2)[:, :, None]
        self.vertical_steps = []
        for i, kernel in enumerate(kernels):
            rows = self.vertical_rows[i - 1] if i else self.input_above
            next_row = self.vertical_rows[i, :, -1].transpose(1, 2)[:, :, None] if i < self.later else None
            bias, features = (x[i].transpose(1, 2)[:, :, None] for x in (self.vertical_bias, self.vertical))
            padding = (0, kernel.shape[-1] // 2)
            self.vertical_steps.append((rows.permute(0, 3, 1, 2), kernel, padding, bias, features, next_row))

    def prepare_horizontal(self, layers):
        """Weights and memory of the horizontal stack. Gates are led by a constant 1, which picks up the bias after."""
        rows, scale = self.columns_at_once * self.batch, self.scale[self.order]
        self.first = self.first_weights(layers[0].horizontal_conv, num_parts=2, scale=scale)
        convs = [layer.horizontal_conv for layer in layers[1:]]
        self.prepare_taps(convs, (self.size, 2 * self.size), self.reach, num_parts=2, scale=scale)
        out = torch.stack([pointwise_matrix(layer.horizontal_out, lead_with_bias=True) for layer in layers])
        out[:, 1:].neg_()
        self.out = self.matrices_by_channel(self.keep(out), lead=1)

        self.rows = self.zeros(self.later, self.reach + self.width, self.batch, self.size)
        self.sums = self.zeros(self.later + 1, rows, 2 * self.size)
        self.gates = self.keep(torch.ones(self.later + 1, rows, 1 + self.size, **self.factory))

    def prepare_step(self, start, stop, channel):
        number = (stop - start) * self.batch
        all_sums = self.of_span(self.sums, stop - start)
        sums, gates = (self.own_group(x, channel) for x in (all_sums, self.gates[:, :number, 1:]))
        if channel == ALL and self.num_groups > 1:
            values, gate_logits = sums.unflatten(-1, (self.num_groups, 2, -1)).unbind(-2)
            gates = gates.unflatten(-1, (self.num_groups, -1))
        else:
            values, gate_logits = sums.chunk(2, dim=-1)
        above = self.above.transpose(1, 2)
        first_above = self.own_group(above[0, start], channel) if stop - start == 1 else sums[0]
        begin, taps = self.tap_steps(start, stop, channel, above, all_sums, self.rows)
        streams = [row[self.reach + start : self.reach + stop].flatten(0, 1) for row in self.rows]
        streams = [self.own_group(x, channel) for x in (*streams, self.head_streams[0][:number])]
        out = self.out[channel]
        seen = self.gates[:, :number, : out.shape[1]]
        layers = list(
            zip(sums, [[], *taps], values, gate_logits, gates, [None, *streams[:-1]], seen, out, streams, strict=True)
        )
        return begin, first_above, self.seen_windows(start, stop, channel), self.first[channel], sums[0], layers

    def compute_row(self):
        self.shift_input_rows()
        for i in range(self.reach):
            self.vertical_rows[:, :, i] = self.vertical_rows[:, :, i + 1]
        for image, kernel, padding, bias, features, row in self.vertical_steps:
            torch.add(F.conv2d(image, kernel, None, 1, padding), bias, out=features)
            if row is not None:
                value, gate = torch.sigmoid(features, out=self.vertical_gates).chunk(2, dim=1)
                torch.addcmul(gate, value, gate, value=-2, out=row)
        self.above.copy_(self.horizontal_bias)
        self.above.flatten(1, 2).baddbmm_(self.vertical.flatten(1, 2), self.handed_on)

    def compute_span(self, start, stop, channel):
        begin, above, windows, first, total, layers = self.step(start, stop, channel)
        for call in begin:
            call()
        torch.addmm(above, windows.flatten(0, -2), first, out=total)
        for total, taps, value, gate, gated, stream, seen, out, next_stream in layers:
            for features, weight in taps:
                total.addmm_(features, weight)
            total.sigmoid_()
            torch.addcmul(gate, value, gate, value=-2, out=gated)
            if stream is None:
                torch.mm(seen, out, out=next_stream)
            else:
                torch.addmm(stream, seen, out, out=next_stream)


__all__ = ["GatedPixelCNNCache"]
