"""The parameters of a dimension depend on its past, on all of it inside the receptive field, and on nothing else."""

import itertools

import pytest
import torch
from conftest import build_model, random_inputs


def encoded_inputs(model, inputs, non_negative=False):
    """Make the model read a leaf tensor in place of its encoded pixels: `(batch, channels * features, h, w)`."""
    with torch.no_grad():
        leaf = model.model.encoding(inputs["pixel_values"], model.dtype)
    leaf = (leaf.abs() + 0.1 if non_negative else leaf).requires_grad_()
    model.model.encoding.register_forward_hook(lambda module, args, output: leaf)
    return leaf


def pixel_parameters(model, logits, row, column, channel):
    """The parameters of one channel of a pixel; of a mixture, all of the pixel's."""
    pixel = model.output_distribution.pixels(logits)[:, row, column]
    return pixel if model.config.output_distribution == "logistic_mixture" else pixel[:, channel]


def seen_dimensions(model, inputs, leaf, row, column, channel):
    """Which dimensions of which images have a gradient, `(batch, channels, h, w)`, for parameters of image 0."""
    logits = pixel_parameters(model, model(**inputs).logits[:1], row, column, channel)
    (grad,) = torch.autograd.grad((logits * torch.rand_like(logits).add(0.5)).sum(), leaf)
    return (grad != 0).unflatten(1, (model.config.num_channels, -1)).any(2)


@torch.no_grad()
def make_non_negative(model):
    """Then nothing cancels and no ReLU is dead; small, so that no tanh saturates."""
    for parameter in model.parameters():
        parameter.abs_().mul_(0.3)


def past(config, shape, row, column, channel):
    """Dimensions before this one; with a mixture, whose network joins no channels, those of earlier pixels."""
    order = torch.arange(shape[1] * shape[2] * shape[0]).view(shape[1], shape[2], shape[0]).permute(2, 0, 1)
    return order < order[0 if config.output_distribution == "logistic_mixture" else channel, row, column]


def receptive_field(config, height, width, row, column, channel):
    """The field by its definition, one tap at a time, without any mask: the slow reference."""
    if config.model_type == "pixelcnn_pp":
        seen = pixels_seen_by_pixelcnn_pp(config.num_hidden_layers, height, width, row, column)
        field = torch.zeros(config.num_channels, height, width, dtype=torch.bool)
        for r, c in seen:
            field[:, r, c] = True
        return field
    channels, first, later = config.num_channels, config.first_kernel_size // 2, config.kernel_size // 2
    groups = 1 if config.output_distribution == "logistic_mixture" else channels  # of features

    def rows_above(r, c, reach, lowest, groups=groups):
        return {
            (r + dr, c + dc, g)
            for dr, dc, g in itertools.product(range(-reach, lowest + 1), range(-reach, reach + 1), range(groups))
        }

    def left(r, c, reach, groups=groups):
        return {(r, c - dc, g) for dc, g in itertools.product(range(1, reach + 1), range(groups))}

    def spread(features, taps):
        reached = set().union(*(taps(*feature) for feature in features))
        return {(r, c, g) for r, c, g in reached if 0 <= r < height and 0 <= c < width}

    def own(r, c, last):
        return {(r, c, g) for g in range(last + 1)}

    h, v = {(row, column, channel if groups > 1 else 0)}, set()  # v: vertical features of the Gated PixelCNN
    depth = config.num_hidden_layers
    if config.model_type == "pixelcnn":
        for _ in range(depth):
            h = spread(h, lambda r, c, g: rows_above(r, c, later, -1) | left(r, c, later) | own(r, c, g))
        seen = spread(
            h, lambda r, c, g: rows_above(r, c, first, -1, channels) | left(r, c, first, channels) | own(r, c, g - 1)
        )
    else:
        for _ in range(depth - 1):
            v = spread(v | h, lambda r, c, g: rows_above(r, c, later, 0))
            h = spread(h, lambda r, c, g: left(r, c, later) | own(r, c, g))
        seen = spread(v | h, lambda r, c, g: rows_above(r, c, first, -1, channels))
        seen |= spread(h, lambda r, c, g: left(r, c, first, channels) | own(r, c, g - 1))
    field = torch.zeros(channels, height, width, dtype=torch.bool)
    for r, c, g in seen:
        field[g, r, c] = True
    return field


def pixels_seen_by_pixelcnn_pp(depth, height, width, row, column, stream="combined"):
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


@pytest.mark.parametrize("training", [False, True])
@pytest.mark.parametrize(("row", "column"), [(0, 0), (0, 4), (3, 0), (3, 3), (5, 6)])
def test_nothing_but_the_past_is_seen(family, variant, training, row, column):
    model = build_model(family, **variant, dropout=0.3).double().train(training)
    inputs = random_inputs(model, height=6, width=7)
    leaf = encoded_inputs(model, inputs)
    for channel in range(model.config.num_channels):
        seen = seen_dimensions(model, inputs, leaf, row, column, channel)
        assert not (seen[0] & ~past(model.config, seen[0].shape, row, column, channel)).any()
        assert not seen[1].any()  # images do not mix


@pytest.mark.parametrize(("row", "column"), [(0, 0), (0, 5), (6, 0), (5, 4), (6, 9)])
@pytest.mark.parametrize(("height", "width", "depth"), [(7, 10, 1), (7, 10, 3)])
def test_all_of_the_receptive_field_is_seen(family, variant, height, width, depth, row, column):
    model = build_model(family, **variant, num_hidden_layers=depth).double()
    make_non_negative(model)
    inputs = random_inputs(model, batch=1, height=height, width=width)
    leaf = encoded_inputs(model, inputs, non_negative=True)
    for channel in range(model.config.num_channels):
        seen = seen_dimensions(model, inputs, leaf, row, column, channel)[0]
        assert torch.equal(seen, receptive_field(model.config, height, width, row, column, channel))


def test_gated_pixelcnn_has_no_blind_spot():
    model = build_model("gated_pixelcnn", num_hidden_layers=5).double()
    make_non_negative(model)
    inputs = random_inputs(model, batch=1)
    leaf = encoded_inputs(model, inputs, non_negative=True)
    for row, column in [(4, 2), (4, 0), (2, 5)]:
        seen = seen_dimensions(model, inputs, leaf, row, column, 0)[0]
        assert torch.equal(seen, past(model.config, seen.shape, row, column, 0))


def test_pixelcnn_has_exactly_its_known_blind_spot():
    model = build_model("pixelcnn", first_kernel_size=3, num_hidden_layers=7).double()
    make_non_negative(model)
    inputs = random_inputs(model, batch=1, height=8, width=8)
    leaf = encoded_inputs(model, inputs, non_negative=True)
    seen = seen_dimensions(model, inputs, leaf, row=4, column=2, channel=0)[0]
    blind = (past(model.config, seen.shape, 4, 2, 0) & ~seen)[0].nonzero().tolist()
    # A path upwards moves at most one column to the right per row: behind that diagonal lies the blind spot.
    assert blind == [[0, 7], [1, 6], [1, 7], [2, 5], [2, 6], [2, 7], [3, 4], [3, 5], [3, 6], [3, 7]]


@pytest.mark.parametrize("family", ["pixelcnn", "gated_pixelcnn"])
def test_colours_are_predicted_in_order(family):
    model = build_model(family, num_channels=3, num_levels=4).double()
    make_non_negative(model)
    inputs = random_inputs(model, batch=1)
    leaf = encoded_inputs(model, inputs, non_negative=True)
    own_pixel = torch.stack([seen_dimensions(model, inputs, leaf, 2, 3, c)[0, :, 2, 3] for c in range(3)])
    assert own_pixel.tolist() == [[False] * 3, [True, False, False], [True, True, False]]  # rows: red, green, blue


@pytest.mark.parametrize("family", ["pixelcnn", "gated_pixelcnn"])
def test_masked_weights_get_no_gradient_and_are_zero_in_a_file(family, tmp_path):
    from safetensors.torch import load_file

    model = build_model(family, num_channels=3, num_levels=4)
    inputs = random_inputs(model)
    model(**inputs, labels=inputs["pixel_values"]).loss.backward()
    layers = {name: module for name, module in model.named_modules() if hasattr(module, "visible_weight")}
    hidden = {}
    for name, layer in layers.items():
        visible = torch.zeros_like(layer.weight, dtype=torch.bool)
        layer.kernel(visible).copy_(layer.mask if layer.mask is not None else torch.ones(()))
        hidden[name] = ~visible
        assert not layer.weight.grad[hidden[name]].any()
    assert sum(mask.any().item() for mask in hidden.values()) > 3
    before = model(**inputs).logits
    model.save_pretrained(tmp_path / "a")  # the weights behind the masks are random in this model
    model.save_pretrained(tmp_path / "b", state_dict=model.state_dict())
    for folder in "ab":
        saved = load_file(tmp_path / folder / "model.safetensors")
        for name, mask in hidden.items():
            assert not saved[f"{name}.weight"][mask].any()
            assert torch.equal(saved[f"{name}.weight"][~mask], layers[name].weight[~mask])
    assert torch.equal(model(**inputs).logits, before)
