"""The sampling cache of the plain PixelCNN."""

import torch

from .caching_spans_causal_image import MaskedConvSpanCache
from .weights_causal_image import pointwise_matrix


class PixelCNNCache(MaskedConvSpanCache):
    r"""
    Row by row the taps above the centre row, of all blocks at once; span by span the centre row and the 1×1 layers.

    The left taps of all blocks, whose inputs are known when a pixel begins, are one batched product.
    """

    def __init__(self, model, batch, height, width, class_ids=None):
        super().__init__(model, batch, height, width, class_ids)
        self.inner, self.reach = model.config.hidden_size // 2, model.config.kernel_size // 2
        self.prepare_rows_above(model.model.conv_in, model.model.layers, class_ids)
        self.prepare_centre_row(model.model.layers)

    def kernel_features(self, config):
        return config.hidden_size // 2

    def prepare_rows_above(self, first, blocks, class_ids: torch.Tensor | None):
        """Weights and memory of the taps above the centre row; kernels as `(rows, columns, in, out)`."""
        inner, reach, batch, width = self.inner, self.reach, self.batch, self.width
        self.prepare_first_layer(first)
        bias = torch.stack([block.conv.bias for block in blocks])[:, None, None]
        if class_ids is not None:
            bias = bias + torch.stack([block.class_embedding(class_ids)[:, :, 0, 0] for block in blocks])[:, None]
        self.bias = self.keep(bias)  # (blocks, 1, 1 or batch, inner)
        kernels = [block.conv.visible_weight()[:, :, :-1].permute(2, 3, 1, 0) for block in blocks]
        self.kernels_above = [column for row in self.keep(torch.stack(kernels, dim=2)) for column in row]
        # Rows r - reach to r, the last one being in work; zeros at both ends.
        self.rows = self.zeros(reach + 1, len(blocks), width + 2 * reach, batch, inner)
        self.above = self.zeros(len(blocks), width, batch, inner)
        self.above_matrices = self.above.flatten(1, 2)
        taps = range(2 * reach + 1)
        self.taps_above = [row[:, t : t + width].flatten(1, 2) for row in self.rows[:reach] for t in taps]

    def prepare_centre_row(self, blocks):
        """Weights and memory of the centre row. The last inputs of a block are led by a constant 1 for its bias."""
        rows = self.columns_at_once * self.batch
        conv_in = torch.stack([pointwise_matrix(block.conv_in) for block in blocks])
        self.conv_in = self.matrices_by_channel(self.keep(conv_in))
        self.bias_in = self.keep(torch.stack([block.conv_in.bias for block in blocks]))
        self.prepare_taps([block.conv for block in blocks], (self.inner, self.inner), self.reach)
        out = torch.stack([pointwise_matrix(block.conv_out, lead_with_bias=True) for block in blocks])
        self.out = self.matrices_by_channel(self.keep(out), lead=1)

        self.sums = self.zeros(len(blocks), rows, self.inner)
        self.relus_in = self.zeros(len(blocks), rows, self.hidden.shape[1])
        self.relus_out = self.keep(torch.ones(len(blocks), rows, 1 + self.inner, **self.factory))

    def prepare_step(self, start, stop, channel):
        number = (stop - start) * self.batch
        features = self.rows[self.reach, :, self.reach + start : self.reach + stop].flatten(1, 2)
        relus_in, relus_out = self.relus_in[:, :number], self.relus_out[:, :number]
        all_sums = self.of_span(self.sums, stop - start)
        stream, first_above, own_in, own_bias, own_features, sums, own_out = (
            self.own_group(x, channel)
            for x in (
                *(self.head_streams[0][:number], self.first_above[start:stop].flatten(0, 1)),
                *(relus_in, self.bias_in, features, all_sums, relus_out[..., 1:]),
            )
        )
        begin, taps = self.tap_steps(start, stop, channel, self.above, all_sums, self.rows[self.reach])
        conv_in, out = self.conv_in[channel], self.out[channel]
        seen_in, seen_out = relus_in[..., : conv_in.shape[1]], relus_out[..., : out.shape[1]]
        blocks = list(
            zip(own_in, own_bias, seen_in, conv_in, own_features, sums, taps, own_out, seen_out, out, strict=True)
        )
        return first_above, self.seen_windows(start, stop, channel), self.first[channel], stream, begin, blocks

    def compute_row(self):
        self.start_first_layer()
        for i in range(self.reach):
            self.rows[i] = self.rows[i + 1]
        self.above.copy_(self.bias)
        for rows, kernel in zip(self.taps_above, self.kernels_above, strict=True):
            self.above_matrices.baddbmm_(rows, kernel)

    def compute_span(self, start, stop, channel):
        above, windows, first, stream, begin, blocks = self.step(start, stop, channel)
        torch.addmm(above, windows.flatten(0, -2), first, out=stream)
        for call in begin:
            call()
        for relu_in, bias_in, seen_in, conv_in, features, total, taps, relu_out, seen_out, out in blocks:
            torch.clamp_min(stream, 0, out=relu_in)
            torch.addmm(bias_in, seen_in, conv_in, out=features).clamp_min_(0)
            for seen, weight in taps:
                total.addmm_(seen, weight)
            torch.clamp_min(total, 0, out=relu_out)
            stream.addmm_(seen_out, out)


__all__ = ["PixelCNNCache"]
