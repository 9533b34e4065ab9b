r"""
The folder of a published model: what the run says about itself, the files that go to the Hub, and a check that these
work without the package. `publish.py` pushes it.
"""

import contextlib
import fnmatch
import json
import math
import os
import re
import shlex
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path

import torch
import yaml
from PIL import Image
from places import beside
from publish_arguments import FolderArguments
from safetensors.torch import load_file, save_file
from transformers import PreTrainedModel

import hf_pixelcnn
from hf_pixelcnn import FAMILIES, PixelCNNImagePipeline
from hf_pixelcnn.training import InputError, draw_samples, load_model, model_card
from hf_pixelcnn.training.cards import METRICS
from hf_pixelcnn.training.files import write_json
from hf_pixelcnn.training.pictures import readable_picture
from hf_pixelcnn.training.saved_models import check_finite

PROJECT = Path(__file__).resolve().parent.parent
PRIVATE = re.compile(  # absolute paths, home and parent folders; tokens and passwords; credentials and users in URLs
    r"""(^|[\s=,;\[({"'])(/+\w|~([\w.-]*[\\/]|$)|\\|[A-Za-z]:[\\/])|file://|(^|[\s"'/])\.\./|://[^/\s]*@|\w@[\w.-]+:"""
    r"""|hf_[A-Za-z0-9]{20,}|gh[a-z]_\w{20,}|github_pat_\w{20,}|AKIA[A-Z0-9]{16}|(?i:(token|api_?key|password|secret)["']?\s*[:=]\s*\S)"""
)
END_OF_PNG = b"IEND\xaeB`\x82"
PICTURES = ("samples.png", "loss_curve.png")
SETTINGS = ("config.json", "generation_config.json", "preprocessor_config.json", "results.json")
SHARDS = ("model-?????-of-?????.safetensors", "model.safetensors.index.json")
WRITTEN = ("README.md", "recipe.yaml", "model.safetensors", *PICTURES, *SETTINGS, *SHARDS)
TEXTS = {"dataset", "split", "training_split", "command", "device", "quality"}  # in results.json, if there
NUMBERS = {"num_images", "num_training_images", "epochs", "steps", "seed", "training_seconds", "training_core_seconds"}
MARK = "With the `hf_pixelcnn` package installed"  # which every card says
MODULES = {path.name for path in Path(hf_pixelcnn.__file__).parent.glob("*.py")}


def read_results(folder: Path, dataset: str | None) -> dict:
    """`results.json` of a run, or nothing. `dataset` takes the place of the folder that the run read."""
    path = folder / "results.json"
    if not path.exists():
        return {}
    try:
        results = json.loads(path.read_text(encoding="utf-8"))
        read = results["dataset"]
    except (ValueError, KeyError, TypeError) as error:
        raise InputError(f"{path} is not what training/train.py writes: {error!r}.") from error
    check_results(path, results)
    if dataset:
        results["dataset"] = dataset
    elif os.path.isabs(read) or os.path.exists(read):
        raise InputError(f"the run read a local data set, {read}: give its id on the Hub or its name with --dataset.")
    if "command" in results:
        results["command"] = portable_command(results["command"], {read: dataset} if dataset else {})
    return results


def check_results(path: Path, results: dict):
    """Raise if what a card repeats from `results.json` is no text, or no finite number, where it should be."""
    for name in sorted(results.keys() & (TEXTS | NUMBERS | METRICS.keys())):
        value, is_text = results[name], name in TEXTS
        is_right = isinstance(value, str) if is_text else isinstance(value, int | float) and math.isfinite(value)
        if not is_right:
            raise InputError(f"{path}: `{name}` must be {'text' if is_text else 'a finite number'}, got {value!r}.")


def check_public(what: str, text: str):
    """Raise if `text` holds a path on this machine, the name of a user, or what looks like a secret."""
    if PRIVATE.search(text):
        raise InputError(
            f"{what} holds {text.strip()!r}: a path of this machine, or a secret. Put a public name in its place."
        )


def strings_in(value: object) -> Iterator[str]:
    """All text in what JSON can hold, keys of dictionaries included, and in bytes."""
    if isinstance(value, dict):
        value = [*value, *value.values()]
    if isinstance(value, str):
        yield value
    elif isinstance(value, bytes):
        yield from re.findall("[ -~]{4,}", value.decode("latin-1"))
    elif isinstance(value, list):
        for item in value:
            yield from strings_in(item)


def check_all_public(folder: Path):
    """Apply [`check_public`] to all text in the JSON files of a folder, and in its pictures beside the pixels."""
    for path in sorted(folder.glob("*.json")):
        for text in strings_in(json.loads(path.read_text(encoding="utf-8"))):
            check_public(path.name, text)
    for path in sorted(folder.glob("*.png")):
        check_picture(path)
        with Image.open(path) as picture:
            for text in strings_in(list(picture.info.values())):
                check_public(path.name, text)


def check_picture(path: Path):
    """Raise unless a file is a whole PNG picture with nothing after it."""
    with readable_picture(path.name), Image.open(path, formats=["PNG"]) as picture:
        picture.load()
    if not path.read_bytes().endswith(END_OF_PNG):
        raise InputError(f"{path.name} goes on after the end of its picture: save it anew.")


def portable_command(command: str, names: dict[str, str]) -> str:
    r"""
    A training command that anybody may read, and run in a checkout of the project.

    Args:
        command (`str`): As the run wrote it down.
        names (`dict`): Words to replace, such as a folder by the id of its data set.

    Raises:
        InputError: If it holds a path on this machine or what looks like a secret.
    """
    words = []
    try:
        parts = shlex.split(command)
    except ValueError as error:
        raise InputError(f"the command of the run, in results.json, cannot be read: {error}.") from error
    for word in parts:
        option, equals, value = word.rpartition("=") if word.startswith("--") else ("", "", word)
        value = names.get(value, value)
        if Path(value).is_absolute() and Path(value).is_relative_to(PROJECT):
            value = str(Path(value).relative_to(PROJECT))
        check_public("the command of the run, in results.json,", value)
        words.append(option + equals + value)
    return shlex.join(words)


def read_recipe(folder: Path, given: str | None) -> str | None:
    """The text of the recipe of a run; `None` if it had none."""
    path = Path(given) if given else folder / "recipe.yaml"
    if not given and not path.exists():
        return None
    try:
        text = path.read_text(encoding="utf-8")
        is_recipe = isinstance(yaml.safe_load(text), dict)
    except (yaml.YAMLError, ValueError, RecursionError):  # also of text that is not UTF-8, or too deep
        is_recipe = False
    if not is_recipe:
        raise InputError(f"{path} is not a recipe: it must hold `key: value` pairs.")
    for line in text.splitlines():
        check_public(str(path), line)
    return text


def class_dropout_of(results: dict, recipe: str | None) -> float | None:
    """What a run says of its class dropout, for a model whose config does not; `None` if it says nothing."""
    if recipe is None:
        return results.get("class_dropout")
    return results.get("class_dropout", yaml.safe_load(recipe).get("class_dropout", 0.0))


def write_folder(folder: Path, place: str, is_on_hub: bool, args: FolderArguments) -> PreTrainedModel:
    r"""
    Write everything that goes to the Hub.

    Args:
        folder (`Path`): Where to write; an empty folder.
        place (`str`), is_on_hub (`bool`): See [`model_card`].
        args ([`FolderArguments`]): What to write.

    Returns:
        The model that was loaded from `args.model`.
    """
    source = Path(args.model)
    if not re.fullmatch(r"\d*[1-9]\d*[KMGT]B", args.max_shard_size):
        raise InputError(f"--max_shard_size must be a size as 300MB or 5GB, got {args.max_shard_size!r}.")
    results, recipe = read_results(source, args.dataset), read_recipe(source, args.recipe)
    if args.quality:
        results["quality"] = args.quality
    model, processor = load_model(args.model, dtype="auto")
    if model.config.model_type not in FAMILIES:
        raise InputError(f"{args.model} is a {model.config.model_type}, not one of {', '.join(FAMILIES)}.")
    check_finite(model)
    if model.config.num_classes and model.config.class_dropout is None:
        model.config.class_dropout = class_dropout_of(results, recipe)
    if processor is None:
        model.save_pretrained(folder, max_shard_size=args.max_shard_size)
    else:  # also writes what `pipeline(model=..., trust_remote_code=True)` needs
        PixelCNNImagePipeline(model, image_processor=processor, device="cpu").save_pretrained(
            folder, max_shard_size=args.max_shard_size
        )
    if results:
        write_json(results, folder / "results.json")
    if recipe:
        (folder / "recipe.yaml").write_text(recipe, encoding="utf-8")
    for name in PICTURES:
        if (source / name).exists():
            shutil.copyfile(source / name, folder / name)
    if not (folder / "samples.png").exists():
        draw_samples(model, processor, 64, results.get("seed", 0), folder / "samples.png")
    check_all_public(folder)
    with Image.open(folder / "samples.png") as samples:
        seed = samples.info.get("seed")
    has_curve = (folder / "loss_curve.png").exists()
    card = model_card(place, is_on_hub, model, processor, results, recipe, args.license, seed, has_curve)
    card.save(folder / "README.md")
    return model


@torch.no_grad()
def check_folder(folder: Path, model: PreTrainedModel):
    r"""
    Load a folder in a fresh process that has no hf_pixelcnn, and compare with `model` bit for bit.

    Args:
        folder (`Path`): What [`write_folder`] wrote.
        model: The model that the folder must hold, on the CPU.

    Raises:
        InputError: If the folder cannot be loaded there, or gives other logits or another image.
    """
    config = model.eval().config
    shape = (2, config.num_channels, *config.image_size)
    inputs = {"pixel_values": torch.randint(config.num_levels, shape, generator=torch.Generator().manual_seed(0))}
    condition = {}
    if config.num_classes:
        inputs["class_ids"], condition["class_ids"] = torch.tensor([0, -1]), [0]
    with tempfile.TemporaryDirectory() as scratch:
        question, answer = Path(scratch, "question.safetensors"), Path(scratch, "answer.safetensors")
        save_file({**inputs, "num_threads": torch.tensor(torch.get_num_threads())}, question)
        script = Path(__file__).with_name("load_without_package.py")
        finished = subprocess.run(
            [sys.executable, "-I", script, folder.resolve(), question, answer],
            capture_output=True,
            text=True,
            cwd=scratch,
            env={**os.environ, "HF_MODULES_CACHE": scratch, "HF_HUB_OFFLINE": "1"},
        )
        if finished.returncode:
            reason = (finished.stderr.strip().splitlines() or ["it was killed"])[-1]
            raise InputError(f"the folder written cannot be loaded without the package: {reason}")
        found = load_file(answer)
    if not torch.equal(found["logits"], model(**inputs).logits):
        raise InputError("loaded without the package, the model gives other logits: nothing was published.")
    levels = model.generate(generator=torch.Generator().manual_seed(0), **condition)
    if not torch.equal(found["levels"], levels):
        raise InputError("loaded without the package, the model draws another image: nothing was published.")


def not_written(names: Iterable[str], card: str, config: dict) -> list[str]:
    r"""
    Which files `publish.py` did not write.

    Args:
        names (iterable of `str`): The files of a folder or repository.
        card (`str`): The text of its README.md; without [`MARK`] in it, none of the files is one of ours.
        config (`dict`): Its config.json, which names source files of a family outside the package.
    """
    sources = MODULES | {f"{name.split('.')[0]}.py" for name in config.get("auto_map", {}).values()}
    return sorted(
        name
        for name in names
        if MARK not in card or (name not in sources and not any(fnmatch.fnmatch(name, known) for known in WRITTEN))
    )


def foreign_in_model(folder: Path) -> list[str]:
    """What in a folder is not of the folder of a model that `publish.py` wrote."""
    paths = {path.name: path for path in folder.iterdir()}
    card, config = (paths[name].read_text("utf-8") if name in paths else "" for name in ("README.md", "config.json"))
    folders = [name for name, path in paths.items() if path.is_dir()]
    return folders + not_written(paths.keys() - set(folders), card, json.loads(config or "{}"))


def check_may_be_replaced(folder: Path, foreign_in: Callable[[Path], list[str]]):
    """Raise if `folder` is no folder, or holds anything that an earlier call did not write."""
    if folder.is_symlink() or (folder.exists() and not folder.is_dir()):
        raise InputError(f"{folder} is a file or a link, not a folder: choose another --output_dir.")
    if foreign := foreign_in(folder) if folder.is_dir() else []:
        raise InputError(
            f"{folder} would be replaced, but holds files that this script did not write "
            f"({', '.join(foreign[:5])}{', ...' * (len(foreign) > 5)}): choose another --output_dir."
        )


def files_in(folder: Path) -> dict[str, Path]:
    """The files in a folder and those below it, by their paths inside it."""
    return {path.relative_to(folder).as_posix(): path for path in folder.rglob("*") if path.is_file()}


def recover(folder: Path):
    """Undo what a killed call left beside `folder`: half a new one, or the old one already out of the way."""
    shutil.rmtree(beside(folder, "new"), ignore_errors=True)
    if (old := beside(folder, "old")).exists():
        shutil.rmtree(old) if folder.exists() else old.rename(folder)


def replace(folder: Path):
    """Let the new content of `folder` take its place; on any error the old one is back."""
    old = beside(folder, "old")
    if folder.exists():
        folder.rename(old)
    try:
        beside(folder, "new").rename(folder)
    except BaseException:
        if old.exists():
            old.rename(folder)
        raise
    shutil.rmtree(old, ignore_errors=True)


@contextlib.contextmanager
def written_anew(folder: Path) -> Iterator[Path]:
    """An empty folder beside `folder` to write into, which takes its place at the end if nothing has failed."""
    new = beside(folder, "new")
    new.mkdir(parents=True)
    try:
        yield new
        replace(folder)
    finally:
        shutil.rmtree(new, ignore_errors=True)
