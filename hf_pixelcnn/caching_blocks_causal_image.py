r"""
What the sampling caches of PixelCNN++ and PixelSNAIL share: gated residual blocks whose kernels are 2×2 corners, and
the first layer before them.
"""

from collections.abc import Sequence

import torch
import torch.nn.functional as F

from .caching_causal_image import EncodedRowCache


def concat_elu_rows(x: torch.Tensor, out: torch.Tensor | None = None) -> torch.Tensor:
    """ELU of x and of -x, features last."""
    return F.elu_(torch.cat((x, -x), dim=-1, out=out))


class CornerRow:
    """
    The inputs of a convolution whose kernel is a 2×2 corner, `(batch, (1 + width) * features)` with zeros on the left:
    those of the row before until a pixel replaces them. The taps on a row are the pixel and its left neighbour.
    """

    def __init__(self, cache: "GatedBlockCache", layer, width: int):
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


class CornerBlock:
    r"""
    A gated residual block of 2×2 corners: per row what depends on the row above, per pixel the rest.

    Args:
        cache ([`GatedBlockCache`]): Sizes.
        block ([`GatedResidualBlock`]): The block of the network.
        inputs, outputs (sequences of `torch.Tensor`): For each column the buffers `(batch, features)` it reads and
            writes.
        others (sequence of `(torch.Tensor, torch.Tensor)`, *optional*): For each column celu of other features that the
            block reads, `(batch, 2 * other_features)`, and their weight.
    """

    def __init__(
        self,
        cache: "GatedBlockCache",
        block,
        inputs: Sequence[torch.Tensor],
        outputs: Sequence[torch.Tensor],
        others: Sequence[tuple[torch.Tensor, ...]] = (),
    ):
        width, size = len(inputs), cache.size
        self.row_in, self.row_out = (CornerRow(cache, layer, width) for layer in (block.conv_in, block.conv_out))
        self.class_bias = cache.class_bias(block)
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
                others[j] if others else (),
                self.row_out.slot(j).unflatten(1, (2, size)),
                self.row_out.above[:, j],
                self.row_out.left_taps(j),
                outputs[j],
            )
            for j in range(width)
        ]

    def start_row(self):
        """The taps on the row before, which is complete."""
        self.row_in.start_row()
        self.row_out.start_row()
        if self.class_bias is not None:
            self.row_out.above += self.class_bias

    def step(self, column: int):
        """One pixel."""
        x, x_twice, celu_x, above_in, taps_in, other, celu_t, above_out, taps_out, out = self.steps[column]
        F.elu_(torch.mul(x_twice, self.signs, out=celu_x))
        torch.addmm(above_in, taps_in, self.row_in.weight, out=self.t)
        if other:
            self.t.addmm_(*other)
        F.elu_(torch.mul(self.t_twice, self.signs, out=celu_t))
        torch.addmm(above_out, taps_out, self.row_out.weight, out=self.gated)
        torch.addcmul(x, self.value, self.gate.sigmoid_(), out=out)


class GatedBlockCache(EncodedRowCache):
    r"""
    The first layer: `down(conv_1×3([I, 1])) + right(conv_2×1([I, 1]))`.

    Args:
        model, batch, height, width, class_ids: As for all caches.
        in_above, in_left ([`CausalConv2d`]): The two convolutions.
        padded_width (`int`, *optional*): Columns to encode, if more than the image has.
    """

    def __init__(self, model, batch, height, width, class_ids=None, *, in_above, in_left, padded_width=None):
        super().__init__(model, batch, height, width, class_ids, pixels_left=1)
        self.size, self.class_ids = model.config.hidden_size, class_ids
        self.signs = torch.tensor([[1.0], [-1.0]], **self.factory)
        self.above_in, self.left_in = (
            self.keep_all((layer.visible_weight(), layer.bias)) for layer in (in_above, in_left)
        )
        # Rows r - 2 and r - 1 of the encoded image, and what is known of row r when it begins: its channel of ones.
        self.input_rows = self.zeros(batch, 3, padded_width or width, self.input_size + 1)
        self.input_rows[:, 2, :width, -1] = 1
        self.first_above = self.zeros(batch, width, self.size)
        self.left_weight = self.keep(self.left_in[0][:, :-1, 1, 0].T.contiguous())

    def class_bias(self, block) -> torch.Tensor | None:
        """What the class adds to the last convolution of a block, `(batch, 1, 2 * features)`; `None` without one."""
        if self.class_ids is None:
            return None
        return self.keep(block.class_embedding(self.class_ids)[:, None, :, 0, 0])

    def start_first_layer(self):
        """Take in the row just finished, and compute what the next one sees of it. What is run depends on row > 0."""
        above = torch.zeros_like(self.first_above[:, :1])  # above the first row there is nothing, not even a bias
        if self.row > 0:
            self.input_rows[:, 0].copy_(self.input_rows[:, 1])
            self.input_rows[:, 1, : self.width, :-1] = self.finished_row
            self.input_rows[:, 1, : self.width, -1].fill_(1)
            above = self.convolve_rows(self.input_rows[:, 1:2], *self.above_in)[:, : self.width]
        left = self.convolve_rows(self.input_rows[:, 1:], *self.left_in)[:, : self.width - 1]
        self.first_above.copy_(above + F.pad(left, (0, 0, 1, 0)))  # of the pixel to the left

    def first_layer(self, column: int, out: torch.Tensor):
        """The first layer's features `(batch, hidden_size)` of a pixel."""
        torch.addmm(self.first_above[:, column], self.seen_inputs(column, 0), self.left_weight, out=out)


__all__ = ["CornerBlock", "CornerRow", "GatedBlockCache", "concat_elu_rows"]
