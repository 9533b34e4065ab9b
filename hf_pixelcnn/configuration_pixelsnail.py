from huggingface_hub.dataclasses import strict

from .configuration_causal_image import GatedBlockConfig


@strict
class PixelSNAILConfig(GatedBlockConfig):
    r"""
    Configuration of a PixelSNAIL: gated residual blocks, and attention over all earlier pixels.

    The fields are those of [`GatedBlockConfig`] and those below. `num_hidden_layers` counts attentions, each of which
    comes after `num_blocks` residual blocks of 2×2 kernels. The defaults describe the paper's model of CIFAR-10 with
    91,371,816 parameters, 91,301,448 without weight normalisation.

    Args:
        num_blocks (`int`, defaults to 4):
            Residual blocks of a layer before its attention.
        num_attention_heads (`int`, defaults to 1):
            Parts that keys and values are split into, each with a softmax of its own.
        key_size (`int`, defaults to 16):
            Features of queries and keys of a layer, of all heads together. Divisible by `num_attention_heads`.
        value_size (`int`, defaults to 128):
            Features of values of a layer, of all heads together. Divisible by `num_attention_heads`.
        attention_projection (`str`, defaults to `"residual"`):
            What makes queries, keys and values: `"residual"` is a gated residual block of 1×1 kernels and a 1×1, as in
            the paper, `"lean"` the last 1×1 alone.

    Reference: Chen et al. 2018, PixelSNAIL: An Improved Autoregressive Generative Model,
    https://huggingface.co/papers/1712.09763

    ```python
    >>> from hf_pixelcnn import PixelSNAILConfig, PixelSNAILForCausalImageModeling

    >>> config = PixelSNAILConfig(hidden_size=32, num_hidden_layers=3, num_blocks=2, value_size=32)
    >>> model = PixelSNAILForCausalImageModeling(config)
    ```
    """

    model_type = "pixelsnail"

    hidden_size: int = 256
    num_hidden_layers: int = 12
    head_hidden_size: int = 256
    num_blocks: int = 4
    num_attention_heads: int = 1
    key_size: int = 16
    value_size: int = 128
    attention_projection: str = "residual"

    def validate_attention(self):
        for name in ("num_blocks", "num_attention_heads", "key_size", "value_size"):
            if getattr(self, name) < 1:
                raise ValueError(f"`{name}` must be at least 1, got {getattr(self, name)}.")
        for name in ("key_size", "value_size"):
            if getattr(self, name) % self.num_attention_heads:
                raise ValueError(
                    f"`{name}` must be divisible by `num_attention_heads` ({self.num_attention_heads}), because every "
                    f"head gets an equal part, got {getattr(self, name)}."
                )
        if self.attention_projection not in ("residual", "lean"):
            raise ValueError(f"`attention_projection` must be 'residual' or 'lean', got {self.attention_projection!r}.")


__all__ = ["PixelSNAILConfig"]
