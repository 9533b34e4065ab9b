r"""
Lossless compression: images to about as many bits as the model's likelihood says, and back without loss.

The cached sampler's own pass over the dimensions gives the probabilities of each level given its past; an entropy coder
(a range coder of the `constriction` package) writes the level, or reads it, where the sampler would draw one. Images of
a batch are coded together, dimension by dimension in raster order, behind their class ids.

Decoding works only if every probability comes out with the same bits as it did while encoding. So both directions run
the same operations on tensors of the same shape (the last batch is padded), dtype and number of threads, and a stream
says which model, dtype, hardware and library versions it was made with. Whatever differs is an error before decoding; a
hash of the first probabilities and a checksum of the pixels catch what no name tells, so no wrong picture is returned.

Streams are untrusted input; their container is in compressed_stream.py. Encoders keep these rules, and decoders refuse
what breaks them before they allocate anything: at most `MAX_COLUMNS` columns are in work at a time; a payload has at
least one byte for every `MAX_DIMS_PER_BYTE` dimensions. A decoder also has a limit of dimensions of its own,
`max_dims`, because what a small stream claims can be hours of work. Until the hash of the first probabilities is right
it keeps one row; and it stops as soon as the levels read so far are worth more bits than the payload has.
"""

import contextlib
import hashlib
import importlib
import importlib.metadata
import json
import math
import platform
from collections.abc import Iterator

import numpy as np
import torch
from tqdm.auto import tqdm

from .canvas_causal_image import Canvas
from .checks_causal_image import check_levels, class_ids_for, drawing_network, fits_in_memory
from .compressed_stream import (
    MAX_THREADS,
    CompressedStream,
    CompressedStreamError,
    StreamHeader,
    checksum,
    printable,
    read_stream,
    write_stream,
)
from .likelihood_causal_image import from_raster, to_raster
from .sampling_causal_image import num_threads, sample_cached, sampling_state, threads_that_pay
from .version import __version__

MAX_COLUMNS = 4096
MAX_DIMS_PER_BYTE = 2048
MAX_DIMS = 2**24  # 21,399 images of 28×28, 5,461 of 3×32×32, or one of 3×2048×2730: 160 MiB while decoding
COST_SLACK_BITS = 64  # what the coder may leave in its state
# Why an undamaged stream, the first probabilities of which came out the same, may still not be decoded.
AFTER_PROBE = (
    "the model computes other probabilities here (another processor of the same kind?), or no encoder made it."
)


def load_coder():
    try:
        return importlib.import_module("constriction").stream
    except ImportError as error:
        raise ImportError(
            "Compression needs the package `constriction`: pip install 'hf_pixelcnn[compression]'."
        ) from error


def identity(model) -> dict[str, str]:
    """What must be the same for decoding: fields of [`StreamHeader`]."""
    if any(parameter.is_meta for parameter in model.parameters()):
        raise ValueError("Compression needs all weights of the model in memory; some are offloaded.")
    settings = [model.config.model_type, model.config.likelihood_settings()]
    weights = checksum()
    for name, tensor in sorted(model.acting_state_dict().items()):
        weights.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}".encode())
        weights.update(tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy())
    device = model.device
    hardware = f"{platform.machine()} {torch.backends.cpu.get_cpu_capability()}"
    if device.type != "cpu":
        hardware += f" + {torch.cuda.get_device_name(device) if device.type == 'cuda' else device.type}"
    return {
        "dtype": str(model.dtype).removeprefix("torch."),
        "config": checksum(json.dumps(settings).encode()).hexdigest()[:16],
        "weights": weights.hexdigest()[:16],
        "hardware": hardware,
        "torch": torch.__version__,
        "constriction": importlib.metadata.version("constriction"),
    }


DIFFERENCES = {
    "dtype": "the model was in {0} and is in {1} here (convert it with `model.to`)",
    "config": "the model's configuration is another one (fingerprint {0}, here {1})",
    "weights": "the model's weights are others (fingerprint {0}, here {1})",
    "hardware": "it was made on {0}, and this is {1}",
    "torch": "it was made with torch {0}, and this is {1}",
    "constriction": "it was made with constriction {0}, and this is {1}",
}


def check_identity(model, header: StreamHeader):
    here = identity(model)
    found = [
        text.format(printable(getattr(header, name)), here[name])
        for name, text in DIFFERENCES.items()
        if getattr(header, name) != here[name]
    ]
    if found:
        raise CompressedStreamError(f"This stream cannot be decoded here: {'; '.join(found)}.")


def check_sizes(header: StreamHeader, payload: bytes, num_channels: int):
    """Raise on a claim that no stream of this length can make."""
    images, channels, height, width = header.shape
    if channels != num_channels:
        raise CompressedStreamError(f"The stream has images of {channels} channels, the model has {num_channels}.")
    if width > MAX_COLUMNS or header.num_dims > MAX_DIMS_PER_BYTE * len(payload):
        raise CompressedStreamError(
            f"The stream claims {images} images of {channels}×{height}×{width} dimensions, but no payload of "
            f"{len(payload)} bytes holds as much."
        )


def level_dtype(num_levels: int) -> torch.dtype:
    """The dtype in which levels are kept while others are decoded."""
    return torch.uint8 if num_levels <= 256 else torch.int32


def check_stream_memory(header: StreamHeader, num_levels: int, device: torch.device):
    """Raise if there is no room for the images of a stream: as they are decoded, in order, and as they are returned."""
    size = header.num_dims * (2 * level_dtype(num_levels).itemsize + torch.long.itemsize)
    if not fits_in_memory(size, device):
        images, channels, height, width = header.shape
        raise CompressedStreamError(
            f"The stream claims {images} images of {channels}×{height}×{width}; to decode them takes {size} bytes of "
            f"memory on {device}, more than is free."
        )


@contextlib.contextmanager
def contiguous_weights(model) -> Iterator[None]:
    r"""
    Lay out all parameters and buffers of a model contiguously, and as they were afterwards.

    Convolutions of another memory format, such as channels last, round in another way: streams do not depend on it.
    """
    tensors = [*model.parameters(), *model.buffers()]
    others = [x for x in tensors if x.stride() != torch.empty(x.shape, device="meta").stride()]
    before = [x.data for x in others]
    try:
        for x, data in zip(others, before, strict=True):
            x.data = data.clone(memory_format=torch.contiguous_format)
        yield
    finally:
        for x, data in zip(others, before, strict=True):
            x.data = data


class Probe:
    r"""
    Hash of the probabilities of the first steps of the first batch.

    Args:
        shape (`list[int]`): `[images, channels, height, width]`.
        header ([`StreamHeader`], *optional*): When decoding, says what the hash must be.
    """

    def __init__(self, shape: list[int], header: StreamHeader | None = None):
        _, channels, height, width = shape
        self.steps_left = min(width + 1, width * height) * channels
        self.digest, self.header = checksum(), header

    def update(self, probabilities: np.ndarray):
        if not self.steps_left:
            return
        self.digest.update(probabilities.data)
        self.steps_left -= 1
        if not self.steps_left and self.header and self.header.probe != self.digest.hexdigest():
            raise CompressedStreamError(
                "The model computes other probabilities here than where the stream was made, although weights, dtype "
                "and versions are the same: the processor, its libraries, torch's settings or the release of "
                f"hf_pixelcnn, which was {printable(self.header.hf_pixelcnn)}, differ."
            )


class LevelCoder:
    r"""
    What both directions share: entropy models, and the adaptive one of class ids.

    Args:
        num_classes (`int`): Of the model. The first class id costs `log2(num_classes + 1)` bits; the others, what the
            frequencies of those before them make of it.
    """

    def __init__(self, num_classes: int):
        self.stream = load_coder()
        self.frequencies = self.stream.model.Categorical(perfect=False)  # 24 bits, at least 1 for every level
        self.class_counts = np.ones(num_classes + 1)

    def code(self, symbols: np.ndarray, probabilities: np.ndarray) -> np.ndarray:
        """Write `symbols` `(n,)` by `probabilities` `(n, symbols)`, or read as many; returns them."""
        raise NotImplementedError

    def known_class_ids(self, images: slice) -> np.ndarray:
        """Class ids to write, or room for those to read."""
        raise NotImplementedError

    def class_ids(self, images: slice) -> np.ndarray:
        """Class ids of these images, the next ones of the stream."""
        class_ids = self.known_class_ids(images)
        for index in range(len(class_ids)):
            symbol = self.code(class_ids[index : index + 1] + 1, self.class_counts[None])
            class_ids[index : index + 1] = symbol - 1
            self.class_counts[symbol] += 1
        return class_ids


class LevelWriter(LevelCoder):
    r"""
    Encodes given images.

    Args:
        levels (integer `torch.Tensor` of shape `(images, channels, height, width)`): Of the images.
        class_ids (`torch.LongTensor` of shape `(images,)`, *optional*): Of the images.
        num_classes (`int`): Of the model.
    """

    def __init__(self, levels: torch.Tensor, class_ids: torch.Tensor | None, num_classes: int):
        super().__init__(num_classes)
        self.given = to_raster(levels).cpu().numpy().astype(np.int32)
        class_ids = torch.full((len(levels),), -1) if class_ids is None else class_ids
        self.given_class_ids = class_ids.cpu().numpy().astype(np.int32)
        self.encoder = self.stream.queue.RangeEncoder()

    def known_class_ids(self, images: slice) -> np.ndarray:
        return self.given_class_ids[images]

    def code(self, symbols, probabilities):
        try:
            self.encoder.encode(symbols, self.frequencies, probabilities)
        except ValueError as error:
            raise ValueError("The model produced NaN probabilities: its weights are not finite.") from error
        return symbols

    def levels(self, images: slice, dimension: int, probabilities: np.ndarray) -> np.ndarray:
        return self.code(np.ascontiguousarray(self.given[images, dimension]), probabilities)

    def payload(self) -> bytes:
        words = self.encoder.get_compressed()
        least = math.ceil(self.given.size / (4 * MAX_DIMS_PER_BYTE))  # a model this sure costs next to nothing
        return np.pad(words, (0, max(0, least - len(words)))).astype("<u4").tobytes()


class LevelReader(LevelCoder):
    r"""
    Decodes images.

    Args:
        payload (`bytes`): Of a stream.
        num_classes (`int`): Of the model.
    """

    def __init__(self, payload: bytes, num_classes: int):
        super().__init__(num_classes)
        self.bits_left = 8 * len(payload) + COST_SLACK_BITS
        self.decoder = self.stream.queue.RangeDecoder(np.frombuffer(payload, dtype="<u4").astype(np.uint32))

    def known_class_ids(self, images: slice) -> np.ndarray:
        return np.zeros(images.stop - images.start, dtype=np.int32)

    def code(self, symbols, probabilities):
        return self.read(probabilities)

    def read(self, probabilities: np.ndarray) -> np.ndarray:
        """The next symbols of the stream, `(n,)`, by `probabilities` `(n, symbols)`."""
        try:
            return self.decoder.decode(self.frequencies, probabilities)
        except (AssertionError, ValueError) as error:  # how `constriction` refuses words, and NaN
            why = f"The payload of the stream cannot be decoded ({error}): {AFTER_PROBE}"
            raise CompressedStreamError(why) from error

    def levels(self, images: slice, dimension: int, probabilities: np.ndarray) -> np.ndarray:
        levels = self.read(probabilities)
        chosen = probabilities[np.arange(len(levels)), levels]
        self.bits_left += np.log2(chosen + 2.0**-23).sum()  # the coder's frequency is at most (p * 2**24 + 2) / 2**24
        if self.bits_left < 0:
            raise CompressedStreamError(
                f"The payload of the stream is too short for the images that its header claims: {AFTER_PROBE}"
            )
        return levels


class CodedCanvas(Canvas):
    r"""
    Images whose levels a [`LevelWriter`] or [`LevelReader`] decides. `levels` are those of the row in work only.

    Args:
        distribution, shape, device, on_row: See [`Canvas`]; images beyond `images` are padding of level 0.
        coder ([`LevelWriter`] or [`LevelReader`]): What decides.
        images (`slice`): Which images of the stream these are.
        probe ([`Probe`]): Sees all probabilities.
    """

    def __init__(self, distribution, shape, device, on_row, coder, images: slice, probe: Probe):
        batch, channels, height, width = shape
        super().__init__(distribution, (batch, channels, 1, width), device, on_row)
        self.shape, self.height = shape, height
        self.num_levels = distribution.num_levels
        self.coder, self.images_coded, self.probe = coder, images, probe
        self.count = images.stop - images.start
        self.finished: torch.Tensor | None = None  # levels `(count, dims)`, from the first whole row on

    def level_logits(self, parameters, dimension):
        return super().level_logits(parameters, dimension % self.levels.shape[1])

    def decide(self, parameters, dimension):
        logits = self.level_logits(parameters, dimension)[: self.count].cpu()
        probabilities = np.ascontiguousarray(logits.softmax(-1, dtype=torch.float64).numpy())
        self.probe.update(probabilities)
        levels = self.coder.levels(self.images_coded, dimension, probabilities)
        column = self.levels[:, dimension % self.levels.shape[1]]
        column[: self.count] = torch.from_numpy(levels)
        return column

    def finish_rows(self, start, end):
        if self.finished is None:  # on a CPU this takes memory where it is written to only, row by row
            size, dtype = self.height * self.levels.shape[1], level_dtype(self.num_levels)
            self.finished = torch.empty(self.count, size, dtype=dtype, device=self.levels.device)
        for row in range(start, end):
            self.finished[:, self.row_dimensions(row)] = self.levels[: self.count]
            self.on_row(row, self.levels)

    def images(self):
        assert self.finished is not None, "no row was finished"
        return from_raster(self.finished, self.shape)


def batches(num_images: int, width: int) -> tuple[int, list[slice]]:
    """The fixed number of images coded at a time, and which these are: as many as `MAX_COLUMNS` allows, evenly."""
    parts = math.ceil(num_images / (MAX_COLUMNS // width))
    size = math.ceil(num_images / parts)
    return size, [slice(start, min(start + size, num_images)) for start in range(0, num_images, size)]


def code_images(
    model, shape: list[int], coder: LevelWriter | LevelReader, probe: Probe, show_progress: bool
) -> Iterator[tuple[slice, torch.Tensor]]:
    """Run the pass of both directions: `(which images, their levels)` of one batch after the other."""
    num_images, channels, height, width = shape
    size, parts = batches(num_images, width)
    what = "Compressing" if isinstance(coder, LevelWriter) else "Decompressing"
    with tqdm(total=num_images * height, desc=what, unit="row", disable=not show_progress) as progress:
        for images in parts:
            count = images.stop - images.start
            class_ids = None
            if model.config.num_classes:
                class_ids = torch.full((size,), -1, device=model.device)
                class_ids[:count] = torch.from_numpy(coder.class_ids(images))
            with contiguous_weights(model), sampling_state(model):
                canvas = CodedCanvas(
                    model.output_distribution,
                    (size, channels, height, width),
                    model.device,
                    lambda row, levels, count=count: progress.update(count),
                    coder,
                    images,
                    probe,
                )
                sample_cached(model, canvas, class_ids, keep_cache=False)
            yield images, canvas.images()


def add_pixels(digest: hashlib.blake2b, levels: torch.Tensor) -> hashlib.blake2b:
    """Add levels `(images, channels, height, width)` to the checksum of the pixels; returns it."""
    for plane in levels.cpu().flatten(0, 1):  # not all at once: as int32 they take more memory than the images
        digest.update(plane.numpy().astype("<i4").tobytes())
    return digest


def compress(
    model,
    pixel_values: torch.Tensor,
    class_ids: torch.Tensor | list[int | str] | int | str | None = None,
    *,
    comment: bytes = b"",
    verify: bool = False,
    show_progress: bool = False,
) -> bytes:
    r"""
    Compress images without loss to about as many bits as they are unlikely: `-log_prob(pixel_values).sum() / ln 2`.

    Only the same model decodes a stream, in the same dtype, on the same kind of processor and with the same version of
    torch. The threads that pay are used, decoding uses as many, and torch's number of threads is set back. Needs the
    extra `hf_pixelcnn[compression]`.

    Args:
        model: A `...ForCausalImageModeling`, compiled or with adapters, too. It runs in evaluation mode and is set back
            afterwards.
        pixel_values (integer `torch.Tensor` of shape `(images, channels, height, width)`):
            Levels of any number of images of one size, any integer dtype; at most 4,096 wide.
        class_ids (`torch.LongTensor` of shape `(images,)`, a list, an `int` or a `str`, *optional*):
            Classes for a conditional model, by id or name, -1 for none; they are stored, too.
        comment (`bytes`, defaults to nothing): Any bytes to keep with the images, see [`read_stream`].
        verify (`bool`, defaults to `False`): Decode the stream and compare before returning it.
        show_progress (`bool`, defaults to `False`): Show a progress bar over rows.

    Returns:
        `bytes`: The stream, for [`decompress`].

    Raises:
        ValueError, TypeError: If arguments do not fit the model, or its weights are not finite.
        CompressedStreamError: With `verify`, if the way back fails.
        ImportError: If the package `constriction` is missing.
    """
    load_coder()
    if not isinstance(comment, bytes):
        raise TypeError(f"`comment` must be bytes, got {type(comment).__name__}.")
    model = drawing_network(model)
    made_with = identity(model)
    check_levels("pixel_values", pixel_values, model.config)
    shape = list(pixel_values.shape)
    if shape[3] > MAX_COLUMNS:
        raise ValueError(f"`pixel_values` must be at most {MAX_COLUMNS} wide, got a width of {shape[3]}.")
    class_ids = class_ids_for(class_ids, shape[0], model.config, model.device)
    writer = LevelWriter(pixel_values, class_ids, model.config.num_classes)
    probe, threads = Probe(shape), min(threads_that_pay(model, batches(shape[0], shape[3])[0]), MAX_THREADS)
    with num_threads(threads):
        for _ in code_images(model, shape, writer, probe, show_progress):
            pass
    header = StreamHeader(
        shape=shape,
        **made_with,
        hf_pixelcnn=__version__,
        threads=threads,
        probe=probe.digest.hexdigest(),
        pixels=add_pixels(checksum(), pixel_values).hexdigest(),
    )
    data = write_stream(CompressedStream(header, comment, writer.payload()))
    if verify:
        decompress(model, data, max_dims=None, show_progress=show_progress)  # compares checksums of the pixels
    return data


def decompress(model, data: bytes, *, max_dims: int | None = MAX_DIMS, show_progress: bool = False) -> torch.Tensor:
    r"""
    The images of a stream.

    Args:
        model: The model that compressed them, in any memory format.
        data (`bytes`): What [`compress`] returned.
        max_dims (`int`, defaults to 16,777,216): How many dimensions, `images * channels * height * width`, the stream
            may claim; `None` sets no limit. Each takes up to 10 bytes of memory (16 with more than 256 levels), and in
            large images about a millisecond: a small stream of a stranger can be hours of work.
        show_progress (`bool`, defaults to `False`): Show a progress bar over rows.

    Returns:
        `torch.LongTensor` of shape `(images, channels, height, width)` on the model's device.

    Raises:
        CompressedStreamError: If the stream is damaged, claims more than `max_dims` or the memory that is free, or was
            made by another model, in another dtype, on other hardware or with other versions. Images that are not
            exactly those compressed are never returned.
        TypeError: If `data` is no bytes, or `model` cannot draw images.
        ValueError: If `max_dims` is no positive integer, or weights are not in memory.
        ImportError: If the package `constriction` is missing.
    """
    load_coder()
    model = drawing_network(model)
    stream = read_stream(data, max_dims)
    header = stream.header
    check_identity(model, header)
    check_sizes(header, stream.payload, model.config.num_channels)
    check_stream_memory(header, model.config.num_levels, model.device)
    reader = LevelReader(stream.payload, model.config.num_classes)
    levels, pixels = torch.empty(0, dtype=torch.long, device=model.device), checksum()
    with num_threads(header.threads):
        for images, part in code_images(model, header.shape, reader, Probe(header.shape, header), show_progress):
            add_pixels(pixels, part)
            if not levels.numel():  # now that the probe is right
                levels = levels.new_empty(header.shape)
            levels[images] = part
    if pixels.hexdigest() != header.pixels:
        raise CompressedStreamError(f"The decoded images are not those that were compressed: {AFTER_PROBE}")
    return levels


__all__ = ["compress", "decompress"]
