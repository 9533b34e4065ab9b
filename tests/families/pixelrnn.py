from families import Facts
from families.taps import left, own, rows_above


class PixelRNN(Facts):
    def seen(self, config, height, width, row, column, channel):
        """Backwards through states of both directions and streams, `(kind, layer, row, column, group)` each."""
        groups, channels, first = config.num_channel_groups, config.num_channels, config.first_kernel_size // 2
        is_diagonal = config.recurrence == "diagonal_bilstm"
        group = channel if groups > 1 else 0
        found, todo = set(), [("x", config.num_hidden_layers, row, column, group)]

        def all_of(kind, layer, r, c):
            return {(kind, layer, r, c, g) for g in range(groups)}

        def read(kind, layer, r, c, g):
            if kind == "x" and layer == 0:
                taps = rows_above(r, c, first, -1, channels) | left(r, c, first, channels) | own(r, c, g - 1)
                return {("image", 0, *tap) for tap in taps}
            below = {("x", layer - 1, r, c, k) for k in range(g + 1)}
            if kind == "x":
                states = {("h", layer, r, c, k) for k in range(g + 1)}
                return below | states | (all_of("right", layer, r - 1, c) if is_diagonal else set())
            if kind == "h" and is_diagonal:
                return below | all_of("h", layer, r, c - 1) | all_of("h", layer, r - 1, c)
            if kind == "h":
                above = set().union(*(all_of("h", layer, r - 1, c + d) for d in (-1, 0, 1)))
                return below | all_of("x", layer - 1, r, c - 1) | above
            pixel = all_of("x", layer - 1, r, c)
            if layer == 1 and not config.has_blind_spot:
                pixel |= {("image", 0, r, c, k) for k in range(channels)}
            return pixel | all_of("right", layer, r, c + 1) | all_of("right", layer, r - 1, c)

        while todo:
            feature = todo.pop()
            kind, _, r, c, _ = feature
            if feature not in found and 0 <= r < height and 0 <= c < width:
                found.add(feature)
                todo += read(*feature) if kind != "image" else ()
        return {(r, c, g) for kind, _, r, c, g in found if kind == "image"}


FACTS = PixelRNN()
