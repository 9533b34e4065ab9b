r"""
Draw what the prediction of one pixel depends on, for several models side by side.

    python training/receptive_field.py --output field.png
    python training/receptive_field.py --models runs/small runs/large --output field.png

A family's name stands for its default configuration.

Each panel shows what is around a predicted pixel, as far as the models see but at most 20 pixels: the receptive field,
the past beyond it, and the blind spot, the part of the past that lies within reach but is not seen. In Python it is one
call, `hf_pixelcnn.training.draw_receptive_fields(model, "field.png")`.
"""

from dataclasses import dataclass, field
from pathlib import Path

from command_line import CommandLineParser, check_first, one_line_errors

if __name__ == "__main__":
    check_first(__file__, __doc__)  # before the imports that take seconds: a typo is answered at once

from hf_pixelcnn import FAMILIES
from hf_pixelcnn.training import InputError, draw_receptive_fields
from hf_pixelcnn.training.pictures import check_picture_path
from hf_pixelcnn.training.saved_models import load_config


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


def config_of(model: str):
    """Of a family by its name, or of a saved model."""
    return FAMILIES[model].config_class() if model in FAMILIES else load_config(model)


@one_line_errors
def main(arguments: list[str] | None = None):
    (args,) = CommandLineParser(ReceptiveFieldArguments).parse(arguments)
    check_picture_path(args.output)
    try:
        configs = {Path(path).name: config_of(path) for path in args.models}
        counts = draw_receptive_fields(configs, args.output, args.channel)
    except (OSError, ValueError) as error:
        raise InputError(f"cannot draw the receptive field of {', '.join(args.models)}: {error}") from error
    for name, pixels in counts.items():
        seen, missed = pixels["receptive field"], pixels["blind spot"]
        print(f"{name}: {seen} pixels in the receptive field, {missed} in the blind spot")


if __name__ == "__main__":
    main()
