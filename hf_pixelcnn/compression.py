r"""
Lossless compression: images to about as many bits as the model's likelihood says, and back without loss.

The cached sampler's own pass over the dimensions gives the probabilities of each level given its past; an entropy coder
(a range coder of the `constriction` package) writes the level, or reads it, where the sampler would draw one. Images of
a batch are coded together, dimension by dimension in raster order, behind their class ids.

Decoding works only if every probability comes out with the same bits as it did while encoding. So both directions run
the same operations on tensors of the same shape (the last batch is padded), dtype and number of threads, and a stream
says which model, dtype, hardware and library versions it was made with. Whatever differs is an error before decoding; a
hash of the first probabilities and a checksum of the pixels catch what no name tells, so no wrong picture is returned.

A stream consists of a prefix (`PREFIX`: magic, format version, sizes, checksum of all the rest), a header in JSON (see
[`StreamHeader`]), a comment of any bytes, and the payload, the coder's 32-bit words. All numbers are little-endian.

A stream may come from anybody, so its numbers are not believed. Encoders keep these rules, and decoders refuse what
breaks them before they allocate anything: at most `MAX_COLUMNS` columns are in work at a time; a payload has at least
one byte for every `MAX_DIMS_PER_BYTE` dimensions. And decoding stops as soon as the levels read so far are worth more
bits than the payload has.
"""

import contextlib
import hashlib
import importlib.metadata
import json
import math
import platform
import struct
from collections.abc import Iterator
from dataclasses import asdict, dataclass, fields

import numpy as np
import torch
from tqdm.auto import tqdm
from transformers import PreTrainedConfig

from .checks_pixelcnn import check_draws, check_levels
from .generation_pixelcnn import Canvas, sampling_state

MAGIC = b"\x89PXC"
FORMAT_VERSION = 1
PREFIX = struct.Struct("<4sBIIQ16s")  # magic, version, sizes of header, comment and payload, checksum
MAX_HEADER_BYTES = 4096
MAX_COLUMNS = 4096
MAX_DIMS_PER_BYTE = 2048
MAX_THREADS = 256
COST_SLACK_BITS = 64  # what the coder may leave in its state


class CompressedStreamError(ValueError):
    """A stream that is damaged, is none, or cannot be decoded by this model on this machine; the message says which."""


@dataclass(frozen=True)
class StreamHeader:
    r"""
    What a stream says about itself.

    Args:
        shape (`list[int]`): `[images, channels, height, width]`.
        config (`str`), weights (`str`): Fingerprints of the model.
        dtype (`str`), hardware (`str`), torch (`str`), constriction (`str`): What it was made with.
        hf_pixelcnn (`str`): Version that made it.
        threads (`int`): Threads it was made with; decoding uses as many.
        probe (`str`): Hash of the probabilities of the first row and of the first pixel after it.
        pixels (`str`): Checksum of the levels.
    """

    shape: list[int]
    config: str
    weights: str
    dtype: str
    hardware: str
    torch: str
    constriction: str
    hf_pixelcnn: str
    threads: int
    probe: str
    pixels: str

    @classmethod
    def from_json(cls, text: bytes) -> "StreamHeader":
        try:
            values = json.loads(text)
        except (ValueError, RecursionError) as error:
            raise CompressedStreamError(f"The header of the stream is not valid JSON: {error}") from error
        types = {field.name: list if field.name == "shape" else field.type for field in fields(cls)}
        if not isinstance(values, dict) or {name: type(value) for name, value in values.items()} != types:
            raise CompressedStreamError("The header of the stream does not have the fields of this format version.")
        if len(values["shape"]) != 4 or not all(type(size) is int and 0 < size < 2**31 for size in values["shape"]):
            raise CompressedStreamError(f"`shape` in the stream's header must be 4 counts, got {values['shape']}.")
        if not 1 <= values["threads"] <= MAX_THREADS:
            raise CompressedStreamError(
                f"`threads` in the stream's header must be 1 ... {MAX_THREADS}, got {values['threads']}."
            )
        return cls(**values)


@dataclass(frozen=True)
class CompressedStream:
    """The parts of a stream, see [`read_stream`]."""

    header: StreamHeader
    comment: bytes
    payload: bytes


def checksum(*parts: bytes) -> "hashlib.blake2b":
    digest = hashlib.blake2b(digest_size=16)
    for part in parts:
        digest.update(part)
    return digest


def write_stream(stream: CompressedStream) -> bytes:
    header = json.dumps(asdict(stream.header), separators=(",", ":")).encode()
    rest = header + stream.comment + stream.payload
    facts = (MAGIC, FORMAT_VERSION, len(header), len(stream.comment), len(stream.payload))
    digest = checksum(PREFIX.pack(*facts, b""), rest).digest()
    return PREFIX.pack(*facts, digest) + rest


def read_stream(data: bytes) -> CompressedStream:
    r"""
    Take a stream apart, without a model.

    Args:
        data (`bytes`): What [`compress`] returned.

    Returns:
        [`CompressedStream`] with `header` ([`StreamHeader`]), `comment` and `payload`, both `bytes`.

    Raises:
        CompressedStreamError: If it is no stream, of a newer format, cut, or damaged anywhere.
    """
    if not isinstance(data, bytes | bytearray | memoryview):
        raise TypeError(f"A compressed stream must be bytes, got {type(data).__name__}.")
    data = bytes(data)
    if not data:
        raise CompressedStreamError("The stream is empty.")
    if not data.startswith(MAGIC[: len(data)]):
        raise CompressedStreamError(f"This is no compressed stream: it begins with {data[:4]!r} instead of {MAGIC!r}.")
    if len(data) < PREFIX.size:
        raise CompressedStreamError(f"The stream is cut: only {len(data)} bytes are left.")
    *facts, digest = PREFIX.unpack_from(data)
    _, version, header_size, comment_size, payload_size = facts
    if version != FORMAT_VERSION:
        raise CompressedStreamError(
            f"The stream has format version {version}, this release of hf_pixelcnn reads version {FORMAT_VERSION}."
        )
    size = PREFIX.size + header_size + comment_size + payload_size
    if len(data) != size:
        what = "cut" if len(data) < size else "followed by something else"
        raise CompressedStreamError(f"The stream is {what}: it says it has {size} bytes, there are {len(data)}.")
    if checksum(PREFIX.pack(*facts, b""), data[PREFIX.size :]).digest() != digest:
        raise CompressedStreamError("The stream is damaged: its checksum is wrong.")
    if header_size > MAX_HEADER_BYTES or payload_size % 4:
        raise CompressedStreamError("The stream has a header or a payload of a size that cannot be.")
    header_end, comment_end = PREFIX.size + header_size, PREFIX.size + header_size + comment_size
    header = StreamHeader.from_json(data[PREFIX.size : header_end])
    return CompressedStream(header, comment=data[header_end:comment_end], payload=data[comment_end:])


def load_coder():
    try:
        import constriction
    except ImportError as error:
        raise ImportError(
            "Compression needs the package `constriction`: pip install 'hf_pixelcnn[compression]'."
        ) from error
    return constriction.stream


def identity(model) -> dict[str, str]:
    """What must be the same for decoding: fields of [`StreamHeader`]."""
    check_draws(model)
    if any(parameter.is_meta for parameter in model.parameters()):
        raise ValueError("Compression needs all weights of the model in memory; some are offloaded.")
    # Fields of our own that act on the numbers; those of the base class are about loading and text.
    names = {field.name for field in fields(model.config)} - {field.name for field in fields(PreTrainedConfig)}
    names -= {"image_size", "dropout", "class_prior", "class_temperature", "generative_weight"}
    config = {name: getattr(model.config, name) for name in sorted(names)}
    weights = checksum()
    for name, tensor in sorted(model.masked_state_dict().items()):
        weights.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}".encode())
        weights.update(tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy())
    device = model.device
    hardware = f"{platform.machine()} {torch.backends.cpu.get_cpu_capability()}"
    if device.type != "cpu":
        hardware += f" + {torch.cuda.get_device_name(device) if device.type == 'cuda' else device.type}"
    return {
        "dtype": str(model.dtype).removeprefix("torch."),
        "config": checksum(json.dumps([model.config.model_type, config]).encode()).hexdigest()[:16],
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
        text.format(getattr(header, name), here[name])
        for name, text in DIFFERENCES.items()
        if getattr(header, name) != here[name]
    ]
    if found:
        raise CompressedStreamError(f"This stream cannot be decoded here: {'; '.join(found)}.")


def check_sizes(header: StreamHeader, payload: bytes, num_channels: int):
    """Raise on a claim that no stream of this length can make."""
    images, channels, height, width = header.shape
    num_dims = images * channels * height * width
    if channels != num_channels:
        raise CompressedStreamError(f"The stream has images of {channels} channels, the model has {num_channels}.")
    if width > MAX_COLUMNS or num_dims > MAX_DIMS_PER_BYTE * len(payload):
        raise CompressedStreamError(
            f"The stream claims {images} images of {channels}×{height}×{width} dimensions, but no payload of "
            f"{len(payload)} bytes holds as much."
        )


@contextlib.contextmanager
def num_threads(threads: int):
    """Let torch use so many threads on the CPU, and as many as before afterwards."""
    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        yield
    finally:
        torch.set_num_threads(before)


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
        self.digest.update(probabilities)
        self.steps_left -= 1
        if not self.steps_left and self.header and self.header.probe != self.digest.hexdigest():
            raise CompressedStreamError(
                "The model computes other probabilities here than where the stream was made, although weights, dtype "
                "and versions are the same: the processor, its libraries, torch's settings or the release of "
                f"hf_pixelcnn, which was {self.header.hf_pixelcnn}, differ."
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
        levels (`np.ndarray` of shape `(images, dims)`): Levels in raster order, int32.
        class_ids (`np.ndarray` of shape `(images,)`, *optional*): int32.
        num_classes (`int`): Of the model.
    """

    def __init__(self, levels: np.ndarray, class_ids: np.ndarray | None, num_classes: int):
        super().__init__(num_classes)
        self.given, self.given_class_ids = levels, class_ids
        self.encoder = self.stream.queue.RangeEncoder()

    def known_class_ids(self, images: slice) -> np.ndarray:
        return self.given_class_ids[images]

    def code(self, symbols, probabilities):
        try:
            self.encoder.encode(symbols, self.frequencies, probabilities)
        except ValueError as error:
            raise ValueError("The probabilities are no numbers: the model's weights are not finite.") from error
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
        try:
            return self.decoder.decode(self.frequencies, probabilities)
        except (AssertionError, ValueError) as error:  # how `constriction` refuses words, and NaN
            raise CompressedStreamError(f"The payload of the stream cannot be decoded: {error}") from error

    def levels(self, images: slice, dimension: int, probabilities: np.ndarray) -> np.ndarray:
        levels = self.code(None, probabilities)
        chosen = probabilities[np.arange(len(levels)), levels]
        self.bits_left += np.log2(chosen + 2.0**-23).sum()  # the coder's frequency is at most (p * 2**24 + 2) / 2**24
        if self.bits_left < 0:
            raise CompressedStreamError("The payload of the stream is too short for the images that its header claims.")
        return levels


class CodedCanvas(Canvas):
    r"""
    Images whose levels a [`LevelWriter`] or [`LevelReader`] decides.

    Args:
        distribution, shape, device, on_row: See [`Canvas`]; images beyond `images` are padding of level 0.
        coder ([`LevelWriter`] or [`LevelReader`]): What decides.
        images (`slice`): Which images of the stream these are.
        probe ([`Probe`]): Sees all probabilities.
    """

    def __init__(self, distribution, shape, device, on_row, coder, images: slice, probe: Probe):
        super().__init__(distribution, shape, device, on_row)
        self.coder, self.images_coded, self.probe = coder, images, probe
        self.count = images.stop - images.start

    def decide(self, parameters, dimension):
        logits = self.level_logits(parameters, dimension)[: self.count].cpu()
        probabilities = np.ascontiguousarray(logits.softmax(-1, dtype=torch.float64).numpy())
        self.probe.update(probabilities)
        levels = self.coder.levels(self.images_coded, dimension, probabilities)
        column = self.levels[:, dimension]
        column[: self.count] = torch.from_numpy(levels)
        return column


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
            with sampling_state(model):
                canvas = CodedCanvas(
                    model.output_distribution,
                    (size, channels, height, width),
                    model.device,
                    lambda row, levels, count=count: progress.update(count),
                    coder,
                    images,
                    probe,
                )
                model._sample_cached(canvas, class_ids, keep_cache=False)
            yield images, canvas.images()[:count]


def pixels_of(levels: torch.Tensor) -> bytes:
    """Levels as the bytes that the checksum of the pixels is over."""
    return levels.cpu().numpy().astype("<i4").tobytes()


def compress(
    model,
    levels: torch.LongTensor,
    class_ids: torch.LongTensor | list[int] | int | None = None,
    *,
    comment: bytes = b"",
    verify: bool = False,
    show_progress: bool = False,
) -> bytes:
    r"""
    Compress images without loss to about as many bits as they are unlikely: `-log_prob(levels).sum() / ln 2`.

    Only the same model decodes a stream, in the same dtype, on the same kind of processor and with the same version of
    torch; the number of threads is restored. Needs the extra `hf_pixelcnn[compression]`.

    Args:
        model: A `...ForCausalImageModeling`. It runs in evaluation mode and is set back afterwards.
        levels (`torch.LongTensor` of shape `(images, channels, height, width)`):
            Images of any number and one size, any integer dtype; at most 4,096 wide.
        class_ids (`torch.LongTensor` of shape `(images,)`, a list or an `int`, *optional*):
            Classes for a conditional model, -1 for none; they are stored, too.
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
    from . import __version__

    load_coder()
    if not isinstance(comment, bytes):
        raise TypeError(f"`comment` must be bytes, got {type(comment).__name__}.")
    made_with = identity(model)
    check_levels("levels", levels, model.config)
    shape = list(levels.shape)
    if shape[3] > MAX_COLUMNS:
        raise ValueError(f"`levels` must be at most {MAX_COLUMNS} wide, got a width of {shape[3]}.")
    class_ids = model._request_class_ids(class_ids, shape[0])
    raster = levels.permute(0, 2, 3, 1).flatten(1).cpu().numpy().astype(np.int32)
    writer = LevelWriter(
        raster, None if class_ids is None else class_ids.cpu().numpy().astype(np.int32), model.config.num_classes
    )
    probe, threads = Probe(shape), min(torch.get_num_threads(), MAX_THREADS)
    with num_threads(threads):
        for _ in code_images(model, shape, writer, probe, show_progress):
            pass
    header = StreamHeader(
        shape=shape,
        **made_with,
        hf_pixelcnn=__version__,
        threads=threads,
        probe=probe.digest.hexdigest(),
        pixels=checksum(pixels_of(levels)).hexdigest(),
    )
    data = write_stream(CompressedStream(header, comment, writer.payload()))
    if verify:
        decompress(model, data, show_progress=show_progress)  # compares checksums of the pixels
    return data


def decompress(model, data: bytes, *, show_progress: bool = False) -> torch.LongTensor:
    r"""
    The images of a stream.

    Args:
        model: The model that compressed them.
        data (`bytes`): What [`compress`] returned.
        show_progress (`bool`, defaults to `False`): Show a progress bar over rows.

    Returns:
        `torch.LongTensor` of shape `(images, channels, height, width)` on the model's device.

    Raises:
        CompressedStreamError: If the stream is damaged, or was made by another model, in another dtype, on other
            hardware or with other versions. Images that are not exactly those compressed are never returned.
        ImportError: If the package `constriction` is missing.
    """
    load_coder()
    stream = read_stream(data)
    header = stream.header
    check_identity(model, header)
    check_sizes(header, stream.payload, model.config.num_channels)
    reader = LevelReader(stream.payload, model.config.num_classes)
    levels = torch.empty(header.shape, dtype=torch.long, device=model.device)
    pixels = checksum()
    with num_threads(header.threads):
        for images, part in code_images(model, header.shape, reader, Probe(header.shape, header), show_progress):
            levels[images] = part
            pixels.update(pixels_of(part))
    if pixels.hexdigest() != header.pixels:
        raise CompressedStreamError(
            "The decoded images are not those that were compressed: the model computes other probabilities here."
        )
    return levels


__all__ = ["CompressedStream", "CompressedStreamError", "StreamHeader", "compress", "decompress", "read_stream"]
