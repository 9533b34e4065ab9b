r"""
Compress images without loss to the size that a model's likelihood promises, and measure what that is worth.

    python training/compress.py compress --model runs/mnist --input digits/ --output digits.pxc --verify true
    python training/compress.py decompress --model runs/mnist --input digits.pxc --output restored/
    python training/compress.py verify --model runs/mnist --input digits.pxc
    python training/compress.py measure --model runs/mnist --dataset ylecun/mnist --split test --output codec.json

`--input` of `compress` is an image file or a folder of images of one size, which go into one stream; `decompress`
writes them as PNG files under their old names. What is restored exactly are the model's levels: a model of 256 levels
keeps every pixel, a model of fewer levels only what its image processor makes of them (the script says so). Photos are
turned upright, as their EXIF orientation says; what a stream cannot hold, as further pages or subfolders, is refused.
Files and folders appear under their names when they are complete.

`measure` compresses a split of a data set batch by batch and decompresses it again. It compares the size with the
model's own bits per dimension, and the time with that of sampling as many images. Classes of the data set are matched
with those of the model by their names; a name that the model lacks is an error.
"""

import math
import time
import zlib
from collections import Counter
from collections.abc import Callable
from pathlib import Path, PurePath

from command_line import one_line_errors
from compress_arguments import (
    CompressArguments,
    DecompressArguments,
    MeasureArguments,
    VerifyArguments,
    read_arguments,
)

if __name__ == "__main__":
    one_line_errors(read_arguments)(__doc__)  # before the imports that take seconds: a typo is answered at once

import numpy as np
import torch
from PIL import Image
from tqdm.auto import tqdm

from hf_pixelcnn import PixelCNNImageProcessor, bits_per_dim, compress, decompress
from hf_pixelcnn.compressed_stream import read_stream
from hf_pixelcnn.compression import batches
from hf_pixelcnn.pictures_causal_image import upright
from hf_pixelcnn.training import (
    InputError,
    LevelDataset,
    collate_levels,
    load_model,
    load_split,
    nats_per_image,
    run_facts,
)
from hf_pixelcnn.training.data_sources import read_class_ids
from hf_pixelcnn.training.files import check_new_folder, folder_beside, write_json, written_beside
from hf_pixelcnn.training.pictures import readable_picture
from hf_pixelcnn.training.saved_models import choose_device

MAX_NAME_BYTES = 250  # file systems allow 255, with the new suffix


def load_with_processor(args) -> tuple:
    """The model, on its device, and its image processor."""
    model, processor = load_model(args.model)
    if processor is None:
        raise InputError(f"{args.model} has no image processor, so it says nothing about image files.")
    return model.to(choose_device(args.device)), processor


def read_bytes(path: str) -> bytes:
    try:
        return Path(path).read_bytes()
    except OSError as error:
        raise InputError(f"cannot read {path}: {error.strerror}.") from error


def image_files(path: Path) -> list[Path]:
    r"""
    The image file `path`, or those in the folder `path`, in the order of their names; hidden ones do not count.

    Raises:
        InputError: If there are none, or also some in subfolders, whose names a stream does not hold.
    """
    if not path.is_dir():
        return [path]
    suffixes = Image.registered_extensions()
    files = []
    for file in sorted(path.rglob("*")):
        inner = file.relative_to(path)
        if file.suffix.lower() not in suffixes or file.is_dir() or any(part[0] == "." for part in inner.parts):
            continue
        if len(inner.parts) > 1:
            raise InputError(
                f"{file} lies in a subfolder, and a stream holds the files of one folder: compress {file.parent} on "
                "its own, or move it elsewhere."
            )
        files.append(file)
    if not files:
        raise InputError(f"there is no image in {path}.")
    return files


def read_image(file: Path, processor: PixelCNNImageProcessor) -> tuple[torch.Tensor, bool]:
    r"""
    Levels `(1, channels, height, width)` of an image file, uint8, and whether they keep all its pixels.

    Raises:
        InputError: If it cannot be read, or has several pages.
    """
    with readable_picture(str(file)), Image.open(file) as image:
        if (count := getattr(image, "n_frames", 1)) > 1:
            raise InputError(
                f"{file} has {count} pages or frames, and a stream would keep one: save each as a file of its own."
            )
        levels = processor(image, return_tensors="pt")["pixel_values"].byte()
        original, is_opaque = np.asarray(upright(image)), not image.has_transparency_data
    restored = np.asarray(processor.post_process(levels)[0])
    return levels, is_opaque and restored.shape == original.shape and np.array_equal(restored, original)


def read_images(path: Path, processor: PixelCNNImageProcessor) -> tuple[list[str], torch.Tensor, int]:
    r"""
    Images of a file or folder.

    Returns:
        The names of the files, levels `(images, channels, height, width)` in uint8, and the number of images whose
        pixels the levels do not keep.

    Raises:
        InputError: If there is no image, or one cannot be read, has another size, or cannot come back by its name.
    """
    files = image_files(path)
    names = [file.name for file in files]
    restored_names(names)
    levels, changed = [], 0
    for file in tqdm(files, desc="Reading", unit="image", disable=len(files) < 100):
        own_levels, is_kept = read_image(file, processor)
        levels.append(own_levels)
        changed += not is_kept
        if levels[-1].shape != levels[0].shape:
            sizes = [f"{x.shape[3]}×{x.shape[2]}" for x in (levels[0], levels[-1])]
            raise InputError(
                f"{files[0].name} gives {sizes[0]} pixels and {file.name} {sizes[1]}: images of a stream have one "
                "size; compress each size on its own."
            )
    return names, torch.cat(levels), changed


def check_names(names: list[str]):
    """Raise unless these are bare file names on every system: the writer of the stream chose them."""
    for name in names:
        is_bare = name and name[0] != "." and name.isprintable() and not set(name) & set("/\\:")
        if not is_bare or len(name.encode()) > MAX_NAME_BYTES:
            raise InputError(f"{name[:80]!r} cannot be the name of a file in a stream.")


def restored_names(names: list[str]) -> list[str]:
    r"""
    The names under which files come back: with the ending .png, after the old one where names differ in it alone.

    Raises:
        InputError: If two would have the same name.
    """
    stems = [PurePath(name).stem for name in names]
    uses = Counter(stems)
    restored = [f"{stem if uses[stem] == 1 else name}.png" for stem, name in zip(stems, names, strict=True)]
    for name, count in Counter(restored).items():
        if count > 1:
            same = [old for old, new in zip(names, restored, strict=True) if new == name]
            raise InputError(f"{same[0]} and {same[1]} would both come back as {name}: rename one of them.")
    return restored


def pack_names(names: list[str]) -> bytes:
    """The comment of a stream: the names of its files."""
    check_names(names)
    return zlib.compress("\n".join(names).encode())


def unpack_names(comment: bytes, count: int) -> list[str]:
    r"""
    The names of the files in a stream, as names of PNG files; numbers for a stream that carries none.

    Raises:
        InputError: If there are too few or too many, two are the same, or one could lead out of a folder.
    """
    if not comment:
        return [f"{index:05d}.png" for index in range(count)]
    try:
        text = zlib.decompressobj().decompress(comment, max_length=(MAX_NAME_BYTES + 1) * count)  # not more than fits
        names = text.decode().split("\n")
    except (zlib.error, UnicodeDecodeError) as error:
        raise InputError(f"the names of the files in the stream cannot be read: {error}.") from error
    check_names(names)
    if len(names) != count:
        raise InputError(f"the stream has {count} images, but {len(names)} names.")
    return restored_names(names)


def check_output(source: Path, output: Path):
    """Raise unless `output` can be a new file, or replace one, without harm to `source`, a file or a folder."""
    if not output.parent.is_dir():
        raise InputError(f"cannot write {output}: its folder does not exist.")
    if output.exists() and not output.is_file():
        raise InputError(f"cannot write {output}: there is something else of that name; --output must be a file.")
    target = output.resolve()
    if target == source.resolve() or (output.exists() and source.exists() and output.samefile(source)):
        raise InputError(f"--output is --input, {source}, which would be overwritten: choose another name.")
    if source.is_dir() and source.resolve() in target.parents:
        raise InputError(f"--output {output} lies inside --input {source}: choose another folder.")


def compress_files(args: CompressArguments):
    """Compress an image file, or a folder of them, to one stream."""
    source, output = Path(args.input), Path(args.output)
    check_output(source, output)
    if not source.exists():
        raise InputError(f"there is no file or folder {source}.")
    model, processor = load_with_processor(args)
    names, levels, changed = read_images(source, processor)
    comment = pack_names(names)
    class_ids = -1 if model.config.num_classes else None
    if args.class_ids is not None:
        class_ids = read_class_ids(args.class_ids, model.config)
    try:
        data = compress(model, levels, class_ids, comment=comment, verify=args.verify, show_progress=True)
    except (ValueError, TypeError, ImportError) as error:
        raise InputError(str(error)) from error
    with written_beside(output) as beside:
        beside.write_bytes(data)
    payload = len(read_stream(data).payload)
    print(
        f"{len(names)} images of {levels[0].numel()} dimensions: {output}, {len(data)} bytes, of these {payload} bytes "
        f"or {8 * payload / levels.numel():.4f} bits/dim of pixels"
    )
    if changed:
        print(
            f"note: {changed} of {len(names)} images have pixels that the model's {model.config.num_levels} levels do "
            "not keep; decompressing gives the images of the levels"
        )


def open_stream(args) -> tuple:
    """Names and levels of the images in the file `args.input`, and the image processor."""
    data = read_bytes(args.input)
    try:
        comment = read_stream(data).comment
        model, processor = load_with_processor(args)
        levels = decompress(model, data, max_dims=args.max_dims, show_progress=True)
        names = unpack_names(comment, len(levels))
    except (ValueError, ImportError) as error:
        raise InputError(f"{args.input}: {error}") from error
    return names, levels, processor


def decompress_file(args: DecompressArguments):
    """Write the images of a stream as PNG files."""
    output = Path(args.output)
    is_file = output.suffix.lower() in Image.registered_extensions()
    if is_file and output.suffix.lower() != ".png":
        raise InputError(f"cannot write {output}: only PNG keeps every pixel and every number of channels.")
    if is_file:
        check_output(Path(args.input), output)
    elif not output.resolve().parent.is_dir():
        raise InputError(f"cannot write {output}: --output must be a folder to make inside one that exists.")
    else:
        check_new_folder(output)
    names, levels, processor = open_stream(args)
    if is_file and len(names) != 1:
        raise InputError(f"{args.input} has {len(names)} images: --output must be a folder.")
    images = processor.post_process(levels.cpu())
    if is_file:
        with written_beside(output) as beside:
            images[0].save(beside)
    else:
        write_folder(output, names, images)
    print(f"{len(names)} images: {output}")


def write_folder(folder: Path, names: list[str], images: list[Image.Image]):
    """Write images under their names into a new or empty folder."""
    with folder_beside(folder) as beside:
        for name, image in zip(names, images, strict=True):
            if (beside / name).exists():
                raise InputError(f"{name} differs from another name only in case, which this file system ignores.")
            image.save(beside / name)


def verify_file(args: VerifyArguments):
    """Decompress a stream, and say whether it is sound."""
    names, levels, _ = open_stream(args)
    print(f"{args.input} is sound: {len(names)} images of {levels[0].numel()} dimensions")


def adaptive_bits(class_ids: torch.Tensor, num_classes: int) -> float:
    """Bits of class ids, each coded by the counts of those before, plus 1: log2((n + k - 1)! / ((k - 1)! Π n_c!))."""
    counts = (class_ids + 1).bincount(minlength=num_classes + 1)
    nats = math.lgamma(len(class_ids) + num_classes + 1) - math.lgamma(num_classes + 1)
    return (nats - torch.lgamma(counts + 1.0).sum().item()) / math.log(2)


class Stopwatch:
    """Seconds of calls, by name."""

    def __init__(self):
        self.seconds = {}

    def time(self, name: str, call: Callable, *args, **kwargs):
        """Call `call` and return what it returns."""
        start = time.perf_counter()
        result = call(*args, **kwargs)
        self.seconds[name] = time.perf_counter() - start
        return result


@torch.no_grad()
def nats_of(model, pixel_values: torch.Tensor, class_ids: torch.Tensor | None) -> float:
    """Negative log-likelihood of all images, in the batches that they are compressed in."""
    nats = 0.0
    _, parts = batches(len(pixel_values), pixel_values.shape[3])
    for part in parts:
        given = None if class_ids is None else class_ids[part].to(model.device)
        nats += nats_per_image(model, pixel_values[part].to(model.device), given).sum().item()
    return nats


def measure_levels(model, pixel_values: torch.Tensor, class_ids: torch.Tensor | None) -> dict:
    """Size and time of the codec for images, beside the model's likelihood and the time of sampling as many."""
    watch = Stopwatch()
    try:
        data = watch.time("compress", compress, model, pixel_values, class_ids, show_progress=True)
        restored = watch.time("decompress", decompress, model, data, max_dims=None, show_progress=True)
    except (ValueError, ImportError) as error:
        raise InputError(str(error)) from error
    nats = nats_of(model, pixel_values, class_ids)
    size, _ = batches(len(pixel_values), pixel_values.shape[3])
    watch.time(
        "sample",
        model.generate,
        num_images=len(pixel_values),
        class_ids=class_ids,
        image_size=tuple(pixel_values.shape[2:]),
        max_batch_size=size,
        show_progress=True,
    )
    num_dims, payload, seconds = pixel_values.numel(), len(read_stream(data).payload), watch.seconds
    class_bits = 0.0 if class_ids is None else adaptive_bits(class_ids, model.config.num_classes)
    return {
        "restored_exactly": bool((restored.cpu() == pixel_values).all()),
        "num_images": len(pixel_values),
        "num_dims": num_dims,
        "model_bits_per_dim": bits_per_dim(nats, num_dims),
        "payload_bits_per_dim": 8 * payload / num_dims,
        "overhead": 8 * payload / (nats / math.log(2) + class_bits),
        "class_bits_per_dim": class_bits / num_dims,
        "stream_bytes": len(data),
        "header_bytes": len(data) - payload,
        "batch_size": size,
        "seconds": seconds,
        "compress_over_sample": seconds["compress"] / seconds["sample"],
        "decompress_over_sample": seconds["decompress"] / seconds["sample"],
    }


def measure(args: MeasureArguments):
    """Compare the compressed size of a data set with its likelihood, and the time with that of sampling."""
    model, processor = load_model(args.model)
    model.to(choose_device(args.device)).eval()
    images = LevelDataset(
        load_split(args.dataset, args.split, args.dataset_config, args.cache_dir),
        num_levels=model.config.num_levels,
        processor=processor,
        with_classes=model.config.num_classes > 0,
        id2label=model.config.id2label,
    )
    batch = collate_levels([images[index] for index in range(len(images))])
    results = measure_levels(model, batch["pixel_values"], batch.get("class_ids"))
    seconds = results["seconds"]
    print(
        f"{args.split}: {results['payload_bits_per_dim']:.5f} bits/dim for {results['model_bits_per_dim']:.5f} by the "
        f"model and {results['class_bits_per_dim']:.5f} of classes, ratio {results['overhead']:.5f}; "
        f"{results['stream_bytes']} bytes, {results['header_bytes']} of them header\n"
        f"{len(images)} images in batches of {results['batch_size']}: compressing {seconds['compress']:.1f} s, "
        f"decompressing {seconds['decompress']:.1f} s, sampling {seconds['sample']:.1f} s; restored exactly: "
        f"{results['restored_exactly']}"
    )
    if args.output:
        question = {name: getattr(args, name) for name in ("model", "dataset", "split")}
        write_json({**question, **results, **run_facts(model.device)}, args.output)


RUN = {
    CompressArguments: compress_files,
    DecompressArguments: decompress_file,
    VerifyArguments: verify_file,
    MeasureArguments: measure,
}


@one_line_errors
def main(arguments: list[str] | None = None):
    args = read_arguments(__doc__, arguments)
    RUN[type(args)](args)


if __name__ == "__main__":
    main()
