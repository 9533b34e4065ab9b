"""Training: sums and averages that must be exact, runs that continue where they stopped, and the scripts."""

import io
import itertools
import json
import math
import os
import re
import shutil
import subprocess
import sys
from types import SimpleNamespace

import datasets
import numpy as np
import pytest
import sample
import score
import torch
import train
from conftest import DIGITS, ROOT, bomb, one_line_error, strengthen_classes
from PIL import Image
from safetensors.torch import load_file
from transformers import AutoModel, TrainerCallback
from transformers.integrations import integration_utils
from transformers.models.auto.image_processing_auto import AutoImageProcessor  # the real class in every version

from hf_pixelcnn import (
    GatedPixelCNNConfig,
    GatedPixelCNNForCausalImageModeling,
    PixelCNNConfig,
    PixelCNNForCausalImageModeling,
    PixelCNNImageProcessor,
    training,
)
from hf_pixelcnn.training import (
    DataCollatorForCausalImageModeling,
    InputError,
    PixelCNNTrainer,
    PixelCNNTrainingArguments,
    last_checkpoint,
    records,
)
from hf_pixelcnn.training.data_sources import find_image_column
from hf_pixelcnn.training.level_dataset import check_classes_of

pytestmark = [pytest.mark.versions, pytest.mark.slow]

TINY = ["--hidden_size", "8", "--num_hidden_layers", "2", "--head_hidden_size", "8", "--first_kernel_size", "3"]


def random_images(num_images, num_levels=4, size=6, seed=0):
    levels = np.random.default_rng(seed).integers(num_levels, size=(num_images, 1, size, size), dtype=np.uint8)
    return [{"pixel_values": image} for image in levels]


def gated_model(seed=0, dropout=0.0, **config):
    torch.manual_seed(seed)
    sizes = {"hidden_size": 6, "num_hidden_layers": 2, "head_hidden_size": 6, "first_kernel_size": 3}
    return GatedPixelCNNForCausalImageModeling(
        GatedPixelCNNConfig(**{"image_size": 6, "num_levels": 4, **sizes, "dropout": dropout, **config})
    )


def trainer_for(folder, model, images, callbacks=None, eval_images=None, **options):
    defaults = {
        "per_device_train_batch_size": 4,
        "learning_rate": 0.05,
        "logging_steps": 1,
        "eval_strategy": "no",
        "save_strategy": "no",
        "disable_tqdm": True,
        "use_cpu": True,
    }
    args = PixelCNNTrainingArguments(output_dir=str(folder), **{**defaults, **options})
    return PixelCNNTrainer(model, args, train_dataset=images, eval_dataset=eval_images, callbacks=callbacks)


def train_losses(log_history):
    return [row["loss"] for row in log_history if "loss" in row]


def weights_of(model):
    return {name: tensor.clone() for name, tensor in model.state_dict().items()}


def assert_same(left, right, **tolerances):
    assert left.keys() == right.keys()
    for name in left:
        torch.testing.assert_close(left[name], right[name], **(tolerances or {"rtol": 0, "atol": 0}))


@pytest.fixture(autouse=True)
def one_thread():
    """Models this small are slower with several threads, above all on a busy machine."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


# The trainer


def test_accumulating_twice_four_images_equals_a_batch_of_eight(tmp_path):
    outcomes = []
    for batch, accumulation in [(8, 1), (4, 2)]:
        options = {"per_device_train_batch_size": batch, "gradient_accumulation_steps": accumulation, "optim": "sgd"}
        trainer = trainer_for(tmp_path, gated_model(), random_images(24), num_train_epochs=2, **options)
        trainer.train()
        outcomes.append((train_losses(trainer.state.log_history), weights_of(trainer.model)))
    (losses, weights), (accumulated_losses, accumulated_weights) = outcomes
    assert len(losses) == 6
    assert losses == pytest.approx(accumulated_losses, abs=1e-6)
    assert_same(weights, accumulated_weights, rtol=1e-5, atol=1e-6)


def test_evaluation_takes_the_collator_and_each_of_several_data_sets(tmp_path):
    rows = [{**image, "label": index % 3} for index, image in enumerate(random_images(8))]
    model = strengthen_classes(gated_model(num_classes=3))
    args = {"per_device_train_batch_size": 4, "max_steps": 1, "report_to": [], "use_cpu": True}
    trainer = PixelCNNTrainer(
        model,
        PixelCNNTrainingArguments(str(tmp_path), remove_unused_columns=False, **args),
        DataCollatorForCausalImageModeling(class_column="label"),
        train_dataset=rows,
        eval_dataset={"first": rows[:4], "last": rows[4:]},
    )
    metrics = trainer.evaluate()
    for name, own in [("first", rows[:4]), ("last", rows[4:])]:
        batch = {name: torch.tensor(np.stack([row[name] for row in own])) for name in ("pixel_values", "label")}
        nats = -model.log_prob(batch["pixel_values"], class_ids=batch["label"]).mean().item()
        assert metrics[f"eval_{name}_loss"] == pytest.approx(nats, rel=1e-5)
    trainer.train()  # and evaluates after its epoch
    trainer.eval_dataset = None
    with pytest.raises(ValueError, match="`eval_dataset` is needed"):
        trainer.evaluate()


def test_the_clock_stands_still_between_training_and_evaluation(tmp_path):
    images = random_images(8)
    trainer = trainer_for(tmp_path, gated_model(), images, eval_images=images, max_steps=1)
    trainer.train()
    assert trainer.state.log_history[-1]["seconds"] > 0
    trainer.evaluate()
    assert "seconds" not in trainer.state.log_history[-1]


def test_the_commit_is_that_of_this_package_alone(tmp_path, monkeypatch):
    monkeypatch.setenv("GIT_CONFIG_GLOBAL", os.devnull)
    shutil.copy(training.records.__file__, tmp_path / "records.py")
    monkeypatch.setattr(training.records, "__file__", str(tmp_path / "records.py"))

    def git(*words):
        subprocess.run(["git", "-c", "user.name=a", "-c", "user.email=a@b.c", *words], cwd=tmp_path, check=True)

    git("init", "-q")
    git("commit", "-q", "--allow-empty", "-m", "somebody's own work")
    assert training.records.git_commit() is None
    git("add", "records.py")
    git("commit", "-q", "-m", "ours")
    assert len(training.records.git_commit()) == 40
    (tmp_path / "records.py").write_text("# changed")
    assert training.records.git_commit().endswith("+changes")


@pytest.fixture
def grey_digits(tmp_path):
    """Sixteen digits of 6×6, binarised anew in each epoch."""
    rows = training.load_split(DIGITS, "train[:16]", cache_dir=str(tmp_path / "cache"))
    processor = PixelCNNImageProcessor(num_levels=2, binarization="stochastic", size=6)
    return lambda: training.LevelDataset(rows, 2, processor, seed=3)


# in the middle and at the end of an epoch of four steps
@pytest.mark.parametrize(("stop", "save_strategy"), [(6, "steps"), (8, "epoch")])
def test_a_resumed_run_equals_an_uninterrupted_one_bit_for_bit(tmp_path, grey_digits, stop, save_strategy):
    def run(folder, seed, checkpoint=None):
        model = gated_model(seed, dropout=0.3, num_levels=2)
        options = {"num_train_epochs": 4, "save_strategy": save_strategy, "save_steps": stop, "eval_strategy": "epoch"}
        options |= {"ema_decay": 0.8, "logging_steps": 4, "lr_scheduler_type": "cosine", "warmup_steps": 3}
        trainer = trainer_for(folder, model, grey_digits(), eval_images=random_images(3, 2), **options)
        trainer.train(resume_from_checkpoint=checkpoint)
        trainer.save_model()
        return trainer

    whole = run(tmp_path / "whole", seed=0)
    resumed = run(tmp_path / "resumed", seed=1, checkpoint=str(tmp_path / "whole" / f"checkpoint-{stop}"))
    assert whole.state.global_step == resumed.state.global_step == 16
    assert_same(weights_of(whole.model), weights_of(resumed.model))
    assert_same(whole.ema.average, resumed.ema.average)
    assert_same(*(load_file(tmp_path / name / "model.safetensors") for name in ("whole", "resumed")))
    for key, first in (
        ("loss", 0),
        ("eval_loss", stop + 1),
    ):  # an evaluation at the very step of the save is not redone
        rows = [
            [(row["step"], row[key]) for row in trainer.state.log_history if key in row and row["step"] >= first]
            for trainer in (whole, resumed)
        ]
        assert rows[0] == rows[1]
        assert len(rows[0]) >= 2


def test_evaluation_does_not_change_training(tmp_path):
    outcomes = []
    for strategy in ("no", "epoch"):
        images, model = random_images(12), gated_model(dropout=0.3)
        options = {"num_train_epochs": 3, "ema_decay": 0.5, "eval_strategy": strategy}
        trainer_for(tmp_path, model, images, eval_images=images[:5], **options).train()
        outcomes.append(weights_of(model))
    assert_same(*outcomes)


def test_resuming_takes_the_last_checkpoint_that_was_written_completely(tmp_path):
    options = {"num_train_epochs": 3, "save_strategy": "epoch", "ema_decay": 0.5}
    trainer_for(tmp_path, gated_model(), random_images(8), **options).train()
    assert last_checkpoint(tmp_path) == str(tmp_path / "checkpoint-6")
    (tmp_path / "checkpoint-6" / "trainer_state.json").unlink()  # killed while it was written
    assert last_checkpoint(tmp_path) == str(tmp_path / "checkpoint-4")
    trainer = trainer_for(tmp_path, gated_model(), random_images(8), **options)
    trainer.train(resume_from_checkpoint=True)
    assert [row["step"] for row in trainer.state.log_history if "loss" in row] == [1, 2, 3, 4, 5, 6]


def test_the_saved_and_evaluated_weights_are_the_moving_average(tmp_path):
    history = []

    class Recorder(TrainerCallback):
        def on_step_end(self, args, state, control, model, **kwargs):
            history.append({name: p.detach().double().clone() for name, p in model.named_parameters()})

    model, images = gated_model(), random_images(12)
    expected = {name: p.detach().double().clone() for name, p in model.named_parameters()}
    options = {"num_train_epochs": 2, "ema_decay": 0.35, "save_strategy": "epoch", "eval_strategy": "epoch"}
    trainer = trainer_for(tmp_path, model, images, [Recorder()], images[:5], **options)
    trainer.train()
    trainer.save_model()

    for step, decay in enumerate([1 / 10, 2 / 11, 3 / 12, 4 / 13, 0.35, 0.35]):  # (1 + t) / (10 + t), then 0.35
        for name, average in expected.items():
            expected[name] = decay * average + (1 - decay) * history[step][name]
    assert len(history) == 6
    assert_same(load_file(tmp_path / "model.safetensors"), expected, rtol=1e-5, atol=1e-6, check_dtype=False)
    assert_same(load_file(tmp_path / "checkpoint-6" / "ema.safetensors"), load_file(tmp_path / "model.safetensors"))
    assert_same(load_file(tmp_path / "checkpoint-6" / "model.safetensors"), weights_of(model))  # the raw ones, kept
    assert_same(weights_of(model), history[-1], check_dtype=False, rtol=0, atol=0)

    average = AutoModel.from_pretrained(tmp_path)
    pixel_values = training.collate_levels(images[:5])["pixel_values"]
    nats = -average.log_prob(pixel_values).double().mean().item()
    assert trainer.state.log_history[-2]["eval_loss"] == pytest.approx(nats, rel=1e-6)
    assert abs(-model.eval().log_prob(pixel_values).mean().item() - nats) > 1e-5  # so the two differ at all


@pytest.mark.parametrize(
    ("options", "tolerance"),
    [({}, 1e-7), ({"torch_compile": True, "torch_compile_backend": "eager"}, 1e-7), ({"bf16": True}, 1e-2)],
)
def test_evaluation_scores_each_image_once_whatever_the_batch_size(tmp_path, monkeypatch, options, tolerance):
    monkeypatch.setenv("ACCELERATE_DYNAMO_BACKEND", "no")  # put back what `torch_compile` leaves behind
    model, images = gated_model(dropout=0.5), random_images(7)
    pixel_values = training.collate_levels(images)["pixel_values"]
    nats = -model.eval().log_prob(pixel_values).double().sum().item()
    trainer = trainer_for(tmp_path, model, images, eval_images=images, per_device_eval_batch_size=3, **options)
    metrics = trainer.evaluate()
    assert metrics["eval_loss"] == pytest.approx(nats / pixel_values.numel(), rel=tolerance)
    assert metrics["eval_bits_per_dim"] == pytest.approx(nats / pixel_values.numel() / math.log(2), rel=tolerance)
    assert metrics["eval_nats_per_image"] == pytest.approx(nats / 7, rel=tolerance)


@pytest.mark.parametrize(("bfloat16", "is_fast"), [(0.5, True), (2.0, False)])
def test_bfloat16_is_used_on_a_cpu_only_where_it_is_no_slower(tmp_path, bfloat16, is_fast, monkeypatch):
    seconds = {torch.bfloat16: bfloat16, torch.float32: 1.0}
    monkeypatch.setattr(records, "seconds_of_product", seconds.get)
    monkeypatch.setattr(torch.ops.mkldnn, "_is_mkldnn_bf16_supported", lambda: True)
    arguments = PixelCNNTrainingArguments(tmp_path, bf16=True, use_cpu=True)
    assert arguments.bf16 is records.has_fast_bfloat16("cpu") is is_fast
    assert records.has_fast_bfloat16("cuda")
    monkeypatch.setattr(torch.ops.mkldnn, "_is_mkldnn_bf16_supported", lambda: False)
    assert not records.has_fast_bfloat16("cpu")


def test_four_images_are_learnt_by_heart(tmp_path):
    images = random_images(4, num_levels=2, size=7)
    torch.manual_seed(0)
    model = PixelCNNForCausalImageModeling(
        PixelCNNConfig(image_size=7, hidden_size=32, num_hidden_layers=2, head_hidden_size=16)
    )
    options = {"max_steps": 150, "learning_rate": 1e-2, "lr_scheduler_type": "cosine", "logging_steps": 100}
    trainer = trainer_for(tmp_path, model, images, eval_images=images, channels_last=True, **options)
    trainer.train()
    choice = math.log(4) / 49  # nobody can know which of the four will come
    assert choice <= trainer.evaluate()["eval_loss"] < choice + 0.01


# Data


def save_rows(folder, columns, **features):
    datasets.Dataset.from_dict(columns, datasets.Features(features)).save_to_disk(folder)
    return str(folder)


@pytest.fixture
def numbers(tmp_path):
    """A data set without images."""
    return save_rows(tmp_path / "numbers", {"age": [1, 2, 3]}, age=datasets.Value("int64"))


@pytest.fixture
def codes(tmp_path):
    """Sixteen 5×4 arrays of 300 symbols."""
    grids = np.random.default_rng(0).integers(300, size=(16, 5, 4))
    return save_rows(tmp_path / "codes", {"grid": list(grids)}, grid=datasets.Array2D((5, 4), "int32"))


@pytest.fixture
def shades(tmp_path):
    """Eight images of 4×4 without classes, under an unusual name."""
    images = [Image.fromarray(np.full((4, 4), 30 * shade, dtype=np.uint8)) for shade in range(8)]
    return save_rows(tmp_path / "shades", {"face": images}, face=datasets.Image())


def test_levels_are_those_of_the_processor_in_order(tmp_path):
    rows = training.load_split(DIGITS, "train[2000:3100]", cache_dir=str(tmp_path))  # more than one block
    processor = PixelCNNImageProcessor(num_levels=5)
    images = training.LevelDataset(rows, 5, processor, with_classes=True)
    assert len(images) == 1100
    for index in (0, 999, 1000, 1099):
        expected = processor(rows[index]["image"], return_tensors="np")["pixel_values"][0]
        assert np.array_equal(images[index]["pixel_values"], expected)
        assert images[index]["class_ids"] == rows[index]["label"]
    batch = training.collate_levels([images[7], images[1001]])
    assert batch["pixel_values"].dtype == torch.uint8
    assert batch["labels"].dtype == batch["class_ids"].dtype == torch.int64
    assert torch.equal(batch["pixel_values"], batch["labels"])
    with pytest.raises(IndexError):
        images[1100]


def test_stochastic_binarisation_changes_with_the_epoch_and_follows_the_pixels(grey_digits):
    images = grey_digits()
    draws = []
    for epoch in range(400):
        images.set_epoch(epoch)
        draws.append(images[4]["pixel_values"])
    images.set_epoch(3)
    assert np.array_equal(images[4]["pixel_values"], draws[3])
    assert not np.array_equal(draws[3], draws[4])
    pixels = images.blocks[0][4] / 255
    spread = np.sqrt(pixels * (1 - pixels) / 400)
    assert set(np.unique(draws)) == {0, 1}
    assert (np.abs(np.mean(draws, axis=0) - pixels) <= 5 * spread).all()


def test_tensorboard_gets_bits_per_dim_in_the_folder_of_the_run(tmp_path, monkeypatch):
    class SummaryWriter:  # of a package that may be missing
        def __init__(self, log_dir):
            places.append(log_dir)

        def add_scalar(self, name, value, step):
            scalars[name] = value

        add_text = flush = close = lambda *args: None

    places, scalars = [], {}
    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", SimpleNamespace(SummaryWriter=SummaryWriter))
    monkeypatch.setattr(integration_utils, "is_tensorboard_available", lambda: True)
    options = {"max_steps": 1, "report_to": "tensorboard", "eval_images": random_images(5)}
    trainer = trainer_for(tmp_path / "run", gated_model(), random_images(8), **options)
    trainer.train()
    metrics = trainer.evaluate()
    assert all(place.startswith(str(tmp_path / "run")) for place in places)
    assert places
    assert scalars["eval/bits_per_dim"] == metrics["eval_bits_per_dim"]
    assert "train/loss" in scalars


def test_class_dropout_hides_some_classes_anew_in_each_epoch(tmp_path):
    rows = training.load_split(DIGITS, "train[:20]", cache_dir=str(tmp_path))
    shown = lambda images: np.array([images[i]["class_ids"] for i in range(len(images))])  # noqa: E731
    images = training.LevelDataset(rows, 256, PixelCNNImageProcessor(), with_classes=True, class_dropout=0.3, seed=1)
    own = images.class_ids
    epochs = []
    for epoch in range(50):
        images.set_epoch(epoch)
        epochs.append(shown(images))
        assert np.array_equal(epochs[-1], shown(images))
        assert np.isin(epochs[-1][epochs[-1] != own], [-1]).all()
    assert abs((np.stack(epochs) == -1).mean() - 0.3) < 0.1
    assert len({tuple(epoch) for epoch in epochs}) > 1
    model = gated_model(num_classes=10)
    arguments = PixelCNNTrainingArguments(str(tmp_path / "run"), report_to=[], use_cpu=True, eval_strategy="no")
    for known, of_data, expected in [(None, 0.3, 0.3), (0.1, 0.3, 0.3), (0.1, 0.0, 0.1), (None, 0.0, 0.0)]:
        model.config.class_dropout, images.class_dropout = known, of_data
        PixelCNNTrainer(model, arguments, train_dataset=images)
        assert model.config.class_dropout == expected  # which guidance asks


def test_mutations_replace_some_levels_by_any_of_them_anew_in_each_epoch(tmp_path):
    rows = training.load_split(DIGITS, "train[:20]", cache_dir=str(tmp_path))
    clean, mutated, all_new = (
        training.LevelDataset(rows, 5, PixelCNNImageProcessor(num_levels=5), mutation_rate=rate, seed=1)
        for rate in (0.0, 0.3, 1.0)
    )
    shown = lambda images: np.stack([images[i]["pixel_values"] for i in range(20)])  # noqa: E731
    first = shown(mutated)
    assert first.dtype == np.uint8
    assert np.array_equal(first, shown(mutated))
    assert abs((first != shown(clean)).mean() - 0.3 * 0.8) < 0.02  # one level in five is what it was
    assert all(np.array_equal(mutated[i]["labels"], clean[i]["pixel_values"]) for i in range(20))
    batch = training.collate_levels([mutated[0]])  # what is predicted are the image's own levels
    assert np.array_equal(batch["labels"][0], clean[0]["pixel_values"])
    assert np.array_equal(batch["pixel_values"][0], first[0])
    frequencies = np.bincount(shown(all_new).ravel(), minlength=5) / first.size
    assert np.abs(frequencies - 0.2).max() < 0.02
    mutated.set_epoch(1)
    assert not np.array_equal(first, shown(mutated))


def test_an_image_processor_of_other_levels_is_refused():
    pictures = [Image.new("L", (6, 5), 200) for _ in range(3)]
    rows = datasets.Dataset.from_dict({"image": pictures}, features=datasets.Features({"image": datasets.Image()}))
    for made, asked in ((2, 256), (256, 2)):
        with pytest.raises(training.InputError, match=f"processor makes {made} levels, but `num_levels` is {asked}"):
            training.LevelDataset(rows, asked, PixelCNNImageProcessor(num_levels=made))
    assert len(training.LevelDataset(rows, 2, PixelCNNImageProcessor(num_levels=2))) == 3


def test_a_column_of_codes_is_found_and_keeps_its_values(codes):
    rows = training.load_split(codes, "train[4:]")
    assert find_image_column(rows.features) == ("grid", True)
    images = training.LevelDataset(rows, 300)
    assert len(images) == 12
    assert images[1]["pixel_values"].dtype == np.int32
    assert np.array_equal(images[1]["pixel_values"], [rows[1]["grid"]])
    with pytest.raises(InputError, match=r"codes in column 'grid' must be 0 ... 199"):
        training.LevelDataset(rows, 200)


# The scripts


def run_script(*words, launcher=()):
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    command = [sys.executable, *launcher, *map(str, words)]
    return subprocess.run(command, capture_output=True, text=True, timeout=900, env=environment, check=False)


def run_two_processes(*words, output):
    """Once more if torch aborts a process that has done its work and is ending, which happens on busy machines."""
    launcher = ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2"]
    finished = run_script(*words, launcher=launcher)
    if "terminate called without an active exception" in finished.stderr:
        shutil.rmtree(output, ignore_errors=True)
        finished = run_script(*words, launcher=launcher)
    assert finished.returncode == 0, finished.stderr


@pytest.fixture(scope="module")
def digits_words(tmp_path_factory):
    cache = tmp_path_factory.mktemp("cache")
    sizes = ["--image_size", "8", *TINY, "--num_samples", "4", "--disable_tqdm", "true"]
    splits = ["--train_split", "train[:48]", "--eval_split", "test[:7]"]
    return ["--dataset", DIGITS, *splits, "--cache_dir", str(cache), *sizes]


@pytest.fixture(scope="module")
def trained(tmp_path_factory, digits_words):
    """The output folder of a run of train.py in its own process, from a recipe, with an average and bf16."""
    folder = tmp_path_factory.mktemp("trained")
    recipe = folder / "recipe.yaml"
    recipe.write_text(
        "binarization: threshold\nthreshold: 99\nnum_train_epochs: 7\nema_decay: 0.9\nbf16: true\nchannels_last: true\n"
        "learning_rate: 1e-2\nlabel_names: [labels]\nseed: null\n"
    )
    words = ["--config", recipe, *digits_words, "--output_dir", folder / "run", "--num_train_epochs", "2"]
    finished = run_script(ROOT / "training" / "train.py", *words)
    assert finished.returncode == 0, finished.stderr
    assert "FutureWarning" not in finished.stderr
    return folder / "run"


def test_train_leaves_a_model_a_processor_results_and_pictures(trained, tmp_path, digits_words):
    results = json.loads((trained / "results.json").read_text())
    model, processor = AutoModel.from_pretrained(trained), AutoImageProcessor.from_pretrained(trained)
    rows = training.load_split(DIGITS, "test[:7]", cache_dir=digits_words[digits_words.index("--cache_dir") + 1])
    pixel_values = processor([row["image"] for row in rows], return_tensors="pt")["pixel_values"]
    assert pixel_values.shape == (7, 1, 8, 8)
    assert (processor.threshold, processor.num_levels) == (99, 2)
    nats = -model.log_prob(pixel_values).double().sum().item()
    assert results["nats_per_image"] == pytest.approx(nats / 7, rel=1e-6)
    assert results["bits_per_dim"] == pytest.approx(nats / (7 * 64 * math.log(2)), rel=1e-6)
    assert (results["epochs"], results["seed"]) == (2, 42)  # the command line before the recipe before the default
    assert results["num_parameters"] == model.num_parameters()
    assert Image.open(trained / "samples.png").size[0] >= 480
    assert Image.open(trained / "loss_curve.png").size[0] >= 480
    assert (results["num_processes"], results["images_per_step"]) == (1, 8)
    assert {path.name for path in trained.iterdir()} == {
        *("config.json", "generation_config.json", "model.safetensors", "preprocessor_config.json"),
        *("results.json", "recipe.yaml", "samples.png", "loss_curve.png", "run"),
    }  # the model's; no source files, and nothing of the run
    assert {path.name for path in (trained / "run").iterdir()} == {"checkpoint-6", "checkpoint-12"}
    assert not list((trained / "run").rglob("*.py"))


@pytest.mark.parametrize("batch_size", ["3", "100"])
def test_evaluate_equals_the_sum_of_log_probabilities(trained, tmp_path, digits_words, batch_size, capsys):
    cache = digits_words[digits_words.index("--cache_dir") + 1]
    output = tmp_path / "score.json"
    words = ["--model", str(trained), "--dataset", DIGITS, "--split", "train[5:16]", "--cache_dir", cache]
    options = ["--output", str(output), "--batch_size", batch_size, "--device", "cpu", "--dtype", "float64"]
    score.main([*words, *options])
    model, processor = AutoModel.from_pretrained(trained).double(), AutoImageProcessor.from_pretrained(trained)
    rows = training.load_split(DIGITS, "train[5:16]", cache_dir=cache)
    pixel_values = processor([row["image"] for row in rows], return_tensors="pt")["pixel_values"]
    nats = -model.log_prob(pixel_values).sum().item()
    found = json.loads(output.read_text())
    assert (found["num_images"], found["num_dims"]) == (11, 11 * 64)
    assert found["nats_per_image"] == pytest.approx(nats / 11, rel=1e-12)
    assert found["nats_per_dim"] == pytest.approx(nats / 704, rel=1e-12)
    assert found["bits_per_dim"] == pytest.approx(nats / 704 / math.log(2), rel=1e-12)
    assert f"{found['bits_per_dim']:.5f} bits/dim" in capsys.readouterr().out


def test_sample_draws_the_same_picture_for_the_same_seed_at_any_batch_size(trained, tmp_path):
    pictures = []
    for name, options in {"a": ["--batch_size", "2"], "b": [], "c": ["--seed", "1"]}.items():
        words = [
            "--model",
            str(trained),
            "--num_images",
            "5",
            "--device",
            "cpu",
            "--output",
            str(tmp_path / f"{name}.png"),
        ]
        sample.main([*words, *options])
        pictures.append(np.asarray(Image.open(tmp_path / f"{name}.png")))
    assert np.array_equal(pictures[0], pictures[1])
    assert not np.array_equal(pictures[0], pictures[2])


def test_classes_have_names_and_guidance_on_the_command_line(tmp_path):
    model = gated_model(num_classes=3, id2label={0: "cat", 1: "dog", 2: "7"})
    strengthen_classes(model).save_pretrained(tmp_path / "model")
    PixelCNNImageProcessor(num_levels=4).save_pretrained(tmp_path / "model")
    words = ["--model", str(tmp_path / "model"), "--num_images", "2", "--device", "cpu"]
    pictures = {}
    for class_id, scale in [("dog", "1"), ("1", "1"), ("7", "1"), ("2", "1"), ("dog", "3")]:
        path = tmp_path / f"{class_id}{scale}.png"
        sample.main([*words, "--class_ids", class_id, "--guidance_scale", scale, "--output", str(path)])
        pictures[class_id + scale] = np.asarray(Image.open(path))
    assert np.array_equal(pictures["dog1"], pictures["11"])
    assert np.array_equal(pictures["71"], pictures["21"])  # a name comes before a number
    assert not np.array_equal(pictures["dog1"], pictures["71"])
    assert not np.array_equal(pictures["dog1"], pictures["dog3"])
    sample.main([*words, "--class_ids", "7", "dog", "--output", str(tmp_path / "both.npy")])
    for index, name in enumerate(("7", "dog")):
        sample.main([*words, "--class_ids", name, "--output", str(tmp_path / f"{name}.npy")])
        assert np.array_equal(*(np.load(tmp_path / f"{file}.npy")[index] for file in ("both", name)))
    message = one_line_error(sample.main, [*words, "--class_ids", "cow"])
    assert "There is no class 'cow'; the model has ['cat', 'dog', '7']" in message


def test_two_processes_draw_the_same_picture_as_one(trained, tmp_path):
    words = ["--model", str(trained), "--num_images", "5", "--device", "cpu", "--output"]
    two = tmp_path / "two.png"
    run_two_processes(ROOT / "training" / "sample.py", *words, two, output=two)
    sample.main([*words, str(tmp_path / "one.png")])
    pictures = [np.asarray(Image.open(tmp_path / name)) for name in ("one.png", "two.png")]
    assert np.array_equal(*pictures)


def test_a_damaged_image_is_answered_in_one_line(tmp_path):
    file = io.BytesIO()
    Image.fromarray(np.random.default_rng(0).integers(256, size=(32, 32), dtype=np.uint8)).save(file, "PNG")
    images = [{"bytes": file.getvalue(), "path": "whole.png"}, {"bytes": file.getvalue()[:300], "path": "cut.png"}]
    folder = save_rows(tmp_path / "damaged", {"image": images}, image=datasets.Image())
    words = ["--dataset", folder, "--eval_split", "train", *TINY, "--output_dir", tmp_path / "run"]
    message = one_line_error(train.main, words)
    assert "row 1 of column 'image' (cut.png) cannot be used as an image: " in message
    assert not (tmp_path / "run").exists()
    images[1] = {"bytes": bomb(), "path": "bomb.png"}
    folder = save_rows(tmp_path / "bomb", {"image": images}, image=datasets.Image())
    message = one_line_error(train.main, [*words, "--dataset", folder])
    assert "row 1 of column 'image' (bomb.png) cannot be used as an image: Image size (3600000000 pixels)" in message
    images[1] = None
    folder = save_rows(tmp_path / "missing", {"image": images}, image=datasets.Image())
    assert "row 1 of column 'image' has no image" in one_line_error(train.main, [*words, "--dataset", folder])


def cells_of(path, rows, columns, size=8):
    """The images of a grid."""
    picture = Image.open(path)
    scale = picture.width // (columns * (size + 2) - 2)
    grid = np.asarray(picture.resize((picture.width // scale, picture.height // scale), Image.Resampling.NEAREST))
    step = size + 2
    return [[grid[i * step :, j * step :][:size, :size] for j in range(columns)] for i in range(rows)]


@pytest.mark.parametrize("mask", ["upper", "upper:5", "left:3", "box", "box:1,2,3,6", "file"])
def test_completions_show_original_given_and_drawn(trained, tmp_path, digits_words, mask):
    known = np.zeros((8, 8), dtype=bool)
    known[: {"upper": 4, "upper:5": 5}.get(mask, 0)] = True
    known[:, : {"left:3": 3}.get(mask, 0)] = True
    if mask == "box":
        known[:] = True
        known[2:6, 2:6] = False
    elif mask == "box:1,2,3,6":
        known[:] = True
        known[1:4, 2:8] = False
    elif mask == "file":
        mask, known[2:4, 1:7] = tmp_path / "mask.png", True
        Image.fromarray(known.astype(np.uint8) * 255).save(mask)
    words = ["--model", trained, "--complete", DIGITS, "--split", "test[:2]", "--num_images", "3", "--mask", mask]
    words += ["--cache_dir", digits_words[digits_words.index("--cache_dir") + 1], "--device", "cpu"]
    sample.main([str(word) for word in [*words, "--output", tmp_path / "c.png"]])
    for original, given, *drawn in cells_of(tmp_path / "c.png", 2, 5):
        assert np.array_equal(given, np.where(known, original, 128))
        assert all(np.array_equal(image[known], original[known]) for image in drawn)
        assert any(not np.array_equal(image, original) for image in drawn)
        assert not all(np.array_equal(image, drawn[0]) for image in drawn)


@pytest.mark.parametrize("num_resamples", [1, 4])
def test_the_shares_of_two_processes_are_what_one_draws(monkeypatch, num_resamples):
    model = gated_model()
    request = {"pixel_values": torch.from_numpy(np.stack([x["pixel_values"] for x in random_images(3)]))}
    request |= {"known_mask": torch.rand(3, 1, 6, 6) < 0.5, "num_resamples": num_resamples}
    whole = model.generate(**request, generator=torch.Generator().manual_seed(0), return_dict_in_generate=True)
    monkeypatch.setattr(sample, "gather", lambda tensor: tensor)
    for index, share in enumerate((slice(0, 2), slice(2, 3))):
        process = SimpleNamespace(num_processes=2, process_index=index, is_main_process=False)
        monkeypatch.setattr(sample, "PartialState", lambda process=process: process)
        levels, sample_size = sample.draw_share(model, 3, torch.Generator().manual_seed(0), **request)
        count = share.stop - share.start
        assert torch.equal(levels[:count], whole.sequences[share])
        if num_resamples > 1:
            torch.testing.assert_close(sample_size[:count], whole.effective_sample_size[share].float())


def test_two_processes_equal_one_with_the_double_batch(tmp_path, digits_words):
    words = [
        *digits_words,
        "--num_train_epochs",
        "2",
        "--optim",
        "sgd",
        "--learning_rate",
        "0.1",
        "--logging_steps",
        "1",
    ]
    words += ["--ema_decay", "0.5", "--binarization", "threshold", "--use_cpu", "true"]
    two, one = tmp_path / "two", tmp_path / "one"
    script = [ROOT / "training" / "train.py", *words, "--output_dir", two, "--per_device_train_batch_size", "4"]
    run_two_processes(*script, output=two)
    train.main([*words, "--output_dir", str(one), "--per_device_train_batch_size", "8"])
    assert_same(load_file(two / "model.safetensors"), load_file(one / "model.safetensors"), rtol=1e-5, atol=1e-6)
    logs = [
        json.loads((run / "run" / "checkpoint-12" / "trainer_state.json").read_text())["log_history"]
        for run in (two, one)
    ]
    assert len(train_losses(logs[1])) == 12
    assert train_losses(logs[0]) == pytest.approx(train_losses(logs[1]), rel=1e-5)
    evaluations = [[row["eval_loss"] for row in log if "eval_loss" in row] for log in logs]  # of seven images
    assert evaluations[0] == pytest.approx(evaluations[1], rel=1e-6)


def test_a_conditional_model_learns_the_names_of_its_classes(tmp_path, digits_words):
    options = ["--class_conditional", "true", "--binarization", "stochastic", "--max_steps", "1"]
    train.main([*digits_words, *options, "--model_type", "gated_pixelcnn", "--output_dir", str(tmp_path / "run")])
    config = AutoModel.from_pretrained(tmp_path / "run").config
    assert config.num_classes == 10
    assert config.id2label[3] == "3"
    assert json.loads((tmp_path / "run" / "results.json").read_text())["num_images"] == 7


def test_a_model_of_codes_is_trained_and_sampled(tmp_path, codes):
    words = ["--dataset", codes, "--train_split", "train[:12]", "--eval_split", "train[12:]", *TINY]
    options = ["--num_levels", "300", "--input_encoding", "embedding", "--max_steps", "1", "--num_samples", "2"]
    train.main([*words, *options, "--disable_tqdm", "true", "--output_dir", str(tmp_path / "run")])
    assert AutoModel.from_pretrained(tmp_path / "run").config.image_size == [5, 4]
    assert json.loads((tmp_path / "run" / "results.json").read_text())["num_dims"] == 80
    words = ["--model", str(tmp_path / "run"), "--num_images", "2"]
    assert "draws codes, which are no picture" in one_line_error(sample.main, [*words, "--output", tmp_path / "s.png"])
    sample.main([*words, "--output", str(tmp_path / "new" / "s.npy")])
    drawn = np.load(tmp_path / "new" / "s.npy")
    model = AutoModel.from_pretrained(tmp_path / "run")
    levels = model.generate(num_images=2, generator=torch.Generator().manual_seed(0))
    assert drawn.dtype == np.int32
    assert np.array_equal(drawn, levels)


def test_many_samples_go_into_a_folder(tmp_path):
    model = gated_model(num_classes=2, id2label={0: "cat", 1: "dog"})
    model.save_pretrained(tmp_path / "model")
    PixelCNNImageProcessor(num_levels=4).save_pretrained(tmp_path / "model")
    words = ["--model", str(tmp_path / "model"), "--num_images", "1000", "--image_size", "3", "4", "--device", "cpu"]
    sample.main([*words, "--output", f"{tmp_path}/many/"])
    paths = sorted((tmp_path / "many").iterdir())
    assert [paths[0].name, paths[-1].name, len(paths)] == ["00000.png", "00999.png", 1000]
    message = one_line_error(sample.main, [*words, "--output", tmp_path / "many"])  # never among others' pictures
    assert message.endswith("many exists, and is not empty: --output must be a new or empty folder, or name a file.")
    sample.main([*words, "--output", str(tmp_path / "many.npy")])
    levels = torch.from_numpy(np.load(tmp_path / "many.npy"))
    assert levels.shape == (1000, 1, 3, 4)
    images = PixelCNNImageProcessor(num_levels=4).post_process(levels)
    for index in (0, 63, 64, 999):
        picture = Image.open(paths[index])
        assert np.array_equal(np.asarray(picture), np.asarray(images[index]))
        assert picture.text["class"] == ["cat", "dog"][index % 2]
        assert picture.text["seed"] == "0"


def test_training_continues_with_a_given_model(tmp_path, trained, digits_words):
    data = digits_words[: digits_words.index("--image_size")]
    words = [*data, "--model_name_or_path", str(trained), "--learning_rate", "0", "--max_steps", "1"]
    train.main([*words, "--output_dir", str(tmp_path / "run")])
    assert_same(load_file(tmp_path / "run" / "model.safetensors"), load_file(trained / "model.safetensors"))
    assert AutoImageProcessor.from_pretrained(tmp_path / "run").threshold == 99


def test_training_starts_from_a_model_of_other_sizes_and_classes(tmp_path, digits_words, capsys):
    model = gated_model(num_levels=2, num_classes=2, image_size=8, id2label={0: "ant", 1: "bee"})
    model.save_pretrained(tmp_path / "start")
    PixelCNNImageProcessor(num_levels=2, binarization="threshold", size=8).save_pretrained(tmp_path / "start")
    data = digits_words[: digits_words.index("--image_size")]
    words = [*data, "--model_name_or_path", str(tmp_path / "start"), "--max_steps", "1", "--image_size", "6", "9"]
    words += ["--num_samples", "2", "--disable_tqdm", "true", "--learning_rate", "1e-9"]
    message = one_line_error(train.main, [*words, "--output_dir", tmp_path / "run"])
    assert "has classes that the model lacks: 0, 1" in message
    assert message.endswith("with the classes of the data set in place of its own, give --class_conditional true.")
    capsys.readouterr()
    train.main([*words, "--class_conditional", "true", "--output_dir", str(tmp_path / "run")])
    said = capsys.readouterr().out
    assert "images of 6×9 in place of 8×8; 10 classes (0, 1, 2, 3, 4, ...) in place of 2; weights that start" in said
    before, after = re.findall(r"step (?:0|1) of 1, .*test\[:7\] ([\d.]+) bits/dim", said)
    assert before == after  # at a learning rate of nearly nothing; the first is from before the first step
    tuned, start = (load_file(tmp_path / name / "model.safetensors") for name in ("run", "start"))
    news = {name for name in start if start[name].shape != tuned[name].shape}
    assert news
    assert all("class_embedding" in name and name in said for name in news)
    assert_same(*({k: v for k, v in x.items() if k not in news} for x in (tuned, start)), rtol=0, atol=1e-6)
    assert AutoModel.from_pretrained(tmp_path / "run").config.image_size == [6, 9]
    assert json.loads((tmp_path / "run" / "results.json").read_text())["num_dims"] == 7 * 54


def test_each_epoch_has_a_line_and_a_resumed_run_counts_all_its_seconds(tmp_path, digits_words, capsys):
    run = tmp_path / "run"
    words = [*digits_words, "--binarization", "threshold", "--use_cpu", "true", "--output_dir", str(run)]
    words += ["--train_split", "train[:45]", "--logging_steps", "2"]
    train.main([*words, "--num_train_epochs", "2"])
    said = capsys.readouterr().out
    assert "1 process, 8 images per step: 8 per process × 1 × 1 accumulated." in said
    assert "Of the 45 images, 5 that do not fill a batch are left out of each epoch, others each time" in said
    log = json.loads((run / "run" / "checkpoint-10" / "trainer_state.json").read_text())["log_history"]
    lines = re.findall(r"^epoch (\d), step (\d+) of 10, \d+ s: training ([\d.]+) bits/dim, (.*)$", said, re.MULTILINE)
    assert [line[:2] for line in lines] == [("1", "5"), ("2", "10")]
    for epoch, (_, _, training_bits, evaluation) in enumerate(lines, 1):
        steps = {row["step"]: row["loss"] for row in log if "loss" in row and epoch - 1 < row["epoch"] <= epoch}
        ends = [5 * (epoch - 1), *sorted(steps)]
        mean = sum(steps[end] * (end - before) for before, end in itertools.pairwise(ends)) / 5
        assert float(training_bits) == pytest.approx(mean / math.log(2), abs=1e-4)
        score_of_epoch = next(row for row in log if row["epoch"] == epoch and "eval_loss" in row)
        assert evaluation == f"test[:7] {score_of_epoch['eval_bits_per_dim']:.4f} bits/dim"

    state = run / "run" / "checkpoint-10" / "trainer_state.json"
    content = json.loads(state.read_text())
    content["log_history"][-1]["seconds"] += 1000
    content["log_history"][-1]["core_seconds"] += 2000
    state.write_text(json.dumps(content))
    train.main([*words, "--num_train_epochs", "3", "--resume_from_checkpoint", "last"])
    results = json.loads((run / "results.json").read_text())
    assert 1000 < results["training_seconds"] < 1600
    assert 2000 < results["training_core_seconds"] < 2600


def test_a_model_is_fine_tuned_as_a_classifier(tmp_path, digits_words):
    data = digits_words[: digits_words.index("--image_size")]
    model = gated_model(num_levels=2, num_classes=10, image_size=8, hidden_size=16, head_hidden_size=16)
    model.save_pretrained(tmp_path / "start")
    PixelCNNImageProcessor(num_levels=2, binarization="threshold", size=8).save_pretrained(tmp_path / "start")
    cross_entropies = []
    for weight in ("1", "0"):
        words = [*data, "--train_split", "train[:64]", "--model_name_or_path", str(tmp_path / "start")]
        words += ["--generative_weight", weight, "--num_train_epochs", "6", "--learning_rate", "0.03"]
        train.main([*words, "--seed", "0", "--output_dir", str(tmp_path / weight)])
        assert json.loads((tmp_path / weight / "results.json").read_text())["generative_weight"] == float(weight)
        scored = ["--model", str(tmp_path / weight), "--dataset", DIGITS, "--split", "train[:64]", "--classify", "true"]
        score.main([*scored, "--output", str(tmp_path / "scores.json")])
        scores = json.loads((tmp_path / "scores.json").read_text())
        cross_entropies.append(scores["classification"]["cross_entropy"])
    assert cross_entropies[1] < 0.9 * cross_entropies[0]

    prior = [0.1, 0.3, *[0.075] * 8]
    words = [*data, "--model_name_or_path", str(tmp_path / "start"), "--max_steps", "1", "--class_prior"]
    message = one_line_error(train.main, [*words, "learned", "--output_dir", tmp_path / "run"])
    assert "--class_prior cannot go with --model_name_or_path: " in message
    words += [*map(str, prior), "--generative_weight", "0.5", "--class_temperature", "2"]
    train.main([*words, "--output_dir", str(tmp_path / "run")])
    config = AutoModel.from_pretrained(tmp_path / "run").config
    assert (config.class_prior, config.class_temperature) == (prior, 2)


def test_a_model_whose_classes_have_no_names_takes_those_of_the_data(tmp_path, digits_words):
    data = digits_words[: digits_words.index("--image_size")]
    model = gated_model(num_levels=2, num_classes=10, image_size=8)
    model.save_pretrained(tmp_path / "start")
    PixelCNNImageProcessor(num_levels=2, binarization="threshold", size=8).save_pretrained(tmp_path / "start")
    words = [*data, "--model_name_or_path", str(tmp_path / "start"), "--max_steps", "1"]
    train.main([*words, "--output_dir", str(tmp_path / "run")])
    config = AutoModel.from_pretrained(tmp_path / "run").config
    assert config.id2label[7] == "7"
    assert config.label2id["7"] == 7


def test_other_names_of_classes_pass_the_checks_of_the_config():
    config = gated_model(num_classes=3).config
    train.rename_classes(config, ["cat", "dog", "cow"])
    assert config.id2label == {0: "cat", 1: "dog", 2: "cow"}
    for names in (["a", "b"], ["a", "b", "c", "d"]):
        with pytest.raises(InputError, match=rf"must name each of the 3 classes .* got {len(names)} names"):
            train.rename_classes(config, names)
    assert config.id2label == {0: "cat", 1: "dog", 2: "cow"}
    assert config.label2id == {"cat": 0, "dog": 1, "cow": 2}


def test_classes_that_the_model_lacks_are_noticed_before_training(tmp_path, digits_words):
    rows = training.load_split(DIGITS, "train[:20]", cache_dir=str(tmp_path))
    images = training.LevelDataset(rows, 2, PixelCNNImageProcessor(num_levels=2), with_classes=True)
    check_classes_of(images, "train", 10)
    images.class_ids[3] = -1
    check_classes_of(images, "train", 10)
    with pytest.raises(training.InputError, match="'train' has no class for 1 of 20 images; a classifier needs one"):
        check_classes_of(images, "train", 10, least=0)
    images.class_ids[3] = 10
    with pytest.raises(training.InputError, match=r"'train' has classes from 0 to 10; .* 0 ... 9, or -1 for none"):
        check_classes_of(images, "train", 10)


def test_bad_input_is_answered_in_one_line(tmp_path, numbers, codes, shades, trained):
    recipe = tmp_path / "recipe.yaml"
    recipe.write_text("num_levles: 4\n")
    data = ["--dataset", shades, "--train_split", "train[:6]", "--eval_split", "train[6:]"]
    for message, words in {
        "no image column": ["--dataset", numbers, "--eval_split", "train"],
        "holds no images": [*data, "--image_column", "tail"],
        "split 'night'": [*data, "--eval_split", "night"],
        "is empty": [*data, "--eval_split", "train[:0]"],
        "data set 'no/such'": [*data, "--dataset", "no/such"],
        "unknown key 'num_levles'": [*data, "--config", recipe],
        "cannot read the recipe": [*data, "--config", tmp_path / "missing.yaml"],
        "unknown argument '--num_levles'": [*data, "--num_levles", "4"],
        "invalid int value: 'many'": [*data, "--num_levels", "many"],
        "--dataset and --output_dir are needed": [],
        "no class column": [*data, "--class_conditional", "true"],
        "--generative_weight needs a model with classes": [*data, "--generative_weight", "0.5"],
        "--mutation_rate cannot go with": [*data, "--mutation_rate", "0.1", "--generative_weight", "0.5"],
        "--class_dropout cannot go with": [*data, "--class_dropout", "0.1", "--generative_weight", "0.5"],
        "argument --model_type: invalid choice: 'pixelkan'": [*data, "--model_type", "pixelkan"],
        "`hidden_size` must be divisible": [*data, "--hidden_size", "5"],
        "to 256, got 1000. Codes of more levels are no images: their models have `input_encoding='embedding'`": [
            *data,
            "--num_levels",
            "1000",
        ],
        "6 images, less than a batch of 8": data,
        "no complete checkpoint": [*data, "--resume_from_checkpoint", "last"],
        "is not a checkpoint": [*data, "--resume_from_checkpoint", tmp_path / "nowhere"],
        "has hidden_size=8, this run 16": [
            *[
                *data,
                "--hidden_size",
                "16",
                "--num_levels",
                "2",
                "--resume_from_checkpoint",
                trained / "run" / "checkpoint-6",
            ],
            *[*TINY[2:], "--image_size", "8", "--per_device_train_batch_size", "2"],
        ],
        "`ema_decay` must be below 1, got 1.5": [*data, "--ema_decay", "1.5"],
        "`per_device_train_batch_size` must be at least 1, got 0": [*data, "--per_device_train_batch_size", "0"],
        "`learning_rate` must be a finite number, got nan": [*data, "--learning_rate", "nan"],
        "`num_train_epochs` must be above 0, got -1.0": [*data, "--num_train_epochs", "-1"],
        "`dataloader_num_workers` must be at least 0": [*data, "--dataloader_num_workers", "-1"],
        "`report_to` must be all or none": [*data, "--report_to", "carrier_pigeon"],
        "`log_level` must be passive or": [*data, "--log_level", "loud"],
        "`metric_for_best_model` must be loss or bits_per_dim": [*data, "--metric_for_best_model", "beauty"],
        "`torch_compile_backend` must be eager": [*data, "--torch_compile_backend", "gcc"],
        "training this model takes at least": [*data, "--hidden_size", "8000000", "--per_device_train_batch_size", "2"],
        "an image of 900000×900000 takes at least": [*data, "--image_size", "900000"],
        "`seed` must be at least 0, got -1": [*data, "--seed", "-1"],
        "`num_samples` must be at least 1": [*data, "--num_samples", "0"],
        "`mutation_rate` must be at most 1, got 1.5": [*data, "--mutation_rate", "1.5"],
        "--threshold needs": [*data, "--threshold", "0"],
        "--center_crop needs --image_size": [*data, "--center_crop", "true"],
        "cannot load a classifier": [*data, "--model_name_or_path", trained, "--generative_weight", "0.5"],
        "--hidden_size cannot go with": [*data, "--model_name_or_path", trained, "--hidden_size", "4"],
        "--model_type cannot go with": [*data, "--model_name_or_path", trained, "--model_type", "pixelcnn"],
        "--binarization is for images, column 'grid'": [
            *["--dataset", codes, "--eval_split", "train", "--num_levels", "300", "--binarization", "threshold"],
        ],
    }.items():
        words = [*words, "--use_cpu", "true", "--disable_tqdm", "true"]
        if words[:1] == ["--dataset"]:
            words += ["--output_dir", tmp_path / "run"]
        assert message in one_line_error(train.main, words)
        assert not list(tmp_path.glob("run/*"))
    assert "cannot load a model" in one_line_error(sample.main, ["--model", tmp_path])
    message = one_line_error(sample.main, ["--model", trained, "--num_images", "2000000000", "--device", "cpu"])
    assert "drawing 2000000000 images of 8×8 pixels takes at least" in message
    assert "not class-conditional" in one_line_error(sample.main, ["--model", trained, "--class_ids", "1"])
    assert "cannot write" in one_line_error(sample.main, ["--model", trained, "--output", tmp_path / "x.xyz"])
    complete = ["--model", trained, "--complete", DIGITS, "--split", "test[:2]"]
    for mask in ("upper:9", "upper:-1", "left:x", "upper:1,2", "box:1,2,3", "box:6,0,3,3"):
        message = one_line_error(sample.main, [*complete, "--mask", mask])
        assert f"HEIGHT,WIDTH inside 8×8 pixels, got '{mask}'" in message
    assert "upper, left, box or a picture, got 'middle'" in one_line_error(sample.main, [*complete, "--mask", "middle"])
    Image.new("L", (8, 9)).save(tmp_path / "mask.png")
    message = one_line_error(sample.main, [*complete, "--mask", tmp_path / "mask.png"])
    assert "9×8 pixels, the images 8×8" in message
    (tmp_path / "mask.png").write_bytes(bomb())
    message = one_line_error(sample.main, [*complete, "--mask", tmp_path / "mask.png"])
    assert "mask.png': it cannot be used as an image: Image size (3600000000 pixels)" in message
    message = one_line_error(sample.main, ["--model", trained, "--num_resamples", "2"])
    assert "needs `pixel_values` and `known_mask`" in message
    assert "invalid choice: 'fast'" in one_line_error(sample.main, ["--model", trained, "--sampler", "fast"])
    words = ["--model", trained, "--dataset", DIGITS]
    assert "--dtype must be" in one_line_error(score.main, [*words, "--dtype", "int8"])
    assert "no image column" in one_line_error(
        score.main, ["--model", trained, "--dataset", numbers, "--split", "train"]
    )


def test_a_folder_that_holds_a_run_is_left_alone(trained, digits_words):
    before = {path: path.stat().st_mtime_ns for path in trained.rglob("*")}
    for words in ([], ["--resume_from_checkpoint", "false"]):
        message = one_line_error(train.main, [*digits_words, "--output_dir", trained, *words])
        assert "already holds a run" in message
    assert before == {path: path.stat().st_mtime_ns for path in trained.rglob("*")}


def test_a_finished_run_does_not_train_on(tmp_path, digits_words, capsys):
    run = tmp_path / "run"
    options = ["--binarization", "threshold", "--save_strategy", "steps", "--save_steps", "2", "--ema_decay", "0.5"]
    words = [*digits_words, *options, "--use_cpu", "true", "--output_dir", str(run)]
    train.main([*words, "--max_steps", "4"])
    weights, scores = load_file(run / "model.safetensors"), json.loads((run / "results.json").read_text())
    again = [*words, "--resume_from_checkpoint", "last"]
    before = {path: path.stat().st_mtime_ns for path in run.rglob("*")}
    message = one_line_error(train.main, [*again, "--max_steps", "4"])
    assert "checkpoint-4 is the end of a finished run: 4 steps" in message
    assert "--max_steps is 4. To train on, give a larger --max_steps." in message
    message = one_line_error(train.main, [*again, "--num_train_epochs", "0.5"])
    assert "--num_train_epochs is 0.5. To train on, give a larger --num_train_epochs." in message
    message = one_line_error(train.main, [*again, "--max_steps", "5", "--threshold", "7"])
    assert "makes its levels with threshold=127, this run with 7: it cannot be resumed" in message
    assert before == {path: path.stat().st_mtime_ns for path in run.rglob("*")}
    capsys.readouterr()

    for name in ("results.json", "model.safetensors"):  # as if it had been stopped before it wrote them
        (run / name).unlink()
    train.main([*again, "--max_steps", "4"])
    assert "only the results are written" in capsys.readouterr().out
    assert_same(load_file(run / "model.safetensors"), weights)
    found = json.loads((run / "results.json").read_text())
    for name in ("steps", "epochs", "nats_per_image"):
        assert found[name] == scores[name], name

    train.main([*again, "--max_steps", "5"])
    assert json.loads((run / "results.json").read_text())["steps"] == 5


@pytest.mark.parametrize("steps", [3, 4])  # in the middle and at the end of an epoch
def test_a_finished_run_that_code_resumes_only_becomes_what_it_was(tmp_path, grey_digits, steps):
    def run(resume, **options):
        options = {"max_steps": steps, "save_strategy": "steps", "save_steps": steps, "ema_decay": 0.5, **options}
        trainer = trainer_for(tmp_path, gated_model(seed=resume, num_levels=2), grey_digits(), **options)
        return trainer, trainer.train(resume_from_checkpoint=resume or None)

    first, _ = run(False)
    for options in ({}, {"max_steps": -1, "num_train_epochs": steps / 4}):
        again, output = run(True, **options)
        assert output.global_step == again.state.global_step == steps
        assert_same(weights_of(first.model), weights_of(again.model))
        assert_same(first.ema.average, again.ema.average)


def test_a_checkpoint_of_the_model_alone_is_not_resumed(tmp_path, digits_words):
    run = tmp_path / "run"
    words = [*digits_words, "--binarization", "threshold", "--use_cpu", "true", "--output_dir", str(run)]
    train.main([*words, "--max_steps", "1", "--save_only_model", "true"])
    message = one_line_error(train.main, [*words, "--max_steps", "2", "--resume_from_checkpoint", "last"])
    assert "checkpoint-1 was saved with --save_only_model true" in message
    assert f"--model_name_or_path {run / 'run' / 'checkpoint-1'}" in message


def test_no_script_imports_the_library_that_has_the_name_of_a_script():
    for path in (ROOT / "training").glob("*.py"):
        assert not re.search(r"^\s*(import|from) evaluate\b", path.read_text(), flags=re.MULTILINE), path


# Streams


@pytest.fixture
def stream():
    """A stream of ten digits of 6×6, binarised anew in each epoch; some without their class."""
    rows = training.load_split(DIGITS, "train[3:13]", streaming=True)
    processor = PixelCNNImageProcessor(num_levels=2, binarization="stochastic", size=6)
    return lambda: training.LevelStream(rows, 2, processor, with_classes=True, class_dropout=0.2, seed=3)


def test_a_stream_shows_each_image_once_an_epoch_in_an_order_of_its_own(tmp_path):
    stored = training.load_split(DIGITS, "train[3:13]", cache_dir=str(tmp_path))
    rows = training.load_split(DIGITS, "train[3:13]", streaming=True)
    processor = PixelCNNImageProcessor(num_levels=5)
    known = training.LevelDataset(stored, 5, processor, with_classes=True)
    known = {image["pixel_values"].tobytes(): (index, image["class_ids"]) for index, image in enumerate(known)}
    stream = iter(training.LevelStream(rows, 5, processor, with_classes=True))
    epochs = []
    for _ in range(3):
        items = [next(stream) for _ in range(10)]
        assert all(item["pixel_values"].dtype == np.uint8 for item in items)
        found = [known[item["pixel_values"].tobytes()] for item in items]
        assert [class_id for _, class_id in found] == [item["class_ids"] for item in items]
        epochs.append([index for index, _ in found])
    assert all(sorted(order) == list(range(10)) for order in epochs)
    assert len({tuple(order) for order in epochs}) == 3


def test_a_stream_is_the_same_again_and_differs_from_epoch_to_epoch(stream):
    first, second = (
        [next(items) for _ in range(25)] for items in (iter(stream()), iter(stream()))
    )  # two and a half epochs
    assert all(
        np.array_equal(a["pixel_values"], b["pixel_values"]) and a["class_ids"] == b["class_ids"]
        for a, b in zip(first, second, strict=True)
    )
    assert len({item["pixel_values"].tobytes() for item in first}) > 20
    assert {item["class_ids"] for item in first} > {-1}


def test_a_run_on_a_stream_resumes_exactly(tmp_path, stream):
    def run(folder, checkpoint=None):
        model = gated_model(num_levels=2, num_classes=10, dropout=0.2)
        options = {"max_steps": 7, "save_strategy": "steps", "save_steps": 4, "ema_decay": 0.8}
        trainer = trainer_for(folder, model, stream(), **options)
        trainer.train(resume_from_checkpoint=checkpoint)
        return weights_of(trainer.model) | {f"average {k}": v for k, v in trainer.ema.average.items()}

    whole = run(tmp_path / "whole")
    assert_same(whole, run(tmp_path / "resumed", str(tmp_path / "whole" / "checkpoint-4")))  # in the second epoch


def test_train_reads_a_stream_and_says_only_what_it_knows(tmp_path, digits_words):
    words = [*digits_words, "--streaming", "true", "--class_conditional", "true", "--binarization", "threshold"]
    train.main([*words, "--max_steps", "7", "--output_dir", str(tmp_path / "run")])
    results = json.loads((tmp_path / "run" / "results.json").read_text())
    assert (results["steps"], results["num_images"]) == (7, 7)
    assert not {"epochs", "num_training_images"} & set(results)
    assert AutoModel.from_pretrained(tmp_path / "run").config.id2label[3] == "3"


def test_a_stream_that_cannot_be_used_is_answered_in_one_line(tmp_path, digits_words):
    words = [*digits_words, "--streaming", "true", "--output_dir", tmp_path / "run"]
    assert "--streaming needs --max_steps" in one_line_error(train.main, words)
    words += ["--max_steps", "1"]
    assert "at most one" in one_line_error(train.main, [*words, "--dataloader_num_workers", "2"])
    for split, message in {
        "train[-5:]": "a stream has splits like train or train[100:200]",
        "night": "cannot stream split 'night'",
        "train[5:5]": "split 'train[5:5]' of data set",
    }.items():
        assert message in one_line_error(train.main, [*words, "--train_split", split])


def test_a_loss_that_is_not_finite_ends_the_training(digits_words, tmp_path):
    words = [*digits_words, "--learning_rate", "1e30", "--logging_steps", "1", "--output_dir", tmp_path / "run"]
    message = one_line_error(train.main, [*words, "--max_grad_norm", "0", "--eval_strategy", "no"])
    assert "the training has diverged. Lower `learning_rate` (1e+30)" in message
    assert not (tmp_path / "run" / "model.safetensors").exists()


def test_a_checkpoint_keeps_no_token(tmp_path):
    args = PixelCNNTrainingArguments(output_dir=str(tmp_path), hub_token="anything", learning_rate=0.5, use_cpu=True)
    torch.save(args, tmp_path / "training_args.bin")
    kept = torch.load(tmp_path / "training_args.bin", weights_only=False)
    assert (args.hub_token, kept.hub_token, kept.learning_rate) == ("anything", None, 0.5)


def test_what_would_have_no_effect_is_refused(digits_words, tmp_path):
    cases = [
        (["--label_smoothing_factor", "0.1"], "`label_smoothing_factor` cannot be used: the loss is a likelihood"),
        (["--bf16_full_eval", "true"], "`bf16_full_eval` cannot be used"),
        (["--dataloader_persistent_workers", "true"], "workers that stay would show what was drawn for the first"),
        (["--do_train", "false"], "`do_train` must be True"),
        (["--do_predict", "true"], "`do_predict` cannot be used: there is nothing to predict"),
        (["--neftune_noise_alpha", "1"], "`neftune_noise_alpha` cannot be used"),
        (["--use_liger_kernel", "true"], "`use_liger_kernel` cannot be used"),
        (["--optim_args", "momentum=0.9"], "`optim_args` cannot be used: adamw_torch_fused reads none"),
        (["--max_steps", "0"], "--max_steps must be at least 1, or -1 for no limit, got 0."),
        (["--fsdp", "full_shard"], "only works in distributed training"),
        (["--hub_strategy", "every_save"], "`hub_strategy` must be end, got 'every_save'"),
        (["--num_levels", "0"], "`num_levels` must be an integer from 2 to 256, got 0"),
        (["--num_channels", "0"], "`num_channels` must be 1"),
        (["--image_size", "0"], "--image_size must be one or two positive integers, height and width, got 0."),
    ]
    for words, message in cases:
        assert message in one_line_error(train.main, [*digits_words, *words, "--output_dir", tmp_path / "run"])
