from huggingface_hub.dataclasses import strict

from .configuration_causal_image import CausalImageModelingConfig


@strict
class PixelCNNPPConfig(CausalImageModelingConfig):
    r"""
    Configuration of a PixelCNN++: two streams of gated residual blocks at three resolutions, and a logistic mixture.

    The fields are those of [`CausalImageModelingConfig`] and those below. `num_hidden_layers` counts residual blocks
    per stage: n, n, n on the way to low resolution, n, n + 1, n + 1 on the way back. Kernels are those of the paper, 3
    columns wide. `num_head_layers` defaults to 0. Colours need
    `output_distribution="logistic_mixture"`, which is the default, except for one channel of two levels or of symbols
    (`input_encoding="embedding"`). The defaults describe the paper's model of CIFAR-10 with 53,659,080 parameters.

    Args:
        dropout (`float`, defaults to 0.5):
            Probability with which an element is dropped before the second convolution of a block in training.
        weight_norm (`bool`, defaults to `True`):
            Whether layers have a direction and a gain in place of a weight. `fold_weight_norm` of the model turns it
            off, which leaves 53,618,660 parameters and the same function.

    Reference: Salimans et al. 2017, PixelCNN++: Improving the PixelCNN with Discretized Logistic Mixture Likelihood and
    Other Modifications, https://huggingface.co/papers/1701.05517

    ```python
    >>> from hf_pixelcnn import PixelCNNPPConfig, PixelCNNPPForCausalImageModeling

    >>> config = PixelCNNPPConfig(hidden_size=40, num_hidden_layers=2, num_logistic_mix=5)
    >>> model = PixelCNNPPForCausalImageModeling(config)
    ```
    """

    model_type = "pixelcnn_pp"

    image_size: int | list[int] | tuple[int, ...] = 32
    num_channels: int = 3
    num_levels: int = 256
    hidden_size: int = 160
    head_hidden_size: int = 160
    num_head_layers: int = 0
    dropout: float | int = 0.5
    weight_norm: bool = True

    def __post_init__(self, **kwargs):
        for name in ("kernel_size", "first_kernel_size"):  # which configs of hf_pixelcnn 0.1.0 hold
            if (size := kwargs.pop(name, 3)) != 3:
                raise ValueError(f"`{name}` of PixelCNN++ is 3 and cannot be set, got {size}.")
        has_order = self.num_levels > 2 and self.input_encoding == "scaled"
        if self.output_distribution is None and (self.num_channels > 1 or has_order):
            self.output_distribution = "logistic_mixture"
        super().__post_init__(**kwargs)

    def validate_channel_groups(self):
        if self.num_channels > 1 and self.output_distribution in ("bernoulli", "categorical"):
            raise ValueError(
                "`output_distribution` of PixelCNN++ must be 'logistic_mixture' for images of more than one channel, "
                f"got {self.output_distribution!r} for {self.num_channels}; use a PixelCNN or Gated PixelCNN for it."
            )
        super().validate_channel_groups()


__all__ = ["PixelCNNPPConfig"]
