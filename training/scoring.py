"""Exact likelihood of a whole split."""

import math
import time

import torch
from torch.utils.data import DataLoader, Dataset
from tqdm.auto import tqdm
from transformers import PreTrainedModel

from hf_pixelcnn import bits_per_dim


def nats_per_image(
    model: PreTrainedModel, pixel_values: torch.Tensor, class_ids: torch.Tensor | None = None
) -> torch.Tensor:
    """Negative log-likelihood of each image in nats, summed over its dimensions: `torch.DoubleTensor` `(batch,)`."""
    return -model.log_prob(pixel_values, class_ids=class_ids).double().sum((1, 2, 3))


def metrics_of(nats: float, num_images: int, num_dims: int) -> dict[str, float]:
    r"""
    What is reported of a split.

    Args:
        nats (`float`): Negative log-likelihood of all images.
        num_images (`int`): Number of images.
        num_dims (`int`): Number of dimensions of all images.
    """
    return {
        "bits_per_dim": bits_per_dim(nats, num_dims),
        "nats_per_dim": nats / num_dims,
        "nats_per_image": nats / num_images,
    }


@torch.no_grad()
def score(model: PreTrainedModel, images: Dataset, batch_size: int, collate_fn) -> dict[str, float]:
    r"""
    Score a whole split, in the dtype and on the device of the model, with sums in float64.

    Args:
        model: A model with `log_prob`; put into evaluation mode.
        images (`Dataset`): Items for `collate_fn`, each image once.
        batch_size (`int`): Images in a batch; the score does not depend on it beyond rounding.
        collate_fn: Makes a batch, a `dict` with `pixel_values` and perhaps `class_ids`, of items.

    Returns:
        `dict`: `bits_per_dim`, `nats_per_dim`, `nats_per_image`, `num_images`, `num_dims`, `seconds`.

    Raises:
        ValueError: If a likelihood is not a number.
    """
    model.eval()
    start = time.perf_counter()
    nats, num_dims = torch.zeros((), dtype=torch.float64, device=model.device), 0
    for batch in tqdm(DataLoader(images, batch_size, collate_fn=collate_fn), desc="Scoring", unit="batch"):
        pixel_values, class_ids = batch["pixel_values"].to(model.device), batch.get("class_ids")
        nats += nats_per_image(model, pixel_values, None if class_ids is None else class_ids.to(model.device)).sum()
        num_dims += pixel_values.numel()
    if not math.isfinite(nats.item()):
        raise ValueError(f"The likelihood of the split is {-nats.item()}: the model's weights or outputs are broken.")
    counts = {"num_images": len(images), "num_dims": num_dims, "seconds": time.perf_counter() - start}
    return metrics_of(nats.item(), len(images), num_dims) | counts
