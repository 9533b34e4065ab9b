"""The sampling cache of the plain PixelCNN."""

import torch

from .caching_causal_image import MaskedConvCache, pointwise_weights, row_weights, stack_layers


class PixelCNNCache(MaskedConvCache):
    r"""
    Row by row the taps above the centre row, of all blocks at once; pixel by pixel the centre row and the 1×1 layers.

    The left taps of all blocks, whose inputs are known when a pixel begins, are one batched product.
    """

    def __init__(self, model, batch, height, width, class_ids=None):
        super().__init__(model, batch, height, width, class_ids)
        first, blocks, channels = model.model.conv_in, model.model.layers, self.num_groups
        self.reach = reach = model.config.kernel_size // 2
        self.inner = inner = model.config.hidden_size // 2
        self.inner_group = inner // channels

        # Rows above.
        self.first_weight, self.first_bias = self.keep_all((first.visible_weight()[:, :, :-1], first.bias))
        self.first_above = self.zeros(batch, width, model.config.hidden_size)
        self.rows_above_inner = self.zeros(len(blocks), batch, reach, width + 2 * reach, inner)
        above_taps = [block.conv.visible_weight()[:, :, :-1].permute(2, 3, 1, 0) for block in blocks]
        self.above_weight = self.keep(torch.stack([taps.flatten(0, 2) for taps in above_taps]))
        bias = torch.stack([block.conv.bias for block in blocks])[:, None, None]
        if class_ids is not None:
            bias = bias + torch.stack([block.class_embedding(class_ids)[:, :, 0, 0] for block in blocks])[:, :, None]
        self.above_bias = self.keep(bias)  # (blocks, 1 or batch, 1, inner)
        self.above = self.zeros(len(blocks), batch, width, inner)

        # Centre row. The inputs of the last 1×1 of a block are led by a constant 1, which picks up its bias.
        self.rows = self.zeros(len(blocks), batch, (reach + width) * inner)
        self.sums = self.zeros(len(blocks), batch, self.inner_group)
        self.relus_in = self.zeros(len(blocks), batch, model.config.hidden_size)
        self.relus_out = self.keep(torch.ones(len(blocks), batch, 1 + inner, **self.factory))
        self.first_left = self.keep_all(row_weights(first, self.first_reach, channels)[0])
        left, own = zip(*(row_weights(block.conv, reach, channels) for block in blocks), strict=True)
        self.left, self.own = self.keep_all(stack_layers(left)), self.keep_all(stack_layers(own))
        self.conv_in = [self.keep_all(pointwise_weights(block.conv_in, channels)) for block in blocks]
        self.bias_in = [self.keep_all(block.conv_in.bias.chunk(channels)) for block in blocks]
        self.out = [self.keep_all(pointwise_weights(block.conv_out, channels, lead_with_bias=True)) for block in blocks]
        self.steps = [[self.prepare_step(j, c) for c in range(channels)] for j in range(width)]

    def prepare_step(self, column: int, channel: int):
        """All slices and matrices that one dimension needs."""
        group, start = self.inner_group, column * self.inner
        own = start + self.reach * self.inner + channel * group
        blocks = [
            (
                self.own_group(self.relus_in[i], channel),
                self.bias_in[i][channel],
                self.relus_in[i][:, : (channel + 1) * self.hidden_group],
                self.conv_in[i][channel],
                self.rows[i][:, own : own + group],
                self.sums[i],
                self.own[channel][i],
                self.own_group(self.relus_out[i], channel, start=1),
                self.relus_out[i][:, : 1 + (channel + 1) * group],
                self.out[i][channel],
            )
            for i in range(len(self.rows))
        ]
        first_above = self.own_group(self.first_above[:, column], channel)
        above = self.own_group(self.above[:, :, column], channel)
        left_features = self.rows[:, :, start : start + self.reach * self.inner + channel * group]
        stream = self.own_group(self.hidden, channel)
        return first_above, self.seen_inputs(column, channel), above, left_features, stream, blocks

    def compute_row(self):
        self.shift_input_rows()
        self.first_above.copy_(self.convolve_rows(self.input_above, self.first_weight, self.first_bias))
        reach, rows = self.reach, self.rows_above_inner
        if reach:
            for i in range(reach - 1):
                rows[:, :, i] = rows[:, :, i + 1]
            finished = self.rows[:, :, reach * self.inner :].unflatten(2, (self.width, self.inner))
            rows[:, :, -1, reach : reach + self.width] = finished
            windows = rows.unfold(3, 2 * reach + 1, 1).permute(
                0, 1, 3, 2, 5, 4
            )  # (blocks, batch, width, rows, k, inner)
            torch.bmm(windows.flatten(3).flatten(1, 2), self.above_weight, out=self.above.flatten(1, 2))
            self.above += self.above_bias
        else:
            self.above.copy_(self.above_bias.expand_as(self.above))

    def compute_pixel(self, column, channel):
        first_above, seen_inputs, above, left_features, stream, blocks = self.steps[column][channel]
        torch.addmm(first_above, seen_inputs, self.first_left[channel], out=stream)
        torch.baddbmm(above, left_features, self.left[channel], out=self.sums)
        for relu_in, bias_in, seen_in, conv_in, feature, total, own, relu_out, seen_out, out in blocks:
            torch.clamp_min(stream, 0, out=relu_in)
            torch.addmm(bias_in, seen_in, conv_in, out=feature).clamp_min_(0)
            torch.clamp_min(total.addmm_(feature, own), 0, out=relu_out)
            stream.addmm_(seen_out, out)


__all__ = ["PixelCNNCache"]
