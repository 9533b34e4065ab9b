"""Passes over what is open of a row draw what the naive sampler draws, whether they pay or not."""

import pytest
import torch
from conftest import FAMILIES, VARIANTS, build_model, conditions, for_each, random_inputs, seeded
from test_sampling import RecordedOperations

from hf_pixelcnn import caching_causal_image, sampling_causal_image
from hf_pixelcnn.caching_spans_causal_image import SpanCache
from hf_pixelcnn.sampling_causal_image import PassBudget

WITH_SPANS = {
    name: (name, {})
    for name, record in FAMILIES.items()
    if issubclass(record.causal_class.sampling_cache_class, SpanCache)
}
WITH_SPANS["row_lstm"] = "pixelrnn", {"recurrence": "row_lstm"}
SETTINGS = [{}, {"temperature": 0.7, "top_k": 3}, {"top_p": 0.7, "min_p": 0.05}, {"do_sample": False}]


@pytest.fixture
def planned(monkeypatch):
    """Sets how many pixels are drawn before each pass, one number after the other; counts passes and such pixels."""
    counts = {"passes": 0, "pixels": 0}

    def plan(*pixels):
        counts.update(passes=0, pixels=0)

        class Planned(PassBudget):
            def pixels_before_pass(self, columns):
                self.at = (getattr(self, "at", -1) + 1) % len(pixels)
                return min(columns, pixels[self.at])

            def count_pixels(self, columns):
                counts["pixels"] += columns

            def count_pass(self, computed, drawn):
                counts["passes"] += 1

        monkeypatch.setattr(sampling_causal_image, "PassBudget", Planned)
        return counts

    return plan


def model_with_spans(name, **config):
    family, settings = WITH_SPANS[name]
    return build_model(family, **settings, **config)


def requests(model):
    """What can be asked of a model, as arguments of `generate`."""
    yield from ({"num_images": 3, **conditions(model, 3), **settings} for settings in SETTINGS)
    if model.config.num_classes:
        yield {"class_ids": [1, 0], "guidance_scale": 2.0}
        yield {"class_ids": [1, 0], "guidance_scale": 1.5, "top_k": 2}
    given = random_inputs(model, batch=3)
    given["known_mask"] = torch.rand(given["pixel_values"].shape, generator=seeded(3)) < 0.4
    given["known_mask"][:, :, 1] = True
    yield given
    yield {**given, "num_resamples": 3}


@pytest.mark.slow
@pytest.mark.parametrize("family", WITH_SPANS)
@pytest.mark.parametrize("variant", VARIANTS.values(), ids=VARIANTS)
def test_spans_draw_the_images_of_the_naive_sampler(family, variant, planned):
    model = model_with_spans(family, **variant, image_size=[3, 10]).double()
    for number, request in enumerate(requests(model)):
        counts = planned(10)
        expected = model.generate(**request, generator=seeded(1))  # pixel by pixel
        assert counts["passes"] == 0
        if number == 0:  # the others differ in what is made of the same parameters
            assert torch.equal(model.generate(**request, generator=seeded(1), sampler="naive"), expected)
        for plan in [(0,), (2, 0), (0, 0, 1, 0, 3)]:
            counts = planned(*plan)
            assert torch.equal(model.generate(**request, generator=seeded(1)), expected), (request, plan)
            assert counts["passes"] > 0
            assert (counts["pixels"] > 0) == (plan != (0,))


@pytest.mark.parametrize("family", WITH_SPANS)
def test_spans_at_the_edges_of_the_configuration(family, planned):
    planned(0)
    for config in [
        {"num_hidden_layers": 1},
        {"kernel_size": 1, "num_channels": 3, "num_levels": 3},
        {"num_head_layers": 0, "num_channels": 2},
        {"first_kernel_size": 9, "kernel_size": 7, "image_size": [3, 4], "num_classes": 2},
        {"image_size": [1, 9]},
        {"image_size": [7, 1], "num_channels": 3},
    ]:
        model = model_with_spans(family, **config).double()
        for batch in (1, 2):
            request = {"num_images": batch, **conditions(model, batch)}
            naive, cached = (model.generate(**request, generator=seeded(), sampler=s) for s in ("naive", "cached"))
            assert torch.equal(naive, cached), config


@pytest.mark.parametrize("family", WITH_SPANS)
@for_each("variant", VARIANTS)
def test_a_span_gives_the_parameters_of_the_forward_pass(family, variant):
    model = model_with_spans(family, **variant, image_size=[3, 9]).double()
    inputs = random_inputs(model, batch=2)
    pixels = model.output_distribution.pixels(model(**inputs).logits)  # (batch, height, width, ...)
    with torch.inference_mode():
        cache = model.sampling_cache_class(model, 2, 3, 9, inputs.get("class_ids"))
        levels = inputs["pixel_values"].permute(0, 2, 3, 1).flatten(2)  # (batch, height, dims of a row)
        for row in range(3):
            cache.start_row(row)
            cache.observe_rest(0, levels[:, row])
            for start in (0, 5):
                torch.testing.assert_close(cache.parameters_from(start), pixels[:, row, start:], rtol=0, atol=1e-11)


@pytest.mark.parametrize("family", WITH_SPANS)
def test_a_pass_is_recorded_once_and_replayed(family, planned, monkeypatch):
    recordings = []
    capture = lambda device: recordings.append(RecordedOperations()) or recordings[-1]  # noqa: E731
    for config in ({"num_levels": 5, "num_classes": 2}, {"num_channels": 3}):
        model = model_with_spans(family, **config, image_size=[5, 6]).double()

        def draw(seed, *plan, model=model, **settings):
            planned(*plan)
            return model.generate(num_images=2, **conditions(model, 2), **settings, generator=seeded(seed))

        expected = {seed: (draw(seed, 6), draw(seed, 6, top_k=2)) for seed in (0, 1)}  # pixel by pixel, not recorded
        monkeypatch.setitem(caching_causal_image.CAPTURES, "cpu", capture)
        for seed, (images, of_two) in expected.items():  # the second request replays what the first one has recorded
            assert torch.equal(draw(seed, 0), images)
            assert torch.equal(draw(seed, 0, 2), images)
            assert torch.equal(draw(seed, 0, top_k=2), of_two)
        monkeypatch.delitem(caching_causal_image.CAPTURES, "cpu")
        replays = caching_causal_image.kept_caches[model].popitem()[1].replays
        keys = {key[:-1] for key in replays if "row" not in key}  # without the phase
        assert keys == {("rest", 0), ("parameters", 0), ("draw", 0, 6)}  # of one shape each


def test_broken_probabilities_end_passes_too(planned):
    model = build_model("pixelcnn", num_channels=3)
    model.head.layers[-1].bias.data.fill_(torch.nan)
    planned(0)
    with pytest.raises(ValueError, match="not finite"):
        model.generate(num_images=2)


class Costs:
    """What a cache says of passes over rows of 28 pixels."""

    height = width = 28

    def __init__(self, fixed, per_column):
        self.pass_cost = lambda columns: fixed + per_column * columns


def spent(cache, drawn_by_pass):
    """Steps of a pixel that an image takes, `drawn_by_pass` of `(row, open columns)` being what a pass draws."""
    budget, steps = PassBudget(cache), 0.0
    for row in range(cache.height):
        columns = cache.width
        while columns:
            if pixels := budget.pixels_before_pass(columns):
                budget.count_pixels(pixels)
                columns, steps = columns - pixels, steps + pixels
            else:
                drawn = min(columns, drawn_by_pass(row, columns))
                budget.count_pass(columns, drawn)
                columns, steps = columns - drawn, steps + cache.pass_cost(columns)
    return steps


def test_passes_gain_where_they_can_and_never_lose_more_than_a_few_pixels_in_a_hundred():
    for costs in (Costs(1.8, 0.01), Costs(1.8, 0.15), Costs(1.8, 0.5), Costs(2, 2), Costs(20, 0.01)):
        image = costs.height * costs.width
        assert spent(costs, lambda row, columns: 1) <= 1.03 * image
        assert spent(costs, lambda row, columns: 1 if row % 2 else columns) <= 1.03 * image
    assert spent(Costs(1.8, 0.01), lambda row, columns: columns) < 28 * 2.2
    halves = spent(Costs(1.8, 0.01), lambda row, columns: 1 if row < 14 else columns)
    assert halves < 0.65 * 28 * 28  # there is a way back to passes
