r"""
The recurrences of the PixelRNN: an LSTM cell for every pixel, which reads the states of pixels before it.

With inputs s of a pixel (everything but the states) and the states h of the pixels that it reads:

    o, f, i, g = s + U h              gates of `features` each, in this order
    c = σ(f) c' + σ(i) tanh(g)        c': of the one pixel that the cell state comes from
    h = σ(o) tanh(c)

All pixels that do not wait for each other are one step: a row in the Row LSTM, a diagonal in the Diagonal LSTM. So a
scan of an image takes `height` steps, or `height + width - 1`. [`scan_by_autograd`] is the plain way to write it;
[`lstm_scan`] computes the same several times as fast, with a backward pass written by hand. It is an operator of torch,
which compiled and exported code calls as one node.

Reference: van den Oord et al. 2016, Pixel Recurrent Neural Networks, sections 3.1 and 3.2,
https://huggingface.co/papers/1601.06759
"""

from typing import NamedTuple

import torch
import torch.nn.functional as F

from .masking_causal_image import CausalConv2d

ROW_TAPS = ((-1, -1), (-1, 0), (-1, 1))  # rows down and columns right of the states that a pixel of the Row LSTM reads
DIAGONAL_TAPS = ((-1, 0), (0, -1))


class Steps(NamedTuple):
    r"""
    The order in which a scan computes pixels. A step has a slot for each pixel that it may compute; the pixel's cell
    state comes from the same slot one step earlier.

    Args:
        height (`int`), width (`int`): Of the image.
        diagonal (`bool`): Whether a step is a diagonal, with a slot per row, or a row, with a slot per column.
    """

    height: int
    width: int
    diagonal: bool

    @property
    def number(self) -> int:
        return self.height + self.width - 1 if self.diagonal else self.height

    @property
    def slots(self) -> int:
        return self.height if self.diagonal else self.width

    @property
    def shifts(self) -> list[int]:
        """How far from a pixel's slot, one step earlier, those are whose states it reads; see the taps."""
        return [down for down, _ in DIAGONAL_TAPS] if self.diagonal else [right for _, right in ROW_TAPS]

    def used(self, step: int) -> tuple[int, int]:
        """First slot that holds a pixel of the image, and how many do."""
        if not self.diagonal:
            return 0, self.slots
        first = max(0, step - self.width + 1)
        return first, min(step + 1, self.height) - first

    def shape(self, image: torch.Tensor, features: int, before: int = 0, beside: int = 0) -> tuple[int, ...]:
        """Of a buffer for an image of inputs: `(before + steps, directions, slots + 2 * beside, batch, features)`."""
        return before + self.number, image.shape[0], self.slots + 2 * beside, image.shape[1], features

    def image(self, buffer: torch.Tensor) -> torch.Tensor:
        """A buffer `(steps, directions, slots, batch, features)` as `(directions, batch, height, width, features)`."""
        step, direction, slot, batch, feature = buffer.stride()
        row, column = (step + slot, step) if self.diagonal else (step, slot)
        size = (buffer.shape[1], buffer.shape[3], self.height, self.width, buffer.shape[4])
        return buffer.as_strided(size, (direction, batch, row, column, feature), buffer.storage_offset())


def scan_by_autograd(inputs: torch.Tensor, weight: torch.Tensor, diagonal: bool) -> torch.Tensor:
    """[`lstm_scan`] as its equations say, step by step: the reference that it is held to."""
    directions, batch, height, width, gates = inputs.shape
    steps = Steps(height, width, diagonal)
    s = inputs.new_zeros(steps.shape(inputs, gates))
    steps.image(s).copy_(inputs)
    h = c = s.new_zeros(directions, steps.slots, batch, gates // 4)
    states = []
    for step, s_step in enumerate(s):
        first, count = steps.used(step)
        is_used = torch.zeros(steps.slots, 1, 1, device=s.device, dtype=s.dtype)
        is_used[first : first + count] = 1
        around = F.pad(h, (0, 0, 0, 0, 1, 1))
        read = torch.cat([around[:, 1 + shift : 1 + shift + steps.slots] for shift in steps.shifts], dim=-1)
        o, f, i, g = (s_step + torch.einsum("dsbk,dgk->dsbg", read, weight)).chunk(4, dim=-1)
        c = is_used * (f.sigmoid() * c + i.sigmoid() * g.tanh())
        h = o.sigmoid() * c.tanh()
        states.append(h)
    return steps.image(torch.stack(states)).contiguous()


# The fast scan. One sigmoid serves all gates and one the cell, because tanh(x) = 2 σ(2x) - 1: where g stands below, it
# is σ(2g), and cells are 2c. States are kept as -h = o - 2 o σ(2c), which is one operation. Factors and sign lie in the
# weights.


def gate_factors(gates: torch.Tensor) -> torch.Tensor:
    """1 for the gates o, f and i, 2 for g."""
    factors = torch.ones_like(gates[0, 0, 0, 0])
    factors[3 * len(factors) // 4 :] = 2
    return factors


def scan_forward(inputs: torch.Tensor, weight: torch.Tensor, diagonal: bool) -> list[torch.Tensor]:
    """States as an image, and what the backward pass needs: all gates and cells, as buffers of [`Steps`]."""
    features = inputs.shape[-1] // 4
    steps = Steps(inputs.shape[2], inputs.shape[3], diagonal)
    factors = gate_factors(inputs)
    gates = inputs.new_empty(steps.shape(inputs, 4 * features))
    torch.mul(inputs, factors, out=steps.image(gates))
    cells = inputs.new_zeros(steps.shape(inputs, features, before=1))
    states = inputs.new_zeros(steps.shape(inputs, features, before=1, beside=1))
    matrix = (-factors * weight.transpose(1, 2)).contiguous()  # (directions, taps * features, 4 * features)
    gates_of, cells_of, states_of = gates.unbind(0), cells.unbind(0), states.unbind(0)
    for step in range(steps.number):
        first, count = steps.used(step)
        read = torch.cat([states_of[step].narrow(1, 1 + first + shift, count) for shift in steps.shifts], dim=-1)
        z = gates_of[step].narrow(1, first, count)
        z.flatten(1, 2).baddbmm_(read.flatten(1, 2), matrix).sigmoid_()
        o, f, i, g = z.chunk(4, dim=-1)
        c = cells_of[step + 1].narrow(1, first, count)
        torch.mul(f, cells_of[step].narrow(1, first, count), out=c).addcmul_(i, g, value=4).sub_(i, alpha=2)
        torch.addcmul(o, o, c.sigmoid(), value=-2, out=states_of[step + 1].narrow(1, 1 + first, count))
    return [steps.image(states[1:, :, 1:-1]).neg().contiguous(), gates, cells]


def scan_backward(
    gradient: torch.Tensor,
    weight: torch.Tensor,
    states: torch.Tensor,
    gates: torch.Tensor,
    cells: torch.Tensor,
    diagonal: bool,
) -> list[torch.Tensor]:
    """Gradients of inputs and weight from that of the states."""
    features = states.shape[-1]
    steps = Steps(states.shape[2], states.shape[3], diagonal)
    factors = gate_factors(gates)
    dz = torch.empty_like(gates)
    dh = states.new_zeros(steps.shape(states, features, before=1, beside=1))
    steps.image(dh[1:, :, 1:-1]).copy_(gradient)
    dc_all = torch.zeros_like(cells[0])  # of the cells 2c of the step in work
    matrix = weight * factors[:, None]
    gates_of, cells_of, dz_of, dh_of = gates.unbind(0), cells.unbind(0), dz.unbind(0), dh.unbind(0)
    for step in reversed(range(steps.number)):
        first, count = steps.used(step)
        z, dz_step = gates_of[step].narrow(1, first, count), dz_of[step].narrow(1, first, count)
        (o, f, i, g), (do, df, di, dg) = z.chunk(4, dim=-1), dz_step.chunk(4, dim=-1)
        dc, dh_step = dc_all.narrow(1, first, count), dh_of[step + 1].narrow(1, 1 + first, count)
        tanh_c = cells_of[step + 1].narrow(1, first, count).sigmoid().mul_(2).sub_(1)
        dh_tanh = dh_step * tanh_c
        dc.addcmul_(dh_step, o, value=0.5).addcmul_(tanh_c.mul_(dh_tanh), o, value=-0.5)
        torch.addcmul(z, z, z, value=-1, out=dz_step)  # the slopes of the sigmoids
        do.mul_(dh_tanh)
        df.mul_(cells_of[step].narrow(1, first, count)).mul_(dc)
        di.mul_(g.mul(4).sub_(2).mul_(dc))
        dg.mul_(i).mul_(dc.mul(4))
        dc.mul_(f)
        d_read = torch.bmm(dz_step.flatten(1, 2), matrix).unflatten(1, (count, -1)).chunk(len(steps.shifts), dim=-1)
        for shift, part in zip(steps.shifts, d_read, strict=True):
            dh_of[step].narrow(1, 1 + first + shift, count).add_(part)
    d_inputs = (steps.image(dz) * factors).contiguous()
    dz_columns = d_inputs.flatten(1, 3).transpose(1, 2)
    around = F.pad(states, (0, 0, 1, 1, 1, 0))
    d_weight = [
        torch.bmm(dz_columns, around[:, :, 1 + down :, 1 + right :][:, :, : steps.height, : steps.width].flatten(1, 3))
        for down, right in (DIAGONAL_TAPS if diagonal else ROW_TAPS)
    ]
    return [d_inputs, torch.cat(d_weight, dim=-1)]


def register_scan():
    """Make the scan an operator of torch; once in a process, which may hold this file several times, as remote code."""
    if hasattr(torch.ops.hf_pixelcnn, "lstm_scan"):
        return

    forward = torch.library.custom_op("hf_pixelcnn::lstm_scan", scan_forward, mutates_args=())
    backward = torch.library.custom_op("hf_pixelcnn::lstm_scan_backward", scan_backward, mutates_args=())

    @forward.register_fake
    def _(inputs, weight, diagonal):
        steps, features = Steps(inputs.shape[2], inputs.shape[3], diagonal), inputs.shape[-1] // 4
        shapes = [(*inputs.shape[:-1], features), steps.shape(inputs, 4 * features), steps.shape(inputs, features, 1)]
        return [inputs.new_empty(shape) for shape in shapes]

    @backward.register_fake
    def _(gradient, weight, states, gates, cells, diagonal):
        return [gradient.new_empty(*gradient.shape[:-1], gates.shape[-1]), torch.empty_like(weight)]

    def setup_context(ctx, inputs, output):
        _, weight, ctx.diagonal = inputs
        ctx.save_for_backward(weight, *output)
        ctx.set_materialize_grads(False)  # gates and cells have none

    def gradients(ctx, grads):
        if grads[0] is None:
            return None, None, None
        weight, states, gates, cells = ctx.saved_tensors
        return *torch.ops.hf_pixelcnn.lstm_scan_backward(grads[0], weight, states, gates, cells, ctx.diagonal), None

    forward.register_autograd(gradients, setup_context=setup_context)


register_scan()


def lstm_scan(inputs: torch.Tensor, weight: torch.Tensor, diagonal: bool) -> torch.Tensor:
    r"""
    The states of LSTM cells that read each other over an image; several directions at once, each by itself.

    Args:
        inputs (`torch.FloatTensor` of shape `(directions, batch, height, width, 4 * features)`): s, see above.
        weight (`torch.FloatTensor` of shape `(directions, 4 * features, taps * features)`): U, for the states of the
            pixels `DIAGONAL_TAPS` or `ROW_TAPS`, one after the other. Outside of the image states and cells are 0.
        diagonal (`bool`): Whether the cell state comes from the pixel to the left and states from there and above, or
            the cell from above and states from the three pixels above.

    Returns:
        `torch.FloatTensor` of shape `(directions, batch, height, width, features)`: h.
    """
    return torch.ops.hf_pixelcnn.lstm_scan(inputs, weight, diagonal)[0]


def tap_matrices(weight: torch.Tensor, directions: int) -> torch.Tensor:
    """The weight of a [`ConvLSTM`] as [`lstm_scan`] takes it: `(directions, 4 * features, taps * features)`."""
    return weight.flatten(2).transpose(1, 2).flatten(1).unflatten(0, (directions, -1))


class ConvLSTM(CausalConv2d):
    r"""
    The state-to-state convolution of one or more scans. They are all that it acts in, so `forward` is the scan; its
    weights are initialised, adapted and saved as those of other layers.

    Input: s of each direction, `(batch, 4 * features, height, width)`. Output: their states, `(batch, features, height,
    width)`. The diagonal scan has a kernel of 2×1 on the image whose rows are each moved one further to the right
    (first tap: the pixel above, second: the one to the left), the Row LSTM one of 1×3 on the row above.
    """

    def __init__(self, features: int, directions: int, *, diagonal: bool):
        self.directions, self.diagonal = directions, diagonal
        kernel_size, padding_sides = ((2, 1), (0, 0, 1, 0)) if diagonal else ((1, 3), (1, 1, 0, 0))
        super().__init__(features, 4 * features * directions, kernel_size, padding_sides, bias=False)

    def forward(self, *inputs: torch.Tensor, weight: torch.Tensor | None = None) -> tuple[torch.Tensor, ...]:
        s = torch.stack([direction.movedim(1, -1) for direction in inputs])  # features last, as memory is read
        states = lstm_scan(s, tap_matrices(self.visible_weight(weight), self.directions).to(s.dtype), self.diagonal)
        return states.movedim(-1, 2).unbind(0)


__all__ = ["DIAGONAL_TAPS", "ROW_TAPS", "ConvLSTM", "lstm_scan", "scan_by_autograd", "tap_matrices"]
