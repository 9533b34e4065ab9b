"""Exact likelihood of a whole split, and how well a classifier does on it."""

import time
from collections.abc import Sequence

import numpy as np
import torch
from torch.utils.data import DataLoader, Dataset
from tqdm.auto import tqdm
from transformers import PreTrainedModel

from ..likelihood_causal_image import bits_per_dim
from ..modeling_causal_image import CausalImageLikelihood
from .errors import InputError
from .level_dataset import LevelDataset


def nats_per_image(
    model: CausalImageLikelihood, pixel_values: torch.Tensor, class_ids: torch.Tensor | None = None
) -> torch.Tensor:
    """Negative log-likelihood of each image in nats, summed over its dimensions: `torch.DoubleTensor` `(batch,)`."""
    return -model.log_prob(pixel_values, class_ids=class_ids).double().sum((1, 2, 3))


def metrics_of(nats: float, num_images: int, num_dims: int) -> dict[str, float]:
    r"""
    The metrics of a split.

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
def split_nats(model: CausalImageLikelihood, images: Dataset, batch_size: int, collate_fn) -> torch.Tensor:
    r"""
    Score each image of a split, in the dtype and on the device of the model.

    Args:
        model: A model with `log_prob`; put into evaluation mode.
        images (`Dataset`): Items for `collate_fn`, one per image.
        batch_size (`int`): Images in a batch; the score does not depend on it beyond rounding.
        collate_fn: Makes a batch of items: a `dict` with `pixel_values` and, for a conditional model, `class_ids`.

    Returns:
        `torch.DoubleTensor` `(num_images,)` on the CPU: the negative log-likelihood of each image in nats.

    Raises:
        InputError: If a likelihood is not a number.
    """
    model.eval()
    parts = []
    for batch in tqdm(DataLoader(images, batch_size, collate_fn=collate_fn), desc="Scoring", unit="batch"):
        class_ids = batch["class_ids"].to(model.device) if model.config.num_classes else None
        parts.append(nats_per_image(model, batch["pixel_values"].to(model.device), class_ids).cpu())
    nats = torch.cat(parts)
    if not nats.sum().isfinite():
        raise InputError(f"the likelihood of the split is {-nats.sum()}: the model's weights or outputs are broken.")
    return nats


def score(model: CausalImageLikelihood, images: LevelDataset, batch_size: int, collate_fn) -> dict[str, float]:
    r"""
    Score a whole split; the arguments are those of [`split_nats`].

    Returns:
        `dict`: `bits_per_dim`, `nats_per_dim`, `nats_per_image`, `num_images`, `num_dims`, `seconds`.
    """
    start = time.perf_counter()
    nats = split_nats(model, images, batch_size, collate_fn)
    num_dims = len(images) * images[0]["pixel_values"].size
    counts = {"num_images": len(images), "num_dims": num_dims, "seconds": time.perf_counter() - start}
    return metrics_of(nats.sum().item(), len(images), num_dims) | counts


def score_by_class(nats: torch.Tensor, class_ids: np.ndarray, names: Sequence[str], num_dims: int) -> list[dict]:
    r"""
    The metrics of the images of each class.

    Args:
        nats (`torch.DoubleTensor` of shape `(num_images,)`): See [`split_nats`].
        class_ids (`np.ndarray` of shape `(num_images,)`): Classes, -1 for none.
        names (sequence of `str`): Their names.
        num_dims (`int`): Dimensions of one image.

    Returns:
        `list[dict]`: `class`, `num_images`, `bits_per_dim`, `nats_per_dim` and `nats_per_image`, for each class that
        occurs; last the images of no class, if there are any.
    """
    rows = []
    for class_id, name in [*enumerate(names), (-1, "no class")]:
        own = nats[torch.from_numpy(class_ids == class_id)]
        if len(own):
            metrics = metrics_of(own.sum().item(), len(own), len(own) * num_dims)
            rows.append({"class": name, "num_images": len(own), **metrics})
    return rows


@torch.no_grad()
def class_probabilities(classifier: PreTrainedModel, images: Dataset, batch_size: int, collate_fn) -> torch.Tensor:
    """p(class | image) for each image of a split, from a `...ForImageClassification`: `(num_images, num_classes)`."""
    classifier.eval()
    batches = tqdm(DataLoader(images, batch_size, collate_fn=collate_fn), desc="Classifying", unit="batch")
    logits = [classifier(batch["pixel_values"].to(classifier.device)).logits.cpu() for batch in batches]
    return torch.cat(logits).softmax(-1, dtype=torch.float64)


def calibration_error(probabilities: torch.Tensor, labels: torch.Tensor, num_bins: int = 15) -> float:
    r"""
    Expected calibration error: how far the confidence of a classifier is from how often it is right.

    Images are put into `num_bins` bins ((b - 1) / num_bins, b / num_bins] of equal width by the probability of their
    most probable class; the error is the mean over images of |share of right answers - mean confidence| of their bin.

    Args:
        probabilities (`torch.DoubleTensor` of shape `(num_images, num_classes)`): p(class | image).
        labels (`torch.LongTensor` of shape `(num_images,)`): Classes.
        num_bins (`int`): Bins.

    Reference: Guo et al. 2017, On Calibration of Modern Neural Networks, equation 3,
    https://huggingface.co/papers/1706.04599
    """
    confidence, answer = probabilities.max(-1)
    bins = (confidence * num_bins).ceil().long().clamp(1, num_bins) - 1
    surplus = (answer == labels).double() - confidence
    return torch.zeros(num_bins).double().index_add(0, bins, surplus).abs().sum().item() / len(labels)


def classification_metrics(probabilities: torch.Tensor, labels: torch.Tensor) -> dict[str, float]:
    """`accuracy`, `cross_entropy` in nats and `expected_calibration_error`; arguments as [`calibration_error`]."""
    return {
        "accuracy": (probabilities.argmax(-1) == labels).double().mean().item(),
        "cross_entropy": -probabilities.gather(1, labels[:, None]).log().mean().item(),
        "expected_calibration_error": calibration_error(probabilities, labels),
    }
