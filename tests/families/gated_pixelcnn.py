from families import Facts
from families.taps import left, own, rows_above, spread


class GatedPixelCNN(Facts):
    def hidden_shapes(self, config, height, width):
        """The first layer reads the image."""
        features = config.hidden_size if config.input_encoding == "embedding" else config.num_channels
        return [(features, height, width), *super().hidden_shapes(config, height, width)[1:]]

    def seen(self, config, height, width, row, column, channel):
        channels, first, later = config.num_channels, config.first_kernel_size // 2, config.kernel_size // 2
        groups = config.num_channel_groups
        vertical, horizontal = set(), {(row, column, channel if groups > 1 else 0)}
        for _ in range(config.num_hidden_layers - 1):
            both = vertical | horizontal
            vertical = spread(both, lambda r, c, g: rows_above(r, c, later, 0, groups), height, width)
            horizontal = spread(horizontal, lambda r, c, g: left(r, c, later, groups) | own(r, c, g), height, width)
        above = spread(vertical | horizontal, lambda r, c, g: rows_above(r, c, first, -1, channels), height, width)
        return above | spread(horizontal, lambda r, c, g: left(r, c, first, channels) | own(r, c, g - 1), height, width)


FACTS = GatedPixelCNN()
