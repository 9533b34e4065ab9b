r"""
Publish a trained model: write the folder that goes to the Hub, check it, push it.

    python training/publish.py --model runs/mnist_pixelcnn --repo_id USER/pixelcnn-mnist-binary --dry_run true
    python training/publish.py --model runs/mnist_pixelcnn --repo_id USER/pixelcnn-mnist-binary

The folder (`--output_dir`, by default `<model>/hub`) holds weights, configs, the source files that make it work
without the package, `results.json`, `samples.png`, the recipe, and a model card made from these. It is loaded in a
fresh process that cannot import the package, and must give the same logits and the same drawn image, bit for bit. Only
then is it pushed, in one commit, which also removes files that the repository has from an earlier version; files that
did not change are not uploaded again. `--dry_run true` stops before the push, and so does a missing `--repo_id`: the
folders in `model_cards/` were written that way. With `--output_dir` the model's own folder, if that was written by this
script, code and card are brought up to date (`make cards`). A token comes from `hf auth login` or HF_TOKEN.
"""

import contextlib
import fnmatch
import json
import os
import re
import shlex
import shutil
import subprocess
import sys
import tempfile
from dataclasses import dataclass, field
from pathlib import Path

import torch
import yaml
from command_line import CommandLineParser, one_line_errors
from huggingface_hub import CommitOperationAdd, CommitOperationDelete, EvalResult, HfApi, ModelCard, ModelCardData
from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalTokenNotFoundError
from huggingface_hub.utils import validate_repo_id
from safetensors.torch import load_file, save_file
from transformers import PreTrainedModel

from hf_pixelcnn import FAMILIES, PixelCNNImagePipeline, PixelCNNImageProcessor
from hf_pixelcnn.training import InputError, draw_samples, load_model, write_json

PROJECT = Path(__file__).resolve().parent.parent
PRIVATE = re.compile(  # absolute paths, homes and parents; tokens; credentials and users of remotes
    r"""(^|[\s=,;\[({"'])(/\w|~|\\|[A-Za-z]:[\\/])|file://|(^|[\s"'/])\.\./|hf_[A-Za-z0-9]{20,}|://[^/\s]*@|\w@[\w.-]+:"""
)
TASK = "unconditional-image-generation"
WRITTEN = ("README.md", "*.json", "model*.safetensors", "*.py", "samples.png", "recipe.yaml")
METRICS = {  # of results.json: their names, and digits that are worth giving
    "bits_per_dim": ("bits per dimension", 4),
    "nats_per_dim": ("nats per dimension", 4),
    "nats_per_image": ("nats per image", 2),
}


@dataclass
class PublishArguments:
    model: str = field(metadata={"help": "Folder of a trained model, as training/train.py leaves it."})
    repo_id: str | None = field(default=None, metadata={"help": "Where to push: USER/NAME or ORGANISATION/NAME."})
    output_dir: str | None = field(
        default=None, metadata={"help": "Folder to write, or to write anew; by default `hub` in the model's folder."}
    )
    dry_run: bool = field(default=False, metadata={"help": "Write and check the folder, and push nothing."})
    dataset: str | None = field(
        default=None, metadata={"help": "Id on the Hub, or name, of the data set, if the run read a local copy of it."}
    )
    recipe: str | None = field(
        default=None, metadata={"help": "YAML recipe of the run; by default the model folder's recipe.yaml."}
    )
    license: str = field(default="apache-2.0", metadata={"help": "Licence of the weights, as the Hub spells it."})
    max_shard_size: str = field(default="5GB", metadata={"help": "Weights above this size are split into files."})
    private: bool = field(default=False, metadata={"help": "Make the repository a private one."})
    revision: str | None = field(default=None, metadata={"help": "Branch to push to, made if there is none."})
    commit_message: str = field(default="Publish the model", metadata={"help": "Title of the commit."})


# What the run says about itself


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
    if dataset:
        results["dataset"] = dataset
    elif os.path.isabs(read) or os.path.exists(read):
        raise InputError(f"the run read a local data set, {read}: give its id on the Hub or its name with --dataset.")
    if "command" in results:
        results["command"] = portable_command(results["command"], {read: dataset} if dataset else {})
    return results


def check_public(what: str, text: str):
    """Raise if `text` holds a path of one machine, a user's name in one, or what looks like a secret."""
    if PRIVATE.search(text):
        raise InputError(
            f"{what} holds {text.strip()!r}: a path of this machine, or a secret. Put a public name in its place."
        )


def portable_command(command: str, names: dict[str, str]) -> str:
    r"""
    A training command as anybody may read it, and run it in a checkout of the project.

    Args:
        command (`str`): As the run wrote it down.
        names (`dict`): Words to write in place of others, such as a data set's id in place of a folder.

    Raises:
        InputError: If it holds a path of one machine or what looks like a token.
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
    """Text of the recipe of a run, `None` if it had none."""
    path = Path(given) if given else folder / "recipe.yaml"
    if not given and not path.exists():
        return None
    text = path.read_text(encoding="utf-8")
    try:
        is_recipe = isinstance(yaml.safe_load(text), dict)
    except yaml.YAMLError:
        is_recipe = False
    if not is_recipe:
        raise InputError(f"{path} is not a recipe: it must hold `key: value` pairs.")
    for line in text.splitlines():
        check_public(str(path), line)
    return text


# The model card


def describe_levels(processor: PixelCNNImageProcessor | None, num_levels: int) -> str:
    """How images become levels, in a few words."""
    if processor is None:
        return f"{num_levels:,} symbols"
    if processor.binarization == "threshold":
        return f"two levels: pixels above {processor.threshold} are 1"
    if processor.binarization == "stochastic":
        return "two levels, drawn: a pixel is 1 with probability pixel / 255"
    return "8-bit pixels" if num_levels == 256 else f"{num_levels} levels: floor(pixel · {num_levels} / 256)"


def card_data(name: str, model_type: str, levels: str, results: dict, license: str) -> ModelCardData:
    """The metadata of a card. What `results` does not hold is left out."""
    dataset = results.get("dataset", "")
    scores = [
        EvalResult(
            task_type=TASK,
            dataset_type=dataset,
            dataset_name=f"{dataset}, {levels}",
            dataset_split=results.get("split"),
            metric_type=key,
            metric_name=metric,
            metric_value=round(results[key], digits),
        )
        for key, (metric, digits) in METRICS.items()
        if key in results
    ]
    return ModelCardData(
        license=license,
        library_name="transformers",
        pipeline_tag=TASK,
        tags=[model_type.replace("_", "-"), "autoregressive", "likelihood"],
        datasets=[dataset] if re.fullmatch(r"[\w.-]+/[\w.-]+", dataset) else None,
        metrics=[score.metric_type for score in scores] or None,
        model_name=name if scores else None,
        eval_results=scores or None,
    )


def loading_code(place: str, model: PreTrainedModel, has_processor: bool, with_package: bool) -> str:
    """A block of code that loads the model and draws four images; with an image processor, also by the pipeline."""
    trust = "" if with_package else ", trust_remote_code=True"
    wanted = "num_images=4"
    if num_classes := model.config.num_classes:
        wanted = f"class_ids={[0, 0, min(1, num_classes - 1), min(1, num_classes - 1)]}"
    wanted += ", generator=torch.Generator().manual_seed(0)"
    pipe = f'pipeline("{TASK}", model="{place}")' if with_package else f'pipeline(model="{place}"{trust})'
    lines = [
        "import torch, hf_pixelcnn" if with_package else "import torch",
        f"from transformers import {'AutoImageProcessor, AutoModel, pipeline' if has_processor else 'AutoModel'}",
        "",
        f'model = AutoModel.from_pretrained("{place}"{trust})',
        f'processor = AutoImageProcessor.from_pretrained("{place}"{trust})' if has_processor else None,
        f"levels = model.generate({wanted})",
        "images = processor.post_process(levels)" if has_processor else None,
        f"\npipe = {pipe}  # or all of this at once" if has_processor else None,
        f"images = pipe({wanted}).images" if has_processor else None,
    ]
    return "```python\n" + "\n".join(line for line in lines if line is not None) + "\n```"


def training_paragraphs(results: dict, recipe: str | None) -> list[str]:
    """How the model came about, as far as the run wrote it down."""
    facts = []
    if "training_split" in results:
        facts.append(f"on `{results['training_split']}` of `{results['dataset']}`")
    for key, unit in (("num_training_images", "images"), ("epochs", "epochs"), ("steps", "steps")):
        if key in results:
            facts.append(f"{results[key]:,.10g} {unit}")
    if "seed" in results:
        facts.append(f"seed {results['seed']}")
    if "training_seconds" in results and "--resume_from_checkpoint" not in results.get("command", ""):
        facts.append(f"{results['training_seconds'] / 60:.1f} minutes on {results.get('device', 'one machine')}")
    paragraphs = [f"Trained {', '.join(facts)}."] if facts else []
    if results.get("command"):
        commit = f", commit `{results['commit']}`" if results.get("commit") else ""
        paragraphs.append(f"Command (hf_pixelcnn{commit}):\n\n```\n{results['command']}\n```")
    if recipe:
        paragraphs.append(f"Its [recipe](recipe.yaml):\n\n```yaml\n{recipe.strip()}\n```")
    return paragraphs


def write_card(
    folder: Path,
    name: str,
    place: str,
    is_on_hub: bool,
    model: PreTrainedModel,
    processor: PixelCNNImageProcessor | None,
    results: dict,
    recipe: str | None,
    license: str,
):
    """Write `README.md`: how to load the model, and what is known about it."""
    config, levels = model.config, describe_levels(processor, model.config.num_levels)
    family, rows = FAMILIES[config.model_type], model.model.rows_seen_above
    height, width = config.image_size
    remark = f"A pixel sees {rows} rows above it; what is further up does not shape it." if rows < height else ""
    without_package, note = place, "the source files in this repository:"
    if not is_on_hub:
        without_package = f"build/{name}"
        command = f"python training/publish.py --model {place} --output_dir {without_package}"
        note = f"the source files of a published folder, which `{command}` writes:"
    kind = f"A [{family.name}]({family.paper}) of {model.num_parameters():,} parameters"
    kind += f", conditional on {config.num_classes} classes" if config.num_classes else ""
    channels = {1: "one channel", 3: "three channels"}.get(config.num_channels, f"{config.num_channels} channels")
    parts = [
        f"# {name}",
        "With the `hf_pixelcnn` package installed (no remote code needed):",
        loading_code(place, model, processor is not None, with_package=True),
        f"Without the package, `trust_remote_code=True` runs {note}",
        loading_code(without_package, model, processor is not None, with_package=False),
        f"{kind}, for {height}×{width} images of {channels} and {levels}. {remark}".strip(),
    ]
    measured = {key: metric for key, metric in METRICS.items() if key in results}
    if measured:
        cells = {"data set": f"`{results['dataset']}`"}
        if "split" in results:
            cells["split"] = f"`{results['split']}`"
        if "num_images" in results:
            cells["images"] = f"{results['num_images']:,}"
        cells |= {metric: f"{results[key]:.{digits}f}" for key, (metric, digits) in measured.items()}
        table = [cells.keys(), ["---"] * len(cells), cells.values()]
        parts += ["## Results", "\n".join("| " + " | ".join(row) + " |" for row in table)]
        parts.append("Summed in float64 over the whole split; [results.json](results.json) has more.")
    if judged := results.get("judged"):  # by training/judge.py
        share = judged["share_of_samples_taken_for_their_class"]
        parts.append(
            f"Of {judged['num_images']:,} samples, {share:.1%} are taken for the class they were drawn for by the "
            f"classifier `{judged['classifier']}`."
        )
    parts += ["## Samples", "![First samples, unselected](samples.png)"]
    training = training_paragraphs(results, recipe)
    if training:
        parts += ["## Training", *training]
    parts += [
        "## Limits",
        f"The likelihood is that of {height}×{width} images made by this repository's image processor; that of other "
        "sizes or levels is not comparable."
        if processor
        else f"The model draws {height}×{width} codes; what decodes them to images is not part of this repository.",
    ]
    data = card_data(name, config.model_type, levels, results, license)
    ModelCard(f"---\n{data.to_yaml()}\n---\n\n" + "\n\n".join(parts) + "\n").save(folder / "README.md")


# The folder


def write_folder(folder: Path, place: str, args: PublishArguments) -> PreTrainedModel:
    r"""
    Write all that goes to the Hub.

    Args:
        folder (`Path`): Where to; empty.
        place (`str`): What the card gives to `from_pretrained`.
        args ([`PublishArguments`]): What to.

    Returns:
        The model, as loaded from `args.model`.
    """
    source = Path(args.model)
    results, recipe = read_results(source, args.dataset), read_recipe(source, args.recipe)
    model, processor = load_model(args.model, dtype="auto")
    if model.config.model_type not in FAMILIES:
        raise InputError(f"{args.model} is a {model.config.model_type}, not one of {', '.join(FAMILIES)}.")
    if processor is None:
        model.save_pretrained(folder, max_shard_size=args.max_shard_size)
    else:  # writes what `pipeline(model=..., trust_remote_code=True)` needs, too
        PixelCNNImagePipeline(model, image_processor=processor, device="cpu").save_pretrained(
            folder, max_shard_size=args.max_shard_size
        )
    if results:
        write_json(results, folder / "results.json")
    if recipe:
        (folder / "recipe.yaml").write_text(recipe, encoding="utf-8")
    if (source / "samples.png").exists():
        shutil.copyfile(source / "samples.png", folder / "samples.png")
    else:
        draw_samples(model, processor, 64, results.get("seed", 0), folder / "samples.png")
    name, is_on_hub = Path(place).name, args.repo_id is not None
    write_card(folder, name, place, is_on_hub, model, processor, results, recipe, args.license)
    return model


@torch.no_grad()
def check_folder(folder: Path, model: PreTrainedModel):
    r"""
    Load a folder in a fresh process that has no hf_pixelcnn, and compare with `model` bit for bit.

    Args:
        folder (`Path`): What [`write_folder`] wrote.
        model: The model that it must hold, on the CPU.

    Raises:
        InputError: If it does not load there, or gives other logits or another image.
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


def check_may_be_replaced(folder: Path):
    """Raise if `folder` holds anything that an earlier call would not have written."""
    for path in folder.iterdir() if folder.is_dir() else ():
        if path.is_dir() or not any(fnmatch.fnmatch(path.name, pattern) for pattern in WRITTEN):
            raise InputError(f"{folder} would be replaced, but holds {path.name}: choose another --output_dir.")
    if folder.is_dir() and any(folder.iterdir()) and not (folder / "README.md").exists():
        raise InputError(
            f"{folder} would be replaced, but is not what this script writes: choose another --output_dir."
        )


# The Hub


@contextlib.contextmanager
def hub_errors(repo_id: str):
    """What the Hub answers, as one line that says what to do."""
    try:
        yield
    except LocalTokenNotFoundError as error:
        raise InputError("publishing needs a token: log in with `hf auth login`, or set HF_TOKEN.") from error
    except HfHubHTTPError as error:
        status = error.response.status_code
        if status == 401:
            raise InputError(f"the Hub does not accept the token ({error}); log in with `hf auth login`.") from error
        if status == 403:
            raise InputError(f"the token may not write to {repo_id}: it needs the role `write` ({error}).") from error
        raise InputError(f"{repo_id} was not published: {error}") from error


def push_folder(folder: Path, args: PublishArguments) -> str:
    r"""
    Make the repository hold what `folder` holds, in one commit.

    Returns:
        `str`: Url of the commit; of the last one, if nothing had changed.
    """
    api = HfApi()
    with hub_errors(args.repo_id):
        api.create_repo(args.repo_id, private=args.private or None, exist_ok=True)
        if args.private and not api.model_info(args.repo_id).private:
            raise InputError(f"{args.repo_id} exists and is public: make it private on the Hub, or drop --private.")
        if args.revision:
            api.create_branch(args.repo_id, branch=args.revision, exist_ok=True)
        files = {path.name: path for path in folder.iterdir()}
        gone = set(api.list_repo_files(args.repo_id, revision=args.revision)) - set(files) - {".gitattributes"}
        # Not `upload_folder`, which may split its work into several commits.
        commit = api.create_commit(
            args.repo_id,
            [CommitOperationAdd(name, path) for name, path in sorted(files.items())]
            + [CommitOperationDelete(name) for name in sorted(gone)],
            commit_message=args.commit_message,
            revision=args.revision,
        )
    return commit.commit_url


@one_line_errors
def main(arguments: list[str] | None = None):
    (args,) = CommandLineParser(PublishArguments).parse(arguments)
    is_pushed = args.repo_id is not None and not args.dry_run
    if args.repo_id is not None:
        try:
            validate_repo_id(args.repo_id)
        except HFValidationError as error:
            raise InputError(f"--repo_id: {error}") from error
        if "/" not in args.repo_id:
            raise InputError(f"--repo_id must be USER/{args.repo_id} or ORGANISATION/{args.repo_id}.")
    if is_pushed:
        with hub_errors(args.repo_id):  # before any work
            HfApi().whoami()
    target = Path(args.output_dir or Path(args.model, "hub"))
    check_may_be_replaced(target)
    target.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=target.parent, prefix=f".{target.name}-") as scratch:
        folder = Path(scratch, target.name)
        folder.mkdir()
        model = write_folder(folder, args.repo_id or str(target), args)
        check_folder(folder, model)
        if target.exists():
            target.rename(Path(scratch, "earlier"))
        folder.rename(target)
    size = sum(path.stat().st_size for path in target.iterdir())
    print(f"{target}: {len(list(target.iterdir()))} files, {size / 1e6:.1f} MB, works without the package")
    if is_pushed:
        print(f"published: {push_folder(target, args)}")


if __name__ == "__main__":
    main()
