r"""
Sampling caches that compute several columns of a row at once, so that several pixels can be drawn from one pass.
"""

from collections.abc import Callable, Sequence
from functools import partial
from typing import NamedTuple

import torch

from .caching_causal_image import ALL, EncodedRowCache, MaskedConvCache
from .weights_causal_image import device_of, row_matrices


class PassCosts(NamedTuple):
    r"""
    What a pass over some columns of a row costs on a type of device, in steps of a pixel of as many operations: `fixed
    + columns * batch * features² / products`, with the features that k×k kernels read. On a CPU measured with networks
    of 32 to 80 such features; rather too high than too low.
    """

    fixed: float
    products: float


PASS_COSTS = {"cpu": PassCosts(1.8, 1e5)}
OTHER_PASS_COSTS = PassCosts(1.8, 1e7)  # where a call costs much more than what it computes; not measured


class SpanCache(EncodedRowCache):
    r"""
    What caches share that compute a *span* of a row at once: `ALL` channels of the columns from one on to the row's
    end. A single pixel is a span of one column, and mostly of one channel.

    So several columns can be drawn from one pass: guess the rest of the row, compute the parameters of all its
    dimensions, decide all, and keep everything up to the first that is not as guessed. That one included, each has been
    decided from its true past, the rows above being finished (Jacobi iteration within a row, Gauss-Seidel iteration
    over rows: Song et al. 2021, section 4.3, https://huggingface.co/papers/2002.03629).

    Attributes:
        calls_of_pass (`float`): Operations of a pass for each operation of a pixel.
        phases_share_steps (`bool`): Whether what is prepared for some columns serves rows of every phase.
    """

    calls_of_pass = 1.0
    phases_share_steps = False

    def __init__(self, model, batch, height, width, class_ids=None, **options):
        self.pass_costs = PASS_COSTS.get(device_of(model).type, OTHER_PASS_COSTS)
        self.products_per_column = batch * self.kernel_features(model.config) ** 2
        if self.pass_cost(width) < width:
            self.columns_at_once = width
        super().__init__(model, batch, height, width, class_ids, **options)
        self.steps, self.rests = {}, {}
        dims, device = width * self.num_channels, self.outputs.device
        self.dimensions = torch.arange(dims, device=device)
        self.first_change = torch.full((), dims, device=device)
        self.table_rows = torch.arange(self.num_channels, device=device) * self.table.shape[1]
        self.drawn = torch.zeros_like(self.row_levels)

    def kernel_features(self, config) -> int:
        """Features that k×k kernels read after the first layer."""
        return config.hidden_size

    def pass_cost(self, columns: int) -> float:
        """What a pass over so many columns costs, in steps of a pixel."""
        return (
            self.pass_costs.fixed * self.calls_of_pass + columns * self.products_per_column / self.pass_costs.products
        )

    def compute_pixel(self, column, channel):
        self.compute_span(column, column + 1, channel)

    def step(self, start: int, stop: int, channel: int):
        """[`~SpanCache.prepare_step`], once for rows of a phase, or of all phases."""
        key = (start, stop, channel, None if self.phases_share_steps else self.phase)
        if key not in self.steps:
            self.steps[key] = self.prepare_step(start, stop, channel)
        return self.steps[key]

    def prepare_step(self, start: int, stop: int, channel: int):
        """All slices and matrices that `compute_span` needs."""
        raise NotImplementedError

    def compute_span(self, start: int, stop: int, channel: int):
        """
        The residual stream of one channel, or of `ALL`, of some columns, into `self.head_streams[0]`; may be recorded.
        """
        raise NotImplementedError

    def rest(self, start: int):
        """What a pass from a column on needs: head and parameters; noise `(channels, columns, batch)`, and levels."""
        if start not in self.rests:
            columns = self.width - start
            parameters = self.parameters_of(self.output_rows[: columns * self.batch])
            pixels = (self.width, self.num_channels)
            self.rests[start] = (
                self.head_step(columns, ALL),
                parameters.unflatten(0, (columns, self.batch)),
                self.row_noise.unflatten(0, pixels)[start:].transpose(0, 1),
                self.drawn.unflatten(1, pixels)[:, start:].transpose(0, 1),
            )
        return self.rests[start]

    def compute_rest(self, start: int):
        """The network's outputs for all dimensions from a column on; may be recorded."""
        head, *_ = self.rest(start)
        self.compute_span(start, self.width, ALL)
        self.compute_head(head)

    def compute_rest_draws(self, start: int, open_column: int):
        """A pass from a column on, decisions by the noise rule included; may be recorded."""
        self.compute_rest(start)
        _, parameters, noise, levels = self.rest(start)
        levels.copy_(self.distribution.draw_channels(parameters, noise, levels[..., :0]))
        self.take_rest(open_column, self.drawn[:, open_column * self.num_channels :])

    def first_of_pass(self, open_column: int) -> int:
        """Where a pass begins, at few different columns; what is recorded has one shape only."""
        return 0 if self.capture is not None else open_column // 8 * 8

    def draw_rest(self, open_column: int) -> int:
        """Draw by one pass from an open column on, by the numbers in `row_noise`; returns what is open then."""
        start = self.first_of_pass(open_column)
        if self.capture is not None:
            open_column = 0
        self.run(("rest", start, self.phase), lambda: self.compute_rest_draws(start, open_column))
        return self.open_column()

    def parameters_from(self, start: int) -> torch.Tensor:
        """Parameters `(batch, columns, ...)` of the pixels from a column on, by one pass."""
        self.run(("parameters", start, self.phase), lambda: self.compute_rest(start))
        _, parameters, *_ = self.rest(start)
        return parameters.transpose(0, 1)

    def take_rest(self, start: int, levels: torch.Tensor):
        """Take in what is decided from a column on, `(batch, dims)`, and note the first dimension that has changed."""
        own = self.row_levels[:, start * self.num_channels :]
        positions = torch.where(levels != own, self.dimensions[start * self.num_channels :], len(self.dimensions))
        torch.amin(positions, (0, 1), out=self.first_change)
        self.observe_rest(start, levels)

    def observe_rest(self, start: int, levels: torch.Tensor):
        """Take in levels `(batch, dims)` from a column on, decided or guessed."""
        self.row_levels[:, start * self.num_channels :] = levels
        rows = levels.clamp_min(0)  # -1: broken, and noticed at the end
        if self.num_channels > 1:
            rows = rows.unflatten(1, (-1, self.num_channels)) + self.table_rows
        features = self.table.flatten(0, 1).index_select(0, rows.flatten())
        self.finished_row[:, start:] = features.view(self.batch, -1, self.input_size)

    def open_column(self) -> int:
        """
        The first column that the last pass has not drawn: after that of the first change, or, where a pixel's channels
        are predicted one by one, after the change.
        """
        change = int(self.first_change)
        return (change + 1) // self.num_channels if self.num_groups > 1 else change // self.num_channels + 1


class MaskedConvSpanCache(SpanCache, MaskedConvCache):
    """
    What caches of spans share whose layers are k×k kernels, of which the centre row is computed span by span.

    Features of a span lie as `(columns * batch, features)`: any columns of a row are one matrix.
    """

    def first_weights(self, conv, num_parts: int = 1, scale: torch.Tensor | float = 1) -> list[torch.Tensor]:
        """What each channel, and `ALL`, sees in the first layer's centre row, see `seen_windows`."""
        channels = self.num_groups
        left, centre = row_matrices(conv, self.first_reach, channels, num_parts)
        matrix = self.keep(torch.cat((left.flatten(0, 1), centre)) * scale)
        taps, outputs = len(matrix) - len(centre), matrix.shape[1] // channels
        own = [slice(c * outputs, (c + 1) * outputs) for c in range(channels)]
        parts = [matrix[: taps + c * self.input_group, own[c]] for c in range(channels)]
        return parts if channels == 1 else [*parts, matrix]

    def prepare_first_layer(self, conv):
        """Weights of a first layer that is one k×k convolution, and memory of what rows above give it."""
        self.first_kernel, self.first_bias = self.keep_all((conv.visible_weight()[:, :, :-1], conv.bias))
        self.first_above = self.zeros(self.width, self.batch, conv.out_channels)
        self.first = self.first_weights(conv)

    def start_first_layer(self):
        """Take in the row just finished, and compute what the next one sees of it."""
        self.shift_input_rows()
        self.first_above.copy_(self.convolve_rows(self.input_above, self.first_kernel, self.first_bias).transpose(0, 1))

    def prepare_taps(
        self,
        convs: Sequence,
        size: tuple[int, int],
        reach: int,
        num_parts: int = 1,
        scale: torch.Tensor | float = 1,
    ):
        """
        The centre rows of layers of one `size`, in and out: left taps `(reach, layers, in, out)`; of the centre tap
        what each channel, and `ALL`, sees, `(layers, in, out)`.
        """
        left, centre = self.zeros(reach, len(convs), *size), self.zeros(len(convs), *size)
        for i, conv in enumerate(convs):
            left[:, i], centre[i] = row_matrices(conv, reach, self.num_groups, num_parts)
        left.mul_(scale)
        centre.mul_(scale)
        self.left, self.own = left, self.matrices_by_channel(centre)

    def tap_steps(
        self, start: int, stop: int, channel: int, above: torch.Tensor, sums: torch.Tensor, rows: torch.Tensor
    ) -> tuple[list[Callable], list[list]]:
        r"""
        The products of the centre rows of equal layers, see [`~MaskedConvSpanCache.prepare_taps`], for a span.

        Args:
            above (`torch.Tensor` of shape `(layers, width, batch, out)`): What rows above have given.
            sums (`(layers, columns * batch, out)`): Where the sums of the span go.
            rows (`(last layers, reach + width, batch, in)`, or more columns): Features of the row, zeros on its left.

        Returns:
            Calls for all layers and channels, when the first channel begins; of a single column they compute the left
            taps, which are known then. And of each of the last layers what is to be multiplied and added to its sum.
        """
        columns, reach = stop - start, len(self.left)
        above = above[:, start:stop]
        left = [rows[:, start + t : stop + t].flatten(1, 2) for t in range(reach)]
        own = self.own[channel]
        seen = rows[:, reach + start : reach + stop].flatten(1, 2)[..., : own.shape[1]]
        taps = [[pair] for pair in zip(seen, own, strict=True)]
        if columns == 1 and reach:
            sums, above = sums[len(sums) - len(rows) :], above[len(above) - len(rows) :, 0]
            knowns = [above, *[sums] * (reach - 1)]
            calls = [partial(torch.baddbmm, *args, out=sums) for args in zip(knowns, left, self.left, strict=True)]
        else:
            calls = [partial(sums.unflatten(1, (columns, self.batch)).copy_, above)]
            for t in range(reach):
                for i, pairs in enumerate(taps):
                    pairs.append((left[t][i], self.left[t, i]))
        return calls if channel in (0, ALL) else [], taps

    def of_span(self, memory: torch.Tensor, columns: int) -> torch.Tensor:
        """Of memory for all columns `(layers, columns_at_once * batch, features)` as much as a span needs, in a run."""
        layers, _, features = memory.shape
        return memory.flatten()[: layers * columns * self.batch * features].view(layers, -1, features)

    def seen_windows(self, start: int, stop: int, channel: int) -> torch.Tensor:
        """What [`~EncodedRowCache.seen_inputs`] gives; of several columns `(columns, batch, taps)`."""
        if channel == ALL:
            channel = self.num_channels if self.num_groups > 1 else 0
        taps = self.pixels_left * self.input_size + channel * self.input_group
        windows = self.input_row.unfold(1, taps, self.input_size)[:, start:stop].transpose(0, 1)
        return windows[0] if stop - start == 1 else windows


__all__ = ["MaskedConvSpanCache", "PassCosts", "SpanCache"]
