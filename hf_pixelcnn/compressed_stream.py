r"""
The container of compressed images: bytes to a header, a comment and a payload, and back. No model and no torch.

A stream consists of a prefix (`PREFIX`: magic, format version, sizes, checksum of all the rest), a header in JSON (see
[`StreamHeader`]), a comment of any bytes, and the payload, the coder's 32-bit words. All numbers are little-endian.

Streams are untrusted input: everything is checked before it is used, and their text is for programs: in messages it is
[`printable`].
"""

import hashlib
import json
import math
import struct
from dataclasses import asdict, dataclass, fields

MAGIC = b"\x89PXC"
FORMAT_VERSION = 1
PREFIX = struct.Struct("<4sBIIQ16s")  # magic, version, sizes of header, comment and payload, checksum
MAX_HEADER_BYTES = 4096
MAX_THREADS = 256


class CompressedStreamError(ValueError):
    """A stream that is damaged, is none, or cannot be decoded by this model on this machine; the message says which."""


def printable(text: str) -> str:
    """Text of a stream for people: in ASCII, the rest as escapes, because a terminal obeys some characters."""
    return ascii(text)[1:-1]


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

    @property
    def num_dims(self) -> int:
        """Dimensions of all images together."""
        return math.prod(self.shape)

    def __repr__(self) -> str:
        facts = ", ".join(f"{field.name}={getattr(self, field.name)!a}" for field in fields(self))
        return f"StreamHeader({facts})"

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
            raise CompressedStreamError(f"`shape` in the stream's header must be 4 counts, got {values['shape']!a}.")
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


def check_claim(header: StreamHeader, max_dims: int | None):
    """Raise if a header claims more than `max_dims` dimensions."""
    if max_dims is None:
        return
    if type(max_dims) is not int or max_dims < 1:
        raise ValueError(f"`max_dims` must be a positive int, or None for no limit, got {max_dims!r}.")
    if header.num_dims > max_dims:
        images, channels, height, width = header.shape
        raise CompressedStreamError(
            f"The stream claims {images} images of {channels}×{height}×{width}, or {header.num_dims} dimensions; the "
            f"limit is `max_dims={max_dims}`. If you trust who made it, pass `max_dims={header.num_dims}`."
        )


def read_stream(data: bytes, max_dims: int | None = None) -> CompressedStream:
    r"""
    Take a stream apart, without a model.

    Args:
        data (`bytes`): What [`compress`] returned.
        max_dims (`int`, *optional*): How many dimensions, `images * channels * height * width`, the stream may claim.
            `None` sets no limit: nothing is allocated for images here.

    Returns:
        [`CompressedStream`] with `header` ([`StreamHeader`]), `comment` and `payload`, both `bytes`.

    Raises:
        CompressedStreamError: If it is no stream, of a newer format, cut, damaged anywhere, or claims too much.
        TypeError: If `data` is no bytes.
        ValueError: If `max_dims` is no positive integer.
    """
    if not isinstance(data, bytes | bytearray | memoryview):
        raise TypeError(f"A compressed stream must be bytes, got {type(data).__name__}.")
    data = bytes(data)
    if not data:
        raise CompressedStreamError("The stream is empty.")
    if not data.startswith(MAGIC[: len(data)]):
        raise CompressedStreamError(f"Not a compressed stream: it begins with {data[:4]!r} instead of {MAGIC!r}.")
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
        raise CompressedStreamError("Invalid header or payload size.")
    header_end, comment_end = PREFIX.size + header_size, PREFIX.size + header_size + comment_size
    header = StreamHeader.from_json(data[PREFIX.size : header_end])
    check_claim(header, max_dims)
    return CompressedStream(header, comment=data[header_end:comment_end], payload=data[comment_end:])


__all__ = ["CompressedStream", "CompressedStreamError", "StreamHeader", "checksum", "read_stream", "write_stream"]
