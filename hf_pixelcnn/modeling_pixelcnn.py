r"""
PixelCNN: one stack of masked convolutions (mask A first, then mask B) in residual bottleneck blocks.

Reference: van den Oord et al. 2016, Pixel Recurrent Neural Networks, sections 3.2-3.4,
https://huggingface.co/papers/1601.06759
"""

import torch
import torch.nn.functional as F
from torch import nn
from transformers.modeling_layers import GradientCheckpointingLayer

from .caching_pixelcnn import PixelCNNCache
from .classification_causal_image import ImageClassification
from .configuration_pixelcnn import PixelCNNConfig
from .masking_causal_image import MaskedConv2d
from .modeling_causal_image import (
    CausalImageBackbone,
    CausalImageModeling,
    CausalImagePreTrainedModel,
    ClassEmbedding,
    Family,
    PixelEncoding,
)


class PixelCNNBlock(GradientCheckpointingLayer):
    """x + 1×1 ∘ ReLU ∘ (3×3 mask B + class bias) ∘ ReLU ∘ 1×1 ∘ ReLU, half the features inside (figure 5, left)."""

    def __init__(self, config: PixelCNNConfig):
        super().__init__()
        size, inner, groups = config.hidden_size, config.hidden_size // 2, config.num_channel_groups
        self.conv_in = MaskedConv2d(size, inner, 1, num_groups=groups)
        self.conv = MaskedConv2d(inner, inner, config.kernel_size, num_groups=groups)
        self.conv_out = MaskedConv2d(inner, size, 1, num_groups=groups)
        self.class_embedding = ClassEmbedding(config.num_classes, inner) if config.num_classes else None
        self.dropout = nn.Dropout(config.dropout)

    def forward(self, x: torch.Tensor, class_ids: torch.Tensor | None = None) -> torch.Tensor:
        y = self.conv(self.conv_in(x, relu=True), relu=True)
        if self.class_embedding is not None:
            y = y + self.class_embedding(class_ids)
        return x + self.conv_out(self.dropout(F.relu(y)))


class PixelCNNPreTrainedModel(CausalImagePreTrainedModel):
    config_class = PixelCNNConfig
    _no_split_modules = ["PixelCNNBlock"]


class PixelCNNModel(CausalImageBackbone, PixelCNNPreTrainedModel):
    """The network up to its last block, without the head. The first hidden state is what mask A's layer gives."""

    def __init__(self, config: PixelCNNConfig):
        super().__init__(config)
        self.encoding = PixelEncoding(config)
        self.conv_in = MaskedConv2d(
            config.num_channels * self.encoding.features_per_channel,
            config.hidden_size,
            config.first_kernel_size,
            mask_type="A",
            num_groups=config.num_channel_groups,
        )
        self.layers = nn.ModuleList(PixelCNNBlock(config) for _ in range(config.num_hidden_layers))
        self.post_init()

    @property
    def rows_seen_above(self):
        return self.config.first_kernel_size // 2 + len(self.layers) * (self.config.kernel_size // 2)

    def backbone_features(self, pixel_values, class_ids, collect):
        x = self.conv_in(self.encoding(pixel_values, self.conv_in.weight.dtype))
        collect(x)
        for layer in self.layers:
            x = layer(x, class_ids)
            collect(x)
        return x


class PixelCNNForCausalImageModeling(CausalImageModeling, PixelCNNPreTrainedModel):
    """PixelCNN with an output distribution: exact likelihood, and `generate`."""

    backbone_class = PixelCNNModel
    sampling_cache_class = PixelCNNCache


class PixelCNNForImageClassification(ImageClassification, PixelCNNPreTrainedModel):
    """PixelCNN as a classifier by Bayes' rule; see [`ImageClassification`]."""

    backbone_class = PixelCNNModel


FAMILY = Family(
    name="PixelCNN",
    paper="https://huggingface.co/papers/1601.06759",
    config_class=PixelCNNConfig,
    model_class=PixelCNNModel,
    causal_class=PixelCNNForCausalImageModeling,
    classifier_class=PixelCNNForImageClassification,
)

__all__ = [
    "PixelCNNConfig",
    "PixelCNNForCausalImageModeling",
    "PixelCNNForImageClassification",
    "PixelCNNModel",
    "PixelCNNPreTrainedModel",
]
