r"""
Gated PixelCNN: a vertical stack that sees the rows above and a horizontal stack that sees the row, without blind spot.

Reference: van den Oord et al. 2016, Conditional Image Generation with PixelCNN Decoders, section 2,
https://huggingface.co/papers/1606.05328
"""

from typing import cast

import torch
from torch import nn
from transformers.modeling_layers import GradientCheckpointingLayer

from .caching_gated_pixelcnn import GatedPixelCNNCache
from .classification_causal_image import ImageClassification
from .configuration_gated_pixelcnn import GatedPixelCNNConfig
from .masking_causal_image import HorizontalConv2d, MaskedConv2d, VerticalConv2d
from .modeling_causal_image import (
    CausalImageBackbone,
    CausalImageModeling,
    CausalImagePreTrainedModel,
    ClassEmbedding,
    Family,
    PixelEncoding,
)


def gate(x: torch.Tensor) -> torch.Tensor:
    """tanh(x₁) ⊙ σ(x₂) of the two halves of the features (equation 2)."""
    value, gate = x.chunk(2, dim=1)
    return torch.tanh(value) * torch.sigmoid(gate)


class GatedPixelCNNLayer(GradientCheckpointingLayer):
    """
    One gated layer (figure 2), for vertical features v and horizontal features h:

        vf = conv_(q+1)×k(v)                        q = k // 2, rows above and, after the first layer, the current one
        v  = gate(vf + e)                           e: class bias
        h  = [h +] conv_1×1(gate(conv_1×(q+1)(h) + conv_1×1(vf) + e))

    The first layer reads the image in place of v and h, with mask A and without the residual connection.
    """

    def __init__(self, config: GatedPixelCNNConfig, in_channels: int | None = None):
        super().__init__()
        size, groups = config.hidden_size, config.num_channel_groups
        self.is_first = in_channels is not None
        kernel_size, mask_type = (config.first_kernel_size, "A") if self.is_first else (config.kernel_size, "B")
        in_channels = size if in_channels is None else in_channels
        self.vertical_conv = VerticalConv2d(in_channels, 2 * size, kernel_size, mask_type=mask_type)
        self.vertical_to_horizontal = MaskedConv2d(2 * size, 2 * size, 1, bias=False)  # sees rows above only
        self.horizontal_conv = HorizontalConv2d(
            in_channels, 2 * size, kernel_size, mask_type=mask_type, num_groups=groups, num_parts=2
        )
        self.horizontal_out = MaskedConv2d(size, size, 1, num_groups=groups)
        self.class_embedding = ClassEmbedding(config.num_classes, 2 * size) if config.num_classes else None
        self.dropout = nn.Dropout(config.dropout)

    def forward(
        self, v: torch.Tensor, h: torch.Tensor, class_ids: torch.Tensor | None = None
    ) -> tuple[torch.Tensor, torch.Tensor]:
        e = 0 if self.class_embedding is None else self.class_embedding(class_ids)
        vf = self.vertical_conv(v)  # (batch, 2 * hidden_size, height, width)
        hf = self.horizontal_conv(h) + self.vertical_to_horizontal(vf)
        out = self.horizontal_out(self.dropout(gate(hf + e)))
        return gate(vf + e), out if self.is_first else h + out


class GatedPixelCNNPreTrainedModel(CausalImagePreTrainedModel):
    config_class = GatedPixelCNNConfig
    _no_split_modules = ["GatedPixelCNNLayer"]


class GatedPixelCNNModel(CausalImageBackbone, GatedPixelCNNPreTrainedModel):
    """
    The network up to its last layer, without the head. Hidden states are those of the horizontal stack, and first
    the encoded image, as the first layer reads it: `(batch, num_channels * features of a channel, height, width)`.
    """

    def __init__(self, config: GatedPixelCNNConfig):
        super().__init__(config)
        self.encoding = PixelEncoding(config)
        self.layers = nn.ModuleList(
            [GatedPixelCNNLayer(config, config.num_channels * self.encoding.features_per_channel)]
        )
        self.layers.extend(GatedPixelCNNLayer(config) for _ in range(config.num_hidden_layers - 1))
        self.post_init()

    @property
    def rows_seen_above(self):
        return self.config.first_kernel_size // 2 + (len(self.layers) - 1) * (self.config.kernel_size // 2)

    def backbone_features(self, pixel_values, class_ids, collect):
        first = cast(GatedPixelCNNLayer, self.layers[0])
        v = h = self.encoding(pixel_values, first.vertical_conv.weight.dtype)
        collect(h)
        for layer in self.layers:
            v, h = layer(v, h, class_ids)
            collect(h)
        return h


class GatedPixelCNNForCausalImageModeling(CausalImageModeling, GatedPixelCNNPreTrainedModel):
    """Gated PixelCNN with an output distribution: exact likelihood, and `generate`."""

    backbone_class = GatedPixelCNNModel
    sampling_cache_class = GatedPixelCNNCache


class GatedPixelCNNForImageClassification(ImageClassification, GatedPixelCNNPreTrainedModel):
    """Gated PixelCNN as a classifier by Bayes' rule; see [`ImageClassification`]."""

    backbone_class = GatedPixelCNNModel


FAMILY = Family(
    name="Gated PixelCNN",
    paper="https://huggingface.co/papers/1606.05328",
    config_class=GatedPixelCNNConfig,
    model_class=GatedPixelCNNModel,
    causal_class=GatedPixelCNNForCausalImageModeling,
    classifier_class=GatedPixelCNNForImageClassification,
)

__all__ = [
    "GatedPixelCNNConfig",
    "GatedPixelCNNForCausalImageModeling",
    "GatedPixelCNNForImageClassification",
    "GatedPixelCNNModel",
    "GatedPixelCNNPreTrainedModel",
]
