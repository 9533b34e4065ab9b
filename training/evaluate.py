r"""
Score a model on a whole split: bits per dimension, nats per dimension and nats per image, with sums in float64.

    python training/evaluate.py --model runs/mnist_pixelcnn --dataset ylecun/mnist --split test --output results.json

`--model` is a folder or an id on the Hub; its own image processor makes the levels. With stochastic binarisation the
draw of each image depends on `--seed` and its place in the split alone.
"""

from dataclasses import dataclass, field

import torch
from command_line import CommandLineParser, InputError, one_line_errors
from image_data import LevelDataset, collate_levels, load_split
from run_record import keep_freed_memory, run_facts, write_json
from saved_models import choose_device, load_model
from scoring import score


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
    output: str | None = field(default=None, metadata={"help": "JSON file to write."})


@one_line_errors
def main(arguments: list[str] | None = None):
    (args,) = CommandLineParser(EvaluationArguments).parse(arguments)
    dtypes = {"float64": torch.float64, "float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
    if args.dtype not in dtypes:
        raise InputError(f"--dtype must be one of {', '.join(dtypes)}, got {args.dtype!r}.")
    if args.batch_size < 1:
        raise InputError(f"--batch_size must be at least 1, got {args.batch_size}.")
    keep_freed_memory()
    device = choose_device(args.device)
    model, processor = load_model(args.model)
    model.to(device, dtypes[args.dtype])
    images = LevelDataset(
        load_split(args.dataset, args.split, args.dataset_config, args.cache_dir),
        num_levels=model.config.num_levels,
        processor=processor,
        image_column=args.image_column,
        class_column=args.class_column,
        with_classes=model.config.num_classes > 0,
        seed=args.seed,
    )
    scores = score(model, images, args.batch_size, collate_levels)
    print(
        f"{args.split}: {scores['bits_per_dim']:.5f} bits/dim, {scores['nats_per_dim']:.5f} nats/dim, "
        f"{scores['nats_per_image']:.3f} nats/image over {scores['num_images']} images of "
        f"{scores['num_dims'] // scores['num_images']} dimensions in {scores['seconds']:.1f} s"
    )
    if args.output:
        question = {name: getattr(args, name) for name in ("model", "dataset", "split", "dtype", "batch_size", "seed")}
        write_json({**question, **scores, "num_parameters": model.num_parameters(), **run_facts(device)}, args.output)


if __name__ == "__main__":
    main()
