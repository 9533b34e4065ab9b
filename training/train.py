r"""
Train an image model on a data set from the Hub or a local folder.

    python training/train.py --config training/configs/mnist_pixelcnn_binary.yaml --output_dir runs/mnist_pixelcnn

A data set has a column of images, or of integer arrays of two axes, `(height, width)`, such as codes. A recipe holds
values for any of the arguments (`--help`); the command line overrides them. With two processes:

    torchrun --nproc_per_node 2 training/train.py --config ... --output_dir ...

`--model_name_or_path` starts with a saved model. Classes are matched by their names: images of some of its classes are
fine, a name that it lacks is an error, unless `--class_conditional true` puts the data set's classes in place of the
model's. `--image_size 24 32` changes its size. The script says which weights start anew, and scores the model before
the first step.

With `--generative_weight` a class-conditional model is trained as a classifier by Bayes' rule. It remains a model of
images, and its likelihood is what is evaluated (`training/score.py --classify true` tells how well it classifies).

The output folder gets what belongs to the model: its files (with `--ema_decay`, the averaged weights) and its image
processor, to be loaded with `AutoModel` and `AutoImageProcessor`; `results.json`, the score of the whole evaluation
split, computed in float32 from the saved files; `recipe.yaml`, `samples.png`, `loss_curve.png`. What belongs to the run
is in its folder `run`: a `checkpoint-N` for each epoch, from which `--resume_from_checkpoint last` continues exactly (a
finished run only if there are now more steps or epochs to do), and what `--report_to` writes. A folder that holds
another run is left alone.
"""

import contextlib
import itertools
import math
import os
from dataclasses import asdict, fields
from pathlib import Path
from typing import NamedTuple

from command_line import one_line_errors, what_to_do
from train_arguments import DataArguments, ModelArguments, Request, check_output_dir, read_arguments

if __name__ == "__main__":
    one_line_errors(read_arguments)()  # before the imports that take seconds: a typo is answered at once

import torch
from accelerate import PartialState
from datasets import ClassLabel, Dataset, IterableDataset
from huggingface_hub.errors import StrictDataclassError
from transformers import (
    AutoModel,
    AutoModelForImageClassification,
    PreTrainedConfig,
    PreTrainedModel,
    set_seed,
)

from hf_pixelcnn import FAMILIES, PixelCNNImageProcessor
from hf_pixelcnn.checks_causal_image import check_memory
from hf_pixelcnn.training import (
    EpochLines,
    InputError,
    LevelDataset,
    LevelStream,
    PixelCNNTrainer,
    PixelCNNTrainingArguments,
    class_names,
    collate_classes,
    collate_levels,
    draw_loss_curve,
    draw_samples,
    last_checkpoint,
    load_classifier,
    load_model,
    load_processor,
    load_split,
    run_facts,
    score,
)
from hf_pixelcnn.training.checkpoints import check_whole, is_finished, state_of
from hf_pixelcnn.training.data_sources import (
    class_numbers,
    find_class_column,
    find_image_column,
    names_in,
    num_channels_of,
    stored,
)
from hf_pixelcnn.training.files import held, write_json, write_text
from hf_pixelcnn.training.level_dataset import check_classes_of, first_image, level_options
from hf_pixelcnn.training.progress import say_epochs
from hf_pixelcnn.training.records import keep_freed_memory
from hf_pixelcnn.training.trainer import time_spent

INIT_IMAGES = 64  # to which weight-normalised layers are fitted before training


def field_names(config_class: type) -> set[str]:
    """Names of the fields that describe a model."""
    return {config_field.name for config_field in config_class.own_fields()}


def find_checkpoint(args: PixelCNNTrainingArguments) -> str | None:
    """The checkpoint that `--resume_from_checkpoint` (a path, `last` or `true`) names."""
    wanted = args.resume_from_checkpoint
    if wanted is None or wanted.lower() == "false":
        return None
    path = last_checkpoint(args.output_dir) if wanted.lower() in ("last", "true") else wanted
    if path is None:
        raise InputError(f"{args.output_dir} has no complete checkpoint to resume from.")
    if not os.path.isfile(os.path.join(path, "trainer_state.json")):
        raise InputError(f"{path} is not a checkpoint of a training run: it has no trainer_state.json.")
    check_whole(path)
    if args.ema_decay and not os.path.isfile(os.path.join(path, "ema.safetensors")):
        raise InputError(f"{path} has no ema.safetensors: that run had no --ema_decay.")
    if not os.path.isfile(os.path.join(path, "scheduler.pt")):
        raise InputError(
            f"{path} was saved with --save_only_model true: without the state of the optimizer a run cannot be resumed "
            f"exactly. Start a new run with its weights: --model_name_or_path {path}"
        )
    check_more_to_do(args, path)
    return path


def or_else(value: int | None, default: int) -> int:
    return default if value is None else value


def check_more_to_do(args: PixelCNNTrainingArguments, checkpoint: str):
    """Raise if a run is finished; but a run that was stopped before it wrote its results still has to write them."""
    if not is_finished(args, checkpoint):
        return
    run = Path(args.output_dir)  # inside the model's folder, which has the results
    if Path(checkpoint).resolve().parent == run.resolve() and not (run.parent / "results.json").exists():
        return
    option = "max_steps" if args.max_steps > 0 else "num_train_epochs"
    state, wanted = state_of(checkpoint), getattr(args, option)
    raise InputError(
        f"{checkpoint} is the end of a finished run: {state.global_step} steps or {state.epoch:g} epochs are done, and "
        f"--{option} is {wanted:g}. To train on, give a larger --{option}."
    )


def new_processor(data_args: DataArguments, model_args: ModelArguments, rows: Dataset | IterableDataset, column: str):
    """The image processor that the arguments and the first image of the data set describe."""
    options = {
        "num_channels": or_else(model_args.num_channels, num_channels_of(first_image(rows, column))),
        "num_levels": or_else(model_args.num_levels, 2 if data_args.binarization else 256),
        "binarization": data_args.binarization,
    }
    if data_args.threshold is not None:
        options["threshold"] = data_args.threshold
    try:
        return PixelCNNImageProcessor(**options, **size_options(data_args, model_args))
    except (ValueError, TypeError) as error:
        raise InputError(str(error)) from error


def size_options(data_args: DataArguments, model_args: ModelArguments) -> dict:
    """The options of an image processor that give images the size of `--image_size`, if that is given."""
    if model_args.image_size is None:
        return {}
    height, width = model_args.image_size[0], model_args.image_size[-1]
    check_memory(f"an image of {height}×{width}", height * width * 8, torch.device("cpu"))
    size = {"height": height, "width": width}
    if data_args.center_crop:
        return {"size": {"shortest_edge": max(height, width)}, "crop_size": size}
    return {"size": size, "crop_size": None}


def least_weights(config: PreTrainedConfig) -> int:
    """A number of weights that models of a config have at least, told without building one."""
    first, others = (getattr(config, name, 1) for name in ("first_kernel_size", "kernel_size"))
    of_layer = max(1, others**2 // 8) * config.hidden_size**2
    of_head = max(0, config.num_head_layers - 1) * config.head_hidden_size**2
    return config.num_hidden_layers * of_layer + of_head + (first**2 // 2 + config.num_classes) * config.hidden_size


def fields_of_classifier(args: ModelArguments) -> dict:
    """The fields of a config that were given and that only a classifier reads."""
    prior = "learned" if args.class_prior == ["learned"] else args.class_prior
    fields = {
        "generative_weight": args.generative_weight,
        "class_prior": prior,
        "class_temperature": args.class_temperature,
    }
    return {name: value for name, value in fields.items() if value is not None}


def new_model(args: ModelArguments, names: list[str] | None, **given) -> PreTrainedModel:
    r"""
    A model with random weights.

    Args:
        args ([`ModelArguments`]): Family and fields of its config.
        names (`list[str]`, *optional*): Names of the classes of a conditional model.
        given: Fields that the data determine.
    """
    family = args.model_type or "pixelcnn"
    config_class = FAMILIES[family].config_class
    auto_class = AutoModel if args.generative_weight is None else AutoModelForImageClassification
    own = ("model_name_or_path", "model_type", "class_conditional", "num_classes", "image_size")
    chosen = {key: value for key, value in asdict(args).items() if key not in own and value is not None} | given
    chosen |= fields_of_classifier(args)
    for name in sorted(chosen.keys() - field_names(config_class)):
        others = [key for key, other in FAMILIES.items() if name in field_names(other.config_class)]
        raise InputError(f"--{name} is for {', '.join(others)}; a {family} has no such field.")
    if args.generative_weight is not None:
        chosen.setdefault("dropout", 0.0)
    if names:
        chosen |= {"num_classes": len(names), "id2label": dict(enumerate(names))}
    try:
        config = config_class(**chosen)
        size = 4 * least_weights(config) * torch.float32.itemsize  # with gradients and the two averages of Adam
        check_memory("training this model", size, torch.device("cpu"))
        return auto_class.from_config(config)
    except (StrictDataclassError, ValueError) as error:
        raise InputError(str(error)) from error


class Rows(NamedTuple):
    """The rows of both splits, the column that is modelled, and whether it holds codes instead of images."""

    train: Dataset | IterableDataset
    evaluation: Dataset
    column: str
    are_codes: bool


class Start(NamedTuple):
    """What training starts from; `model` is `None` until a new one can be made in the size of the images."""

    model: PreTrainedModel | None
    processor: PixelCNNImageProcessor | None  # `None` for codes
    num_levels: int
    is_conditional: bool


def load_rows(args: DataArguments) -> Rows:
    """The rows that are trained on, and those that are evaluated."""
    train, evaluation = (
        load_split(args.dataset, split, args.dataset_config, args.cache_dir, args.streaming)
        for split in (args.train_split, args.eval_split)
    )
    if args.streaming:
        evaluation = stored(evaluation)  # it is read again and again
    return Rows(train, evaluation, *find_image_column(train.features, args.image_column))


def new_classes(data_args: DataArguments, config: PreTrainedConfig, rows: Rows) -> list[str] | None:
    """Names of the classes of the data set, if a saved model of this config lacks one of them; else `None`."""
    column = find_class_column(rows.train.features, data_args.class_column)
    names = class_names(rows.train, column)
    known = names_in(config.id2label) if config.num_classes else []
    if known is None:  # the model's have none, and take these if they are as many
        return None if len(names) == config.num_classes else names
    if not isinstance(rows.train.features[column], ClassLabel):  # numbers
        return None if len(names) <= config.num_classes else names
    return None if set(names) <= set(known) else names


def start_of_saved(data_args: DataArguments, args: ModelArguments, rows: Rows) -> Start:
    """The model and image processor of `--model_name_or_path`, with what of them the arguments change."""
    path = args.model_name_or_path
    saved, processor = load_model(path)
    fields = {}
    if args.image_size is not None and processor is not None:
        fields["image_size"] = [args.image_size[0], args.image_size[-1]]
        processor = PixelCNNImageProcessor(**{**level_options(processor), **size_options(data_args, args)})
    if args.class_conditional and (names := new_classes(data_args, saved.config, rows)):
        fields |= {"id2label": dict(enumerate(names)), "ignore_mismatched_sizes": True}
    if args.generative_weight is not None:
        fields |= {**fields_of_classifier(args), "dropout": 0.0}  # what a classifier is trained with
        model = load_classifier(path, **fields)
    else:
        model = load_model(path, **fields)[0] if fields else saved
    say_what_is_new(saved, model)
    return Start(model, processor, model.config.num_levels, model.config.num_classes > 0)


def say_what_is_new(saved: PreTrainedModel, model: PreTrainedModel):
    """Print in which size, classes and weights a model that training starts from is not the saved one."""
    news = []
    if model.config.image_size != saved.config.image_size:
        sizes = ("×".join(map(str, config.image_size)) for config in (model.config, saved.config))
        news.append("images of {} in place of {}".format(*sizes))
    if model.config.id2label != saved.config.id2label:
        names = list(model.config.id2label.values())
        listed = ", ".join(map(str, names[:5])) + (", ..." if len(names) > 5 else "")
        news.append(f"{len(names)} classes ({listed}) in place of {saved.config.num_classes or 'none'}")
    shapes = {name: weight.shape for name, weight in saved.state_dict().items()}
    weights = [name for name, weight in model.state_dict().items() if shapes.get(name) != weight.shape]
    if news and PartialState().is_main_process:
        starts = f"; weights that start anew: {', '.join(weights)}" if weights else "; all weights are the saved ones"
        print(f"New in the model: {'; '.join(news)}{starts}.")


def start_of_new(data_args: DataArguments, model_args: ModelArguments, rows: Rows) -> Start:
    """The levels and image processor of a model that is still to be made."""
    is_conditional = model_args.class_conditional or bool(model_args.num_classes)
    if not rows.are_codes:
        processor = new_processor(data_args, model_args, rows.train, rows.column)
        return Start(None, processor, processor.num_levels, is_conditional)
    if model_args.num_levels is None:
        raise InputError(f"column {rows.column!r} holds codes: give their number with --num_levels.")
    given = {**asdict(data_args), **asdict(model_args)}
    for name in ("image_size", "num_channels", "binarization"):  # threshold and center_crop need one of these
        if given[name] is not None:
            raise InputError(f"--{name} is for images, column {rows.column!r} holds codes.")
    return Start(None, None, model_args.num_levels, is_conditional)


def rename_classes(config: PreTrainedConfig, names: list[str]):
    """Give the classes of a config other names, which are checked as those of a new config are."""
    try:
        renamed = type(config).from_dict({**config.to_dict(), "id2label": dict(enumerate(names))})
    except (StrictDataclassError, ValueError) as error:
        raise InputError(str(error)) from error
    config.id2label, config.label2id = renamed.id2label, renamed.label2id


def check_known_classes(config: PreTrainedConfig, path: str, rows: Rows, column: str):
    """Raise unless the classes of the data set are among those of a saved model, by name."""
    try:
        class_numbers(rows.train.features, column, config.id2label)
    except InputError as error:
        raise InputError(
            f"{error} To start from {path} with the classes of the data set in place of its own, give "
            "--class_conditional true."
        ) from error


def settle_classes(data_args: DataArguments, model_args: ModelArguments, rows: Rows, start: Start) -> list[str] | None:
    r"""
    Names of the classes of the model, in the order of their ids; `None` for a model without classes.

    A saved model keeps its names; only one whose classes have none (`LABEL_0`, ...) takes them over from the data.

    Raises:
        InputError: If the data set has classes that the model lacks, or arguments ask for classes without any.
    """
    if not start.is_conditional:
        if model_args.generative_weight is not None:
            raise InputError("--generative_weight needs a model with classes: give --class_conditional.")
        if data_args.class_dropout:
            raise InputError("--class_dropout needs a model with classes: give --class_conditional.")
        return None
    column = find_class_column(rows.train.features, data_args.class_column)
    if start.model and (known := names_in(start.model.config.id2label)):
        check_known_classes(start.model.config, str(model_args.model_name_or_path), rows, column)
        return known
    names = class_names(rows.train, column)
    expected = start.model.config.num_classes if start.model else model_args.num_classes
    if expected and expected != len(names):
        raise InputError(f"the model has {expected} classes, column {column!r} has {len(names)}.")
    if start.model and isinstance(rows.train.features[column], ClassLabel):  # the names that count from now on
        rename_classes(start.model.config, names)
    return names


def image_sets(
    args: DataArguments, rows: Rows, start: Start, names: list[str] | None, seed: int
) -> tuple[LevelDataset | LevelStream, LevelDataset]:
    """Data sets of levels, for training and for evaluation; `names` are those of the classes of the model."""
    settings = {
        "num_levels": start.num_levels,
        "processor": start.processor,
        "image_column": args.image_column,
        "class_column": args.class_column,
        "with_classes": start.is_conditional,
        "id2label": None if names is None else dict(enumerate(names)),
    }
    images = (LevelStream if args.streaming else LevelDataset)(
        rows.train, **settings, class_dropout=args.class_dropout, mutation_rate=args.mutation_rate, seed=seed
    )
    return images, LevelDataset(rows.evaluation, **settings, seed=(seed + 1) % 2**32)


def fit_first_images(model: PreTrainedModel, images: LevelDataset | LevelStream):
    """Initialise a new model from images of all parts of the training split; from the first ones of a stream."""
    if isinstance(images, LevelStream):
        chosen = list(itertools.islice(images, INIT_IMAGES))
    else:
        chosen = [images[i] for i in range(0, len(images), math.ceil(len(images) / INIT_IMAGES))]
    batch = collate_levels(chosen)
    model.initialize_from_data(batch["pixel_values"], class_ids=batch.get("class_ids"))


def prepare(data_args: DataArguments, model_args: ModelArguments, args: PixelCNNTrainingArguments):
    """Model, image processor (`None` for codes), training images and evaluation images."""
    rows = load_rows(data_args)
    if model_args.model_name_or_path:
        start = start_of_saved(data_args, model_args, rows)
    else:
        start = start_of_new(data_args, model_args, rows)
    if start.processor is None and not rows.are_codes:
        raise InputError(f"{model_args.model_name_or_path} has no image processor, so it needs a column of codes.")
    names = settle_classes(data_args, model_args, rows, start)
    with args.main_process_first(desc="levels"):
        images, eval_images = image_sets(data_args, rows, start, names, args.seed)
    if names is not None:
        least = 0 if model_args.generative_weight is not None else -1
        for split, split_images in ((data_args.train_split, images), (data_args.eval_split, eval_images)):
            if isinstance(split_images, LevelDataset):
                check_classes_of(split_images, split, len(names), least)
    model = start.model
    if model is None:
        channels, *size = images.shape
        model = new_model(model_args, names, num_levels=start.num_levels, num_channels=channels, image_size=size)
        fit_first_images(model, images)
    elif images.shape[0] != model.config.num_channels:
        raise InputError(f"the model has {model.config.num_channels} channels, the data {images.shape[0]}.")
    global_batch = args.per_device_train_batch_size * args.world_size
    if args.dataloader_drop_last and not data_args.streaming and len(images) < global_batch:
        raise InputError(
            f"split {data_args.train_split!r} has {len(images)} images, less than a batch of {global_batch}."
        )
    return model, start.processor, images, eval_images


def check_same_model(model: PreTrainedModel, processor: PixelCNNImageProcessor | None, checkpoint: str):
    """Raise unless `checkpoint` holds a model with the config of `model`, its classes and its image processor."""
    saved = type(model.config).from_pretrained(checkpoint)
    for name in sorted(f.name for f in fields(saved)):
        ours, theirs = getattr(model.config, name), getattr(saved, name)
        if name in ModelArguments.__dataclass_fields__ and ours != theirs:
            raise InputError(f"{checkpoint} has {name}={theirs!r}, this run {ours!r}: it cannot be resumed.")
    if saved.num_classes and saved.id2label != model.config.id2label:
        ours, theirs = (", ".join(config.id2label.values()) for config in (model.config, saved))
        raise InputError(f"{checkpoint} has the classes {theirs}, this run {ours}: it cannot be resumed.")
    ours, theirs = level_options(processor), level_options(load_processor(checkpoint))
    for name in sorted(ours.keys() | theirs.keys()):
        if ours.get(name) != theirs.get(name):
            raise InputError(
                f"{checkpoint} makes its levels with {name}={theirs.get(name)!r}, this run with {ours.get(name)!r}: it "
                "cannot be resumed."
            )


def results_of(
    data_args: DataArguments, model_args: ModelArguments, trainer: PixelCNNTrainer, scores: dict[str, float]
) -> dict:
    """What `results.json` says about the data, the run and its score."""
    results = {"dataset": data_args.dataset, "split": data_args.eval_split}
    for name in ("num_images", "num_dims", "bits_per_dim", "nats_per_dim", "nats_per_image"):
        results[name] = scores[name]
    results |= {"dtype": "float32", "training_split": data_args.train_split}
    if not data_args.streaming:
        results |= {"num_training_images": len(trainer.train_dataset), "epochs": trainer.state.epoch}
    return results | {
        "class_dropout": data_args.class_dropout,
        "mutation_rate": data_args.mutation_rate,
        "generative_weight": model_args.generative_weight,
        "steps": trainer.state.global_step,
        "seed": trainer.args.seed,
    }


def training_arguments(request: Request) -> PixelCNNTrainingArguments:
    """The arguments of the trainer, which keeps what belongs to the run and not to the model in a folder `run`."""
    given = {**request.training, "output_dir": str(run_folder(request.training["output_dir"]))}
    if request.model.model_name_or_path and not given.get("resume_from_checkpoint"):
        given.setdefault("eval_on_start", True)  # what the saved model is worth on these data
    given.setdefault("hub_model_id", Path(request.training["output_dir"]).resolve().name)
    try:
        return PixelCNNTrainingArguments(**given)
    except (ValueError, TypeError, ImportError, RuntimeError) as error:
        raise InputError(str(error)) from error


def run_folder(output_dir: str) -> Path:
    """The folder of checkpoints and logs inside the one of a model."""
    return Path(output_dir, "run")


def say_batches(trainer: PixelCNNTrainer, images: LevelDataset | LevelStream) -> int:
    """Print how many processes share a step, and which images are left out; returns the images of one step."""
    args = trainer.args
    at_once = args.per_device_train_batch_size * args.world_size
    per_step = at_once * args.gradient_accumulation_steps
    left_out = len(images) % at_once if args.dataloader_drop_last and isinstance(images, LevelDataset) else 0
    if trainer.is_world_process_zero():
        print(
            f"{args.world_size} process{'es' * (args.world_size > 1)}, {per_step} images per step: "
            f"{args.per_device_train_batch_size} per process × {args.world_size} × "
            f"{args.gradient_accumulation_steps} accumulated."
        )
        if left_out:
            print(
                f"Of the {len(images):,} images, {left_out} that do not fill a batch are left out of each epoch, "
                "others each time; --dataloader_drop_last false keeps them."
            )
    return per_step


def how_to_go_on(args: PixelCNNTrainingArguments) -> str:
    """What to do after a run was interrupted, or could not write."""
    checkpoint = last_checkpoint(args.output_dir)
    if checkpoint is None:
        return "There is no checkpoint to continue from: start again, with what the output folder holds deleted."
    return f"To continue from {checkpoint}, give the same command with --resume_from_checkpoint last."


def new_trainer(args: PixelCNNTrainingArguments, model, processor, images, eval_images, collate) -> PixelCNNTrainer:
    """The trainer; an [`InputError`] where its arguments ask for what cannot be had here, as `--fsdp`."""
    data = {"train_dataset": images, "eval_dataset": eval_images, "processing_class": processor}
    try:
        return PixelCNNTrainer(model, args, collate, **data)
    except (ValueError, TypeError, ImportError, RuntimeError) as error:
        raise InputError(str(error)) from error


def run(request: Request, args: PixelCNNTrainingArguments):
    """Train, and write all that the output folder gets."""
    data_args, model_args, output = request.data, request.model, Path(request.training["output_dir"])
    checkpoint = find_checkpoint(args)
    check_output_dir(str(output), checkpoint is not None)  # again: another run may have come first
    keep_freed_memory()
    set_seed(args.seed)  # before the weights are drawn
    model, processor, images, eval_images = prepare(data_args, model_args, args)
    if checkpoint:
        check_same_model(model, processor, checkpoint)

    is_likelihood = model_args.generative_weight is None
    trainer = new_trainer(
        args, model, processor, images, eval_images, collate_levels if is_likelihood else collate_classes
    )
    say_epochs(trainer, EpochLines(data_args.eval_split, is_likelihood))
    images_per_step = say_batches(trainer, images)
    is_main = trainer.is_world_process_zero()
    if is_main and checkpoint and is_finished(args, checkpoint):
        print(f"{checkpoint} is the end of its run: nothing is left to train, only the results are written.")
    trainer.train(resume_from_checkpoint=checkpoint)
    if is_main:
        (output / "results.json").unlink(missing_ok=True)  # of the model that is replaced now
    trainer.save_model(str(output))
    trainer.accelerator.wait_for_everyone()  # no process ends while the main one still writes
    trainer.accelerator.end_training()
    if not is_main:
        return

    # From here on only the saved files are used: the numbers belong to what others will load.
    if request.recipe is not None:
        write_text(request.recipe, output / "recipe.yaml")
    draw_loss_curve(
        trainer.state.log_history,
        output / "loss_curve.png",
        f"{Path(data_args.dataset).resolve().name}, {model.config.model_type}",  # no folders of this machine
    )
    model, processor = load_model(str(output))
    model.to(args.device)
    scores = score(model, eval_images, args.per_device_eval_batch_size, collate_levels)
    seconds = {f"training_{name}": spent for name, spent in time_spent(trainer.state.log_history).items()}
    seconds["evaluation_seconds"] = scores["seconds"]
    results = results_of(data_args, model_args, trainer, scores)
    results |= {"num_processes": args.world_size, "images_per_step": images_per_step}
    results |= {"num_parameters": model.num_parameters(), **seconds, **run_facts(args.device)}
    draw_samples(model, processor, data_args.num_samples, args.seed, output / "samples.png")
    write_json(results, output / "results.json")  # last: a run that has them is complete
    print(
        f"{data_args.eval_split}: {scores['bits_per_dim']:.4f} bits/dim, {scores['nats_per_dim']:.4f} nats/dim, "
        f"{scores['nats_per_image']:.2f} nats/image; model, results and samples are in {output}"
    )


@one_line_errors
def main(arguments: list[str] | None = None):
    request = read_arguments(arguments)
    args = training_arguments(request)
    is_one_of_several = args.process_index > 0  # the first process of a run holds the folder for all
    own = contextlib.nullcontext() if is_one_of_several else held(request.training["output_dir"])
    with own, what_to_do(lambda: how_to_go_on(args)):
        run(request, args)


if __name__ == "__main__":
    main()
