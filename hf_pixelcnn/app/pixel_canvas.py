"""A picture one can paint on, brush out in part, and point at; with mouse, finger or keys."""

import base64
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import gradio as gr  # pyright: ignore[reportMissingImports]
import numpy as np
import torch
from PIL import Image

from ..pictures_causal_image import png_of

HERE = Path(__file__).parent
NUM_DIGITS = 10


def digit(index: int) -> Image.Image:
    """The bundled digit of this class, from the MNIST test set: grey, 28×28."""
    with Image.open(HERE / "digits.png") as strip:
        return strip.crop((28 * index, 0, 28 * (index + 1), 28))


def data_url(data: bytes, kind: str) -> str:
    return f"data:image/{kind};base64,{base64.b64encode(data).decode()}"


def picture_url(picture: Image.Image) -> str:
    return data_url(png_of(picture), "png")


@dataclass(frozen=True)
class CanvasValue:
    r"""
    What is on the canvas.

    Args:
        picture (`PIL.Image.Image`): Of mode L or RGB.
        hidden (`torch.BoolTensor` of shape `(height, width)`): Where it is brushed out.
        row (`int`), column (`int`): Where the cursor is.
    """

    picture: Image.Image
    hidden: torch.Tensor
    row: int
    column: int

    @classmethod
    def of(cls, picture: Image.Image) -> "CanvasValue":
        """A new picture, whose lower half is brushed out."""
        hidden = torch.zeros(picture.height, picture.width, dtype=torch.bool)
        hidden[picture.height // 2 :] = True
        return cls(picture, hidden, picture.height // 2, picture.width // 2)

    @classmethod
    def from_payload(cls, payload: Any, height: int, width: int, num_channels: int) -> "CanvasValue":
        r"""
        What the browser sent, which may be anything, as a picture of this size.

        Raises:
            ValueError: If it is none.
        """
        try:
            pixels, hidden = (base64.b64decode(payload[name], validate=True) for name in ("pixels", "hidden"))
            picture = Image.fromarray(np.frombuffer(pixels, np.uint8).reshape(height, width, 3))
            mask = torch.from_numpy(np.frombuffer(hidden, np.uint8).reshape(height, width) != 0)
            row, column = int(payload["row"]), int(payload["column"])
        except (KeyError, TypeError, ValueError, OverflowError) as error:
            raise ValueError("The picture is not of the model's size: choose or upload one again.") from error
        row, column = min(max(row, 0), height - 1), min(max(column, 0), width - 1)
        return cls(picture.convert("L") if num_channels == 1 else picture, mask, row, column)

    def payload(self) -> dict:
        """For the browser; see pixel_canvas.js."""
        return {
            "height": self.picture.height,
            "width": self.picture.width,
            "is_colour": self.picture.mode == "RGB",
            "pixels": base64.b64encode(self.picture.convert("RGB").tobytes()).decode(),
            "hidden": base64.b64encode(self.hidden.numpy().astype(np.uint8).tobytes()).decode(),
            "row": self.row,
            "column": self.column,
        }


def radio(name: str, value: str, text: str, is_checked: bool = False) -> str:
    checked = " checked" if is_checked else ""
    group = f'name="{name}" data-name="tool" value="{value}"'
    return f'<label><input type="radio" {group}{checked}> {text}</label>'


def template(mode: str, name: str) -> str:
    """The HTML of a canvas; `name` sets its radio buttons apart from those of other canvases."""
    digits = "".join(
        f'<button type="button" data-pick="{i}" aria-label="digit {i}">'
        f'<img alt="" src="{picture_url(digit(i))}"></button>'
        for i in range(NUM_DIGITS)
    )
    tools = presets = ""
    if mode != "look":
        choices = [("paint", "Paint"), ("rub", "Rub out")]
        if mode == "complete":
            choices = [("hide", "Brush out"), ("keep", "Keep"), *choices]
            hide = {"lower": "lower half", "right": "right half", "middle": "middle", "none": "nothing"}
            buttons = "".join(f'<button type="button" data-hide="{key}">{text}</button>' for key, text in hide.items())
            presets = f'<div class="row"><span>Brush out the</span>{buttons}</div>'
        radios = "".join(radio(name, value, text, i == 0) for i, (value, text) in enumerate(choices))
        sizes = "".join(f'<option value="{size}"{" selected" * (size == 2)}>{size}</option>' for size in (1, 2, 3, 5))
        tools = (
            f'<div class="row" role="radiogroup" aria-label="tool">{radios}'
            f'<label>Size <select class="size" aria-label="size of the brush">{sizes}</select></label>'
            '<label class="tint">Colour <input class="colour" type="color" value="#ffffff"></label></div>'
        )
    label = {
        "complete": "The picture. Arrow keys move, the space bar uses the tool.",
        "score": "The picture. Arrow keys move, the space bar uses the tool.",
        "look": "The picture. Click a pixel, or move with the arrow keys.",
    }[mode]
    clear = "" if mode == "look" else '<button type="button" data-clear="1">Clear</button>'
    return (
        f'<div class="row digits" role="group" aria-label="pictures to choose from">{digits}{clear}</div>'
        f"{tools}{presets}"
        f'<canvas tabindex="0" data-mode="{mode}" role="application" aria-label="{label}"></canvas>'
        '<div class="here" aria-live="polite"></div>'
    )


STYLE = """
.row { display: flex; flex-wrap: wrap; align-items: center; gap: 6px 10px; margin: 0 0 8px; font-size: 0.9rem; }
.row label { display: inline-flex; align-items: center; gap: 4px; cursor: pointer; }
.row label[hidden] { display: none; }
.row button { padding: 4px 8px; border: 1px solid var(--border-color-primary); border-radius: 6px;
  background: var(--button-secondary-background-fill); color: var(--button-secondary-text-color); cursor: pointer; }
.row button:hover { background: var(--button-secondary-background-fill-hover); }
.digits { gap: 6px; }
.digits button { padding: 1px; line-height: 0; }
.digits button[data-clear] { padding: 4px 8px; line-height: inherit; }
.digits img { width: 28px; height: 28px; margin: 0; image-rendering: pixelated; }
.row input[type="radio"] { appearance: auto; width: 16px; height: 16px; margin: 0; border: 0; box-shadow: none;
  background: none; accent-color: var(--color-accent); }
.size { appearance: auto; padding: 2px 4px; border: 1px solid var(--border-color-primary); border-radius: 4px;
  font-size: 0.9rem; color: var(--body-text-color); background: var(--input-background-fill); }
.colour { width: 32px; height: 24px; padding: 0; border: 0; background: none; }
canvas { display: block; width: min(100%, 336px); touch-action: none; cursor: crosshair; image-rendering: pixelated;
  border: 1px solid var(--border-color-primary); border-radius: 4px; }
:is(button, canvas, input, select):focus-visible { outline: 2px solid var(--color-accent); outline-offset: 2px; }
.here { margin-top: 4px; font-size: 0.8rem; opacity: 0.75; }
"""


def pixel_canvas(mode: str, value: CanvasValue, **kwargs) -> gr.HTML:
    r"""
    The component, whose events are `input`, after every change, and `pick`, when a bundled digit is chosen.

    No subclass of `gr.HTML`: Gradio would write a file beside the class.

    Args:
        mode (`str`): `"complete"`: paint and brush out; `"score"`: paint; `"look"`: point at a pixel.
        value ([`CanvasValue`]): What it shows first.
        kwargs: As for `gr.HTML`.
    """
    return gr.HTML(
        value.payload(),
        html_template=template(mode, f"tool-{mode}"),
        css_template=STYLE,
        js_on_load=(HERE / "pixel_canvas.js").read_text(encoding="utf-8"),
        apply_default_css=False,
        **kwargs,
    )
