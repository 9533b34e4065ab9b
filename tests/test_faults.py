"""
Whatever fails while a script writes, every file and folder is left whole, old or new, and the exit code says so.

By default each script meets faults at some of its operations, with `--thorough` at every one of them.
"""

import json
import os
import shutil
import signal
import subprocess
import sys
import time
import zipfile
from pathlib import Path

import compress
import convert_pixelcnnpp_checkpoint
import judge
import numpy as np
import outliers
import publish
import pytest
import receptive_field
import sample
import score
import torch
import train
from conftest import DIGITS, ROOT, build_model, one_line_error
from faults import Faults, no_room_for
from PIL import Image
from safetensors import safe_open
from test_conversion import port_state_dict

from hf_pixelcnn import PixelCNNImageProcessor
from hf_pixelcnn.compressed_stream import read_stream
from hf_pixelcnn.training.files import held

pytestmark = pytest.mark.slow

RUN = ["--train_split", "train[:8]", "--eval_split", "test[:3]", "--image_size", "6", "--hidden_size", "4"]
RUN += ["--num_hidden_layers", "1", "--head_hidden_size", "4", "--first_kernel_size", "3", "--num_samples", "1"]
RUN += ["--binarization", "threshold", "--per_device_train_batch_size", "4", "--ema_decay", "0.5"]
RUN += ["--eval_strategy", "no", "--save_strategy", "steps", "--save_steps", "2"]
RUN += ["--use_cpu", "true", "--disable_tqdm", "true"]


def read_whole(path: Path):
    """Raise unless a file is what its name says."""
    if path.suffix == ".json":
        json.loads(path.read_text())
    elif path.suffix == ".png":
        Image.open(path).load()
    elif path.suffix == ".safetensors":
        with safe_open(path, "pt") as file:
            assert list(file.keys())
    elif path.suffix in (".pt", ".pth"):
        assert zipfile.ZipFile(path).testzip() is None
    elif path.suffix == ".pxc":
        read_stream(path.read_bytes())
    else:
        assert path.stat().st_size


def files_below(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def check_left(root: Path, before: dict[str, bytes], gone: set[str]):
    """All files are there, old or whole; only a checkpoint may be half written, which has no state then."""
    after = files_below(root)
    assert not before.keys() - after.keys() - gone
    for name in after:
        path = root / name
        assert not any(part.startswith(".") for part in Path(name).parts), name
        is_half = "checkpoint-" in path.parent.name and not (path.parent / "trainer_state.json").exists()
        if before.get(name) != after[name] and not is_half:
            read_whole(path)


def meet_faults(main, words, root: Path, capsys, every: int, gone=frozenset()):
    """Run a script on copies of `root`, with a full disk or an interrupt at every n-th of its operations there."""
    origin, words = root.with_name("origin"), [str(word) for word in words]
    shutil.copytree(root, origin)
    before = files_below(root)

    def renewed():
        shutil.rmtree(root)
        shutil.copytree(origin, root)

    with Faults(root) as counted:
        main(words)
    assert counted.seen
    for at in range(0, len(counted.seen), every):
        for is_interrupt in (False, True) if every == 1 else (at // every % 2 == 1,):
            renewed()
            with Faults(root, at, is_interrupt), pytest.raises(SystemExit) as ended:
                main(words)
            message = ended.value.code if not is_interrupt else capsys.readouterr().err.strip().splitlines()[-1]
            assert message.startswith("interrupted." if is_interrupt else "error: "), (counted.seen[at], message)
            assert "\n" not in message
            assert not is_interrupt or ended.value.code == 130
            check_left(root, before, gone)
    for size in (0, 50):  # also what Python does not see; the larger ones of the files do not fit
        renewed()
        with no_room_for(size):
            assert "error: " in one_line_error(main, words)
        check_left(root, before, gone)
    renewed()
    main(words)  # and nothing stands in the way of the next call
    check_left(root, before, gone)


@pytest.fixture
def root(tmp_path):
    """A folder with a model, from which the faults start."""
    (tmp_path / "root").mkdir()
    model = build_model("pixelcnn", num_levels=4, num_classes=10)
    for folder in (tmp_path / "model", tmp_path / "root" / "run"):
        model.save_pretrained(folder)
        PixelCNNImageProcessor(num_levels=4, size={"height": 5, "width": 6}).save_pretrained(folder)
    return tmp_path / "root"


@pytest.fixture
def every(request):
    return lambda number: 1 if request.config.getoption("--thorough") else number


def test_a_run_of_training_goes_on_after_any_fault(tmp_path, capsys, every):
    root = tmp_path / "root"
    words = [*RUN, "--dataset", DIGITS, "--cache_dir", str(tmp_path / "cache"), "--output_dir", str(root / "run")]
    train.main([*words, "--max_steps", "2"])
    words += ["--max_steps", "4", "--resume_from_checkpoint", "last"]
    meet_faults(train.main, words, root, capsys, every(12), gone={"run/results.json"})
    assert json.loads((root / "run" / "results.json").read_text())["steps"] == 4
    assert not list(root.rglob("run/training_args.bin"))  # with folders and tokens; only checkpoints have theirs


def test_a_folder_to_publish_is_old_or_new(root, tmp_path, capsys, monkeypatch, every):
    monkeypatch.setattr(publish, "check_folder", lambda folder, model: None)
    words = ["--model", root / "run", "--output_dir", root / "hub"]
    publish.main([str(word) for word in words])
    meet_faults(publish.main, words, root, capsys, every(3))


def test_a_converted_model_is_there_as_a_whole(tmp_path, capsys, every):
    root = tmp_path / "root"
    root.mkdir()
    torch.save(port_state_dict(1), tmp_path / "port.pth")
    words = ["--checkpoint", tmp_path / "port.pth", "--output_dir", root / "ours", "--image_size", "8"]
    meet_faults(convert_pixelcnnpp_checkpoint.main, words, root, capsys, every(3))


def test_pictures_scores_and_streams_are_old_or_new(root, tmp_path, capsys, every):
    model, cache = root / "run", ["--cache_dir", tmp_path / "cache"]
    (tmp_path / "images").mkdir()
    for index in range(2):
        Image.fromarray(np.full((5, 6), 100 * index, dtype=np.uint8)).save(tmp_path / "images" / f"{index}.png")
    data, few = ["--dataset", DIGITS, "--split", "test[:3]", *cache], ["--num_images", "2"]
    sets = ["--in_dataset", DIGITS, "--in_split", "test[:3]", "--out_dataset", DIGITS, "--out_split", "test[3:6]"]
    cases = {
        "samples.png": (sample.main, ["--model", model, *few]),
        "score.json": (score.main, ["--model", model, *data, "--heat_map", root / "map.png"]),
        "outliers.json": (outliers.main, ["--model", model, *sets, "--typical_split", "train[:2]", *cache]),
        "judge.json": (judge.main, ["--model", model, "--classifier", model, *few]),
        "field.png": (receptive_field.main, ["--models", model]),
        "images.pxc": (compress.main, ["compress", "--model", model, "--input", tmp_path / "images"]),
    }
    for name, (main, words) in cases.items():
        words = [str(word) for word in [*words, "--output", root / name]]
        main(words)  # so that an old one is there
        meet_faults(main, words, root, capsys, every(2))
        shutil.rmtree(root.with_name("origin"))
    words = ["--model", model, *few, "--output", f"{root}/samples/"]
    meet_faults(sample.main, words, root, capsys, every(2))
    shutil.rmtree(root.with_name("origin"))
    words = ["decompress", "--model", model, "--input", root / "images.pxc", "--output", root / "restored"]
    meet_faults(compress.main, words, root, capsys, every(2))


def test_a_run_has_its_folder_for_itself_and_says_how_to_go_on_when_it_is_told_to_end(tmp_path):
    run = tmp_path / "run"
    words = [*RUN, "--dataset", DIGITS, "--cache_dir", str(tmp_path / "cache"), "--output_dir", str(run)]
    more = ["--max_steps", "1000000", "--save_total_limit", "2"]
    command = [sys.executable, str(ROOT / "training" / "train.py"), *words, *more]
    script = subprocess.Popen(command, stderr=subprocess.PIPE, stdout=subprocess.DEVNULL, text=True)
    try:
        deadline = time.monotonic() + 300  # of a busy machine
        while not list(run.glob("run/checkpoint-*/trainer_state.json")) and time.monotonic() < deadline:
            time.sleep(0.1)
        message = one_line_error(train.main, [*words, "--resume_from_checkpoint", "last"])
        assert "another process is writing into" in message
        script.send_signal(signal.SIGTERM)
        _, errors = script.communicate(timeout=60)
    finally:
        script.kill()
    assert script.returncode == 143
    assert "Traceback" not in errors
    assert "terminated. To continue from " in errors.splitlines()[-1]
    with held(run):  # free again, however the other one ended
        assert {path.name for path in tmp_path.iterdir()} == {"cache", "run", ".run.lock"}


def damage(path: Path):
    data = bytearray(path.read_bytes())
    data[len(data) // 2 :] = os.urandom(len(data) // 3)
    path.write_bytes(data)


def test_a_damaged_checkpoint_is_named_and_the_one_before_it_is_taken(tmp_path, caplog):
    output, run = tmp_path / "run", tmp_path / "run" / "run"
    words = [*RUN, "--dataset", DIGITS, "--cache_dir", str(tmp_path / "cache"), "--output_dir", str(output)]
    train.main([*words, "--max_steps", "4"])
    saved = tmp_path / "saved"
    shutil.copytree(run, saved)
    more = [*words, "--max_steps", "6", "--resume_from_checkpoint"]
    weights, states = ("model.safetensors", "ema.safetensors"), ("optimizer.pt", "scheduler.pt", "rng_state.pth")
    for name in (*weights, *states, "trainer_state.json"):
        damage(run / "checkpoint-4" / name)
        message = one_line_error(train.main, [*more, str(run / "checkpoint-4")])
        assert f"checkpoint-4/{name} is damaged" in message
        assert message.endswith(f"continue from {run / 'checkpoint-2'}.")
        shutil.copy(saved / "checkpoint-4" / name, run / "checkpoint-4" / name)
    (run / "checkpoint-4" / "model.safetensors").unlink()
    message = one_line_error(train.main, [*more, str(run / "checkpoint-4")])
    assert "checkpoint-4/model.safetensors is missing" in message
    shutil.copy(saved / "checkpoint-4" / "model.safetensors", run / "checkpoint-4")
    (run / "checkpoint-4" / "optimizer.pt").unlink()
    assert "checkpoint-4/optimizer.pt is missing" in one_line_error(train.main, [*more, str(run / "checkpoint-4")])
    caplog.clear()
    train.main([*more, "last"])
    assert "checkpoint-4/optimizer.pt is missing; going back to the checkpoint before" in caplog.text
    state = json.loads((run / "checkpoint-6" / "trainer_state.json").read_text())
    assert [row["step"] for row in state["log_history"] if "loss" in row] == [2, 4, 6]
