from huggingface_hub.dataclasses import strict

from .configuration_causal_image import MaskedKernelConfig


@strict
class GatedPixelCNNConfig(MaskedKernelConfig):
    r"""
    Configuration of a Gated PixelCNN: a vertical and a horizontal stack of gated convolutions, without blind spot.

    The fields are those of [`MaskedKernelConfig`]; `num_hidden_layers` counts gated layers, the first one
    included.

    Reference: van den Oord et al. 2016, Conditional Image Generation with PixelCNN Decoders, section 2,
    https://huggingface.co/papers/1606.05328

    ```python
    >>> from hf_pixelcnn import GatedPixelCNNConfig, GatedPixelCNNForCausalImageModeling

    >>> config = GatedPixelCNNConfig(image_size=32, num_channels=3, num_levels=256, hidden_size=66, head_hidden_size=66)
    >>> model = GatedPixelCNNForCausalImageModeling(config)
    ```
    """

    model_type = "gated_pixelcnn"

    num_hidden_layers: int = 11


__all__ = ["GatedPixelCNNConfig"]
