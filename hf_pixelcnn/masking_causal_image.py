r"""
Convolutions that see the past only.

The past of a dimension is what comes before it in raster order: rows above, pixels to the left in its row, and earlier
channels of its own pixel. Rows and columns are handled by the shape of a kernel wherever that is possible; a mask is
needed for the right half of a square kernel's centre row and, in colour images, for the channels of the centre tap.

For the latter the features of every layer are split into equal groups, one per channel. Group r may use what is known
when channel r is predicted: at the centre tap, mask type "A" (first layer, whose input is the image itself) lets it see
groups before r, type "B" (later layers) groups up to and including r.

Reference: van den Oord et al. 2016, Pixel Recurrent Neural Networks, section 3.4 and figure 4,
https://huggingface.co/papers/1601.06759
"""

import torch
import torch.nn.functional as F
from torch import nn
from torch.nn.modules.conv import _ConvNd
from torch.nn.modules.utils import _pair


def feature_groups(num_features: int, num_groups: int, num_parts: int = 1) -> torch.Tensor:
    r"""
    The colour channel that each feature belongs to.

    Args:
        num_features (`int`): Number of features, divisible by `num_groups * num_parts`.
        num_groups (`int`): Number of colour channels, or 1 where features are not split.
        num_parts (`int`): Equal parts that are each split into groups, 2 for the two halves that enter a gate.

    Returns:
        `torch.LongTensor` of shape `(num_features,)` with values `0 ... num_groups - 1`.
    """
    groups = torch.arange(num_groups, device="cpu")  # whatever the default device is
    return groups.repeat_interleave(num_features // (num_groups * num_parts)).repeat(num_parts)


def causal_mask(
    out_groups: torch.Tensor, in_groups: torch.Tensor, kernel_size: tuple[int, int], centre: int, mask_type: str
) -> torch.Tensor:
    r"""
    Mask of a kernel whose last row is the row of the predicted pixel.

    Args:
        out_groups (`torch.LongTensor` of shape `(out_features,)`), in_groups (`(in_features,)`):
            Colour channel of each feature, see [`feature_groups`].
        kernel_size (`(int, int)`): Rows and columns of the kernel.
        centre (`int`): Column of the predicted pixel.
        mask_type (`str`): `"A"`: a feature does not see its own channel of that pixel. `"B"`: it does.

    Of one channel, with the rows below the predicted pixel, which a kernel here does not have:

        5×5, type A  1 1 1 1 1      3×3, type B  1 1 1
                     1 1 1 1 1                   1 1 0
                     1 1 0 0 0                   0 0 0
                     0 0 0 0 0
                     0 0 0 0 0

    Returns:
        `torch.BoolTensor` of shape `(out_features, in_features, rows, columns)`, True where the kernel may look.
    """
    if mask_type not in ("A", "B"):
        raise ValueError(f"`mask_type` must be 'A' or 'B', got {mask_type!r}.")
    mask = torch.ones(len(out_groups), len(in_groups), *kernel_size, dtype=torch.bool, device=out_groups.device)
    earlier = torch.lt if mask_type == "A" else torch.le
    mask[:, :, -1, centre] = earlier(in_groups[None, :], out_groups[:, None])
    mask[:, :, -1, centre + 1 :] = False
    return mask


class CausalConv2d(_ConvNd):
    r"""
    Base of the convolutions below: zero padding on each side by its own amount, and a mask where one is needed.

    Input `(batch, in_channels, height, width)`, output `(batch, out_channels, height, width)`, divided by the stride.
    The parameter is never written to: a masked weight is replaced by zero on its way into the convolution, so its
    gradient is zero. Not an `nn.Conv2d`, although it has its fields: what handles those, as methods of adapters do,
    knows of no mask.

    Attributes:
        padding_sides (`(left, right, top, bottom)`): Zero rows and columns around the image; -1 removes one.
        init_scale (`float`): What the initial standard deviation of the output is multiplied by.
        gain (`nn.Parameter` of shape `(out_channels,)`, or `None`): With weight normalisation the norm of the visible
            weight of each output, of which `weight` then gives the direction only (Salimans & Kingma 2016,
            https://huggingface.co/papers/1602.07868).
        share_of_taps (`float`): How much of the visible weight acts on one output.
        mask (`torch.BoolTensor` of the shape of the visible weight, or `None`): See [`causal_mask`].
    """

    share_of_taps = 1.0
    mask: torch.Tensor | None

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        kernel_size: int | tuple[int, int],
        padding_sides: tuple[int, int, int, int],
        bias: bool = True,
        stride: int = 1,
        init_scale: float = 1.0,
        weight_norm: bool = False,
    ):
        sizes = _pair(kernel_size), _pair(stride)
        super().__init__(in_channels, out_channels, *sizes, (0, 0), (1, 1), False, (0, 0), 1, bias, "zeros")
        self.padding_sides, self.init_scale = padding_sides, init_scale
        self.gain = nn.Parameter(torch.empty(out_channels)) if weight_norm else None
        mask = self.build_mask()  # not on the weight's device, which is meta in accelerate's `init_empty_weights`
        self.register_buffer("mask", None if mask is None else mask.to(torch.get_default_device()), persistent=False)

    def build_mask(self) -> torch.Tensor | None:
        """The mask, from static facts only: the layer may be on the meta device, and loading discards buffers."""
        return None

    def kernel(self, weight: torch.Tensor) -> torch.Tensor:
        """The part of a `(out, in, rows, columns)` tensor that can reach the past: for most kernels all of it."""
        return weight

    def visible_weight(self, weight: torch.Tensor | None = None) -> torch.Tensor:
        """The weight that acts, from the parameter or from one given for it: cropped, zero where masked, normalised."""
        visible = self.kernel(self.weight if weight is None else weight)
        if self.mask is not None:
            visible = torch.where(self.mask, visible, 0)
        if self.gain is not None:
            norm = torch.linalg.vector_norm(visible, dim=(1, 2, 3), keepdim=True)
            visible = visible * (self.gain[:, None, None, None] / norm.clamp(min=torch.finfo(norm.dtype).tiny))
        return visible

    def fold_weight_norm(self):
        """Make the normalised weight the parameter, and forget the gain."""
        if self.gain is not None:
            with torch.no_grad():
                self.kernel(self.weight).copy_(self.visible_weight())
            self.gain = None

    def masked(self, weight: torch.Tensor) -> torch.Tensor:
        """A weight of this layer with zeros wherever it never acts."""
        masked, visible = torch.zeros_like(weight), self.kernel(weight)
        if self.mask is not None:
            visible = torch.where(self.mask.to(weight.device), visible, 0)
        self.kernel(masked).copy_(visible)
        return masked

    def _load_from_state_dict(self, *args, **kwargs):
        super()._load_from_state_dict(*args, **kwargs)
        mask = self.build_mask()
        if mask is not None:  # after `to_empty()` it would be uninitialised memory
            self.mask = mask.to(self.weight.device)

    def forward(self, x: torch.Tensor, relu: bool = False, weight: torch.Tensor | None = None) -> torch.Tensor:
        """
        Convolve x, or ReLU(x) with `relu=True`: the same numbers as a ReLU before the call, but the padded tensor is
        then the only one that the backward pass keeps, which makes compiled training a third faster. A `weight` of the
        parameter's shape stands in for it.
        """
        if any(self.padding_sides):
            x = F.pad(x, self.padding_sides)
        if relu:
            x = F.relu(x)
        return F.conv2d(x, self.visible_weight(weight), self.bias, self.stride)


class MaskedConv2d(CausalConv2d):
    """A k×k kernel (or 1×1, where only channels are masked) around the predicted pixel. The rows below it never act."""

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        kernel_size: int,
        *,
        mask_type: str = "B",
        num_groups: int = 1,
        num_parts: int = 1,
        **options,
    ):
        self.mask_type, self.num_groups, self.num_parts, self.reach = mask_type, num_groups, num_parts, kernel_size // 2
        super().__init__(in_channels, out_channels, kernel_size, (self.reach, self.reach, self.reach, 0), **options)

    def build_mask(self):
        if self.kernel_size == (1, 1) and self.num_groups == 1 and self.mask_type == "B":
            return None
        out_groups = feature_groups(self.out_channels, self.num_groups, self.num_parts)
        in_groups = feature_groups(self.in_channels, self.num_groups)
        return causal_mask(out_groups, in_groups, (self.reach + 1, 2 * self.reach + 1), self.reach, self.mask_type)

    def kernel(self, weight):
        return weight[:, :, : self.reach + 1]


class VerticalConv2d(CausalConv2d):
    """The rows above and, after the first layer, the current one, whose features then know only the rows above it."""

    def __init__(self, in_channels: int, out_channels: int, kernel_size: int, *, mask_type: str = "B", **options):
        reach = kernel_size // 2
        rows = reach if mask_type == "A" else reach + 1
        below = -1 if mask_type == "A" else 0  # without the current row the output moves down by one
        super().__init__(in_channels, out_channels, (rows, kernel_size), (reach, reach, reach, below), **options)


class HorizontalConv2d(CausalConv2d):
    """The pixels to the left in the same row, and of the centre pixel what the mask type and the channels allow."""

    def __init__(
        self,
        in_channels: int,
        out_channels: int,
        kernel_size: int,
        *,
        mask_type: str = "B",
        num_groups: int = 1,
        num_parts: int = 1,
        **options,
    ):
        self.mask_type, self.num_groups, self.num_parts = mask_type, num_groups, num_parts
        reach = kernel_size // 2
        skip_centre = mask_type == "A" and num_groups == 1  # nothing of the pixel may be seen: no tap, no mask
        columns = reach if skip_centre else reach + 1
        padding_sides = (reach, -1 if skip_centre else 0, 0, 0)
        super().__init__(in_channels, out_channels, (1, columns), padding_sides, **options)

    def build_mask(self):
        if self.num_groups == 1:
            return None
        out_groups = feature_groups(self.out_channels, self.num_groups, self.num_parts)
        in_groups = feature_groups(self.in_channels, self.num_groups)
        columns = self.kernel_size[1]
        return causal_mask(out_groups, in_groups, (1, columns), columns - 1, self.mask_type)


class CornerConv2d(CausalConv2d):
    """The quarter of a k×k kernel above and to the left of its centre, which it includes."""

    def __init__(self, in_channels: int, out_channels: int, kernel_size: int, **options):
        reach = kernel_size // 2
        super().__init__(in_channels, out_channels, reach + 1, (reach, 0, reach, 0), **options)


class UpsamplingConv2d(CausalConv2d):
    r"""
    A transposed convolution to twice the height and width.

    The pixel of low resolution (i, j) gives the rows 2i and 2i + 1 and, `kernel_columns` being 2, the columns 2j and
    2j + 1; with 3 columns also 2j − 1, so that every column gets something from its right.
    """

    share_of_taps = 0.25

    def __init__(self, in_channels: int, out_channels: int, kernel_columns: int, **options):
        super().__init__(in_channels, out_channels, (2, kernel_columns), (0, 0, 0, 0), stride=2, **options)

    def forward(self, x: torch.Tensor, weight: torch.Tensor | None = None) -> torch.Tensor:
        return self.upsample(x, self.visible_weight(weight), self.bias)

    def upsample(self, x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor:
        wide = self.kernel_size[1] - 2  # 1: a column is cut off on the left, and one added for it on the right
        padding = (0, wide)
        return F.conv_transpose2d(x, weight.transpose(0, 1), bias, self.stride, padding, output_padding=padding)


__all__ = [
    "CausalConv2d",
    "CornerConv2d",
    "HorizontalConv2d",
    "MaskedConv2d",
    "UpsamplingConv2d",
    "VerticalConv2d",
    "causal_mask",
    "feature_groups",
]
