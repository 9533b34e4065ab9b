"""Classes of a data set and of a model are the same where their names are; numbers count only without names."""

import json

import compress
import datasets
import numpy as np
import pytest
import score
import train
from conftest import build_model, one_line_error, strengthen_classes
from PIL import Image
from transformers import AutoModel

from hf_pixelcnn import PixelCNNImageProcessor
from hf_pixelcnn.training import InputError, LevelDataset, LevelStream

pytestmark = pytest.mark.slow

KNOWN = ["ant", "bee", "cat", "dog"]  # of the model


def rows_of(classes, names=None, seed=0):
    """Noise of 6×6; `classes` are names, or numbers where there are no `names`, and may be `None`."""
    pixels = np.random.default_rng(seed).integers(256, size=(len(classes), 6, 6), dtype=np.uint8)
    kind = datasets.ClassLabel(names=names) if names else datasets.Value("int32")
    features = datasets.Features({"image": datasets.Image(), "label": kind})
    return datasets.Dataset.from_dict({"image": list(map(Image.fromarray, pixels)), "label": classes}, features)


def saved_rows(folder, *args):
    rows_of(*args).save_to_disk(folder)
    return str(folder)


@pytest.fixture
def model(tmp_path):
    """Folder of a model of four classes that differ much."""
    folder = tmp_path / "model"
    names = dict(enumerate(KNOWN))
    network = build_model("gated_pixelcnn", image_size=6, num_levels=2, num_classes=4, id2label=names)
    strengthen_classes(network).save_pretrained(folder)
    PixelCNNImageProcessor(num_levels=2).save_pretrained(folder)
    return str(folder)


def without_names(model, folder):
    """A copy of a saved model whose classes have no names."""
    network = AutoModel.from_pretrained(model)
    network.config.id2label = {i: f"LABEL_{i}" for i in range(4)}
    network.save_pretrained(folder)
    PixelCNNImageProcessor(num_levels=2).save_pretrained(folder)
    return str(folder)


def scores(model, data, *words):
    output = f"{data}.json"
    given = ["--model", model, "--dataset", data, "--split", "train", "--device", "cpu", "--output", output]
    score.main([*given, *words])
    with open(output, encoding="utf-8") as file:
        return json.load(file)


@pytest.mark.parametrize("kind", [LevelDataset, LevelStream])
def test_names_decide_which_class_of_the_model_is_meant(kind):
    def seen(classes, names, known=KNOWN):
        rows = rows_of(classes, names)
        rows = rows if kind is LevelDataset else rows.to_iterable_dataset()
        id2label = None if known is None else dict(enumerate(known))
        images = kind(
            rows, 2, PixelCNNImageProcessor(num_levels=2), with_classes=True, id2label=id2label, class_column="label"
        )
        items = iter(images)
        return sorted(next(items)["class_ids"] for _ in classes)

    assert seen(["dog", "bee", None, "dog"], ["dog", "bee"]) == [-1, 1, 3, 3]
    assert seen([0, -1, 1], ["dog", "bee"]) == [-1, 1, 3]
    assert seen(["a", "b"], ["a", "b"], None) == [0, 1]
    assert seen(["a", "b"], ["a", "b"], ["LABEL_0", "LABEL_1"]) == [0, 1]
    assert seen([3, None, 1], None) == [-1, 1, 3]
    message = (
        "'label' has classes that the model lacks: cow. The model has ant, bee, cat, dog; the data set has cow, dog"
    )
    with pytest.raises(InputError, match=message):
        seen(["dog"], ["cow", "dog"])


def test_a_class_that_a_stream_has_and_the_model_has_not_is_an_error():
    rows = rows_of([1, 7]).to_iterable_dataset()
    id2label = dict(enumerate(KNOWN))
    images = LevelStream(
        rows, 2, PixelCNNImageProcessor(num_levels=2), with_classes=True, id2label=id2label, class_column="label"
    )
    with pytest.raises(InputError, match=r"'label' has classes from 7 to 7; the model has 0 ... 3, or -1 for none"):
        list(zip(range(2), images, strict=False))


def test_long_lists_of_names_are_cut():
    names = [f"n{i}" for i in range(50)]
    with pytest.raises(InputError, match=r"lacks: n0, .*, n19 and 30 more. The model has ant.* n19 and 30 more.$"):
        LevelDataset(rows_of(["n3"], names), 2, PixelCNNImageProcessor(), with_classes=True, id2label={0: "ant"})


def test_a_score_does_not_depend_on_the_order_of_names_or_on_classes_without_images(model, tmp_path):
    classes = ["dog", "bee", "dog", "bee", "bee"]
    words = ["--classify", "true", "--per_class", "true"]
    expected = scores(model, saved_rows(tmp_path / "same", classes, KNOWN), *words)
    for name, names in {"reversed": KNOWN[::-1], "fewer": ["dog", "bee"]}.items():
        found = scores(model, saved_rows(tmp_path / name, classes, names), *words)
        assert found["nats_per_image"] == expected["nats_per_image"]
        assert found["classification"] == expected["classification"]
        assert found["per_class"] == expected["per_class"]
    assert [row["class"] for row in found["per_class"]] == ["bee", "dog"]
    numbers = saved_rows(tmp_path / "numbers", [3, 1, 3, 1, 1])
    numbers = scores(model, numbers, "--class_column", "label", *words)
    assert numbers["per_class"] == expected["per_class"]
    other = scores(without_names(model, tmp_path / "unnamed"), str(tmp_path / "fewer"))
    assert other["nats_per_image"] != pytest.approx(expected["nats_per_image"])  # by number, as there are no names
    cows = saved_rows(tmp_path / "cows", ["cow"], ["cow"])
    message = one_line_error(score.main, ["--model", model, "--dataset", cows, "--split", "train"])
    assert "classes that the model lacks: cow. The model has ant, bee, cat, dog; the data set has cow." in message


def test_images_without_a_class_are_called_so(model, tmp_path, capsys):
    for name, none in {"none": None, "minus": -1}.items():
        data = saved_rows(tmp_path / name, [3, none, none, 1], KNOWN)
        rows = scores(model, data, "--per_class", "true")["per_class"]
        assert [(row["class"], row["num_images"]) for row in rows] == [("bee", 1), ("dog", 1), ("no class", 2)]
        words = ["--model", model, "--dataset", data, "--split", "train", "--classify", "true"]
        message = one_line_error(score.main, words)
        assert "has no class for 2 of 4 images" in message
    assert "922337" not in capsys.readouterr().out + message


def test_measuring_the_codec_does_not_depend_on_the_order_of_names(model, tmp_path, capsys):
    sizes = []
    for name, names in {"same": KNOWN, "fewer": ["dog", "bee"]}.items():
        data = saved_rows(tmp_path / name, ["dog", "bee"] * 5, names)
        words = ["--model", model, "--dataset", data, "--split", "train", "--device", "cpu"]
        compress.main(["measure", *words, "--output", str(tmp_path / "codec.json")])
        results = json.loads((tmp_path / "codec.json").read_text())
        sizes.append((results["model_bits_per_dim"], results["stream_bytes"]))
    assert sizes[0] == sizes[1]


def tune(model, data, output, *words):
    given = ["--model_name_or_path", model, "--dataset", data, "--train_split", "train", "--eval_split", "train"]
    options = ["--per_device_train_batch_size", "4", "--max_steps", "1", "--num_samples", "4", "--use_cpu", "true"]
    return [*given, *options, "--learning_rate", "0", "--disable_tqdm", "true", "--output_dir", str(output), *words]


@pytest.mark.parametrize("streaming", ["false", "true"])
def test_fine_tuning_on_some_of_the_classes_keeps_the_names_and_the_score(model, tmp_path, streaming, monkeypatch):
    monkeypatch.setattr(datasets.config, "SLEEP_TIME_ON_THREADS_SHUTDOWN", 0, raising=False)  # seconds, per stream
    classes = ["dog", "bee"] * 3
    expected = scores(model, saved_rows(tmp_path / "same", classes, KNOWN))["nats_per_image"]
    rows_of(classes, ["dog", "bee"]).to_parquet(tmp_path / "fewer" / "train.parquet")
    words = ["--streaming", streaming, "--cache_dir", str(tmp_path / "cache")]
    train.main(tune(model, str(tmp_path / "fewer"), tmp_path / "run", *words))
    assert json.loads((tmp_path / "run" / "results.json").read_text())["nats_per_image"] == pytest.approx(expected)
    assert AutoModel.from_pretrained(tmp_path / "run").config.id2label == dict(enumerate(KNOWN))


def test_fine_tuning_on_other_classes_says_how_to_start_them(model, tmp_path):
    data = saved_rows(tmp_path / "cows", ["cow", "dog"] * 3, ["cow", "dog"])
    message = one_line_error(train.main, tune(model, data, tmp_path / "run"))
    assert "lacks: cow. The model has ant, bee, cat, dog; the data set has cow, dog." in message
    assert "in place of its own, give --class_conditional true." in message
    assert not (tmp_path / "run").exists()
    train.main(tune(model, data, tmp_path / "run", "--class_conditional", "true"))
    assert AutoModel.from_pretrained(tmp_path / "run").config.id2label == {0: "cow", 1: "dog"}


def test_a_run_is_not_resumed_with_classes_of_other_names(model, tmp_path):
    start = without_names(model, tmp_path / "unnamed")  # takes over the names of the data
    data = saved_rows(tmp_path / "data", ["cow"] * 4, ["cow", "pig", "hen", "fox"])
    train.main(tune(start, data, tmp_path / "run"))
    words = ["--max_steps", "2", "--resume_from_checkpoint", "last"]
    other = saved_rows(tmp_path / "other", ["cow"] * 4, ["pig", "cow", "hen", "fox"])
    message = one_line_error(train.main, tune(start, other, tmp_path / "run", *words))
    assert "has the classes cow, pig, hen, fox, this run pig, cow, hen, fox: it cannot be resumed" in message
