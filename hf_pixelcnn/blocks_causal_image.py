r"""
The gated residual block of PixelCNN++, which PixelSNAIL is also made of, and what else the two have in common.

References: Salimans et al. 2017, PixelCNN++, section 2.5, https://huggingface.co/papers/1701.05517; Chen et al. 2018,
PixelSNAIL, section 2, https://huggingface.co/papers/1712.09763.
"""

import torch
import torch.nn.functional as F
from torch import nn

from .adapters_causal_image import AdaptedConv2d
from .configuration_causal_image import GatedBlockConfig
from .masking_causal_image import CausalConv2d, CornerConv2d, MaskedConv2d, VerticalConv2d
from .modeling_causal_image import CausalImagePreTrainedModel, ClassEmbedding


def concat_elu(x: torch.Tensor) -> torch.Tensor:
    """ELU of x and of -x: twice the features."""
    return F.elu(torch.cat((x, -x), dim=1))


def shift_down(x: torch.Tensor) -> torch.Tensor:
    """Every row gets what was in the row above it, the first one zeros."""
    return F.pad(x, (0, 0, 1, -1))


def shift_right(x: torch.Tensor) -> torch.Tensor:
    """Every column gets what was in the column to its left, the first one zeros."""
    return F.pad(x, (1, -1))


class GatedResidualBlock(nn.Module):
    r"""
    A block of stream x with features a from elsewhere (e: class bias):

        t = conv(celu(x)) + conv_1×1(celu(a))
        v, g = conv(dropout(celu(t))) + e
        x + v · σ(g)

    Args:
        config ([`GatedBlockConfig`]): Dropout, classes and weight normalisation.
        size (`int`): Features of x.
        conv (`type`), kernel_size (`int`): What both convolutions are.
        other_size (`int`, defaults to 0): Features of a; 0 if there are none.
    """

    def __init__(
        self,
        config: GatedBlockConfig,
        size: int,
        conv: type[VerticalConv2d | CornerConv2d | MaskedConv2d],
        kernel_size: int,
        other_size: int = 0,
    ):
        super().__init__()
        norm = config.weight_norm
        self.conv_in = conv(2 * size, size, kernel_size, weight_norm=norm)
        self.conv_other = MaskedConv2d(2 * other_size, size, 1, weight_norm=norm) if other_size else None
        self.dropout = nn.Dropout(config.dropout)
        self.conv_out = conv(2 * size, 2 * size, kernel_size, weight_norm=norm, init_scale=0.1)
        self.class_embedding = ClassEmbedding(config.num_classes, 2 * size) if config.num_classes else None

    def forward(
        self, x: torch.Tensor, other: torch.Tensor | None = None, class_ids: torch.Tensor | None = None
    ) -> torch.Tensor:
        t = self.conv_in(concat_elu(x))
        if other is not None:
            assert self.conv_other is not None
            t = t + self.conv_other(concat_elu(other))
        vg = self.conv_out(self.dropout(concat_elu(t)))
        if self.class_embedding is not None:
            vg = vg + self.class_embedding(class_ids)
        value, gate = vg.chunk(2, dim=1)
        return x + value * torch.sigmoid(gate)


class GatedBlockPreTrainedModel(CausalImagePreTrainedModel):
    """Loading, saving and initialisation for families of these blocks, whose layers may be weight-normalised."""

    def head_options(self):
        return {"activation": F.elu, "weight_norm": self.config.weight_norm}

    def fold_weight_norm(self):
        """Replace direction and gain of every layer by the weight that they stand for, in place; not with adapters."""
        if any(isinstance(module, AdaptedConv2d) for module in self.modules()):
            raise ValueError("Adapters change directions, which folding replaces: merge and unload them first.")
        for module in self.modules():
            if isinstance(module, CausalConv2d):
                module.fold_weight_norm()
        self.config.weight_norm = False


__all__ = ["GatedBlockPreTrainedModel", "GatedResidualBlock", "concat_elu", "shift_down", "shift_right"]
