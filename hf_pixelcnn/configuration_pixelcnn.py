from huggingface_hub.dataclasses import strict

from .configuration_causal_image import MaskedKernelConfig


@strict
class PixelCNNConfig(MaskedKernelConfig):
    r"""
    Configuration of a PixelCNN: one stack of masked convolutions in residual bottleneck blocks.

    The fields are those of [`MaskedKernelConfig`]; `num_hidden_layers` counts residual blocks, whose
    bottleneck has `hidden_size // 2` features, so `hidden_size` must be divisible by `2 * num_channel_groups`. The
    defaults describe the binary 28×28 model with 307,073 parameters.

    Reference: van den Oord et al. 2016, Pixel Recurrent Neural Networks, sections 3.2-3.4,
    https://huggingface.co/papers/1601.06759

    ```python
    >>> from hf_pixelcnn import PixelCNNConfig, PixelCNNForCausalImageModeling

    >>> model = PixelCNNForCausalImageModeling(PixelCNNConfig())
    >>> model.num_parameters()
    307073
    ```
    """

    model_type = "pixelcnn"

    hidden_size: int = 128
    head_hidden_size: int = 128

    def validate_channel_groups(self):
        super().validate_channel_groups()
        self.check_half_splits("the bottleneck of hidden_size // 2 features is split into one group per channel")


__all__ = ["PixelCNNConfig"]
