"""The parameters of a dimension depend on its past, on all of it inside the receptive field, and on nothing else."""

import itertools

import pytest
import torch
from conftest import VARIANTS, WITH_CHANNEL_GROUPS, build_model, for_each, random_inputs
from families import facts


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
    """The field by its definition, bool `(channels, height, width)`."""
    field = torch.zeros(config.num_channels, height, width, dtype=torch.bool)
    for r, c, g in facts(config.model_type).seen(config, height, width, row, column, channel):
        field[g, r, c] = True
    return field


@for_each("variant", VARIANTS)
def test_nothing_but_the_past_is_seen(family, variant):
    model = build_model(family, **variant, dropout=0.3).double()
    inputs = random_inputs(model, height=6, width=7)
    leaf = encoded_inputs(model, inputs)
    for training, (row, column) in itertools.product((False, True), [(0, 0), (0, 4), (3, 0), (3, 3), (5, 6)]):
        model.train(training)
        for channel in range(model.config.num_channels):
            seen = seen_dimensions(model, inputs, leaf, row, column, channel)
            assert not (seen[0] & ~past(model.config, seen[0].shape, row, column, channel)).any()
            assert not seen[1].any()  # images do not mix


@for_each("variant", VARIANTS)
def test_all_of_the_receptive_field_is_seen(family, variant):
    height, width = 7, 10
    for depth in (1, 3):
        model = build_model(family, **variant, num_hidden_layers=depth).double()
        make_non_negative(model)
        inputs = random_inputs(model, batch=1, height=height, width=width)
        leaf = encoded_inputs(model, inputs, non_negative=True)
        for row, column in [(0, 0), (0, 5), (6, 0), (5, 4), (6, 9)]:
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


@pytest.mark.parametrize("family", WITH_CHANNEL_GROUPS)
def test_colours_are_predicted_in_order(family):
    model = build_model(family, num_channels=3, num_levels=4).double()
    make_non_negative(model)
    inputs = random_inputs(model, batch=1)
    leaf = encoded_inputs(model, inputs, non_negative=True)
    own_pixel = torch.stack([seen_dimensions(model, inputs, leaf, 2, 3, c)[0, :, 2, 3] for c in range(3)])
    assert own_pixel.tolist() == [[False] * 3, [True, False, False], [True, True, False]]  # rows: red, green, blue


@pytest.mark.parametrize("family", WITH_CHANNEL_GROUPS)
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
