"""Pictures of what the prediction of one pixel depends on."""

import copy
import math
from collections.abc import Mapping

import torch
import torch.nn.functional as F
from transformers import AutoModel

from ..configuration_causal_image import CausalImageModelingConfig
from ..modeling_causal_image import CausalImagePreTrainedModel
from ..receptive_field_causal_image import REGIONS, receptive_field, regions_of
from .pictures import draw_regions

MOST_PIXELS = 20  # to each side of the predicted one; a network that sees further fills its panel
ENDLESS_PIXELS = 12  # where all of the past is seen, and nothing else says how much to show
ModelOrConfig = CausalImagePreTrainedModel | CausalImageModelingConfig


def draw_receptive_fields(
    models: ModelOrConfig | Mapping[str, ModelOrConfig], path: str, channel: int = 0
) -> dict[str, dict[str, int]]:
    r"""
    Draw what is around a predicted pixel, as far as models see but at most 20 pixels: the receptive field, the past
    beyond it, and the blind spot, the part of the past that lies within reach but is not seen. The fields are those of
    the architectures ([`~hf_pixelcnn.receptive_field`]); weights play no part.

    Args:
        models: A model or a config, or several by name, which get a panel each.
        path (`str`): Where to write the picture, a PNG file.
        channel (`int`, defaults to 0): The colour channel that is predicted.

    Returns:
        `dict`: For each name (of a single model: its `model_type`) how many pixels of its panel are what the legend
        says: `"receptive field"`, `"blind spot"` and so on.

    Raises:
        ValueError: If a model has no such channel.

    ```python
    >>> draw_receptive_fields(model, "field.png")["pixelcnn"]["blind spot"]
    ```
    """
    named = models if isinstance(models, Mapping) else {config_of(models).model_type: models}
    configs = {name: copy.deepcopy(config_of(model)) for name, model in named.items()}
    panels, counts = {}, {}
    for name, seen in fields_of_one_size(configs, channel).items():
        panels[name] = regions_of(seen, len(seen) - 1, len(seen) - 1)
        counts[name] = dict(zip(REGIONS, panels[name].flatten().bincount(minlength=len(REGIONS)).tolist(), strict=True))
    draw_regions(panels, REGIONS, path)
    return counts


def config_of(model: ModelOrConfig) -> CausalImageModelingConfig:
    return model.config if isinstance(model, torch.nn.Module) else model


def field_within(config: CausalImageModelingConfig, channel: int, margin: int) -> torch.Tensor:
    """What is seen of so many pixels above a pixel and to both sides: bool `(margin + 1, 2 * margin + 1)`."""
    config.image_size = [margin + 1, 2 * margin + 1]
    with torch.device("meta"):  # no weights are needed
        model = AutoModel.from_config(config)
    return receptive_field(model, margin, margin, channel).any(0)


def unclipped_field(config: CausalImageModelingConfig, channel: int) -> torch.Tensor:
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


def sees_all_rows(config: CausalImageModelingConfig) -> bool:
    """Whether there is no end to how far a pixel sees."""
    with torch.device("meta"):
        return AutoModel.from_config(config).model.rows_seen_above == math.inf


def fields_of_one_size(configs: dict[str, CausalImageModelingConfig], channel: int) -> dict[str, torch.Tensor]:
    """The fields by name, of the size of the largest that ends; if none does, `ENDLESS_PIXELS` to each side."""
    fields = {name: unclipped_field(config, channel) for name, config in configs.items() if not sees_all_rows(config)}
    most = max((len(seen) for seen in fields.values()), default=ENDLESS_PIXELS + 1)
    for name, config in configs.items():
        if name not in fields:
            fields[name] = field_within(config, channel, most - 1)
    missing = {name: most - len(seen) for name, seen in fields.items()}
    return {name: F.pad(fields[name], (missing[name], missing[name], missing[name], 0)) for name in configs}
