"""Adapters of `peft`: LoRA changes the weight behind the mask; whatever would act elsewhere is refused, not ignored."""

import copy
import pickle
from functools import partial

import pytest
import torch
from conftest import KINDS, SAMPLERS, WITH_CHANNEL_GROUPS, build_model, conditions, for_each, random_inputs, seeded
from test_causality import encoded_inputs, past, seen_dimensions
from torch import nn
from torch.nn.utils import parametrize
from torch.utils.checkpoint import checkpoint
from transformers import AutoModel, AutoModelForImageClassification

from hf_pixelcnn import compress, decompress, receptive_field
from hf_pixelcnn.adapters_causal_image import AdaptedConv2d, convolutions
from hf_pixelcnn.masking_causal_image import CausalConv2d

peft = pytest.importorskip("peft")
pytestmark = [pytest.mark.versions, pytest.mark.slow]

COLOUR = {"num_channels": 3, "num_levels": 4, "num_classes": 2}


def colour_model(family, **config):
    """A colour model with classes; of a family that needs one for colours, with a mixture."""
    if family not in WITH_CHANNEL_GROUPS:
        config = {"output_distribution": "logistic_mixture", **config}
    return build_model(family, **COLOUR, **config).double()


def with_lora(model, name="default", seed=1, **settings):
    """The model with adapters that change what it draws, on every masked convolution unless told."""
    torch.manual_seed(seed)
    settings = {"r": 2, "lora_alpha": 3, "init_lora_weights": False, **settings}
    model.add_adapter(peft.LoraConfig(**settings), name)
    return model.eval()


@for_each("kind", KINDS)
def test_every_convolution_gets_an_adapter_and_nothing_of_the_future_is_seen(family, kind):
    model = build_model(family, **kind, dropout=0.3).double()
    count = len(list(convolutions(model)))
    inputs = random_inputs(model, height=6, width=7)
    before = model.log_prob(**inputs)
    model = with_lora(model)
    assert sum(isinstance(module, AdaptedConv2d) for module in model.modules()) == count
    assert not torch.allclose(model.log_prob(**inputs), before)
    leaf = encoded_inputs(model, inputs)
    for row, column in [(0, 0), (0, 4), (3, 3), (5, 6)]:
        for channel in range(model.config.num_channels):
            seen = seen_dimensions(model, inputs, leaf, row, column, channel)
            assert not (seen[0] & ~past(model.config, seen[0].shape, row, column, channel)).any()


@for_each("kind", KINDS)
def test_all_samplers_see_the_adapters(family, kind):
    model = build_model(family, **kind).double()
    settings = {"num_images": 3, **conditions(model, 3)}
    plain = model.generate(**settings, generator=seeded())
    model = with_lora(model)
    naive, *others = [model.generate(**settings, generator=seeded(), sampler=sampler) for sampler in SAMPLERS]
    assert all(torch.equal(naive, images) for images in others)
    assert not torch.equal(naive, plain)


def test_only_adapters_learn_and_masked_taps_have_no_gradient(family):
    model = with_lora(colour_model(family))
    inputs = random_inputs(model)
    model(**inputs, labels=inputs["pixel_values"]).loss.backward()
    for name, parameter in model.named_parameters():
        assert parameter.requires_grad == ("lora_" in name), name
        assert not parameter.requires_grad or parameter.grad.isfinite().all(), name
    grads = [p.grad.abs().sum() for name, p in model.named_parameters() if "lora_A" in name]
    assert sum(grad > 0 for grad in grads) > len(grads) / 2


def test_get_peft_model_needs_no_more_and_merging_changes_nothing(family):
    model = colour_model(family)
    inputs, images = random_inputs(model), {"num_images": 2, **conditions(model, 2)}
    plain = model.log_prob(**inputs)
    names = set(model.state_dict())
    torch.manual_seed(0)
    adapted = peft.get_peft_model(model, peft.LoraConfig(r=3, use_rslora=True, init_lora_weights=False)).eval()
    expected, drawn = adapted.log_prob(**inputs), adapted.generate(**images, generator=seeded())
    assert torch.equal(drawn, adapted.generate(**images, generator=seeded(), sampler="naive"))
    with adapted.disable_adapter():
        assert torch.equal(model.log_prob(**inputs), plain)
    adapted.merge_adapter()
    assert torch.equal(adapted.log_prob(**inputs), expected)
    assert torch.equal(adapted.generate(**images, generator=seeded()), drawn)
    adapted.unmerge_adapter()
    torch.testing.assert_close(adapted.log_prob(**inputs), expected, rtol=0, atol=1e-12)
    merged = adapted.merge_and_unload()
    assert type(merged) is type(model)
    assert set(merged.state_dict()) == names
    torch.testing.assert_close(merged.log_prob(**inputs), expected, rtol=0, atol=1e-12)
    assert torch.equal(merged.generate(**images, generator=seeded()), drawn)


def test_a_new_adapter_changes_nothing(family):
    model = colour_model(family)
    inputs = random_inputs(model)
    plain = model.log_prob(**inputs)
    assert torch.equal(with_lora(model, init_lora_weights=True).log_prob(**inputs), plain)


def test_several_adapters_add_up_and_can_be_chosen(family):
    model = colour_model(family)
    inputs = random_inputs(model)
    plain = {name: weight.clone() for name, weight in model.state_dict().items()}
    with_lora(model)
    first = model.log_prob(**inputs)
    with_lora(model, "other", seed=2)
    second = model.log_prob(**inputs)
    assert not torch.allclose(first, second)
    model.set_adapter("default")
    assert torch.equal(model.log_prob(**inputs), first)
    model.set_adapter(["default", "other"])
    name, layer = next(convolutions(model))
    weight = plain[f"{name}.weight"] + layer.get_delta_weight("default") + layer.get_delta_weight("other")
    assert torch.equal(layer.adapted_weight(), weight)
    model.disable_adapters()
    assert torch.equal(layer.adapted_weight(), plain[f"{name}.weight"])


def test_an_adapter_is_saved_and_loaded_in_every_way(family, tmp_path):
    base, inputs = tmp_path / "base", random_inputs(colour_model(family))
    colour_model(family).save_pretrained(base)

    def fresh():
        return AutoModel.from_pretrained(base)

    model = with_lora(fresh())
    expected = model.log_prob(**inputs)
    model.save_pretrained(tmp_path / "adapter")
    assert not (tmp_path / "adapter" / "model.safetensors").exists()
    again = fresh()
    again.load_adapter(str(tmp_path / "adapter"))
    wrapped = peft.PeftModel.from_pretrained(fresh(), tmp_path / "adapter")
    for loaded in (again, AutoModel.from_pretrained(tmp_path / "adapter"), wrapped):
        assert torch.equal(loaded.log_prob(**inputs), expected)
    wrapped.save_pretrained(tmp_path / "peft")
    once_more = peft.PeftModel.from_pretrained(fresh(), tmp_path / "peft")
    assert torch.equal(once_more.log_prob(**inputs), expected)
    with pytest.raises(ValueError, match="merge_and_unload"):
        once_more.get_base_model().save_pretrained(tmp_path / "wrong")
    once_more.merge_and_unload().save_pretrained(tmp_path / "merged")
    merged = AutoModel.from_pretrained(tmp_path / "merged").log_prob(**inputs)
    torch.testing.assert_close(
        merged, expected, rtol=0, atol=1e-12
    )  # products may round by where weights lie in memory
    classifier = AutoModelForImageClassification.from_pretrained(base)
    peft.PeftModel.from_pretrained(classifier, tmp_path / "adapter")
    assert torch.equal(classifier.log_prob(**inputs), expected)


def test_a_model_with_adapters_is_copied_and_pickled():
    model = with_lora(colour_model("gated_pixelcnn"))
    inputs = random_inputs(model)
    expected = model.log_prob(**inputs)
    for other in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        assert torch.equal(other.log_prob(**inputs), expected)
        images = [m.generate(num_images=1, class_ids=[0], generator=seeded()) for m in (other, model)]
        assert torch.equal(*images)


def test_class_vectors_learn_beside_adapters(tmp_path):
    model = colour_model("gated_pixelcnn")
    model.save_pretrained(tmp_path / "base")
    config = peft.LoraConfig(r=2, init_lora_weights=False, modules_to_save=["class_embedding"])
    adapted = peft.get_peft_model(AutoModel.from_pretrained(tmp_path / "base"), config)
    with torch.no_grad():
        for name, parameter in adapted.named_parameters():
            if "class_embedding" in name and parameter.requires_grad:
                parameter.add_(torch.randn_like(parameter))
    inputs, images = random_inputs(model), {"num_images": 2, "class_ids": [0, 1]}
    drawn = adapted.generate(**images, generator=seeded())
    assert torch.equal(drawn, adapted.generate(**images, generator=seeded(), sampler="naive"))
    adapted.save_pretrained(tmp_path / "adapter")
    again = peft.PeftModel.from_pretrained(AutoModel.from_pretrained(tmp_path / "base"), tmp_path / "adapter")
    assert torch.equal(again.log_prob(**inputs), adapted.eval().log_prob(**inputs))
    assert torch.equal(again.merge_and_unload().generate(**images, generator=seeded()), drawn)


def test_streams_know_adapters_by_the_weights_that_act():
    pytest.importorskip("constriction")
    model = build_model("gated_pixelcnn", num_levels=5, image_size=8)
    levels = model.generate(num_images=2, generator=seeded())
    plain = compress(model, levels)
    adapted = peft.get_peft_model(with_seed(model), peft.LoraConfig(r=2, init_lora_weights=False))
    with pytest.raises(ValueError, match="weights are others"):
        decompress(model, plain)
    data = compress(adapted, levels)
    assert torch.equal(decompress(torch.compile(model, backend="eager"), data), levels)
    with adapted.disable_adapter():
        assert torch.equal(decompress(model, plain), levels)
    assert torch.equal(receptive_field(adapted, 3, 3), receptive_field(model, 3, 3))
    assert torch.equal(decompress(adapted.merge_and_unload(), data), levels)


def with_seed(model, seed=0):
    torch.manual_seed(seed)
    return model


def test_weight_norm_is_not_folded_under_adapters():
    model = with_lora(colour_model("pixelcnn_pp"))
    with pytest.raises(ValueError, match="merge and unload"):
        model.fold_weight_norm()


@for_each("encoding", ["scaled", "embedding"])
@for_each("use_reentrant", [False, True])
def test_adapters_learn_through_checkpoints_and_leave_no_hooks(family, encoding, use_reentrant, caplog):
    grads = []
    for checkpointing in (False, True):
        model = colour_model(family, input_encoding=encoding)
        inputs = random_inputs(model)
        with_lora(model).train()
        if checkpointing:
            model._set_gradient_checkpointing(
                gradient_checkpointing_func=partial(checkpoint, use_reentrant=use_reentrant)
            )
            model.enable_input_require_grads()
        model(**inputs, labels=inputs["pixel_values"]).loss.backward()
        grads.append([p.grad for name, p in model.named_parameters() if "lora_" in name])
        model.generate(num_images=1, class_ids=[0])
    for plain, checkpointed in zip(*grads, strict=True):
        torch.testing.assert_close(checkpointed, plain, rtol=0, atol=1e-12)
    assert "input embeddings" not in caplog.text


def test_the_table_of_levels_is_the_input_embedding(family):
    model = colour_model(family, input_encoding="embedding")
    assert model.get_input_embeddings() is model.model.get_input_embeddings() is model.model.encoding.embedding
    with pytest.raises(NotImplementedError, match="levels are numbers"):
        colour_model(family).get_input_embeddings()


def test_adapters_compile_in_one_graph(family):
    model = with_lora(colour_model(family))
    inputs = random_inputs(model, batch=1)
    expected = model(**inputs, labels=inputs["pixel_values"]).loss
    compiled = torch.compile(model, fullgraph=True, backend="eager")
    torch.testing.assert_close(compiled(**inputs, labels=inputs["pixel_values"]).loss, expected, rtol=0, atol=1e-12)


# What is refused, before anything is changed


def linear_methods():
    """Every method of `peft` that goes by names of layers, set up for a 1×1 of the head."""
    configs = [
        ("OFTConfig", {"oft_block_size": 0, "r": 1}),
        ("BOFTConfig", {"boft_block_size": 1}),
        ("LoHaConfig", {}),
        ("LoKrConfig", {}),
        ("HRAConfig", {"r": 2}),
        ("IA3Config", {"feedforward_modules": []}),
        ("AdaLoraConfig", {"total_step": 10}),
        ("VeraConfig", {}),
        ("MissConfig", {}),
        ("TrainableTokensConfig", {}),
    ]
    return [(name, settings) for name, settings in configs if hasattr(peft, name)]


def test_other_methods_are_refused_and_the_model_stays_as_it_was(tmp_path):
    for name, settings in linear_methods():
        for add in [peft.get_peft_model, lambda model, config: model.add_adapter(config)]:
            model = colour_model("pixelcnn")
            names = [name for name, _ in model.named_modules()]
            own_words = "|No layers types compatible|does not support PeftType" if name == "VeraConfig" else ""
            with pytest.raises(ValueError, match=r"are not supported.*Use `peft.LoraConfig`" + own_words):
                add(model, getattr(peft, name)(target_modules=r".*head\.layers\.0", **settings))
            assert [name for name, _ in model.named_modules()] == names
            assert all(parameter.requires_grad for parameter in model.parameters())
            model.save_pretrained(tmp_path)
            assert (tmp_path / "model.safetensors").exists()
            with_lora(model)


def test_settings_of_lora_that_would_act_elsewhere_are_refused():
    cases = [
        {"lora_dropout": 0.1},
        {"use_dora": True},
        {"bias": "all"},
        {"lora_bias": True},
        {"init_lora_weights": "pissa"},
        {"layer_replication": [(0, 2), (1, 2)]},
        {"target_parameters": ["model.conv_in.weight"]},
        {"trainable_token_indices": [1]},
        {"task_type": "FEATURE_EXTRACTION"},
    ]
    for settings in cases:
        model = colour_model("pixelcnn")
        names = [name for name, _ in model.named_modules()]
        with pytest.raises(ValueError, match=f"`{next(iter(settings))}`"):
            peft.get_peft_model(model, peft.LoraConfig(**settings))
        assert [name for name, _ in model.named_modules()] == names


def test_lora_on_other_layers_is_refused():
    cases = [
        ({"target_modules": ["class_embedding"]}, r"matches 'model.layers.0.class_embedding', a ClassEmbedding\. What"),
        ({"target_modules": ["embedding"]}, "matches 'model.encoding.embedding', a Embedding"),
        ({"target_modules": ["head"]}, "matches 'head', a PixelHead"),
        ({"target_modules": "all-linear"}, "all-linear"),
        ({"modules_to_save": ["head"]}, "may name 'class_embedding' only"),
        ({"modules_to_save": ["embedding"]}, "may name 'class_embedding' only"),
    ]
    for settings, message in cases:
        model = colour_model("pixelcnn", input_encoding="embedding")
        with pytest.raises(ValueError, match=message):
            peft.get_peft_model(model, peft.LoraConfig(**settings))
        assert all(parameter.requires_grad for parameter in model.parameters())


def test_a_second_adapter_that_is_refused_leaves_the_first_one():
    model = with_lora(colour_model("pixelcnn"))
    inputs = random_inputs(model)
    expected = model.log_prob(**inputs)
    with pytest.raises(ValueError, match="`use_dora`"):
        model.add_adapter(peft.LoraConfig(use_dora=True), "second")
    assert list(model.peft_config) == ["default"]
    assert torch.equal(model.log_prob(**inputs), expected)


@pytest.mark.parametrize("config_class", [peft.PromptTuningConfig, peft.PrefixTuningConfig])
def test_prompts_are_refused(config_class):
    with pytest.raises((ValueError, AttributeError)):
        peft.get_peft_model(colour_model("pixelcnn"), config_class(num_virtual_tokens=2, task_type="CAUSAL_LM"))


def test_inside_of_another_module_no_method_takes_a_masked_convolution_for_a_plain_one():
    """There `peft` does not ask our model, and finds no kind of layer that it knows."""
    for name, settings in linear_methods():
        outer = nn.ModuleDict({"inner": colour_model("pixelcnn")})
        with pytest.raises(Exception, match=r"."):
            peft.get_peft_model(outer, getattr(peft, name)(target_modules=r".*head\.layers\.0", **settings))


def test_other_models_of_the_process_have_their_own_lora():
    with_lora(colour_model("pixelcnn"))
    other = peft.get_peft_model(
        nn.Sequential(nn.Conv2d(2, 3, 3), nn.Linear(2, 2)), peft.LoraConfig(target_modules=["0", "1"], lora_dropout=0.1)
    )
    kinds = [type(module).__module__ for module in other.modules() if hasattr(module, "base_layer")]
    assert kinds == ["peft.tuners.lora.layer"] * 2


# What is put on layers from outside


class Wrapped(nn.Module):
    """A layer in another one, that looks like it to a cache."""

    def __init__(self, layer):
        super().__init__()
        self.layer = layer

    def __getattr__(self, name):
        return super().__getattr__(name) if name == "layer" else getattr(self.layer, name)

    def forward(self, x, **options):
        return 2 * self.layer(x, **options)


def last_of(model):
    return model.head.layers[-1]


def wrap(model):
    model.head.layers[-1] = Wrapped(last_of(model))


def hook(model):
    last_of(model).register_forward_hook(lambda module, args, output: 2 * output)


def pre_hook(model):
    model.model.register_forward_pre_hook(lambda module, args: None)


def hook_on_adapter(model):
    hook(with_lora(model))


def replace_forward(model):
    last_of(model).forward = lambda x: CausalConv2d.forward(last_of(model), 2 * x)


def old_weight_norm(model):
    torch.nn.utils.spectral_norm(last_of(model))


def replace_embedding(model):
    model.model.encoding.embedding = Wrapped(model.model.encoding.embedding)


def test_the_cached_sampler_and_the_codec_refuse_what_only_a_forward_pass_would_see(family):
    for change in [wrap, hook, pre_hook, hook_on_adapter, replace_forward, old_weight_norm, replace_embedding]:
        model = colour_model(family, input_encoding="embedding")
        levels = model.generate(num_images=1, class_ids=[0])
        change(model)
        with pytest.raises(ValueError, match=r"use `sampler='naive'`, merge adapters"):
            model.generate(num_images=1, class_ids=[0])
        pytest.importorskip("constriction")
        with pytest.raises(ValueError, match="codec compute with the weights"):
            compress(model, levels, [0])


class Doubled(nn.Module):
    def forward(self, weight):
        return 2 * weight


def test_the_cached_sampler_follows_parametrised_weights(family):
    model = colour_model(family, input_encoding="embedding")
    settings = {"num_images": 2, **conditions(model, 2)}
    plain = model.generate(**settings, generator=seeded())
    for layer in (last_of(model), model.model.encoding.embedding, next(convolutions(model))[1]):
        parametrize.register_parametrization(layer, "weight", Doubled())
    naive, cached = [model.generate(**settings, generator=seeded(), sampler=sampler) for sampler in ("naive", "cached")]
    assert torch.equal(naive, cached)
    assert not torch.equal(cached, plain)


def test_the_cached_sampler_works_with_parts_in_torch_compile(family):
    model = colour_model(family)
    expected = model.generate(num_images=2, class_ids=[0, 1], generator=seeded())
    model.head = torch.compile(model.head, backend="eager")
    model.model = torch.compile(model.model, backend="eager")
    assert torch.equal(model.generate(num_images=2, class_ids=[0, 1], generator=seeded()), expected)
