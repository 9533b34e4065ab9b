r"""
PixelCNN++: two streams of gated residual blocks through three resolutions and back, with skip connections.

The vertical stream u sees the rows above, the combined stream ul also the pixels to the left. An up pass of three
stages halves height and width twice; a down pass doubles them twice, and each of its blocks also reads what the up pass
had at that place.

Reference: Salimans et al. 2017, PixelCNN++, https://huggingface.co/papers/1701.05517, and the authors' code.
"""

import torch
import torch.nn.functional as F
from torch import nn
from transformers.modeling_layers import GradientCheckpointingLayer

from .blocks_causal_image import GatedBlockPreTrainedModel, GatedResidualBlock, shift_down, shift_right
from .caching_pixelcnn_pp import PixelCNNPPCache
from .classification_causal_image import ImageClassification
from .configuration_pixelcnn_pp import PixelCNNPPConfig
from .masking_causal_image import CausalConv2d, CornerConv2d, UpsamplingConv2d, VerticalConv2d
from .modeling_causal_image import CausalImageBackbone, CausalImageModeling, Family, PixelEncoding

KERNEL_SIZE = 3


class PixelCNNPPLayer(GradientCheckpointingLayer):
    """
    A block of each stream. In the up pass the combined one also reads u; in the down pass u reads what the up pass had
    of it, and ul both u and what the up pass had of ul.
    """

    def __init__(self, config: PixelCNNPPConfig, has_skips: bool):
        super().__init__()
        size = config.hidden_size
        skip_size = size if has_skips else 0
        self.vertical = GatedResidualBlock(config, size, VerticalConv2d, KERNEL_SIZE, skip_size)
        self.combined = GatedResidualBlock(config, size, CornerConv2d, KERNEL_SIZE, size + skip_size)

    def forward(
        self,
        u: torch.Tensor,
        ul: torch.Tensor,
        class_ids: torch.Tensor | None = None,
        u_skip: torch.Tensor | None = None,
        ul_skip: torch.Tensor | None = None,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        u = self.vertical(u, u_skip, class_ids)
        ul = self.combined(ul, u if ul_skip is None else torch.cat((u, ul_skip), dim=1), class_ids)
        return u, ul


class PixelCNNPPPreTrainedModel(GatedBlockPreTrainedModel):
    config_class = PixelCNNPPConfig
    _no_split_modules = ["PixelCNNPPLayer"]


class PixelCNNPPModel(CausalImageBackbone, PixelCNNPPPreTrainedModel):
    """
    The network without its head. Hidden states are those of the combined stream: before the first of the six stages and
    after each of them, three at full, half and a quarter of the resolution and three on the way back.

    Images whose sides are not divisible by 4 are continued to the right and below by pixels that count as outside.
    """

    row_alignment = 4  # a whole row at the lowest resolution

    def __init__(self, config: PixelCNNPPConfig):
        super().__init__(config)
        size, depth, norm = config.hidden_size, config.num_hidden_layers, config.weight_norm
        self.encoding = PixelEncoding(config)
        in_channels = config.num_channels * self.encoding.features_per_channel + 1  # one is 1 inside the image
        self.vertical_in = CausalConv2d(in_channels, size, (2, 3), (1, 1, 1, 0), weight_norm=norm)
        self.combined_in_above = CausalConv2d(in_channels, size, (1, 3), (1, 1, 0, 0), weight_norm=norm)
        self.combined_in_left = CausalConv2d(in_channels, size, (2, 1), (0, 0, 1, 0), weight_norm=norm)
        self.up_layers = nn.ModuleList(
            nn.ModuleList(PixelCNNPPLayer(config, has_skips=False) for _ in range(depth)) for _ in range(3)
        )
        self.down_layers = nn.ModuleList(
            nn.ModuleList(PixelCNNPPLayer(config, has_skips=True) for _ in range(n))
            for n in (depth, depth + 1, depth + 1)
        )
        self.vertical_downsampling = nn.ModuleList(
            VerticalConv2d(size, size, KERNEL_SIZE, stride=2, weight_norm=norm) for _ in range(2)
        )
        self.combined_downsampling = nn.ModuleList(
            CornerConv2d(size, size, KERNEL_SIZE, stride=2, weight_norm=norm) for _ in range(2)
        )
        self.vertical_upsampling = nn.ModuleList(UpsamplingConv2d(size, size, 3, weight_norm=norm) for _ in range(2))
        self.combined_upsampling = nn.ModuleList(UpsamplingConv2d(size, size, 2, weight_norm=norm) for _ in range(2))
        self.post_init()

    @property
    def rows_seen_above(self):
        """Two rows per block, at its resolution, two in the first layer, and what the changes of resolution add."""
        n = self.config.num_hidden_layers
        full, half, quarter = 2 * (2 * n + 1), 2 * (2 * n + 1), 2 * (2 * n)
        # A strided convolution sees one row above, and on the way back every second row gets what began one row above:
        # at both changes, of full and half rows. Where the way leads from one stream to the other, one row more.
        return 2 + full + 2 * half + 4 * quarter + 2 * (1 + 2) + 4

    def backbone_features(self, pixel_values, class_ids, collect):
        height, width = pixel_values.shape[2:]
        x = self.encoding(pixel_values, self.vertical_in.weight.dtype)
        x = torch.cat((x, torch.ones_like(x[:, :1])), dim=1)
        x = F.pad(x, (0, -width % 4, 0, -height % 4))
        u = shift_down(self.vertical_in(x))
        ul = shift_down(self.combined_in_above(x))
        ul = ul + shift_right(self.combined_in_left(x)).to(ul.device)  # accelerate may have put it on another one
        collect(ul)
        skips = [(u, ul)]
        for i, layers in enumerate(self.up_layers):
            if i > 0:
                u, ul = self.vertical_downsampling[i - 1](u), self.combined_downsampling[i - 1](ul)
                skips.append((u, ul))
            for layer in layers.children():
                u, ul = layer(u, ul, class_ids)
                skips.append((u, ul))
            collect(ul)
        skips.pop()
        for i, layers in enumerate(self.down_layers):
            if i > 0:
                u, ul = self.vertical_upsampling[i - 1](u), self.combined_upsampling[i - 1](ul)
            for layer in layers.children():
                u, ul = layer(u, ul, class_ids, *skips.pop())
            if i < 2:
                collect(ul)
        ul = ul[:, :, :height, :width]
        collect(ul)
        return ul


class PixelCNNPPForCausalImageModeling(CausalImageModeling, PixelCNNPPPreTrainedModel):
    """PixelCNN++ with an output distribution: exact likelihood, and `generate`."""

    backbone_class = PixelCNNPPModel
    sampling_cache_class = PixelCNNPPCache


class PixelCNNPPForImageClassification(ImageClassification, PixelCNNPPPreTrainedModel):
    """PixelCNN++ as a classifier by Bayes' rule; see [`ImageClassification`]."""

    backbone_class = PixelCNNPPModel


FAMILY = Family(
    name="PixelCNN++",
    paper="https://huggingface.co/papers/1701.05517",
    config_class=PixelCNNPPConfig,
    model_class=PixelCNNPPModel,
    causal_class=PixelCNNPPForCausalImageModeling,
    classifier_class=PixelCNNPPForImageClassification,
    lacks={
        "colour_without_mixture": "the network sees earlier pixels only",
        "export_ranges": "from a width of 4n to one of 4n + 1 the padding jumps, so a range has gaps",
    },
)

__all__ = [
    "PixelCNNPPConfig",
    "PixelCNNPPForCausalImageModeling",
    "PixelCNNPPForImageClassification",
    "PixelCNNPPModel",
    "PixelCNNPPPreTrainedModel",
]
