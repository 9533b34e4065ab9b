r"""
The sampling cache of the PixelCNN++.

Rows of a lower resolution exist at every second or fourth row only, and their pixels at every second or fourth column:
there, one level calls the next lower one between its up blocks and its down blocks, as the network does.
"""

from collections.abc import Callable

import torch
import torch.nn.functional as F

from .caching_blocks_causal_image import (
    CornerBlock,
    CornerRow,
    GatedBlockCache,
    Span,
    columns,
    concat_elu_rows,
    product,
)


class RowConv:
    """A vertical convolution, which sees a row and the one before it: rows `(batch, width, in)`, one at a time."""

    def __init__(self, cache: "PixelCNNPPCache", layer, width: int):
        weight = layer.visible_weight().contiguous(memory_format=torch.channels_last)
        self.weight, self.bias = cache.keep_all((weight, layer.bias))
        self.stride = layer.stride
        self.rows = cache.zeros(cache.batch, 2, width, layer.in_channels)

    def next_row(self) -> torch.Tensor:
        """Where to write the next row."""
        before, row = self.rows.unbind(1)
        before.copy_(row)
        return row

    def output(self) -> torch.Tensor:
        """Features `(batch, width / stride, out)` of the last row."""
        x = self.rows.permute(0, 3, 1, 2)
        return F.conv2d(x, self.weight, self.bias, self.stride, padding=(0, 1))[:, :, 0].transpose(1, 2)


class VerticalBlock:
    """A block of the vertical stream, row by row."""

    def __init__(self, cache: "PixelCNNPPCache", block, width: int):
        self.conv_in, self.conv_out = (RowConv(cache, layer, width) for layer in (block.conv_in, block.conv_out))
        self.class_bias = cache.class_bias(block)
        other = block.conv_other
        if other is not None:
            self.other_weight, self.other_bias = cache.keep_all((other.visible_weight()[:, :, 0, 0], other.bias))

    def row(self, x: torch.Tensor, celu_x: torch.Tensor, celu_other: torch.Tensor | None = None) -> torch.Tensor:
        """One row `(batch, width, features)`."""
        self.conv_in.next_row().copy_(celu_x)
        t = self.conv_in.output()
        if celu_other is not None:
            t = t + F.linear(celu_other, self.other_weight, self.other_bias)
        concat_elu_rows(t, out=self.conv_out.next_row())
        gated = self.conv_out.output()
        if self.class_bias is not None:
            gated = gated + self.class_bias
        value, gate = gated.chunk(2, dim=-1)
        return torch.addcmul(x, value, gate.sigmoid())


class CombinedBlock(CornerBlock):
    r"""
    A block of the combined stream, which also reads the vertical one and, in the down pass, what the up pass had.

    Args:
        cache, block, width, x, out: As for all such blocks.
        skip ([`Span`], *optional*): celu of what a down block gets from the up pass.
    """

    def __init__(self, cache: "PixelCNNPPCache", block, width: int, x: Span, out: Span, skip: Span | None = None):
        weight = block.conv_other.visible_weight()[:, :, 0, 0]
        u, *skips = weight.unflatten(1, (2, -1, cache.size)).unbind(2)  # (out, 2, size) each, one or two
        self.u_weight, self.other_bias = cache.keep_all((u.flatten(1), block.conv_other.bias))
        other = None if skip is None else (skip, cache.keep(skips[0].flatten(1).T.contiguous()))
        super().__init__(cache, block, width, x, out, other)
        self.width = width

    def start_row(self, celu_u: torch.Tensor):
        """Take in celu of the row `(batch, width, features)` that the vertical block beside this one has given."""
        super().start_row()
        self.row_in.above += F.linear(celu_u[:, : self.width], self.u_weight, self.other_bias)


class Level:
    r"""
    What happens at one resolution.

    Args:
        cache ([`PixelCNNPPCache`]): Sizes, and the row.
        network ([`PixelCNNPPModel`]): The network.
        level (`int`): 0, 1 and 2 for full, half and a quarter of the resolution.
        width (`int`): Columns of the image here.
        padded_width (`int`): Columns of the vertical stream here.
        result ([`Span`], *optional*): Where the last block writes.
    """

    def __init__(
        self,
        cache: "PixelCNNPPCache",
        network,
        level: int,
        width: int,
        padded_width: int,
        result: Span | None = None,
    ):
        self.cache, self.level, self.prepared = cache, level, {}
        up_layers, down_layers = network.up_layers[level], network.down_layers[2 - level]
        self.vertical_up = [VerticalBlock(cache, layer.vertical, padded_width) for layer in up_layers]
        self.vertical_down = [VerticalBlock(cache, layer.vertical, padded_width) for layer in down_layers]
        self.lower = None
        if level < 2:
            self.lower = Level(cache, network, level + 1, -(-width // 2), padded_width // 2)

        # What a block reads, it keeps as celu: so the down pass finds it.
        self.first = x = cache.scratch(cache.size)
        self.combined_up, skips = [], []
        for i, layer in enumerate(up_layers):
            out = cache.scratch(cache.size)
            if self.lower is not None and i == len(up_layers) - 1:
                self.downsampling = CornerRow(cache, network.combined_downsampling[level], width)
                out = self.downsampling.slots
            self.combined_up.append(CombinedBlock(cache, layer.combined, width, x, out))
            skips.append(self.combined_up[-1].row_in.slots)
            x = out
        if self.lower is not None:
            self.last_celu = cache.scratch(2 * cache.size)
            skips.append(self.last_celu)
            self.prepare_change_of_resolution(network, width, padded_width)
            x = self.from_lower_row
        self.combined_down = []
        for i, layer in enumerate(down_layers):
            out = cache.scratch(cache.size) if result is None or i < len(down_layers) - 1 else result
            self.combined_down.append(CombinedBlock(cache, layer.combined, width, x, out, skips.pop()))
            x = out
        self.result = x

    def prepare_change_of_resolution(self, network, width: int, padded_width: int):
        """Weights and memory of the layers to the next lower resolution and back."""
        cache, batch, size = self.cache, self.cache.batch, self.cache.size
        self.vertical_downsampling = RowConv(cache, network.vertical_downsampling[self.level], padded_width)
        upsampling = network.vertical_upsampling[1 - self.level]
        self.upsample = upsampling.upsample
        self.vertical_up_weights = cache.keep_all((upsampling.visible_weight(), upsampling.bias))
        self.vertical_rows = cache.zeros(2, batch, padded_width, size)  # from one of low resolution
        upsampling = network.combined_upsampling[1 - self.level]
        up_weights = upsampling.visible_weight().permute(2, 1, 3, 0).flatten(2)  # (2, in, 2 * out)
        self.up_weights, self.up_bias = cache.keep_all((up_weights, upsampling.bias.repeat(2)))
        self.combined_rows = cache.zeros(2, batch, 2 * -(-width // 2), size)

    def from_lower_row(self, start: int, stop: int) -> torch.Tensor:
        """Where a span finds what the next lower resolution has given it."""
        return columns(self.combined_rows[0], start, stop)

    def has_lower_row(self) -> bool:
        """Whether a row of the next lower resolution begins with this one."""
        return (self.cache.row >> self.level) % 2 == 0

    def start_row(self, u: torch.Tensor) -> torch.Tensor:
        """One row of the vertical stream through the network, from this resolution on: `(batch, width, features)`."""
        celu_u = concat_elu_rows(u)
        skips = [celu_u]
        for vertical, combined in zip(self.vertical_up, self.combined_up, strict=True):
            u = vertical.row(u, celu_u)
            celu_u = concat_elu_rows(u)
            combined.start_row(celu_u)
            skips.append(celu_u)
        if self.lower is None:
            skips.pop()
        else:
            self.vertical_downsampling.next_row().copy_(u)
            if self.has_lower_row():
                self.downsampling.start_row()
                low = self.lower.start_row(self.vertical_downsampling.output())
                low = low.transpose(1, 2)[:, :, None]  # (batch, features, 1, width)
                high = self.upsample(low, *self.vertical_up_weights)  # (batch, features, 2, 2 * width)
                self.vertical_rows.copy_(high.permute(2, 0, 3, 1))
                u = self.vertical_rows[0]
            else:
                u = self.vertical_rows[1]
                self.combined_rows[0].copy_(self.combined_rows[1])
            celu_u = concat_elu_rows(u)
        for vertical, combined in zip(self.vertical_down, self.combined_down, strict=True):
            u = vertical.row(u, celu_u, skips.pop())
            celu_u = concat_elu_rows(u)
            combined.start_row(celu_u)
        return u

    def calls(self, start: int, stop: int) -> list[Callable[[], object]]:
        """What computes a span of the combined stream through the network, from `first` to `result`."""
        up, down = self.own_calls(start, stop)
        lower = -(-start // 2), -(-stop // 2)  # those that begin with a column of the span
        if self.lower is None or not self.has_lower_row() or lower[0] == lower[1]:
            return [*up, *down]
        to_lower, from_lower = self.changes_of_resolution(*lower)
        return [*up, to_lower, *self.lower.calls(*lower), *from_lower, *down]

    def own_calls(self, start: int, stop: int) -> tuple[list[Callable], list[Callable]]:
        """Those at this resolution: of the up pass and of the down pass. Rows of different phases share them."""
        key = (start, stop)
        if key not in self.prepared:
            up, down = (
                [call for block in blocks for call in block.calls(start, stop)]
                for blocks in (self.combined_up, self.combined_down)
            )
            if self.lower is not None:
                last = self.downsampling.slots(start, stop)
                up += self.cache.celu(last, self.last_celu(start, stop))
            self.prepared[key] = up, down
        return self.prepared[key]

    def changes_of_resolution(self, start: int, stop: int) -> tuple[Callable, list[Callable]]:
        """What leads to a span of the next lower resolution, and from there to two rows of this one."""
        assert self.lower is not None
        first, result = (span(start, stop) for span in (self.lower.first, self.lower.result))
        rows = [columns(row.unflatten(1, (-1, 2)).flatten(2), start, stop) for row in self.combined_rows]
        back = [product(self.up_bias, result, *pair) for pair in zip(self.up_weights, rows, strict=True)]
        return self.downsampling.output(start, stop, first), back


class PixelCNNPPCache(GatedBlockCache):
    r"""
    Row by row the vertical stream, and the taps of the combined one on rows above; span by span the rest of it.

    Of every convolution the last row of inputs is kept. Columns that only fill up the image's width have a vertical
    stream and no combined one, whose features there reach nothing.
    """

    # Of a row every second one, and every fourth, also computes lower resolutions: of a pixel half as many, and a
    # quarter. With as many blocks at the first two resolutions, (1 + 1/2 + 1/4) / (1 + 1/4 + 1/16).
    calls_of_pass = 4 / 3

    def __init__(self, model, batch, height, width, class_ids=None):
        network, padded_width = model.model, width + -width % 4
        super().__init__(
            model,
            batch,
            height,
            width,
            class_ids,
            in_above=network.combined_in_above,
            in_left=network.combined_in_left,
            padded_width=padded_width,
        )
        self.vertical_in = self.keep_all((network.vertical_in.visible_weight(), network.vertical_in.bias))
        self.full = Level(self, network, 0, width, padded_width, self.result)

    def result(self, start: int, stop: int) -> torch.Tensor:
        """Where the head reads a span."""
        memory = self.head_streams[0][: (stop - start) * self.batch].unflatten(0, (-1, self.batch))
        return columns(memory.transpose(0, 1), 0, stop - start)

    def start_row(self, row):
        self.row, self.phase = row, row % 4
        self.run(("row", row == 0, self.phase), self.compute_row)

    def compute_row(self):
        self.start_first_layer()
        u = torch.zeros_like(self.first_above[:, :1])  # above the first row there is nothing, not even a bias
        if self.row > 0:
            u = self.convolve_rows(self.input_rows[:, :2], *self.vertical_in)
        self.full.start_row(u.expand(-1, self.input_rows.shape[2], -1))

    def prepare_step(self, start, stop, channel):
        return [self.first_layer(start, stop, self.full.first(start, stop)), *self.full.calls(start, stop)]


__all__ = ["PixelCNNPPCache"]
