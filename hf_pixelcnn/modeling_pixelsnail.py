r"""
PixelSNAIL: one stream of gated residual blocks, and between them attention over all earlier pixels.

Convolutions see what is near with high resolution, attention all that came before; from the first attention on a
prediction depends on its whole past.

Reference: Chen et al. 2018, PixelSNAIL: An Improved Autoregressive Generative Model,
https://huggingface.co/papers/1712.09763, and the authors' code.
"""

import torch
import torch.nn.functional as F
from torch import nn
from transformers.modeling_layers import GradientCheckpointingLayer
from transformers.modeling_utils import ALL_ATTENTION_FUNCTIONS

from .blocks_causal_image import GatedBlockPreTrainedModel, GatedResidualBlock, shift_down, shift_right
from .caching_pixelsnail import PixelSNAILCache
from .classification_causal_image import ImageClassification
from .configuration_pixelsnail import PixelSNAILConfig
from .masking_causal_image import CausalConv2d, CornerConv2d, MaskedConv2d
from .modeling_causal_image import CausalImageBackbone, CausalImageModeling, Family, PixelEncoding

KERNEL_SIZE = 3  # of which a corner is 2×2


def eager_attention(module, query, key, value, attention_mask=None, scaling=1.0, **options):
    """Attention of every pixel to those before it and itself, written out: the reference of the fused kernels."""
    scores = query @ key.transpose(-2, -1) * scaling
    later = torch.ones(scores.shape[-2:], dtype=torch.bool, device=scores.device).triu(1)
    weights = scores.masked_fill(later, -torch.inf).softmax(-1)
    return (weights @ value).transpose(1, 2), weights


def attend_to_the_past(attention, query: torch.Tensor, key: torch.Tensor, value: torch.Tensor) -> torch.Tensor:
    r"""
    a_i = Σ_{j<i} softmax_j(q_i · k_j / √size) v_j, where a_0 = 0.

    Queries are moved by one pixel against keys and values instead of masking the pixel itself: so every query has a
    key, and "this one and those before it" is what every kernel can do. Kernels for CPUs want keys as wide as values.

    Args:
        attention (callable): What transformers has for an `attn_implementation`.
        query, key (`torch.Tensor` of shape `(batch, heads, pixels, key_size)`), value (`(..., value_size)`):
            In raster order.

    Returns:
        `torch.Tensor` of shape `(batch, pixels, heads * value_size)`.
    """
    if value.shape[2] == 1:  # an image of one pixel; kernels want a query
        return torch.zeros_like(value).transpose(1, 2).flatten(2)
    size, value_size = key.shape[-1], value.shape[-1]
    width = max(size, value_size)
    query, key, value = query[:, :, 1:], key[:, :, :-1], value[:, :, :-1]
    query, key, value = (F.pad(x, (0, width - x.shape[-1])) for x in (query, key, value))
    out, _ = attention(query, key, value, attention_mask=None, scaling=size**-0.5)
    return F.pad(out[..., :value_size].flatten(2), (0, 0, 1, 0))


class PixelSNAILAttention(nn.Module):
    r"""
    Attention over all earlier pixels (I: encoded image, x: stream, P: positions):

        k, v = W R([I, x, P]),  q = W R([x, P]),  a_i = Σ_{j<i} softmax_j(q_i · k_j / √size) v_j

    R is a gated residual block of 1×1 kernels; lean projections have none. Keys and values read their own pixel, which
    is not among those that its query attends to.
    """

    is_causal = True  # read by attention functions of transformers

    def __init__(self, config: PixelSNAILConfig, in_channels: int):
        super().__init__()
        self.config = config
        norm, query_in = config.weight_norm, config.hidden_size + 2
        key_value_in = in_channels + query_in
        self.key_value_block = self.query_block = None
        if config.attention_projection == "residual":
            self.key_value_block = GatedResidualBlock(config, key_value_in, MaskedConv2d, 1)
            self.query_block = GatedResidualBlock(config, query_in, MaskedConv2d, 1)
        self.key_value = MaskedConv2d(key_value_in, config.key_size + config.value_size, 1, weight_norm=norm)
        self.query = MaskedConv2d(query_in, config.key_size, 1, weight_norm=norm)

    def split_heads(self, x: torch.Tensor) -> torch.Tensor:
        """`(batch, features, height, width)` to `(batch, heads, pixels, features of a head)`."""
        return x.flatten(2).unflatten(1, (self.config.num_attention_heads, -1)).transpose(2, 3)

    def forward(
        self,
        x: torch.Tensor,
        image: torch.Tensor,
        positions: torch.Tensor,
        class_ids: torch.Tensor | None = None,
    ) -> torch.Tensor:
        query = torch.cat((x, positions.expand(x.shape[0], -1, -1, -1)), dim=1)
        key_value = torch.cat((image, query), dim=1)
        if self.query_block is not None and self.key_value_block is not None:
            query = self.query_block(query, None, class_ids)
            key_value = self.key_value_block(key_value, None, class_ids)
        sizes = self.config.key_size, self.config.value_size
        heads = (self.split_heads(part) for part in (self.query(query), *self.key_value(key_value).split(sizes, dim=1)))
        attention = ALL_ATTENTION_FUNCTIONS.get_interface(self.config._attn_implementation or "eager", eager_attention)
        out = attend_to_the_past(lambda *args, **kwargs: attention(self, *args, **kwargs), *heads)
        return out.transpose(1, 2).unflatten(2, x.shape[2:])


class PixelSNAILLayer(GradientCheckpointingLayer):
    """Residual blocks of 2×2 kernels, and one of 1×1 kernels that reads the attention over what they have made."""

    def __init__(self, config: PixelSNAILConfig, in_channels: int):
        super().__init__()
        size = config.hidden_size
        self.blocks = nn.ModuleList(
            GatedResidualBlock(config, size, CornerConv2d, KERNEL_SIZE) for _ in range(config.num_blocks)
        )
        self.attention = PixelSNAILAttention(config, in_channels)
        self.out_block = GatedResidualBlock(config, size, MaskedConv2d, 1, config.value_size)

    def forward(
        self,
        x: torch.Tensor,
        image: torch.Tensor,
        positions: torch.Tensor,
        class_ids: torch.Tensor | None = None,
    ) -> torch.Tensor:
        for block in self.blocks:
            x = block(x, None, class_ids)
        return self.out_block(x, self.attention(x, image, positions, class_ids), class_ids)


class PixelSNAILPreTrainedModel(GatedBlockPreTrainedModel):
    config_class = PixelSNAILConfig
    _no_split_modules = ["PixelSNAILLayer"]
    _supports_sdpa = True  # the fused kernels, and the default; `attn_implementation="eager"` is `eager_attention`


class PixelSNAILModel(CausalImageBackbone, PixelSNAILPreTrainedModel):
    """The network without its head. Hidden states are the stream before the first layer and after each."""

    reads_image_size = True  # positions

    def __init__(self, config: PixelSNAILConfig):
        super().__init__(config)
        size, norm = config.hidden_size, config.weight_norm
        self.encoding = PixelEncoding(config)
        in_channels = config.num_channels * self.encoding.features_per_channel
        self.in_above = CausalConv2d(in_channels + 1, size, (1, 3), (1, 1, 0, 0), weight_norm=norm)
        self.in_left = CausalConv2d(in_channels + 1, size, (2, 1), (0, 0, 1, 0), weight_norm=norm)
        self.layers = nn.ModuleList(PixelSNAILLayer(config, in_channels) for _ in range(config.num_hidden_layers))
        self.post_init()

    @torch.no_grad()
    def make_monotone(self):
        """Queries of 0: all earlier pixels get the same attention, and features increase in their values."""
        for name, parameter in self.named_parameters():
            if ".attention.query." in name:
                parameter.zero_()

    @staticmethod
    def positions(height: int, width: int, dtype: torch.dtype, device: torch.device) -> torch.Tensor:
        """Row and column of every pixel, `(1, 2, height, width)`: 0 in the middle, -1/2 at the upper left."""
        exact = torch.promote_types(dtype, torch.float32)
        rows, columns = (torch.arange(n, dtype=exact, device=device) / n - 0.5 for n in (height, width))
        return torch.stack(torch.meshgrid(rows, columns, indexing="ij"))[None].to(dtype)

    def backbone_features(self, pixel_values, class_ids, collect):
        image = self.encoding(pixel_values, self.in_above.weight.dtype)
        height, width = image.shape[2:]
        positions = self.positions(height, width, image.dtype, image.device)
        with_ones = torch.cat((image, torch.ones_like(image[:, :1])), dim=1)  # 1 inside the image
        x = shift_down(self.in_above(with_ones))
        x = x + shift_right(self.in_left(with_ones)).to(x.device)  # accelerate may have put it on another one
        collect(x)
        for layer in self.layers.children():
            x = layer(x, image, positions, class_ids)
            collect(x)
        return x


class PixelSNAILForCausalImageModeling(CausalImageModeling, PixelSNAILPreTrainedModel):
    """PixelSNAIL with an output distribution: exact likelihood, and `generate`."""

    backbone_class = PixelSNAILModel
    sampling_cache_class = PixelSNAILCache


class PixelSNAILForImageClassification(ImageClassification, PixelSNAILPreTrainedModel):
    """PixelSNAIL as a classifier by Bayes' rule; see [`ImageClassification`]."""

    backbone_class = PixelSNAILModel


FAMILY = Family(
    name="PixelSNAIL",
    paper="https://huggingface.co/papers/1712.09763",
    config_class=PixelSNAILConfig,
    model_class=PixelSNAILModel,
    causal_class=PixelSNAILForCausalImageModeling,
    classifier_class=PixelSNAILForImageClassification,
    lacks={"colour_without_mixture": "the network sees earlier pixels only"},
)

__all__ = [
    "PixelSNAILConfig",
    "PixelSNAILForCausalImageModeling",
    "PixelSNAILForImageClassification",
    "PixelSNAILModel",
    "PixelSNAILPreTrainedModel",
]
