"""`receptive_field` against its definition, against perturbation, and against what is known pixel by pixel."""

import copy

import pytest
import receptive_field as script
import torch
from conftest import FAMILIES, KINDS, VARIANTS, WITH_KERNELS, build_model, for_each
from test_causality import make_non_negative
from test_causality import receptive_field as field_by_taps

from hf_pixelcnn import receptive_field
from hf_pixelcnn.receptive_field_causal_image import REGIONS, regions_of
from hf_pixelcnn.training import draw_receptive_fields
from hf_pixelcnn.training.receptive_fields import unclipped_field


def fields_by_perturbation(model):
    """
    Change one dimension after the other and look where the distributions of levels change: bool
    `(channels, height, width, channels, height, width)`, what is predicted first.
    """
    model = copy.deepcopy(model).double()
    make_non_negative(model)
    config, distribution = model.config, model.output_distribution
    shape = (config.num_channels, *config.image_size)
    levels = torch.zeros(1, *shape, dtype=torch.long)
    class_ids = {"class_ids": torch.tensor([0])} if config.num_classes else {}
    leaf = model.model.encoding(levels, torch.float64).detach().abs() + 0.1
    image = leaf.clone()
    model.model.encoding.register_forward_hook(lambda module, args, output: image)

    @torch.no_grad()
    def predicted():
        pixels = distribution.pixels(model(torch.zeros_like(levels), **class_ids).logits)[0]
        previous = levels[0].permute(1, 2, 0)
        logits = [distribution.level_logits(pixels, c, previous[..., :c]) for c in range(config.num_channels)]
        return torch.stack(logits)  # (channels, height, width, num_levels)

    before = predicted()
    fields = torch.zeros(*shape, *shape, dtype=torch.bool)
    features = model.model.encoding.features_per_channel
    for c, i, j in torch.cartesian_prod(*map(torch.arange, shape)).tolist():
        image[:, c * features : (c + 1) * features, i, j] += 0.5
        levels[0, c, i, j] = config.num_levels - 1
        fields[..., c, i, j] = (predicted() != before).any(-1)
        image.copy_(leaf)
        levels.zero_()
    return fields


@pytest.mark.slow
@for_each("kind", KINDS)
def test_the_field_is_that_of_perturbation(family, kind):
    model = build_model(family, **kind)
    fields = fields_by_perturbation(model)
    for row, column in [(0, 0), (4, 3), (3, 5), (2, 0)]:
        for channel in range(model.config.num_channels):
            assert torch.equal(receptive_field(model, row, column, channel), fields[channel, row, column])


@for_each("variant", {**KINDS, "wide_kernels": VARIANTS["colour_codes_wide_kernels"]})
def test_the_field_is_that_of_the_taps(family, variant):
    for height, width, depth in [(7, 10, 1), (9, 9, 3)]:
        model = build_model(family, **variant, image_size=[height, width], num_hidden_layers=depth)
        channel = model.config.num_channels - 1
        for row, column in [(0, 3), (6, 0), (5, 4)]:
            expected = field_by_taps(model.config, height, width, row, column, channel)
            expected[:channel, row, column] = True  # by the network or by the distribution
            assert torch.equal(receptive_field(model, row, column, channel), expected)


def test_the_blind_spot_is_known_pixel_by_pixel():
    plain = build_model("pixelcnn", first_kernel_size=3, num_hidden_layers=7, image_size=8)
    gated = build_model("gated_pixelcnn", first_kernel_size=3, num_hidden_layers=8, image_size=8)
    past = torch.arange(64).view(1, 8, 8) < 4 * 8 + 2
    blind = [[0, 7], [1, 6], [1, 7], [2, 5], [2, 6], [2, 7], [3, 4], [3, 5], [3, 6], [3, 7]]
    assert (past & ~receptive_field(plain, 4, 2))[0].nonzero().tolist() == blind
    assert torch.equal(receptive_field(gated, 4, 2), past)


@pytest.mark.parametrize("family", WITH_KERNELS)
@pytest.mark.parametrize("size", [(1, 130), (130, 1)])
def test_a_very_deep_network_sees_as_far_as_its_depth(family, size):
    model = build_model(
        family, first_kernel_size=3, num_hidden_layers=120, image_size=list(size), hidden_size=2, head_hidden_size=2
    )
    last = size[0] - 1, size[1] - 1
    field = receptive_field(model, *last)
    assert torch.equal(field, field_by_taps(model.config, *size, *last, 0))
    assert 120 <= field.sum() < 129


def test_weights_mode_and_random_numbers_play_no_part_and_are_left_alone(family):
    model = build_model(family, dropout=0.5, num_classes=2).train()
    field = receptive_field(model, 3, 3)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.zero_()
    state, config, draws = copy.deepcopy(model.state_dict()), model.config.to_dict(), torch.get_rng_state()
    with torch.inference_mode():
        assert torch.equal(receptive_field(model.bfloat16(), 3, 3), field)
    assert torch.equal(torch.get_rng_state(), draws)
    assert model.config.to_dict() == config
    assert all(torch.equal(tensor, state[name].to(tensor.dtype)) for name, tensor in model.state_dict().items())
    assert all(module.training and not module._forward_hooks for module in model.modules())
    assert all(parameter.grad is None for parameter in model.parameters())


def test_a_compiled_model_and_a_size_set_later_have_a_field(family):
    model = build_model(family)
    expected = receptive_field(build_model(family, image_size=9), 4, 3)
    model.config.image_size = 9
    assert torch.equal(receptive_field(torch.compile(model, backend="eager"), 4, 3), expected)


def test_a_model_without_weights_has_a_field(family):
    config = build_model(family).config
    with torch.device("meta"):
        model = FAMILIES[family].causal_class(config)
    assert receptive_field(model, 0, 1).nonzero().tolist() == [[0, 0, 0]]


def test_a_dimension_that_does_not_exist_is_refused():
    for row, column, channel in [(5, 0, 0), (0, 6, 0), (0, 0, 1), (-1, 0, 0), (1.0, 0, 0)]:
        with pytest.raises(ValueError, match=r"`(row|column|channel)` must be 0 \.\.\."):
            receptive_field(build_model("pixelcnn"), row, column, channel)


def test_the_picture_shows_field_and_blind_spot(tmp_path, capsys):
    for name, depth in [("pixelcnn", 1), ("gated_pixelcnn", 3)]:
        build_model(name, first_kernel_size=3, num_hidden_layers=depth).config.save_pretrained(tmp_path / name)
    model = build_model("pixelcnn", first_kernel_size=3, num_hidden_layers=1)
    future, beyond, seen, blind, pixel = range(5)
    assert regions_of(unclipped_field(copy.deepcopy(model.config), 0), 3, 3).tolist() == [
        [beyond] * 7,
        [beyond, seen, seen, seen, seen, seen, beyond],
        [beyond, seen, seen, seen, seen, blind, beyond],
        [beyond, seen, seen, pixel, future, future, future],
    ]
    size = model.config.image_size
    (counts,) = draw_receptive_fields(model, tmp_path / "one.png").values()
    assert counts == dict(zip(REGIONS, (3, 12, 11, 1, 1), strict=True))
    assert model.config.image_size == size
    build_model("pixelsnail").config.save_pretrained(tmp_path / "pixelsnail")
    words = ["--models", *(str(tmp_path / name) for name in ("pixelcnn", "gated_pixelcnn", "pixelsnail")), "--output"]
    script.main([*words, str(tmp_path / "field.png")])
    printed = capsys.readouterr().out
    assert "gated_pixelcnn: 24 pixels in the receptive field, 0 in the blind spot" in printed
    all_of_the_past = 4 * 9 + 4  # four rows above, as many as the others need
    assert f"pixelsnail: {all_of_the_past} pixels in the receptive field, 0 in the blind spot" in printed
    for name in ("one", "field"):
        assert (tmp_path / f"{name}.png").read_bytes().startswith(b"\x89PNG")
    with pytest.raises(SystemExit, match="`models`: there is no folder nowhere"):
        script.main(["--models", "nowhere", "--output", str(tmp_path / "field.png")])
