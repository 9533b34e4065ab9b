"""Checks of what a user passes in, made before any work, and the mode that models work in."""

import contextlib
import json
import os
import threading
import weakref
from collections.abc import Iterator, Sequence
from numbers import Integral
from typing import Any

import numpy as np
import torch
from PIL import Image
from transformers.utils import logging

from .configuration_causal_image import CausalImageModelingConfig, is_int
from .pictures_causal_image import upright

logger = logging.get_logger(f"transformers.{__name__}")  # where `transformers.logging.set_verbosity` reaches

SMALL_REQUEST = 2**26  # bytes that are not worth a question to the system
evaluations = weakref.WeakKeyDictionary()  # model to [uses at this time, modules to set back after the last of them]
evaluations_lock = threading.Lock()


@contextlib.contextmanager
def evaluation_mode(model: torch.nn.Module) -> Iterator[None]:
    """Evaluation mode, set back afterwards, module by module, when nobody uses it any more, in whatever thread."""
    with evaluations_lock:
        use = evaluations.setdefault(model, [0, []])
        use[0] += 1
        use[1] += [module for module in model.modules() if module.training]
        model.eval()
    try:
        yield
    finally:
        with evaluations_lock:
            use[0] -= 1
            if use[0] == 0:
                del evaluations[model]
                for module in use[1]:
                    module.training = True


def some_of(words: Sequence[str], most: int = 3) -> str:
    """The first of some words for a message, and how many more there are."""
    return ", ".join(words[:most]) + (f" and {len(words) - most} more" if len(words) > most else "")


def plain(value: Any) -> Any:
    """Numbers and arrays of numpy as Python's own numbers and lists; whatever else as it is."""
    return value.tolist() if isinstance(value, np.generic | np.ndarray) else value


def check_count(name: str, count: int):
    """Raise unless `count` is a positive int."""
    if not is_int(count):
        raise TypeError(f"`{name}` must be an int, got {count!r}.")
    if count < 1:
        raise ValueError(f"`{name}` must be at least 1, got {count}.")


def fits_in_memory(size: int, device: torch.device) -> bool:
    """Whether so many bytes can be allocated, as far as can be told without using them."""
    try:
        torch.empty(size, dtype=torch.uint8, device=device)  # on a CPU memory is taken when it is written to
    except (RuntimeError, TypeError):  # a TypeError if no tensor can have so many elements
        return False
    if device.type == "cpu" and os.path.exists("/proc/meminfo"):
        with open("/proc/meminfo") as lines:
            return not any(size > 1024 * int(line.split()[1]) for line in lines if line.startswith("MemAvailable:"))
    return True


def check_memory(what: str, size: int, device: torch.device):
    r"""
    Check, before any of it is allocated, that there is memory for a request.

    Args:
        what (`str`): What takes it, for the message.
        size (`int`): Bytes that it takes at least.
        device (`torch.device`): Where.

    Raises:
        torch.OutOfMemoryError: If so much is not free.
    """
    if size > SMALL_REQUEST and not fits_in_memory(size, device):
        raise torch.OutOfMemoryError(f"{what} takes at least {size:,} bytes of memory on {device}: more than is free.")


def drawing_network(model):
    r"""
    The network of a model that can draw images.

    Args:
        model: A `...ForCausalImageModeling`, what `torch.compile` made of one, or a `PeftModel` around one. Its class
            may be a copy of ours that came with a checkpoint.

    Raises:
        TypeError: If `model` is something else.
    """
    inner = getattr(model, "_orig_mod", model)
    if hasattr(inner, "get_base_model"):
        inner = inner.get_base_model()
    if not hasattr(inner, "generate") or not hasattr(getattr(inner, "config", None), "num_levels"):
        name = type(inner).__name__
        raise TypeError(f"`model` must be a ...ForCausalImageModeling, which can draw images, got {name}.")
    return inner


def check_json_object(path: str | os.PathLike):
    """Raise `OSError` unless a file holds names and values in JSON: transformers takes `null` for a missing file."""
    with open(path, encoding="utf-8") as file:
        try:
            content = json.load(file)
        except (ValueError, RecursionError) as error:
            raise OSError(f"'{path}' is not a valid JSON file: {error}") from error
    if not isinstance(content, dict):
        raise OSError(f"'{path}' must hold a dictionary in JSON, got {type(content).__name__}.")


def check_processor(processor, config: CausalImageModelingConfig):
    """Raise `ValueError` unless an image processor makes as many levels, of as many channels, as `config` says."""
    if not hasattr(processor, "post_process") or not hasattr(processor, "num_levels"):
        raise ValueError(
            f"The image processor must make levels, as PixelCNNImageProcessor does, got {type(processor).__name__}: "
            "the preprocessor_config.json beside the model is another model's."
        )
    for name in ("num_levels", "num_channels"):
        ours, theirs = getattr(config, name), getattr(processor, name, None)
        if theirs not in (None, ours):
            raise ValueError(
                f"The image processor has `{name}` {theirs}, but the model has {ours}: they do not belong together. "
                f"Use the model's own, or one with `{name}={ours}`."
            )


def computable(levels: torch.Tensor) -> torch.Tensor:
    """The same levels in a dtype that torch can compare and select with."""
    return levels.long() if levels.dtype in (torch.uint16, torch.uint32, torch.uint64) else levels


def has_values(tensor: torch.Tensor) -> bool:
    """Whether a tensor can be asked what is in it: not in code that is compiled or mapped, nor on the meta device."""
    if torch.compiler.is_compiling() or tensor.is_meta:  # asked first: the next line cannot be compiled
        return False
    return not torch._C._functorch.is_functorch_wrapped_tensor(tensor)  # pyright: ignore[reportAttributeAccessIssue]


def what_floats_are(values: torch.Tensor, num_levels: int) -> str:
    """What values that should have been levels seem to be, and how levels are made of them."""
    if not has_values(values) or values.numel() == 0 or values.is_complex():
        return "PixelCNNImageProcessor turns images into levels."
    values = values.float()  # of bools too
    low, high = values.min().item(), values.max().item()
    are_whole = low >= 0 and bool((values == values.round()).all())
    if are_whole and high < num_levels:
        return "They are whole numbers in that range: `.long()` makes them levels."
    if are_whole and high <= 255:
        return f"They are whole numbers up to {high:.0f}: PixelCNNImageProcessor turns pixels into levels."
    if low >= 0 and high <= 1:
        return "They lie in [0, 1], as ToTensor makes them: PixelCNNImageProcessor turns images into levels."
    return "They seem normalised: undo that (`x * std + mean`), or give PixelCNNImageProcessor the images themselves."


def check_levels(name: str, levels: torch.Tensor, config: CausalImageModelingConfig, ignored: int | None = None):
    """Raise unless `levels` are integer levels of images that `config` describes; compiled code skips the values."""
    if not isinstance(levels, torch.Tensor):
        raise TypeError(f"`{name}` must be a torch.Tensor of integer levels, got {type(levels).__name__}.")
    if levels.is_floating_point() or levels.is_complex() or levels.dtype == torch.bool:
        raise TypeError(
            f"`{name}` must be integer levels 0 ... {config.num_levels - 1}, got dtype {levels.dtype}. "
            + what_floats_are(levels, config.num_levels)
        )
    if levels.ndim != 4 or levels.shape[1] != config.num_channels:
        raise ValueError(
            f"`{name}` must have shape (batch, {config.num_channels}, height, width), got {tuple(levels.shape)}."
        )
    if not has_values(levels):
        return
    if levels.numel() == 0:
        raise ValueError(f"`{name}` is empty: its shape is {tuple(levels.shape)}.")
    levels = levels.long() if ignored is not None else computable(levels)  # long, so that -100 is what it says
    counted = levels if ignored is None else torch.where(levels == ignored, 0, levels)
    low, high = torch.stack(counted.aminmax()).tolist()
    if low < 0 or high >= config.num_levels:
        raise ValueError(
            f"`{name}` must be levels 0 ... {config.num_levels - 1} (`num_levels` is {config.num_levels}), "
            f"got values from {low} to {high}."
            + (" PixelCNNImageProcessor turns pixels into levels." if config.num_levels <= high <= 255 else "")
        )


def _class_id(one: object, config: CausalImageModelingConfig) -> int:
    """The id of a class given by id or name."""
    if isinstance(one, str):
        names = config.label2id if config.num_classes else {}
        if one not in names:
            is_id = one.isdecimal() and int(one) < config.num_classes
            hint = f" The class of that number is `class_ids={one}`, without quotes." if is_id else ""
            raise ValueError(f"There is no class {one!r}; the model has {list(names) or 'no classes'}.{hint}")
        return names[one]
    if isinstance(one, bool) or not isinstance(one, Integral):
        raise TypeError(f"`class_ids` must be ids or names of classes, got {one!r}.")
    if abs(int(one)) >= 2**63:  # which no tensor holds
        raise ValueError(f"`class_ids` must be -1 ... {config.num_classes - 1}, got an integer of over 64 bits.")
    return int(one)


def class_ids_of(classes: object, config: CausalImageModelingConfig) -> torch.Tensor:
    r"""
    Read what a user calls classes.

    Args:
        classes: An id or a name of `id2label`; a list, tuple or range of them; or an integer tensor or array.
        config ([`CausalImageModelingConfig`]): Of the model.

    Returns:
        `torch.LongTensor` of shape `(n,)`, on the device of a tensor that was given; ids are not checked.

    Raises:
        TypeError: If it is nothing of the kind.
        ValueError: If the model has no class of that name, or the shape is another one.
    """
    if isinstance(classes, str | Integral):
        classes = [classes]
    if isinstance(classes, list | tuple | range):
        classes = torch.tensor([_class_id(one, config) for one in classes], dtype=torch.long)
    if not isinstance(classes, torch.Tensor):
        if not hasattr(classes, "__array__"):
            kind = type(classes).__name__
            raise TypeError(f"`class_ids` must be ids or names of classes: one, a list or a tensor, got {kind}.")
        classes = torch.as_tensor(classes)
    if classes.is_floating_point() or classes.is_complex() or classes.dtype == torch.bool:
        raise TypeError(f"`class_ids` must be integers, got dtype {classes.dtype}.")
    if classes.ndim > 1:
        raise ValueError(f"`class_ids` must be one class or a list of them, got shape {tuple(classes.shape)}.")
    return classes.long().reshape(-1)


def _light_pixels(picture: Image.Image) -> np.ndarray:
    """Where a picture, turned upright, is at least half white."""
    if picture.mode in ("I", "F") or picture.mode.startswith("I;16"):
        raise ValueError(
            f"`known_mask`: what is white in a picture of mode {picture.mode} is not said; make it mode L."
        )
    grey = np.asarray(upright(picture).convert("L"))
    if 0 < (lightest := grey.max(initial=0)) < 128:
        raise ValueError(f"`known_mask`: the picture is nowhere white, its lightest pixel is {lightest} of 255.")
    return grey >= 128


def mask_of(mask: object) -> torch.Tensor:
    r"""
    Read what a user gives as a mask of what is known.

    Args:
        mask: A bool tensor or array, nested lists of bools, or a picture: True where it is at least half white.

    Raises:
        ValueError: If it is something else.
    """
    if isinstance(mask, Image.Image):
        mask = _light_pixels(mask)
    if isinstance(mask, np.ndarray | list):
        mask = np.array(mask)  # what torch can share: writable, in one piece
        mask = torch.from_numpy(mask) if mask.dtype == bool else mask
    if isinstance(mask, torch.Tensor) and mask.dtype == torch.bool:
        return mask
    numbers = " Of numbers: `mask > 0`." if isinstance(mask, torch.Tensor | np.ndarray) else ""
    raise ValueError(
        "`known_mask` must be True where a level is kept: a bool tensor or array, or a picture that is white there, "
        f"got {getattr(mask, 'dtype', type(mask).__name__)}.{numbers}"
    )


def class_ids_for(
    classes: object | None, batch_size: int, config: CausalImageModelingConfig, device: torch.device
) -> torch.Tensor | None:
    r"""
    The `class_ids` that the model needs for a batch of images, or `None`.

    Args:
        classes: As in [`class_ids_of`]; one class stands for all images.
        batch_size (`int`): Images.
        config ([`CausalImageModelingConfig`]): Of the model.
        device (`torch.device`): Where the ids go.

    Raises:
        TypeError, ValueError: If that is not what the model needs.
    """
    class_ids = None
    if classes is not None:
        class_ids = class_ids_of(classes, config).to(device)
        class_ids = class_ids.expand(batch_size) if len(class_ids) == 1 else class_ids
    check_class_ids(class_ids, batch_size, config)
    return class_ids


def check_asked_of_classes(class_ids: torch.Tensor | None, config: CausalImageModelingConfig, otherwise: str = ""):
    """Raise unless `class_ids` are there if `config` has classes, and None if it has none; `otherwise` needs none."""
    if config.num_classes == 0 and class_ids is not None:
        raise ValueError("`class_ids` were given, but the model is unconditional (`num_classes` is 0).")
    if config.num_classes > 0 and class_ids is None:
        no_class = "" if config.class_dropout == 0 else " Pass -1 for images without a class."
        raise ValueError(
            f"`class_ids` are needed: the model is conditional on {config.num_classes} classes.{no_class}{otherwise}"
        )


def check_class_ids(class_ids: torch.Tensor | None, batch_size: int, config: CausalImageModelingConfig):
    """Raise unless `class_ids` are what `config` needs: None, or `(batch,)` ids, -1 for no class."""
    check_asked_of_classes(class_ids, config)
    if class_ids is not None:
        least = _check_ids("class_ids", class_ids, batch_size, config, least=-1)
        if least == -1 and config.class_dropout == 0:
            warn_of_no_class()


def warn_of_no_class():
    """Say that what a model gives for images without a class is nothing that it has learnt."""
    logger.warning_once(
        "This model was trained without class dropout (`config.class_dropout` is 0), so it knows no images without a "
        "class, which -1 stands for and guidance compares with: `--class_dropout 0.1` of training/train.py helps."
    )


def check_class_labels(labels: torch.Tensor, batch_size: int, config: CausalImageModelingConfig):
    """Raise unless `labels` are the classes `(batch,)` of images, for a classifier."""
    _check_ids("labels", labels, batch_size, config, least=0)


def _check_ids(
    name: str, ids: torch.Tensor, batch_size: int, config: CausalImageModelingConfig, least: int
) -> int | None:
    """Raise unless `ids` are a tensor `(batch,)` of classes; returns the least of them where that can be told."""
    if not isinstance(ids, torch.Tensor) or ids.dtype not in (torch.int64, torch.int32):
        kind = ids.dtype if isinstance(ids, torch.Tensor) else type(ids).__name__
        raise TypeError(f"`{name}` must be a LongTensor, got {kind}.")
    if ids.shape != (batch_size,):
        raise ValueError(f"`{name}` must have shape ({batch_size},), one per image, got {tuple(ids.shape)}.")
    if not has_values(ids):
        return None
    low, high = torch.stack(ids.aminmax()).tolist()
    if low < least or high >= config.num_classes:
        none = "" if least == 0 else ", or -1 for no class"
        raise ValueError(f"`{name}` must be 0 ... {config.num_classes - 1}{none}, got values from {low} to {high}.")
    return low


__all__ = [
    "check_asked_of_classes",
    "check_class_ids",
    "check_class_labels",
    "check_count",
    "check_json_object",
    "check_levels",
    "check_memory",
    "check_processor",
    "class_ids_for",
    "class_ids_of",
    "computable",
    "drawing_network",
    "evaluation_mode",
    "fits_in_memory",
    "mask_of",
    "plain",
    "some_of",
    "warn_of_no_class",
]
