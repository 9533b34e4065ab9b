"""Classification by Bayes' rule: the logits are the joint log-probabilities of image and class."""

import itertools
import json
import math
import re

import numpy as np
import pytest
import torch
from benchmark import peak_bytes
from conftest import FAMILIES, build_model, classy_model, for_each, random_inputs, small_config
from huggingface_hub.errors import StrictDataclassError
from PIL import Image
from transformers import AutoModel, AutoModelForImageClassification, Trainer, TrainingArguments, pipeline

from hf_pixelcnn import PixelCNNImageProcessor, classification_causal_image

CONFIGS = {
    "grey_categorical": {"num_levels": 5, "num_classes": 3},
    "colour_bernoulli": {"num_channels": 3, "num_classes": 2},
    "colour_codes": {"num_channels": 3, "num_levels": 4, "num_classes": 4, "input_encoding": "embedding"},
    "colour_mixture": {
        "num_channels": 3,
        "num_levels": 6,
        "num_classes": 2,
        "output_distribution": "logistic_mixture",
    },
}


def classifier_of(model, **fields):
    """The classifier with the weights of a causal model, and other fields of its config."""
    config = type(model.config)(**{**model.config.to_dict(), **fields})
    classifier = FAMILIES[config.model_type].classifier_class(config).to(model.dtype).eval()
    missing, unexpected = classifier.load_state_dict(model.state_dict(), strict=False)
    assert not unexpected
    assert missing == (["class_prior.logits"] if config.class_prior == "learned" else [])
    return classifier


def log_likelihoods(model, pixel_values):
    """log p(x | c), `(batch, num_classes)`, by the causal model."""
    ids = [torch.full((len(pixel_values),), c) for c in range(model.config.num_classes)]
    return torch.stack([model.log_prob(pixel_values, class_ids=c).sum((1, 2, 3)) for c in ids], dim=1)


@for_each("config", CONFIGS)
def test_logits_are_log_likelihoods_plus_log_prior_over_temperature(family, config):
    model = classy_model(family, **config)
    pixel_values = random_inputs(model, batch=3)["pixel_values"].to(torch.uint8)
    num_classes = model.config.num_classes
    expected = log_likelihoods(model, pixel_values)
    assert expected.std(dim=1).min() > 0.01  # the classes differ
    output = classifier_of(model)(pixel_values)
    assert output.loss is None
    torch.testing.assert_close(output.logits, expected - math.log(num_classes))
    prior = torch.arange(1, num_classes + 1).double() / sum(range(num_classes + 1))
    scaled = classifier_of(model, class_prior=prior.tolist(), class_temperature=20)(pixel_values, return_dict=False)[0]
    torch.testing.assert_close(scaled, (expected + prior.log()) / 20, rtol=1e-6, atol=1e-6)  # the prior is float32


def test_hidden_states_are_those_of_images_without_a_class(family):
    model = classy_model(family, num_classes=3, return_dict=False)
    pixel_values = random_inputs(model, batch=3)["pixel_values"]
    expected = model(pixel_values, class_ids=torch.full((3,), -1), output_hidden_states=True, return_dict=True)
    output = classifier_of(model)(pixel_values, output_hidden_states=True, return_dict=True)
    assert len(output.hidden_states) == len(expected.hidden_states)
    assert all(map(torch.equal, output.hidden_states, expected.hidden_states))
    _, states = classifier_of(model, output_hidden_states=True)(pixel_values, return_dict=False)
    assert torch.equal(states[-1], output.hidden_states[-1])
    assert classifier_of(model)(pixel_values, return_dict=True).hidden_states is None


def test_probabilities_are_those_of_a_table_of_all_images(family):
    model = classy_model(family, image_size=2, num_classes=3)
    images = torch.tensor(list(itertools.product((0, 1), repeat=4))).view(16, 1, 2, 2)
    prior = [0.5, 0.125, 0.375]
    with torch.no_grad():
        joint = log_likelihoods(model, images).exp() * torch.tensor(prior)
        probabilities = classifier_of(model, class_prior=prior)(images).logits.softmax(-1)
    assert joint.sum().item() == pytest.approx(1)
    torch.testing.assert_close(probabilities, joint / joint.sum(1, keepdim=True))


def test_checkpoints_of_either_kind_load_as_the_other(family, tmp_path):
    model = build_model(family, num_levels=4, num_classes=3)
    model.save_pretrained(tmp_path / "causal")
    classifier, report = AutoModelForImageClassification.from_pretrained(tmp_path / "causal", output_loading_info=True)
    assert type(classifier) is FAMILIES[family].classifier_class
    assert not any(report.values()), report
    assert classifier.state_dict().keys() == model.state_dict().keys()
    inputs = random_inputs(model)
    torch.testing.assert_close(
        classifier(inputs["pixel_values"]).logits, log_likelihoods(model, inputs["pixel_values"]) - math.log(3)
    )
    classifier.config.class_temperature = 3.0
    classifier.save_pretrained(tmp_path / "classifier")
    again, report = AutoModel.from_pretrained(tmp_path / "classifier", output_loading_info=True)
    assert type(again) is FAMILIES[family].causal_class
    assert not any(report.values()), report
    assert torch.equal(again(**inputs).logits, model(**inputs).logits)
    assert AutoModelForImageClassification.from_pretrained(tmp_path / "classifier").config.class_temperature == 3.0
    for folder in ("causal", "classifier"):
        auto_map = json.loads((tmp_path / folder / "config.json").read_text())["auto_map"]
        assert auto_map["AutoModel"].endswith("ForCausalImageModeling")
        name = FAMILIES[family].classifier_class.__name__
        assert auto_map["AutoModelForImageClassification"] == f"modeling_{family}.{name}"


@pytest.mark.slow
def test_a_learned_prior_starts_uniform_is_learned_and_saved(family, tmp_path):
    model = build_model(family, num_classes=3)
    model.save_pretrained(tmp_path / "causal")
    junk = [torch.full((3,), float("nan")) for _ in range(3000)]
    del junk
    classifier, report = AutoModelForImageClassification.from_pretrained(
        tmp_path / "causal", class_prior="learned", output_loading_info=True
    )
    assert report["missing_keys"] == {"class_prior.logits"}
    pixel_values = random_inputs(model)["pixel_values"]
    uniform = AutoModelForImageClassification.from_pretrained(tmp_path / "causal")(pixel_values).logits
    torch.testing.assert_close(classifier(pixel_values).logits, uniform)
    optimizer = torch.optim.SGD([classifier.class_prior.logits], lr=30.0)
    for _ in range(6):
        optimizer.zero_grad()
        classifier(pixel_values, labels=torch.tensor([2, 2])).loss.backward()
        optimizer.step()
    learned = classifier.log_prior().exp()
    assert learned[2] > 0.5
    assert learned.sum().item() == pytest.approx(1)
    classifier.save_pretrained(tmp_path / "learned")
    again, report = AutoModelForImageClassification.from_pretrained(tmp_path / "learned", output_loading_info=True)
    assert not any(report.values()), report
    assert torch.equal(again(pixel_values).logits, classifier(pixel_values).logits)
    causal, report = AutoModel.from_pretrained(tmp_path / "learned", output_loading_info=True)
    assert not any(report.values()), report
    assert torch.equal(causal.head.layers[0].weight, model.head.layers[0].weight)


@for_each("weight", [0.0, 0.3, 1])
def test_loss_and_gradients_are_those_of_the_formula(family, weight):
    model = classy_model(family, **CONFIGS["grey_categorical"])
    prior = [0.25, 0.5, 0.25]
    classifier = classifier_of(model, class_prior=prior, class_temperature=2.0, generative_weight=weight).train()
    pixel_values, labels = random_inputs(model, batch=3)["pixel_values"], torch.tensor([2, 0, 2])
    joint = log_likelihoods(model, pixel_values)
    generative = -joint[range(3), labels].mean() / 30
    posterior = ((joint + torch.tensor(prior).double().log()) / 2).log_softmax(1)
    expected = weight * generative - (1 - weight) * posterior[range(3), labels].mean()
    loss = classifier(pixel_values, labels=labels).loss
    torch.testing.assert_close(loss, expected)
    torch.testing.assert_close(classifier(pixel_values, labels=labels, num_items_in_batch=12).loss, expected / 4)
    loss.backward()
    expected.backward()
    for name, parameter in model.named_parameters():
        torch.testing.assert_close(classifier.get_parameter(name).grad, parameter.grad, msg=name)


@pytest.mark.slow
@for_each("prior", [None, [0.2, 0.3, 0.5], "learned"])
def test_a_classifier_on_disk_gives_the_same_logits(family, prior, tmp_path):
    classifier = classifier_of(build_model(family, num_classes=3), class_prior=prior)
    if prior == "learned":
        classifier.class_prior.logits.data = torch.tensor([0.5, 0.0, -1.0])
    classifier.save_pretrained(tmp_path)
    places = {f"model.{name}": "disk" for name, _ in classifier.model.named_children()} | {"head": "cpu"}
    places |= {name: "disk" for name, _ in classifier.named_children() if name == "class_prior"}
    loaded = AutoModelForImageClassification.from_pretrained(tmp_path, device_map=places, offload_folder=tmp_path / "o")
    assert loaded.device.type == "meta"
    pixel_values = random_inputs(classifier)["pixel_values"]
    torch.testing.assert_close(loaded(pixel_values).logits, classifier(pixel_values).logits)


def test_a_classifier_without_parameters_of_its_own_needs_no_device(monkeypatch):
    """As the copies that `DataParallel` makes: their weights are plain attributes, and asking for a device fails."""
    classifier = classifier_of(build_model("gated_pixelcnn", num_classes=3))
    pixel_values = random_inputs(classifier)["pixel_values"]
    expected = classifier(pixel_values).logits

    def no_device(self):
        raise StopIteration

    monkeypatch.setattr(type(classifier), "device", property(no_device))
    assert torch.equal(classifier(pixel_values).logits, expected)


def test_a_purely_generative_loss_is_finite_where_the_prior_is_zero(family):
    classifier = classifier_of(classy_model(family, num_classes=3), class_prior=[0.0, 0.5, 0.5], generative_weight=1.0)
    pixel_values = random_inputs(classifier)["pixel_values"]
    assert classifier(pixel_values, labels=torch.tensor([0, 1])).loss.isfinite()


def test_a_classifier_is_initialised_from_data():
    config = small_config("pixelcnn_pp", num_classes=3)
    torch.manual_seed(0)
    classifier = FAMILIES["pixelcnn_pp"].classifier_class(config)
    torch.manual_seed(0)
    causal = FAMILIES["pixelcnn_pp"].causal_class(config)
    inputs = random_inputs(causal, batch=4)
    for model in (classifier, causal):
        model.initialize_from_data(**inputs)
    gains = [model.model.vertical_in.gain for model in (classifier, causal)]
    assert torch.equal(*gains)
    assert not (gains[0] == gains[0][0]).all()


@pytest.mark.parametrize("is_training", [False, True])
def test_memory_does_not_grow_with_the_number_of_classes(is_training):
    def peak(num_classes):
        model = classifier_of(
            build_model("gated_pixelcnn", num_classes=num_classes, image_size=16, num_levels=16, num_hidden_layers=4)
        )
        pixel_values = random_inputs(model, batch=4)["pixel_values"]
        labels = torch.arange(4) % num_classes

        def call():
            with torch.set_grad_enabled(is_training):
                loss = model.train(is_training)(pixel_values, labels=labels).loss
                if is_training:
                    loss.backward()

        call()  # gradients are there from now on
        return peak_bytes(call, torch.device("cpu"))

    assert peak(8) < 1.2 * peak(2)


def test_trainer_counts_images_and_evaluates(tmp_path):
    weights = []
    for batch, accumulation in [(4, 1), (2, 2)]:
        model = build_model("gated_pixelcnn", num_classes=3, image_size=4)
        classifier = classifier_of(model)
        levels = random_inputs(model, batch=8)["pixel_values"]
        rows = [{"pixel_values": x, "labels": i % 3} for i, x in enumerate(levels)]
        args = TrainingArguments(
            str(tmp_path),
            per_device_train_batch_size=batch,
            gradient_accumulation_steps=accumulation,
            num_train_epochs=1,
            optim="sgd",
            learning_rate=0.5,
            save_strategy="no",
            disable_tqdm=True,
            use_cpu=True,
        )
        trainer = Trainer(classifier, args, train_dataset=rows, eval_dataset=rows)
        before = trainer.evaluate()["eval_loss"]
        trainer.train()
        assert trainer.evaluate()["eval_loss"] < before
        weights.append(classifier.state_dict())
    for name, tensor in weights[0].items():
        torch.testing.assert_close(tensor, weights[1][name], rtol=1e-4, atol=1e-5, msg=name)


def test_the_image_classification_pipeline_names_the_classes(family, tmp_path, caplog):
    model = classy_model(family, num_levels=4, num_classes=3, id2label={0: "cat", 1: "dog", 2: "cow"}).float()
    model.save_pretrained(tmp_path)
    PixelCNNImageProcessor(num_levels=4, size={"height": 5, "width": 6}).save_pretrained(tmp_path)
    images = [Image.fromarray(np.random.default_rng(i).integers(256, size=(9, 7, 3), dtype=np.uint8)) for i in (0, 1)]
    pipe = pipeline("image-classification", model=str(tmp_path), device="cpu")
    answers = pipe(images, batch_size=2)
    assert not [record for record in caplog.records if "is not supported for" in record.message]
    levels = pipe.image_processor(images, return_tensors="pt")["pixel_values"]
    for answer, row in zip(answers, log_likelihoods(model, levels).softmax(-1).tolist(), strict=True):
        scores = {entry["label"]: entry["score"] for entry in answer}
        assert scores == pytest.approx(dict(zip(("cat", "dog", "cow"), row, strict=True)), abs=1e-5)
        assert answer[0]["score"] == max(scores.values())


def test_a_model_without_classes_is_no_classifier(family, tmp_path):
    model = build_model(family)
    with pytest.raises(ValueError, match="needs a class-conditional model, but `num_classes` is 0"):
        FAMILIES[family].classifier_class(model.config)
    model.save_pretrained(tmp_path)
    with pytest.raises(ValueError, match="needs a class-conditional model, but `num_classes` is 0"):
        AutoModelForImageClassification.from_pretrained(tmp_path)


@pytest.mark.slow
@for_each("num_classes", [0, 3])
@for_each(
    "request_",
    {"names": {"id2label": {0: "cat", 1: "dog"}, "label2id": {"cat": 0, "dog": 1}}, "number": {"num_labels": 2}},
)
def test_the_usual_calls_of_fine_tuning_make_a_classifier_of_other_classes(family, tmp_path, num_classes, request_):
    build_model(family, num_classes=num_classes).save_pretrained(tmp_path)
    for load in (AutoModelForImageClassification.from_pretrained, FAMILIES[family].classifier_class.from_pretrained):
        classifier = load(tmp_path, ignore_mismatched_sizes=True, **request_)
        assert classifier.config.num_classes == classifier.config.num_labels == 2
        assert classifier.config.id2label == request_.get("id2label", {0: "LABEL_0", 1: "LABEL_1"})
        assert classifier.config.label2id == {name: i for i, name in classifier.config.id2label.items()}
        pixel_values = random_inputs(build_model(family))["pixel_values"]
        assert classifier(pixel_values, labels=torch.tensor([0, 1])).logits.shape == (2, 2)
        with pytest.raises((ValueError, OSError), match="ignore_mismatched_sizes=True"):
            load(tmp_path, **request_)


def test_what_makes_classes_meaningless_is_said(monkeypatch):
    told = []
    monkeypatch.setattr(classification_causal_image.logger, "warning_once", told.append)
    classifier = FAMILIES["pixelcnn"].classifier_class(small_config("pixelcnn", num_classes=2, dropout=0.5)).eval()
    height, width = classifier.config.image_size
    classifier(torch.zeros(1, 1, 2 * height, 2 * width, dtype=torch.long))
    assert not told
    classifier(torch.zeros(1, 1, 2 * height, 2 * width + 1, dtype=torch.long))
    assert "are classified by a model of" in told.pop()
    classifier.train()(torch.zeros(1, 1, height, width, dtype=torch.long))
    assert "load it with `dropout=0`" in told.pop()


def test_labels_that_are_not_classes():
    cases = [
        (torch.tensor([0, 3]), ValueError, r"`labels` must be 0 ... 2, got values from 0 to 3"),
        (torch.tensor([-1, 0]), ValueError, r"got values from -1 to 0"),
        (torch.tensor([0]), ValueError, r"`labels` must have shape \(2,\), one per image, got \(1,\)"),
        (torch.tensor([0.0, 1.0]), TypeError, "`labels` must be a LongTensor, got torch.float32"),
        (torch.zeros(2, 1, 5, 6).long(), ValueError, r"`labels` must have shape \(2,\)"),
    ]
    for labels, error, message in cases:
        classifier = classifier_of(build_model("pixelcnn", num_classes=3))
        with pytest.raises(error, match=message):
            classifier(torch.zeros(2, 1, 5, 6).long(), labels=labels)


def test_images_that_are_not_levels():
    classifier = classifier_of(build_model("pixelcnn", num_classes=3))
    with pytest.raises(TypeError, match=r"`pixel_values` must be a torch\.Tensor of integer levels, got list"):
        classifier([[[[0, 1]]]], labels=torch.tensor([0]))


def test_wrong_fields_of_a_classifier():
    cases = [
        ({"class_prior": [0.5, 0.3, 0.3]}, "`class_prior` must be probabilities that sum to 1, got [0.5, 0.3, 0.3]"),
        ({"class_prior": [1.5, -0.5, 0.0]}, "`class_prior` must be probabilities that sum to 1"),
        ({"class_prior": [float("nan"), 0.5, 0.5]}, "`class_prior` must be probabilities that sum to 1"),
        ({"class_prior": [0.5, 0.5]}, "one probability for each of the 3 classes (`num_classes`), got 2"),
        ({"class_prior": "empirical"}, "must be None, a list of probabilities or 'learned', got 'empirical'"),
        ({"class_prior": [1.0], "num_classes": 0}, "one probability for each of the 0 classes"),
        ({"class_temperature": 0}, "`class_temperature` must be a finite number above 0, got 0"),
        ({"class_temperature": float("inf")}, "`class_temperature` must be a finite number above 0, got inf"),
        ({"generative_weight": 1.5}, "`generative_weight` must be in [0, 1], got 1.5"),
    ]
    for fields, message in cases:
        for family in FAMILIES.values():
            with pytest.raises(StrictDataclassError, match=re.escape(message)):
                family.config_class(**{"num_classes": 3, **fields})
