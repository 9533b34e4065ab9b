"""Pictures of strangers: read within bounds, and fitted to what a model draws."""

from pathlib import Path

import numpy as np
from PIL import Image, ImageOps

from ..pictures_causal_image import upright

MAX_BYTES = 5 * 2**20
MAX_PIXELS = 2**24
FORMATS = ("PNG", "JPEG", "GIF", "WEBP", "BMP")


class UploadError(ValueError):
    """A file that cannot be used; the message is for the person who gave it."""


def read_picture(path: str | Path) -> tuple[Image.Image, list[str]]:
    r"""
    A picture of a file that may be anything.

    Args:
        path (`str` or `Path`): The file.

    Returns:
        The picture, 8 bits per channel, of mode L or RGB, and what was done to it, in words.

    Raises:
        UploadError: If it is no picture, is damaged, or has more than `MAX_BYTES` bytes or `MAX_PIXELS` pixels. Nothing
            of that many pixels is decoded.
    """
    size = Path(path).stat().st_size
    if size > MAX_BYTES:
        raise UploadError(f"The file has {size / 2**20:.1f} MB; at most {MAX_BYTES // 2**20} MB are read.")
    try:
        with Image.open(path, formats=FORMATS) as picture:
            if picture.width * picture.height > MAX_PIXELS:
                raise UploadError(
                    f"The picture has {picture.width} × {picture.height} pixels; at most {MAX_PIXELS / 1e6:.0f} "
                    "million are read."
                )
            picture.load()
            return _in_8_bits(picture)
    except UploadError:
        raise
    except Exception as error:  # what PIL raises depends on the damage
        raise UploadError(
            f"This is no picture that can be read ({', '.join(FORMATS)}), or the file is damaged or cut off."
        ) from error


def _in_8_bits(picture: Image.Image) -> tuple[Image.Image, list[str]]:
    done = []
    if getattr(picture, "n_frames", 1) > 1:
        done.append("only its first frame was taken")
    picture = upright(picture)
    if picture.mode in ("I", "F") or picture.mode.startswith("I;16"):
        values = np.asarray(picture).astype(np.int64)
        picture = Image.fromarray((values >> 8 if values.max() > 255 else values).clip(0, 255).astype(np.uint8))
        done.append("its 16 bits became 8")
    if picture.has_transparency_data:
        behind = Image.new("RGBA", picture.size, "black")
        picture = Image.alpha_composite(behind, picture.convert("RGBA")).convert("RGB")
        done.append("it was put on black")
    return picture if picture.mode == "L" else picture.convert("RGB"), done


def fit(picture: Image.Image, height: int, width: int, num_channels: int) -> tuple[Image.Image, list[str]]:
    r"""
    Make a picture of mode L or RGB one of a size and kind.

    Args:
        picture (`PIL.Image.Image`): Of mode L or RGB.
        height (`int`), width (`int`), num_channels (`int`): Of the model's images.

    Returns:
        The picture, and what was done to it, in words.
    """
    done = []
    if num_channels == 1 and picture.mode != "L":
        grey = picture.convert("L")
        if not np.array_equal(np.asarray(picture), np.repeat(np.asarray(grey)[..., None], 3, axis=2)):
            done.append("its colours became grey")
        picture = grey
    elif num_channels == 3:
        picture = picture.convert("RGB")
    if picture.size != (width, height):
        if picture.width * height != picture.height * width:
            done.append("its middle was cut out")
        done.append(f"{picture.width} × {picture.height} pixels became {width} × {height}")
        picture = ImageOps.fit(picture, (width, height), Image.Resampling.BOX)
    return picture, done
