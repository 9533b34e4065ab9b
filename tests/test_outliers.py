"""training/outliers.py: scores against formulas, AUROC against all pairs."""

import itertools
import json
import math

import datasets
import numpy as np
import outliers
import pytest
import torch
from conftest import DIGITS, build_model, one_line_error, strengthen_classes
from PIL import Image

from hf_pixelcnn import PixelCNNImageProcessor, training

pytestmark = pytest.mark.slow

SMALL = {"image_size": 8, "num_levels": 4}


def test_auroc_is_the_share_of_pairs_in_the_right_order():
    generator = np.random.default_rng(0)
    inside, outside = generator.integers(6, size=40).astype(float), generator.integers(2, 9, size=30).astype(float)
    pairs = [1.0 * (b > a) + 0.5 * (a == b) for a, b in itertools.product(inside, outside)]
    assert outliers.auroc(inside, outside) == pytest.approx(np.mean(pairs))
    assert outliers.auroc(inside, inside) == 0.5
    assert outliers.auroc(np.array([1.0, 2.0]), np.array([3.0, 4.0, 5.0])) == 1
    assert outliers.auroc(np.array([3.0]), np.array([1.0])) == 0


def test_the_shortest_file_is_lossless_and_longer_for_noise_than_for_a_plain_picture():
    noise = np.random.default_rng(0).integers(256, size=(28, 28, 3), dtype=np.uint8)
    images = [Image.new("L", (28, 28), 7), Image.fromarray(noise[..., 0]), Image.fromarray(noise)]
    plain, grey, colour = map(outliers.shortest_bits, images)
    assert plain < 1000
    assert 28 * 28 * 8 < grey < 1.3 * 28 * 28 * 8
    assert 28 * 28 * 24 < colour < 1.3 * 28 * 28 * 24
    for name, options in outliers.LOSSLESS.items():
        for image in images:
            file = outliers.io.BytesIO()
            image.save(file, name, **options)
            assert np.array_equal(np.asarray(Image.open(file).convert(image.mode)), np.asarray(image)), name


@pytest.fixture
def shades(tmp_path):
    """Plain pictures of 8×8, as a data set."""
    images = [Image.fromarray(np.full((8, 8), shade, dtype=np.uint8)) for shade in range(0, 250, 25)]
    rows = datasets.Dataset.from_dict({"image": images}, datasets.Features({"image": datasets.Image()}))
    rows.save_to_disk(tmp_path / "shades")
    return str(tmp_path / "shades")


def saved(folder, **config):
    model = strengthen_classes(build_model("gated_pixelcnn", **{**SMALL, **config}))
    model.save_pretrained(folder)
    PixelCNNImageProcessor(num_levels=4, size=8).save_pretrained(folder)
    return model


def run(tmp_path, shades, model, *words):
    output = tmp_path / "outliers.json"
    given = ["--model", model, "--in_dataset", DIGITS, "--in_split", "test[:20]", "--typical_split", "train[:30]"]
    given += ["--out_dataset", shades, "--out_split", "train", "--cache_dir", tmp_path / "cache", "--device", "cpu"]
    outliers.main([str(word) for word in [*given, "--batch_size", 7, "--output", output, *words]])
    return json.loads(output.read_text())


@pytest.mark.parametrize("num_classes", [0, 3])
def test_scores_and_auroc_are_those_of_the_formulas(tmp_path, shades, capsys, num_classes):
    model = saved(tmp_path / "model", num_classes=num_classes)
    background = saved(tmp_path / "background", seed=1)
    results = run(tmp_path, shades, tmp_path / "model", "--background", tmp_path / "background")
    processor = PixelCNNImageProcessor(num_levels=4, size=8)

    def levels(dataset, split):
        rows = training.load_split(dataset, split, cache_dir=str(tmp_path / "cache"))
        return processor([row["image"] for row in rows], return_tensors="pt")["pixel_values"]

    def nats(model, levels):
        no_class = {"class_ids": torch.full((len(levels),), -1)} if model.config.num_classes else {}
        return -model.log_prob(levels, **no_class).double().sum((1, 2, 3)).detach().numpy()

    typical = nats(model, levels(DIGITS, "train[:30]")).mean()
    scores = []
    for dataset, split in ((DIGITS, "test[:20]"), (shades, "train")):
        x = levels(dataset, split)
        bits = np.array([outliers.shortest_bits(image) for image in processor.post_process(x)])
        own = nats(model, x)
        scores.append(
            {
                "log-likelihood": own,
                "likelihood ratio": own - nats(background, x),
                "input complexity": own / math.log(2) - bits,
                "typicality": abs(own - typical),
            }
        )
    assert results["scores"].keys() == scores[0].keys()
    printed = capsys.readouterr().out
    for name, found in results["scores"].items():
        inside, outside = scores[0][name], scores[1][name]
        assert found["mean_in"] == pytest.approx(inside.mean(), rel=1e-5, abs=1e-3)
        assert found["mean_out"] == pytest.approx(outside.mean(), rel=1e-5, abs=1e-3)
        pairs = np.mean([b > a for a, b in itertools.product(inside, outside)])
        assert found["auroc"] == pytest.approx(pairs, abs=0.01)  # float32 may tie what float64 tells apart
        assert f"{name:18} {found['auroc']:7.4f}" in printed
    assert (results["num_in"], results["num_out"]) == (20, 10)


def test_without_a_background_there_is_no_ratio(tmp_path, shades):
    saved(tmp_path / "model")
    assert "likelihood ratio" not in run(tmp_path, shades, tmp_path / "model")["scores"]


def test_what_cannot_be_compared_is_refused(tmp_path, shades):
    saved(tmp_path / "model")
    saved(tmp_path / "other", num_levels=8)
    PixelCNNImageProcessor(num_levels=8, size=8).save_pretrained(tmp_path / "other")
    saved(tmp_path / "whole")
    PixelCNNImageProcessor(num_levels=4).save_pretrained(tmp_path / "whole")
    build_model("gated_pixelcnn", **SMALL).save_pretrained(tmp_path / "codes")
    for message, model, *words in (
        ("they model other levels", "model", "--background", tmp_path / "other"),
        ("has no image processor", "codes"),
        ("are (1, 28, 28), of", "whole"),
        ("`batch_size` must be at least 1", "model", "--batch_size", 0),
        ("there is no folder", "model", "--background", tmp_path / "nothing"),
        ("cannot load split", "model", "--out_split", "night"),
    ):
        words = ["--in_dataset", DIGITS, "--out_dataset", shades, "--out_split", "train", *words]
        words += ["--in_split", "test[:3]", "--typical_split", "train[:3]", "--cache_dir", tmp_path / "cache"]
        assert message in one_line_error(outliers.main, ["--model", tmp_path / model, *words])
