"""
The sampling cache of the PixelRNN.

It draws pixel by pixel: a pass over several columns of the Diagonal BiLSTM would compute their cells one after the
other, which is most of what drawing them costs.
"""

import torch
import torch.nn.functional as F

from .caching_causal_image import MaskedConvCache
from .recurrence_pixelrnn import tap_matrices
from .weights_causal_image import group_rows, pointwise_matrix, pointwise_weights, row_weights, stack_layers


class PixelRNNCache(MaskedConvCache):
    r"""
    Row by row what comes from rows above, [`RowLSTMRows`] or [`DiagonalBiLSTMRows`]; pixel by pixel the cells.

    In `rows` a layer's inputs x of the row lie one after the other, in the Diagonal BiLSTM each followed by the state h
    of its pixel. So what a pixel's gates read to its left (x or h of the last pixel), then x of its own earlier
    channels, is one run of memory, and of all layers one batched product. A layer then needs two small products, W_own
    and W_up.

    The stream in memory lacks what is known of it when a row begins: `base`, the biases of W_up and what R adds. That
    is multiplied by W_own for a row at once.

    As in the scan, tanh(x) = 2 σ(2x) - 1, so there is one sigmoid of all gates; cells are kept as 2c and states as -h.
    The factor 2 lies in the weights that make g, the sign in those that read states.
    """

    def __init__(self, model, batch, height, width, class_ids=None):
        super().__init__(model, batch, height, width, class_ids)
        config, network, channels = model.config, model.model, self.num_groups
        self.layers, self.size, self.features = network.layers, config.hidden_size, config.hidden_size // 2
        number, gates, size = len(self.layers), 4 * self.features, self.size
        self.by_channel = torch.cat([group_rows(gates, channels, c, num_parts=4) for c in range(channels)])
        self.by_channel = self.by_channel.to(self.factory["device"])
        self.factors = torch.ones(gates, **self.factory)
        self.factors[-self.features :] = 2

        first = network.conv_in
        self.first_weight, self.first_bias = self.keep_all((first.visible_weight()[:, :, :-1], first.bias))
        self.first_above = self.zeros(batch, width, size)
        self.first_left = self.keep_all(row_weights(first, self.first_reach, channels)[0])

        self.above = self.zeros(number, batch, width, gates)  # by channel; what is known of the gates
        self.base = self.zeros(number + 1, batch, width, size)
        self.sums = self.zeros(number, batch, gates // channels)
        self.last = self.zeros(batch, size)
        self.above_rows = ROWS[config.recurrence](self, class_ids)
        self.steps = [[self.prepare_step(j, c) for c in range(channels)] for j in range(width)]

    def gate_columns(self, weight: torch.Tensor) -> torch.Tensor:
        """Weights `(..., gates, in)` to matrices `(..., in, gates)`, with the factors of gates, channel by channel."""
        return (weight.transpose(-1, -2) * self.factors)[..., self.by_channel]

    def prepare_inputs(self, layers: list, reach: int, states: torch.Tensor | None = None):
        r"""
        The memory of all layers' inputs, and the weights on it.

        Args:
            layers (`list`): Each layer's convolution of inputs.
            reach (`int`): How many pixels to the left of its own they read.
            states (`torch.FloatTensor` of shape `(layers, features, gates)`, *optional*): The weights on the state to
                the left, if it is read there, with sign and factors, gates in order of channels.
        """
        beside = 0 if states is None else self.features  # of each pixel, after its inputs
        self.lead, self.stride = reach * self.size + beside, self.size + beside
        self.rows = self.zeros(len(layers), self.batch, self.lead + self.width * self.stride)
        left, own = zip(*(row_weights(layer, reach, self.num_groups, num_parts=4) for layer in layers), strict=True)
        factors = self.own_group(self.factors[self.by_channel], 0)
        left, own = ([matrix * factors for matrix in stack_layers(part)] for part in (left, own))
        if states is not None:
            of_states = states.chunk(self.num_groups, dim=-1)
            left = [torch.cat(both, dim=1) for both in zip(of_states, left, strict=True)]
        self.left, self.own = self.keep_all(left), self.keep_all(own)

    def prepare_step(self, column: int, channel: int):
        """All slices and matrices that one dimension needs."""
        group, start = self.hidden_group, column * self.stride
        seen = (channel + 1) * group // 2
        own = start + self.lead + channel * group
        streams = [row[:, own : own + group] for row in self.rows] + [self.own_group(self.last, channel)]
        layers = []
        for i in range(len(self.rows)):
            states, cells = self.above_rows.states(i, column), self.above_rows.cells_of(i, column)
            layers.append(
                (
                    streams[i],
                    self.own[channel][i],
                    self.sums[i],
                    *self.sums[i].chunk(4, dim=-1),
                    self.own_group(cells, channel),
                    self.own_group(states, channel),
                    states[:, :seen],
                    self.above_rows.upsampling[i][channel],
                    streams[i + 1],
                )
            )
        return (
            self.own_group(self.first_above[:, column], channel),
            self.seen_inputs(column, channel),
            self.own_group(self.above[:, :, column], channel),
            self.rows[:, :, start : start + self.lead + channel * group],
            layers,
            self.own_group(self.base[-1][:, column], channel),
            self.own_group(self.hidden, channel),
        )

    def start_row(self, row):
        self.row = row
        self.run(("row", row > 0), self.compute_row)

    def compute_row(self):
        self.above_rows.start_row(is_first=self.row == 0)
        self.shift_input_rows()
        self.first_above.copy_(self.convolve_rows(self.input_above, self.first_weight, self.first_bias))

    def compute_pixel(self, column, channel):
        first_above, seen_inputs, above, left_features, layers, base, hidden = self.steps[column][channel]
        torch.addmm(first_above, seen_inputs, self.first_left[channel], out=layers[0][0])
        torch.baddbmm(above, left_features, self.left[channel], out=self.sums)
        for stream, own, gates, o, f, i, g, cell, state, seen, upsampling, next_stream in layers:
            gates.addmm_(stream, own).sigmoid_()
            cell.mul_(f).addcmul_(i, g, value=4).sub_(i, alpha=2)
            torch.addcmul(o, o, cell.sigmoid(), value=-2, out=state)
            torch.addmm(stream, seen, upsampling, out=next_stream)
        torch.add(next_stream, base, out=hidden)


class RowLSTMRows:
    """Of the Row LSTM: states and cells of the row above, and what the gates of a row get from them."""

    def __init__(self, cache: PixelRNNCache, class_ids: torch.Tensor | None):
        self.cache, layers = cache, cache.layers
        inputs, (number, batch, width, _) = [layer.input_to_state for layer in layers], cache.above.shape
        cache.prepare_inputs(inputs, reach=1)
        self.state_rows = cache.zeros(number, batch, width + 2, cache.features)
        self.cells = cache.zeros(number, batch, width, cache.features)
        weight = torch.stack([tap_matrices(layer.recurrence.visible_weight(), 1)[0] for layer in layers])
        self.weight = cache.keep(-cache.gate_columns(weight))
        self.upsampling = [
            cache.keep_all(-m for m in pointwise_weights(x.upsampling, cache.num_groups)) for x in layers
        ]

        # What the base, the sum of the biases of earlier layers, gives the gates; column 0 has no pixel to its left.
        base = F.pad(torch.stack([layer.upsampling.bias for layer in layers]).cumsum(0), (0, 0, 1, 0))
        cache.base.copy_(base[:, None, None])
        left, own = torch.stack([conv.visible_weight()[:, :, 0] for conv in inputs]).unbind(-1)  # (layers, gates, size)
        bias = torch.stack([conv.bias for conv in inputs])[..., None]  # (layers, gates, 1)
        from_left = left @ base[:-1, :, None]
        bias = (bias + own @ base[:-1, :, None] + from_left)[:, None].expand(-1, width, -1, -1).clone()
        bias[:, 0] -= from_left
        bias = cache.gate_columns(bias).transpose(1, 2)  # (layers, 1, width, gates)
        if class_ids is not None:
            e = torch.stack([layer.class_embedding(class_ids)[..., 0] for layer in layers])  # (layers, batch, gates, 1)
            bias = bias + cache.gate_columns(e)
        self.bias = cache.keep(bias.expand(-1, batch, -1, -1).contiguous())

    def states(self, layer: int, column: int) -> torch.Tensor:
        return self.state_rows[layer][:, column + 1]

    def cells_of(self, layer: int, column: int) -> torch.Tensor:
        return self.cells[layer][:, column]

    def start_row(self, is_first: bool):
        windows = self.state_rows.unfold(2, 3, 1).transpose(-1, -2)  # (layers, batch, width, 3, features)
        above = self.cache.above.flatten(1, 2)
        torch.baddbmm(self.bias.flatten(1, 2), windows.flatten(3).flatten(1, 2), self.weight, out=above)


class DiagonalBiLSTMRows:
    """
    Of the Diagonal BiLSTM: the states R of the row above, from its last pixel to its first, of all layers at once; what
    they add to the stream; and what the gates of a row get from L above.
    """

    def __init__(self, cache: PixelRNNCache, class_ids: torch.Tensor | None):
        self.cache, layers, features = cache, cache.layers, cache.features
        number, batch, width, _ = cache.above.shape
        both = torch.stack([tap_matrices(layer.recurrence.visible_weight(), 2) for layer in layers])
        (up, left), (right_up, right) = (weights.split(features, dim=-1) for weights in both.unbind(1))
        cache.prepare_inputs([layer.left_input for layer in layers], reach=0, states=-cache.gate_columns(left))
        pixels = cache.rows[:, :, cache.lead :].unflatten(2, (width, cache.stride))
        self.stream_rows, self.state_rows = pixels.split((cache.size, features), dim=-1)
        self.cells = cache.zeros(number, batch, features)
        self.upsampling = [
            cache.keep_all(-m for m in pointwise_weights(x.left_upsampling, cache.num_groups)) for x in layers
        ]

        # L: states above, and the base.
        self.up = cache.keep(-cache.gate_columns(up))
        own = torch.stack([layer.left_input.visible_weight()[:, :, 0, 0] for layer in layers])
        self.own = cache.keep(cache.gate_columns(own))
        bias = torch.stack([layer.left_input.bias for layer in layers])[:, None, None]
        right_bias = torch.stack([layer.right_input.bias for layer in layers])[:, None, None]
        if class_ids is not None:
            e = torch.stack([layer.class_embedding(class_ids)[:, :, 0, 0] for layer in layers])[:, :, None]
            e, right_e = e.chunk(2, dim=-1)
            bias, right_bias = bias + e, right_bias + right_e
        self.bias = cache.keep((bias * cache.factors)[..., cache.by_channel])
        self.upsampling_bias = cache.keep(torch.stack([x.left_upsampling.bias for x in layers])[:, None, None])

        # R: inputs, states above, and states to the right.
        matrices = lambda weight: weight.transpose(-1, -2) * cache.factors  # noqa: E731
        inputs = torch.stack([layer.right_input.visible_weight()[:, :, 0, 0] for layer in layers])
        self.right_input, self.right_bias = cache.keep_all((matrices(inputs), right_bias * cache.factors))
        self.image_input = None
        if layers[0].image_input is not None:
            self.image_input = cache.keep(matrices(layers[0].image_input.visible_weight()[:, :, 0, 0]))
        self.right_up, self.right = cache.keep_all((-matrices(right_up), -matrices(right)))
        self.right_states = cache.zeros(width + 1, number, batch, features)  # none beyond the last column
        weight = torch.stack([pointwise_matrix(layer.right_upsampling) for layer in layers])
        self.right_upsampling = cache.keep(-weight)

    def states(self, layer: int, column: int) -> torch.Tensor:
        return self.state_rows[layer][:, column]

    def cells_of(self, layer: int, column: int) -> torch.Tensor:
        return self.cells[layer]

    def right_rows(self) -> torch.Tensor:
        """R of all layers, `(layers, batch * width, features)`."""
        return self.right_states[:-1].permute(1, 2, 0, 3).flatten(1, 2)

    def scan_right(self):
        """R of the row that is finished, in place of R of the row above it."""
        cache = self.cache
        streams = (self.stream_rows + cache.base[:-1]).flatten(1, 2)
        gates = torch.bmm(streams, self.right_input).baddbmm_(self.right_rows(), self.right_up)
        if self.image_input is not None:
            gates[0].addmm_(cache.finished_row.flatten(0, 1), self.image_input)
        gates = gates.unflatten(1, (cache.batch, cache.width)) + self.right_bias
        gates = gates.permute(2, 0, 1, 3).contiguous()  # (width, layers, batch, gates)
        cell = torch.zeros_like(self.cells)
        for column in reversed(range(cache.width)):
            z = gates[column].baddbmm_(self.right_states[column + 1], self.right).sigmoid_()
            o, f, i, g = z.chunk(4, dim=-1)
            cell.mul_(f).addcmul_(i, g, value=4).sub_(i, alpha=2)
            torch.addcmul(o, o, cell.sigmoid(), value=-2, out=self.right_states[column])

    def start_row(self, is_first: bool):
        cache = self.cache
        added = self.upsampling_bias.expand(-1, cache.batch, cache.width, -1)
        if not is_first:  # there, R is nothing, and no cells that have seen nothing
            self.scan_right()
            added = added + torch.bmm(self.right_rows(), self.right_upsampling).view_as(added)
        torch.cumsum(added, 0, out=cache.base[1:])
        above = torch.bmm(self.state_rows.flatten(1, 2), self.up).baddbmm_(cache.base[:-1].flatten(1, 2), self.own)
        torch.add(above.view_as(cache.above), self.bias, out=cache.above)
        self.cells.zero_()


ROWS = {"row_lstm": RowLSTMRows, "diagonal_bilstm": DiagonalBiLSTMRows}

__all__ = ["PixelRNNCache"]
