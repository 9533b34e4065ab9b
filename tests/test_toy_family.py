"""A family is a configuration and a network: everything else, its default sampling cache included, comes by itself."""

import contextlib
import math
import os
import subprocess
import sys

import pytest
import torch
from conftest import ROOT, SAMPLERS, for_each, random_inputs, seeded
from modeling_toy import FAMILY, ToyConfig, ToyForCausalImageModeling, ToyForImageClassification
from transformers import AutoConfig, AutoModel, AutoModelForImageClassification, pipeline
from transformers.models.auto import configuration_auto, image_processing_auto, modeling_auto

import hf_pixelcnn
from hf_pixelcnn import PixelCNNImageProcessor, compress, decompress, receptive_field

pytestmark = pytest.mark.versions


@contextlib.contextmanager
def registration():
    hf_pixelcnn.register_family(FAMILY)
    try:
        yield
    finally:
        del hf_pixelcnn.FAMILIES["toy"]
        configuration_auto.CONFIG_MAPPING._extra_content.pop("toy")
        for mapping in (
            modeling_auto.MODEL_MAPPING,
            modeling_auto.MODEL_FOR_IMAGE_CLASSIFICATION_MAPPING,
            image_processing_auto.IMAGE_PROCESSOR_MAPPING,
        ):
            mapping._extra_content.pop(ToyConfig)
        for own_class in (ToyConfig, ToyForCausalImageModeling, ToyForImageClassification):
            own_class._auto_class = None


@pytest.fixture
def registered():
    with registration():
        yield


def toy(seed=0, **config):
    torch.manual_seed(seed)
    sizes = {"image_size": [5, 6], "hidden_size": 12, "head_hidden_size": 6}
    model = ToyForCausalImageModeling(ToyConfig(**{**sizes, **config})).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(1.5).add_(0.05 * torch.randn_like(parameter))
    return model


KINDS = [
    {},
    {"num_levels": 5, "num_classes": 3},
    {"num_channels": 3, "num_levels": 4},
    {"num_channels": 3, "num_levels": 9, "output_distribution": "logistic_mixture", "num_logistic_mix": 3},
]


@for_each("config", KINDS)
def test_all_samplers_draw_the_same_images_and_the_codec_gives_them_back(config):
    model = toy(**config).double()
    condition = {"class_ids": [0, 2, -1]} if model.config.num_classes else {}
    drawn = [model.generate(num_images=3, generator=seeded(), sampler=s, **condition) for s in SAMPLERS]
    assert torch.equal(drawn[0], drawn[1])
    assert torch.equal(drawn[0], drawn[2])
    assert drawn[0].unique().numel() > 1
    pytest.importorskip("constriction")
    assert torch.equal(decompress(model, compress(model, drawn[0], **condition)), drawn[0])


@for_each("config", KINDS)
def test_its_likelihoods_sum_to_one(config):
    model = toy(**config, image_size=1 if config.get("num_channels") else 2).double()
    shape = (model.config.num_channels, *model.config.image_size)
    images = torch.cartesian_prod(*[torch.arange(model.config.num_levels)] * math.prod(shape)).view(-1, *shape)
    for class_id in range(model.config.num_classes) or [None]:
        class_ids = None if class_id is None else torch.full((len(images),), class_id)
        log_prob = model.log_prob(images, class_ids=class_ids)
        assert log_prob.sum((1, 2, 3)).exp().sum().item() == pytest.approx(1)


def test_its_receptive_field_has_a_blind_spot():
    model = toy(image_size=8).double()
    field = receptive_field(model, row=5, column=3)[0]
    # Three layers of reach 1, and a path upwards moves at most one column to the right per row.
    assert field.sum(1).tolist() == [0, 0, 7, 6, 5, 3, 0, 0]
    assert field.cummin(1).values.equal(field)  # from the left edge on
    assert model.model.first_row_seen(7) == 0  # what a family does not say is not taken for granted


def test_it_is_trained_saved_and_loaded_by_the_projects_own_means(registered, tmp_path):
    from hf_pixelcnn.training import PixelCNNTrainer, PixelCNNTrainingArguments, load_classifier, load_model

    model = toy(num_levels=4, num_classes=3)
    levels = model.generate(class_ids=torch.arange(16) % 3, generator=seeded()).byte().numpy()
    items = [{"pixel_values": image, "class_ids": i % 3} for i, image in enumerate(levels)]
    arguments = PixelCNNTrainingArguments(
        tmp_path / "run", max_steps=2, per_device_train_batch_size=4, ema_decay=0.9, report_to=[], eval_strategy="no"
    )
    processor = PixelCNNImageProcessor(num_levels=4)
    trainer = PixelCNNTrainer(model, arguments, train_dataset=items, eval_dataset=items, processing_class=processor)
    before = trainer.evaluate()["eval_loss"]
    trainer.train()
    assert trainer.evaluate()["eval_loss"] != before
    trainer.save_model()
    folder = str(tmp_path / "run")
    loaded, found = load_model(folder)
    assert isinstance(loaded, ToyForCausalImageModeling)
    assert isinstance(AutoConfig.from_pretrained(folder), ToyConfig)
    assert found.num_levels == 4
    with trainer.averaged_weights():
        inputs = random_inputs(loaded)
        torch.testing.assert_close(loaded(**inputs).logits, model.eval()(**inputs).logits)
    images = pipeline("unconditional-image-generation", model=folder)(class_ids=[0, 1], generator=seeded()).images
    assert [image.size for image in images] == [(6, 5)] * 2
    classifier = load_classifier(folder)
    assert isinstance(classifier, ToyForImageClassification)
    by_class = [loaded.log_prob(inputs["pixel_values"], class_ids=torch.full((2,), c)).sum((1, 2, 3)) for c in range(3)]
    expected = torch.stack(by_class, 1).log_softmax(1)
    torch.testing.assert_close(classifier(inputs["pixel_values"]).logits.log_softmax(1), expected)


@pytest.mark.slow
def test_its_saved_folder_carries_its_file_and_loads_where_nobody_registered_it(registered, tmp_path):
    model = toy(num_classes=2)
    inputs = random_inputs(model)
    model.save_pretrained(tmp_path / "model")
    assert (tmp_path / "model" / "modeling_toy.py").is_file()
    torch.save((inputs, model(**inputs).logits.detach()), tmp_path / "expected.pt")
    code = (
        "import torch, transformers\n"
        "inputs, logits = torch.load('expected.pt')\n"
        "for auto_class in (transformers.AutoModel, transformers.AutoModelForImageClassification):\n"
        "    model = auto_class.from_pretrained('model', trust_remote_code=True)\n"
        "    print(type(model).__name__)\n"
        "    if model.can_generate():\n"
        "        assert torch.equal(model(**inputs).logits, logits)\n"
    )
    environment = {**os.environ, "HF_HOME": str(tmp_path), "PYTHONPATH": str(ROOT)}
    child = subprocess.run([sys.executable, "-c", code], cwd=tmp_path, env=environment, capture_output=True, text=True)
    assert child.stdout.split() == ["ToyForCausalImageModeling", "ToyForImageClassification"], child.stderr[-2000:]


def test_without_registration_its_own_classes_load_it_and_the_auto_classes_ask_for_trust(tmp_path):
    model = toy(num_classes=2)
    with registration():
        model.save_pretrained(tmp_path)
    loaded = ToyForCausalImageModeling.from_pretrained(tmp_path)
    inputs = random_inputs(model)
    assert torch.equal(loaded(**inputs).logits, model(**inputs).logits)
    assert "toy" not in hf_pixelcnn.FAMILIES
    for auto_class in (AutoModel, AutoModelForImageClassification):
        with pytest.raises(ValueError, match="trust_remote_code=True"):
            auto_class.from_pretrained(tmp_path, trust_remote_code=False)
