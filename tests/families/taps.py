"""Taps of convolutions over groups of features, one at a time: features are `(row, column, group)`."""

import itertools


def rows_above(r, c, reach, lowest, groups):
    return {
        (r + dr, c + dc, g)
        for dr, dc, g in itertools.product(range(-reach, lowest + 1), range(-reach, reach + 1), range(groups))
    }


def left(r, c, reach, groups):
    return {(r, c - dc, g) for dc, g in itertools.product(range(1, reach + 1), range(groups))}


def own(r, c, last):
    return {(r, c, g) for g in range(last + 1)}


def spread(features, taps, height, width):
    """All that `taps` of any of the features read inside of the image."""
    reached = set().union(*(taps(*feature) for feature in features))
    return {(r, c, g) for r, c, g in reached if 0 <= r < height and 0 <= c < width}
