r"""
PixelRNN: layers of LSTM cells, one per pixel, whose states run over the image: the Row LSTM and the Diagonal BiLSTM.

Reference: van den Oord et al. 2016, Pixel Recurrent Neural Networks, sections 3.1-3.3,
https://huggingface.co/papers/1601.06759
"""

import torch
import torch.nn.functional as F
from torch import nn
from transformers.modeling_layers import GradientCheckpointingLayer

from .caching_pixelrnn import CACHES, DiagonalBiLSTMCache
from .classification_causal_image import ImageClassification
from .configuration_pixelrnn import PixelRNNConfig
from .masking_causal_image import HorizontalConv2d, MaskedConv2d
from .modeling_causal_image import (
    CausalImageBackbone,
    CausalImageModeling,
    CausalImagePreTrainedModel,
    ClassEmbedding,
    Family,
    PixelEncoding,
)
from .recurrence_pixelrnn import ConvLSTM

NUM_GATES = 4  # o, f, i, g


class RowLSTMLayer(GradientCheckpointingLayer):
    """
    x + W_up h of a Row LSTM (section 3.1), with e the class bias:

        s_ij = W_own x_ij + W_left x_i,j-1 + e + W_ss [h_i-1,j-1, h_i-1,j, h_i-1,j+1]        c from (i - 1, j)

    W_own and W_up are masked by channels; what comes from other pixels may be seen whole.
    """

    def __init__(self, config: PixelRNNConfig, image_channels: int | None = None):
        super().__init__()
        size, features, groups = config.hidden_size, config.hidden_size // 2, config.num_channel_groups
        self.input_to_state = HorizontalConv2d(size, 4 * features, 3, num_groups=groups, num_parts=NUM_GATES)
        self.recurrence = ConvLSTM(features, 1, diagonal=False)
        self.upsampling = MaskedConv2d(features, size, 1, num_groups=groups)
        self.class_embedding = ClassEmbedding(config.num_classes, 4 * features) if config.num_classes else None
        self.dropout = nn.Dropout(config.dropout)

    def forward(self, x: torch.Tensor, class_ids: torch.Tensor | None, image: torch.Tensor) -> torch.Tensor:
        s = self.input_to_state(self.dropout(x))
        if self.class_embedding is not None:
            s = s + self.class_embedding(class_ids)
        (h,) = self.recurrence(s)
        return x + self.upsampling(h)


class DiagonalBiLSTMLayer(GradientCheckpointingLayer):
    """
    x_ij + W_up L_ij + W'_up R_i-1,j of a Diagonal BiLSTM (section 3.2), with e the class bias:

        L:  s_ij = W_own x_ij + e + U_left L_i,j-1 + U_up L_i-1,j                c from (i, j - 1)
        R:  s_ij = V x_ij [+ V' I_ij] + e' + U'_left R_i,j+1 + U'_up R_i-1,j     c from (i, j + 1)

    W_own and W_up are masked by channels. R is used one row further down, so it may see whole pixels, and in the first
    layer the image I itself; else nothing that comes from the right would have seen the last pixel of a row. W'_up has
    no bias: above the first row there is nothing.
    """

    def __init__(self, config: PixelRNNConfig, image_channels: int | None = None):
        super().__init__()
        size, features, groups = config.hidden_size, config.hidden_size // 2, config.num_channel_groups
        self.left_input = MaskedConv2d(size, 4 * features, 1, num_groups=groups, num_parts=NUM_GATES)
        self.right_input = MaskedConv2d(size, 4 * features, 1, num_parts=NUM_GATES)
        self.image_input = None
        if image_channels is not None and not config.has_blind_spot:
            self.image_input = MaskedConv2d(image_channels, 4 * features, 1, bias=False)
        self.recurrence = ConvLSTM(features, 2, diagonal=True)
        self.left_upsampling = MaskedConv2d(features, size, 1, num_groups=groups)
        self.right_upsampling = MaskedConv2d(features, size, 1, bias=False)
        self.class_embedding = ClassEmbedding(config.num_classes, 8 * features) if config.num_classes else None
        self.dropout = nn.Dropout(config.dropout)

    def forward(self, x: torch.Tensor, class_ids: torch.Tensor | None, image: torch.Tensor) -> torch.Tensor:
        inputs = self.dropout(x)
        left, right = self.left_input(inputs), self.right_input(inputs.flip(3))  # R is L of the mirrored image
        if self.image_input is not None:
            right = right + self.image_input(image.flip(3))
        if self.class_embedding is not None:
            e_left, e_right = self.class_embedding(class_ids).chunk(2, dim=1)
            left, right = left + e_left, right + e_right
        left, right = self.recurrence(left, right)
        right_above = F.pad(right.flip(3), (0, 0, 1, -1))
        return x + self.left_upsampling(left) + self.right_upsampling(right_above)


LAYERS = {"row_lstm": RowLSTMLayer, "diagonal_bilstm": DiagonalBiLSTMLayer}


class PixelRNNPreTrainedModel(CausalImagePreTrainedModel):
    config_class = PixelRNNConfig
    _no_split_modules = ["RowLSTMLayer", "DiagonalBiLSTMLayer"]

    @torch.no_grad()
    def _init_weights(self, module):
        """
        As in all families, and forget gates begin open, with a bias of 1, so that early in training cells remember
        (Jozefowicz et al. 2015, An Empirical Exploration of Recurrent Network Architectures, section 5).
        """
        is_loaded = getattr(getattr(module, "bias", None), "_is_hf_initialized", False)
        super()._init_weights(module)
        if getattr(module, "num_parts", 1) == NUM_GATES and module.bias is not None and not is_loaded:
            module.bias.chunk(NUM_GATES)[1].fill_(1)


class PixelRNNModel(CausalImageBackbone, PixelRNNPreTrainedModel):
    """
    The network without its head. Hidden states are those after the first convolution and after each layer. States of
    LSTMs run down from the first row, so all rows are seen.
    """

    def __init__(self, config: PixelRNNConfig):
        super().__init__(config)
        self.encoding = PixelEncoding(config)
        image_channels = config.num_channels * self.encoding.features_per_channel
        self.conv_in = MaskedConv2d(
            image_channels,
            config.hidden_size,
            config.first_kernel_size,
            mask_type="A",
            num_groups=config.num_channel_groups,
        )
        layer_class = LAYERS[config.recurrence]
        self.layers = nn.ModuleList(
            layer_class(config, None if i else image_channels) for i in range(config.num_hidden_layers)
        )
        self.post_init()

    def backbone_features(self, pixel_values, class_ids, collect):
        image = self.encoding(pixel_values, self.conv_in.weight.dtype)
        x = self.conv_in(image).contiguous(memory_format=torch.channels_last)  # in which all that follows is faster
        collect(x)
        for layer in self.layers:
            x = layer(x, class_ids, image)
            collect(x)
        return x


class PixelRNNForCausalImageModeling(CausalImageModeling, PixelRNNPreTrainedModel):
    """PixelRNN with an output distribution: exact likelihood, and `generate`."""

    backbone_class = PixelRNNModel
    sampling_cache_class = DiagonalBiLSTMCache

    def __init__(self, config: PixelRNNConfig):
        super().__init__(config)
        self.sampling_cache_class = CACHES[config.recurrence]


class PixelRNNForImageClassification(ImageClassification, PixelRNNPreTrainedModel):
    """PixelRNN as a classifier by Bayes' rule; see [`ImageClassification`]."""

    backbone_class = PixelRNNModel


FAMILY = Family(
    name="PixelRNN",
    paper="https://huggingface.co/papers/1601.06759",
    config_class=PixelRNNConfig,
    model_class=PixelRNNModel,
    causal_class=PixelRNNForCausalImageModeling,
    classifier_class=PixelRNNForImageClassification,
    lacks={"mapped_gradients": "the backward pass of its scan is written by hand"},
)

__all__ = [
    "PixelRNNConfig",
    "PixelRNNForCausalImageModeling",
    "PixelRNNForImageClassification",
    "PixelRNNModel",
    "PixelRNNPreTrainedModel",
]
