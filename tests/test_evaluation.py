"""training/score.py: tables, spreads, calibration and pictures that say what they claim."""

import json
import math

import numpy as np
import pytest
import score
import torch
from conftest import DIGITS, classy_model, one_line_error
from PIL import Image
from transformers import AutoModelForImageClassification

from hf_pixelcnn import PixelCNNImageProcessor, training
from hf_pixelcnn.training import calibration_error, classification_metrics

pytestmark = pytest.mark.slow

SMALL = {"image_size": 8, "num_classes": 10, "id2label": {i: str(i) for i in range(10)}}


@pytest.fixture
def cache(tmp_path):
    return str(tmp_path / "cache")


def saved(folder, processor, **config):
    model = classy_model("gated_pixelcnn", **{**SMALL, **config})
    model.float().save_pretrained(folder)
    processor.save_pretrained(folder)
    return model.double()


def evaluate(model, cache, *words):
    """The results of a run on 40 test digits, in float64."""
    output = f"{cache}.json"
    given = [
        "--model",
        str(model),
        "--dataset",
        DIGITS,
        "--split",
        "test[:40]",
        "--cache_dir",
        cache,
        "--device",
        "cpu",
    ]
    score.main([*given, "--dtype", "float64", "--output", output, *map(str, words)])
    with open(output, encoding="utf-8") as file:
        return json.load(file)


def digits(processor, cache):
    rows = training.load_split(DIGITS, "test[:40]", cache_dir=cache)
    return processor([row["image"] for row in rows], return_tensors="pt")["pixel_values"], torch.tensor(rows["label"])


@pytest.mark.parametrize("is_conditional", [True, False])
def test_scores_by_class_are_those_of_its_images(tmp_path, cache, is_conditional, capsys):
    processor = PixelCNNImageProcessor(num_levels=2, binarization="threshold", size=8)
    config = {} if is_conditional else {"num_classes": 0, "id2label": None}
    model = saved(tmp_path / "model", processor, **config)
    results = evaluate(tmp_path / "model", cache, "--per_class", "true", "--batch_size", "7")
    levels, labels = digits(processor, cache)
    class_ids = {"class_ids": labels} if is_conditional else {}
    nats = -model.log_prob(levels, **class_ids).sum((1, 2, 3)).detach()
    assert results["nats_per_image"] == pytest.approx(nats.mean().item())
    occurring = labels.unique().tolist()
    assert len(occurring) == 9  # a class without images has no row
    assert [row["class"] for row in results["per_class"]] == [str(digit) for digit in occurring]
    printed = capsys.readouterr().out
    for digit, row in zip(occurring, results["per_class"], strict=True):
        own = nats[labels == digit]
        assert row["num_images"] == len(own)
        assert row["nats_per_image"] == pytest.approx(own.mean().item())
        assert row["bits_per_dim"] == pytest.approx(own.mean().item() / 64 / math.log(2))
        assert f"{row['nats_per_image']:.3f}" in printed


def test_several_draws_of_a_binarisation_have_a_mean_and_a_spread(tmp_path, cache):
    processor = PixelCNNImageProcessor(num_levels=2, binarization="stochastic", size=8)
    model = saved(tmp_path / "model", processor)
    results = evaluate(tmp_path / "model", cache, "--num_binarizations", "3", "--seed", "5")
    rows = training.load_split(DIGITS, "test[:40]", cache_dir=cache)
    images = training.LevelDataset(rows, 2, processor, with_classes=True, seed=5)
    totals = []
    for epoch in range(3):
        images.set_epoch(epoch)
        batch = training.collate_levels([images[i] for i in range(40)])
        totals.append(-model.log_prob(batch["labels"], class_ids=batch["class_ids"]).sum().item())
    assert len(set(totals)) == 3
    assert results["nats_per_image"] == pytest.approx(np.mean(totals) / 40)
    assert results["std_of_binarizations"]["nats_per_image"] == pytest.approx(np.std(totals, ddof=1) / 40)
    assert results["std_of_binarizations"]["bits_per_dim"] == pytest.approx(np.std(totals, ddof=1) / 2560 / math.log(2))


def test_a_classifier_is_judged_by_its_own_probabilities(tmp_path, cache):
    processor = PixelCNNImageProcessor(num_levels=2, binarization="threshold", size=8)
    saved(tmp_path / "model", processor)
    results = evaluate(tmp_path / "model", cache, "--classify", "true", "--class_temperature", "2.0", "--batch_size", 9)
    levels, labels = digits(processor, cache)
    classifier = AutoModelForImageClassification.from_pretrained(tmp_path / "model", class_temperature=2.0).double()
    probabilities = classifier(levels).logits.softmax(-1)
    found = results["classification"]
    assert found["accuracy"] == (probabilities.argmax(1) == labels).double().mean().item()
    assert found["cross_entropy"] == pytest.approx(-probabilities[range(40), labels].log().mean().item())
    assert found["expected_calibration_error"] == pytest.approx(calibration_error(probabilities, labels))


def test_calibration_error_is_the_gap_between_confidence_and_accuracy_bin_by_bin():
    confidence = torch.tensor([0.95, 0.97, 0.62, 0.64, 0.63, 1.0], dtype=torch.float64)
    probabilities = torch.stack((confidence, 1 - confidence), dim=1)
    labels = torch.tensor([0, 1, 0, 1, 1, 0])
    # bins (0.6, 0.667]: 0.62, 0.64, 0.63, one right; (0.933, 1]: 0.95, 0.97, 1.0, two right
    expected = 3 / 6 * abs(1 / 3 - 0.63) + 3 / 6 * abs(2 / 3 - 2.92 / 3)
    assert calibration_error(probabilities, labels) == pytest.approx(expected)
    assert calibration_error(probabilities, probabilities.argmax(1)) == pytest.approx(1 - confidence.mean().item())
    metrics = classification_metrics(probabilities, labels)
    assert metrics["accuracy"] == 0.5
    right = [0.95, 0.03, 0.62, 0.36, 0.37, 1.0]
    assert metrics["cross_entropy"] == pytest.approx(-np.mean(np.log(right)))


def test_heat_maps_show_the_nats_of_every_pixel_beside_its_image(tmp_path, cache, monkeypatch):
    processor = PixelCNNImageProcessor(num_levels=4, num_channels=3, size=8)
    model = saved(tmp_path / "model", processor, num_levels=4, num_channels=3)
    evaluate(tmp_path / "model", cache, "--heat_map", tmp_path / "heat.png", "--num_heat_maps", 5)
    assert Image.open(tmp_path / "heat.png").width >= 480
    seen = []
    monkeypatch.setattr(score, "draw_heat_maps", lambda *arguments: seen.extend(arguments))
    evaluate(tmp_path / "model", cache, "--heat_map", tmp_path / "heat.png", "--num_heat_maps", 5)
    images, nats, num_channels, _ = seen
    assert num_channels == 3
    levels, labels = digits(processor, cache)
    surprise = -model.log_prob(levels, class_ids=labels).sum(1)
    order = surprise.sum((1, 2)).argsort()
    chosen = order[[round(i * (len(order) - 1) / 4) for i in range(5)]]  # the least, the most, and three between
    torch.testing.assert_close(nats, surprise[chosen].float())
    expected = processor.post_process(levels[chosen])
    assert [np.asarray(x).tolist() for x in images] == [np.asarray(x).tolist() for x in expected]


def test_requests_that_mean_nothing_are_refused(tmp_path, cache):
    processor = PixelCNNImageProcessor(num_levels=2, binarization="threshold", size=8)
    saved(tmp_path / "model", processor, num_classes=0, id2label=None)
    words = ["--model", tmp_path / "model", "--dataset", DIGITS, "--split", "test[:4]", "--cache_dir", cache]
    for message, more in {
        "`num_binarizations` must be at least 1, got 0": ["--num_binarizations", 0],
        "each draw would be the same": ["--num_binarizations", 2],
        "needs a class-conditional model, but `num_classes` is 0": ["--classify", "true"],
        "--class_temperature needs --classify true": ["--class_temperature", 2],
        "`batch_size` must be at least 1": ["--batch_size", 0],
        "`class_temperature` must be a finite number above 0": ["--classify", "true", "--class_temperature", 0],
        "cannot write": ["--heat_map", tmp_path / "heat.xyz"],
    }.items():
        assert message in one_line_error(score.main, [*words, *more])
