"""A folder that `save_pretrained` writes, read back in this process, in a fresh one, and without the package."""

import json
import math
import os
import subprocess
import sys

import pytest
import torch
from conftest import FAMILIES, KINDS, VARIANTS, build_model, for_each, random_inputs
from transformers import AutoConfig, AutoModel
from transformers.models.auto.image_processing_auto import AutoImageProcessor  # the real class in every version

from hf_pixelcnn import PixelCNNConfig, PixelCNNImageProcessor

pytestmark = [pytest.mark.versions, pytest.mark.slow]

# Loads every model with an allocator full of NaN: a mask that is not rebuilt would come back as that memory. The
# process without the package runs the source files in the folder instead.
CHILD = """
import importlib.util, json, pathlib, sys, torch
from transformers import AutoModel, AutoModelForImageClassification
from transformers.models.auto.image_processing_auto import AutoImageProcessor
with_package = sys.argv[1] == "package"
if with_package:
    import hf_pixelcnn
else:
    sys.meta_path.insert(0, type("Hide", (), {"find_spec": staticmethod(
        lambda name, *_: (_ for _ in ()).throw(ImportError(name)) if name.startswith("hf_pixelcnn") else None)}))
for path in map(pathlib.Path, sys.argv[2:]):
    expected = torch.load(path / "expected.pt")
    junk = [torch.full((n,), float("nan")) for n in expected["sizes"] for _ in range(200)]
    del junk
    model = AutoModel.from_pretrained(path, trust_remote_code=not with_package)
    assert type(model).__module__.startswith("hf_pixelcnn" if with_package else "transformers_modules"), type(model)
    assert torch.equal(model(**expected["inputs"]).logits, expected["logits"]), path.name
    for name, mask in model.named_buffers():
        assert torch.equal(mask, expected["buffers"][name]), name
    drawn = model.generate(generator=torch.Generator().manual_seed(0), **expected["condition"])
    assert torch.equal(drawn, expected["drawn"]), path.name
    assert type(model.generation_config).__name__ == "PixelCNNGenerationConfig"
    leaf = model.model.encoding(expected["inputs"]["pixel_values"], model.dtype).detach().requires_grad_()
    model.model.encoding.register_forward_hook(lambda module, args, output: leaf)
    (grad,) = torch.autograd.grad(model(**expected["inputs"]).logits[0, 0, 2, 3].square().sum(), leaf)
    assert not grad[0, :, 3:].any() and not grad[0, :, 2, 3:].any() and not grad[1:].any(), path.name
    processor = AutoImageProcessor.from_pretrained(path, trust_remote_code=not with_package)
    levels = processor(expected["pixels"].numpy(), return_tensors="pt")["pixel_values"]
    assert torch.equal(levels, expected["levels"]), path.name
    if not with_package:  # saved again, it has all its files and names all its classes
        again = pathlib.Path("again", path.name)
        model.save_pretrained(again)
        processor.save_pretrained(again)
        first, second = ({file.name for file in place.glob("*.py")} for place in (path, again))
        assert first == second, path.name
        first, second = (json.loads((place / "config.json").read_text())["auto_map"] for place in (path, again))
        assert first == second, path.name
    if model.config.num_classes:
        classifier = AutoModelForImageClassification.from_pretrained(path, trust_remote_code=not with_package)
        assert type(classifier).__module__ == type(model).__module__
        assert torch.equal(classifier(expected["inputs"]["pixel_values"]).logits, expected["class_logits"]), path.name
    print("right:", path.name)
"""


@pytest.fixture(scope="module")
def saved_models(tmp_path_factory):
    folder = tmp_path_factory.mktemp("models")
    size = {"height": 5, "width": 6}
    processor = PixelCNNImageProcessor(num_levels=2, binarization="threshold", threshold=0, size=size)
    pixels = torch.randint(256, (4, 9, 9), dtype=torch.uint8)
    for family in FAMILIES:
        for name, variant in VARIANTS.items():
            model = build_model(family, **variant)
            inputs = random_inputs(model)
            condition = {"class_ids": [0]} if model.config.num_classes else {}
            path = folder / f"{family}-{name}"
            model.save_pretrained(path)
            processor.save_pretrained(path)
            classes = range(model.config.num_classes)
            nats = [
                model.log_prob(inputs["pixel_values"], class_ids=torch.full((2,), c)).sum((1, 2, 3)) for c in classes
            ]
            torch.save(
                {
                    "inputs": inputs,
                    "pixels": pixels,
                    "levels": processor(pixels.numpy(), return_tensors="pt")["pixel_values"],
                    "class_logits": torch.stack(nats, 1).detach() - math.log(len(nats)) if nats else None,
                    "logits": model(**inputs).logits.detach(),
                    "buffers": dict(model.named_buffers()),
                    "condition": condition,
                    "drawn": model.generate(generator=torch.Generator().manual_seed(0), **condition),
                    "sizes": sorted({b.numel() for b in model.buffers()} | {p.numel() for p in model.parameters()}),
                },
                path / "expected.pt",
            )
    return folder


@pytest.mark.parametrize(("door", "variants"), [("package", VARIANTS), ("remote code", KINDS)])
def test_models_come_back_right_in_a_fresh_process(saved_models, tmp_path, door, variants):
    folders = [saved_models / f"{family}-{variant}" for family in FAMILIES for variant in variants]
    environment = {**os.environ, "HF_HOME": str(tmp_path), "HF_HUB_OFFLINE": "1"}
    result = subprocess.run(
        [sys.executable, "-c", CHILD, door, *folders],
        capture_output=True,
        text=True,
        env=environment,
        cwd=tmp_path,
        timeout=900,
    )
    assert result.returncode == 0, result.stderr[-3000:]
    assert result.stdout.count("right:") == len(folders)


def test_a_saved_folder_holds_what_it_needs(saved_models):
    for path in saved_models.iterdir():
        files = {file.name for file in path.iterdir()}
        assert {"config.json", "generation_config.json", "preprocessor_config.json", "model.safetensors"} <= files
        auto_map = json.loads((path / "config.json").read_text())["auto_map"]
        for reference in auto_map.values():
            assert f"{reference.split('.')[0]}.py" in files


@for_each("options", [{"dtype": torch.bfloat16}, {"dtype": "float16"}, {"device_map": "cpu"}])
def test_masks_survive_other_ways_of_loading(family, options, tmp_path):
    model = build_model(family, num_channels=3, num_levels=4)
    model.save_pretrained(tmp_path, max_shard_size="3KB")
    assert (tmp_path / "model.safetensors.index.json").exists()
    loaded = AutoModel.from_pretrained(tmp_path, **options)
    for name, mask in model.named_buffers():
        assert torch.equal(loaded.get_buffer(name), mask)
    inputs = random_inputs(model)
    torch.testing.assert_close(loaded(**inputs).logits.float(), model(**inputs).logits, rtol=0.1, atol=0.15)


@for_each("assign", [False, True])
def test_a_model_made_on_the_meta_device_gets_its_masks_with_its_weights(family, assign):
    model = build_model(family, num_channels=3, num_levels=4)
    with torch.device("meta"):
        empty = type(model)(model.config)
    assert all(tensor.is_meta for tensor in [*empty.parameters(), *empty.buffers()])
    if not assign:
        empty.to_empty(device="cpu")
        for mask in empty.buffers():
            mask.fill_(True)
    empty.load_state_dict(model.state_dict(), assign=assign)
    for name, mask in model.named_buffers():
        assert torch.equal(empty.get_buffer(name), mask)
    inputs = random_inputs(model)
    assert torch.equal(empty.eval()(**inputs).logits, model(**inputs).logits)


def test_loading_leaves_the_random_numbers_alone(family, tmp_path):
    build_model(family, num_channels=3, num_levels=4).save_pretrained(tmp_path)
    torch.manual_seed(0)
    expected = torch.rand(1)
    torch.manual_seed(0)
    AutoModel.from_pretrained(tmp_path)
    assert torch.equal(torch.rand(1), expected)


def test_fields_given_while_loading_are_checked_with_the_saved_ones(family, tmp_path):
    from huggingface_hub.errors import StrictDataclassError

    build_model(family).save_pretrained(tmp_path)
    with pytest.raises(StrictDataclassError, match="'bernoulli'` has two levels, but `num_levels` is 16"):
        AutoModel.from_pretrained(tmp_path, num_levels=16)
    model = AutoModel.from_pretrained(tmp_path, image_size=12)
    assert model.config.image_size == [12, 12]
    assert model.generate().shape == (1, 1, 12, 12)
    model.config.image_size = 4
    assert model.generate().shape == (1, 1, 4, 4)


def test_settings_of_a_later_version_do_not_keep_a_model_from_loading(family, tmp_path, caplog):
    build_model(family).save_pretrained(tmp_path)
    path = tmp_path / "generation_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"temperature": 0.5, "from_the_future": 2}))
    assert AutoModel.from_pretrained(tmp_path).generation_config.temperature == 0.5


def test_a_plain_generation_config_given_while_loading_becomes_ours(family, tmp_path):
    from transformers import GenerationConfig

    build_model(family).save_pretrained(tmp_path / "a")
    model = AutoModel.from_pretrained(tmp_path / "a", generation_config=GenerationConfig(temperature=0.5))
    assert type(model.generation_config).__name__ == "PixelCNNGenerationConfig"
    assert model.generation_config.temperature == 0.5
    model.save_pretrained(tmp_path / "b")


def test_head_and_body_load_into_each_other(family, tmp_path):
    model = build_model(family)
    inputs = random_inputs(model)
    model.save_pretrained(tmp_path / "head")
    body = type(model.model).from_pretrained(tmp_path / "head")
    assert torch.equal(body(**inputs).last_hidden_state, model.model(**inputs).last_hidden_state)
    body.save_pretrained(tmp_path / "body")
    again, report = type(model).from_pretrained(tmp_path / "body", output_loading_info=True)
    assert {name.split(".")[0] for name in report["missing_keys"]} == {"head"}
    assert torch.equal(again.model(**inputs).last_hidden_state, model.model(**inputs).last_hidden_state)


def test_a_bin_file_is_read_only_when_asked_for(family, tmp_path):
    model = build_model(family)
    model.save_pretrained(tmp_path)
    (tmp_path / "model.safetensors").unlink()
    torch.save(model.state_dict(), tmp_path / "pytorch_model.bin")
    with pytest.raises(OSError, match="safetensors"):
        AutoModel.from_pretrained(tmp_path)
    with pytest.raises(OSError, match="safetensors"):
        AutoModel.from_pretrained(tmp_path, use_safetensors=None)
    loaded = AutoModel.from_pretrained(tmp_path, use_safetensors=False)
    inputs = random_inputs(model)
    assert torch.equal(loaded(**inputs).logits, model(**inputs).logits)


def test_a_bin_file_that_is_left_out_is_mentioned(family, tmp_path):
    model = build_model(family)
    model.config.save_pretrained(tmp_path)
    torch.save(model.state_dict(), tmp_path / "pytorch_model.bin")
    with pytest.raises(OSError, match="read only when asked for, with `use_safetensors=False`"):
        AutoModel.from_pretrained(tmp_path)


class RunsCode:
    def __reduce__(self):
        return os.mkdir, ("code from the checkpoint ran",)


def test_pickled_code_is_refused_and_the_way_to_convert_it_works(family, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    model = build_model(family)
    model.config.save_pretrained(tmp_path)
    torch.save({**model.state_dict(), "extra": RunsCode()}, "pytorch_model.bin")
    with pytest.raises(OSError, match=r"contain pickled code.*is not run.*`model.save_pretrained\(folder\)` convert"):
        AutoModel.from_pretrained(tmp_path, use_safetensors=False)
    assert not os.path.exists("code from the checkpoint ran")
    converted = AutoModel.from_config(AutoConfig.from_pretrained(tmp_path))
    torch.save(model.state_dict(), "pytorch_model.bin")
    converted.load_state_dict(torch.load("pytorch_model.bin", weights_only=False))
    converted.save_pretrained(tmp_path / "converted")
    inputs = random_inputs(model)
    assert torch.equal(AutoModel.from_pretrained(tmp_path / "converted")(**inputs).logits, model(**inputs).logits)


def test_weights_that_were_cut_off_are_damaged_and_never_loaded(family, tmp_path):
    for share in [0.0, 0.001, 0.5, 0.999]:
        build_model(family).save_pretrained(tmp_path)
        file = tmp_path / "model.safetensors"
        file.write_bytes(file.read_bytes()[: int(file.stat().st_size * share)])
        with pytest.raises(OSError, match=f"weights of '{tmp_path}' are damaged or cut off"):
            AutoModel.from_pretrained(tmp_path)


def change_config(folder, **changes):
    config = json.loads((folder / "config.json").read_text()) | changes
    (folder / "config.json").write_text(json.dumps({key: value for key, value in config.items() if value is not None}))


def test_a_config_of_a_newer_format_is_refused_by_its_version(family, tmp_path):
    model = build_model(family)
    model.save_pretrained(tmp_path)
    assert json.loads((tmp_path / "config.json").read_text())["format_version"] == 1
    change_config(tmp_path, format_version=None)  # as before there was one
    assert AutoModel.from_pretrained(tmp_path).config.format_version == 1
    with pytest.raises(ValueError, match="`format_version` of a saved config must be an int, got '1'"):
        PixelCNNConfig.from_dict({"format_version": "1"})
    change_config(tmp_path, format_version=7, hidden_size="from another time")
    with pytest.raises(ValueError, match=r"has `format_version` 7.*reads up to 1. Update the package"):
        AutoModel.from_pretrained(tmp_path)


def test_an_unknown_model_type_is_named(tmp_path):
    build_model("pixelcnn").save_pretrained(tmp_path)
    change_config(tmp_path, model_type="pixeltransformer", auto_map=None)
    with pytest.raises(ValueError, match="model type `pixeltransformer`"):
        AutoModel.from_pretrained(tmp_path)


def test_loading_runs_no_code_from_the_folder(family, tmp_path):
    build_model(family).save_pretrained(tmp_path)
    for source in tmp_path.glob("*.py"):
        source.write_text("raise RuntimeError('code from the folder ran')")
    assert type(AutoModel.from_pretrained(tmp_path)) is FAMILIES[family].causal_class


def test_processor_is_found_by_its_folder(tmp_path):
    PixelCNNImageProcessor(num_levels=4).save_pretrained(tmp_path)
    assert type(AutoImageProcessor.from_pretrained(tmp_path)) is PixelCNNImageProcessor
