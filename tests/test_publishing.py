"""The folder that `training/publish.py` writes: complete, checked, and no claim in its card that was not measured."""

import configparser
import json
import math
import re
import shlex
import shutil
import subprocess
from pathlib import Path

import publish
import published_folder
import pytest
import torch
from conftest import ROOT, build_model
from huggingface_hub import ModelCard
from PIL import Image
from safetensors.torch import load_file, save_file
from test_training import one_line_error

from hf_pixelcnn import PixelCNNImageProcessor
from hf_pixelcnn.training import draw_loss_curve, save_picture

pytestmark = pytest.mark.slow

RESULTS = {
    "dataset": "ylecun/mnist",
    "split": "test",
    "num_images": 10000,
    "bits_per_dim": 0.11742,
    "nats_per_dim": 0.08139,
    "training_split": "train[:50000]",
    "num_training_images": 50000,
    "steps": 4686,
    "seed": 0,
    "num_parameters": 307073,
    "command": "train.py --config training/configs/mnist_pixelcnn_binary.yaml --dataset ylecun/mnist",
}


@pytest.fixture
def run(tmp_path):
    """What training/train.py leaves of a small class-conditional model."""
    folder = tmp_path / "run"
    build_model("gated_pixelcnn", num_levels=4, num_classes=3).save_pretrained(folder)
    PixelCNNImageProcessor(num_levels=4).save_pretrained(folder)
    (folder / "results.json").write_text(json.dumps(RESULTS))
    (folder / "recipe.yaml").write_text("hidden_size: 12  # small\n")
    return folder


@pytest.fixture
def unchecked(monkeypatch):
    """Without the process that takes seconds to import transformers."""
    monkeypatch.setattr(publish, "check_folder", lambda folder, model: None)


def test_the_card_says_what_was_measured_and_nothing_else(run, tmp_path, unchecked):
    publish.main(["--model", str(run), "--repo_id", "me/digits", "--dry_run", "true"])
    card = ModelCard.load(run / "hub" / "README.md")
    assert card.data.pipeline_tag == "unconditional-image-generation"
    assert (card.data.library_name, card.data.license, card.data.datasets) == (
        "transformers",
        "apache-2.0",
        ["ylecun/mnist"],
    )
    scores = {score.metric_type: score for score in card.data.eval_results}
    assert {name: score.metric_value for name, score in scores.items()} == {
        "bits_per_dim": 0.1174,
        "nats_per_dim": 0.0814,
    }
    assert scores["bits_per_dim"].dataset_split == "test"
    first, *_ = card.text.split("## Results")
    assert first.index('from_pretrained("me/digits")') < first.index('"me/digits", trust_remote_code=True')
    for text in ("| `ylecun/mnist` | `test` | 10,000 | 0.1174 | 0.0814 |", "4,686 steps", "hidden_size: 12  # small"):
        assert text in card.text
    lines = [line for line in card.text.splitlines() if line]
    assert lines[1].endswith("4 / 256). It reaches **0.1174 bits per dimension** on `test` of `ylecun/mnist`.")
    assert f"python training/{RESULTS['command']}" in card.text
    assert ", seed 0." in card.text
    for unknown in ("nats per image", "minutes", "epochs", "None", "nan"):
        assert unknown not in card.text


def test_the_card_has_words_about_quality_and_a_curve_if_there_are_any(run, tmp_path, unchecked):
    results = RESULTS | {"command": f"{RESULTS['command']} --resume_from_checkpoint last --seed 1"}
    (run / "results.json").write_text(json.dumps(results))
    draw_loss_curve([{"epoch": 1, "step": 3, "loss": 1.0}], run / "loss_curve.png")
    publish.main(["--model", str(run), "--output_dir", str(tmp_path / "hub"), "--quality", "Strokes break."])
    for _ in range(2):  # the second time from what was written
        text = (tmp_path / "hub" / "README.md").read_text()
        assert "seed 0. Strokes break." in text
        assert "](loss_curve.png)" in text
        assert f"python training/{RESULTS['command']} --seed 1\n" in text  # from its start
        publish.main(["--model", str(tmp_path / "hub"), "--output_dir", str(tmp_path / "hub")])
    assert (tmp_path / "hub" / "loss_curve.png").read_bytes() == (run / "loss_curve.png").read_bytes()


def test_the_card_says_how_samples_were_judged_and_how_good_the_judge_is(run, unchecked):
    judged = {"classifier": "judge", "num_images": 1000, "share_of_samples_taken_for_their_class": 0.5}
    words = "; 50.0% of 1,000 samples are taken for their class by `judge`"
    for accuracy, end in (
        ({}, "."),
        ({"accuracy_of_the_classifier": 0.9}, ", which is right about 90.0% of real images."),
    ):
        (run / "results.json").write_text(json.dumps(RESULTS | {"judged": judged | accuracy}))
        publish.main(["--model", str(run), "--repo_id", "me/digits", "--dry_run", "true"])
        assert words + end in (run / "hub" / "README.md").read_text()


def test_a_config_that_does_not_know_the_class_dropout_of_its_run_learns_it(run, tmp_path, unchecked):
    known = "class_dropout: 0.2"
    for results, recipe, expected in (({"class_dropout": 0.1}, known, 0.1), ({}, known, 0.2), ({}, "seed: 0", 0.0)):
        assert published_folder.class_dropout_of(results, recipe) == expected
    assert published_folder.class_dropout_of({}, None) is None
    publish.main(["--model", str(run), "--repo_id", "me/digits", "--dry_run", "true"])
    assert json.loads((run / "hub" / "config.json").read_text())["class_dropout"] == 0.0


def test_without_results_the_card_claims_nothing(run, tmp_path, unchecked):
    (run / "results.json").unlink()
    (run / "recipe.yaml").unlink()
    publish.main(["--model", str(run), "--output_dir", str(tmp_path / "hub")])
    card = ModelCard.load(tmp_path / "hub" / "README.md")
    assert card.data.eval_results is None
    assert "## Results" not in card.text
    assert "## Training" not in card.text
    assert (tmp_path / "hub" / "samples.png").exists()


def test_a_model_of_codes_has_no_image_processor_in_its_card(tmp_path, unchecked):
    build_model("pixelcnn", num_levels=300, input_encoding="embedding").save_pretrained(tmp_path / "run")
    publish.main(["--model", str(tmp_path / "run")])
    text = (tmp_path / "run" / "hub" / "README.md").read_text()
    assert "300 symbols" in text
    assert "AutoImageProcessor" not in text
    assert not (tmp_path / "run" / "hub" / "preprocessor_config.json").exists()


def test_a_local_data_set_gets_the_name_it_is_known_by(run, tmp_path, unchecked):
    results = RESULTS | {"dataset": str(tmp_path), "command": f"train.py --dataset {tmp_path} --seed 1"}
    (run / "results.json").write_text(json.dumps(results))
    assert "the run read a local data set" in one_line_error(publish.main, ["--model", run])
    publish.main(["--model", str(run), "--dataset", "ylecun/mnist", "--repo_id", "me/digits", "--dry_run", "true"])
    for name in ("README.md", "results.json"):
        text = (run / "hub" / name).read_text()
        assert str(tmp_path) not in text
        assert "train.py --dataset ylecun/mnist --seed 1" in text


def test_a_published_folder_is_brought_up_to_date_in_place(run, tmp_path, unchecked):
    publish.main(["--model", str(run), "--output_dir", str(tmp_path / "hub"), "--max_shard_size", "3KB"])
    before = {path.name: path.read_bytes() for path in (tmp_path / "hub").iterdir()}
    assert "model.safetensors.index.json" in before
    (tmp_path / "hub" / "modeling_gated_pixelcnn.py").write_text("old")
    publish.main(["--model", str(tmp_path / "hub"), "--output_dir", str(tmp_path / "hub")])
    after = {path.name: path.read_bytes() for path in (tmp_path / "hub").iterdir()}
    assert after.keys() - before.keys() == {"model.safetensors"}  # in one file again
    assert all(name.startswith("model-") or name.endswith("index.json") for name in before.keys() - after.keys())
    assert all(after[name] == before[name] for name in before.keys() & after.keys())
    assert {path.name for path in tmp_path.iterdir()} == {"run", "hub"}  # no scratch folder is left


def test_folders_that_hold_something_else_are_left_alone(run, tmp_path, unchecked):
    def refused(place):
        return one_line_error(publish.main, ["--model", run, "--output_dir", place])

    before = {path.name: path.read_bytes() for path in run.iterdir()}
    assert "holds files that this script did not write" in refused(run)
    notes = tmp_path / "notes"
    notes.mkdir()
    (notes / "README.md").write_text("mine")
    (notes / "analysis.py").write_text("")
    assert "did not write (README.md, analysis.py)" in refused(notes)
    publish.main(["--model", str(run), "--output_dir", str(tmp_path / "hub")])
    for name in ("notes.png", "mine.py", "notes.json", "model-mine.safetensors", ".env"):
        (tmp_path / "hub" / name).write_text("")
        assert f"did not write ({name})" in refused(tmp_path / "hub")
        (tmp_path / "hub" / name).unlink()
    (tmp_path / "hub" / "folder").mkdir()
    assert "did not write (folder)" in refused(tmp_path / "hub")
    (tmp_path / "hub" / "folder").rmdir()
    (tmp_path / "link").symlink_to(tmp_path / "hub")
    (tmp_path / "notes.txt").write_text("mine")
    for name in ("link", "notes.txt"):
        assert f"{name} is a file or a link, not a folder" in refused(tmp_path / name)
    assert "cannot write into /" in refused("/")
    assert {path.name: path.read_bytes() for path in run.iterdir()} == before
    assert (tmp_path / "notes.txt").read_text() == "mine"


@pytest.mark.parametrize("failing", [1, 2])
@pytest.mark.parametrize("error", [OSError, KeyboardInterrupt])
def test_the_only_copy_of_a_model_survives_a_rename_that_fails(run, tmp_path, unchecked, monkeypatch, failing, error):
    hub = tmp_path / "hub"
    publish.main(["--model", str(run), "--output_dir", str(hub)])
    before = {path.name: path.read_bytes() for path in hub.iterdir()}
    rename, calls = Path.rename, []

    def fails_once(path, target):
        calls.append(path)
        if len(calls) == failing:
            raise error("no")
        return rename(path, target)

    monkeypatch.setattr(Path, "rename", fails_once)
    with pytest.raises((SystemExit, KeyboardInterrupt)):
        publish.main(["--model", str(hub), "--output_dir", str(hub)])
    assert {path.name: path.read_bytes() for path in hub.iterdir()} == before
    assert {path.name for path in tmp_path.iterdir()} == {"run", "hub"}


@pytest.mark.parametrize("state", ["half a new one", "the old one aside", "both in place"])
def test_the_next_call_clears_what_a_killed_one_left(run, tmp_path, unchecked, state):
    hub = tmp_path / "hub"
    publish.main(["--model", str(run), "--output_dir", str(hub)])
    before = {path.name for path in hub.iterdir()}
    new, old = published_folder.beside(hub, "new"), published_folder.beside(hub, "old")
    if state == "half a new one":
        new.mkdir()
    else:
        shutil.copytree(hub, old)
    if state == "the old one aside":
        shutil.rmtree(hub)
    publish.main(["--model", str(hub), "--output_dir", str(hub)])
    assert {path.name for path in hub.iterdir()} == before
    assert {path.name for path in tmp_path.iterdir()} == {"run", "hub"}


def test_a_broken_model_is_not_published(run, unchecked):
    weights = load_file(run / "model.safetensors")
    weights["head.layers.0.bias"][0] = torch.nan
    save_file(weights, run / "model.safetensors", metadata={"format": "pt"})
    assert "NaN or infinite numbers are in 1 of its tensors" in one_line_error(publish.main, ["--model", run])
    assert not (run / "hub").exists()


def test_what_cannot_be_published_is_answered_in_one_line(run, tmp_path, unchecked):
    words = ["--model", run]
    for message, more in {
        "--repo_id must be USER/digits": ["--repo_id", "digits"],
        "--repo_id:": ["--repo_id", "a/b/c"],
        "No such file": ["--recipe", tmp_path / "missing.yaml"],
        "cannot load a model": ["--model", tmp_path],
    }.items():
        assert message in one_line_error(publish.main, [*words, *more])
        assert not (run / "hub").exists()
    (run / "results.json").write_text("[]")
    assert "is not what training/train.py writes" in one_line_error(publish.main, words)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["run"]


def test_a_folder_that_gives_other_numbers_without_the_package_is_not_published(run, unchecked):
    publish.main(["--model", str(run)])
    folder = run / "hub"
    model, _ = published_folder.load_model(str(run))
    weights = load_file(folder / "model.safetensors")
    weights["head.layers.2.bias"] = torch.nextafter(weights["head.layers.2.bias"], torch.tensor(torch.inf))
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(publish.InputError, match="gives other logits"):
        published_folder.check_folder(folder, model)


PUBLISHED = sorted(path.parent for path in ROOT.glob("model_cards/*/config.json"))


@pytest.mark.parametrize("folder", PUBLISHED, ids=lambda path: path.name)
def test_the_folders_in_model_cards_are_what_publish_writes_today(folder, tmp_path, monkeypatch):
    """Less the source files, which git holds once; `make cards` brings the rest up to date."""
    if folder != PUBLISHED[0]:  # one is really loaded without the package; test_checkpoints.py does so for each family
        monkeypatch.setattr(publish, "check_folder", lambda folder, model: None)
    results = json.loads((folder / "results.json").read_text())
    recipe = ROOT / re.search(r"--config (\S+)", results["command"])[1]
    assert (folder / "recipe.yaml").read_text() == recipe.read_text()  # the one that the command names
    assert results["split"] == "test"
    place = str(folder.relative_to(ROOT))
    shutil.copytree(folder, tmp_path / place, ignore=shutil.ignore_patterns("*.py", "__pycache__"))
    monkeypatch.chdir(tmp_path)
    publish.main(["--model", place, "--output_dir", place])
    written = {path.name: path.read_bytes() for path in (tmp_path / place).iterdir() if path.suffix != ".py"}
    tracked = subprocess.run(["git", "ls-files", place], cwd=ROOT, capture_output=True, text=True, check=False).stdout
    names = {Path(name).name for name in tracked.split()} or {path.name for path in folder.iterdir()}
    assert written == {name: (folder / name).read_bytes() for name in names if not name.endswith(".py")}
    assert any(path.suffix == ".py" for path in (tmp_path / place).iterdir())


def test_the_package_ships_its_files_that_are_not_python():
    options = configparser.ConfigParser()
    options.read(ROOT / "setup.cfg")
    shipped = dict(options["options.package_data"])
    for package in ("hf_pixelcnn", "hf_pixelcnn.app", "hf_pixelcnn.training"):
        files = {path.name for path in (ROOT / package.replace(".", "/")).iterdir() if path.is_file()}
        assert {name for name in files if not name.endswith(".py")} == set(shipped[package].split(", "))


def test_no_source_file_is_held_twice():
    tracked = subprocess.run(["git", "ls-files", "model_cards"], cwd=ROOT, capture_output=True, text=True, check=False)
    assert not [name for name in tracked.stdout.split() if name.endswith(".py")]


def test_a_command_that_names_a_machine_or_holds_a_secret_is_not_published(run, unchecked):
    cases = [
        "/home/someone/digits",
        "~/digits",
        "C:\\digits",
        "file:///home/someone/d",
        "../../someone/d",
        '{"train":"/home/someone/x"}',
        "my_hf_" + "a" * 34,
        "https://me:secret@host/x",
        "git@host:someone/x",
        "//server/someone/x",
        "\\\\server\\someone",
        "ghp_" + "a" * 36,
        "AKIA" + "A" * 16,
        "hub_token: anything",
    ]
    for word in cases:
        results = RESULTS | {"command": f"train.py --dataset ylecun/mnist --option {shlex.quote(word)}"}
        (run / "results.json").write_text(json.dumps(results))
        assert "a path of this machine, or a secret" in one_line_error(publish.main, ["--model", run])
        (run / "results.json").write_text(json.dumps(RESULTS))
        (run / "recipe.yaml").write_text(f"hidden_size: 12\noption: {json.dumps(word)}\n")
        assert "recipe.yaml holds" in one_line_error(publish.main, ["--model", run])
        (run / "recipe.yaml").unlink()
        (run / "results.json").write_text(json.dumps(RESULTS | {"judged": {"by": [word]}}))
        assert f"results.json holds {word!r}" in one_line_error(publish.main, ["--model", run])
        (run / "results.json").write_text(json.dumps(RESULTS))
        save_picture(Image.new("L", (4, 4)), run / "samples.png", model=word)
        assert f"samples.png holds {word!r}" in one_line_error(publish.main, ["--model", run])
        (run / "samples.png").unlink()
        assert not (run / "hub").exists()
    publish.main(["--model", str(run), "--quality", "about ~5% of the digits are none, 3/4 are good"])


def test_a_picture_says_nothing_beside_its_pixels_that_is_not_public(run, unchecked):
    path, exif = run / "loss_curve.png", Image.Exif()
    exif[0x010E] = "from /home/someone/x"  # its description
    Image.new("L", (4, 4)).save(path, exif=exif)
    assert "a path of this machine, or a secret" in one_line_error(publish.main, ["--model", run])
    Image.new("L", (4, 4)).save(path)
    path.write_bytes(path.read_bytes() + b"hf_")
    assert "loss_curve.png goes on after the end of its picture" in one_line_error(publish.main, ["--model", run])
    Image.new("L", (4, 4)).save(path, "JPEG")
    assert "loss_curve.png cannot be used as an image" in one_line_error(publish.main, ["--model", run])
    assert not (run / "hub").exists()


def test_results_and_recipes_that_nobody_can_read_are_answered_in_one_line(run, unchecked):
    cases = {"dataset": [1], "bits_per_dim": math.nan, "nats_per_dim": "low", "steps": None, "command": 3}
    for name, value in cases.items():
        (run / "results.json").write_text(json.dumps(RESULTS | {name: value}))
        message = one_line_error(publish.main, ["--model", run])
        assert re.search(f"results.json: `{name}` must be (text|a finite number), got ", message)
    (run / "results.json").write_text(json.dumps(RESULTS))
    for recipe in (b"\xff\xfe", b"[" * 5000, b"3"):
        (run / "recipe.yaml").write_bytes(recipe)
        assert "recipe.yaml is not a recipe" in one_line_error(publish.main, ["--model", run])


def test_paths_inside_the_project_become_relative_ones():
    command = f"train.py --config {ROOT}/training/configs/mnist_gated.yaml --output_dir={ROOT}/runs/x --dataset /data/a"
    expected = "train.py --config training/configs/mnist_gated.yaml --output_dir=runs/x --dataset me/a"
    assert published_folder.portable_command(command, {"/data/a": "me/a"}) == expected
