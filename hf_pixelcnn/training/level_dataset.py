r"""
Data sets of images (or of codes) as integer levels.

Images are decoded and turned into levels once, in batches, by the model's image processor; `datasets` caches the result
in a file, which is then read in place. Only what must change from epoch to epoch (stochastic binarisation, class
dropout, mutations) is done when an image is asked for, with numbers that depend only on the seed, the epoch and the
image: not on the order of images, the number of workers, or where a run was interrupted. A data set that is too large
to be stored can be streamed.
"""

import itertools
from collections.abc import Sequence
from typing import Any

import datasets
import numpy as np
import torch
from PIL import Image

from ..image_processing_causal_image import PixelCNNImageProcessor, binarize_stochastically
from ..version import __version__
from .data_sources import class_numbers, columns_of, find_class_column, find_image_column
from .errors import InputError
from .pictures import readable_picture

LEVELS = "levels"
SHUFFLE_BUFFER = 10_000  # images of a stream in memory, from which the next one is chosen


def check_seed(seed: int):
    """Raise unless numpy accepts the seed."""
    if not 0 <= seed < 2**32:
        raise InputError(f"--seed must be 0 ... {2**32 - 1}, got {seed}.")


def level_options(processor: PixelCNNImageProcessor | None) -> dict:
    """The options of an image processor that say which levels it makes; none for codes."""
    if processor is None:
        return {}
    known = processor.valid_kwargs.__annotations__
    return {name: value for name, value in processor.to_dict().items() if name in known and value is not None}


def _decoded(value: dict | None, place: str) -> Image.Image:
    """The image of a row, as it is stored; `place` says which row that is."""
    if value is None:
        raise InputError(f"{place} has no image.")
    file = f" ({value['path']})" if value.get("path") else ""
    with readable_picture(place + file):
        return datasets.Image().decode_example(value)  # pyright: ignore[reportArgumentType] - its own format


def _undecoded(rows, column: str, *others: str):
    """A column of images or codes, and others; images as they are stored, so that it can be said which are damaged."""
    rows = rows.select_columns([column, *others])
    is_image = isinstance(rows.features[column], datasets.Image)
    return rows.cast_column(column, datasets.Image(decode=False)) if is_image else rows


def first_image(rows: datasets.Dataset | datasets.IterableDataset, column: str) -> Image.Image:
    """The first image of a column; an [`InputError`] if it is missing or cannot be decoded."""
    return _decoded(next(iter(_undecoded(rows, column)))[column], f"row 0 of column {column!r}")


def _encode_images(
    batch: dict, indices: list[int], column: str, options: dict, shape: tuple, version: str
) -> dict[str, np.ndarray]:
    """A batch of stored images as rows of levels. `version` is part of the key under which the result is cached."""
    processor, places = PixelCNNImageProcessor(**options), [f"row {index} of column {column!r}" for index in indices]
    images = list(map(_decoded, batch[column], places))
    try:
        levels = processor(images, return_tensors="np")["pixel_values"]
    except (TypeError, ValueError):
        _check_each(processor, images, places, shape)  # says which one it is
        raise
    if levels.shape[1:] != shape:
        _check_each(processor, images, places, shape)
    return {LEVELS: levels.reshape(len(levels), -1).astype(np.uint8)}


def _check_each(processor: PixelCNNImageProcessor, images: list, places: list[str], shape: tuple):
    """Raise for the first of some images that cannot be made into levels of this shape."""
    for image, place in zip(images, places, strict=True):
        with readable_picture(place):
            found = processor(image, return_tensors="np")["pixel_values"].shape[1:]
        if found != shape:
            raise InputError(
                f"images have different sizes: {place} gives {found}, the first row {shape}. The image processor needs "
                "a `size` to bring them to (--image_size of train.py)."
            )


def _codes(grid: object, place: str) -> np.ndarray:
    """The codes of a row, a 2-D array of integers."""
    try:
        codes = np.asarray(grid)
    except ValueError:  # a ragged list
        codes = np.empty(0)
    if codes.ndim != 2 or codes.dtype.kind not in "iu" or not codes.size:
        raise InputError(f"{place} is no 2-D array of integers: it is missing, empty or ragged.")
    return codes


def _encode_codes(batch: dict, indices: list[int], column: str, num_levels: int, shape: tuple) -> dict[str, np.ndarray]:
    """A batch of 2-D arrays of integers as rows of levels."""
    grids = []
    for index, grid in zip(indices, batch[column], strict=True):
        place = f"row {index} of column {column!r}"
        codes = _codes(grid, place)
        if codes.shape != shape[1:]:
            raise InputError(f"arrays have different sizes: {place} is {codes.shape}, the first row {shape[1:]}.")
        if codes.min() < 0 or codes.max() >= num_levels:
            raise InputError(
                f"codes in column {column!r} must be 0 ... {num_levels - 1} (--num_levels is {num_levels}), "
                f"got values from {codes.min()} to {codes.max()} in row {index}."
            )
        grids.append(codes)
    levels = np.stack(grids)
    return {LEVELS: levels.reshape(len(levels), -1).astype(np.uint8 if num_levels <= 256 else np.int32)}


def _read_classes(rows: datasets.Dataset, column: str) -> np.ndarray:
    """A column of classes, int64; `None` is -1."""
    table: Any = rows.select_columns([column]).with_format("arrow")[:]
    return table.column(column).cast("int64").fill_null(-1).to_numpy().copy()


def _check_range(class_ids: np.ndarray, where: str, owner: str, num_classes: int):
    """Raise unless classes are -1 (none) or 0 ... `num_classes - 1`."""
    low, high = np.min(class_ids), np.max(class_ids)
    if low < -1 or high >= num_classes:
        raise InputError(
            f"{where} has classes from {low} to {high}; {owner} has 0 ... {num_classes - 1}, or -1 for none."
        )


class _Levels:
    r"""
    What data sets of levels have in common: how rows become levels, and levels become items.

    Args:
        rows (`datasets.Dataset` or `datasets.IterableDataset`): One split, see [`load_split`].
        num_levels (`int`): Levels of the model.
        processor ([`PixelCNNImageProcessor`], *optional*): Makes levels of images; not needed for codes.
        image_column (`str`, *optional*): The column to model, of images or of 2-D arrays of integers (codes); needed
            unless only one has images, or none has and only one has codes.
        class_column (`str`, *optional*): The column of classes, `ClassLabel` or integers; needed unless only one is a
            `ClassLabel`.
        with_classes (`bool`): Whether items have `class_ids`.
        id2label (`dict[int, str]`, *optional*): Names of the classes of the model, `config.id2label`. Where the data
            set has names too, `class_ids` are the model's for the same names; else they are the data set's numbers.
        class_dropout (`float`): Probability that an item shows class -1, "no class", instead of its own.
        mutation_rate (`float`): Probability that a dimension shows a level drawn uniformly instead of its own: the
            corrupted images of a background model (Ren et al. 2019, https://huggingface.co/papers/1906.02845, section
            3). `labels` keep the image's own levels. If the noise also had to be predicted, every dimension that is
            certain would cost -log(1 - rate) nats, and a likelihood ratio would measure how flat an image is.
        seed (`int`): Seed of class dropout, of mutations and, if the processor asks for it, of stochastic binarisation.
            All are drawn anew in each epoch, and depend only on seed, epoch and index.

    An item is a `dict` with `pixel_values`, `np.ndarray` `(channels, height, width)`, uint8 (int32 above 256 levels);
    with classes also `class_ids`, `int` (-1: no class, as for a row whose class is `None`), and with mutations also
    `labels`, the levels without them.

    Raises:
        InputError: If there is no column of the needed type, an image is missing, images differ in size, or the model
            has no class of a name that the data set has.
    """

    def __init__(
        self,
        rows: datasets.Dataset | datasets.IterableDataset,
        num_levels: int,
        processor: PixelCNNImageProcessor | None = None,
        image_column: str | None = None,
        class_column: str | None = None,
        with_classes: bool = False,
        id2label: dict[int, str] | None = None,
        class_dropout: float = 0.0,
        mutation_rate: float = 0.0,
        seed: int = 0,
    ):
        check_seed(seed)
        columns = columns_of(rows)
        self.column, is_codes = find_image_column(columns, image_column)
        self.class_column = find_class_column(columns, class_column) if with_classes else None
        self.id2label, self.class_numbers = id2label, None
        if self.class_column is not None:
            self.class_numbers = class_numbers(columns, self.class_column, id2label)
        self.is_stochastic = False
        if is_codes:
            grid = next(iter(rows.select_columns([self.column])))[self.column]
            self.shape = (1, *_codes(grid, f"row 0 of column {self.column!r}").shape)
            self.encode = _encode_codes
            settings = {"num_levels": num_levels}
            self.dtype = "uint8" if num_levels <= 256 else "int32"
        else:
            if processor is None:
                raise InputError(f"column {self.column!r} holds images, and the model has no image processor.")
            if processor.num_levels != num_levels:
                raise InputError(
                    f"the image processor makes {processor.num_levels} levels, but `num_levels` is {num_levels}."
                )
            options = level_options(processor)
            self.is_stochastic = options.get("binarization") == "stochastic"
            if self.is_stochastic:  # the cached file holds pixels
                options |= {"num_levels": 256}
                del options["binarization"]
            with readable_picture(f"row 0 of column {self.column!r}"):
                image = first_image(rows, self.column)
                self.shape = processor(image, return_tensors="np")["pixel_values"].shape[1:]
            self.encode = _encode_images
            settings = {"options": options, "version": __version__}
            self.dtype = "uint8"
        self.encode_settings = {"column": self.column, "shape": self.shape, **settings}
        self.num_levels, self.class_dropout, self.mutation_rate = num_levels, class_dropout, mutation_rate
        self.seed, self.epoch = seed, 0

    def encoded(self, rows, *others: str, **options):
        """Rows with a column of levels in place of the images or codes, and with other columns."""
        num_dims, rows = int(np.prod(self.shape)), _undecoded(rows, self.column, *others)
        features = {name: feature for name, feature in rows.features.items() if name != self.column}
        features[LEVELS] = datasets.List(datasets.Value(self.dtype), length=num_dims)
        return rows.map(
            self.encode,
            batched=True,
            with_indices=True,
            remove_columns=[self.column],
            features=datasets.Features(features),
            fn_kwargs=self.encode_settings,
            **options,
        )

    def model_classes(self, class_ids: np.ndarray) -> np.ndarray:
        """The model's ids for classes of the data set, int64 of the same shape; -1, no class, stays."""
        if self.class_numbers is None:
            return class_ids
        _check_range(class_ids, f"column {self.class_column!r}", "the data set", len(self.class_numbers))
        return np.append(self.class_numbers, -1)[class_ids]

    def random(self, index: int, use: int, size: int) -> np.ndarray:
        """Random numbers in [0, 1) for an item in this epoch, the same in every process; one stream for each `use`."""
        bits = np.random.Philox(key=self.seed, counter=[0, use, index, self.epoch])
        return np.random.Generator(bits).random(size)

    def item(self, index: int, levels: np.ndarray, class_id: int) -> dict:
        """The item that `levels` `(channels, height, width)` make in this epoch, with `class_id` if that counts."""
        if self.is_stochastic:
            levels = binarize_stochastically(levels, self.random(index, 0, levels.size)).astype(np.uint8)
        item: dict[str, np.ndarray | int] = {"pixel_values": levels}
        if self.mutation_rate:
            chance, level = self.random(index, 2, 2 * levels.size).reshape(2, *levels.shape)
            shown = np.where(chance < self.mutation_rate, (level * self.num_levels).astype(levels.dtype), levels)
            item = {"pixel_values": shown, "labels": levels}
        if self.class_column is not None:
            is_dropped = self.class_dropout and self.random(index, 1, 1)[0] < self.class_dropout
            item["class_ids"] = -1 if is_dropped else int(class_id)
        return item


class LevelDataset(_Levels, torch.utils.data.Dataset):
    r"""
    Levels of the images of one split, read in place from the file in which `datasets` caches them; see `_Levels`.

    With classes, `class_ids` (`np.ndarray` of shape `(num_images,)`, int64) are those of all images, -1 where there is
    none.
    """

    def __init__(self, rows: datasets.Dataset, *args, **kwargs):
        super().__init__(rows, *args, **kwargs)
        self.class_ids = None
        if self.class_column is not None:
            self.class_ids = self.model_classes(_read_classes(rows, self.class_column))
        levels = self.encoded(rows, desc="Levels")
        chunks = levels.data.column(LEVELS).chunks
        self.blocks = [chunk.flatten().to_numpy().reshape(-1, *self.shape) for chunk in chunks]
        self.ends = np.cumsum([len(block) for block in self.blocks])

    def set_epoch(self, epoch: int):
        """
        Choose the epoch whose stochastic binarisation, class dropout and mutations items show. Workers of a
        `DataLoader` that stay (`persistent_workers`) keep the one they began with.
        """
        self.epoch = epoch

    def __len__(self) -> int:
        return int(self.ends[-1])

    def __getitem__(self, index: int) -> dict:
        if not 0 <= index < len(self):
            raise IndexError(f"index {index} is not in 0 ... {len(self) - 1}.")
        block = int(np.searchsorted(self.ends, index, side="right"))
        levels = self.blocks[block][index - self.ends[block]]  # a negative index, counted from the block's end
        return self.item(index, levels, -1 if self.class_ids is None else self.class_ids[index])


def check_classes_of(images: LevelDataset, split: str, num_classes: int, least: int = -1):
    r"""
    Check that the model has the classes of all images.

    Args:
        images ([`LevelDataset`]): Images, read with classes.
        split (`str`): Where they are from, for messages.
        num_classes (`int`): Classes of the model.
        least (`int`): -1 allows images without a class, 0 does not.

    Raises:
        InputError: If it has not.
    """
    if images.class_ids is None:
        raise InputError(f"split {split!r} was read without classes.")
    where = f"column {images.class_column!r} of split {split!r}"
    _check_range(images.class_ids, where, "the model", num_classes)
    if least == 0 and (count := int((images.class_ids == -1).sum())):
        raise InputError(f"{where} has no class for {count} of {len(images)} images; a classifier needs one for each.")


class LevelStream(_Levels, torch.utils.data.IterableDataset):
    r"""
    Levels of the images of one split, encoded as they arrive; nothing is stored. See `_Levels`.

    It is endless: after the last image the first one comes again, in the next epoch. The order is that of the stream,
    shuffled in a buffer. The order and all that is drawn depend only on seed, epoch and place in the epoch, so that a
    resumed run can skip what it has seen.
    """

    def __init__(self, rows: datasets.IterableDataset, *args, **kwargs):
        super().__init__(rows, *args, **kwargs)
        others = () if self.class_column is None else (self.class_column,)
        self.rows = self.encoded(rows, *others).with_format("numpy")
        self.rows = self.rows.shuffle(seed=self.seed, buffer_size=SHUFFLE_BUFFER)

    def __iter__(self):
        for self.epoch in itertools.count():
            self.rows.set_epoch(self.epoch)
            for index, row in enumerate(self.rows):
                levels = row[LEVELS].reshape(self.shape).astype(self.dtype)
                yield self.item(index, levels, self.class_of(row))

    def class_of(self, row: dict) -> int:
        """The model's id for the class of a row; -1 for none, which is `None` or NaN here."""
        class_id = None if self.class_column is None else row[self.class_column]
        is_none = class_id is None or np.isnan(class_id)
        class_id = self.model_classes(np.array(-1 if is_none else class_id, dtype=np.int64))
        if self.id2label:
            _check_range(class_id, f"column {self.class_column!r}", "the model", len(self.id2label))
        return int(class_id)


def collate_levels(items: Sequence[dict]) -> dict[str, torch.Tensor]:
    r"""
    A batch for the model.

    Returns:
        `dict`: `pixel_values` `(batch, channels, height, width)`, uint8 or int32; `labels`, the levels to score, int64
        (in uint8 the ignored label -100 would be level 156), which are the image's own also where `pixel_values` are
        mutated; with classes also `class_ids`, int64 `(batch,)`.
    """
    pixel_values = torch.from_numpy(np.stack([item["pixel_values"] for item in items]))
    labels = torch.from_numpy(np.stack([item.get("labels", item["pixel_values"]) for item in items]))
    batch = {"pixel_values": pixel_values, "labels": labels.long()}
    if "class_ids" in items[0]:
        batch["class_ids"] = torch.tensor([item["class_ids"] for item in items])
    return batch


def collate_classes(items: Sequence[dict]) -> dict[str, torch.Tensor]:
    """A batch for a classifier: `pixel_values` as in [`collate_levels`], and `labels`, classes, int64 `(batch,)`."""
    batch = collate_levels(items)
    return {"pixel_values": batch["pixel_values"], "labels": batch["class_ids"]}
