r"""
Draw images from a model, or complete images of a data set, and save them as one picture.

    python training/sample.py --model runs/mnist_pixelcnn --num_images 64 --seed 0 --output samples.png
    python training/sample.py --model runs/mnist_pixelcnn --complete ylecun/mnist --split "test[:8]" --num_images 6
    python training/sample.py --model ... --complete ... --mask box --num_resamples 64
    python training/sample.py --model runs/mnist_pixelcnn --num_images 1000 --output digits/
    python training/sample.py --model model_cards/pixelcnn-pp-fashion-mnist --class_ids Sandal Bag --num_images 16
    python training/sample.py --model runs/codes --num_images 64 --output codes.npy

Several processes share the work, and draw the same images as one:

    accelerate launch --num_processes 2 training/sample.py --model runs/mnist_pixelcnn --num_images 64

A picture of completions has a row for each image: the image, what is given of it, and `--num_images` completions.
`--mask` says what is given: `upper` or `left`, half of the image; `upper:10` or `left:10`, ten rows or columns; `box`,
all but the middle, or `box:TOP,LEFT,HEIGHT,WIDTH`, all but that box; or a picture, whose light pixels are given. Where
something is given below or to the right of what is drawn, `--num_resamples` makes the completions fit it.

An `--output` that ends in `.gif` shows up to 64 new images growing row by row. A folder, `digits/`, new or empty, gets
a picture of each image: 00000.png and so on, with seed, number and class in the file. `.npy` holds the levels, integers
`(images, channels, height, width)`: what a model of codes draws, for the decoder of these codes.
"""

import os
from dataclasses import dataclass, field
from pathlib import Path
from typing import NamedTuple

from command_line import CommandLineParser, check_first, one_line_errors

if __name__ == "__main__":
    check_first(__file__, __doc__)  # before the imports that take seconds: a typo is answered at once

import numpy as np
import torch
from accelerate import PartialState
from accelerate.utils import gather
from PIL import Image

from hf_pixelcnn import LivePreview, animation
from hf_pixelcnn.canvas_causal_image import bytes_to_draw, draw_noise
from hf_pixelcnn.checks_causal_image import check_memory, mask_of
from hf_pixelcnn.configuration_causal_image import as_height_and_width
from hf_pixelcnn.pictures_causal_image import image_grid, images_of
from hf_pixelcnn.training import InputError, LevelDataset, collate_levels, load_model, load_split, save_picture
from hf_pixelcnn.training.data_sources import read_class_ids
from hf_pixelcnn.training.files import check_new_folder, folder_beside, written_beside
from hf_pixelcnn.training.pictures import check_picture_path, completion_grid, grid_of_classes, readable_picture
from hf_pixelcnn.training.saved_models import choose_device


@dataclass
class SamplingArguments:
    model: str = field(metadata={"help": "Folder or Hub id of a model with its image processor."})
    output: str | None = field(
        default=None,
        metadata={
            "help": "Picture to write (.png, or .gif as it grows); a folder/ for a picture of each image; or .npy for "
            "the levels. By default samples.png, or samples.npy of a model of codes."
        },
    )
    num_images: int = field(default=16, metadata={"help": "Images; with --complete, completions of each image."})
    seed: int = field(default=0, metadata={"help": "Seed of the noise; the same seed draws the same images."})
    class_ids: list[str] | None = field(
        default=None,
        metadata={
            "help": "Classes, by name or number, -1 for none: one of all images, or several in turn; by default all in "
            "turn, or those of given images."
        },
    )
    image_size: list[int] | None = field(
        default=None, metadata={"help": "One number, or height and width as in 24 32; by default the model's."}
    )
    batch_size: int = field(default=64, metadata={"help": "Images drawn at once; changes only the time."})
    columns: int | None = field(default=None, metadata={"help": "Images per row of the picture."})
    sampler: str = field(
        default="cached",
        metadata={"help": "How to draw, see `generate`.", "choices": ("cached", "fixed_point", "naive")},
    )
    temperature: float | None = field(default=None, metadata={"help": "Divides the log-probabilities."})
    top_k: int | None = field(default=None, metadata={"help": "Keep only the most probable levels; 0 keeps all."})
    top_p: float | None = field(default=None, metadata={"help": "Keep the smallest set with this probability."})
    min_p: float | None = field(
        default=None, metadata={"help": "Keep levels with at least this share of the highest probability."}
    )
    guidance_scale: float | None = field(
        default=None, metadata={"help": "How strongly images show their class; 1 is the model itself."}
    )
    device: str | None = field(default=None, metadata={"help": "cpu, cuda, ...; by default an accelerator if any."})
    complete: str | None = field(default=None, metadata={"help": "Data set whose images are completed."})
    split: str = field(default="test[:8]", metadata={"help": "Which of its images."})
    mask: str = field(default="upper", metadata={"help": "What is given: upper, left, box or a picture, see above."})
    num_resamples: int | None = field(
        default=None, metadata={"help": "Candidates for each completion, see `generate`."}
    )
    cache_dir: str | None = field(default=None, metadata={"help": "Where data sets are cached."})


def draw_share(model, num_images: int, generator: torch.Generator, **request) -> tuple[torch.Tensor, torch.Tensor]:
    r"""
    `generate`, shared by the processes of an `accelerate launch`: image i is the same however many there are.

    Args:
        model: The model.
        num_images (`int`): Images of all processes together.
        generator (`torch.Generator`): In the same state in each process.
        request: Further arguments of `generate`; tensors hold all images.

    Returns:
        In every process, all images, `torch.LongTensor` `(num_images, channels, height, width)`, and their effective
        sample sizes, `torch.FloatTensor` `(num_images,)`, 1 without `num_resamples`.
    """
    state = PartialState()
    size = -(-num_images // state.num_processes)
    share = slice(min(state.process_index * size, num_images), min((state.process_index + 1) * size, num_images))
    size_of_one = request["pixel_values"].shape[2:] if "pixel_values" in request else request["image_size"]
    height, width = as_height_and_width(size_of_one or model.config.image_size)
    levels = torch.zeros(size, model.config.num_channels, height, width, dtype=torch.long, device=model.device)
    sample_size = torch.ones(size, device=model.device)
    for _ in range(share.start):  # the noise of the images that other processes draw
        draw_noise(generator, 1, levels[0].numel(), model.device, request.get("num_resamples", 1))
    if share.start < share.stop:
        own = {key: value[share] if isinstance(value, torch.Tensor) else value for key, value in request.items()}
        count = share.stop - share.start
        output = model.generate(
            num_images=count,
            generator=generator,
            show_progress=state.is_main_process,
            return_dict_in_generate=True,
            **own,
        )
        levels[:count] = output.sequences
        if output.effective_sample_size is not None:
            sample_size[:count] = output.effective_sample_size.float()
    return gather(levels)[:num_images].cpu(), gather(sample_size)[:num_images].cpu()


def read_mask(word: str, height: int, width: int) -> torch.Tensor:
    """Where pixels are given, as `--mask` says for images of this size: `torch.BoolTensor` `(height, width)`."""
    name, _, numbers = word.partition(":")
    defaults = {"upper": [height // 2], "left": [width // 2], "box": [height // 4, width // 4, height // 2, width // 2]}
    if name not in defaults:
        return read_picture_of_mask(word, height, width)
    given = [int(number) if number.isdecimal() else -1 for number in numbers.split(",")] if numbers else defaults[name]
    box = {"upper": [0, 0, *given, width], "left": [0, 0, height, *given], "box": given}[name]
    if len(box) != 4 or min(box) < 0 or box[0] + box[2] > height or box[1] + box[3] > width:
        raise InputError(
            f"--mask must be upper:ROWS, left:COLUMNS or box:TOP,LEFT,HEIGHT,WIDTH inside {height}×{width} pixels, "
            f"got {word!r}."
        )
    top, left, rows, columns = box
    mask = torch.full((height, width), name == "box")
    mask[top : top + rows, left : left + columns] = name != "box"
    return mask


def read_picture_of_mask(path: str, height: int, width: int) -> torch.Tensor:
    """A mask as [`read_mask`] returns it, true where a picture is light."""
    with readable_picture(f"--mask must be upper, left, box or a picture, got {path!r}: it"):
        mask = mask_of(Image.open(path))
    if mask.shape != (height, width):
        raise InputError(f"--mask: {path} has {mask.shape[0]}×{mask.shape[1]} pixels, the images {height}×{width}.")
    return mask


class Given(NamedTuple):
    """Images to complete: their levels, where these are known `(height, width)`, and their classes, if needed."""

    levels: torch.Tensor
    known: torch.Tensor
    class_ids: torch.Tensor | None


def read_given(args: SamplingArguments, config, processor) -> Given:
    """The images of `--complete`."""
    with_classes = config.num_classes > 0 and args.class_ids is None  # the data set has them
    rows = load_split(args.complete, args.split, None, args.cache_dir)
    images = LevelDataset(rows, config.num_levels, processor, with_classes=with_classes, id2label=config.id2label)
    batch = collate_levels([images[index] for index in range(len(images))])
    levels = batch["labels"]
    return Given(levels, read_mask(args.mask, *levels.shape[2:]), batch.get("class_ids"))


def choose_classes(args: SamplingArguments, config, given: Given | None, total: int) -> torch.Tensor | None:
    """Class of each image to draw: `--class_ids`, or all, or those of the given images; `None` without classes."""
    if not config.num_classes:
        if args.class_ids is not None:
            raise InputError(f"--class_ids: {args.model} is not class-conditional.")
        return None
    completions = 1 if given is None else args.num_images  # of one class
    if args.class_ids is None and given is not None:
        return given.class_ids.repeat_interleave(completions)
    class_ids = torch.arange(config.num_classes) if args.class_ids is None else read_class_ids(args.class_ids, config)
    return class_ids[torch.arange(total) // completions % len(class_ids)]


def request_for(
    args: SamplingArguments, given: Given | None, class_ids: torch.Tensor | None, device: torch.device
) -> dict:
    """The arguments of `generate`, except the number of images and the noise."""
    request = {"sampler": args.sampler, "image_size": args.image_size, "max_batch_size": args.batch_size}
    for name in ("temperature", "top_k", "top_p", "min_p", "guidance_scale", "num_resamples"):
        if getattr(args, name) is not None:
            request[name] = getattr(args, name)
    if given is not None:
        request["pixel_values"] = given.levels.repeat_interleave(args.num_images, dim=0).to(device)
        request["known_mask"] = given.known.expand(len(request["pixel_values"]), 1, -1, -1)
    if class_ids is not None:
        request["class_ids"] = class_ids
    return request


def draw_picture(args: SamplingArguments, config, processor, given: Given | None, levels, class_ids) -> Image.Image:
    """All images drawn, as one picture: a row for each given image, or a column for each of up to 20 classes."""
    images = images_of(levels, processor, config.num_levels)
    if given is not None:
        return completion_grid(images_of(given.levels, processor, config.num_levels), given.known, images)
    columns = columns_of(args, config)
    if class_ids is None or args.columns or columns is None or columns > 20:
        return image_grid(images, columns)
    return grid_of_classes(images, [class_name(config, class_id) for class_id in class_ids[:columns].tolist()])


def class_name(config, class_id: int) -> str:
    """What a class is called in pictures and files."""
    return str(config.id2label.get(class_id, "none"))


def columns_of(args: SamplingArguments, config) -> int | None:
    """Images in a row: as asked for, or one of each class where they come in turn."""
    classes_in_turn = config.num_classes if args.class_ids is None else len(args.class_ids)
    return args.columns or (classes_in_turn if classes_in_turn > 1 else None)


def preview_of(args: SamplingArguments, config, processor, total: int) -> tuple[LivePreview, list[Image.Image]]:
    """What collects the frames of an animation, and where it puts them."""
    if args.complete or args.num_resamples or total > 64 or processor is None or PartialState().num_processes > 1:
        raise InputError(
            "--output: a .gif shows at most 64 new images, not completions, drawn by one process and a model with an "
            "image processor; give a name that ends in .png."
        )
    frames: list[Image.Image] = []
    size = args.image_size or config.image_size
    return LivePreview(processor, total, size, show=frames.append, columns=columns_of(args, config)), frames


def is_folder(output: str) -> bool:
    """Whether `--output` names a folder: it ends in a slash, or there is one of that name."""
    return output.endswith(("/", os.sep)) or Path(output).is_dir()


def check_arguments(args: SamplingArguments):
    """Raise if an argument has a value that cannot be used."""
    if args.image_size is not None and (len(args.image_size) > 2 or min(args.image_size) < 1):
        raise InputError(f"--image_size must be one or two positive integers, got {args.image_size}.")
    if args.output is not None and is_folder(args.output):
        check_new_folder(Path(args.output))
    elif args.output is not None and Path(args.output).suffix != ".npy":
        check_picture_path(args.output)


def settle_output(args: SamplingArguments, processor):
    """Give `--output` its default, and `--image_size` two numbers; raise if codes are to be a picture."""
    if args.output is None:
        args.output = "samples.npy" if processor is None else "samples.png"
    if processor is None and Path(args.output).suffix != ".npy":
        raise InputError(
            f"--output: {args.model} draws codes, which are no picture; give a name that ends in .npy, and decode them "
            "with the model that they are of."
        )
    if args.image_size is not None:
        args.image_size = [args.image_size[0], args.image_size[-1]]


def write_each(args: SamplingArguments, config, processor, levels: torch.Tensor, class_ids: torch.Tensor | None):
    """Write a picture of each image into the folder `--output`."""
    digits = max(5, len(str(len(levels) - 1)))
    with folder_beside(Path(args.output)) as folder:
        for index, image in enumerate(images_of(levels, processor, config.num_levels)):
            facts = {"seed": args.seed, "image": index, "model": args.model}
            if class_ids is not None:
                facts["class"] = class_name(config, int(class_ids[index]))
            save_picture(image, folder / f"{index:0{digits}d}.png", **facts)


@one_line_errors
def main(arguments: list[str] | None = None):
    (args,) = CommandLineParser(SamplingArguments).parse(arguments)
    check_arguments(args)
    model, processor = load_model(args.model)
    settle_output(args, processor)
    device = choose_device(args.device)
    PartialState(cpu=device.type == "cpu")
    config = model.to(device if device.type == "cpu" else PartialState().device).config

    given = read_given(args, config, processor) if args.complete else None
    total = args.num_images * (1 if given is None else len(given.levels))
    height, width = as_height_and_width(args.image_size or config.image_size)
    size = bytes_to_draw((total, config.num_channels, height, width), args.num_resamples or 1)
    check_memory(f"drawing {total} images of {height}×{width} pixels", size, model.device)
    class_ids = choose_classes(args, config, given, total)
    request = request_for(args, given, class_ids, model.device)
    frames = []
    if is_animated := Path(args.output).suffix.lower() == ".gif":
        request["streamer"], frames = preview_of(args, config, processor, total)
    try:
        levels, sample_size = draw_share(model, total, torch.Generator().manual_seed(args.seed), **request)
    except (ValueError, TypeError) as error:  # how `generate` refuses a request
        raise InputError(str(error)) from error
    is_main = PartialState().is_main_process
    PartialState().destroy_process_group()
    if not is_main:
        return
    if is_animated:
        with written_beside(args.output) as beside:
            beside.write_bytes(animation(frames))
    elif Path(args.output).suffix == ".npy":
        with written_beside(args.output) as beside:
            np.save(beside, levels.numpy().astype(np.uint8 if config.num_levels <= 256 else np.int32))
    elif is_folder(args.output):
        write_each(args, config, processor, levels, class_ids)
    else:
        picture = draw_picture(args, config, processor, given, levels, class_ids)
        save_picture(picture, args.output, seed=args.seed, model=args.model)
    if args.num_resamples is not None:
        print(
            f"effective sample size of {args.num_resamples} candidates: mean {sample_size.mean():.1f}, "
            f"least {sample_size.min():.1f}"
        )
    print(f"{total} images: {args.output}")


if __name__ == "__main__":
    main()
