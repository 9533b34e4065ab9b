from families import Facts
from families.taps import left, own, rows_above, spread


class PixelCNN(Facts):
    def seen(self, config, height, width, row, column, channel):
        channels, first, later = config.num_channels, config.first_kernel_size // 2, config.kernel_size // 2
        groups = config.num_channel_groups
        h = {(row, column, channel if groups > 1 else 0)}

        def block(r, c, g):
            return rows_above(r, c, later, -1, groups) | left(r, c, later, groups) | own(r, c, g)

        def first_layer(r, c, g):
            return rows_above(r, c, first, -1, channels) | left(r, c, first, channels) | own(r, c, g - 1)

        for _ in range(config.num_hidden_layers):
            h = spread(h, block, height, width)
        return spread(h, first_layer, height, width)


FACTS = PixelCNN()
