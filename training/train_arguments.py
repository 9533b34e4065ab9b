"""
What `train.py` can be asked: its options, and which of them go together. Nothing here imports torch.

The options of the model are the fields of the families' configs, those of training the fields of
`PixelCNNTrainingArguments`, which is `TrainingArguments` of transformers with a few more.
"""

import os
from dataclasses import asdict, dataclass, field, fields, make_dataclass
from pathlib import Path
from typing import Any, NamedTuple, get_args

from command_line import CommandLineError, CommandLineParser
from declared_fields import as_options, fields_of_configs, fields_of_training_arguments

CONFIGS = fields_of_configs()
FAMILIES = tuple(CONFIGS)
OUTPUT_FILES = ("config.json", "model.safetensors", "results.json", "samples.png", "loss_curve.png", "run")
CHOICES = {  # of fields of configs
    "output_distribution": ("bernoulli", "categorical", "logistic_mixture"),
    "input_encoding": ("scaled", "embedding"),
    "recurrence": ("row_lstm", "diagonal_bilstm"),
    "attention_projection": ("residual", "lean"),
}
COMMON = [  # options of `PixelCNNTrainingArguments` that `--help` lists
    "output_dir",
    "num_train_epochs",
    "max_steps",
    "per_device_train_batch_size",
    "per_device_eval_batch_size",
    "gradient_accumulation_steps",
    "learning_rate",
    "lr_scheduler_type",
    "lr_scheduler_kwargs",
    "warmup_steps",
    "weight_decay",
    "adam_beta2",
    "max_grad_norm",
    "ema_decay",
    "bf16",
    "torch_compile",
    "channels_last",
    "seed",
    "use_cpu",
    "eval_strategy",
    "eval_steps",
    "save_strategy",
    "save_steps",
    "save_total_limit",
    "logging_steps",
    "report_to",
    "dataloader_drop_last",
    "dataloader_num_workers",
    "disable_tqdm",
    "resume_from_checkpoint",
]
TRAINING = fields_of_training_arguments()


@dataclass
class DataArguments:
    _argument_group_name = "data"

    dataset: str | None = field(default=None, metadata={"help": "Data set: an id on the Hub or a local folder."})
    dataset_config: str | None = field(default=None, metadata={"help": "Configuration of the data set."})
    train_split: str = field(default="train", metadata={"help": "Split to train on, e.g. train[:50000]."})
    eval_split: str = field(default="test", metadata={"help": "Split to evaluate on, e.g. train[50000:]."})
    image_column: str | None = field(default=None, metadata={"help": "Column of images, if there are several."})
    class_column: str | None = field(default=None, metadata={"help": "Column of classes, if there are several."})
    binarization: str | None = field(
        default=None,
        metadata={
            "help": "Make two levels; stochastic ones are drawn anew in each epoch.",
            "choices": ("threshold", "stochastic"),
        },
    )
    threshold: int | None = field(default=None, metadata={"help": "The highest pixel that becomes level 0."})
    center_crop: bool = field(
        default=False,
        metadata={
            "help": "Resize the shorter side of an image to the longer one of --image_size, and cut --image_size out "
            "of its middle, instead of changing its shape."
        },
    )
    class_dropout: float = field(
        default=0.0,
        metadata={"help": "Probability of showing an image without its class, so that `guidance_scale` can be used."},
    )
    mutation_rate: float = field(
        default=0.0,
        metadata={"help": "Probability of showing a level drawn uniformly, for a background model."},
    )
    streaming: bool = field(
        default=False,
        metadata={"help": "Read the training images as they are used, and store none; needs --max_steps."},
    )
    cache_dir: str | None = field(default=None, metadata={"help": "Where data sets are cached."})
    num_samples: int = field(default=64, metadata={"help": "Images in samples.png."})


@dataclass
class ChosenArguments:
    _argument_group_name = "model"

    model_name_or_path: str | None = field(
        default=None, metadata={"help": "Continue with this model and processor instead of making new ones."}
    )
    model_type: str | None = field(
        default=None, metadata={"help": "Family of a new model; by default pixelcnn.", "choices": FAMILIES}
    )
    class_conditional: bool = field(
        default=False,
        metadata={
            "help": "Condition the model on the classes of the data set; with --model_name_or_path, classes that the "
            "saved model lacks take the place of its own."
        },
    )
    image_size: list[int] | None = field(
        default=None, metadata={"help": "Size to resize images to: one number, or height and width as in 24 32."}
    )
    num_channels: int | None = field(default=None, metadata={"help": "1 or 3; by default those of the first image."})
    num_levels: int | None = field(default=None, metadata={"help": "By default 2 with --binarization, else 256."})
    generative_weight: float | None = field(
        default=None,
        metadata={"help": "Train a classifier: weight of the likelihood of the image against that of its class."},
    )
    class_prior: list[float | str] | None = field(
        default=None,
        metadata={
            "help": "Of a classifier: probability of each class as in 0.5 0.3 0.2, or `learned`; by default equal ones."
        },
    )

    def __post_init__(self):
        words = [item for item in self.class_prior or [] if isinstance(item, str)]
        if words and self.class_prior != ["learned"]:
            raise ValueError(
                "--class_prior must be the probability of each class as in 0.5 0.3 0.2, or `learned`, got "
                f"{' '.join(map(str, self.class_prior))}."
            )


def config_options(known: set[str]) -> list[tuple]:
    r"""
    Options for every field of the configs of all families, as fields of a dataclass; `None` means not given.

    Args:
        known (`set[str]`): Fields that have an option of their own.
    """
    options = {}
    for declared in CONFIGS.values():
        for name in declared.keys() - known - {"format_version"}:
            types = get_args(declared[name].type) or (declared[name].type,)
            kind = next((kind for kind in (bool, float, int) if kind in types and name not in CHOICES), str)
            defaults = [f"{known[name].default} ({family})" for family, known in CONFIGS.items() if name in known]
            metadata = {"help": f"Field of the config; default {', '.join(defaults)}."}
            if name in CHOICES:
                metadata["choices"] = CHOICES[name]
            options[name] = (
                name,
                str | None if name in CHOICES else kind | None,
                field(default=None, metadata=metadata),
            )
    return sorted(options.values(), key=lambda option: option[0])


ModelArguments = make_dataclass(
    "ModelArguments",
    config_options({option.name for kind in (DataArguments, ChosenArguments) for option in fields(kind)}),
    bases=(ChosenArguments,),
)
TrainingOptions = make_dataclass(
    "TrainingOptions",
    as_options({name: TRAINING[name] for name in [*COMMON, *sorted(TRAINING.keys() - set(COMMON))]}),
    namespace={"_argument_group_name": "training"},
)


class Request(NamedTuple):
    """What a command line and its recipe ask for."""

    data: DataArguments
    model: Any  # a `ModelArguments`
    training: dict[str, Any]  # the arguments of `PixelCNNTrainingArguments` that were given
    recipe: str | None  # its text


def make_parser() -> CommandLineParser:
    return CommandLineParser(
        [DataArguments, ModelArguments, TrainingOptions],
        on_demand=TRAINING.keys() - set(COMMON),
        description="Train an image model on a data set from the Hub or a local folder.",
    )


def read_arguments(arguments: list[str] | None = None) -> Request:
    r"""
    Read and check the command line.

    Raises:
        CommandLineError: If an argument is unknown, has a value that cannot be used, does not go together with another
            one, or would have no effect; or if the output folder holds another run.
    """
    parser = make_parser()
    data, model, options = parser.parse(arguments)
    if not data.dataset or not options.output_dir:
        raise CommandLineError("--dataset and --output_dir are needed, on the command line or in the recipe.")
    defaults = TrainingOptions()
    given = {name: value for name, value in vars(options).items() if value != getattr(defaults, name)}
    check_arguments(data, model, options)
    is_resumed = (options.resume_from_checkpoint or "false").lower() != "false"
    check_output_dir(options.output_dir, is_resumed)
    return Request(data, model, given, parser.recipe)


def check_output_dir(folder: str, is_resumed: bool):
    """Raise unless `folder` is free for a new run, or a run is resumed."""
    if is_resumed or not os.path.isdir(folder):
        return
    found = [name for name in os.listdir(folder) if name in OUTPUT_FILES or name.startswith("checkpoint-")]
    if found:
        can_go_on = any(Path(folder).glob("run/checkpoint-*/trainer_state.json"))
        goes_on = "continue that run with --resume_from_checkpoint last" if can_go_on else "delete it"
        raise CommandLineError(
            f"{folder} already holds a run ({min(found)}); choose another --output_dir, or {goes_on}."
        )


def check_arguments(data: DataArguments, model, training):
    """Raise if arguments have values that cannot be used, do not go together, or would have no effect."""
    is_classifier = model.generative_weight is not None
    sees_all = "cannot go with --generative_weight: a classifier sees what is there."
    for is_wrong, message in (
        (training.max_steps == 0, "--max_steps must be at least 1, or -1 for no limit, got 0."),
        (
            data.streaming and training.max_steps < 1,
            "--streaming needs --max_steps: a stream does not say where it ends.",
        ),
        (
            data.streaming and training.dataloader_num_workers > 1,
            "--streaming goes with at most one of --dataloader_num_workers: several would mix the order.",
        ),
        (data.class_dropout and is_classifier, f"--class_dropout {sees_all}"),
        (data.mutation_rate and is_classifier, f"--mutation_rate {sees_all}"),
        (
            data.threshold is not None and data.binarization != "threshold",
            "--threshold needs --binarization threshold.",
        ),
        (data.center_crop and model.image_size is None, "--center_crop needs --image_size."),
        (
            model.image_size is not None and (len(model.image_size) > 2 or min(model.image_size) < 1),
            "--image_size must be one or two positive integers, height and width, got "
            f"{' '.join(map(str, model.image_size or []))}.",
        ),
    ):
        if is_wrong:
            raise CommandLineError(message)
    if model.model_name_or_path:
        check_nothing_new(data, model)


def check_nothing_new(data: DataArguments, model):
    """Raise if an argument describes a new model or image processor although saved ones are given."""
    kept = ["model_name_or_path", "class_conditional", "generative_weight", "image_size"]
    if model.generative_weight is not None:
        kept += ["class_prior", "class_temperature"]
    given = [name for name, value in asdict(model).items() if name not in kept and value is not None]
    given += [name for name in ("binarization", "threshold") if getattr(data, name) is not None]
    if given:
        raise CommandLineError(
            f"--{given[0]} cannot go with --model_name_or_path: the model keeps its layers and its image processor, "
            "except for their --image_size, its classes (--class_conditional) and, as a classifier "
            "(--generative_weight), --class_prior and --class_temperature."
        )
