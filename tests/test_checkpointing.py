"""Activations computed again the reentrant way of `torch.utils.checkpoint`, which asks for inputs with gradients."""

from itertools import product

import torch
from conftest import FAMILIES, build_model, random_inputs


def gradients(model, inputs):
    """Of every free weight, by name; None where none was computed."""
    model.zero_grad()
    model(**inputs).loss.backward()
    return {name: w.grad for name, w in model.named_parameters() if w.requires_grad}


def enable(model):
    enable = getattr(model, "activation_checkpointing_enable", None) or model.gradient_checkpointing_enable
    enable({"use_reentrant": True})


def test_reentrant_checkpoints_train_every_layer(family):
    for encoding, is_frozen, is_classifier in product(["scaled", "embedding"], [False, True], [False, True]):
        model = build_model(family, num_classes=3, input_encoding=encoding)
        inputs = random_inputs(model)
        inputs["labels"] = inputs["pixel_values"]
        if is_classifier:
            causal, model = model, FAMILIES[family].classifier_class(model.config)
            model.load_state_dict(causal.state_dict())
            inputs = {"pixel_values": inputs["pixel_values"], "labels": torch.tensor([2, 0])}
        model.double().train()
        if is_frozen:
            layers = model.model.down_layers[-1] if family == "pixelcnn_pp" else model.model.layers
            model.model.requires_grad_(False)
            layers[-1].requires_grad_(True)
        expected = gradients(model, inputs)
        enable(model)
        found = gradients(model, inputs)
        assert [name for name, gradient in found.items() if gradient is None] == []
        for name, gradient in expected.items():
            torch.testing.assert_close(found[name], gradient, msg=name)
