"""Where rows come from: splits of data sets on the Hub or in folders, and which of their columns to model."""

import os
import re

import datasets
import numpy as np
import torch
from PIL import Image

from ..checks_causal_image import class_ids_of, some_of
from ..configuration_causal_image import CausalImageModelingConfig
from .errors import InputError

MOST_CLASSES = 100_000  # that numbers without names may stand for


def load_split(
    dataset: str, split: str, config_name: str | None = None, cache_dir: str | None = None, streaming: bool = False
) -> datasets.Dataset | datasets.IterableDataset:
    r"""
    Rows of a data set.

    Args:
        dataset (`str`): Id on the Hub, local folder, or folder written by `Dataset.save_to_disk`.
        split (`str`): Split or expression, e.g. `train`, `train[:50000]`, `train[50000:]`, `train+test`.
        config_name (`str`, *optional*): Configuration of a data set that has several.
        cache_dir (`str`, *optional*): Where `datasets` keeps its files, if not in the usual place.
        streaming (`bool`): Read the rows as they are used, instead of storing them. `split` is then a name or a range,
            as in `train[100:200]`.

    Raises:
        InputError: If the data set or the split does not exist, or the split is empty.
    """
    if streaming:
        return _load_stream(dataset, split, config_name)
    try:
        if any(os.path.isfile(os.path.join(dataset, name)) for name in ("dataset_dict.json", "state.json")):
            rows = _load_saved_split(dataset, split)
        else:
            rows = datasets.load_dataset(dataset, config_name, split=split, cache_dir=cache_dir)
    except Exception as error:  # a Hub client, a file format or a split expression may raise anything
        raise InputError(f"cannot load split {split!r} of data set {dataset!r}: {_why(error)}") from error
    if len(rows) == 0:
        raise InputError(f"split {split!r} of data set {dataset!r} is empty.")
    return rows


def _why(error: BaseException) -> str:
    """What an error says, and the error that it came from, which `datasets` does not repeat."""
    cause = error
    while cause.__cause__ is not None:
        cause = cause.__cause__
    return str(error) if cause is error else f"{error} {cause}"


def _load_stream(dataset: str, split: str, config_name: str | None) -> datasets.IterableDataset:
    match = re.fullmatch(r"(\w+)(?:\[(\d*):(\d*)\])?", split)
    if match is None:
        raise InputError(f"a stream has splits like train or train[100:200], got {split!r}.")
    first, end = int(match[2] or 0), int(match[3]) if match[3] else None
    try:
        rows = datasets.load_dataset(dataset, config_name, split=match[1], streaming=True)
        rows = rows if rows.features else rows._resolve_features()
        rows = rows.skip(first) if first else rows
        rows = rows if end is None else rows.take(max(end - first, 0))
        is_empty = next(iter(rows), None) is None
    except Exception as error:  # as above
        raise InputError(f"cannot stream split {split!r} of data set {dataset!r}: {_why(error)}") from error
    if is_empty:
        raise InputError(f"split {split!r} of data set {dataset!r} is empty.")
    return rows


def stored(rows: datasets.IterableDataset) -> datasets.Dataset:
    """All rows of a stream, in memory; images stay compressed."""
    return datasets.Dataset.from_list(list(rows.decode(False)), features=rows.features)


def _load_saved_split(folder: str, split: str) -> datasets.Dataset:
    saved = datasets.load_from_disk(folder)
    splits = saved if isinstance(saved, datasets.DatasetDict) else {str(saved.split or "train"): saved}
    parts = datasets.ReadInstruction.from_spec(split).to_absolute({name: len(rows) for name, rows in splits.items()})
    return datasets.concatenate_datasets([splits[part.splitname].select(range(part.from_, part.to)) for part in parts])


def _is_code_grid(feature) -> bool:
    """Whether a column holds 2-D arrays of integers."""
    if isinstance(feature, datasets.Array2D):
        return "int" in feature.dtype
    for _ in range(2):
        if isinstance(feature, datasets.LargeList | datasets.List):
            feature = feature.feature
        else:
            return False
    return isinstance(feature, datasets.Value) and "int" in feature.dtype


def find_image_column(features: datasets.Features, name: str | None = None) -> tuple[str, bool]:
    r"""
    The column to model, chosen by type: the only `Image` column, else the only one of 2-D arrays of integers.

    Args:
        features (`datasets.Features`): Columns of the data set.
        name (`str`, *optional*): The column to take, if there are several.

    Returns:
        `(str, bool)`: Its name, and whether it holds codes (integers that are levels already).

    Raises:
        InputError: If there is no such column, or several and none was named.
    """
    images = [key for key, feature in features.items() if isinstance(feature, datasets.Image)]
    codes = [key for key, feature in features.items() if _is_code_grid(feature)]
    if name is not None:
        if name not in images + codes:
            raise InputError(f"column {name!r} holds no images; columns are {dict(features)}.")
        return name, name in codes
    found = images or codes
    if len(found) != 1:
        what = f"several image columns, {found}: `image_column` must name one" if found else "no image column"
        raise InputError(f"the data set has {what}; columns are {dict(features)}.")
    return found[0], not images


def find_class_column(features: datasets.Features, name: str | None = None) -> str:
    r"""
    The column of classes: the only `ClassLabel` column, or the integer column called `name`.

    Raises:
        InputError: If there is no such column, or several and none was named.
    """
    if name is not None:
        feature = features.get(name)
        if isinstance(feature, datasets.ClassLabel) or (isinstance(feature, datasets.Value) and "int" in feature.dtype):
            return name
        raise InputError(f"column {name!r} holds no classes; columns are {dict(features)}.")
    found = [key for key, feature in features.items() if isinstance(feature, datasets.ClassLabel)]
    if len(found) != 1:
        what = f"several class columns, {found}: `class_column` must name one" if found else "no class column"
        raise InputError(f"a class-conditional model needs classes, but the data set has {what}.")
    return found[0]


def columns_of(rows: datasets.Dataset | datasets.IterableDataset) -> datasets.Features:
    """Names and types of columns; of a stream they must be known, as they are from [`load_split`]."""
    if rows.features is None:
        raise InputError("the stream does not say which columns it has.")
    return rows.features


def class_names(rows: datasets.Dataset | datasets.IterableDataset, column: str) -> list[str]:
    """Names of the classes of a column; the numbers themselves where it has no names."""
    feature = columns_of(rows)[column]
    if isinstance(feature, datasets.ClassLabel):
        return feature.names
    if isinstance(rows, datasets.IterableDataset):
        raise InputError(f"column {column!r} does not say how many classes there are, which a stream needs.")
    count = max((x for x in rows[column] if x is not None), default=-1) + 1
    if not 1 <= count <= MOST_CLASSES:
        found = f"their highest is {count - 1}" if count else "no row has one"
        raise InputError(f"classes in column {column!r} must be 0 ... {MOST_CLASSES - 1}, but {found}.")
    return [str(number) for number in range(count)]


def names_in(id2label: dict[int, str] | None) -> list[str] | None:
    """Names of the classes of a config, in the order of their ids; `None` if they are only `LABEL_0`, `LABEL_1`, ..."""
    if not id2label or all(name == f"LABEL_{class_id}" for class_id, name in id2label.items()):
        return None
    return [id2label[class_id] for class_id in sorted(id2label)]


def read_class_ids(words: list[str], config: CausalImageModelingConfig) -> torch.Tensor:
    r"""
    Classes that somebody typed, by name or, where no class has that name, by number.

    Args:
        words (`list[str]`): At least one.
        config ([`CausalImageModelingConfig`]): Of the model.

    Returns:
        `torch.LongTensor` of shape `(len(words),)`; numbers are not checked, so that -1 is no class.

    Raises:
        InputError: If the model has no class of a name.
    """
    classes = []
    try:
        for word in words:
            is_name = word in config.label2id or not word.removeprefix("-").isdecimal()
            classes.append(word if is_name else int(word))
        return class_ids_of(classes, config)
    except ValueError as error:
        raise InputError(str(error)) from error


def class_numbers(features: datasets.Features, column: str, id2label: dict[int, str] | None) -> np.ndarray | None:
    r"""
    Which class of a model each class of a data set is: the one of the same name.

    Args:
        features (`datasets.Features`): Columns of the data set.
        column (`str`): The column of classes.
        id2label (`dict[int, str]`, *optional*): Names of the classes of the model, from its config.

    Returns:
        `np.ndarray` of shape `(classes of the data set,)`, int64: ids of the model. `None` if the data set or the model
        has no names for its classes, whose numbers are then the same.

    Raises:
        InputError: If the model has no class of a name.
    """
    feature, known = features[column], names_in(id2label)
    if known is None or not isinstance(feature, datasets.ClassLabel):
        return None
    both = f"The model has {some_of(known, 20)}; the data set has {some_of(feature.names, 20)}."
    if missing := [name for name in feature.names if name not in known]:
        raise InputError(f"column {column!r} has classes that the model lacks: {some_of(missing, 20)}. {both}")
    return np.array([known.index(name) for name in feature.names], dtype=np.int64)


def num_channels_of(image: Image.Image) -> int:
    """1 for a grey or black-and-white image, with or without transparency; 3 for any other, palettes included."""
    return 1 if image.mode in ("1", "L", "LA", "La", "I", "F") or image.mode.startswith("I;16") else 3
