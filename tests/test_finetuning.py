"""A trained model is the start of another one: other images, fewer free weights, other classes, another size."""

import logging

import pytest
import torch
from test_training import DIGITS, gated_model, trainer_for
from transformers import AutoModel

from hf_pixelcnn import PixelCNNImageProcessor
from hf_pixelcnn.training import LevelDataset, load_split

pytestmark = pytest.mark.slow


def digits(split, cache, size=8, **options):
    rows = load_split(DIGITS, split, cache_dir=str(cache))
    processor = PixelCNNImageProcessor(num_levels=2, binarization="threshold", size=size)
    return LevelDataset(rows, 2, processor, with_classes=True, **options)


@pytest.fixture(scope="module")
def cache(tmp_path_factory):
    return tmp_path_factory.mktemp("cache")


@pytest.fixture(scope="module")
def pretrained(tmp_path_factory, cache):
    """Folder of a class-conditional model that has seen a few digits of 8×8."""
    folder = tmp_path_factory.mktemp("pretrained")
    model = gated_model(image_size=8, num_levels=2, num_classes=10, hidden_size=16, head_hidden_size=16)
    trainer_for(folder, model, digits("train[:128]", cache), per_device_train_batch_size=16, max_steps=24).train()
    model.save_pretrained(folder)
    return folder


class Changed(torch.utils.data.Dataset):
    """Images with other levels or classes."""

    def __init__(self, images, change):
        self.images, self.change = images, change

    def __len__(self):
        return len(self.images)

    def __getitem__(self, index):
        return self.change(self.images[index])


def negative(item):
    return item | {"pixel_values": 1 - item["pixel_values"]}


def odd_or_even(item):
    return item | {"class_ids": item["class_ids"] % 2}


def losses_before_and_after(folder, model, images, **options):
    options = {"per_device_train_batch_size": 16, "learning_rate": 0.003, **options}
    trainer = trainer_for(folder, model, images, eval_images=images, **options)
    before = trainer.evaluate()["eval_loss"]
    trainer.train()
    return before, trainer.evaluate()["eval_loss"]


def test_other_data_are_learnt_faster_from_a_trained_model(pretrained, cache, tmp_path):
    images = digits("train[128:256]", cache)
    before, after = losses_before_and_after(tmp_path, AutoModel.from_pretrained(pretrained), images, max_steps=8)
    new = gated_model(image_size=8, num_levels=2, num_classes=10, hidden_size=16, head_hidden_size=16)
    assert after < before
    assert after < losses_before_and_after(tmp_path, new, images, max_steps=8)[1]
    before, after = losses_before_and_after(
        tmp_path, AutoModel.from_pretrained(pretrained), Changed(images, negative), max_steps=8, learning_rate=0.02
    )
    assert after < 0.8 * before


def test_frozen_weights_stay_while_the_others_learn(pretrained, cache, tmp_path):
    model = AutoModel.from_pretrained(pretrained)
    model.model.requires_grad_(False)
    start = {name: parameter.detach().clone() for name, parameter in model.named_parameters()}
    images = Changed(digits("train[128:192]", cache), negative)
    before, after = losses_before_and_after(tmp_path, model, images, max_steps=6, ema_decay=0.1, learning_rate=0.02)
    assert after < 0.8 * before
    for name, parameter in model.named_parameters():
        assert torch.equal(parameter, start[name]) == name.startswith("model."), name


def test_another_number_of_classes_keeps_all_but_the_class_vectors_and_says_so(pretrained, cache, tmp_path, caplog):
    with pytest.raises(ValueError, match="ignore_mismatched_sizes"):
        AutoModel.from_pretrained(pretrained, num_classes=2)
    with caplog.at_level(logging.WARNING):
        model, report = AutoModel.from_pretrained(
            pretrained, num_classes=2, ignore_mismatched_sizes=True, output_loading_info=True
        )
    vectors = {f"model.layers.{i}.class_embedding.weight" for i in range(2)}
    assert {name for name, *_ in report["mismatched_keys"]} == vectors
    assert not report["missing_keys"]
    assert not report["unexpected_keys"]
    assert "class_embedding.weight" in caplog.text
    assert "torch.Size([10, 32]) vs model:torch.Size([2, 32])" in caplog.text
    assert model.config.id2label == {0: "LABEL_0", 1: "LABEL_1"}
    old = AutoModel.from_pretrained(pretrained).state_dict()
    assert all(torch.equal(value, old[name]) for name, value in model.state_dict().items() if name not in vectors)
    images = Changed(digits("train[:64]", cache), odd_or_even)
    before, after = losses_before_and_after(tmp_path, model, images, max_steps=6)
    assert after < before
    model.save_pretrained(tmp_path / "two")
    assert AutoModel.from_pretrained(tmp_path / "two").config.num_classes == 2


def test_leaving_the_classes_out_names_the_weights_that_are_not_used(pretrained):
    with pytest.raises(OSError, match=r"hold 2 tensors .*class_embedding.weight: .*`ignore_mismatched_sizes=True`"):
        AutoModel.from_pretrained(pretrained, num_classes=0)
    _, report = AutoModel.from_pretrained(
        pretrained, num_classes=0, ignore_mismatched_sizes=True, output_loading_info=True
    )
    assert report["unexpected_keys"] == {f"model.layers.{i}.class_embedding.weight" for i in range(2)}


def test_a_model_of_28_pixels_learns_32(cache, tmp_path):
    start = gated_model(image_size=28, num_levels=2, num_classes=10)
    small = digits("train[:32]", cache, size=28)
    trainer_for(tmp_path, start, small, per_device_train_batch_size=16, max_steps=8).train()
    start.save_pretrained(tmp_path / "28")
    model = AutoModel.from_pretrained(tmp_path / "28", image_size=32)
    before, after = losses_before_and_after(tmp_path, model, digits("train[:32]", cache, size=32), max_steps=6)
    assert after < before < 0.6  # what was learnt helps: ln 2 is chance
    model.save_pretrained(tmp_path / "32")
    assert AutoModel.from_pretrained(tmp_path / "32").generate(class_ids=[3]).shape == (1, 1, 32, 32)
