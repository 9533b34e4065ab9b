r"""
Score a model on a whole split: bits per dimension, nats per dimension and nats per image, with sums in float64.

    python training/score.py --model runs/mnist_pixelcnn --dataset ylecun/mnist --split test --output results.json

`--model` is a folder or an id on the Hub; its own image processor makes the levels. A class of the data set is the one
of the model that has the same name, or the same number where either has no names; a name that the model lacks is an
error. With stochastic binarisation the draw of each image depends only on `--seed` and its place in the split, and
`--num_binarizations 10` scores ten draws: their mean, and the standard deviation between them.

    --per_class true          a table of the scores of each class of the data set
    --heat_map surprise.png   images from the least to the most surprising one, and where they are surprising
    --classify true           accuracy and calibration of a class-conditional model as a classifier, by Bayes' rule
"""

import time
from dataclasses import dataclass, field

from command_line import CommandLineParser, check_first, one_line_errors

if __name__ == "__main__":
    check_first(__file__, __doc__)  # before the imports that take seconds: a typo is answered at once

import torch
from datasets import Dataset

from hf_pixelcnn.pictures_causal_image import images_of
from hf_pixelcnn.training import (
    InputError,
    LevelDataset,
    class_names,
    class_probabilities,
    classification_metrics,
    collate_levels,
    draw_heat_maps,
    load_classifier,
    load_model,
    load_split,
    run_facts,
    score_by_class,
    split_nats,
)
from hf_pixelcnn.training.data_sources import find_class_column, names_in
from hf_pixelcnn.training.files import write_json
from hf_pixelcnn.training.level_dataset import check_classes_of
from hf_pixelcnn.training.pictures import check_picture_path, mixed_choice
from hf_pixelcnn.training.records import keep_freed_memory
from hf_pixelcnn.training.saved_models import choose_device
from hf_pixelcnn.training.scoring import metrics_of

DTYPES = {"float64": torch.float64, "float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


@dataclass
class EvaluationArguments:
    model: str = field(metadata={"help": "Folder or Hub id of a model with its image processor."})
    dataset: str = field(metadata={"help": "Data set: an id on the Hub or a local folder."})
    split: str = field(default="test", metadata={"help": "Split or expression, e.g. train[50000:]."})
    dataset_config: str | None = field(default=None, metadata={"help": "Configuration of the data set."})
    image_column: str | None = field(default=None, metadata={"help": "Column of images, if there are several."})
    class_column: str | None = field(default=None, metadata={"help": "Column of classes, if there are several."})
    cache_dir: str | None = field(default=None, metadata={"help": "Where data sets are cached."})
    batch_size: int = field(default=100, metadata={"help": "Images scored at once."})
    device: str | None = field(default=None, metadata={"help": "cpu, cuda, ...; by default an accelerator if any."})
    dtype: str = field(default="float32", metadata={"help": "float64, float32, bfloat16 or float16."})
    seed: int = field(default=0, metadata={"help": "Seed of stochastic binarisation."})
    num_binarizations: int = field(
        default=1, metadata={"help": "Stochastic binarisations of each image, whose scores are averaged."}
    )
    per_class: bool = field(default=False, metadata={"help": "Also score the images of each class by themselves."})
    heat_map: str | None = field(default=None, metadata={"help": "Picture to write: where images are surprising."})
    num_heat_maps: int = field(
        default=16, metadata={"help": "How many images it shows, from the least to the most surprising one."}
    )
    classify: bool = field(default=False, metadata={"help": "Classify the images by Bayes' rule."})
    class_temperature: float | None = field(
        default=None, metadata={"help": "With --classify: divides the log-probabilities of classes."}
    )
    output: str | None = field(default=None, metadata={"help": "JSON file to write."})


def check_arguments(args: EvaluationArguments):
    """Raise if an argument has a value that cannot be used, alone or with the others."""
    if args.dtype not in DTYPES:
        raise InputError(f"--dtype must be one of {', '.join(DTYPES)}, got {args.dtype!r}.")
    if args.class_temperature is not None and not args.classify:
        raise InputError("--class_temperature needs --classify true.")
    if args.heat_map:
        check_picture_path(args.heat_map)


@torch.no_grad()
def draw_surprise(model, processor, images: LevelDataset, nats: torch.Tensor, count: int, path: str):
    """Draw `count` images, from the least to the most surprising one, and the surprise of their pixels."""
    batch = collate_levels([images[index] for index in mixed_choice(nats, count)])
    class_ids = batch["class_ids"].to(model.device) if model.config.num_classes else None
    levels = batch["labels"]
    surprise = -model.log_prob(levels.to(model.device), class_ids=class_ids).sum(dim=1).cpu().float()
    draw_heat_maps(images_of(levels, processor, model.config.num_levels), surprise, levels.shape[1], path)


def load_images(args: EvaluationArguments, config, processor) -> tuple[Dataset, LevelDataset]:
    """The rows of the split and their levels, after a check that they go with the model and the arguments."""
    rows = load_split(args.dataset, args.split, args.dataset_config, args.cache_dir)
    is_conditional = config.num_classes > 0
    images = LevelDataset(
        rows,
        num_levels=config.num_levels,
        processor=processor,
        image_column=args.image_column,
        class_column=args.class_column,
        with_classes=is_conditional or args.per_class,
        id2label=config.id2label if is_conditional else None,
        seed=args.seed,
    )
    if is_conditional:
        check_classes_of(images, args.split, config.num_classes, least=0 if args.classify else -1)
    if args.num_binarizations > 1 and not images.is_stochastic:
        raise InputError(f"--num_binarizations: the levels of {args.model} are not drawn, each draw would be the same.")
    return rows, images


def score_split(model, images: LevelDataset, args: EvaluationArguments) -> tuple[torch.Tensor, dict]:
    """Nats of each image, averaged over all draws, and the results of the whole split, which are also printed."""
    start, draws = time.perf_counter(), []
    for epoch in range(args.num_binarizations):
        images.set_epoch(epoch)
        draws.append(split_nats(model, images, args.batch_size, collate_levels))
    images.set_epoch(0)  # the one that pictures and classes are about
    draws = torch.stack(draws)
    nats = draws.mean(dim=0)
    dims = images[0]["pixel_values"].size
    counts = {"num_images": len(images), "num_dims": len(images) * dims}
    results = metrics_of(nats.sum().item(), **counts) | counts
    results["seconds"] = time.perf_counter() - start
    print(
        f"{args.split}: {results['bits_per_dim']:.5f} bits/dim, {results['nats_per_dim']:.5f} nats/dim, "
        f"{results['nats_per_image']:.3f} nats/image over {len(images)} images of {dims} dimensions "
        f"in {results['seconds']:.1f} s"
    )
    if args.num_binarizations > 1:
        spread = metrics_of(draws.sum(dim=1).std().item(), **counts)  # between the draws of the split
        results["std_of_binarizations"] = spread
        print(
            f"mean of {args.num_binarizations} draws; standard deviation between them: "
            f"{spread['nats_per_image']:.3f} nats/image"
        )
    return nats, results


def print_classes(rows: list[dict]):
    """Print what `score_by_class` returns as a table."""
    print(f"{'class':20} {'images':>7} {'bits/dim':>9} {'nats/image':>11}")
    for row in rows:
        bits, per_image = row["bits_per_dim"], row["nats_per_image"]
        print(f"{row['class']:20} {row['num_images']:7} {bits:9.5f} {per_image:11.3f}")


def classify(classifier, images: LevelDataset, batch_size: int) -> dict[str, float]:
    """Accuracy and calibration of a classifier, also printed."""
    probabilities = class_probabilities(classifier, images, batch_size, collate_levels)
    metrics = classification_metrics(probabilities, torch.from_numpy(images.class_ids))
    print(
        f"as a classifier: accuracy {metrics['accuracy']:.4f}, cross-entropy {metrics['cross_entropy']:.4f} nats, "
        f"expected calibration error {metrics['expected_calibration_error']:.4f}"
    )
    return metrics


@one_line_errors
def main(arguments: list[str] | None = None):
    (args,) = CommandLineParser(EvaluationArguments).parse(arguments)
    check_arguments(args)
    keep_freed_memory()
    device = choose_device(args.device)
    model, processor = load_model(args.model)
    model.to(device, DTYPES[args.dtype])
    classifier = None
    if args.classify:
        fields = {} if args.class_temperature is None else {"class_temperature": args.class_temperature}
        classifier = load_classifier(args.model, **fields).to(device, DTYPES[args.dtype])
    rows, images = load_images(args, model.config, processor)
    nats, results = score_split(model, images, args)
    if args.per_class:
        names = names_in(model.config.id2label) if model.config.num_classes else None
        names = names or class_names(rows, find_class_column(rows.features, args.class_column))
        results["per_class"] = score_by_class(nats, images.class_ids, names, images[0]["pixel_values"].size)
        print_classes(results["per_class"])
    if classifier:
        results["classification"] = classify(classifier, images, args.batch_size)
    if args.heat_map:
        draw_surprise(model, processor, images, nats, args.num_heat_maps, args.heat_map)
    if args.output:
        names = ("model", "dataset", "split", "dtype", "batch_size", "seed", "num_binarizations", "class_temperature")
        question = {name: getattr(args, name) for name in names}
        write_json({**question, **results, "num_parameters": model.num_parameters(), **run_facts(device)}, args.output)


if __name__ == "__main__":
    main()
