r"""
Draw what the prediction of one pixel depends on, for several models side by side.

    python training/receptive_field.py --output field.png
    python training/receptive_field.py --models runs/small runs/large --output field.png

A family's name stands for its default configuration.

Each panel shows what is around a predicted pixel, as far as the models see but at most 20 pixels: the receptive field,
the past beyond it, and the blind spot, the part of the past that lies within reach but is not seen.
"""

import math
from dataclasses import dataclass, field
from pathlib import Path

from command_line import CommandLineParser, check_first, one_line_errors

if __name__ == "__main__":
    check_first(__file__)  # before the imports that take seconds: a typo is answered at once

import torch
import torch.nn.functional as F
from transformers import AutoConfig, AutoModel

from hf_pixelcnn import FAMILIES
from hf_pixelcnn.receptive_field_causal_image import REGIONS, receptive_field, regions_of
from hf_pixelcnn.training import InputError, check_picture_path, draw_regions

MOST_PIXELS = 20  # to each side of the predicted one; a network that sees further fills its panel
ENDLESS_PIXELS = 12  # where all of the past is seen, and nothing else says how much to show


@dataclass
class ReceptiveFieldArguments:
    models: list[str] = field(
        default_factory=lambda: [
            "model_cards/pixelcnn-mnist-binary",
            "model_cards/gated-pixelcnn-mnist-binary",
            "model_cards/pixelcnn-pp-mnist",
            "pixelrnn",
            "pixelsnail",
        ],
        metadata={"help": "Folders, Hub ids or families; of models only their configurations are read."},
    )
    channel: int = field(default=0, metadata={"help": "Colour channel that is predicted."})
    output: str = field(default="receptive_field.png", metadata={"help": "PNG file to write."})


def field_within(config, channel: int, margin: int) -> torch.Tensor:
    """What is seen of so many pixels above a pixel and to both sides: bool `(margin + 1, 2 * margin + 1)`."""
    config.image_size = [margin + 1, 2 * margin + 1]
    with torch.device("meta"):  # no weights are needed
        model = AutoModel.from_config(config)
    return receptive_field(model, margin, margin, channel).any(0)


def unclipped_field(config, channel: int) -> torch.Tensor:
    """The field of a pixel, with a margin of one pixel above and on both sides: bool `(n + 1, 2 n + 1)`."""
    margin = 4
    while True:
        seen = field_within(config, channel, margin)
        rows, columns = seen.nonzero().T
        reach = max(margin - int(rows.min()), int((columns - margin).abs().max())) if len(rows) else 0
        if reach < margin or margin >= MOST_PIXELS:
            most = min(reach + 1, margin)
            return seen[margin - most :, margin - most : margin + most + 1]
        margin = min(2 * margin, MOST_PIXELS)


def sees_all_rows(config) -> bool:
    """Whether there is no end to how far a pixel sees."""
    with torch.device("meta"):
        return AutoModel.from_config(config).model.rows_seen_above == math.inf


def fields_of_one_size(configs: dict, channel: int) -> dict[str, torch.Tensor]:
    """The fields by name, of the size of the largest that ends; if none does, `ENDLESS_PIXELS` to each side."""
    fields = {name: unclipped_field(config, channel) for name, config in configs.items() if not sees_all_rows(config)}
    most = max((len(seen) for seen in fields.values()), default=ENDLESS_PIXELS + 1)
    for name, config in configs.items():
        if name not in fields:
            fields[name] = field_within(config, channel, most - 1)
    missing = {name: most - len(seen) for name, seen in fields.items()}
    return {name: F.pad(fields[name], (missing[name], missing[name], missing[name], 0)) for name in configs}


def config_of(model: str):
    """Of a family by its name, or of a saved model."""
    return FAMILIES[model].config_class() if model in FAMILIES else AutoConfig.from_pretrained(model)


@one_line_errors
def main(arguments: list[str] | None = None):
    (args,) = CommandLineParser(ReceptiveFieldArguments).parse(arguments)
    check_picture_path(args.output)
    try:
        configs = {Path(path).name: config_of(path) for path in args.models}
        fields = fields_of_one_size(configs, args.channel)
    except (OSError, ValueError) as error:
        raise InputError(f"cannot draw the receptive field of {', '.join(args.models)}: {error}") from error
    panels = {}
    for name, seen in fields.items():
        panels[name] = regions_of(seen, len(seen) - 1, len(seen) - 1)
        counts = panels[name].flatten().bincount(minlength=len(REGIONS)).tolist()
        print(f"{name}: {counts[2]} pixels in the receptive field, {counts[3]} in the blind spot")
    draw_regions(panels, REGIONS, args.output)


if __name__ == "__main__":
    main()
