import io
import math

import pytest
import torch
from conftest import FAMILIES, KINDS, build_model, for_each, random_inputs
from families import facts


def loss_and_gradients(model, inputs):
    model.zero_grad()
    loss = model(**inputs, labels=inputs["pixel_values"]).loss
    loss.backward()
    return loss.detach(), {name: parameter.grad.clone() for name, parameter in model.named_parameters()}


@pytest.mark.versions
@for_each("kind", KINDS)
def test_shapes_of_logits_and_hidden_states(family, kind):
    model = build_model(family, **kind)
    inputs = random_inputs(model)
    output = model(**inputs, output_hidden_states=True)
    shape = inputs["pixel_values"].shape
    batch, channels, *size = shape
    assert (
        output.logits.shape
        == {
            "bernoulli": shape,
            "categorical": (*shape, model.config.num_levels),
            "logistic_mixture": (batch, *size, {1: 9, 3: 30}[channels]),  # three components
        }[model.config.output_distribution]
    )
    assert output.loss is None
    shapes = facts(family).hidden_shapes(model.config, *size)
    assert [state.shape for state in output.hidden_states] == [(2, *shape) for shape in shapes]
    first = next(module for module in model.modules() if type(module).__name__ in model._no_split_modules)
    read = []
    with first.register_forward_pre_hook(lambda layer, args: read.extend(args)):
        base = model.model(**inputs)
    assert any(torch.equal(x, output.hidden_states[0]) for x in read if x is not None and x.ndim == 4)
    assert torch.equal(base.last_hidden_state, output.hidden_states[-1])
    assert base.hidden_states is None
    logits, *_ = model(**inputs, return_dict=False)
    assert torch.equal(logits, output.logits)


@pytest.mark.versions
def test_codes_may_have_16384_levels(family):
    model = build_model(family, num_levels=16_384, input_encoding="embedding")
    pixel_values = torch.tensor([0, 16_383]).view(1, 1, 1, 2)
    assert model(pixel_values).logits.shape == (1, 1, 1, 2, 16_384)
    assert model.generate(image_size=(1, 2)).shape == (1, 1, 1, 2)


def test_pixelcnn_block_is_the_equation_of_the_paper():
    import torch.nn.functional as F

    block = build_model("pixelcnn").double().model.layers[0]
    x = torch.randn(1, 12, 5, 6, dtype=torch.float64)
    weight = block.conv.weight.clone()
    weight[:, :, 1, 2:] = 0
    weight[:, :, 2] = 0
    inner = F.relu(F.conv2d(F.relu(x), block.conv_in.weight, block.conv_in.bias))
    inner = F.relu(F.conv2d(inner, weight, block.conv.bias, padding=1))
    torch.testing.assert_close(block(x), x + F.conv2d(inner, block.conv_out.weight, block.conv_out.bias))


def test_gated_layer_is_the_equation_of_the_paper():
    import torch.nn.functional as F

    layer = build_model("gated_pixelcnn", num_classes=3).double().model.layers[1]
    v, h = torch.randn(2, 1, 12, 5, 6, dtype=torch.float64)
    e = layer.class_embedding.weight[2][None, :, None, None]

    def gate(x):
        return x[:, :12].tanh() * x[:, 12:].sigmoid()

    vf = F.conv2d(F.pad(v, (1, 1, 1, 0)), layer.vertical_conv.weight, layer.vertical_conv.bias)
    hf = F.conv2d(F.pad(h, (1, 0)), layer.horizontal_conv.weight, layer.horizontal_conv.bias)
    hf = hf + F.conv2d(vf, layer.vertical_to_horizontal.weight) + e
    out = F.conv2d(gate(hf), layer.horizontal_out.weight, layer.horizontal_out.bias)
    new_v, new_h = layer(v, h, torch.tensor([2]))
    torch.testing.assert_close(new_v, gate(vf + e))
    torch.testing.assert_close(new_h, h + out)


def test_grey_gated_pixelcnn_has_no_masks_at_all():
    names = [name for name, _ in build_model("gated_pixelcnn").named_buffers()]
    assert names == []


@pytest.mark.versions
def test_class_ids_change_the_logits_and_minus_one_adds_nothing(family):
    model = build_model(family, num_classes=3)
    pixel_values = random_inputs(model, batch=4)["pixel_values"][:1].expand(4, -1, -1, -1)
    logits = model(pixel_values, class_ids=torch.tensor([0, 1, 2, -1])).logits
    assert all(not torch.equal(logits[i], logits[j]) for i in range(4) for j in range(i))
    for module in model.modules():
        if type(module).__name__ == "ClassEmbedding":
            module.weight.data.zero_()
    unconditional = model(pixel_values[:1], class_ids=torch.tensor([0])).logits[0]
    torch.testing.assert_close(logits[3], unconditional)


@pytest.mark.slow
@pytest.mark.versions
def test_initial_activations_have_the_variance_of_the_image(family):
    torch.manual_seed(0)
    record = FAMILIES[family]
    model = record.causal_class(
        record.config_class(num_channels=3, num_levels=256, hidden_size=96, head_hidden_size=96)
    )
    states = model(torch.randint(256, (4, 3, 16, 16)), output_hidden_states=True).hidden_states
    assert 0.2 < states[0].std() < 2
    assert 0.2 < states[-1].std() < 4
    loss = model(torch.randint(256, (4, 3, 16, 16)), labels=torch.randint(256, (4, 3, 16, 16))).loss
    assert loss.item() == pytest.approx(math.log(256), rel=facts(family).INITIAL_LOSS)


@pytest.mark.versions
@for_each("kind", KINDS)
def test_every_parameter_is_used_and_learns(family, kind):
    model = build_model(family, **kind).train()
    inputs = random_inputs(model, batch=8)
    _, gradients = loss_and_gradients(model, inputs)
    assert not [name for name, gradient in gradients.items() if not gradient.any()]


@pytest.mark.versions
def test_gradient_checkpointing_changes_nothing(family):
    model = build_model(family, num_classes=3).double().train()
    inputs = random_inputs(model)
    loss, gradients = loss_and_gradients(model, inputs)
    (getattr(model, "activation_checkpointing_enable", None) or model.gradient_checkpointing_enable)()
    calls = []
    dropout = next(module for module in model.modules() if isinstance(module, torch.nn.Dropout))
    dropout.register_forward_hook(lambda *_: calls.append(1))
    again, recomputed = loss_and_gradients(model, inputs)
    assert len(calls) == 2  # once forward, once more on the way back
    torch.testing.assert_close(again, loss)
    for name, gradient in gradients.items():
        torch.testing.assert_close(recomputed[name], gradient)


def test_channels_last_changes_nothing(family):
    model = build_model(family, num_channels=3, num_levels=4).double()
    inputs = random_inputs(model)
    before = model(**inputs).logits
    torch.testing.assert_close(model.to(memory_format=torch.channels_last)(**inputs).logits, before)
    assert model.generate(num_images=2).shape == (2, 3, 5, 6)


@pytest.mark.versions
@for_each("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_is_close_to_single(family, dtype):
    model = build_model(family, num_levels=8)
    inputs = random_inputs(model)
    single = model.log_prob(**inputs)
    torch.testing.assert_close(model.to(dtype).log_prob(**inputs), single, rtol=0.1, atol=0.1)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        torch.testing.assert_close(model.float().log_prob(**inputs), single, rtol=0.1, atol=0.1)


@pytest.mark.versions
@pytest.mark.slow
def test_one_full_graph_compiles_for_training_and_evaluation(family):
    model = build_model(family, num_channels=3, num_levels=4, num_classes=3)
    inputs = random_inputs(model)
    with torch.no_grad():
        logits = model(**inputs).logits
    loss, gradients = loss_and_gradients(model.train(), inputs)
    torch.compiler.reset()  # models of other tests count towards the limit of compilations of a function
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    compiled_loss, compiled_gradients = loss_and_gradients(compiled, inputs)
    torch.testing.assert_close(compiled_loss, loss)
    for name, gradient in compiled_gradients.items():
        torch.testing.assert_close(gradient, gradients[name.removeprefix("_orig_mod.")])
    compiled.eval()
    with torch.no_grad():
        torch.testing.assert_close(compiled(**inputs).logits, logits)


@pytest.mark.slow
def test_export_gives_the_same_logits_at_other_sizes(family):
    model = build_model(family, num_channels=3, num_levels=4, num_classes=3)
    inputs = random_inputs(model)
    batch, height, width = (torch.export.Dim(name, min=2, max=64) for name in ("batch", "height", "width"))
    has_ranges = FAMILIES[family].promises("export_ranges")

    def exported(sizes):
        shapes = {"pixel_values": {0: batch, **sizes}, "class_ids": {0: batch}}
        return torch.export.export(model, (), inputs, dynamic_shapes=shapes)

    auto = torch.export.Dim.AUTO
    program = exported(sizes={2: height, 3: width} if has_ranges else {2: auto, 3: auto})
    other = random_inputs(model, batch=3, height=9, width=7)
    torch.testing.assert_close(program.module()(**other).logits, model(**other).logits)
    if not has_ranges:  # torch takes long to read the sizes of such a program
        program, other = exported(sizes={}), random_inputs(model, batch=3)
    file = io.BytesIO()
    torch.export.save(program, file)
    file.seek(0)
    again = torch.export.load(file).module()
    assert torch.equal(again(**other).logits, program.module()(**other).logits)


@pytest.mark.versions
def test_wrong_shapes_and_dtypes_are_noticed_by_compiled_code_too(family):
    model = torch.compile(build_model(family), backend="eager")
    levels = torch.zeros(2, 1, 5, 6, dtype=torch.long)
    with pytest.raises(TypeError, match="`pixel_values` must be integer levels"):
        model(levels.float())
    with pytest.raises(ValueError, match="`labels` must have the shape"):
        model(levels, labels=levels[:1])
    with pytest.raises(ValueError, match="the model is unconditional"):
        model(levels, class_ids=torch.tensor([0, 0]))


@pytest.mark.versions
def test_a_model_that_returns_tuples_still_scores_and_samples(family):
    model = build_model(family, return_dict=False)
    inputs = random_inputs(model)
    logits, *_ = model(**inputs)
    assert logits.shape == inputs["pixel_values"].shape
    assert model.log_prob(**inputs).shape == logits.shape
    for sampler in ("naive", "cached", "fixed_point"):
        assert model.generate(sampler=sampler).shape == (1, 1, 5, 6)


@pytest.mark.versions
@for_each("encoding", ["scaled", "embedding"])
def test_levels_may_have_any_integer_dtype(family, encoding):
    model = build_model(family, input_encoding=encoding)
    levels = random_inputs(model)["pixel_values"]
    loss, log_prob = model(levels, labels=levels).loss, model.log_prob(levels)
    mask = torch.ones(5, 6, dtype=torch.bool)
    for dtype in (torch.uint8, torch.int8, torch.int16, torch.int32, torch.uint16, torch.uint32):
        typed = levels.to(dtype)
        torch.testing.assert_close(model(typed, labels=typed).loss, loss)
        torch.testing.assert_close(model.log_prob(typed), log_prob)
        assert torch.equal(model.generate(pixel_values=typed, known_mask=mask), levels)


@pytest.mark.versions
def test_uint8_labels_that_trainer_would_miscount_are_refused():
    model = build_model("pixelcnn", num_levels=256)
    levels = torch.full((1, 1, 5, 6), 156, dtype=torch.uint8)
    torch.testing.assert_close(model(levels, labels=levels).loss, model(levels, labels=levels.long()).loss)
    with pytest.raises(TypeError, match="`labels` must be signed integers"):
        model(levels, labels=levels, num_items_in_batch=30)


@pytest.mark.versions
def test_a_batch_without_labels_has_loss_zero(family):
    model = build_model(family)
    levels = random_inputs(model)["pixel_values"]
    assert model(levels, labels=torch.full_like(levels, -100)).loss == 0
