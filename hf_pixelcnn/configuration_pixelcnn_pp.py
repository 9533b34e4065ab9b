from huggingface_hub.dataclasses import strict

from .configuration_causal_image import GatedBlockConfig


@strict
class PixelCNNPPConfig(GatedBlockConfig):
    r"""
    Configuration of a PixelCNN++: two streams of gated residual blocks at three resolutions, and a logistic mixture.

    The fields are those of [`GatedBlockConfig`]. `num_hidden_layers` counts residual blocks per stage: n, n, n on the
    way to low resolution, n, n + 1, n + 1 on the way back. Kernels are those of the paper, 3 columns wide. The defaults
    describe the paper's model of CIFAR-10 with 53,659,080 parameters, 53,618,660 without weight normalisation.

    Reference: Salimans et al. 2017, PixelCNN++: Improving the PixelCNN with Discretized Logistic Mixture Likelihood and
    Other Modifications, https://huggingface.co/papers/1701.05517

    ```python
    >>> from hf_pixelcnn import PixelCNNPPConfig, PixelCNNPPForCausalImageModeling

    >>> config = PixelCNNPPConfig(hidden_size=40, num_hidden_layers=2, num_logistic_mix=5)
    >>> model = PixelCNNPPForCausalImageModeling(config)
    ```
    """

    model_type = "pixelcnn_pp"

    hidden_size: int = 160
    head_hidden_size: int = 160

    def __post_init__(self, **kwargs):
        for name in ("kernel_size", "first_kernel_size"):  # which configs of hf_pixelcnn 0.1.0 hold
            if (size := kwargs.pop(name, 3)) != 3:
                raise ValueError(f"`{name}` of PixelCNN++ is 3 and cannot be set, got {size}.")
        super().__post_init__(**kwargs)


__all__ = ["PixelCNNPPConfig"]
