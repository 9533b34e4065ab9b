"""
What the page does with models and pictures: draw, complete, score, look inside.

Forward passes of one small picture get one thread of torch: several wait for each other wherever the machine has other
work, which is where a page runs.
"""

import json
import math
import time
from collections.abc import Callable, Generator, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

import torch
from PIL import Image
from transformers import AutoModel, AutoModelForImageClassification
from transformers.models.auto.image_processing_auto import AutoImageProcessor  # the real class in every version

from ..compressed_stream import read_stream
from ..compression import compress
from ..likelihood_causal_image import bits_per_dim
from ..pictures_causal_image import animation, png_of
from ..preview_causal_image import LivePreview, rows_as_drawn
from ..receptive_field_causal_image import REGIONS, receptive_field, regions_of
from ..sampling_causal_image import num_threads

ANY = "any"
SECONDS_BETWEEN_PICTURES = 0.05
Shown = TypeVar("Shown")


@dataclass(frozen=True)
class ShownModel:
    r"""
    A published model on the page.

    Args:
        name (`str`): Of its folder.
        model, processor: A `...ForCausalImageModeling` in evaluation mode, and its image processor.
        classifier: The same weights as a `...ForImageClassification`; `None` of a model without classes.
        is_guided (`bool`): Whether it was trained with class dropout, which guidance needs.
        results (`dict`): Its score, and on what, as `training/train.py` wrote them; maybe nothing.
    """

    name: str
    model: Any  # its class is one of many, and torch hides what a module has
    processor: Any
    classifier: Any
    is_guided: bool
    results: dict

    @property
    def config(self):
        return self.model.config

    @property
    def class_names(self) -> list[str]:
        return [str(self.config.id2label[i]) for i in range(self.config.num_classes)]

    @property
    def num_dims(self) -> int:
        return self.config.num_channels * math.prod(self.config.image_size)

    def class_id(self, name: str) -> int | None:
        """The number of a class by its name; `None` for [`ANY`]."""
        if name == ANY or not self.config.num_classes:
            return None
        if name not in self.class_names:
            raise ValueError(f"This model has no class {name!r}.")
        return self.class_names.index(name)

    def levels_of(self, picture: Image.Image) -> torch.Tensor:
        """Levels `(1, channels, height, width)` of a picture that has the size of the model's images."""
        return self.processor(picture, return_tensors="pt")["pixel_values"]

    def picture_of(self, levels: torch.Tensor) -> Image.Image:
        """The picture of levels `(1, channels, height, width)`."""
        return self.processor.post_process(levels)[0]


def load_shown_model(folder: Path) -> ShownModel:
    """A model from a folder that `training/publish.py` wrote."""
    model = AutoModel.from_pretrained(folder).eval()
    classifier = AutoModelForImageClassification.from_pretrained(folder).eval() if model.config.num_classes else None
    scores = folder / "results.json"
    results = json.loads(scores.read_text(encoding="utf-8")) if scores.exists() else {}
    return ShownModel(
        folder.name,
        model,
        AutoImageProcessor.from_pretrained(folder),
        classifier,
        is_guided=classifier is not None and (model.config.class_dropout or 0) > 0,
        results=results,
    )


@dataclass(frozen=True)
class Drawing:
    r"""
    Images while they are drawn.

    Args:
        picture (`PIL.Image.Image`): All of them in one grid, grey where nothing is drawn yet.
        seconds (`float`): Since the start.
        animation (`bytes`, *optional*): At the end, a GIF of how they grew.
    """

    picture: Image.Image
    seconds: float
    animation: bytes | None = None


def seeded(seed: int) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def shown_while_drawn(
    rows: Iterator[tuple], on_row: Callable[[slice, int, torch.Tensor], None], show: Callable[[], Shown]
) -> Generator[Shown, None, Any]:
    r"""
    What there is to see while rows are drawn.

    Args:
        rows: What `rows_as_drawn` returned.
        on_row (callable): Called with what it yields, as a `streamer` is.
        show (callable): Called after the first row, and then at most 20 times a second.

    Yields:
        What `show` returned. Closing the iterator stops the drawing.

    Returns:
        What `generate` returned.
    """
    last_shown = -math.inf
    while True:
        try:
            row = next(rows)
        except StopIteration as end:
            return end.value
        on_row(*row)
        if time.perf_counter() - last_shown > SECONDS_BETWEEN_PICTURES:
            last_shown = time.perf_counter()
            yield show()


def classes_to_draw(shown: ShownModel, class_name: str, num_images: int) -> torch.Tensor | None:
    """Class of each image: the one that is named, or all in turn; `None` without classes."""
    if not shown.config.num_classes:
        return None
    class_id = shown.class_id(class_name)
    if class_id is None:
        return torch.arange(num_images) % shown.config.num_classes
    return torch.full((num_images,), class_id)


def draw(shown: ShownModel, class_name: str, num_images: int, seed: int, **settings: float) -> Iterator[Drawing]:
    r"""
    Draw images; `generate` with a generator of the same seed draws the same.

    Args:
        shown ([`ShownModel`]): The model.
        class_name (`str`): A class, or [`ANY`], which takes all in turn.
        num_images (`int`), seed (`int`): How many, from which noise.
        settings: Further settings of `generate`.

    Yields:
        [`Drawing`]: At most 20 a second, the first after the first row; closing the iterator stops the drawing.
    """
    frames: list[Image.Image] = []
    preview = LivePreview(shown.processor, num_images, shown.config.image_size, show=frames.append)
    request = {"num_images": num_images, "class_ids": classes_to_draw(shown, class_name, num_images), **settings}
    start = time.perf_counter()
    rows = rows_as_drawn(shown.model, generator=seeded(seed), **request)
    yield from shown_while_drawn(rows, preview, lambda: Drawing(frames[-1], time.perf_counter() - start))
    yield Drawing(frames[-1], time.perf_counter() - start, animation(frames))


@dataclass(frozen=True)
class Completions:
    r"""
    Completions of a picture while they are drawn.

    Args:
        pictures (`list[PIL.Image.Image]`): One each, grey where nothing is drawn yet; while there are candidates to
            choose from, the first of them.
        sample_sizes (`list[float]`): The effective sample size of those that were chosen among candidates.
        is_done (`bool`): Whether these are the last.
        seconds (`float`): Since the start.
    """

    pictures: list[Image.Image]
    sample_sizes: list[float]
    is_done: bool
    seconds: float


def with_kept_pixels(shown: ShownModel, levels: torch.Tensor, known: torch.Tensor) -> Image.Image:
    """The picture of levels `(1, channels, height, width)`, grey where it is not known."""
    picture = shown.picture_of(levels)
    grey = Image.new(picture.mode, picture.size, 128 if picture.mode == "L" else (128, 128, 128))
    return Image.composite(picture, grey, Image.fromarray(known.numpy().astype("uint8") * 255))


def is_exact(known: torch.Tensor) -> bool:
    """Whether all pixels that are known, `(height, width)`, come before all others in raster order."""
    known = known.flatten()
    return bool((known == known.cummin(0).values).all())


def complete(
    shown: ShownModel,
    levels: torch.Tensor,
    known: torch.Tensor,
    class_id: int | None,
    num_images: int,
    num_candidates: int,
    seed: int,
) -> Iterator[Completions]:
    r"""
    Draw what is missing in a picture, several times.

    Args:
        shown ([`ShownModel`]): The model.
        levels (`torch.LongTensor` of shape `(1, channels, height, width)`): The picture.
        known (`torch.BoolTensor` of shape `(height, width)`): Where it is kept.
        class_id (`int`, *optional*): Of a conditional model.
        num_images (`int`): Completions.
        num_candidates (`int`): Of each completion one of so many is chosen by the likelihood of what is kept after it.
        seed (`int`): Of the noise.

    Yields:
        [`Completions`]: Row by row, with several candidates one completion after the other. Closing the iterator stops
        the drawing.
    """
    start = time.perf_counter()
    request = {"pixel_values": levels, "known_mask": known, "class_ids": class_id, "generator": seeded(seed)}
    request |= {"num_resamples": num_candidates, "return_dict_in_generate": True}
    at_once = num_images if num_candidates == 1 else 1  # from one generator they are the same either way
    part = slice(0, at_once)
    drawn, seen = levels.repeat(num_images, 1, 1, 1), known.repeat(num_images, 1, 1)
    sample_sizes: list[float] = []

    def on_row(_: slice, row: int, row_levels: torch.Tensor):
        drawn[part, :, row] = row_levels[::num_candidates]
        seen[part, : row + 1] = True

    def show(is_done: bool = False) -> Completions:
        pictures = [with_kept_pixels(shown, *one) for one in zip(drawn[:, None], seen, strict=True)]
        return Completions(pictures, [*sample_sizes], is_done, time.perf_counter() - start)

    for first in range(0, num_images, at_once):
        part = slice(first, first + at_once)
        rows = rows_as_drawn(shown.model, num_images=at_once, **request)
        output = yield from shown_while_drawn(rows, on_row, show)
        drawn[part] = output.sequences
        if num_candidates > 1:
            sample_sizes += output.effective_sample_size.tolist()
        yield show(is_done=part.stop == num_images)


@num_threads(1)
@torch.no_grad()
def class_probabilities(shown: ShownModel, levels: torch.Tensor) -> torch.Tensor | None:
    """p(class | picture) by Bayes' rule, `(num_classes,)`; `None` without classes."""
    return None if shown.classifier is None else shown.classifier(levels).logits[0].softmax(-1)


def class_or_guess(shown: ShownModel, class_name: str, levels: torch.Tensor) -> int | None:
    """The class that is named, or for [`ANY`] the most probable one of the picture; `None` without classes."""
    class_id = shown.class_id(class_name)
    probabilities = class_probabilities(shown, levels) if class_id is None else None
    return class_id if probabilities is None else int(probabilities.argmax())


@dataclass(frozen=True)
class Score:
    r"""
    How likely a picture is.

    Args:
        class_id (`int`, *optional*): The class that it was scored with.
        nats (`float`): Of the picture.
        bits_per_dim (`float`): The same in bits per dimension.
        surprise (`torch.Tensor` of shape `(height, width)`): Nats per pixel.
        class_probabilities (`torch.Tensor` of shape `(num_classes,)`, *optional*): By Bayes' rule.
        png_bytes (`int`): Size of the picture as a PNG file.
        payload_bytes (`int`), stream_bytes (`int`): Of the compressed picture alone, and of the whole stream.
    """

    class_id: int | None
    nats: float
    bits_per_dim: float
    surprise: torch.Tensor
    class_probabilities: torch.Tensor | None
    png_bytes: int
    payload_bytes: int
    stream_bytes: int


@num_threads(1)
@torch.no_grad()
def score(shown: ShownModel, levels: torch.Tensor, class_name: str) -> Score:
    r"""
    Score a picture, and compress it and compare the way back.

    Raises:
        CompressedStreamError: If the way back gives other levels.
    """
    probabilities = class_probabilities(shown, levels)
    class_id = shown.class_id(class_name)
    if class_id is None and probabilities is not None:
        class_id = int(probabilities.argmax())
    class_ids = None if class_id is None else torch.tensor([class_id])
    surprise = -shown.model.log_prob(levels, class_ids=class_ids)[0].sum(0)
    nats = surprise.sum(dtype=torch.float64).item()
    stream = compress(shown.model, levels, class_ids, verify=True)
    picture = shown.picture_of(levels)
    smallest = picture.convert("1") if shown.config.num_levels == 2 and picture.mode == "L" else picture
    return Score(
        class_id,
        nats,
        bits_per_dim(nats, shown.num_dims),
        surprise,
        probabilities,
        len(png_of(smallest, optimize=True)),
        len(read_stream(stream, None).payload),
        len(stream),
    )


@dataclass(frozen=True)
class Look:
    r"""
    What the prediction of one dimension is, and what it can depend on.

    Args:
        regions (`torch.LongTensor` of shape `(height, width)`): Indices into `REGIONS`.
        counts (`dict`): Pixels of each region.
        probabilities (`torch.Tensor` of shape `(num_levels,)`): Of the levels of the dimension, given its past.
        level (`int`): Its true one.
    """

    regions: torch.Tensor
    counts: dict[str, int]
    probabilities: torch.Tensor
    level: int


@num_threads(1)
@torch.no_grad()
def look_inside(shown: ShownModel, levels: torch.Tensor, row: int, column: int, channel: int, class_name: str) -> Look:
    """What [`Look`] says about one dimension of a picture."""
    class_id = class_or_guess(shown, class_name, levels)
    class_ids = None if class_id is None else torch.tensor([class_id])
    log_prob = shown.model.level_log_prob(levels, row, column, channel, class_ids=class_ids)[0]
    regions = regions_of(receptive_field(shown.model, row, column, channel).any(0), row, column)
    counts = regions.flatten().bincount(minlength=len(REGIONS)).tolist()
    level = int(levels[0, channel, row, column])
    return Look(regions, dict(zip(REGIONS, counts, strict=True)), log_prob.exp(), level)
