from huggingface_hub.dataclasses import strict

from .configuration_causal_image import CausalImageModelingConfig


@strict
class PixelRNNConfig(CausalImageModelingConfig):
    r"""
    Configuration of a PixelRNN: layers of LSTM cells, one per pixel, that hand their states on from pixel to pixel.

    The fields are those of [`CausalImageModelingConfig`] and those below. `num_hidden_layers` counts layers of LSTMs,
    which have `hidden_size // 2` features each, so `hidden_size` must be divisible by `2 * num_channel_groups`. The
    defaults describe the network that the paper has for binary MNIST, with 69,377 parameters and 64 for the pixel that
    it does not see (see `has_blind_spot`).

    Args:
        recurrence (`str`, defaults to `"diagonal_bilstm"`):
            `"diagonal_bilstm"`: states go from the left and from the right to the pixel, and down, so that all of the
            past is seen. `"row_lstm"`: states go down in a cone; fewer steps, so it is faster.
        first_kernel_size (`int`, defaults to 7):
            Odd size of the masked kernel of the first layer.
        has_blind_spot (`bool`, defaults to `False`):
            Whether a Diagonal BiLSTM is that of the paper, which does not see the last pixel of the row above, far from
            the right edge: what comes from the right knows only the pixels to the left of each, not the pixel itself.
            By default the first layer's states from the right also read it.

    Reference: van den Oord et al. 2016, Pixel Recurrent Neural Networks, sections 3.1-3.3,
    https://huggingface.co/papers/1601.06759

    ```python
    >>> from hf_pixelcnn import PixelRNNConfig, PixelRNNForCausalImageModeling

    >>> PixelRNNForCausalImageModeling(PixelRNNConfig(has_blind_spot=True)).num_parameters()
    69377
    ```
    """

    model_type = "pixelrnn"

    hidden_size: int = 32
    num_hidden_layers: int = 7
    head_hidden_size: int = 32
    recurrence: str = "diagonal_bilstm"
    first_kernel_size: int = 7
    has_blind_spot: bool = False

    def validate_recurrence(self):
        if self.recurrence not in ("diagonal_bilstm", "row_lstm"):
            raise ValueError(f"`recurrence` must be 'diagonal_bilstm' or 'row_lstm', got {self.recurrence!r}.")
        if self.has_blind_spot and self.recurrence != "diagonal_bilstm":
            raise ValueError(
                "`has_blind_spot` is about the last pixel of the row above in 'diagonal_bilstm'; a 'row_lstm' sees a "
                "cone, and has no such variant."
            )

    def validate_first_kernel(self):
        size = self.first_kernel_size
        if size < 3 or size % 2 == 0:
            raise ValueError(f"`first_kernel_size` must be odd and at least 3, got {size}.")

    def validate_channel_groups(self):
        super().validate_channel_groups()
        self.check_half_splits(
            "LSTMs have hidden_size // 2 features, and each of their gates is split into one group per channel"
        )


__all__ = ["PixelRNNConfig"]
