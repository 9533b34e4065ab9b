from families import Facts


class PixelCNNPP(Facts):
    SIZES = {"num_hidden_layers": 1}  # which it counts per resolution
    WEIGHT_SCALE = 1.0
    INITIAL_LOSS = 0.2  # bells begin about as wide as the range, with much beyond its ends

    def hidden_shapes(self, config, height, width):
        """Down to a quarter of the image as it is continued, and back to the image."""
        full = ((height + 3) // 4 * 4, (width + 3) // 4 * 4)
        half, quarter = (full[0] // 2, full[1] // 2), (full[0] // 4, full[1] // 4)
        sizes = [full, full, half, quarter, quarter, half, (height, width)]
        return [(config.hidden_size, *size) for size in sizes]

    def seen(self, config, height, width, row, column, channel):
        pixels = seen_pixels(config.num_hidden_layers, height, width, row, column)
        return {(r, c, g) for r, c in pixels for g in range(config.num_channels)}


def seen_pixels(depth, height, width, row, column, stream="combined"):
    """Backwards through the network of section 2.4: which pixels lead to one feature, of the down pass' last layer."""
    sizes = [((height + 3) // 4 * 4 >> level, (width + 3) // 4 * 4 >> level) for level in range(3)]
    wide, corner = ((-1, 0), (-1, 0, 1)), ((-1, 0), (-1, 0))  # rows and columns of the two kernels

    def taps(features, level, rows, columns, scale=1):
        """Inputs of a convolution; with `scale` 2 it halves the resolution."""
        found = {(scale * r + i, scale * c + j) for r, c in features for i in rows for j in columns}
        return {(r, c) for r, c in found if 0 <= r < sizes[level][0] and 0 <= c < sizes[level][1]}

    def layer_inputs(u, ul, level, u_skip, ul_skip):
        """Features before a pair of blocks; what they read of the up pass is added to the sets of skips."""
        t = taps(ul, level, *corner)
        ul_skip |= t
        ul = ul | taps(t, level, *corner)
        u = u | t  # the combined block reads the vertical one
        t = taps(u, level, *wide)
        u_skip |= t
        return u | taps(t, level, *wide), ul

    skips = [[(set(), set()) for _ in range(depth + 1)] for _ in range(3)]  # what is asked of the up pass, by level
    u, ul = (set(), {(row, column)}) if stream == "combined" else ({(row, column)}, set())
    for level in (0, 1, 2):
        used = skips[level] if level < 2 else skips[level][:-1]
        for pair in used:  # the last down block reads the first output
            u, ul = layer_inputs(u, ul, level, *pair)
        if level < 2:
            low = [(r, c) for r in range(sizes[level + 1][0]) for c in range(sizes[level + 1][1])]
            u = {(i, j) for i, j in low if u & {(2 * i + p, 2 * j + q) for p in (0, 1) for q in (-1, 0, 1)}}
            ul = {(i, j) for i, j in low if ul & {(2 * i + p, 2 * j + q) for p in (0, 1) for q in (0, 1)}}
    for level in (2, 1, 0):
        for i in reversed(range(depth)):
            if not (level == 2 and i == depth - 1):
                u, ul = u | skips[level][i + 1][0], ul | skips[level][i + 1][1]
            u, ul = layer_inputs(u, ul, level, set(), set())
        u, ul = u | skips[level][0][0], ul | skips[level][0][1]
        if level > 0:
            u, ul = taps(u, level - 1, *wide, scale=2), taps(ul, level - 1, *corner, scale=2)
    seen = taps(u - {(0, c) for _, c in u}, 0, (-2, -1), (-1, 0, 1))
    seen |= taps(ul - {(0, c) for _, c in ul}, 0, (-1,), (-1, 0, 1))
    seen |= taps(ul - {(r, 0) for r, _ in ul}, 0, (-1, 0), (-1,))
    return {(r, c) for r, c in seen if r < height and c < width}


FACTS = PixelCNNPP()
