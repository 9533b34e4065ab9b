"""A family in a file of its own, as users write one: a configuration, a network, and its record."""

import torch.nn.functional as F
from huggingface_hub.dataclasses import strict
from torch import nn

from hf_pixelcnn import Family
from hf_pixelcnn.classification_causal_image import ImageClassification
from hf_pixelcnn.configuration_causal_image import CausalImageModelingConfig
from hf_pixelcnn.masking_causal_image import MaskedConv2d
from hf_pixelcnn.modeling_causal_image import (
    CausalImageBackbone,
    CausalImageModeling,
    CausalImagePreTrainedModel,
    ClassEmbedding,
    PixelEncoding,
)


@strict
class ToyConfig(CausalImageModelingConfig):
    """Masked 3×3 convolutions, one after the other."""

    model_type = "toy"

    num_hidden_layers: int = 2


class ToyPreTrainedModel(CausalImagePreTrainedModel):
    config_class = ToyConfig
    _no_split_modules = ["MaskedConv2d"]


class ToyModel(CausalImageBackbone, ToyPreTrainedModel):
    def __init__(self, config):
        super().__init__(config)
        self.encoding = PixelEncoding(config)
        groups = {"num_groups": config.num_channel_groups}
        size, in_channels = config.hidden_size, config.num_channels * self.encoding.features_per_channel
        self.first = MaskedConv2d(in_channels, size, 3, mask_type="A", **groups)
        self.layers = nn.ModuleList(MaskedConv2d(size, size, 3, **groups) for _ in range(config.num_hidden_layers))
        self.class_embedding = ClassEmbedding(config.num_classes, size) if config.num_classes else None
        self.post_init()

    def backbone_features(self, pixel_values, class_ids, collect):
        x = self.first(self.encoding(pixel_values, self.first.weight.dtype))
        if self.class_embedding is not None:
            x = x + self.class_embedding(class_ids)
        collect(x)
        for layer in self.layers:
            x = x + F.elu(layer(x))
            collect(x)
        return x


class ToyForCausalImageModeling(CausalImageModeling, ToyPreTrainedModel):
    backbone_class = ToyModel


class ToyForImageClassification(ImageClassification, ToyPreTrainedModel):
    backbone_class = ToyModel


FAMILY = Family("Toy", "no paper", ToyConfig, ToyModel, ToyForCausalImageModeling, ToyForImageClassification)
