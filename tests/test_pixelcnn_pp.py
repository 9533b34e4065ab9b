"""What is particular to PixelCNN++: its streams, resolutions, blocks and weight normalisation."""

import pytest
import torch
import torch.nn.functional as F
from benchmark import peak_bytes
from conftest import FAMILIES, build_model, random_inputs, seeded, small_config
from families.pixelcnn_pp import seen_pixels
from test_causality import encoded_inputs, past

from hf_pixelcnn import PixelCNNPPConfig, PixelCNNPPForCausalImageModeling
from hf_pixelcnn.caching_pixelcnn_pp import CombinedBlock, VerticalBlock
from hf_pixelcnn.masking_causal_image import CausalConv2d


def test_the_default_model_has_the_parameters_of_the_authors():
    with torch.device("meta"):
        model = PixelCNNPPForCausalImageModeling(PixelCNNPPConfig())
        assert model.num_parameters() == 53_659_080
        assert PixelCNNPPForCausalImageModeling(PixelCNNPPConfig(weight_norm=False)).num_parameters() == 53_618_660


@pytest.mark.parametrize("size", [8, 12])
def test_both_streams_see_their_receptive_field_at_every_position_and_nothing_after_it(size):
    model = build_model("pixelcnn_pp", hidden_size=4).double()
    inputs = random_inputs(model, batch=1, height=size, width=size)
    leaf = encoded_inputs(model, inputs)
    streams = []
    model.model.down_layers[-1][-1].register_forward_hook(lambda module, args, output: streams.extend(output))
    model(**inputs)
    vertical, combined = streams
    for row in range(size):
        for column in range(size):
            before = past(model.config, (1, size, size), row, column, 0)[0]
            rows_above = torch.arange(size)[:, None].expand(size, size) < row
            for name, stream, limit in (("vertical", vertical, rows_above), ("combined", combined, before)):
                (grad,) = torch.autograd.grad(stream[0, :, row, column].sum(), leaf, retain_graph=True)
                seen = grad[0, 0] != 0
                expected = seen_pixels(1, size, size, row, column, name)
                assert set(map(tuple, seen.nonzero().tolist())) == expected
                assert not (seen & ~limit).any()
                assert seen[: max(0, row - 6)].all()  # no blind spot: a few rows up, the field is as wide as the image


@pytest.mark.parametrize("depth", [1, 2])
def test_the_receptive_field_of_a_tall_image_ends_where_it_should(depth):
    height, width, row = 28 * depth + 32, 4, 28 * depth + 29
    model = build_model("pixelcnn_pp", hidden_size=4, num_hidden_layers=depth).double()
    inputs = random_inputs(model, batch=1, height=height, width=width)
    leaf = encoded_inputs(model, inputs)
    logits = model(**inputs).logits
    for column in (0, 3):
        (grad,) = torch.autograd.grad(logits[0, 0, row, column], leaf, retain_graph=True)
        seen = seen_pixels(depth, height, width, row, column)
        assert set(map(tuple, grad[0, 0].nonzero().tolist())) == seen
        assert min(r for r, _ in seen) > 0
        assert row - min(r for r, _ in seen) <= model.model.rows_seen_above


def test_the_first_row_sees_nothing_from_above_and_the_first_pixel_nothing_at_all():
    model = build_model("pixelcnn_pp").double()
    x = torch.randn(2, 2, 8, 8, dtype=torch.float64)  # one channel and the ones
    vertical = F.pad(F.conv2d(F.pad(x, (1, 1, 1, 0)), *weights(model.model.vertical_in)), (0, 0, 1, -1))
    inputs = random_inputs(model, batch=2, height=8, width=8)
    streams = []
    model.model.up_layers[0][0].register_forward_pre_hook(lambda module, args: streams.extend(args[:2]))
    model(**inputs)
    u, ul = streams
    assert u.shape == vertical.shape
    assert not u[:, :, 0].any()  # not even a bias
    assert not ul[:, :, 0, 0].any()
    assert ul[:, :, 0, 1:].abs().amin() > 0
    logits = model(**inputs).logits[:, :, 0, 0]
    assert torch.equal(logits[0], logits[1])


def weights(layer):
    return layer.visible_weight(), layer.bias


def test_a_block_is_the_equation_of_the_paper_and_the_class_enters_before_the_gate():
    block = build_model("pixelcnn_pp", num_classes=3).double().model.down_layers[0][0].combined
    x, other = torch.randn(2, 12, 4, 4, dtype=torch.float64), torch.randn(2, 24, 4, 4, dtype=torch.float64)
    class_ids = torch.tensor([2, -1])

    def celu(x):
        return torch.cat((F.elu(x), F.elu(-x)), dim=1)

    def corner(x, layer):
        return F.conv2d(F.pad(x, (1, 0, 1, 0)), *weights(layer))

    t = corner(celu(x), block.conv_in) + F.conv2d(celu(other), *weights(block.conv_other))
    gated = corner(celu(t), block.conv_out)
    gated[0] += block.class_embedding.weight[2][:, None, None]  # image 1 has no class
    expected = x + gated[:, :12] * gated[:, 12:].sigmoid()
    torch.testing.assert_close(block(x, other, class_ids), expected)


def test_dropout_acts_on_elements_after_the_second_nonlinearity():
    block = build_model("pixelcnn_pp", dropout=0.5).model.up_layers[0][0].vertical.train()
    seen = []
    block.conv_out.register_forward_pre_hook(lambda module, args: seen.append(args[0]))
    block(torch.randn(2, 12, 16, 16))
    dropped = (seen[0] == 0).float()  # (batch, 2 * features, height, width)
    assert 0.45 < dropped.mean() < 0.55
    assert dropped.mean(dim=(2, 3)).std() < 0.1  # single elements, no whole maps
    assert not torch.equal(dropped[:, :12], dropped[:, 12:])


def test_an_upsampled_pixel_reaches_its_own_four_and_one_more_column_where_it_should():
    model = build_model("pixelcnn_pp").double().model
    for layer, first in ((model.vertical_upsampling[0], 3), (model.combined_upsampling[0], 4)):
        x = torch.zeros(1, 12, 4, 4, dtype=torch.float64)
        x[0, :, 1, 2] = 1
        reached = (layer(x) - layer(torch.zeros_like(x))).abs().sum(1)[0] > 0
        expected = torch.zeros(8, 8, dtype=torch.bool)
        expected[2:4, first:6] = True
        assert torch.equal(reached, expected)


def test_weight_norm_gives_each_output_the_norm_of_its_gain(tmp_path):
    model = build_model("pixelcnn_pp", num_channels=3, num_levels=256).double()
    inputs = random_inputs(model)
    before = model(**inputs).logits
    layers = [module for module in model.modules() if isinstance(module, CausalConv2d)]
    for layer in layers:
        norm = layer.visible_weight().flatten(1).norm(dim=1)
        torch.testing.assert_close(norm, layer.gain.abs())
    folded = sum(layer.gain.numel() for layer in layers)
    count = model.num_parameters()
    model.save_pretrained(tmp_path / "normalised")
    model.fold_weight_norm()
    assert model.num_parameters() == count - folded
    torch.testing.assert_close(model(**inputs).logits, before)
    model.save_pretrained(tmp_path / "folded")
    for name in ("normalised", "folded"):
        loaded, report = type(model).from_pretrained(tmp_path / name, output_loading_info=True)
        assert not any(report.values())
        assert loaded.config.weight_norm == (name == "normalised")
        torch.testing.assert_close(loaded(**inputs).logits, before)


def test_initialisation_from_data_gives_every_layer_outputs_of_mean_0_and_its_standard_deviation():
    torch.manual_seed(0)
    model = PixelCNNPPForCausalImageModeling(
        PixelCNNPPConfig(hidden_size=8, num_hidden_layers=1, num_classes=2)
    ).train()
    pixel_values = torch.randint(256, (4, 3, 16, 16), generator=seeded())
    class_ids = torch.tensor([0, 1, 1, -1])
    model.initialize_from_data(pixel_values, class_ids=class_ids)
    assert all(module.training for module in model.modules())
    outputs = {}
    layers = {name: module for name, module in model.named_modules() if isinstance(module, CausalConv2d)}
    for name, layer in layers.items():
        layer.register_forward_hook(lambda module, args, output, name=name: outputs.update({name: output}))
    model.eval()(pixel_values, class_ids=class_ids)
    assert len(outputs) == len(layers)
    for name, output in outputs.items():
        std, mean = torch.std_mean(output, dim=(0, 2, 3), correction=0)
        target = 0.1 if name.endswith("conv_out") else 1.0
        torch.testing.assert_close(std, torch.full_like(std, target), rtol=1e-3, atol=0)
        torch.testing.assert_close(mean, torch.zeros_like(mean), rtol=0, atol=1e-4)


def test_initialisation_from_images_without_variation_stays_finite():
    model = build_model("pixelcnn_pp", num_channels=3, num_levels=256)
    model.initialize_from_data(torch.zeros(2, 3, 8, 8, dtype=torch.long))
    assert all(parameter.isfinite().all() for parameter in model.parameters())


def test_initialisation_from_data_changes_no_model_without_weight_norm():
    for family in [name for name in FAMILIES if not hasattr(small_config(name), "weight_norm")]:
        model = build_model(family)
        before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
        model.initialize_from_data(**random_inputs(model))
        assert all(torch.equal(tensor, before[name]) for name, tensor in model.state_dict().items())


def test_cached_sampling_needs_less_memory_than_a_forward():
    model = build_model("pixelcnn_pp", image_size=20, hidden_size=32)
    pixel_values = random_inputs(model, batch=8)["pixel_values"]
    cpu = torch.device("cpu")
    with torch.inference_mode():
        sampling, forward = (
            peak_bytes(f, cpu) for f in (lambda: model.generate(num_images=8), lambda: model(pixel_values))
        )
    assert sampling < forward


@pytest.mark.parametrize("size", [(1, 1), (2, 3), (4, 8), (6, 5)])
def test_all_samplers_agree_at_sizes_that_4_divides_and_at_others(size):
    model = build_model("pixelcnn_pp", num_channels=3, num_levels=6, num_classes=2).double()
    request = {"class_ids": [0, 1], "image_size": size, "return_dict_in_generate": True}
    naive, cached = (
        model.generate(**request, generator=seeded(), sampler=sampler, output_scores=True)
        for sampler in ("naive", "cached")
    )
    assert naive.sequences.shape == (2, 3, *size)
    for expected, scores in zip(naive.scores, cached.scores, strict=True):  # tells what lies outside of the image, too
        torch.testing.assert_close(scores, expected, rtol=0, atol=1e-11)
    fixed_point = model.generate(**request, generator=seeded(), sampler="fixed_point")
    assert all(torch.equal(naive.sequences, output.sequences) for output in (cached, fixed_point))


def test_a_fixed_point_starts_anew_at_whole_rows_of_the_lowest_resolution():
    model = build_model("pixelcnn_pp", image_size=[90, 4]).double()
    assert 0 < model.model.first_row_seen(89) < 89
    assert model.model.first_row_seen(89) % 4 == 0
    cached, fixed_point = (model.generate(generator=seeded(), sampler=s) for s in ("cached", "fixed_point"))
    assert torch.equal(cached, fixed_point)


def test_rows_and_columns_of_low_resolution_are_computed_once(monkeypatch):
    rows, pixels = [], []
    row, calls = VerticalBlock.row, CombinedBlock.calls

    def counted(*args):
        return [lambda: pixels.append(1), *calls(*args)]

    monkeypatch.setattr(VerticalBlock, "row", lambda *args: (rows.append(args[1].shape[1]), row(*args))[1])
    monkeypatch.setattr(CombinedBlock, "calls", counted)
    build_model("pixelcnn_pp").generate(image_size=(8, 12), output_scores=True, return_dict_in_generate=True)
    # Blocks: one up and two down at full and half resolution, one and one at a quarter.
    assert sorted(rows) == [3] * 2 * 2 + [6] * 3 * 4 + [12] * 3 * 8
    assert len(pixels) == 3 * 8 * 12 + 3 * 4 * 6 + 2 * 2 * 3
