import math
import shutil

import pytest
import torch
from conftest import KINDS, build_model, for_each, random_inputs, seeded

from hf_pixelcnn import (
    BernoulliOutput,
    CategoricalOutput,
    LogisticMixtureOutput,
    bits_per_dim,
    modeling_causal_image,
)
from hf_pixelcnn.likelihood_causal_image import levels_from_noise, log_one_minus_exp

DISTRIBUTIONS = [
    BernoulliOutput(3, 2),
    CategoricalOutput(3, 2),
    CategoricalOutput(3, 7),
    CategoricalOutput(1, 256),
    LogisticMixtureOutput(1, 2, 1),
    LogisticMixtureOutput(2, 5, 4),
    LogisticMixtureOutput(3, 256, 10),
]


def parameters_of(distribution, batch=2, height=3, width=4, scale=3.0, dtype=torch.float32):
    generator = torch.Generator().manual_seed(0)
    outputs = torch.randn(batch, distribution.num_parameters, height, width, generator=generator, dtype=dtype) * scale
    return distribution.from_outputs(outputs)


def test_probabilities_of_all_levels_sum_to_one():
    for distribution in DISTRIBUTIONS:
        for scale in [3.0, 100.0]:
            parameters = parameters_of(distribution, scale=scale)
            previous = torch.tensor([[0, distribution.num_levels - 1, 0], [1, 0, 1]])
            for channel in range(distribution.num_channels):
                pixel = distribution.pixels(parameters)[:, 1, 2]
                logits = distribution.level_logits(pixel, channel, previous[:, :channel])
                assert logits.shape == (2, distribution.num_levels)
                torch.testing.assert_close(logits.exp().sum(-1), torch.ones(2), rtol=0, atol=1e-6)


def test_level_logits_at_the_level_are_log_prob():
    for distribution in DISTRIBUTIONS:
        parameters = parameters_of(distribution)
        for level in {0, 1, distribution.num_levels // 2, distribution.num_levels - 1}:  # both edges included
            levels = torch.full((2, distribution.num_channels, 3, 4), level)
            log_prob = distribution.log_prob(parameters, levels)
            assert log_prob.shape == levels.shape
            for channel in range(distribution.num_channels):
                pixel = distribution.pixels(parameters)[:, 2, 1]
                logits = distribution.level_logits(pixel, channel, levels[:, :channel, 2, 1])
                torch.testing.assert_close(logits[:, level], log_prob[:, channel, 2, 1])


def test_levels_of_a_logistic_mixture_are_found_without_their_probabilities():
    for num_levels in [2, 3, 4, 5, 16, 17, 256]:
        for scale in [0.3, 3.0, 30.0]:
            distribution = LogisticMixtureOutput(3, num_levels, 4)
            generator = torch.Generator().manual_seed(0)
            pixels = distribution.pixels(parameters_of(distribution, 16, 8, 8, scale, torch.float64))
            noise = torch.rand(16, 8, 8, dtype=torch.float64, generator=generator)
            previous = torch.randint(num_levels, (16, 8, 8, 3), generator=generator)
            for channel in range(3):
                logits = distribution.level_logits(pixels, channel, previous[..., :channel])
                levels = distribution.icdf(pixels, channel, noise, previous[..., :channel])
                assert torch.equal(levels, levels_from_noise(logits, noise))
                lowest, highest = (
                    distribution.icdf(pixels, channel, torch.full_like(noise, x), previous[..., :channel])
                    for x in (0.0, 1 - 2**-53)
                )
                for smaller, larger in ((lowest, levels), (levels, highest)):
                    assert (smaller <= larger).all()
                assert highest.max() < num_levels


def test_channels_drawn_at_once_are_those_drawn_one_by_one_from_all_probabilities():
    for distribution in [*DISTRIBUTIONS, LogisticMixtureOutput(3, 1000, 3)]:
        for number in (1, 2, 500):  # few are compared with all edges
            for scale in (0.3, 3.0, 30.0):
                outputs = parameters_of(distribution, number, 1, 1, scale, torch.float64)
                pixels = distribution.pixels(outputs)[:, 0, 0]
                noise = torch.rand(distribution.num_channels, number, generator=seeded(number), dtype=torch.float64)
                expected = torch.empty(number, 0, dtype=torch.long)
                for channel in range(distribution.num_channels):
                    logits = distribution.level_logits(pixels, channel, expected)
                    expected = torch.cat((expected, levels_from_noise(logits, noise[channel])[:, None]), dim=1)
                for given in range(distribution.num_channels):
                    drawn = distribution.draw_channels(pixels, noise[given:], expected[:, :given])
                    assert torch.equal(drawn, expected[:, given:]), (distribution, number, scale)


def test_levels_of_a_bernoulli_are_found_without_their_probabilities():
    distribution = BernoulliOutput(2, 2)
    log_odds = torch.cat((torch.linspace(-60, 60, 401), torch.tensor([-torch.inf, -800, 800, torch.inf, torch.nan])))
    for pixels in (log_odds[:, None, None].double(), log_odds.bfloat16()[:, None, None]):
        pixels = pixels.expand(-1, 9, 2)
        noise = torch.linspace(0, 1 - 2**-53, 9, dtype=torch.float64).repeat(len(log_odds), 1)
        for channel in range(2):
            expected = levels_from_noise(distribution.level_logits(pixels.double(), channel), noise)
            assert torch.equal(distribution.icdf(pixels, channel, noise), expected)


def test_broken_parameters_have_no_level():
    for value in [torch.nan, torch.inf, -torch.inf]:
        noise, previous = torch.full((2,), 0.5, dtype=torch.float64), torch.zeros(2, 2, dtype=torch.long)
        for distribution in DISTRIBUTIONS[-3:]:
            pixels = distribution.pixels(parameters_of(distribution))[:, 0, 0]
            logits_and_means = 2 * distribution.num_components  # the means are those of the first channel
            for i in range(logits_and_means):
                broken = pixels.clone()
                broken[1, i] = value
                levels = distribution.icdf(broken, 0, noise, previous[:, :0])
                assert levels[0] >= 0
                assert levels[1] == -1 or (value == -torch.inf and i < distribution.num_components)


def test_earlier_levels_that_no_component_can_give_leave_no_level():
    distribution = LogisticMixtureOutput(3, 256, 2)
    pixels = torch.zeros(1, distribution.num_parameters, dtype=torch.float64)
    pixels[:, 2:4] = 1e306  # means of the first channel, so far away that the others have no component left
    pixels[:, 8:14] = -7
    noise, previous = torch.full((1,), 0.5, dtype=torch.float64), torch.zeros(1, 2, dtype=torch.long)
    for channel in (1, 2):
        logits = distribution.level_logits(pixels, channel, previous[:, :channel])
        assert (
            levels_from_noise(logits, noise) == distribution.icdf(pixels, channel, noise, previous[:, :channel]) == -1
        )


def test_rounding_never_draws_a_level_without_a_mass():
    distribution = LogisticMixtureOutput(1, 256, 10)
    pixels = torch.randn(400, distribution.num_parameters, generator=torch.Generator().manual_seed(0))
    pixels[:, 10:20], pixels[:, 20:30] = 0, -7  # all means in the middle, all scales small
    noise = torch.full((400,), 1 - 2**-53, dtype=torch.float64)
    assert distribution.icdf(pixels, 0, noise).max() < 140


def test_bernoulli_and_categorical_agree_with_hand_computed_numbers():
    log_odds = torch.tensor([[0.0]])
    torch.testing.assert_close(BernoulliOutput(1, 2).level_logits(log_odds, 0), torch.full((1, 2), -math.log(2)))
    log_odds = torch.tensor([[math.log(3)]])  # p(1) = 3/4
    torch.testing.assert_close(BernoulliOutput(1, 2).level_logits(log_odds, 0).exp(), torch.tensor([[0.25, 0.75]]))
    logits = torch.tensor([[[1.0, 2.0, 5.0]]]).log()
    torch.testing.assert_close(
        CategoricalOutput(1, 3).level_logits(logits, 0).exp(), torch.tensor([[1.0, 2.0, 5.0]]) / 8
    )


def mixture_of_one(mean, log_scale, num_levels=256, dtype=torch.float32):
    """Distribution and parameters `(1, 1, 1, 3)` of one grey pixel with one logistic."""
    parameters = torch.tensor([0.0, mean, log_scale], dtype=dtype).view(1, 1, 1, 3)
    return LogisticMixtureOutput(1, num_levels, 1), parameters


def test_a_logistic_agrees_with_hand_computed_numbers():
    distribution, parameters = mixture_of_one(0.0, math.log(0.5), num_levels=3, dtype=torch.float64)
    low = 1 / (1 + math.exp(1))  # levels are -1, 0, 1, edges ±½, and edge / scale = ±1
    expected = torch.tensor([low, 1 - 2 * low, low], dtype=torch.float64)
    torch.testing.assert_close(distribution.level_logits(parameters, 0).exp().flatten(), expected)


def test_a_mixture_is_the_sum_over_its_components_written_out():
    distribution = LogisticMixtureOutput(3, 4, 2)
    parameters = parameters_of(distribution, batch=1, height=1, width=1, scale=1.0, dtype=torch.float64)
    logits, means, log_scales, coefficients = parameters.flatten().view(10, 2).split([1, 3, 3, 3])
    a, b, c = coefficients.tanh()

    def cdf(x, k, channel, mean):
        return torch.sigmoid((x - mean) / log_scales[channel, k].exp())

    def mass(level, k, channel, mean):
        x = 2 * level / 3 - 1
        below = 0 if level == 0 else cdf(x - 1 / 3, k, channel, mean)
        above = 1 if level == 3 else cdf(x + 1 / 3, k, channel, mean)
        return above - below

    for red, green, blue in [(0, 3, 1), (2, 1, 0), (3, 3, 3)]:
        r, g = 2 * red / 3 - 1, 2 * green / 3 - 1
        joint = [logits.softmax(-1)[0, k] * mass(red, k, 0, means[0, k]) for k in (0, 1)]
        expected = [sum(joint)]
        joint = [joint[k] * mass(green, k, 1, means[1, k] + a[k] * r) for k in (0, 1)]
        expected.append(sum(joint))
        joint = [joint[k] * mass(blue, k, 2, means[2, k] + b[k] * r + c[k] * g) for k in (0, 1)]
        expected.append(sum(joint))
        levels = torch.tensor([red, green, blue]).view(1, 3, 1, 1)
        log_prob = distribution.log_prob(parameters, levels).flatten()
        torch.testing.assert_close(log_prob.cumsum(0), torch.stack(expected).log())


def test_a_logistic_of_any_mean_and_scale_is_finite_and_sums_to_one():
    for num_levels in [2, 5, 256]:
        for log_scale in [-50.0, -7.0, -5.0, -2.0, 0.0, 3.0, 60.0]:
            for mean in (-1e6, -3.0, -1.0, -0.5, 0.0, 1e-4, 1 / 255, 0.3, 1.0, 1.004, 40.0, 1e6):
                distribution, parameters = mixture_of_one(mean, log_scale, num_levels)
                logits = distribution.level_logits(parameters, 0).flatten()
                assert logits.isfinite().all()
                torch.testing.assert_close(logits.double().exp().sum().item(), 1.0, rtol=0, atol=1e-6)
                levels = torch.arange(num_levels).view(1, 1, 1, -1)
                log_prob = distribution.log_prob(parameters.expand(1, 1, num_levels, 3), levels)
                torch.testing.assert_close(logits, log_prob.flatten())


def test_a_mean_far_away_is_pulled_towards_the_level():
    for log_scale in [-50.0, -7.0, -3.0, 2.0]:
        for level in [0, 1, 128, 254, 255]:
            for mean in (-1e6, -30.0, -1.5, 1.5, 30.0, 1e6):
                distribution, parameters = mixture_of_one(mean, log_scale)
                parameters.requires_grad_()
                log_prob = distribution.log_prob(parameters, torch.tensor(level).view(1, 1, 1, 1))
                (gradient,) = torch.autograd.grad(log_prob.sum(), parameters)
                assert gradient.isfinite().all()
                if (level == 0 and mean < 0) or (level == 255 and mean > 0):
                    continue  # the level is (almost) certain
                pull = gradient.flatten()[1] * (-1 if mean > 0 else 1)
                assert pull > 1e-3
                assert log_scale < -7 or abs(mean) < 30 or gradient.flatten()[2] > 0  # and its scale grows


def test_extreme_parameters_give_finite_log_probabilities():
    distribution = BernoulliOutput(1, 2)
    parameters = torch.tensor([-200.0, 200.0]).view(2, 1, 1, 1)
    assert distribution.log_prob(parameters, torch.tensor([1, 0]).view(2, 1, 1, 1)).flatten().tolist() == [-200, -200]


def test_bfloat16_parameters_are_scored_in_float32(family):
    model = build_model(family, num_levels=8).bfloat16()
    inputs = random_inputs(model)
    assert model(**inputs).logits.dtype == torch.bfloat16
    assert model.log_prob(**inputs).dtype == torch.float32


@pytest.mark.versions
@for_each("kind", KINDS)
def test_loss_is_mean_nats_per_dimension_of_log_prob(family, kind):
    model = build_model(family, **kind).double()
    inputs = random_inputs(model)
    log_prob = model.log_prob(**inputs)
    assert log_prob.shape == inputs["pixel_values"].shape
    loss = model(**inputs, labels=inputs["pixel_values"]).loss
    torch.testing.assert_close(loss, -log_prob.mean())
    as_bytes = inputs["pixel_values"].to(torch.uint8)
    torch.testing.assert_close(model(**{**inputs, "pixel_values": as_bytes}, labels=as_bytes).loss, loss)


def test_classes_of_log_prob_by_name_or_number():
    model = build_model("pixelcnn", num_classes=3, id2label={0: "cat", 1: "dog", 2: "owl"})
    levels = random_inputs(model)["pixel_values"]
    for ids, classes in (([1, 2], ["dog", 2]), ([1, 1], "dog"), ([0, 0], 0), ([-1, 2], [-1, "owl"])):
        expected = model.log_prob(levels, class_ids=torch.tensor(ids))
        assert torch.equal(model.log_prob(levels, class_ids=classes), expected)
        one = model.level_log_prob(levels, 1, 2, class_ids=classes)
        torch.testing.assert_close(one.gather(1, levels[:, 0, 1, 2, None])[:, 0], expected[:, 0, 1, 2])
    with pytest.raises(ValueError, match="There is no class 'cow'"):
        model.log_prob(levels, class_ids="cow")


def test_scores_in_training_mode_are_said_to_be_random(monkeypatch):
    told = []
    monkeypatch.setattr(modeling_causal_image.logger, "warning_once", told.append)
    for dropout in (0.0, 0.5):
        model = build_model("pixelcnn", dropout=dropout)
        inputs = random_inputs(model)
        with torch.no_grad():
            model.log_prob(**inputs)
        model.train().log_prob(**inputs)  # for a gradient
        assert not told
        with torch.no_grad():
            model.log_prob(**inputs)
        assert len(told) == (dropout > 0)


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


def test_small_masses_and_their_gradients_are_exact():
    for dtype, tolerance in ((torch.float64, 1e-14), (torch.float32, 1e-6)):
        x = torch.logspace(-30, 2, 200, dtype=dtype).requires_grad_()
        expected = [math.log(-math.expm1(-value)) for value in x.tolist()]
        found = log_one_minus_exp(x)
        torch.testing.assert_close(found, torch.tensor(expected, dtype=dtype), rtol=tolerance, atol=tolerance)
        (gradient,) = torch.autograd.grad(found.sum(), x)
        slopes = torch.tensor([1 / math.expm1(value) for value in x.tolist()], dtype=dtype)
        torch.testing.assert_close(gradient, slopes, rtol=10 * tolerance, atol=tolerance)


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore::DeprecationWarning")  # of torch's own compiler
@pytest.mark.skipif(shutil.which("g++") is None, reason="compiling needs g++")
def test_compiled_small_masses_have_finite_gradients():
    """Compiled code has an expm1 of its own, with which the masses of very wide bells were 0, their gradients NaN."""
    x = torch.logspace(-30, 2, 200).requires_grad_()
    found = torch.compile(log_one_minus_exp)(x)
    torch.testing.assert_close(found, log_one_minus_exp(x), rtol=1e-4, atol=1e-4)
    (gradient,) = torch.autograd.grad(found.sum(), x)
    assert gradient.isfinite().all()
