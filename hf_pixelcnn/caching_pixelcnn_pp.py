r"""
The sampling cache of the PixelCNN++.

Rows of a lower resolution exist at every second or fourth row only, and their pixels at every second or fourth column:
there, one level calls the next lower one between its up blocks and its down blocks, as the network does.
"""

from collections.abc import Sequence

import torch
import torch.nn.functional as F

from .caching_blocks_causal_image import CornerBlock, CornerRow, GatedBlockCache, concat_elu_rows


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
        cache ([`PixelCNNPPCache`]): Sizes.
        block: The block of the network.
        inputs, outputs (sequences of `torch.Tensor`): For each column the buffers `(batch, features)` it reads and
            writes.
        skips (sequence of `torch.Tensor`, *optional*): For each column celu of what a down block gets from the up pass.
    """

    def __init__(
        self,
        cache: "PixelCNNPPCache",
        block,
        inputs: Sequence[torch.Tensor],
        outputs: Sequence[torch.Tensor],
        skips: Sequence[torch.Tensor] | None = None,
    ):
        weight = block.conv_other.visible_weight()[:, :, 0, 0]
        u, *skip = weight.unflatten(1, (2, -1, cache.size)).unbind(2)  # (out, 2, size) each
        self.u_weight, self.other_bias = cache.keep_all((u.flatten(1), block.conv_other.bias))
        skip_weights = [cache.keep(part.flatten(1).T.contiguous()) for part in skip]  # one, or none in the up pass
        super().__init__(cache, block, inputs, outputs, [] if skips is None else [(s, *skip_weights) for s in skips])

    def start_row(self, celu_u: torch.Tensor):
        """Take in celu of the row `(batch, width, features)` that the vertical block beside this one has given."""
        super().start_row()
        self.row_in.above += F.linear(celu_u[:, : len(self.steps)], self.u_weight, self.other_bias)


class Level:
    r"""
    What happens at one resolution.

    Args:
        cache ([`PixelCNNPPCache`]): Sizes, and the row.
        network ([`PixelCNNPPModel`]): The network.
        level (`int`): 0, 1 and 2 for full, half and a quarter of the resolution.
        width (`int`): Columns of the image here.
        padded_width (`int`): Columns of the vertical stream here.
        result (`torch.Tensor` of shape `(batch, features)`, *optional*): Where the last block writes its pixel.
    """

    def __init__(
        self,
        cache: "PixelCNNPPCache",
        network,
        level: int,
        width: int,
        padded_width: int,
        result: torch.Tensor | None = None,
    ):
        size = cache.size
        self.cache, self.level = cache, level
        up_layers, down_layers = network.up_layers[level], network.down_layers[2 - level]
        self.vertical_up = [VerticalBlock(cache, layer.vertical, padded_width) for layer in up_layers]
        self.vertical_down = [VerticalBlock(cache, layer.vertical, padded_width) for layer in down_layers]
        self.lower = None
        if level < 2:
            self.lower = Level(cache, network, level + 1, -(-width // 2), padded_width // 2)

        self.first, last, skips = self.plan_up_pass(network, up_layers, width)
        if self.lower is not None:
            skips.append(self.buffers(width, 2 * size))
            self.plan_change_of_resolution(network, last, skips[-1][0], width, padded_width)
            last = self.combined_rows[0].split(size, dim=1)[:width]
        self.combined_down = []
        for i, layer in enumerate(down_layers):
            is_last = i == len(down_layers) - 1
            outputs = self.buffers(width, size) if result is None or not is_last else [result] * width
            self.combined_down.append(CombinedBlock(cache, layer.combined, last, outputs, skips.pop()))
            last = outputs
        self.result = last[0]

    def buffers(self, width: int, features: int) -> list[torch.Tensor]:
        """Where the columns of a row are written: one place for all of them, `(batch, features)`."""
        return [self.cache.zeros(self.cache.batch, features)] * width

    def plan_up_pass(self, network, layers, width: int) -> tuple[list, list, list]:
        """
        The up pass of the combined stream: where it begins, where it ends, and what the down pass reads of it, by
        column. What a block reads, it keeps as celu: so the down pass finds it.
        """
        first = stream = self.buffers(width, self.cache.size)
        self.combined_up, skips = [], []
        for i, layer in enumerate(layers):
            outputs = self.buffers(width, self.cache.size)
            if self.lower is not None and i == len(layers) - 1:
                self.downsampling = CornerRow(self.cache, network.combined_downsampling[self.level], width)
                outputs = [self.downsampling.slot(j) for j in range(width)]
            block = CombinedBlock(self.cache, layer.combined, stream, outputs)
            self.combined_up.append(block)
            skips.append([block.row_in.slot(j) for j in range(width)])
            stream = outputs
        return first, stream, skips

    def plan_change_of_resolution(self, network, last: list, celu: torch.Tensor, width: int, padded_width: int):
        """The layers to the next lower resolution, which read the `last` outputs here and their `celu`, and back."""
        cache, batch, size = self.cache, self.cache.batch, self.cache.size
        self.last_twice = [x[:, None] for x in last]
        self.last_celu = celu.unflatten(1, (2, size))
        self.vertical_downsampling = RowConv(cache, network.vertical_downsampling[self.level], padded_width)
        upsampling = network.vertical_upsampling[1 - self.level]
        self.upsample = upsampling.upsample
        self.vertical_up_weights = cache.keep_all((upsampling.visible_weight(), upsampling.bias))
        self.vertical_rows = cache.zeros(2, batch, padded_width, size)  # from one of low resolution
        upsampling = network.combined_upsampling[1 - self.level]
        up_weights = upsampling.visible_weight().permute(2, 1, 3, 0).flatten(2)  # (2, in, 2 * out)
        self.up_weights, self.up_bias = cache.keep_all((up_weights, upsampling.bias.repeat(2)))
        half = -(-width // 2)
        self.combined_rows = cache.zeros(2, batch, half * 2 * size)
        pairs = [pair.unbind(0) for pair in self.combined_rows.split(2 * size, dim=2)]
        self.halves = [(self.downsampling.above[:, j], self.downsampling.left_taps(j), *pairs[j]) for j in range(half)]

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

    def step(self, column: int):
        """One pixel of the combined stream through the network, from `first` to `result`."""
        for block in self.combined_up:
            block.step(column)
        if self.lower is not None:
            F.elu_(torch.mul(self.last_twice[column], self.cache.signs, out=self.last_celu))
            if self.has_lower_row() and column % 2 == 0:
                above, taps, row, next_row = self.halves[column // 2]
                torch.addmm(above, taps, self.downsampling.weight, out=self.lower.first[0])
                self.lower.step(column // 2)
                torch.addmm(self.up_bias, self.lower.result, self.up_weights[0], out=row)
                torch.addmm(self.up_bias, self.lower.result, self.up_weights[1], out=next_row)
        for block in self.combined_down:
            block.step(column)


class PixelCNNPPCache(GatedBlockCache):
    r"""
    Row by row the vertical stream, and the taps of the combined one on rows above; pixel by pixel the rest of it.

    Of every convolution the last row of inputs is kept. Columns that only fill up the image's width have a vertical
    stream and no combined one, whose features there reach nothing.
    """

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
        self.full = Level(self, network, 0, width, padded_width, self.hidden)

    def start_row(self, row):
        self.row, self.phase = row, row % 4
        self.run(("row", row == 0, self.phase), self.compute_row)

    def compute_row(self):
        self.start_first_layer()
        u = torch.zeros_like(self.first_above[:, :1])  # above the first row there is nothing, not even a bias
        if self.row > 0:
            u = self.convolve_rows(self.input_rows[:, :2], *self.vertical_in)
        self.full.start_row(u.expand(-1, self.input_rows.shape[2], -1))

    def compute_pixel(self, column, channel):
        self.first_layer(column, self.full.first[0])
        self.full.step(column)


__all__ = ["PixelCNNPPCache"]
