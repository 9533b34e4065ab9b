"""`training/judge.py`: the share of samples that a classifier takes for the class they were drawn for."""

import json

import judge
import pytest
import torch
from conftest import build_model, one_line_error, strengthen_classes
from transformers import AutoModelForImageClassification

from hf_pixelcnn import PixelCNNImageProcessor

pytestmark = pytest.mark.slow

NAMES = {0: "a", 1: "b", 2: "c"}


def save(folder, **config):
    strengthen_classes(build_model("gated_pixelcnn", **config)).save_pretrained(folder)
    PixelCNNImageProcessor(num_levels=4).save_pretrained(folder)
    return folder


@pytest.fixture
def model(tmp_path):
    return save(tmp_path / "model", num_levels=4, num_classes=3, id2label=NAMES)


@torch.no_grad()
def test_the_share_is_that_of_the_classifiers_answers(model, tmp_path):
    other = save(tmp_path / "other", num_levels=4, num_classes=3, id2label={0: "c", 1: "a", 2: "b"})
    words = ["--num_images", "20", "--batch_size", "7", "--device", "cpu", "--output", str(tmp_path / "out.json")]
    for classifier, order in ((model, [0, 1, 2]), (other, [1, 2, 0])):  # the same weights, other names
        judge.main(["--model", str(model), "--classifier", str(classifier), *words])
        found = json.loads((tmp_path / "out.json").read_text())
        drawn = AutoModelForImageClassification.from_pretrained(classifier)
        classes = torch.arange(20) % 3
        levels = build_levels(model, classes)
        expected = (drawn(levels).logits.argmax(-1) == torch.tensor(order)[classes]).double().mean().item()
        assert found["share_of_samples_taken_for_their_class"] == pytest.approx(expected)
    assert 0 < expected < 1


def build_levels(folder, classes):
    from transformers import AutoModel

    model = AutoModel.from_pretrained(folder)
    return model.generate(class_ids=classes, generator=torch.Generator().manual_seed(0))


def test_models_that_do_not_go_together_are_refused(model, tmp_path):
    foreign = save(tmp_path / "foreign", num_levels=4, num_classes=3, id2label=NAMES)
    PixelCNNImageProcessor(num_levels=256).save_pretrained(foreign)
    plain = save(tmp_path / "plain", num_levels=4)
    more = save(tmp_path / "more", num_levels=4, num_classes=4)
    for words, text in (
        (["--model", model, "--classifier", foreign], "has `num_levels` 256, but the model has 4"),
        (["--model", model, "--classifier", more], "must have the same classes"),
        (["--model", model, "--classifier", plain], "cannot load a classifier"),
        (["--model", plain, "--classifier", model], "must have the same classes"),
    ):
        assert text in one_line_error(judge.main, words)
