r"""
Tell images of one data set from those of another with a model of the first: a table of scores and their AUROC.

    python training/outliers.py --model runs/fashion_pixelcnn_pp --background runs/fashion_background \
        --in_dataset zalando-datasets/fashion_mnist --out_dataset ylecun/mnist --output outliers.json

Every score is high where an image looks like an outlier; x is an image, log p(x) its log-likelihood:

- log-likelihood: -log p(x). Known to fail where outliers are simpler than what the model knows
  (Nalisnick et al. 2019a, https://huggingface.co/papers/1810.09136);
- likelihood ratio: -log p(x) + log b(x), where b is a model that was shown corrupted images (`--background`, made by
  train.py with `--mutation_rate`), so that it knows what is common to all images (Ren et al. 2019,
  https://huggingface.co/papers/1906.02845, section 3; here it predicts the levels before the corruption);
- input complexity: -log2 p(x) less the bits of the shortest lossless file of x: PNG, WebP or JPEG 2000
  (Serrà et al. 2020, https://huggingface.co/papers/1909.11480, section 3);
- typicality: |log p(x) - mean of log p over `--typical_split`|, images that the model was trained on
  (Nalisnick et al. 2019b, https://huggingface.co/papers/1906.02994, section 3.1, for one image).

AUROC is the probability that an outlier scores higher than an image of the first data set, ties counting half, over all
pairs; 0.5 is chance. A conditional model scores images without their class (class -1, which needs class dropout).
"""

import io
import math
from dataclasses import dataclass, field

from command_line import CommandLineParser, check_first, one_line_errors

if __name__ == "__main__":
    check_first(__file__, __doc__)  # before the imports that take seconds: a typo is answered at once

import numpy as np
import torch
from PIL import Image
from tqdm.auto import tqdm

from hf_pixelcnn.training import InputError, LevelDataset, collate_levels, load_model, load_split, run_facts, split_nats
from hf_pixelcnn.training.files import write_json
from hf_pixelcnn.training.level_dataset import level_options
from hf_pixelcnn.training.records import keep_freed_memory
from hf_pixelcnn.training.saved_models import choose_device

LOSSLESS = {
    "PNG": {"optimize": True},
    "WEBP": {"lossless": True, "quality": 100, "method": 6},
    "JPEG2000": {"irreversible": False},
}


@dataclass
class OutlierArguments:
    model: str = field(metadata={"help": "Folder or Hub id of a model of the first data set, with image processor."})
    in_dataset: str = field(metadata={"help": "The data set that the model knows: an id on the Hub or a folder."})
    out_dataset: str = field(metadata={"help": "The data set of outliers."})
    background: str | None = field(
        default=None, metadata={"help": "Model of corrupted images, for the likelihood ratio."}
    )
    in_split: str = field(default="test", metadata={"help": "Split or expression, e.g. test[:2000]."})
    out_split: str = field(default="test", metadata={"help": "Split or expression."})
    typical_split: str = field(
        default="train[:1000]", metadata={"help": "Part of the first data set that says which likelihood is typical."}
    )
    batch_size: int = field(default=100, metadata={"help": "Images scored at once."})
    seed: int = field(default=0, metadata={"help": "Seed of stochastic binarisation."})
    device: str | None = field(default=None, metadata={"help": "cpu, cuda, ...; by default an accelerator if any."})
    cache_dir: str | None = field(default=None, metadata={"help": "Where data sets are cached."})
    output: str | None = field(default=None, metadata={"help": "JSON file to write."})


def auroc(inside: np.ndarray, outside: np.ndarray) -> float:
    r"""
    Probability that a score of `outside` is above one of `inside`, ties counting half: exact, over all pairs.

    Args:
        inside (`np.ndarray` of shape `(n,)`), outside (`np.ndarray` of shape `(m,)`): Scores.
    """
    ordered = np.sort(inside)
    below, not_above = (np.searchsorted(ordered, outside, side) for side in ("left", "right"))
    return float((below + not_above).sum() / (2 * len(inside) * len(outside)))


def shortest_bits(image: Image.Image) -> int:
    """Bits of the shortest lossless file of an image among the formats of `LOSSLESS`."""
    lengths = []
    for name, options in LOSSLESS.items():
        file = io.BytesIO()
        image.save(file, name, **options)
        lengths.append(8 * file.tell())
    return min(lengths)


def collate_without_class(items: list[dict]) -> dict[str, torch.Tensor]:
    """A batch as [`collate_levels`] makes it, with class -1 for all images."""
    batch = collate_levels(items)
    return batch | {"class_ids": torch.full((len(items),), -1)}


def measure(images: LevelDataset, model, background, processor, batch_size: int) -> dict[str, np.ndarray]:
    """`nats` of each image, its `background` nats if there is such a model, and its `codec_bits`: `(num_images,)`."""
    measures = {"nats": split_nats(model, images, batch_size, collate_without_class).numpy()}
    if background is not None:
        measures["background"] = split_nats(background, images, batch_size, collate_without_class).numpy()
    bits = []
    for start in tqdm(range(0, len(images), batch_size), desc="Compressing", unit="batch"):
        items = [images[index] for index in range(start, min(start + batch_size, len(images)))]
        bits += map(shortest_bits, processor.post_process(collate_levels(items)["labels"]))
    return measures | {"codec_bits": np.array(bits)}


def outlier_scores(measures: dict[str, np.ndarray], typical_nats: float) -> dict[str, np.ndarray]:
    """The scores that the module's docstring explains, by name, from what [`measure`] returns."""
    nats = measures["nats"]
    scores = {"log-likelihood": nats}
    if "background" in measures:
        scores["likelihood ratio"] = nats - measures["background"]
    scores["input complexity"] = nats / math.log(2) - measures["codec_bits"]
    scores["typicality"] = np.abs(nats - typical_nats)
    return scores


def load_models(args: OutlierArguments, device: torch.device):
    """Model, background model (or `None`) and image processor, after a check that they share their levels."""
    model, processor = load_model(args.model)
    if processor is None:
        raise InputError(f"{args.model} has no image processor: codes have no files whose length could be compared.")
    background = None
    if args.background:
        background, other = load_model(args.background)
        if level_options(other) != level_options(processor):
            raise InputError(f"{args.background} has not the image processor of {args.model}: they model other levels.")
        background.to(device)
    return model.to(device), background, processor


@one_line_errors
def main(arguments: list[str] | None = None):
    (args,) = CommandLineParser(OutlierArguments).parse(arguments)
    keep_freed_memory()
    device = choose_device(args.device)
    model, background, processor = load_models(args, device)
    inside, outside, typical = (
        LevelDataset(
            load_split(dataset, split, None, args.cache_dir), model.config.num_levels, processor, seed=args.seed
        )
        for dataset, split in (
            (args.in_dataset, args.in_split),
            (args.out_dataset, args.out_split),
            (args.in_dataset, args.typical_split),
        )
    )
    if inside.shape != outside.shape:
        raise InputError(f"images of {args.in_dataset} are {inside.shape}, of {args.out_dataset} {outside.shape}.")
    typical_nats = split_nats(model, typical, args.batch_size, collate_without_class).mean().item()
    inside_scores, outside_scores = (
        outlier_scores(measure(images, model, background, processor, args.batch_size), typical_nats)
        for images in (inside, outside)
    )
    results = {
        name: {
            "auroc": auroc(inside_scores[name], outside_scores[name]),
            "mean_in": float(inside_scores[name].mean()),
            "mean_out": float(outside_scores[name].mean()),
        }
        for name in inside_scores
    }
    print(f"in: {args.in_dataset}, {len(inside)} images; out: {args.out_dataset}, {len(outside)} images")
    print(f"{'score':18} {'AUROC':>7} {'mean in':>10} {'mean out':>10}")
    for name, row in results.items():
        print(f"{name:18} {row['auroc']:7.4f} {row['mean_in']:10.1f} {row['mean_out']:10.1f}")
    if args.output:
        names = ("model", "background", "in_dataset", "in_split", "out_dataset", "out_split", "typical_split", "seed")
        question = {name: getattr(args, name) for name in names}
        counts = {"num_in": len(inside), "num_out": len(outside), "typical_nats_per_image": typical_nats}
        write_json({**question, **counts, "scores": results, **run_facts(device)}, args.output)


if __name__ == "__main__":
    main()
