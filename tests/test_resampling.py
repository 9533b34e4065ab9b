"""`num_resamples`: several completions of which one that explains what is given after free dimensions is kept."""

import itertools
import math

import pytest
import torch
from conftest import SAMPLERS, build_model, classy_model, for_each, random_inputs, seeded

from hf_pixelcnn import PixelCNNGenerationConfig


def contrasted_model(family, **config):
    """A model with probabilities far from uniform, so that completions differ much in what they explain."""
    model = build_model(family, **config).double()
    last = model.head.layers[-1]
    (last.weight if last.gain is None else last.gain).data.mul_(4)
    return model


def weights_by_hand(model, images, known, **class_ids):
    """Product of the probabilities of given dimensions after the first free one, image by image, by one forward."""
    with torch.no_grad():
        log_prob = model.log_prob(images, **class_ids).permute(0, 2, 3, 1).flatten(1)
    given = known.permute(0, 2, 3, 1).flatten(1)
    weights = []
    for row, mask in zip(log_prob, given, strict=True):
        first_free = mask.tolist().index(False)
        weights.append(sum(row[i].item() for i in range(first_free, len(mask)) if mask[i]))
    return torch.tensor(weights, dtype=torch.float64).exp()


@pytest.mark.slow
@for_each("sampler", SAMPLERS)
@for_each("config", [{}, {"num_channels": 3, "num_levels": 4}])
def test_one_of_the_completions_is_chosen_by_its_weight_and_a_number_of_its_own(family, sampler, config):
    model = contrasted_model(family, **config)
    given = random_inputs(model, batch=2)["pixel_values"]
    known = torch.rand(given.shape, generator=seeded(1)) < 0.5
    known[:, :, 0, :2] = True  # these precede all free dimensions and must not count
    output = model.generate(
        given, known, generator=seeded(), num_resamples=5, sampler=sampler, return_dict_in_generate=True
    )
    generator = seeded()
    for i in range(2):
        candidates = model.generate(given[i : i + 1], known[i : i + 1], num_images=5, generator=generator)
        number = torch.rand(1, dtype=torch.float64, generator=generator).item()
        weights = weights_by_hand(model, candidates, known[i : i + 1].expand(5, -1, -1, -1))
        weights /= weights.sum()
        chosen = sum(total.item() <= number for total in weights.cumsum(0))
        assert torch.equal(output.sequences[i], candidates[chosen])
        assert output.effective_sample_size[i].item() == pytest.approx(1 / weights.square().sum().item())
        assert 1 < output.effective_sample_size[i] < 4.9
    assert output.sequences.shape == given.shape
    assert torch.equal(output.sequences[known], given[known])


@pytest.mark.slow
def test_the_law_of_a_choice_and_its_limit_the_exact_posterior(family):
    """A 3×2 image with two free pixels, the first and the third: all that can happen is in a table."""
    model = contrasted_model(family, image_size=[3, 2])
    known = torch.tensor([[False, True], [False, True], [True, True]])
    given = torch.tensor([[0, 1], [0, 0], [1, 1]])[None, None]
    images = given.repeat(4, 1, 1, 1)
    images[:, 0, 0, 0], images[:, 0, 1, 0] = torch.tensor([0, 0, 1, 1]), torch.tensor([0, 1, 0, 1])
    with torch.no_grad():
        log_prob = model.log_prob(images)[:, 0]
    joint, proposal = log_prob.sum((1, 2)).exp(), (log_prob * ~known).sum((1, 2)).exp()
    weight, posterior = joint / proposal, joint / joint.sum()
    assert proposal.sum().item() == pytest.approx(1)

    def law(count):
        """Probability of each completion to be chosen from `count` drawn ones, summed over all they can be."""
        chosen = torch.zeros(4).double()
        for drawn in itertools.product(range(count + 1), repeat=3):
            if (rest := count - sum(drawn)) >= 0:
                times = torch.tensor([*drawn, rest], dtype=torch.float64)
                ways = math.factorial(count) / math.prod(map(math.factorial, (*drawn, rest)))
                chosen += ways * (proposal**times).prod() * times * weight / (times @ weight)
        return chosen

    distances = [(law(count) - posterior).abs().sum().item() for count in (1, 3, 20)]
    assert distances[0] > 2 * distances[1] > 8 * distances[2]
    assert distances[1] > 0.004  # else three would be as good as many
    drawn = model.generate(given, known, num_images=5_000, generator=seeded(), num_resamples=3)
    counts = torch.bincount(drawn[:, 0, 0, 0] * 2 + drawn[:, 0, 1, 0], minlength=4)
    expected = 5_000 * law(3)
    assert ((counts - expected) ** 2 / expected).sum() < 16.3  # 99.9th percentile with 3 degrees of freedom


@pytest.mark.slow
@for_each("sampler", SAMPLERS)
def test_parts_and_generators_of_their_own_change_nothing(family, sampler):
    model = contrasted_model(family, num_classes=3)
    request = {"pixel_values": random_inputs(model, batch=3)["pixel_values"], "class_ids": [0, 1, 2]}
    request["known_mask"] = torch.rand(3, 1, 5, 6, generator=seeded()) < 0.5
    request |= {"num_resamples": 4, "sampler": sampler, "return_dict_in_generate": True}
    generators = lambda: [seeded(i) for i in range(3)]  # noqa: E731
    whole = model.generate(**request, generator=generators())
    parts = model.generate(**request, generator=generators(), max_batch_size=5)
    assert torch.equal(whole.sequences, parts.sequences)
    torch.testing.assert_close(whole.effective_sample_size, parts.effective_sample_size)
    alone = {key: value[1:2] for key, value in request.items() if key in ("pixel_values", "known_mask", "class_ids")}
    assert torch.equal(model.generate(**{**request, **alone}, generator=seeded(1)).sequences[0], whole.sequences[1])
    continuing = seeded()
    one_by_one = [model.generate(**{**request, **alone}, generator=continuing).sequences for _ in range(2)]
    together = model.generate(**{**request, **alone}, num_images=2, generator=seeded()).sequences
    assert torch.equal(torch.cat(one_by_one), together)


def test_weights_are_equal_where_all_given_pixels_come_first(family):
    model = contrasted_model(family)
    given, upper = random_inputs(model, batch=1)["pixel_values"], torch.zeros(5, 6, dtype=torch.bool)
    upper[:2] = True
    candidates = torch.full((3 * 8, 1, 5, 6), -1)

    def streamer(images, row, levels):
        candidates[images, :, row] = levels

    request = {"num_images": 3, "num_resamples": 8, "max_batch_size": 10, "return_dict_in_generate": True}
    output = model.generate(given, upper, **request, generator=seeded(), streamer=streamer)
    assert output.effective_sample_size.tolist() == [8, 8, 8]
    for chosen, drawn in zip(output.sequences, candidates.split(8), strict=True):
        assert (drawn == chosen).flatten(1).all(1).any()
        assert (drawn.flatten(1) != drawn[0].flatten()).any()
    everything = model.generate(given, upper | True, num_resamples=3, return_dict_in_generate=True)
    assert torch.equal(everything.sequences, given)
    assert everything.effective_sample_size.tolist() == [3]


def test_weights_are_of_the_guided_model_and_know_no_other_setting(family):
    model = classy_model(family, num_levels=5, num_classes=3, output_distribution="categorical")
    given = random_inputs(model, batch=1)["pixel_values"]
    known = torch.rand(given.shape, generator=seeded()) < 0.5
    request = {"class_ids": 1, "guidance_scale": 2.0, "top_k": 2, "temperature": 0.5}
    output = model.generate(
        given, known, generator=seeded(), num_resamples=6, return_dict_in_generate=True, output_scores=True, **request
    )
    generator = seeded()
    candidates = model.generate(given, known, num_images=6, generator=generator, **request)
    ids = torch.tensor([1, -1]).repeat_interleave(6)
    with torch.no_grad():
        logits = model(candidates.repeat(2, 1, 1, 1), class_ids=ids).logits.log_softmax(-1)
    with_class, without = logits[:, 0].flatten(1, 2).chunk(2)
    guided = (2 * with_class - without).log_softmax(-1).gather(-1, candidates.flatten(1)[..., None])[..., 0]
    after = known.flatten() & (torch.arange(30) > known.flatten().tolist().index(False))
    weights = guided[:, after].sum(1).softmax(0)
    assert output.effective_sample_size.item() == pytest.approx(1 / weights.square().sum().item())
    number = torch.rand(1, dtype=torch.float64, generator=generator)
    chosen = torch.searchsorted(weights.cumsum(0), number, right=True)
    assert torch.equal(output.sequences, candidates[chosen])
    assert len(output.scores) == 30
    assert all(scores.shape == (1, 5) for scores in output.scores)
    free = (~known).flatten().nonzero().flatten().tolist()
    assert all(output.scores[i][0, output.sequences.flatten()[i]] > -torch.inf for i in free)


def test_impossible_pixels_count_only_after_free_ones_and_are_an_error_and_no_picture():
    model = build_model("pixelcnn")
    model.head.layers[-1].bias.data.fill_(-torch.inf)  # level 1 has no probability
    known = torch.zeros(5, 6, dtype=torch.bool)
    known[0] = True
    model.generate(torch.ones(1, 1, 5, 6).long(), known, num_resamples=3)
    known[4, 5] = True
    with pytest.raises(ValueError, match="All completions of an image have probability 0"):
        model.generate(torch.ones(1, 1, 5, 6).long(), known, num_resamples=3)


def test_settings_that_cannot_go_together():
    model = build_model("pixelcnn")
    given, known = torch.zeros(1, 1, 5, 6).long(), torch.ones(5, 6, dtype=torch.bool)
    with pytest.raises(ValueError, match=r"`num_resamples=2` weighs .* needs `pixel_values` and"):
        model.generate(num_resamples=2)
    with pytest.raises(ValueError, match="`num_resamples=2` needs `do_sample=True`"):
        model.generate(given, known, num_resamples=2, do_sample=False)
    for value, error in ((0, ValueError), (2.0, TypeError), (True, TypeError)):
        with pytest.raises(error, match="`num_resamples` must be"):
            PixelCNNGenerationConfig(num_resamples=value)
