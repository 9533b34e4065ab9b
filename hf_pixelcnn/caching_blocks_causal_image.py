r"""
What the sampling caches of PixelCNN++ and PixelSNAIL share: gated residual blocks whose kernels are 2×2 corners, and
the first layer before them.
"""

from collections.abc import Callable
from functools import partial

import torch
import torch.nn.functional as F

from .caching_spans_causal_image import SpanCache

Span = Callable[[int, int], torch.Tensor]  # gives the features of the columns from one to another, see `columns`


def concat_elu_rows(x: torch.Tensor, out: torch.Tensor | None = None) -> torch.Tensor:
    """ELU of x and of -x, features last."""
    return F.elu_(torch.cat((x, -x), dim=-1, out=out))


def signed(x: torch.Tensor, out: torch.Tensor) -> list[Callable[[], object]]:
    """Calls that write x and -x, `(..., features)`, into `out`, `(..., 2 * features)`."""
    plus, minus = out.chunk(2, dim=-1)
    return [partial(plus.copy_, x), partial(torch.neg, x, out=minus)]


def columns(rows: torch.Tensor, start: int, stop: int) -> torch.Tensor:
    """Some columns of `(batch, width, features)`: as a matrix where the batch or the span is 1."""
    if stop - start == 1:
        return rows[:, start]
    return rows[0, start:stop] if len(rows) == 1 else rows[:, start:stop]


def product(total: torch.Tensor, x: torch.Tensor, weight: torch.Tensor, out: torch.Tensor) -> Callable[[], object]:
    """A call that writes `total + x @ weight`, features of a span as [`columns`] gives them."""
    if x.ndim == 2:
        return partial(torch.addmm, total, x, weight, out=out)
    return partial(torch.baddbmm, total, x, weight.expand(len(x), -1, -1), out=out)


class CornerRow:
    """
    The inputs of a convolution whose kernel is a 2×2 corner, `(batch, 1 + width, features)` with zeros on the left:
    those of the row before until a pixel replaces them. The taps on a row are the pixel and its left neighbour.
    """

    def __init__(self, cache: "GatedBlockCache", layer, width: int):
        weight = layer.visible_weight()
        weight_above = weight[:, :, :1].contiguous(memory_format=torch.channels_last)
        self.weight_above, self.bias = cache.keep_all((weight_above, layer.bias))
        self.weight = cache.keep(weight[:, :, 1].permute(2, 1, 0).flatten(0, 1))  # (2 * in, out)
        self.size, self.stride = layer.in_channels, layer.stride[1]
        self.inputs = cache.zeros(cache.batch, 1 + width, self.size)
        self.taps = self.inputs.flatten(1).unfold(1, 2 * self.size, self.stride * self.size)
        self.above = cache.zeros(cache.batch, -(-width // self.stride), layer.out_channels)

    def slots(self, start: int, stop: int) -> torch.Tensor:
        """Where the inputs of a span lie."""
        return columns(self.inputs, 1 + start, 1 + stop)

    def output(self, start: int, stop: int, out: torch.Tensor) -> Callable[[], object]:
        """A call that computes the output of a span, the inputs of which are known."""
        return product(columns(self.above, start, stop), columns(self.taps, start, stop), self.weight, out)

    def start_row(self):
        """The taps on the row before, which is complete, for all columns."""
        x = self.inputs.transpose(1, 2)[:, :, None]  # (batch, in, 1, 1 + width)
        self.above.copy_(F.conv2d(x, self.weight_above, self.bias, (1, self.stride))[:, :, 0].transpose(1, 2))


class CornerBlock:
    r"""
    A gated residual block of 2×2 corners: per row what depends on the row above, per span of the row the rest.

    Args:
        cache ([`GatedBlockCache`]): Sizes.
        block ([`GatedResidualBlock`]): The block of the network.
        width (`int`): Columns of a row.
        x, out ([`Span`]): What it reads and writes.
        other (`(Span, torch.Tensor)`, *optional*): celu of other features that it reads, and their weight.
    """

    def __init__(
        self,
        cache: "GatedBlockCache",
        block,
        width: int,
        x: Span,
        out: Span,
        other: tuple[Span, torch.Tensor] | None = None,
    ):
        self.row_in, self.row_out = (CornerRow(cache, layer, width) for layer in (block.conv_in, block.conv_out))
        self.class_bias = cache.class_bias(block)
        self.celu, self.x, self.out, self.other = cache.celu, x, out, other
        self.t, self.gated = cache.scratch(cache.size), cache.scratch(2 * cache.size)

    def start_row(self):
        """The taps on the row before, which is complete."""
        self.row_in.start_row()
        self.row_out.start_row()
        if self.class_bias is not None:
            self.row_out.above += self.class_bias

    def calls(self, start: int, stop: int) -> list[Callable[[], object]]:
        """What computes a span."""
        x, t, gated, out = (span(start, stop) for span in (self.x, self.t, self.gated, self.out))
        value, gate = gated.chunk(2, dim=-1)
        calls = [*self.celu(x, self.row_in.slots(start, stop)), self.row_in.output(start, stop, t)]
        if self.other is not None:
            other, weight = self.other
            calls.append(product(t, other(start, stop), weight, t))
        return [
            *calls,
            *self.celu(t, self.row_out.slots(start, stop)),
            self.row_out.output(start, stop, gated),
            gate.sigmoid_,
            partial(torch.addcmul, x, value, gate, out=out),
        ]


class GatedBlockCache(SpanCache):
    r"""
    Spans as lists of calls; and the first layer: `down(conv_1×3([I, 1])) + right(conv_2×1([I, 1]))`.

    Args:
        model, batch, height, width, class_ids: As for all caches.
        in_above, in_left ([`CausalConv2d`]): The two convolutions.
        padded_width (`int`, *optional*): Columns to encode, if more than the image has.
    """

    def __init__(self, model, batch, height, width, class_ids=None, *, in_above, in_left, padded_width=None):
        super().__init__(model, batch, height, width, class_ids, pixels_left=1)
        self.size, self.class_ids = model.config.hidden_size, class_ids
        self.above_in, self.left_in = (
            self.keep_all((layer.visible_weight(), layer.bias)) for layer in (in_above, in_left)
        )
        # Rows r - 2 and r - 1 of the encoded image, and what is known of row r when it begins: its channel of ones.
        self.input_rows = self.zeros(batch, 3, padded_width or width, self.input_size + 1)
        self.input_rows[:, 2, :width, -1] = 1
        self.first_above = self.zeros(batch, width, self.size)
        self.left_weight = self.keep(self.left_in[0][:, :-1, 1, 0].T.contiguous())

    def kernel_features(self, config):
        return 2 * config.hidden_size  # celu

    def compute_span(self, start, stop, channel):
        for call in self.step(start, stop, channel):
            call()

    def scratch(self, features: int) -> Span:
        """Memory of the span in work."""
        memory = self.zeros(self.columns_at_once * self.batch, features)
        by_image = lambda number: memory[: number * self.batch].view(self.batch, number, features)  # noqa: E731
        return lambda start, stop: columns(by_image(stop - start), 0, stop - start)

    def celu(self, x: torch.Tensor, out: torch.Tensor) -> list[Callable[[], object]]:
        """Calls that write ELU of x and of -x, `(..., features)`, into `out`, `(..., 2 * features)`."""
        return [*signed(x, out), partial(F.elu_, out)]

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

    def first_layer(self, start: int, stop: int, out: torch.Tensor) -> Callable[[], object]:
        """A call that computes the first layer of a span."""
        left = self.input_row.unflatten(1, (-1, self.input_size))
        return product(columns(self.first_above, start, stop), columns(left, start, stop), self.left_weight, out)


__all__ = ["CornerBlock", "CornerRow", "GatedBlockCache", "Span", "columns", "concat_elu_rows", "product", "signed"]
