"""What is particular to PixelSNAIL: its equations, attention, positions and sizes."""

import pytest
import torch
import torch.nn.functional as F
from conftest import build_model, conditions, for_each, random_inputs, seeded, small_config
from huggingface_hub.errors import StrictDataclassError

from hf_pixelcnn import PixelSNAILConfig, PixelSNAILForCausalImageModeling
from hf_pixelcnn.masking_causal_image import CausalConv2d

KINDS = [
    {"num_classes": 3},
    {"attention_projection": "lean", "num_blocks": 3, "num_attention_heads": 1, "num_head_layers": 1},
    {"num_channels": 3, "num_levels": 6, "num_classes": 2, "num_hidden_layers": 3, "weight_norm": False},
    {"num_levels": 5, "input_encoding": "embedding", "attention_projection": "lean", "num_classes": 2},
]


def written_out(model, levels, class_ids):
    """Outputs of the head, from tensors and formulas alone: an image at a time, one query after the other."""
    config, w = model.config, dict(model.named_parameters())

    def weight(name):
        visible, gain = w[f"{name}.weight"], w.get(f"{name}.gain")
        if gain is not None:
            visible = visible * (gain / visible.flatten(1).norm(dim=1))[:, None, None, None]
        return visible

    def conv(x, name, left=0, top=0, right=0):
        return F.conv2d(F.pad(x, (left, right, top, 0)), weight(name), w[f"{name}.bias"])

    def celu(x):
        return F.elu(torch.cat([x, -x], dim=1))

    def residual(x, name, corner, a=None):
        t = conv(celu(x), f"{name}.conv_in", left=corner, top=corner)
        if a is not None:
            t = t + conv(celu(a), f"{name}.conv_other")
        v, g = conv(celu(t), f"{name}.conv_out", left=corner, top=corner).chunk(2, dim=1)
        if class_ids is not None:
            e = w[f"{name}.class_embedding.weight"][class_ids] * (class_ids >= 0)[:, None]
            ev, eg = e[:, :, None, None].chunk(2, dim=1)
            v, g = v + ev, g + eg
        return x + v * torch.sigmoid(g)

    batch, _, height, width = levels.shape
    image = model.model.encoding(levels, torch.float64)
    rows = ((torch.arange(height).double() - height / 2) / height)[:, None].expand(height, width)
    columns = ((torch.arange(width).double() - width / 2) / width)[None].expand(height, width)
    positions = torch.stack([rows, columns]).expand(batch, 2, height, width)
    ones = torch.cat([image, torch.ones(batch, 1, height, width, dtype=torch.float64)], dim=1)
    above, left = conv(ones, "model.in_above", left=1, right=1), conv(ones, "model.in_left", top=1)
    x = torch.zeros_like(above)
    x[:, :, 1:] += above[:, :, :-1]
    x[..., 1:] += left[..., :-1]
    for layer in range(config.num_hidden_layers):
        name = f"model.layers.{layer}"
        for block in range(config.num_blocks):
            x = residual(x, f"{name}.blocks.{block}", 1)
        kv_in, q_in = torch.cat([image, x, positions], dim=1), torch.cat([x, positions], dim=1)
        if config.attention_projection == "residual":
            kv_in = residual(kv_in, f"{name}.attention.key_value_block", 0)
            q_in = residual(q_in, f"{name}.attention.query_block", 0)
        kv, q = conv(kv_in, f"{name}.attention.key_value").flatten(2), conv(q_in, f"{name}.attention.query").flatten(2)
        k, v = kv[:, : config.key_size], kv[:, config.key_size :]
        attended = []
        for qh, kh, vh in zip(*(part.chunk(config.num_attention_heads, dim=1) for part in (q, k, v)), strict=True):
            a = torch.zeros_like(vh)
            for i in range(1, height * width):
                scores = (qh[:, :, i, None] * kh[:, :, :i]).sum(1) / kh.shape[1] ** 0.5
                a[:, :, i] = (scores.softmax(-1)[:, None] * vh[:, :, :i]).sum(-1)
            attended.append(a)
        a = torch.cat(attended, dim=1).view(batch, -1, height, width)
        x = residual(x, f"{name}.out_block", 0, a)
    for layer in range(config.num_head_layers + 1):
        x = conv(F.elu(x), f"head.layers.{layer}")
    return x


@for_each("kind", KINDS)
def test_it_is_the_equations_of_the_paper_with_each_kernel_of_attention(kind):
    model = build_model("pixelsnail", **kind).double()
    inputs = random_inputs(model)
    expected = written_out(model, inputs["pixel_values"], inputs.get("class_ids"))
    for implementation in ("sdpa", "eager"):
        model.set_attn_implementation(implementation)
        features = model.model(**inputs).last_hidden_state
        torch.testing.assert_close(model.head(features), expected, rtol=0, atol=1e-12)


def test_the_default_model_has_the_parameters_of_the_authors():
    with torch.device("meta"):
        assert PixelSNAILForCausalImageModeling(PixelSNAILConfig(weight_norm=False)).num_parameters() == 91_301_448
        model = PixelSNAILForCausalImageModeling(PixelSNAILConfig())
    gains = sum(module.out_channels for module in model.modules() if isinstance(module, CausalConv2d))
    assert model.num_parameters() == 91_301_448 + gains
    assert gains == 70_368


@for_each("kind", KINDS)
def test_all_samplers_agree_at_all_sizes_and_each_pixel_attends_to_what_is_known(kind):
    model = build_model("pixelsnail", **kind).double()
    for size in [(1, 1), (1, 5), (4, 1), (7, 2), (2, 6)]:
        request = {"image_size": size, "return_dict_in_generate": True, "num_images": 2, **conditions(model, 2)}
        naive, cached = (
            model.generate(**request, generator=seeded(), sampler=sampler, output_scores=True)
            for sampler in ("naive", "cached")
        )
        for expected, scores in zip(naive.scores, cached.scores, strict=True):
            torch.testing.assert_close(scores, expected, rtol=0, atol=1e-11)
        others = [model.generate(**request, generator=seeded(), sampler=s) for s in ("cached", "fixed_point")]
        assert all(torch.equal(naive.sequences, output.sequences) for output in others)


@for_each("kind", [{}, {"num_channels": 3, "num_levels": 9, "attention_projection": "lean"}])
def test_no_prediction_depends_on_itself_or_what_comes_later_and_every_one_on_all_before(kind):
    """By perturbation, of ordinary weights: attention among them, whose keys no path of positive weights needs."""
    model = build_model("pixelsnail", **kind, image_size=[6, 7], num_hidden_layers=1).double()
    levels = random_inputs(model, batch=1)["pixel_values"]
    with torch.no_grad():
        image = model.model.encoding(levels, torch.float64)
        changed = image.repeat(42, 1, 1, 1)
        for pixel in range(42):
            changed[pixel, :, pixel // 7, pixel % 7] += 0.5
        batch = torch.cat([image, changed])
        model.model.encoding.register_forward_hook(lambda module, args, output: batch)
        features = model.model(levels.expand(43, -1, -1, -1)).last_hidden_state.flatten(2)
    seen = (features[1:] - features[:1]).abs().amax(1) > 1e-12  # (pixel that changed, pixel that is predicted)
    assert torch.equal(seen, torch.ones(42, 42, dtype=torch.bool).triu(1))


def test_where_a_field_is_computed_attention_is_the_mean_of_all_earlier_values():
    model = build_model("pixelsnail", attention_projection="lean", weight_norm=False).double().model
    model.make_monotone()
    attention = model.layers[0].attention
    x, image, positions = (torch.randn(2, n, 3, 4, dtype=torch.float64) for n in (12, 1, 2))
    values = attention.key_value(torch.cat([image, x, positions], dim=1))[:, -6:].flatten(2)
    means = values.cumsum(-1) / torch.arange(1, 13)
    torch.testing.assert_close(attention(x, image, positions[:1]).flatten(2)[:1, :, 1:], means[:1, :, :-1])


def test_initialisation_from_data_gives_every_layer_outputs_of_mean_0_and_its_standard_deviation():
    torch.manual_seed(0)
    model = PixelSNAILForCausalImageModeling(small_config("pixelsnail", num_levels=256, num_channels=3)).train()
    pixel_values = random_inputs(model, batch=8)["pixel_values"]
    model.initialize_from_data(pixel_values)
    outputs = {}
    for name, layer in model.named_modules():
        if isinstance(layer, CausalConv2d):
            layer.register_forward_hook(lambda module, args, output, name=name: outputs.update({name: output}))
    model.eval()(pixel_values)
    assert len(outputs) == 2 + 2 * (2 + 2 + 1 + 2 + 1 + 3) + 1
    for name, output in outputs.items():
        std, mean = torch.std_mean(output, dim=(0, 2, 3), correction=0)
        target = 0.1 if name.endswith("conv_out") else 1.0
        torch.testing.assert_close(std, torch.full_like(std, target), rtol=1e-3, atol=0)
        torch.testing.assert_close(mean, torch.zeros_like(mean), rtol=0, atol=1e-4)


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"num_attention_heads": 3}, "`key_size` must be divisible by `num_attention_heads` (3)"),
        ({"num_attention_heads": 4, "key_size": 4, "value_size": 6}, "`value_size` must be divisible"),
        ({"num_attention_heads": 0}, "`num_attention_heads` must be at least 1, got 0"),
        ({"num_blocks": 0}, "`num_blocks` must be at least 1, got 0"),
        ({"attention_projection": "wide"}, "`attention_projection` must be 'residual' or 'lean', got 'wide'"),
        ({"num_channels": 3, "output_distribution": "categorical"}, "must be 'logistic_mixture' for images of more"),
    ],
)
def test_what_cannot_be_built_is_refused_when_the_config_is_made(fields, message):
    with pytest.raises(StrictDataclassError) as error:
        PixelSNAILConfig(**fields)
    assert message in str(error.value)
