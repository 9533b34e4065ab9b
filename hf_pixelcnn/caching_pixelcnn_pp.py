r"""
The sampling cache of the PixelCNN++.

Rows of a lower resolution exist at every second or fourth row only, and their pixels at every second or fourth column:
there, one level calls the next lower one between its up blocks and its down blocks, as the network does.
"""

from collections.abc import Sequence

import torch
import torch.nn.functional as F

from .caching_causal_image import EncodedRowCache


def concat_elu_rows(x: torch.Tensor, out: torch.Tensor | None = None) -> torch.Tensor:
    """ELU of x and of -x, features last."""
    return F.elu_(torch.cat((x, -x), dim=-1, out=out))


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


class CornerRow:
    """
    The inputs of a convolution of the combined stream, `(batch, (1 + width) * features)` with zeros on the left: those
    of the row before until a pixel replaces them. The taps on a row are the pixel and its left neighbour.
    """

    def __init__(self, cache: "PixelCNNPPCache", layer, width: int):
        weight = layer.visible_weight()
        weight_above = weight[:, :, :1].contiguous(memory_format=torch.channels_last)
        self.weight_above, self.bias = cache.keep_all((weight_above, layer.bias))
        self.weight = cache.keep(weight[:, :, 1].permute(2, 1, 0).flatten(0, 1))  # (2 * in, out)
        self.size, self.stride = layer.in_channels, layer.stride[1]
        self.inputs = cache.zeros(cache.batch, (1 + width) * self.size)
        self.above = cache.zeros(cache.batch, -(-width // self.stride), layer.out_channels)

    def slot(self, column: int) -> torch.Tensor:
        """Where the input of a column lies, `(batch, in)`."""
        return self.inputs[:, (1 + column) * self.size : (2 + column) * self.size]

    def left_taps(self, column: int) -> torch.Tensor:
        """What the output of a column sees of its own row, `(batch, 2 * in)`."""
        start = column * self.stride * self.size
        return self.inputs[:, start : start + 2 * self.size]

    def start_row(self):
        """The taps on the row before, which is complete, for all columns."""
        x = self.inputs.unflatten(1, (-1, self.size)).transpose(1, 2)[:, :, None]  # (batch, in, 1, 1 + width)
        self.above.copy_(F.conv2d(x, self.weight_above, self.bias, (1, self.stride))[:, :, 0].transpose(1, 2))


class CombinedBlock:
    r"""
    A block of the combined stream: per row what depends on the rows above, per pixel the rest.

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
        width, size = len(inputs), cache.size
        self.row_in, self.row_out = (CornerRow(cache, layer, width) for layer in (block.conv_in, block.conv_out))
        self.class_bias = cache.class_bias(block)
        weight = block.conv_other.visible_weight()[:, :, 0, 0]
        u, *skip = weight.unflatten(1, (2, -1, size)).unbind(2)  # (out, 2, size) each
        self.u_weight, self.other_bias = cache.keep_all((u.flatten(1), block.conv_other.bias))
        skip_weights = [cache.keep(part.flatten(1).T.contiguous()) for part in skip]  # one, or none in the up pass

        self.signs = cache.signs
        self.t = cache.zeros(cache.batch, size)
        self.t_twice = self.t[:, None]
        self.gated = cache.zeros(cache.batch, 2 * size)
        self.value, self.gate = self.gated.chunk(2, dim=1)
        self.steps = [
            (
                inputs[j],
                inputs[j][:, None],
                self.row_in.slot(j).unflatten(1, (2, size)),
                self.row_in.above[:, j],
                self.row_in.left_taps(j),
                () if skips is None else (skips[j], *skip_weights),
                self.row_out.slot(j).unflatten(1, (2, size)),
                self.row_out.above[:, j],
                self.row_out.left_taps(j),
                outputs[j],
            )
            for j in range(width)
        ]

    def start_row(self, celu_u: torch.Tensor):
        """Take in celu of the row `(batch, width, features)` that the vertical block beside this one has given."""
        self.row_in.start_row()
        self.row_in.above += F.linear(celu_u[:, : len(self.steps)], self.u_weight, self.other_bias)
        self.row_out.start_row()
        if self.class_bias is not None:
            self.row_out.above += self.class_bias

    def step(self, column: int):
        """One pixel."""
        x, x_twice, celu_x, above_in, taps_in, skip, celu_t, above_out, taps_out, out = self.steps[column]
        F.elu_(torch.mul(x_twice, self.signs, out=celu_x))
        torch.addmm(above_in, taps_in, self.row_in.weight, out=self.t)
        if skip:
            self.t.addmm_(*skip)
        F.elu_(torch.mul(self.t_twice, self.signs, out=celu_t))
        torch.addmm(above_out, taps_out, self.row_out.weight, out=self.gated)
        torch.addcmul(x, self.value, self.gate.sigmoid_(), out=out)


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


class PixelCNNPPCache(EncodedRowCache):
    r"""
    Row by row the vertical stream, and the taps of the combined one on rows above; pixel by pixel the rest of it.

    Of every convolution the last row of inputs is kept. Columns that only fill up the image's width have a vertical
    stream and no combined one, whose features there reach nothing.
    """

    def __init__(self, model, batch, height, width, class_ids=None):
        super().__init__(model, batch, height, width, class_ids, pixels_left=1)
        network, self.size, self.class_ids = model.model, model.config.hidden_size, class_ids
        self.signs = torch.tensor([[1.0], [-1.0]], **self.factory)
        padded_width = width + -width % 4
        self.vertical_in, self.above_in, self.left_in = (
            self.keep_all((layer.visible_weight(), layer.bias))
            for layer in (network.vertical_in, network.combined_in_above, network.combined_in_left)
        )
        # Rows r - 2 and r - 1 of the encoded image, and what is known of row r when it begins: its channel of ones.
        self.input_rows = self.zeros(batch, 3, padded_width, self.input_size + 1)
        self.input_rows[:, 2, :width, -1] = 1
        self.first_above = self.zeros(batch, width, self.size)
        self.left_weight = self.keep(self.left_in[0][:, :-1, 1, 0].T.contiguous())
        self.full = Level(self, network, 0, width, padded_width, self.hidden)

    def class_bias(self, block) -> torch.Tensor | None:
        """What the class adds to the last convolution of a block, `(batch, 1, 2 * features)`; `None` without one."""
        if self.class_ids is None:
            return None
        return self.keep(block.class_embedding(self.class_ids)[:, None, :, 0, 0])

    def start_row(self, row):
        self.row, self.phase = row, row % 4
        self.run(("row", row == 0, self.phase), self.compute_row)

    def compute_row(self):
        u = first = torch.zeros_like(self.first_above[:, :1])  # above the first row there is nothing, not even a bias
        if self.row > 0:
            self.input_rows[:, 0].copy_(self.input_rows[:, 1])
            self.input_rows[:, 1, : self.width, :-1] = self.finished_row
            self.input_rows[:, 1, : self.width, -1] = 1
            u = self.convolve_rows(self.input_rows[:, :2], *self.vertical_in)
            first = self.convolve_rows(self.input_rows[:, 1:2], *self.above_in)[:, : self.width]
        left = self.convolve_rows(self.input_rows[:, 1:], *self.left_in)[:, : self.width - 1]
        self.first_above.copy_(first + F.pad(left, (0, 0, 1, 0)))  # of the pixel to the left
        self.full.start_row(u.expand(-1, self.input_rows.shape[2], -1))

    def compute_pixel(self, column, channel):
        above, left = self.first_above[:, column], self.seen_inputs(column, 0)
        torch.addmm(above, left, self.left_weight, out=self.full.first[0])
        self.full.step(column)


__all__ = ["PixelCNNPPCache"]
