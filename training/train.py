r"""
Train an image model on a data set of the Hub or of a local folder.

    python training/train.py --config training/configs/mnist_pixelcnn_binary.yaml --output_dir runs/mnist_pixelcnn

A recipe holds values for any of the arguments below (`--help`), which the command line overrides. Two processes:

    torchrun --nproc_per_node 2 training/train.py --config ... --output_dir ...

With `--generative_weight` a class-conditional model is trained as a classifier by Bayes' rule; it remains a model of
images, whose likelihood is what is evaluated (`training/score.py --classify true` tells how well it classifies).

The output folder gets the model (with `--ema_decay`, the averaged one) and its image processor, loadable with
`AutoModel` and `AutoImageProcessor`, `results.json` (the score of the whole evaluation split, computed from the saved
files in float32), `recipe.yaml`, `samples.png`, `loss_curve.png`, and a `checkpoint-N` for each epoch, from which
`--resume_from_checkpoint last` continues exactly. A folder that holds another run is left alone.
"""

import itertools
import math
import os
import time
from dataclasses import asdict, dataclass, field, fields, make_dataclass
from pathlib import Path
from typing import get_args

from command_line import CommandLineParser, one_line_errors
from datasets import ClassLabel, Dataset, IterableDataset
from huggingface_hub.errors import StrictDataclassError
from transformers import AutoModel, AutoModelForImageClassification, PreTrainedModel, set_seed

from hf_pixelcnn import FAMILIES, PixelCNNImageProcessor
from hf_pixelcnn.training import (
    InputError,
    LevelDataset,
    LevelStream,
    PixelCNNTrainer,
    PixelCNNTrainingArguments,
    check_classes_of,
    class_names,
    collate_classes,
    collate_levels,
    draw_loss_curve,
    draw_samples,
    find_class_column,
    find_image_column,
    keep_freed_memory,
    last_checkpoint,
    load_classifier,
    load_model,
    load_split,
    num_channels_of,
    run_facts,
    score,
    stored,
    write_json,
)

INIT_IMAGES = 64  # that weight-normalised layers are fitted to before training
OUTPUT_FILES = ("config.json", "model.safetensors", "results.json", "samples.png", "loss_curve.png")


def field_names(config_class: type) -> set[str]:
    """Names of the fields that describe a model."""
    return {config_field.name for config_field in config_class.own_fields()}


def config_options(known: set[str]) -> list[tuple]:
    r"""
    An option for every field of the config of every family, as fields of a dataclass; `None` means not given.

    Args:
        known (`set[str]`): Fields that have an option of their own.
    """
    options = {}
    for family in FAMILIES.values():
        for config_field in family.config_class.own_fields():
            if config_field.name not in known | {"format_version"}:
                types = get_args(config_field.type) or (config_field.type,)
                kind = next((kind for kind in (bool, float, int) if kind in types), str)
                options[config_field.name] = (config_field.name, kind | None, field(default=None))
    return list(options.values())


@dataclass
class DataArguments:
    dataset: str | None = field(default=None, metadata={"help": "Data set: an id on the Hub or a local folder."})
    dataset_config: str | None = field(default=None, metadata={"help": "Configuration of the data set."})
    train_split: str = field(default="train", metadata={"help": "Split to train on, e.g. train[:50000]."})
    eval_split: str = field(default="test", metadata={"help": "Split to evaluate on, e.g. train[50000:]."})
    image_column: str | None = field(default=None, metadata={"help": "Column of images, if there are several."})
    class_column: str | None = field(default=None, metadata={"help": "Column of classes, if there are several."})
    binarization: str | None = field(
        default=None,
        metadata={"help": "Make two levels: threshold, or stochastic (drawn anew in each epoch)."},
    )
    threshold: int | None = field(default=None, metadata={"help": "The highest pixel that becomes level 0."})
    center_crop: bool = field(
        default=False, metadata={"help": "Cut the largest middle part with the aspect of --image_size, then resize."}
    )
    class_dropout: float = field(
        default=0.0,
        metadata={"help": "Probability of showing an image without its class, so that `guidance_scale` can be used."},
    )
    mutation_rate: float = field(
        default=0.0,
        metadata={"help": "Probability of showing a level drawn from all alike, for a background model."},
    )
    streaming: bool = field(
        default=False,
        metadata={"help": "Read the training images while they are used and store none; needs --max_steps."},
    )
    cache_dir: str | None = field(default=None, metadata={"help": "Where data sets are cached."})
    num_samples: int = field(default=64, metadata={"help": "Images in samples.png."})


@dataclass
class ChosenArguments:
    model_name_or_path: str | None = field(
        default=None, metadata={"help": "Continue with this model and processor instead of making new ones."}
    )
    model_type: str | None = field(
        default=None, metadata={"help": f"Family: {', '.join(FAMILIES)}; by default pixelcnn."}
    )
    class_conditional: bool = field(
        default=False, metadata={"help": "Condition the model on the classes of the data set."}
    )
    image_size: int | None = field(default=None, metadata={"help": "Height and width to resize images to."})
    num_channels: int | None = field(default=None, metadata={"help": "1 or 3; by default as the first image has."})
    num_levels: int | None = field(default=None, metadata={"help": "By default 2 with binarization, else 256."})
    generative_weight: float | None = field(
        default=None,
        metadata={"help": "Train a classifier: weight of the likelihood of an image, against that of its class."},
    )


# The rest are the fields of the configs, see the families' `...Config`.
ModelArguments = make_dataclass(
    "ModelArguments",
    config_options({option.name for option in fields(ChosenArguments)}),
    bases=(ChosenArguments,),
)


def check_output_dir(folder: str, is_resumed: bool):
    """Raise unless `folder` is free for a new run, or a run is resumed."""
    if is_resumed or not os.path.isdir(folder):
        return
    held = [name for name in os.listdir(folder) if name in OUTPUT_FILES or name.startswith("checkpoint-")]
    if held:
        raise InputError(
            f"{folder} already holds a run ({sorted(held)[0]}); choose another --output_dir, or continue that run with "
            "--resume_from_checkpoint last."
        )


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
    if args.ema_decay and not os.path.isfile(os.path.join(path, "ema.safetensors")):
        raise InputError(f"{path} has no ema.safetensors: that run had no --ema_decay.")
    return path


def new_processor(data_args: DataArguments, model_args: ModelArguments, rows: Dataset | IterableDataset, column: str):
    """The image processor that these arguments and the first image of a data set describe."""
    options = {
        "num_channels": model_args.num_channels or num_channels_of(next(iter(rows))[column]),
        "num_levels": model_args.num_levels or (2 if data_args.binarization else 256),
        "binarization": data_args.binarization,
    }
    if data_args.threshold is not None:
        options["threshold"] = data_args.threshold
    if model_args.image_size:
        size = {"height": model_args.image_size, "width": model_args.image_size}
        options["size"] = {"shortest_edge": model_args.image_size} if data_args.center_crop else size
        if data_args.center_crop:
            options["crop_size"] = size
    try:
        return PixelCNNImageProcessor(**options)
    except (ValueError, TypeError) as error:
        raise InputError(str(error)) from error


def new_model(args: ModelArguments, names: list[str] | None, **given) -> PreTrainedModel:
    r"""
    A model with random weights.

    Args:
        args ([`ModelArguments`]): Family and fields of its config.
        names (`list[str]`, *optional*): Names of the classes of a conditional model.
        given: Fields that the data decide.
    """
    family = args.model_type or "pixelcnn"
    if family not in FAMILIES:
        raise InputError(f"unknown --model_type {family!r}; known are {', '.join(FAMILIES)}.")
    config_class = FAMILIES[family].config_class
    auto_class = AutoModel if args.generative_weight is None else AutoModelForImageClassification
    own = ("model_name_or_path", "model_type", "class_conditional", "num_classes")
    chosen = {key: value for key, value in asdict(args).items() if key not in own and value is not None} | given
    for name in sorted(chosen.keys() - field_names(config_class)):
        others = [key for key, other in FAMILIES.items() if name in field_names(other.config_class)]
        raise InputError(f"--{name} is for {', '.join(others)}; a {family} has no such field.")
    if args.generative_weight is not None:
        chosen.setdefault("dropout", 0.0)
    if names:
        chosen |= {"num_classes": len(names), "id2label": dict(enumerate(names))}
    try:
        return auto_class.from_config(config_class(**chosen))
    except (StrictDataclassError, ValueError) as error:
        raise InputError(str(error)) from error


def prepare(data_args: DataArguments, model_args: ModelArguments, args: PixelCNNTrainingArguments):
    """Model, image processor (`None` for codes), training images and evaluation images."""
    rows, eval_rows = (
        load_split(data_args.dataset, split, data_args.dataset_config, data_args.cache_dir, data_args.streaming)
        for split in (data_args.train_split, data_args.eval_split)
    )
    if data_args.streaming:
        eval_rows = stored(eval_rows)  # is read again and again
    column, is_codes = find_image_column(rows.features, data_args.image_column)
    model = processor = None
    if model_args.model_name_or_path:
        model, processor = load_model(model_args.model_name_or_path)
        if model_args.generative_weight is not None:
            fields = {"generative_weight": model_args.generative_weight, "dropout": 0.0}  # as its class asks for
            model = load_classifier(model_args.model_name_or_path, **fields)
        num_levels, is_conditional = model.config.num_levels, model.config.num_classes > 0
        if model_args.class_conditional and not is_conditional:
            raise InputError(f"--class_conditional: {model_args.model_name_or_path} is a model without classes.")
    else:
        is_conditional = model_args.class_conditional or bool(model_args.num_classes)
        if is_codes:
            if not model_args.num_levels:
                raise InputError(f"column {column!r} holds codes: give their number with --num_levels.")
            given = {**asdict(data_args), **asdict(model_args)}
            for name in ("image_size", "num_channels", "binarization"):  # threshold and center_crop need one of these
                if given[name] is not None:
                    raise InputError(f"--{name} is for images, column {column!r} holds codes.")
        else:
            processor = new_processor(data_args, model_args, rows, column)
        num_levels = model_args.num_levels if is_codes else processor.num_levels
    if processor is None and not is_codes:
        raise InputError(f"{model_args.model_name_or_path} has no image processor, so it needs a column of codes.")

    if model_args.generative_weight is not None and not is_conditional:
        raise InputError("--generative_weight needs a model with classes: give --class_conditional.")
    if data_args.class_dropout and not is_conditional:
        raise InputError("--class_dropout needs a model with classes: give --class_conditional.")
    names = None
    if is_conditional:
        class_column = find_class_column(rows.features, data_args.class_column)
        names = class_names(rows, class_column)
        expected = model.config.num_classes if model else model_args.num_classes
        if expected and expected != len(names):
            raise InputError(f"the model has {expected} classes, column {class_column!r} has {len(names)}.")
        if model and isinstance(rows.features[class_column], ClassLabel):  # as the images are called from now on
            model.config.id2label = dict(enumerate(names))
            model.config.label2id = {name: class_id for class_id, name in enumerate(names)}
    settings = {
        "num_levels": num_levels,
        "processor": processor,
        "image_column": data_args.image_column,
        "class_column": data_args.class_column,
        "with_classes": is_conditional,
    }
    with args.main_process_first(desc="levels"):
        levels_of = LevelStream if data_args.streaming else LevelDataset
        images = levels_of(
            rows,
            **settings,
            class_dropout=data_args.class_dropout,
            mutation_rate=data_args.mutation_rate,
            seed=args.seed,
        )
        eval_images = LevelDataset(eval_rows, **settings, seed=(args.seed + 1) % 2**32)
    if is_conditional:
        least = 0 if model_args.generative_weight is not None else -1
        for split, split_images in ((data_args.train_split, images), (data_args.eval_split, eval_images)):
            if isinstance(split_images, LevelDataset):
                check_classes_of(split_images, split, len(names), least)
    if model is None:
        channels, *size = images.shape
        model = new_model(model_args, names, num_levels=num_levels, num_channels=channels, image_size=size)
        if data_args.streaming:
            first = itertools.islice(images, INIT_IMAGES)
        else:
            first = (images[i] for i in range(0, len(images), math.ceil(len(images) / INIT_IMAGES)))
        batch = collate_levels(list(first))
        model.initialize_from_data(batch["pixel_values"], class_ids=batch.get("class_ids"))
    elif images.shape[0] != model.config.num_channels:
        raise InputError(f"the model has {model.config.num_channels} channels, the data {images.shape[0]}.")
    global_batch = args.per_device_train_batch_size * args.world_size
    if args.dataloader_drop_last and not data_args.streaming and len(images) < global_batch:
        raise InputError(
            f"split {data_args.train_split!r} has {len(images)} images, less than a batch of {global_batch}."
        )
    return model, processor, images, eval_images


def check_arguments(data_args: DataArguments, model_args: ModelArguments, args: PixelCNNTrainingArguments):
    """Raise if arguments cannot go together, or were given that would have no effect."""
    if data_args.streaming and args.max_steps < 1:
        raise InputError("--streaming needs --max_steps: a stream does not say where it ends.")
    if data_args.streaming and args.dataloader_num_workers > 1:
        raise InputError("--streaming goes with at most one of --dataloader_num_workers: several would mix the order.")
    if not 0 <= data_args.class_dropout < 1:
        raise InputError(f"--class_dropout must be in [0, 1), got {data_args.class_dropout}.")
    for name in ("class_dropout", "mutation_rate"):
        if getattr(data_args, name) and model_args.generative_weight is not None:
            raise InputError(f"--{name} cannot go with --generative_weight: a classifier sees what is there.")
    if not 0 <= data_args.mutation_rate <= 1:
        raise InputError(f"--mutation_rate must be in [0, 1], got {data_args.mutation_rate}.")
    if data_args.num_samples < 1:
        raise InputError(f"--num_samples must be at least 1, got {data_args.num_samples}.")
    if data_args.threshold is not None and data_args.binarization != "threshold":
        raise InputError("--threshold needs --binarization threshold.")
    if data_args.center_crop and model_args.image_size is None:
        raise InputError("--center_crop needs --image_size.")
    if model_args.model_name_or_path:
        kept = ("model_name_or_path", "class_conditional", "generative_weight")
        given = [name for name, value in asdict(model_args).items() if name not in kept and value is not None]
        given += [name for name in ("binarization", "threshold") if getattr(data_args, name) is not None]
        if given:
            raise InputError(
                f"--{given[0]} cannot go with --model_name_or_path: model and image processor are taken as they are."
            )


def check_same_model(model: PreTrainedModel, checkpoint: str):
    """Raise unless `checkpoint` holds a model with the config of `model`."""
    saved = type(model.config).from_pretrained(checkpoint)
    for name in sorted(f.name for f in fields(saved)):
        ours, theirs = getattr(model.config, name), getattr(saved, name)
        if name in ModelArguments.__dataclass_fields__ and ours != theirs:
            raise InputError(f"{checkpoint} has {name}={theirs!r}, this run {ours!r}: it cannot be resumed.")


@one_line_errors
def main(arguments: list[str] | None = None):
    start = time.perf_counter()
    parser = CommandLineParser([DataArguments, ModelArguments, PixelCNNTrainingArguments])
    data_args, model_args, args = parser.parse(arguments)
    if not data_args.dataset or not args.output_dir:
        raise InputError("--dataset and --output_dir are needed, on the command line or in the recipe.")
    checkpoint = find_checkpoint(args)
    check_output_dir(args.output_dir, is_resumed=checkpoint is not None)
    check_arguments(data_args, model_args, args)
    keep_freed_memory()
    set_seed(args.seed)  # before the weights are drawn
    model, processor, images, eval_images = prepare(data_args, model_args, args)
    if checkpoint:
        check_same_model(model, checkpoint)

    trainer = PixelCNNTrainer(
        model,
        args,
        collate_levels if model_args.generative_weight is None else collate_classes,
        train_dataset=images,
        eval_dataset=eval_images,
        processing_class=processor,
    )
    trainer.train(resume_from_checkpoint=checkpoint)
    training_seconds = time.perf_counter() - start
    trainer.save_model()
    is_main = trainer.is_world_process_zero()
    trainer.accelerator.wait_for_everyone()  # none leaves while the main process still writes
    trainer.accelerator.end_training()
    if not is_main:
        return

    # From here on with the saved files alone: the numbers belong to what others will load.
    output = Path(args.output_dir)
    if parser.recipe is not None:
        (output / "recipe.yaml").write_text(parser.recipe, encoding="utf-8")
    draw_loss_curve(
        trainer.state.log_history, output / "loss_curve.png", f"{data_args.dataset}, {model.config.model_type}"
    )
    model, processor = load_model(str(output))
    model.to(args.device)
    scores = score(model, eval_images, args.per_device_eval_batch_size, collate_levels)
    results = {
        "dataset": data_args.dataset,
        "split": data_args.eval_split,
        **{name: scores[name] for name in ("num_images", "num_dims", "bits_per_dim", "nats_per_dim", "nats_per_image")},
        "dtype": "float32",
        "training_split": data_args.train_split,
        **({} if data_args.streaming else {"num_training_images": len(images), "epochs": trainer.state.epoch}),
        "class_dropout": data_args.class_dropout,
        "mutation_rate": data_args.mutation_rate,
        "generative_weight": model_args.generative_weight,
        "steps": trainer.state.global_step,
        "seed": args.seed,
        "num_parameters": model.num_parameters(),
        "training_seconds": training_seconds,
        "evaluation_seconds": scores["seconds"],
        **run_facts(args.device),
    }
    write_json(results, output / "results.json")
    draw_samples(model, processor, data_args.num_samples, args.seed, output / "samples.png")
    print(
        f"{data_args.eval_split}: {scores['bits_per_dim']:.4f} bits/dim, {scores['nats_per_dim']:.4f} nats/dim, "
        f"{scores['nats_per_image']:.2f} nats/image; model, results and samples are in {output}"
    )


if __name__ == "__main__":
    main()
