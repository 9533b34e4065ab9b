"""What a folder lacks is said when it is loaded: no model is half its file and half random numbers."""

import json
import os
import re
import subprocess
import sys

import pytest
import torch
from conftest import DIGITS, FAMILIES, ROOT, build_model, for_each, one_line_error
from safetensors.torch import load_file, save_file
from transformers import AutoModel, ViTConfig, ViTForImageClassification, pipeline

from hf_pixelcnn import PixelCNNImageProcessor
from hf_pixelcnn.training import InputError, load_classifier, load_model
from hf_pixelcnn.training.saved_models import check_finite, load_config


def rewrite_weights(folder, change):
    """Put what `change` makes of the saved tensors in their place."""
    file = folder / "model.safetensors"
    save_file(change(load_file(file)), file, metadata={"format": "pt"})


def without_one(tensors):
    return {name: tensor for name, tensor in tensors.items() if name != "head.layers.0.weight"}


def renamed(tensors):
    return {f"net.{name}": tensor for name, tensor in tensors.items()}


def test_a_missing_tensor_is_named(family, tmp_path):
    model = build_model(family, num_classes=3)
    model.save_pretrained(tmp_path)
    rewrite_weights(tmp_path, without_one)
    count = len(model.state_dict())
    message = (
        f"'{tmp_path}' lack 1 of the {count} tensors of a .*, head.layers.0.weight. .*`ignore_mismatched_sizes=True`"
    )
    classifier_class = FAMILIES[family].classifier_class
    for load in (AutoModel.from_pretrained, type(model).from_pretrained, classifier_class.from_pretrained):
        with pytest.raises(OSError, match=message):
            load(tmp_path)
    _, report = AutoModel.from_pretrained(tmp_path, ignore_mismatched_sizes=True, output_loading_info=True)
    assert report["missing_keys"] == {"head.layers.0.weight"}
    assert type(AutoModel.from_pretrained(tmp_path, ignore_mismatched_sizes=True)) is type(model)
    state_dict = model.state_dict()
    del state_dict["head.layers.0.bias"]
    with pytest.raises(OSError, match=r"lack 1 of the .*head.layers.0.bias"):
        type(model).from_pretrained(None, config=model.config, state_dict=state_dict)


def test_weights_under_other_names_are_not_replaced_by_random_ones(family, tmp_path):
    model = build_model(family)
    model.save_pretrained(tmp_path)
    rewrite_weights(tmp_path, renamed)
    count = len(model.state_dict())
    message = (
        rf"lack {count} of the {count} tensors .* and {count - 3} more and hold net\..* and {count - 3} more, which"
    )
    for load in (AutoModel.from_pretrained, type(model).from_pretrained, type(model.model).from_pretrained):
        with pytest.raises(OSError, match=message if load != type(model.model).from_pretrained else "lack"):
            load(tmp_path)


def test_a_missing_shard_is_said(family, tmp_path):
    model = build_model(family)
    model.save_pretrained(tmp_path, max_shard_size="2KB")
    next(iter(tmp_path.glob("*-of-*.safetensors"))).unlink()
    with pytest.raises(OSError, match="safetensors"):
        AutoModel.from_pretrained(tmp_path)


def test_only_a_class_that_adds_a_head_makes_one(family, tmp_path):
    model = build_model(family, num_classes=3)
    model.model.save_pretrained(tmp_path)
    saved = model.model.masked_state_dict()
    for load in (type(model).from_pretrained, FAMILIES[family].classifier_class.from_pretrained):
        loaded = load(tmp_path).model.state_dict()
        assert all(torch.equal(loaded[name], tensor) for name, tensor in saved.items())
    for load in (load_model, load_classifier):  # the scripts have no use for a random head
        with pytest.raises(InputError, match="is a network without its head"):
            load(str(tmp_path))
    rewrite_weights(tmp_path, lambda tensors: dict(list(tensors.items())[1:]))
    with pytest.raises(OSError, match=r"lack 1 of the .*, model\."):
        type(model).from_pretrained(tmp_path)


def test_classes_of_a_model_without_any_are_new_only_when_that_is_said(family, tmp_path):
    model = build_model(family)
    model.save_pretrained(tmp_path)
    with pytest.raises(OSError, match=r"class_embedding.weight.*start anew, as for other classes"):
        AutoModel.from_pretrained(tmp_path, num_classes=3)
    loaded = AutoModel.from_pretrained(tmp_path, num_classes=3, ignore_mismatched_sizes=True)
    assert loaded.generate(class_ids=[2]).shape == (1, 1, 5, 6)


def test_a_config_that_leaves_weights_out_is_refused(family, tmp_path):
    model = build_model(family, num_classes=3)
    model.save_pretrained(tmp_path)
    rewrite_weights(tmp_path, lambda tensors: tensors | {"model.more.weight": torch.zeros(2)})
    message = r"hold 1 tensors that a .* of this config does not have, model.more.weight: .*`ignore_mismatched_sizes="
    for cls in (AutoModel, FAMILIES[family].classifier_class, FAMILIES[family].model_class):
        with pytest.raises(OSError, match=message):
            cls.from_pretrained(tmp_path)
    assert type(AutoModel.from_pretrained(tmp_path, ignore_mismatched_sizes=True)) is type(model)
    model.save_pretrained(tmp_path)
    FAMILIES[family].model_class.from_pretrained(tmp_path)  # which has no head
    config = json.loads((tmp_path / "config.json").read_text())
    layers = {name: config[name] - 1 for name in ("num_hidden_layers", "num_blocks") if config.get(name, 1) > 1}
    for change in filter(None, (layers, {"weight_norm": False} if config.get("weight_norm") else None)):
        (tmp_path / "config.json").write_text(json.dumps(config | change))
        with pytest.raises(OSError, match="of this config does not have"):
            AutoModel.from_pretrained(tmp_path)


def test_other_shapes_are_a_sentence(family, tmp_path):
    build_model(family, num_classes=3).save_pretrained(tmp_path)
    with pytest.raises(ValueError, match=r"have other shapes .*class_embedding.weight is \(3, \d+\), not \(5, \d+\)"):
        AutoModel.from_pretrained(tmp_path, num_classes=5)


@pytest.mark.parametrize("damage", [without_one, renamed])
@pytest.mark.parametrize("script", ["score", "compress", "publish", "sample"])
def test_scripts_end_in_one_line(tmp_path, script, damage):
    import compress
    import publish
    import sample
    import score

    folder = tmp_path / "model"
    build_model("gated_pixelcnn").save_pretrained(folder)
    PixelCNNImageProcessor(num_levels=2, size={"height": 5, "width": 6}).save_pretrained(folder)
    rewrite_weights(folder, damage)
    (tmp_path / "picture.png").write_bytes(b"")
    main, *words = {
        "score": [score.main, "--model", folder, "--dataset", DIGITS],
        "compress": [
            compress.main,
            "compress",
            "--model",
            folder,
            "--input",
            tmp_path / "picture.png",
            "--output",
            "out",
        ],
        "publish": [publish.main, "--model", folder, "--output_dir", tmp_path / "published"],
        "sample": [sample.main, "--model", folder, "--output", tmp_path / "samples.png"],
    }[script]
    message = one_line_error(main, words)
    assert re.search(r"cannot load a model from .*: The weights of .* lack \d+ of the \d+ tensors", message)


def compiled(model):
    return torch.compile(model, backend="eager")


WRAPPERS = {
    "compiled": compiled,
    "parallel": torch.nn.DataParallel,
    "parallel and compiled": lambda model: compiled(torch.nn.DataParallel(model)),
    "compiled and parallel": lambda model: torch.nn.DataParallel(compiled(model)),
}


@for_each("wrapper", WRAPPERS)
def test_the_weights_of_a_wrapped_model_are_saved_under_their_own_names(family, wrapper, tmp_path):
    model = build_model(family, num_channels=3, num_levels=4)
    model.save_pretrained(tmp_path / "plain")
    model.save_pretrained(tmp_path / "wrapped", state_dict=wrapper(model).state_dict())
    plain, wrapped = (load_file(tmp_path / name / "model.safetensors") for name in ("plain", "wrapped"))
    assert plain.keys() == wrapped.keys()
    assert all(torch.equal(tensor, wrapped[name]) for name, tensor in plain.items())


def test_the_weights_of_a_model_with_a_compiled_part_have_their_own_names(family):
    model = build_model(family, num_channels=3, num_levels=4)
    expected = model.masked_state_dict()
    model.model = compiled(model.model)
    saved = model.masked_state_dict()
    assert expected.keys() == saved.keys()
    assert all(torch.equal(tensor, saved[name]) for name, tensor in expected.items())


def test_a_broken_model_is_saved_with_a_warning_and_never_published(family, tmp_path, caplog):
    for number in [float("nan"), float("inf")]:
        model = build_model(family)
        model.save_pretrained(tmp_path)
        check_finite(model)
        caplog.clear()
        assert "BROKEN" not in caplog.text
        model.head.layers[0].bias.data[0] = number
        model.save_pretrained(tmp_path)
        count = len(model.state_dict())
        assert f"BROKEN: 1 of its {count} tensors, head.layers.0.bias, hold NaN or infinite numbers" in caplog.text
        with pytest.raises(InputError, match=r"infinite numbers are in 1 of its tensors, head.layers.0.bias"):
            check_finite(AutoModel.from_pretrained(tmp_path))


# A user's module: classes of other families are there too, and a classifier of its own is registered.
USERS_MODULE = """
from hf_pixelcnn import *
from hf_pixelcnn import GatedPixelCNNForCausalImageModeling, GatedPixelCNNForImageClassification

class Mine(GatedPixelCNNForCausalImageModeling):
    pass

class MyClassifier(GatedPixelCNNForImageClassification):
    pass

class NotOfThisFamily(PixelCNNForImageClassification):
    pass

for _class in (MyClassifier, NotOfThisFamily):
    _class.register_for_auto_class("AutoModelForImageClassification")
"""
SAVE = """
import sys
import users_module
from transformers import AutoModel

def save(mine, folder):
    mine.from_pretrained(sys.argv[1]).save_pretrained(folder)
    assert type(AutoModel.from_pretrained(folder)) is users_module.GatedPixelCNNForCausalImageModeling
"""


@pytest.mark.slow
def test_a_subclass_is_saved_with_the_names_of_its_own_module_alone(tmp_path):
    build_model("gated_pixelcnn", num_classes=3).save_pretrained(tmp_path / "base")
    (tmp_path / "users_module.py").write_text(USERS_MODULE)
    code = f"{SAVE}\nsave(users_module.Mine, sys.argv[2])\n{USERS_MODULE}\nsave(Mine, sys.argv[3])\n"
    result = subprocess.run(
        [sys.executable, "-c", code, tmp_path / "base", tmp_path / "module", tmp_path / "main"],
        capture_output=True,
        text=True,
        env={**os.environ, "HF_HOME": str(tmp_path), "PYTHONPATH": f"{tmp_path}{os.pathsep}{ROOT}"},
        timeout=900,
    )
    assert result.returncode == 0, result.stderr
    assert "Conv2d" not in result.stderr + result.stdout
    of_module, of_main = (
        json.loads((tmp_path / name / "config.json").read_text())["auto_map"] for name in ("module", "main")
    )
    for auto_map in (of_module, of_main):
        assert auto_map.pop("AutoConfig") == "configuration_gated_pixelcnn.GatedPixelCNNConfig"
    assert of_module == {
        "AutoModel": "users_module.Mine",
        "AutoModelForImageClassification": "users_module.MyClassifier",
    }
    assert (tmp_path / "module" / "users_module.py").exists()
    assert of_main == {}
    assert result.stderr.count("The code of Mine is not saved") == 1


def test_a_body_names_no_class_whose_file_it_does_not_bring(family, tmp_path):
    model = build_model(family)
    model.save_pretrained(tmp_path / "whole")
    body = type(model.model).from_pretrained(tmp_path / "whole")
    body.save_pretrained(tmp_path / "body")
    auto_map = json.loads((tmp_path / "body" / "config.json").read_text())["auto_map"]
    assert all((tmp_path / "body" / f"{name.split('.')[0]}.py").exists() for name in auto_map.values())
    body.save_pretrained(tmp_path / "whole")
    model.save_pretrained(tmp_path / "again")
    auto_map = json.loads((tmp_path / "again" / "config.json").read_text())["auto_map"]
    assert {"AutoConfig", "AutoModel", "AutoModelForImageClassification"} == set(auto_map)


def test_generation_settings_that_were_cut_off_are_never_the_defaults(tmp_path):
    for end in [1, 3, 60, 10_000]:
        model = build_model("gated_pixelcnn")
        model.generation_config.temperature = 0.5
        model.save_pretrained(tmp_path)
        file = tmp_path / "generation_config.json"
        text = file.read_bytes()
        file.write_bytes(text[: len(text) - end] if end < len(text) else b"")
        if end == 1:  # the end of the last line: all the settings are there
            assert AutoModel.from_pretrained(tmp_path).generation_config.temperature == 0.5
            continue
        for load in (AutoModel.from_pretrained, type(model).from_pretrained):
            with pytest.raises(OSError, match=rf"'{file}' is not a valid JSON file"):
                load(tmp_path)


def test_generation_settings_without_a_meaning_name_their_file(tmp_path):
    cases = [
        ("[]", "list"),  # transformers up to 5.17 trips over it first
        ("null", "NoneType"),
        ('{"temperature": "0.5"}', "`temperature` must be a number, got '0.5'"),
        ('{"temperature": -1}', "`temperature` must be above 0, got -1"),
    ]
    for text, message in cases:
        build_model("gated_pixelcnn").save_pretrained(tmp_path)
        (tmp_path / "generation_config.json").write_text(text)
        with pytest.raises(OSError, match=f"The generation_config.json of '{tmp_path}' cannot be used: .*{message}"):
            AutoModel.from_pretrained(tmp_path)
        with pytest.raises(InputError, match=r"generation_config\.json"):
            load_model(str(tmp_path))


def test_a_folder_of_another_kind_of_model_is_refused_whatever_its_files_hold(tmp_path):
    vit = ViTConfig(hidden_size=8, num_hidden_layers=1, num_attention_heads=1, intermediate_size=8, image_size=28)
    ViTForImageClassification(vit).save_pretrained(tmp_path / "vit")
    for load in (load_model, load_classifier, load_config):
        with pytest.raises(InputError, match=r"cannot load a model from '.*vit': a vit is no model of this package"):
            load(str(tmp_path / "vit"))
    with pytest.raises(TypeError, match="which can draw images, got ViTModel"):
        pipeline("unconditional-image-generation", model=str(tmp_path / "vit"))
    message = "The image processor must make levels, as PixelCNNImageProcessor does, got ViT"
    for content in ({"image_processor_type": "ViTImageProcessor"}, {"feature_extractor_type": "ViTFeatureExtractor"}):
        build_model("pixelcnn", num_levels=4).save_pretrained(tmp_path)
        (tmp_path / "preprocessor_config.json").write_text(json.dumps(content | {"num_levels": 4}))
        with pytest.raises(InputError, match=message):
            load_model(str(tmp_path))
        with pytest.raises(ValueError, match=message):
            pipeline("unconditional-image-generation", model=str(tmp_path))


def test_json_that_holds_no_names_is_neither_a_missing_file_nor_a_traceback(tmp_path):
    for text, kind in (("null", "NoneType"), ("[]", "list"), ("NaN", "float")):
        for name in ("preprocessor_config.json", "config.json"):
            build_model("pixelcnn", num_levels=4).save_pretrained(tmp_path)
            (tmp_path / name).write_text(text)
            message = rf"{name}' must hold a dictionary in JSON, got {kind}\."
            loaders = (load_model,) if name.startswith("pre") else (load_model, load_classifier, load_config)
            for load in loaders:
                with pytest.raises(InputError, match=message):
                    load(str(tmp_path))
            if name.startswith("pre"):
                with pytest.raises(OSError, match=message):
                    pipeline("unconditional-image-generation", model=str(tmp_path))
    (tmp_path / "config.json").write_text('{"model_type": "pixelcnn", "dtype": 3}')
    with pytest.raises(InputError, match="torch has no `dtype` 3"):
        load_config(str(tmp_path))


def test_an_image_processor_of_another_model_is_said_when_both_are_loaded(family, tmp_path):
    for name, value, own in [("num_levels", 2, 4), ("num_channels", 3, 1)]:
        build_model(family, num_levels=4).save_pretrained(tmp_path)
        PixelCNNImageProcessor(num_levels=4).save_pretrained(tmp_path)
        assert load_model(str(tmp_path))[1].num_levels == 4
        PixelCNNImageProcessor(**{"num_levels": 4, name: value}).save_pretrained(tmp_path)
        with pytest.raises(InputError, match=f"{tmp_path}.* has `{name}` {value}, but the model has {own}"):
            load_model(str(tmp_path))
