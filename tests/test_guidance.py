"""Guidance: log-probabilities are moved from "no class" towards, and beyond, those of the class."""

import pytest
import torch
from conftest import SAMPLERS, build_model, classy_model, for_each, random_inputs, seeded, small_config
from huggingface_hub.errors import StrictDataclassError
from transformers import LogitsProcessor

from hf_pixelcnn import checks_causal_image
from hf_pixelcnn.likelihood_causal_image import GuidedConditional, OutputDistribution

CONFIGS = {
    "grey_categorical": {"num_levels": 5, "num_classes": 3, "output_distribution": "categorical"},
    "colour_bernoulli": {"num_channels": 3, "num_classes": 2},
    "colour_codes": {"num_channels": 3, "num_levels": 4, "num_classes": 2, "input_encoding": "embedding"},
}


@for_each("config", CONFIGS)
@for_each("scale", [0.4, 3])
def test_all_samplers_draw_the_same_guided_images(family, config, scale):
    model = classy_model(family, image_size=[3, 4], **config)
    request = {"class_ids": [0, 1, 1, 0, 1], "guidance_scale": scale}
    naive = model.generate(**request, generator=seeded(), sampler="naive")
    others = [
        model.generate(**request, generator=seeded(), sampler=sampler, max_batch_size=3) for sampler in SAMPLERS[1:]
    ]
    assert all(torch.equal(naive, images) for images in others)
    assert not torch.equal(naive, model.generate(class_ids=[0, 1, 1, 0, 1], generator=seeded()))


@for_each("scale", [0.0, 0.4, 3])
def test_scores_are_those_without_a_class_plus_the_scaled_difference(family, scale):
    model = classy_model(family, **CONFIGS["grey_categorical"])
    output = model.generate(
        class_ids=2, generator=seeded(), guidance_scale=scale, output_scores=True, return_dict_in_generate=True
    )
    logits = model(output.sequences.expand(2, -1, -1, -1), class_ids=torch.tensor([2, -1])).logits
    with_class, without = logits[:, 0].flatten(1, 2).log_softmax(-1)  # (dims, levels), one channel
    powers = with_class.exp() ** scale * without.exp() ** (1 - scale)
    torch.testing.assert_close(torch.cat(output.scores), (powers / powers.sum(-1, keepdim=True)).log())


def test_earlier_channels_of_a_pixel_reach_both_halves():
    class Mixture(OutputDistribution):  # of a kind whose conditionals need the earlier channels
        def level_logits(self, parameters, channel, previous):
            return (parameters[..., channel, :] * (1 + previous.sum(-1, keepdim=True))).log_softmax(-1)

    parameters = torch.randn(4, 3, 5, generator=seeded())  # two images with, then the same two without a class
    previous = torch.tensor([[0, 2], [3, 1]])
    with_class, without = (Mixture(3, 5).level_logits(half, 2, previous) for half in parameters.chunk(2))
    guided = GuidedConditional(Mixture(3, 5), 2.0).level_logits(parameters, 2, previous)
    torch.testing.assert_close(guided, (2 * with_class - without).log_softmax(-1))


def test_scale_1_is_the_model_itself_at_the_cost_of_one_forward(family):
    model = classy_model(family, **CONFIGS["grey_categorical"])
    sizes = []
    model.register_forward_pre_hook(lambda module, args: sizes.append(len(args[0])))
    images = [
        model.generate(class_ids=1, generator=seeded(), sampler="naive", **g) for g in ({}, {"guidance_scale": 1})
    ]
    assert torch.equal(*images)
    assert set(sizes) == {1}
    model.generate(class_ids=1, sampler="naive", guidance_scale=2.0)
    assert set(sizes[-30:]) == {2}


@pytest.mark.slow
def test_guidance_comes_before_processors_and_goes_with_given_pixels(family):
    class Recorder(LogitsProcessor):
        def __init__(self):
            self.totals, self.shapes = [], []

        def __call__(self, levels, scores):
            self.totals.append(scores.exp().sum(-1))
            self.shapes.append((tuple(levels.shape), tuple(scores.shape)))
            return scores

    model = classy_model(family, **CONFIGS["colour_codes"])
    given = random_inputs(model, batch=2)["pixel_values"]
    known = torch.rand(given.shape, generator=seeded()) < 0.4
    request = {"class_ids": [0, 1], "pixel_values": given, "known_mask": known, "guidance_scale": 2.5, "top_k": 2}
    drawn = []
    for sampler in ("naive", "cached"):
        recorder = Recorder()
        drawn.append(model.generate(**request, logits_processor=[recorder], generator=seeded(), sampler=sampler))
        assert recorder.shapes == [((2, n), (2, 4)) for n in range(90)]
        torch.testing.assert_close(torch.stack(recorder.totals), torch.ones(90, 2).double())
    drawn.append(model.generate(**request, generator=seeded(), sampler="fixed_point"))
    assert all(torch.equal(drawn[0], images) for images in drawn)
    assert torch.equal(drawn[0][known], given[known])


def test_a_stronger_scale_makes_the_class_more_probable():
    model = classy_model("gated_pixelcnn", **CONFIGS["grey_categorical"])
    ratios = []
    for scale in (0.0, 1.0, 3.0):
        images = model.generate(class_ids=1, num_images=200, guidance_scale=scale, generator=seeded())
        ids = torch.tensor([1, -1]).repeat_interleave(200)
        with torch.no_grad():
            with_class, without = model.log_prob(images.repeat(2, 1, 1, 1), class_ids=ids).sum((1, 2, 3)).chunk(2)
        ratios.append((with_class - without).mean().item())
    assert ratios[0] < ratios[1] < ratios[2]


def test_a_model_that_has_never_seen_an_image_without_its_class_says_so_once(monkeypatch):
    told = []
    monkeypatch.setattr(checks_causal_image.logger, "warning_once", told.append)
    for class_dropout in (0.1, None, 0.0):  # `None` where nobody knows
        model = build_model("pixelcnn", num_classes=2, class_dropout=class_dropout)
        model.generate(class_ids=1)
        assert not told
        for request in ({"class_ids": 1, "guidance_scale": 2.0}, {"class_ids": [1, -1]}):
            told.clear()
            model.generate(**request)
            assert {"class_dropout` is 0" in text for text in told} == ({True} if class_dropout == 0.0 else set())
        told.clear()
        model.log_prob(torch.zeros(1, 1, 5, 6, dtype=torch.long), class_ids=-1)
        assert bool(told) == (class_dropout == 0.0)
        with pytest.raises(ValueError, match="`class_ids` are needed") as error:
            model.log_prob(torch.zeros(1, 1, 5, 6, dtype=torch.long))
        assert ("Pass -1" in str(error.value)) == (class_dropout != 0.0)
        told.clear()
    with pytest.raises(StrictDataclassError, match=r"`class_dropout` must be in \[0, 1\), got 1"):
        small_config("pixelcnn", class_dropout=1)


def test_guidance_needs_a_class_and_a_usable_scale(family):
    with pytest.raises(ValueError, match=r"`guidance_scale=2.0` compares .* cannot go with an unconditional model"):
        build_model(family).generate(guidance_scale=2.0)
    model = build_model(family, num_classes=3)
    with pytest.raises(ValueError, match=r"`guidance_scale=0.5` .* images of class -1, which means no class"):
        model.generate(class_ids=[0, -1], guidance_scale=0.5)
    for scale in (-0.5, float("nan"), float("inf")):
        with pytest.raises(ValueError, match="`guidance_scale` must be a finite number of at least 0"):
            model.generate(class_ids=0, guidance_scale=scale)
    for scale in ("2", True):
        with pytest.raises(TypeError, match="`guidance_scale` must be a number"):
            model.generate(class_ids=0, guidance_scale=scale)
