"""Likelihoods and samples of the published models do not move; tests/write_golden.py wrote what they are."""

import re

import pytest
import torch
from conftest import for_each
from safetensors.torch import load_file
from write_golden import BAND, GOLDEN, MODELS, digit_nats, likelihood, load, sample

import hf_pixelcnn
from hf_pixelcnn.compressed_stream import read_stream
from hf_pixelcnn.compression import identity

# Largest differences of single log-probabilities and parameters, and of the mean log-probability, in nats.
TOLERANCES = {torch.float64: (1e-9, 1e-11), torch.float32: (1e-3, 1e-5), torch.bfloat16: (4.0, 0.03)}


@pytest.fixture(params=MODELS)
def golden(request):
    return request.param, load_file(GOLDEN / f"{request.param}.safetensors")


def test_every_published_model_has_golden_numbers():
    assert sorted(path.stem for path in GOLDEN.glob("*.safetensors") if not path.stem.startswith("images_")) == MODELS


@for_each("dtype", list(TOLERANCES))
def test_logits_and_likelihoods_are_golden(golden, dtype):
    name, expected = golden
    model, _ = load(name, dtype)
    found = likelihood(model, expected["pixel_values"].long(), expected["class_ids"].long())
    single, mean = TOLERANCES[dtype]
    for key in ("log_prob", "logits"):
        torch.testing.assert_close(found[key].double(), expected[key], rtol=0, atol=single)
    assert found["log_prob"].double().mean().item() == pytest.approx(expected["log_prob"].mean().item(), abs=mean)


@pytest.mark.slow
def test_nats_of_bundled_digits_are_golden(golden):
    name, expected = golden
    if "digit_nats" not in expected:
        pytest.skip("not a model of digits")
    torch.testing.assert_close(digit_nats(*load(name, torch.float32)), expected["digit_nats"], rtol=1e-6, atol=0)


def test_a_seeded_sample_is_golden(golden):
    name, expected = golden
    assert torch.equal(sample(load(name)[0]), expected["sample"].long())


def test_streams_stay_readable_where_the_probabilities_are_the_same(golden):
    """Elsewhere, on another processor or with another torch, they are refused for a reason that is told."""
    name, expected = golden
    data = bytes(expected["stream"].numpy())
    header = read_stream(data).header
    model, _ = load(name, torch.float32)
    here = identity(model)
    assert (header.config, header.weights) == (here["config"], here["weights"])
    try:
        levels = hf_pixelcnn.decompress(model, data)
    except hf_pixelcnn.CompressedStreamError as error:
        assert re.search("it was made |computes other probabilities here", str(error))  # noqa: PT017
    else:
        assert torch.equal(levels, expected["pixel_values"][:2, :, BAND].long())
