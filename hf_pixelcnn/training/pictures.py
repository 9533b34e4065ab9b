"""
Pictures: grids of images, heat maps, and curves of the loss.

Matplotlib, which takes seconds to import on a busy machine, is imported by the functions that need it.
"""

import contextlib
import io
import math
import textwrap
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import torch
from PIL import Image, ImageDraw, ImageFont
from PIL.PngImagePlugin import PngInfo

from ..likelihood_causal_image import bits_per_dim
from ..pictures_causal_image import image_grid, images_of
from .errors import InputError
from .files import written_beside


@contextlib.contextmanager
def readable_picture(name: str) -> Iterator[None]:
    """Turn what is raised when a picture is decoded, or made into levels, into an [`InputError`] about `name`."""
    try:
        yield
    except (OSError, SyntaxError, TypeError, ValueError, EOFError, Image.DecompressionBombError) as error:
        raise InputError(f"{name} cannot be used as an image: {error}") from error


@torch.no_grad()
def draw_samples(model, processor, num_images: int, seed: int, path: Path):
    """
    Draw a grid of `num_images` samples, with the seed in the file's text; of a conditional model, one row per class, as
    many as fit, with the names of the classes.
    """
    class_ids, columns, names = None, None, []
    if num_classes := model.config.num_classes:
        class_ids = torch.arange(min(num_classes, num_images))
        if num_images >= 2 * num_classes:  # else a row would be a single image, and the picture a narrow column
            columns = num_images // num_classes
            class_ids = class_ids.repeat_interleave(columns)
            names = [str(model.config.id2label[class_id]) for class_id in range(num_classes)]
    levels = model.generate(
        num_images=num_images if class_ids is None else len(class_ids),
        class_ids=class_ids,
        generator=torch.Generator().manual_seed(seed),
        show_progress=True,
    )
    grid = image_grid(images_of(levels, processor, model.config.num_levels), columns)
    save_picture(add_captions(grid, "", names) if names else grid, path, seed=seed)


def save_picture(picture: Image.Image, path: Path | str, **facts: str | int):
    """Write a picture; if its name ends in `.png`, with facts such as its seed in the text of the file."""
    text = PngInfo()
    for name, fact in facts.items():
        text.add_text(name, str(fact))
    options: dict[str, Any] = {"pnginfo": text} if Path(path).suffix.lower() == ".png" else {}
    with written_beside(path) as beside:
        picture.save(beside, **options)


def save_figure(figure, path: Path | str, dpi: int):
    """Write a figure of matplotlib as [`save_picture`] does."""
    file = io.BytesIO()
    figure.savefig(file, dpi=dpi)
    save_picture(Image.open(file).convert("RGB"), path)


def completion_grid(
    originals: Sequence[Image.Image], known: torch.Tensor, completions: Sequence[Image.Image]
) -> Image.Image:
    r"""
    A row for each image: the original, the given part of it (grey elsewhere), and its completions.

    Args:
        originals (sequence of `PIL.Image.Image`): n images.
        known (`torch.BoolTensor` of shape `(height, width)`): Where pixels were given.
        completions (sequence of `PIL.Image.Image`): The same number for each image, image by image.
    """
    each = len(completions) // len(originals)
    mask = Image.fromarray(known.numpy().astype("uint8") * 255)
    cells = []
    for index, original in enumerate(originals):
        grey = Image.new(original.mode, original.size, 128 if original.mode == "L" else (128, 128, 128))
        given = Image.composite(original, grey, mask)
        cells += [original, given, *completions[index * each : (index + 1) * each]]
    return image_grid(cells, each + 2)


def add_captions(grid: Image.Image, title: str, rows: Sequence[str] = (), columns: Sequence[str] = ()) -> Image.Image:
    r"""
    A grid of images with a white margin that says what they are.

    Args:
        grid (`PIL.Image.Image`): What [`image_grid`] returned.
        title (`str`): Text above all; long ones take several lines.
        rows (sequence of `str`, *optional*): One word for each row of the grid, on its left.
        columns (sequence of `str`, *optional*): One word for each column, above it; equal neighbours are said once.

    Returns:
        `PIL.Image.Image`: Of the same mode, wider and higher.
    """
    font, line = ImageFont.load_default(15), 20
    left = 12 + math.ceil(max(map(font.getlength, rows), default=0))
    letters = max(1, int(grid.width / font.getlength("n")))
    titles = textwrap.wrap(title, letters)
    top = 8 + line * (len(titles) + bool(columns))
    picture = Image.new(grid.mode, (left + grid.width + 12, top + grid.height + 12), "white")
    picture.paste(grid, (left, top))
    draw = ImageDraw.Draw(picture)
    for index, text in enumerate(titles):
        draw.text((left, 4 + line * index), text, "black", font)
    for index, text in enumerate(rows):
        draw.text((left - 6, top + (index + 0.5) * grid.height / len(rows)), text, "black", font, anchor="rm")
    for index, text in enumerate(columns):
        if index == 0 or text != columns[index - 1]:
            draw.text((left + index * grid.width / len(columns), top - line), text, "black", font)
    return picture


def grid_of_classes(images: Sequence[Image.Image], names: Sequence[str]) -> Image.Image:
    r"""
    Images of several classes in turn, a column for each, with its name above.

    Args:
        images (sequence of `PIL.Image.Image`): One of each class, then another of each, and so on.
        names (sequence of `str`): Of the classes; as many as there are images at most.
    """
    longest = max(map(ImageFont.load_default(15).getlength, names))
    grid = image_grid(images, len(names), least_width=max(480, math.ceil(len(names) * (longest + 8))))
    return add_captions(grid, "", columns=names)


def mixed_choice(nats: torch.Tensor, count: int) -> list[int]:
    r"""
    Indices of images from the least to the most surprising one, at even distances in that order.

    Args:
        nats (`torch.Tensor` of shape `(num_images,)`): Negative log-likelihood of each image.
        count (`int`): How many; all if there are fewer.
    """
    order, count = nats.argsort(stable=True), min(count, len(nats))
    return order[torch.linspace(0, len(nats) - 1, count).round().long()].tolist()


def draw_heat_maps(images: Sequence[Image.Image], nats: torch.Tensor, num_channels: int, path: str | Path):
    r"""
    Draw images, and beside each one how surprising its pixels are, with its bits per dimension.

    Args:
        images (sequence of `PIL.Image.Image`): n images.
        nats (`torch.Tensor` of shape `(n, height, width)`): Negative log-likelihood of every pixel.
        num_channels (`int`): Dimensions of a pixel.
        path (`str`): Where to write the picture.
    """
    from matplotlib.figure import Figure

    pairs = min(4, len(images))  # per row
    rows = math.ceil(len(images) / pairs)
    figure = Figure(figsize=(max(2.6 * pairs + 1, 4), 1.6 * rows + 0.2), layout="constrained")
    axes = figure.subplots(rows, 2 * pairs, squeeze=False)
    for axis in axes.flat:
        axis.set_axis_off()
    for index, (image, surprise) in enumerate(zip(images, nats, strict=True)):
        left, right = axes[index // pairs, 2 * (index % pairs) :][:2]
        left.imshow(image, cmap="gray", vmin=0, vmax=255)
        shown = right.imshow(surprise.numpy(), cmap="inferno", vmin=0, vmax=nats.max().item())
        bits = bits_per_dim(surprise.double().mean().item(), num_channels)
        right.set_title(f"{bits:.3f} bits/dim", fontsize=8)
    figure.colorbar(shown, ax=axes, label="nats per pixel", fraction=0.03)
    save_figure(figure, path, dpi=150)


def check_picture_path(path: str):
    """Raise unless a grey or colour picture can be written to `path`; folders that it lacks are made then."""
    if Path(path).is_dir():
        raise InputError(f"cannot write {path}: there is a folder of that name.")
    ending = Path(path).suffix.lower()
    try:
        for mode in ("L", "RGB"):
            Image.new(mode, (8, 8)).save(io.BytesIO(), Image.registered_extensions()[ending])
    except (OSError, ValueError, KeyError) as error:  # some formats can only be read, some lack grey or colour
        raise InputError(f"cannot write {path}: pictures are not written as {ending!r}; use .png.") from error


def even_windows(log_history: Sequence[dict], count: int = 100) -> list[tuple[float, float]]:
    r"""
    The training loss in at most `count` windows of about as many steps, as points `(epoch at the end, mean loss)`.

    A log holds means over unequal numbers of steps: the last row of an epoch has those that are left, and may be noise.
    """
    rows = [row for row in log_history if "loss" in row]
    if not rows:
        return []
    lengths = [row["step"] - before for before, row in zip([0, *(row["step"] for row in rows)], rows, strict=False)]
    width = max(math.ceil(sum(lengths) / count), *lengths)
    points, steps, total = [], 0, 0.0
    for row, length in zip(rows, lengths, strict=True):
        steps, total = steps + length, total + length * row["loss"]
        if steps >= width:
            points.append((row["epoch"], total / steps))
            steps, total = 0, 0.0
    return points


def draw_loss_curve(log_history: Sequence[dict], path: str | Path, title: str | None = None):
    r"""
    Draw the training loss and the evaluation loss, in bits per dimension, over epochs.

    Args:
        log_history (sequence of `dict`): `trainer.state.log_history`, whose losses are in nats per dimension.
        path (`str`): Where to write the picture.
        title (`str`, *optional*): Text above it.
    """
    from matplotlib.figure import Figure

    train = [(epoch, bits_per_dim(loss, 1)) for epoch, loss in even_windows(log_history)]
    evaluation = [(row["epoch"], bits_per_dim(row["eval_loss"], 1)) for row in log_history if "eval_loss" in row]
    figure = Figure(figsize=(7, 4), layout="constrained")
    axes = figure.subplots()
    if train:
        axes.plot(*zip(*train, strict=True), linewidth=1, label="training")
    if evaluation:
        axes.plot(*zip(*evaluation, strict=True), "o-", label="evaluation")
    last = max((epoch for epoch, _ in [*train, *evaluation]), default=0)
    settled = [loss for epoch, loss in [*train, *evaluation] if epoch >= 0.1 * last]
    if settled:  # the first steps are far above the rest and would flatten it
        margin = 0.05 * (max(settled) - min(settled)) or 0.05
        axes.set_ylim(min(settled) - margin, max(settled) + margin)
        axes.legend()
    axes.set(xlabel="epoch", ylabel="bits per dimension", title=title)
    axes.grid(alpha=0.3)
    save_figure(figure, path, dpi=120)


def draw_regions(panels: dict[str, torch.Tensor], colours: dict[str, str], path: str):
    r"""
    Draw maps of labelled pixels side by side, with a legend.

    Args:
        panels (`dict`): Title and map of each, `torch.LongTensor` `(height, width)` of indices into `colours`.
        colours (`dict`): Name and colour of each label.
        path (`str`): Where to write the picture.
    """
    from matplotlib.colors import ListedColormap
    from matplotlib.figure import Figure
    from matplotlib.patches import Patch

    most_rows, most_columns = (max(panel.shape[i] for panel in panels.values()) for i in (0, 1))
    width = 4.2
    size = (width * len(panels), width * most_rows / most_columns + 0.9)
    figure = Figure(figsize=size, layout="constrained")
    for axes, (title, panel) in zip(figure.subplots(1, len(panels), squeeze=False)[0], panels.items(), strict=True):
        axes.pcolormesh(
            panel.flip(0),
            cmap=ListedColormap(list(colours.values())),
            vmin=-0.5,
            vmax=len(colours) - 0.5,
            edgecolors="#8a93a0",
            linewidth=0.4,
        )
        axes.set(title=title, aspect="equal", xticks=[], yticks=[])
    boxes = [Patch(facecolor=colour, edgecolor="#8a93a0", label=name) for name, colour in colours.items()]
    figure.legend(handles=boxes, loc="outside lower center", ncols=len(boxes), frameon=False)
    save_figure(figure, path, dpi=100)
