"""What the README shows works."""

import importlib.util
import json
import re
import shlex
import sys
from dataclasses import fields, is_dataclass
from importlib.util import find_spec
from pathlib import Path

import publish
import pytest
import train_arguments
from huggingface_hub import ModelCard

pytestmark = pytest.mark.slow

ROOT = Path(__file__).parent.parent
README = (ROOT / "README.md").read_text(encoding="utf-8")
EXAMPLES = (ROOT / "training" / "EXAMPLES.md").read_text(encoding="utf-8")


def blocks_of(text):
    return re.findall(r"^```(\w+)\n(.*?)^```", text, re.MULTILINE | re.DOTALL)


BLOCKS = blocks_of(README)
IN_SHORT = {  # what is added to a command of the README, so that a test can run it
    "train": "--max_steps 2 --num_samples 4 --eval_split test[:8] --train_split train[:64] --bf16 false",
    "score": "--split test[:8] --num_heat_maps 4",
    "sample": "--num_images 4",
    "compress": "",
    "publish": "",
}


def test_python_blocks_run_in_order(tmp_path, monkeypatch):
    for folder in ("model_cards", "tests"):
        (tmp_path / folder).symlink_to(ROOT / folder)
    monkeypatch.chdir(tmp_path)  # some of them write
    blocks = [code for language, code in BLOCKS if language == "python"]
    assert len(blocks) >= 3
    names = {}
    for code in blocks:
        exec(compile(code, "README.md", "exec"), names)
    assert len(names["images"]) == 16
    assert names["completions"].shape == (6, 1, 28, 28)
    assert (tmp_path / "digits.png").exists()
    assert (tmp_path / "runs" / "digits" / "preprocessor_config.json").exists()


@pytest.mark.filterwarnings("ignore:.*LeafSpec:FutureWarning")  # of torch.onnx
def test_the_worked_examples_run_in_order(tmp_path, monkeypatch):
    for folder in ("model_cards", "tests", "training"):
        (tmp_path / folder).symlink_to(ROOT / folder)
    monkeypatch.chdir(tmp_path)
    names = {}
    for language, code in blocks_of(EXAMPLES):
        if language == "python" and ("onnx" not in code or all(map(find_spec, ("onnxruntime", "onnxscript")))):
            exec(compile(code, "EXAMPLES.md", "exec"), names)
    assert len(names["answers"]) == 3


def test_shell_blocks_run_in_order_with_what_comes_along(tmp_path, monkeypatch):
    for folder in ("model_cards", "tests", "training"):
        (tmp_path / folder).symlink_to(ROOT / folder)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(publish, "check_folder", lambda folder, model: None)
    run = []
    for line in (line for language, code in BLOCKS if language == "bash" for line in code.splitlines()):
        program, *words = shlex.split(line, comments=True)
        if program == "python" and words[0] != "-m":
            name = Path(words[0]).stem
            importlib.import_module(name).main([*words[1:], *IN_SHORT[name].split()])
            run.append(name)
    assert {"train", "score", "sample", "compress", "publish"} == set(run)
    for path in ("surprise.png", "digits/00003.png", "digits.pxc", "runs/mnist_gated/results.json", "samples.png"):
        assert (tmp_path / path).exists(), path


CARDS = sorted(ROOT.glob("model_cards/*-*/README.md"))
# `publish.py` writes the same code into all cards, see test_publishing.py; the second block is run for one of a family.
ONE_OF_EACH_FAMILY = {json.loads(card.with_name("config.json").read_text())["model_type"]: card for card in CARDS}


@pytest.mark.parametrize("card", CARDS, ids=lambda path: path.parent.name)
def test_the_code_of_a_model_card_runs_and_its_numbers_are_those_of_the_results(card, tmp_path, monkeypatch):
    monkeypatch.setattr(publish, "check_folder", lambda folder, model: None)
    text = card.read_text(encoding="utf-8")
    with_package, without_package = re.findall(r"^```python\n(.*?)^```", text, re.MULTILINE | re.DOTALL)
    names = {}
    monkeypatch.chdir(ROOT)
    exec(compile(with_package, str(card), "exec"), names)
    assert len(names["images"]) == 4
    if card in ONE_OF_EACH_FAMILY.values():
        command = re.search(r"`python training/publish.py ([^`]*)`", text)[1]  # it writes the folder with source files
        model, output_dir = command.split()[1::2]
        publish.main(["--model", str(ROOT / model), "--output_dir", str(tmp_path / output_dir)])
        monkeypatch.chdir(tmp_path)
        exec(compile(without_package, str(card), "exec"), names)
        assert len(names["images"]) == 4
    results = json.loads((card.parent / "results.json").read_text(encoding="utf-8"))
    assert results["num_parameters"] == names["model"].num_parameters()
    scores = {score.metric_type: score.metric_value for score in ModelCard(text).data.eval_results}
    for name in ("nats_per_dim", "bits_per_dim"):
        assert f" {results[name]:.4f} |" in text
        assert scores[name] == round(results[name], 4)


def options_of(script):
    """Options of a script in `training/`, without running it."""
    if script == "train":  # whose options are those of several classes
        return {option for action in train_arguments.make_parser()._actions for option in action.option_strings}
    spec = importlib.util.spec_from_file_location(f"script_{script}", ROOT / "training" / f"{script}.py")
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    arguments = [value for name, value in vars(module).items() if name.endswith("Arguments") and is_dataclass(value)]
    return {f"--{field.name}" for dataclass in arguments for field in fields(dataclass)}


def test_nothing_is_left_to_fill_in():
    documents = [*ROOT.glob("*.md"), *ROOT.glob("model_cards/*/README.md"), *ROOT.glob("training/configs/*.yaml")]
    for document in documents:
        assert not re.search(r"\{[A-Z]+\}|TODO|FIXME", document.read_text(encoding="utf-8")), document


def test_shell_blocks_name_targets_scripts_and_options_that_exist():
    blocks = [*BLOCKS, *blocks_of(EXAMPLES)]
    commands = [
        line.split("#")[0].strip() for language, code in blocks if language == "bash" for line in code.splitlines()
    ]
    assert [command for command in commands if command.startswith("make")][:2] == ["make demo", "make test"]
    makefile = (ROOT / "Makefile").read_text(encoding="utf-8")
    for command in filter(None, commands):
        program, *words = command.split()
        if program == "make":
            assert all(re.search(rf"^{target}:", makefile, re.MULTILINE) for target in words), command
        elif program == "python":
            options = {option for option in words if option.startswith("--")} - {"--config"}
            assert options <= options_of(Path(words[0]).stem), command
            for path in (word for word in words if word.startswith("training/")):
                assert (ROOT / path).exists(), command
        else:
            assert program in ("pip", "tensorboard"), command


@pytest.mark.parametrize("document", sorted(path.name for path in ROOT.glob("*.md")))
def test_local_links_lead_somewhere(document):
    text = (ROOT / document).read_text(encoding="utf-8")
    links = re.findall(r"\]\(([^)#]+)\)", text) + re.findall(r'src="([^"]+)"', text)
    for link in links:
        assert link.startswith("https://") or (ROOT / link).exists(), link
