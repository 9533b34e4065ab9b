import math

import pytest
import torch
from conftest import build_model, random_inputs

from hf_pixelcnn import BernoulliOutput, CategoricalOutput, bits_per_dim

DISTRIBUTIONS = [BernoulliOutput(3, 2), CategoricalOutput(3, 2), CategoricalOutput(3, 7), CategoricalOutput(1, 256)]


def parameters_of(distribution, batch=2, height=3, width=4, scale=3.0, dtype=torch.float32):
    generator = torch.Generator().manual_seed(0)
    outputs = torch.randn(batch, distribution.num_parameters, height, width, generator=generator, dtype=dtype) * scale
    return distribution.parameters(outputs)


@pytest.mark.parametrize("distribution", DISTRIBUTIONS, ids=lambda d: f"{type(d).__name__}-{d.num_levels}")
@pytest.mark.parametrize("scale", [3.0, 100.0])
def test_probabilities_of_all_levels_sum_to_one(distribution, scale):
    parameters = parameters_of(distribution, scale=scale)
    for channel in range(distribution.num_channels):
        logits = distribution.level_logits(distribution.pixels(parameters)[:, 1, 2], channel)
        assert logits.shape == (2, distribution.num_levels)
        torch.testing.assert_close(logits.exp().sum(-1), torch.ones(2), rtol=0, atol=1e-6)


@pytest.mark.parametrize("distribution", DISTRIBUTIONS, ids=lambda d: f"{type(d).__name__}-{d.num_levels}")
def test_level_logits_at_the_level_are_log_prob(distribution):
    parameters = parameters_of(distribution)
    for level in {0, 1, distribution.num_levels // 2, distribution.num_levels - 1}:  # both edges included
        levels = torch.full((2, distribution.num_channels, 3, 4), level)
        log_prob = distribution.log_prob(parameters, levels)
        assert log_prob.shape == levels.shape
        for channel in range(distribution.num_channels):
            logits = distribution.level_logits(distribution.pixels(parameters)[:, 2, 1], channel)
            torch.testing.assert_close(logits[:, level], log_prob[:, channel, 2, 1])


def test_bernoulli_and_categorical_agree_with_hand_computed_numbers():
    log_odds = torch.tensor([[0.0]])
    torch.testing.assert_close(BernoulliOutput(1, 2).level_logits(log_odds, 0), torch.full((1, 2), -math.log(2)))
    log_odds = torch.tensor([[math.log(3)]])  # p(1) = 3/4
    torch.testing.assert_close(BernoulliOutput(1, 2).level_logits(log_odds, 0).exp(), torch.tensor([[0.25, 0.75]]))
    logits = torch.tensor([[[1.0, 2.0, 5.0]]]).log()
    torch.testing.assert_close(
        CategoricalOutput(1, 3).level_logits(logits, 0).exp(), torch.tensor([[1.0, 2.0, 5.0]]) / 8
    )


def test_extreme_parameters_give_finite_log_probabilities():
    distribution = BernoulliOutput(1, 2)
    parameters = torch.tensor([-200.0, 200.0]).view(2, 1, 1, 1)
    assert distribution.log_prob(parameters, torch.tensor([1, 0]).view(2, 1, 1, 1)).flatten().tolist() == [-200, -200]


def test_bfloat16_parameters_are_scored_in_float32(family):
    model = build_model(family, num_levels=8).bfloat16()
    inputs = random_inputs(model)
    assert model(**inputs).logits.dtype == torch.bfloat16
    assert model.log_prob(**inputs).dtype == torch.float32


def test_loss_is_mean_nats_per_dimension_of_log_prob(family, variant):
    model = build_model(family, **variant).double()
    inputs = random_inputs(model)
    log_prob = model.log_prob(**inputs)
    assert log_prob.shape == inputs["pixel_values"].shape
    loss = model(**inputs, labels=inputs["pixel_values"]).loss
    torch.testing.assert_close(loss, -log_prob.mean())
    as_bytes = inputs["pixel_values"].to(torch.uint8)
    torch.testing.assert_close(model(**{**inputs, "pixel_values": as_bytes}, labels=as_bytes).loss, loss)


def test_labels_of_minus_100_are_left_out(family):
    model = build_model(family, num_levels=5).double()
    inputs = random_inputs(model)
    labels = inputs["pixel_values"].clone()
    labels[:, :, 2] = -100
    expected = -model.log_prob(**inputs)[labels != -100].mean()
    torch.testing.assert_close(model(**inputs, labels=labels).loss, expected)
    by_count = model(**inputs, labels=labels, num_items_in_batch=torch.tensor(100)).loss
    torch.testing.assert_close(by_count, expected * (labels != -100).sum() / 100)


def test_a_model_of_constant_log_odds_scores_one_bit_per_dimension(family):
    model = build_model(family)
    with torch.no_grad():
        model.head.layers[-1].weight.zero_()
        model.head.layers[-1].bias.zero_()
    inputs = random_inputs(model)
    nats = -model.log_prob(**inputs).double().sum().item()
    assert bits_per_dim(nats, inputs["pixel_values"].numel()) == pytest.approx(1.0, abs=1e-6)


def test_bits_per_dim_needs_dimensions():
    assert bits_per_dim(100 * 8 * math.log(2), 100) == pytest.approx(8.0)
    with pytest.raises(ValueError, match="`num_dims` must be positive, got 0"):
        bits_per_dim(1.0, 0)
