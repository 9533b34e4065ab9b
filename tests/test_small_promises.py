"""Promises of one line that nothing else holds: initial values, floors, what is read from where, and when."""

import contextlib
import json
import math
import os
import shutil
import sys
from pathlib import Path

import pytest
import torch
from conftest import build_model, conditions, random_inputs, small_config
from huggingface_hub.errors import StrictDataclassError
from transformers import AutoModel
from transformers.utils import logging

import hf_pixelcnn
from hf_pixelcnn import (
    LogisticMixtureOutput,
    PixelCNNGenerationConfig,
    PixelCNNImageProcessor,
    generation_causal_image,
    pipeline_causal_image,
)
from hf_pixelcnn.caching_causal_image import SamplingCache
from hf_pixelcnn.checks_causal_image import check_levels
from hf_pixelcnn.compression import identity
from hf_pixelcnn.modeling_causal_image import PixelEncoding
from hf_pixelcnn.training import InputError, load_model
from hf_pixelcnn.training.files import all_written_beside, write_json, written_beside
from hf_pixelcnn.training.records import public_words
from hf_pixelcnn.training.trainer import WeightAverage


def test_classes_start_almost_alike(family):
    torch.manual_seed(0)
    record = hf_pixelcnn.FAMILIES[family]
    model = record.causal_class(small_config(family, num_classes=50))
    embeddings = [m.weight for m in model.modules() if type(m).__name__ == "ClassEmbedding"]
    assert embeddings
    for weight in embeddings:
        assert weight.std().item() == pytest.approx(0.02, rel=0.2)


def test_levels_are_scaled_in_float32_and_rounded_once():
    encoding = PixelEncoding(small_config("pixelcnn", num_levels=256))
    levels = torch.arange(256)
    exact = levels.double() * 2 / 255 - 1
    assert torch.equal(encoding.scale(levels, torch.bfloat16), exact.float().bfloat16())
    assert (encoding.scale(levels, torch.bfloat16) != (levels.bfloat16() * 2 / 255 - 1)).any()


def test_a_label_of_uint8_is_a_level_and_not_the_ignored_label():
    config = small_config("pixelcnn", num_levels=100)
    with pytest.raises(ValueError, match="got values from 156 to 156"):
        check_levels("labels", torch.full((1, 1, 2, 2), 156, dtype=torch.uint8), config, ignored=-100)


def test_labels_are_checked_before_the_network_runs(family):
    model = build_model(family)
    levels = random_inputs(model)["pixel_values"]
    calls = []
    model.model.register_forward_hook(lambda *_: calls.append(1))
    with pytest.raises(ValueError, match=r"`labels` must be levels 0 \.\.\. 1"):
        model(levels, labels=levels + 2)
    assert calls == []


def test_an_average_of_bfloat16_weights_is_kept_in_float32():
    average = WeightAverage(build_model("pixelcnn").bfloat16(), 0.999)
    assert {tensor.dtype for tensor in average.average.values()} == {torch.float32}


@pytest.mark.parametrize("change", [{"dropout": 0.3}, {"image_size": 9}, {"generative_weight": 0.1}], ids=str)
def test_a_stream_does_not_depend_on_fields_that_leave_likelihoods_alone(change):
    model = build_model("gated_pixelcnn", num_classes=2)
    before = identity(model)["config"]
    for name, value in change.items():
        setattr(model.config, name, value)
    assert identity(model)["config"] == before


def test_the_fingerprint_counts_fields_that_differ_from_their_defaults(monkeypatch):
    config = small_config("gated_pixelcnn", first_kernel_size=7)
    settings = config.likelihood_settings()
    assert "first_kernel_size" not in settings  # the default
    assert settings["hidden_size"] == 12
    assert "transformers_version" not in settings
    assert not settings.keys() & config.fields_without_effect_on_likelihood


def test_scales_have_the_floor_of_the_paper():
    distribution = LogisticMixtureOutput(1, 256, 1)
    levels = torch.full((1, 1, 1, 1), 100)

    def log_prob(log_scale):
        parameters = torch.tensor([0.0, -0.2, log_scale]).view(1, 1, 1, 3)
        return distribution.log_prob(parameters, levels).item()

    assert log_prob(-20.0) == log_prob(-7.0)
    assert log_prob(-7.0) != log_prob(-6.9)


def test_layers_that_must_stay_whole_are_named(family):
    model = build_model(family)
    names = {type(module).__name__ for module in model.modules()}
    known = vars(sys.modules[type(model).__module__])
    assert set(model._no_split_modules) <= known.keys()
    assert set(model._no_split_modules) & names


def test_a_step_is_captured_at_its_second_call_and_replayed_from_then_on():
    cache = SamplingCache.__new__(SamplingCache)
    events = []
    cache.capture = lambda call: events.append("capture") or (lambda: events.append("replay"))
    cache.has_run, cache.replays = set(), {}
    for _ in range(4):
        cache.run("step", lambda: events.append("run"))
    assert events == ["run", "capture", "replay", "replay", "replay"]


def test_rows_seen_above_are_those_of_the_receptive_field(family):
    """Neither fewer, which would be wrong, nor many more, which would cost time."""
    height = 120
    model = build_model(family, image_size=[height, 4], num_hidden_layers=1)
    reach = model.model.rows_seen_above
    assert reach < height - 5 or reach == math.inf
    seen = []
    for row in range(height - 4, height):  # PixelCNN++ has four kinds of rows
        field = hf_pixelcnn.receptive_field(model, row, 2)[0]
        seen.append(row - field.any(1).nonzero().min().item())
    if reach == math.inf:
        assert seen == list(range(height - 4, height))
        return
    assert 0 <= reach - max(seen) <= 3


def test_the_config_may_ask_for_hidden_states(family):
    model = build_model(family)
    inputs = random_inputs(model)
    assert model.model(**inputs).hidden_states is None
    model.config.output_hidden_states = True
    assert model.model(**inputs).hidden_states is not None
    assert model.model(**inputs, output_hidden_states=False).hidden_states is None


def test_a_dropout_that_is_no_probability_is_refused(family):
    for dropout in [-0.1, 1.0, math.nan]:
        with pytest.raises(StrictDataclassError, match="`dropout` must be in"):
            small_config(family, dropout=dropout)


def test_generation_settings_are_read_from_the_place_of_the_model(tmp_path, monkeypatch):
    model = build_model("gated_pixelcnn")
    model.generation_config = PixelCNNGenerationConfig(temperature=0.5)
    model.save_pretrained(tmp_path / "sub")
    assert AutoModel.from_pretrained(tmp_path, subfolder="sub").generation_config.temperature == 0.5
    asked = []
    monkeypatch.setattr(generation_causal_image, "_has_generation_config", lambda path, **place: asked.append(place))
    AutoModel.from_pretrained(tmp_path / "sub", token="hf_x", revision="v2")
    assert (asked[0]["token"], asked[0]["revision"]) == ("hf_x", "v2")


def test_generation_settings_that_cannot_be_read_are_an_error(tmp_path, monkeypatch):
    build_model("gated_pixelcnn").save_pretrained(tmp_path)
    (tmp_path / "generation_config.json").write_text('{"temperature": ')
    with pytest.raises(OSError, match=r"generation_config\.json"):
        AutoModel.from_pretrained(tmp_path)
    (tmp_path / "generation_config.json").unlink()
    assert AutoModel.from_pretrained(tmp_path).generation_config.temperature == 1.0


def test_a_hub_that_does_not_answer_is_not_taken_for_a_model_without_settings(monkeypatch):
    place = {"subfolder": "", "local_files_only": False, "cache_dir": None, "revision": None, "token": None}
    monkeypatch.setattr(generation_causal_image, "cached_file", lambda *args, **kwargs: None)
    assert not generation_causal_image._has_generation_config("me/model", **{**place, "local_files_only": True})
    monkeypatch.setattr(generation_causal_image, "is_offline_mode", lambda: False)
    with pytest.raises(OSError, match=r"does not say whether me/model has a generation_config.json"):
        generation_causal_image._has_generation_config("me/model", **place)


def test_a_damaged_image_processor_is_not_taken_for_a_model_of_codes(tmp_path):
    build_model("gated_pixelcnn").save_pretrained(tmp_path)
    assert load_model(str(tmp_path))[1] is None
    PixelCNNImageProcessor().save_pretrained(tmp_path)
    (tmp_path / "preprocessor_config.json").write_text("{")
    with pytest.raises(InputError, match="cannot load the image processor"):
        load_model(str(tmp_path))


def test_the_pipeline_takes_the_image_processor_of_the_models_own_revision(tmp_path, monkeypatch):
    model = build_model("gated_pixelcnn")
    model.config._commit_hash, model.config._name_or_path, asked = "0123abc", str(tmp_path), []
    monkeypatch.setattr(pipeline_causal_image, "cached_file", lambda *args, **options: asked.append(options))
    model.name_or_path = str(tmp_path)
    pipeline_causal_image.PixelCNNImagePipeline.find_image_processor(model)
    assert asked[0]["revision"] == "0123abc"


def test_classes_may_be_a_range_names_or_an_array():
    model = build_model("gated_pixelcnn", num_classes=3, id2label={0: "a", 1: "b", 2: "c"}).double()
    expected = model.generate(class_ids=[0, 1, 2], generator=torch.Generator().manual_seed(0))
    for classes in (
        range(3),
        ["a", "b", "c"],
        torch.arange(3).numpy(),
        torch.arange(3, dtype=torch.uint8),
        ("a", 1, "c"),
    ):
        assert torch.equal(model.generate(class_ids=classes, generator=torch.Generator().manual_seed(0)), expected)
    with pytest.raises(ValueError, match="There is no class 'd'; the model has"):
        model.generate(class_ids="d")
    assert model.generate(**conditions(model, 2)).shape[0] == 2


def test_a_command_that_is_kept_holds_no_secret():
    secrets = ["--hub_token", "hf_x", "--hub_token=hf_x", "--push_to_hub_token", "hf_x"]
    words = [*secrets, "--seed", "1", "x_token"]
    assert public_words(words) == ["--seed", "1", "x_token"]


@pytest.mark.parametrize("error", [OSError, KeyboardInterrupt])
def test_a_file_is_the_old_one_or_the_new_one(tmp_path, monkeypatch, error):
    path = tmp_path / "new folder" / "results.json"
    write_json({"a": 1}, path)
    assert path.read_text() == '{\n  "a": 1\n}\n'

    def fails(*args):
        raise error("no space")

    with pytest.raises(error), written_beside(path) as beside:  # noqa: PT012
        beside.write_text("half")
        raise error("no space")
    monkeypatch.setattr(os, "replace", fails)
    with pytest.raises(error):
        write_json({"a": 2}, path)
    assert json.loads(path.read_text()) == {"a": 1}
    assert [other.name for other in path.parent.iterdir()] == ["results.json"]


def test_several_files_of_a_folder_change_together_and_weights_last(tmp_path, monkeypatch):
    folder, names, replaced = tmp_path / "model", ["config.json", "preprocessor_config.json", "model.safetensors"], []

    def replace(source, target):
        if len(replaced) == failing:
            raise OSError("no space")
        replaced.append(Path(target).name)
        shutil.move(source, target)

    monkeypatch.setattr(os, "replace", replace)
    for failing in range(4):
        shutil.rmtree(folder, ignore_errors=True)
        folder.mkdir()
        (folder / "config.json").write_text("old")
        (folder / "notes.txt").write_text("mine")
        replaced.clear()
        expected = pytest.raises(OSError, match="no space") if failing < 3 else contextlib.nullcontext()
        with expected, all_written_beside(folder) as beside:
            for name in reversed(names):
                (beside / name).write_text("new")
            assert (folder / "config.json").read_text() == "old"
        assert replaced == names[:failing]
        left = {path.name for path in folder.iterdir()}
        assert left == {"notes.txt", *(names if failing == 3 else ["config.json"])}  # no new file beside an old one


def test_the_verbosity_of_transformers_is_that_of_this_package(caplog, tmp_path):
    model = build_model("pixelcnn")
    with torch.no_grad():
        model.head.layers[-1].bias[0] = torch.nan
    for verbosity, is_told in ((logging.ERROR, False), (logging.WARNING, True)):
        logging.set_verbosity(verbosity)
        model.save_pretrained(tmp_path)
        assert ("BROKEN" in caplog.text) == is_told
