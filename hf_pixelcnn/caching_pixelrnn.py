"""
The sampling caches of the PixelRNN.

As in the scan, tanh(x) = 2 σ(2x) - 1, so there is one sigmoid of all gates; cells are kept as 2c and states as -h. The
factor 2 lies in the weights that make g, the sign in those that read states.
"""

import torch

from .caching_causal_image import ALL, MaskedConvCache
from .caching_spans_causal_image import MaskedConvSpanCache
from .recurrence_pixelrnn import tap_matrices
from .weights_causal_image import group_rows, pointwise_matrix, pointwise_weights, row_weights, stack_layers


class Gates:
    r"""
    The order of gates in memory, channel by channel and of each o, f, i, g, and the factors in the weights that make
    them.

    Args:
        cache ([`SamplingCache`]): Channel groups, device and dtype.
        features (`int`): Of a state.
    """

    def __init__(self, cache: MaskedConvCache, features: int):
        number, device = cache.num_groups, cache.factory["device"]
        self.by_channel = torch.cat([group_rows(4 * features, number, c, num_parts=4) for c in range(number)]).to(
            device
        )
        self.factors = torch.ones(4 * features, **cache.factory)
        self.factors[-features:] = 2

    def columns(self, weight: torch.Tensor) -> torch.Tensor:
        """Weights `(..., gates, in)` to matrices `(..., in, gates)`."""
        return (weight.transpose(-1, -2) * self.factors)[..., self.by_channel]


class RowLSTMCache(MaskedConvSpanCache):
    """
    Row by row what states above give the gates; span by span the rest, which is no recurrence: a pixel reads the inputs
    of the one to its left, and its cell the one above.
    """

    def __init__(self, model, batch, height, width, class_ids=None):
        super().__init__(model, batch, height, width, class_ids)
        layers, size = model.model.layers, model.config.hidden_size
        features, number, rows = size // 2, len(layers), self.columns_at_once * batch
        gates, num_gates = Gates(self, features), 4 * features
        self.prepare_first_layer(model.model.conv_in)

        # Of the row above until a pixel replaces them; states are led by a constant 1, for the bias of W_up.
        self.states = self.zeros(number, width + 2, batch, 1 + features)
        self.states[..., 0] = 1
        self.cells_above, self.cells = self.zeros(2, number, width, batch, features).unbind(0)
        self.above = self.zeros(number, width, batch, num_gates)
        bias = torch.stack([layer.input_to_state.bias for layer in layers])[:, None, None, :, None]
        if class_ids is not None:
            bias = bias + torch.stack([layer.class_embedding(class_ids)[..., 0] for layer in layers])[:, None]
        self.bias = self.keep(gates.columns(bias)[..., 0, :])  # (layers, 1, 1 or batch, gates)
        weight = torch.stack([tap_matrices(layer.recurrence.visible_weight(), 1)[0] for layer in layers])
        self.weights_above = self.keep(-gates.columns(weight)).unflatten(1, (3, -1)).unbind(1)

        convs, scale = [layer.input_to_state for layer in layers], gates.factors[gates.by_channel]
        self.prepare_taps(convs, (size, num_gates), reach=1, num_parts=4, scale=scale)
        self.rows = self.zeros(number, 1 + width, batch, size)
        self.sums = self.zeros(number, rows, num_gates)
        out = torch.stack([pointwise_matrix(layer.upsampling, lead_with_bias=True) for layer in layers])
        out[:, 1:].neg_()
        self.out = self.matrices_by_channel(self.keep(out), lead=1)

    def prepare_step(self, start, stop, channel):
        all_sums = self.of_span(self.sums, stop - start)
        begin, taps = self.tap_steps(start, stop, channel, self.above, all_sums, self.rows)
        sums = self.own_group(all_sums, channel)
        cells_above, cells = (x[:, start:stop].flatten(1, 2) for x in (self.cells_above, self.cells))
        states = self.states[:, 1 + start : 1 + stop].flatten(1, 2)
        features = [self.own_group(x, channel) for x in (cells_above, cells, states[..., 1:])]
        gates = sums.chunk(4, dim=-1)
        if channel == ALL and self.num_groups > 1:
            gates = sums.unflatten(-1, (self.num_groups, 4, -1)).unbind(-2)
            features = [x.unflatten(-1, (self.num_groups, -1)) for x in features]
        rows = [row[1 + start : 1 + stop].flatten(0, 1) for row in self.rows]
        streams = [self.own_group(x, channel) for x in (*rows, self.head_streams[0][: states.shape[1]])]
        out = self.out[channel]
        seen = states[..., : out.shape[1]]
        layers = list(zip(sums, taps, *gates, *features, streams[:-1], seen, out, streams[1:], strict=True))
        above = self.own_group(self.first_above[start:stop].flatten(0, 1), channel)
        return above, self.seen_windows(start, stop, channel), self.first[channel], streams[0], begin, layers

    def compute_row(self):
        self.start_first_layer()
        self.cells_above.copy_(self.cells)
        self.above.copy_(self.bias)
        for t, weight in enumerate(self.weights_above):
            states = self.states[:, t : t + self.width].flatten(1, 2)
            self.above.flatten(1, 2).baddbmm_(states[..., 1:], weight)

    def compute_span(self, start, stop, channel):
        above, windows, first, stream, begin, layers = self.step(start, stop, channel)
        torch.addmm(above, windows.flatten(0, -2), first, out=stream)
        for call in begin:
            call()
        for gates, taps, o, f, i, g, cell_above, cell, state, stream, seen, out, next_stream in layers:
            for features, weight in taps:
                gates.addmm_(features, weight)
            gates.sigmoid_()
            torch.mul(cell_above, f, out=cell).addcmul_(i, g, value=4).sub_(i, alpha=2)
            torch.addcmul(o, o, cell.sigmoid(), value=-2, out=state)
            torch.addmm(stream, seen, out, out=next_stream)


class DiagonalBiLSTMCache(MaskedConvCache):
    r"""
    Row by row what comes from rows above, see [`DiagonalBiLSTMRows`]; pixel by pixel the cells. A pass over several
    columns would compute these one after the other, too, which is most of what drawing them costs.

    In `rows` a layer's inputs x of the row lie one after the other, each followed by the state h of its pixel. So what
    a pixel's gates read to its left, h of the last pixel, then x of its own earlier channels, is one run of memory, and
    of all layers one batched product. A layer then needs two small products, W_own and W_up.

    The stream in memory lacks what is known of it when a row begins: `base`, the biases of W_up and what R adds. That
    is multiplied by W_own for a row at once.
    """

    def __init__(self, model, batch, height, width, class_ids=None):
        super().__init__(model, batch, height, width, class_ids)
        network, channels, self.size = model.model, self.num_groups, model.config.hidden_size
        self.layers, self.features = network.layers, self.size // 2
        number, gates, size = len(self.layers), 4 * self.features, self.size
        self.gates = Gates(self, self.features)

        first = network.conv_in
        self.first_weight, self.first_bias = self.keep_all((first.visible_weight()[:, :, :-1], first.bias))
        self.first_above = self.zeros(batch, width, size)
        self.first_left = self.keep_all(row_weights(first, self.first_reach, channels)[0])

        self.above = self.zeros(number, batch, width, gates)  # by channel; what is known of the gates
        self.base = self.zeros(number + 1, batch, width, size)
        self.sums = self.zeros(number, batch, gates // channels)
        self.last = self.zeros(batch, size)
        self.above_rows = DiagonalBiLSTMRows(self, class_ids)
        self.steps = [[self.prepare_step(j, c) for c in range(channels)] for j in range(width)]

    def prepare_inputs(self, layers: list, states: torch.Tensor):
        r"""
        The memory of all layers' inputs, and the weights on it.

        Args:
            layers (`list`): Each layer's convolution of inputs.
            states (`torch.FloatTensor` of shape `(layers, features, gates)`):
                The weights on the state to the left, with sign and factors, gates in order of channels.
        """
        self.lead, self.stride = self.features, self.size + self.features
        self.rows = self.zeros(len(layers), self.batch, self.lead + self.width * self.stride)
        left, own = zip(*(row_weights(layer, 0, self.num_groups, num_parts=4) for layer in layers), strict=True)
        factors = self.own_group(self.gates.factors[self.gates.by_channel], 0)
        left, own = ([matrix * factors for matrix in stack_layers(part)] for part in (left, own))
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
            states, cells = self.above_rows.state_rows[i][:, column], self.above_rows.cells[i]
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


class DiagonalBiLSTMRows:
    """
    Of the Diagonal BiLSTM: the states R of the row above, from its last pixel to its first, of all layers at once; what
    they add to the stream; and what the gates of a row get from L above.
    """

    def __init__(self, cache: DiagonalBiLSTMCache, class_ids: torch.Tensor | None):
        self.cache, layers, features, gates = cache, cache.layers, cache.features, cache.gates
        number, batch, width, _ = cache.above.shape
        both = torch.stack([tap_matrices(layer.recurrence.visible_weight(), 2) for layer in layers])
        (up, left), (right_up, right) = (weights.split(features, dim=-1) for weights in both.unbind(1))
        cache.prepare_inputs([layer.left_input for layer in layers], -gates.columns(left))
        pixels = cache.rows[:, :, cache.lead :].unflatten(2, (width, cache.stride))
        self.stream_rows, self.state_rows = pixels.split((cache.size, features), dim=-1)
        self.cells = cache.zeros(number, batch, features)
        self.upsampling = [
            cache.keep_all(-m for m in pointwise_weights(x.left_upsampling, cache.num_groups)) for x in layers
        ]

        # L: states above, and the base.
        self.up = cache.keep(-gates.columns(up))
        own = torch.stack([layer.left_input.visible_weight()[:, :, 0, 0] for layer in layers])
        self.own = cache.keep(gates.columns(own))
        bias = torch.stack([layer.left_input.bias for layer in layers])[:, None, None]
        right_bias = torch.stack([layer.right_input.bias for layer in layers])[:, None, None]
        if class_ids is not None:
            e = torch.stack([layer.class_embedding(class_ids)[:, :, 0, 0] for layer in layers])[:, :, None]
            e, right_e = e.chunk(2, dim=-1)
            bias, right_bias = bias + e, right_bias + right_e
        self.bias = cache.keep((bias * gates.factors)[..., gates.by_channel])
        self.upsampling_bias = cache.keep(torch.stack([x.left_upsampling.bias for x in layers])[:, None, None])

        # R: inputs, states above, and states to the right.
        matrices = lambda weight: weight.transpose(-1, -2) * gates.factors  # noqa: E731
        inputs = torch.stack([layer.right_input.visible_weight()[:, :, 0, 0] for layer in layers])
        self.right_input, self.right_bias = cache.keep_all((matrices(inputs), right_bias * gates.factors))
        self.image_input = None
        if layers[0].image_input is not None:
            self.image_input = cache.keep(matrices(layers[0].image_input.visible_weight()[:, :, 0, 0]))
        self.right_up, self.right = cache.keep_all((-matrices(right_up), -matrices(right)))
        self.right_states = cache.zeros(width + 1, number, batch, features)  # none beyond the last column
        self.right_rows = self.right_states[:-1].permute(1, 2, 0, 3)
        weight = torch.stack([pointwise_matrix(layer.right_upsampling) for layer in layers])
        self.right_upsampling = cache.keep(-weight)

        # What a row works with when it begins: too large to be made anew each time.
        self.streams = cache.zeros(number, batch, width, cache.size)
        self.added = cache.zeros(number, batch, width, cache.size)
        self.states = cache.zeros(number, batch, width, features)
        self.right_gates = cache.zeros(number, batch, width, 4 * features)
        self.right_sums = cache.zeros(width, number, batch, 4 * features)

    def state_matrices(self, states: torch.Tensor) -> torch.Tensor:
        """States `(layers, batch, width, features)` of a row, one matrix per layer, until the next call."""
        return self.states.copy_(states).flatten(1, 2)

    def scan_right(self):
        """R of the row that is finished, in place of R of the row above it."""
        cache, gates = self.cache, self.right_gates.flatten(1, 2)
        torch.add(self.stream_rows, cache.base[:-1], out=self.streams)
        torch.bmm(self.streams.flatten(1, 2), self.right_input, out=gates)
        gates.baddbmm_(self.state_matrices(self.right_rows), self.right_up)
        if self.image_input is not None:
            gates[0].addmm_(cache.finished_row.flatten(0, 1), self.image_input)
        torch.add(self.right_gates.permute(2, 0, 1, 3), self.right_bias.permute(2, 0, 1, 3), out=self.right_sums)
        cell = torch.zeros_like(self.cells)
        for column in reversed(range(cache.width)):
            z = self.right_sums[column].baddbmm_(self.right_states[column + 1], self.right).sigmoid_()
            o, f, i, g = z.chunk(4, dim=-1)
            cell.mul_(f).addcmul_(i, g, value=4).sub_(i, alpha=2)
            torch.addcmul(o, o, cell.sigmoid(), value=-2, out=self.right_states[column])

    def start_row(self, is_first: bool):
        cache = self.cache
        if not is_first:  # there, R is nothing, and no cells that have seen nothing: `added` is zeros
            self.scan_right()
            torch.bmm(self.state_matrices(self.right_rows), self.right_upsampling, out=self.added.flatten(1, 2))
        torch.cumsum(self.added.add_(self.upsampling_bias), 0, out=cache.base[1:])
        above = cache.above.flatten(1, 2)
        torch.bmm(self.state_matrices(self.state_rows), self.up, out=above)
        above.baddbmm_(cache.base[:-1].flatten(1, 2), self.own)
        cache.above.add_(self.bias)
        self.cells.zero_()


CACHES = {"row_lstm": RowLSTMCache, "diagonal_bilstm": DiagonalBiLSTMCache}

__all__ = ["CACHES", "DiagonalBiLSTMCache", "RowLSTMCache"]
