r"""
Attacks: random settings in which the fast paths must equal the slow ones, damaged streams, and what no script can use.

    python tests/attacks.py --seconds 60 --seed 0
    python tests/attacks.py --seed 0 --case arguments:17

A case is made from the seed, its kind and its number alone. What must never happen: a wrong result (another image than
the reference, a stream that decodes to another picture) and a traceback of a script, which has to end with one line.
Prints how many inputs were tried, what went wrong, and the time and the memory of the worst input; the exit code is 1
if anything went wrong. Scripts that are at work after some seconds, as they should be, are stopped and counted as such.
"""

import argparse
import contextlib
import io
import os
import random
import shutil
import signal
import sys
import tempfile
import time
import traceback
from collections.abc import Callable
from dataclasses import dataclass, field, fields
from pathlib import Path

import numpy as np
import torch
from conftest import DIGITS, FAMILIES, VARIANTS, bomb, build_model, classy_model, conditions
from PIL import Image
from safetensors.torch import save_file

import hf_pixelcnn
from hf_pixelcnn import PixelCNNImageProcessor
from hf_pixelcnn.compressed_stream import CompressedStreamError

PATIENCE = 10  # seconds for one input
RUN = ["--train_split", "train[:8]", "--eval_split", "test[:2]", "--image_size", "6", "--hidden_size", "4"]
RUN += ["--num_hidden_layers", "1", "--head_hidden_size", "4", "--first_kernel_size", "3", "--max_steps", "1"]
RUN += ["--num_samples", "1", "--per_device_train_batch_size", "4", "--eval_strategy", "no", "--save_strategy", "no"]
RUN += ["--disable_tqdm", "true", "--seed", "0"]
WORDS = ["", " ", "-1", "0", "1", "2", "-0.5", "1e-3", "1e400", "nan", "inf", "-inf", "true", "none", "[1", "{}", "x"]
WORDS += [str(2**31), str(2**63), str(2**64), str(10**30), "9" * 5000, "é", "\u2028", "a" * 300, "a/b/c", "../up"]
WORDS += ["missing.png", "here", "file.txt", "/dev/null", "/dev/full", "test[:2]", "train", "5x", "1,2,3", "0x10"]


class TookTooLongError(BaseException):
    """An input is still at work after [`PATIENCE`] seconds."""


@dataclass
class Outcome:
    """What became of the inputs of one kind."""

    tried: int = 0
    refused: int = 0
    stopped: int = 0
    spent: float = 0.0  # seconds
    wrong: list[str] = field(default_factory=list)
    tracebacks: list[str] = field(default_factory=list)
    seconds: tuple[float, str] = (0.0, "")
    memory: tuple[int, str] = (0, "")


def peak_memory(start_anew: bool = False) -> int:
    """Bytes of the highest resident memory since the last call that starts anew; 0 where Linux does not tell."""
    try:
        if start_anew:
            Path("/proc/self/clear_refs").write_text("5")
        lines = Path("/proc/self/status").read_text().splitlines()
    except OSError:
        return 0
    name = "VmRSS:" if start_anew else "VmHWM:"
    return next(1024 * int(line.split()[1]) for line in lines if line.startswith(name))


# Settings: the fast paths against the slow ones


def random_settings(rng: random.Random) -> tuple[torch.nn.Module, dict]:
    """A model in float64 and arguments of `generate` that it can meet."""
    family = rng.choice(sorted(FAMILIES))
    variants = [
        variant
        for variant in VARIANTS.values()
        if FAMILIES[family].promises("colour_without_mixture")
        or variant.get("num_channels", 1) == 1
        or variant.get("output_distribution") == "logistic_mixture"
    ]
    config = dict(rng.choice(variants)) | {"image_size": [rng.randint(1, 6), rng.randint(1, 6)]}
    make = classy_model if config.get("num_classes") else build_model
    model = make(family, seed=rng.randrange(2**20), **config).double().eval()
    batch = rng.randint(1, 3)
    request = {"num_images": batch, **conditions(model, batch)}
    for name, values in {
        "temperature": [1, 0.5, 2.0],
        "top_k": [0, 1, 3],
        "top_p": [1.0, 0.9, 0.3],
        "min_p": [0.0, 0.2],
        "do_sample": [True, True, False],
    }.items():
        request[name] = rng.choice(values)
    if "class_ids" in request and rng.random() < 0.5:
        request["class_ids"] = [rng.randrange(config["num_classes"])] * batch
        request["guidance_scale"] = rng.choice([0, 0.4, 3.7])
    if rng.random() < 0.4:
        shape = (batch, model.config.num_channels, *model.config.image_size)
        noise = torch.Generator().manual_seed(rng.randrange(2**20))
        request["pixel_values"] = torch.randint(model.config.num_levels, shape, generator=noise)
        request["known_mask"] = torch.rand(shape, generator=noise) < rng.random()
        request["num_resamples"] = rng.choice([1, 3]) if request["do_sample"] else 1
    return model, request


def settings_case(rng: random.Random, place: Path):
    """The samplers draw the same images at any batch size, and the codec gives them back."""
    model, request = random_settings(rng)
    seed = rng.randrange(2**20)

    def draw(sampler: str, **more) -> torch.Tensor:
        return model.generate(**request, **more, generator=torch.Generator().manual_seed(seed), sampler=sampler)

    naive = draw("naive")
    assert torch.equal(naive, draw("cached")), "cached and naive differ"
    assert torch.equal(naive, draw("fixed_point")), "fixed point and naive differ"
    assert torch.equal(naive, draw("cached", max_batch_size=1)), "the batch size changes the images"
    class_ids = request.get("class_ids")
    data = hf_pixelcnn.compress(model, naive, class_ids)
    assert torch.equal(naive, hf_pixelcnn.decompress(model, data)), "the codec gives another image"


# Streams


def streams_case(rng: random.Random, place: Path):
    """A damaged stream is refused, or gives the images that were compressed."""
    classes = rng.choice([0, 3])
    model = build_model("gated_pixelcnn", num_levels=5, num_classes=classes, image_size=[4, 5])
    levels = torch.randint(5, (3, 1, 4, 5), generator=torch.Generator().manual_seed(0))
    good = hf_pixelcnn.compress(model, levels, torch.tensor([0, -1, 2]) if classes else None, comment=b"names")
    data = bytearray(good)
    for _ in range(rng.choice([1, 1, 2, 5])):
        at, kind = rng.randrange(len(data)), rng.randrange(6)
        if kind == 0:
            data[at] ^= 1 << rng.randrange(8)
        elif kind == 1:
            data[at] = rng.randrange(256)
        elif kind == 2:
            del data[at : at + rng.choice([1, 4, 100])]
        elif kind == 3:
            data[at:at] = rng.randbytes(rng.choice([1, 4, 100]))
        elif kind == 4:  # digits of the header, which say sizes
            digits = [i for i, byte in enumerate(data) if chr(byte).isdigit()]
            if digits:
                data[rng.choice(digits)] = ord(rng.choice("0123456789"))
        else:
            other = rng.randrange(len(data))
            data[at : at + 8], data[other : other + 8] = data[other : other + 8], data[at : at + 8]
        if not data:
            break
    found = hf_pixelcnn.decompress(model, bytes(data))
    assert torch.equal(found.cpu(), levels), "another picture"


# Scripts


def saved_model(folder: Path, **config) -> Path:
    """A small model with its image processor."""
    if not folder.exists():
        build_model("pixelcnn", num_levels=4, image_size=[6, 6], **config).save_pretrained(folder)
        PixelCNNImageProcessor(num_levels=4, size={"height": 6, "width": 6}).save_pretrained(folder)
    return folder


def scripts(place: Path) -> dict[str, tuple[Callable, list[str], list[type]]]:
    """Each script: its `main`, words with which it works, and the classes of its arguments."""
    import compress
    import convert_pixelcnnpp_checkpoint
    import judge
    import outliers
    import publish
    import receptive_field
    import sample
    import score
    import train
    import train_arguments

    model, data = str(saved_model(place / "model", num_classes=10)), ["--dataset", DIGITS, "--cache_dir", "cache"]
    Image.fromarray(np.arange(36, dtype=np.uint8).reshape(6, 6)).save("image.png")
    sets = ["--in_dataset", DIGITS, "--in_split", "test[:2]", "--out_dataset", DIGITS, "--out_split", "test[2:4]"]
    sets += ["--typical_split", "train[:2]", "--cache_dir", "cache"]
    return {
        "train": (
            train.main,
            [*data, *RUN, "--output_dir", "run"],
            [train_arguments.DataArguments, train_arguments.ModelArguments, train_arguments.TrainingOptions],
        ),
        "sample": (sample.main, ["--model", model, "--num_images", "2"], [sample.SamplingArguments]),
        "complete": (
            sample.main,
            ["--model", model, "--complete", DIGITS, "--split", "test[:2]", "--num_images", "1", *data[2:]],
            [sample.SamplingArguments],
        ),
        "score": (score.main, ["--model", model, *data, "--split", "test[:3]"], [score.EvaluationArguments]),
        "outliers": (outliers.main, ["--model", model, *sets], [outliers.OutlierArguments]),
        "judge": (
            judge.main,
            ["--model", model, "--classifier", model, "--num_images", "3"],
            [judge.JudgeArguments],
        ),
        "receptive_field": (
            receptive_field.main,
            ["--models", model, "--output", "field.png"],
            [receptive_field.ReceptiveFieldArguments],
        ),
        "compress": (
            lambda words: compress.main(["compress", *words]),
            ["--model", model, "--input", "image.png", "--output", "image.pxc"],
            [compress.CompressArguments],
        ),
        "publish": (publish.main, ["--model", model, "--output_dir", "hub"], [publish.PublishArguments]),
        "convert": (
            convert_pixelcnnpp_checkpoint.main,
            ["--checkpoint", "port.pth", "--output_dir", "ours", "--image_size", "8"],
            [convert_pixelcnnpp_checkpoint.ConversionArguments],
        ),
    }


# Options that make a script do something else than its work, or change what others of this process compute.
LEFT_ALONE = {"torch_compile", "full_determinism", "use_cpu", "cache_dir", "log_level", "log_level_replica"}
LEFT_ALONE |= {"local_rank", "push_to_hub", "repo_id", "deepspeed", "fsdp", "debug"}


def arguments_case(rng: random.Random, place: Path):
    """One or two options of a script have values that mean nothing."""
    name, (main, words, classes) = rng.choice(sorted(scripts(place).items()))
    options = [option.name for kind in classes for option in fields(kind) if option.init]
    options = [option for option in options if option not in LEFT_ALONE]
    words = list(words)
    for _ in range(rng.choice([1, 1, 2])):
        words += [f"--{rng.choice(options)}", rng.choice(WORDS)]
    run_script(main, words, name)


def data_case(rng: random.Random, place: Path):
    """Data sets, pictures, recipes, checkpoints and saved models that are damaged, foreign or absurd."""
    name, make = rng.choice(sorted(DAMAGES.items()))
    run_script(*make(rng, scripts(place)), name)


def run_script(main: Callable, words: list[str], name: str):
    """Run a script; whatever it says must be one line."""
    try:
        main(words)
    except SystemExit as ended:
        if ended.code == 0:  # help
            return
        line = str(ended.code)
        assert line.startswith("error: ") and len(line.splitlines()) == 1, f"{name} {words}: {line!r}"  # noqa: PT018
        raise Refused(line) from ended


class Refused(Exception):  # noqa: N818 - as it should be
    """A script has refused its input in one line."""


def rows(rng: random.Random, columns: dict, **features) -> str:
    import datasets

    folder = f"rows{rng.randrange(10**9)}"
    datasets.Dataset.from_dict(columns, datasets.Features(features)).save_to_disk(folder)
    return folder


def png(size=(6, 6), mode="L") -> bytes:
    file = io.BytesIO()
    Image.new(mode, size).save(file, "png")
    return file.getvalue()


def hostile_rows(rng: random.Random, all_scripts: dict) -> tuple[Callable, list[str]]:
    """A column of images of which one cannot be used, in a script that reads a data set."""
    import datasets

    bad = rng.choice([None, b"", b"text", png()[:50], bomb(), png((9, 9)), png((1, 1), "RGBA"), png(mode="I;16")])
    images = [{"bytes": png(), "path": f"{i}.png"} for i in range(9)]
    images[rng.choice([0, 0, 5])] = None if bad is None else {"bytes": bad, "path": "bad.png"}
    labels = rng.choice([list(range(9)), [None] * 9, [0, None] + [1] * 7, [-5] * 9, [2**40] * 9])
    label = rng.choice([datasets.Value("int64"), datasets.ClassLabel(names=[str(i) for i in range(10)])])
    if isinstance(label, datasets.ClassLabel):
        labels = [x if x is None or 0 <= x < 10 else -1 for x in labels]
    folder = rows(rng, {"image": images, "label": labels}, image=datasets.Image(), label=label)
    main, words, _ = all_scripts[rng.choice(["train", "score", "complete"])]
    words = [folder if word == DIGITS else word for word in words]
    words = [word.replace("test[", "train[") for word in words]
    if "--output_dir" in words:
        with_classes = ["--class_conditional", "true", "--class_column", "label"]
        words += rng.choice([[], with_classes, ["--binarization", "stochastic"], ["--streaming", "true"]])
    return main, words


def hostile_codes(rng: random.Random, all_scripts: dict) -> tuple[Callable, list[str]]:
    """A column of codes that are ragged, missing or too large."""
    import datasets

    grids = [[[0, 1], [2, 3]] for _ in range(9)]
    bad = [None, [], [[]], [[1], [2, 3]], [[0, 1]], [[9, 9], [9, 9]], [[-1, 0], [0, 0]], [[None, 0], [0, 0]]]
    grids[rng.choice([0, 4])] = rng.choice(bad)
    folder = rows(rng, {"grid": grids}, grid=datasets.List(datasets.List(datasets.Value("int64"))))
    main, words, _ = all_scripts["train"]
    words = [folder if word == DIGITS else word.replace("test[", "train[") for word in words]
    at = words.index("--image_size")
    return main, [*words[:at], *words[at + 2 :], "--num_levels", "4", "--input_encoding", "embedding"]


def hostile_recipe(rng: random.Random, all_scripts: dict) -> tuple[Callable, list[str]]:
    """A recipe with absurd numbers or nesting."""
    names = ["learning_rate", "num_train_epochs", "seed", "hidden_size", "dataset", "bf16", "label_names", "what"]
    values = ["1" * 5000, "0x" + "f" * 5000, "[" * 4000, "{a: {b: [1]}}", "[[[]]]", "null", "yes", "1e400", "-.inf"]
    values += [".nan", "2024-13-45", "!!python/object:os.system x", "&a [*a, *a]", "'\\x00'", "- 1", "\t", "é"]
    shared = "&a [1, 1]\n" + "\n".join(f"k{i}: &b{i} [{', '.join(['*a'] * 99)}]" for i in range(9))
    text = f"{rng.choice(names)}: {rng.choice([*values, shared])}"
    Path("recipe.yaml").write_text(rng.choice([text, text, text, "- 1", "1", "\x00"]), encoding="utf-8")
    main, words, _ = all_scripts[rng.choice(["train", "sample", "score"])]
    return main, [*words, "--config", "recipe.yaml"]


def hostile_checkpoint(rng: random.Random, all_scripts: dict) -> tuple[Callable, list[str]]:
    """A foreign, damaged or inconsistent file for the converter, or a good one in a common wrapper."""
    from test_conversion import port_state_dict

    state = port_state_dict(rng.choice([1, 3]), torch.float32)
    name = rng.choice(sorted(state))
    change = rng.randrange(12)
    if change == 0:
        del state[name]
    elif change == 1:
        state[name] = rng.choice([torch.zeros(3), torch.zeros(()), torch.zeros(2, 2, 2, 2, 2), torch.ones(1).long()])
    elif change == 2:
        state[name] = rng.choice([3, "text", None, [1], {"a": 1}])
    elif change == 3:
        state[name.replace("0", "999999999")] = state.pop(name)
    elif change == 4:
        state[name] = state[name] * float("nan")
    elif change == 5:
        state[name] = torch.zeros(1).expand(10**6, 10**6)
    elif change == 6:
        state = {key.replace("weight_g", "parametrizations.weight.original0"): x for key, x in state.items()}
        state = {key.replace("weight_v", "parametrizations.weight.original1"): x for key, x in state.items()}
    elif change == 7:
        state[rng.choice([7, "", "x", ".bias"])] = torch.zeros(1)
    wrapped = rng.choice([state, {"state_dict": state, "epoch": 3}, {"model": state}, [state], {"what": state}])
    if rng.random() < 0.2 and all(isinstance(x, torch.Tensor) and x.is_contiguous() for x in state.values()):
        with contextlib.suppress(Exception):
            save_file({str(key): x.clone() for key, x in state.items()}, "port.safetensors")
    torch.save(wrapped, "port.pth")
    if rng.random() < 0.3:
        data = Path("port.pth").read_bytes()
        Path("port.pth").write_bytes(rng.choice([data[: len(data) // 2], b"", b"\x80\x04text", rng.randbytes(200)]))
    main, words, _ = all_scripts["convert"]
    file = "port.safetensors" if Path("port.safetensors").exists() and rng.random() < 0.5 else "port.pth"
    return main, [file if word == "port.pth" else word for word in words]


def hostile_model(rng: random.Random, all_scripts: dict) -> tuple[Callable, list[str]]:
    """A saved model of which a file is cut, emptied, random or of another kind."""
    names = ["sample", "score", "judge", "publish", "receptive_field", "compress", "outliers"]
    main, words, _ = all_scripts[rng.choice(names)]
    source = Path(words[1])
    shutil.copytree(source, "broken")
    files = ["config.json", "model.safetensors", "preprocessor_config.json", "generation_config.json"]
    path = Path("broken", rng.choice(files))
    data = path.read_bytes()
    text = data.decode(errors="ignore")
    cut = data[: rng.randrange(len(data))]
    other = rng.choice(["null", "[]", "3", '"x"', "{}", '{"model_type": "pixelcnn"}', '{"model_type": 3}', "\x00"])
    number = text.replace("4", rng.choice(["-4", "1e400", "null", '"4"', "99999999999", "[4]", "3"]))
    contents = [cut, b"", rng.randbytes(100), other.encode()]
    path.write_bytes(rng.choice([*contents, number.encode()] if path.suffix == ".json" else contents))
    return main, ["broken" if word == str(source) else word for word in words]


def hostile_picture(rng: random.Random, all_scripts: dict) -> tuple[Callable, list[str]]:
    """A picture as a mask or to be compressed, or the name of one to write."""
    data = rng.choice(
        [bomb(), b"", b"text", png()[:40], png((1, 1)), png(mode="RGBA"), png(mode="I;16"), png(mode="1")]
    )
    Path("hostile.png").write_bytes(data)
    kind = rng.randrange(3)
    if kind == 0:
        main, words, _ = all_scripts["complete"]
        return main, [*words, "--mask", "hostile.png"]
    if kind == 1:
        main, words, _ = all_scripts["compress"]
        return main, [*words, "--input", "hostile.png"]
    main, words, _ = all_scripts[rng.choice(["sample", "complete", "receptive_field"])]
    endings = ["", ".psd", ".xbm", ".fits", ".hdf", ".icns", ".pdf", ".qoi", ".svg", ".jpg", ".webp", ".gif", ".PNG"]
    return main, [*words, "--output", "out" + rng.choice(endings)]


DAMAGES = {
    make.__name__: make
    for make in (hostile_rows, hostile_codes, hostile_recipe, hostile_checkpoint, hostile_model, hostile_picture)
}
CASES = {"settings": settings_case, "streams": streams_case, "arguments": arguments_case, "data": data_case}


def attempt(kind: str, number: int, seed: int, place: Path, outcome: Outcome):
    """Run one case in an empty folder, and write down what became of it."""
    label = f"{kind}:{number}"
    rng = random.Random(f"{seed} {label}")
    folder = place / "case"
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    before, environment = Path.cwd(), dict(os.environ)
    os.chdir(folder)
    Path("here").mkdir()
    Path("file.txt").write_text("text")
    scripts(place)  # at first this imports them, which may take longer than an input has

    def end(number, frame):
        raise TookTooLongError

    signal.signal(signal.SIGALRM, end)
    memory, start = peak_memory(start_anew=True), time.perf_counter()
    outcome.tried += 1
    try:
        signal.setitimer(signal.ITIMER_REAL, PATIENCE)
        with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()):
            CASES[kind](rng, place)
    except TookTooLongError:
        outcome.stopped += 1
    except (Refused, CompressedStreamError):
        outcome.refused += 1
    except AssertionError as error:
        outcome.wrong.append(f"{label}: {error}")
    except Exception:
        outcome.tracebacks.append(f"{label}: {traceback.format_exc()}")
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        os.chdir(before)
        os.environ.clear()
        os.environ.update(environment)
    seconds = time.perf_counter() - start
    outcome.spent += seconds
    outcome.seconds = max(outcome.seconds, (seconds, label))
    outcome.memory = max(outcome.memory, (peak_memory() - memory, label))


def attack(seconds: float, seed: int, kinds: list[str] | None = None) -> dict[str, Outcome]:
    """Cases of all kinds, as long for each, for so long in all; what became of them, by kind."""
    outcomes = {kind: Outcome() for kind in kinds or CASES}
    with tempfile.TemporaryDirectory() as place:
        while sum(outcome.spent for outcome in outcomes.values()) < seconds:
            kind, outcome = min(outcomes.items(), key=lambda item: item[1].spent)
            attempt(kind, outcome.tried, seed, Path(place), outcome)
    return outcomes


def described(outcomes: dict[str, Outcome]) -> str:
    """A table of what became of the inputs, and all that went wrong."""
    lines = [f"{'kind':10} {'inputs':>7} {'refused':>8} {'stopped':>8} {'wrong':>6} {'tracebacks':>11}  worst input"]
    for kind, x in outcomes.items():
        worst = f"{x.seconds[0]:.1f} s ({x.seconds[1]}), {x.memory[0] / 1e6:.0f} MB ({x.memory[1]})"
        counts = f"{x.tried:7} {x.refused:8} {x.stopped:8} {len(x.wrong):6} {len(x.tracebacks):11}"
        lines.append(f"{kind:10} {counts}  {worst}")
    return "\n".join([*lines, *(text for x in outcomes.values() for text in (*x.wrong, *x.tracebacks))])


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seconds", type=float, default=60, help="how long")
    parser.add_argument("--seed", type=int, default=0, help="of all cases")
    parser.add_argument("--kinds", nargs="+", choices=CASES, help="only these")
    parser.add_argument("--case", help="only this one, as in streams:3")
    args = parser.parse_args()
    if args.case:
        kind, number = args.case.split(":")
        outcomes = {kind: Outcome()}
        with tempfile.TemporaryDirectory() as place:
            attempt(kind, int(number), args.seed, Path(place), outcomes[kind])
    else:
        outcomes = attack(args.seconds, args.seed, args.kinds)
    print(described(outcomes))
    sys.exit(any(x.wrong or x.tracebacks for x in outcomes.values()))


if __name__ == "__main__":
    main()
