"""Which dimensions of an image a prediction depends on."""

import copy

import torch

from .checks_causal_image import drawing_network
from .configuration_causal_image import as_height_and_width, is_int
from .masking_causal_image import CausalConv2d

# What the pixels of an image are to one that is predicted, and colours for them.
REGIONS = {
    "future": "#ffffff",
    "past out of reach": "#d9dde3",
    "receptive field": "#4c8eda",
    "blind spot": "#e4572e",
    "predicted pixel": "#1d2433",
}
GRADIENT_AT_PIXEL = 1e200  # far above 1, so that even hundreds of layers do not round a gradient down to 0


@torch.no_grad()
def make_positive(network: torch.nn.Module):
    """One positive value for all weights of a layer, such that its outputs are a tenth of its inputs and a little."""
    for parameter in network.parameters():
        parameter.fill_(0.1 / parameter[0].numel() if parameter.ndim > 1 else 0.1)


def read_by_level_logits(distribution, shape: torch.Size, channel: int) -> tuple[torch.Tensor, torch.Tensor]:
    r"""
    What the distribution of one channel takes in, found out on random parameters.

    Args:
        distribution ([`OutputDistribution`]): Of a model.
        shape (`torch.Size`): Of the parameters of a pixel, with a batch of 1.
        channel (`int`): The channel.

    Returns:
        `torch.BoolTensor` of that shape: the parameters of the pixel that it reads; and `torch.BoolTensor` of shape
        `(channels,)`: the earlier channels of the pixel whose levels it reads.
    """
    generator = torch.Generator().manual_seed(0)
    parameters = torch.randn(shape, dtype=torch.float64, generator=generator).requires_grad_()
    previous = torch.full((1, channel), distribution.num_levels - 1)
    logits = distribution.level_logits(parameters, channel, previous)
    weights = torch.rand(logits.shape, dtype=torch.float64, generator=generator)  # so that their sum is no constant
    (gradient,) = torch.autograd.grad((weights * logits).sum(), parameters)
    channels = torch.zeros(distribution.num_channels, dtype=torch.bool)
    for earlier in range(channel):
        changed = previous.clone()
        changed[:, earlier] = 0
        channels[earlier] = not torch.equal(distribution.level_logits(parameters, channel, changed), logits)
    return gradient != 0, channels


def receptive_field(model, row: int, column: int, channel: int = 0) -> torch.Tensor:
    r"""
    The dimensions that the distribution of one dimension depends on, in an image of `config.image_size`.

    It is the field of the architecture, exactly, and not what trained weights happen to use: a network of the same
    configuration gets positive weights and reads a positive image, in float64. Then a dimension is in the field if and
    only if the gradient with respect to it is not 0:

    - Where no path leads, every product of derivatives has a factor that is 0 (a masked weight, the zero padding), so
      the gradient is 0 exactly.
    - Where a path leads, nothing cancels it. All features are positive, and every layer increases in each of them: ReLU
      and ELU have slope 1 there; tanh(a) σ(b) and a σ(b) increase in a > 0 and in b; in concatenated ELUs x and -x meet
      the same weight, and the slope 1 - e⁻ˣ of their sum is positive; σ(f) c + σ(i) tanh(g) and σ(o) tanh(c) of an LSTM
      increase in all of these where c, g > 0; attention that is the same for all pixels increases in their values. Sums
      of positive terms are positive, and weights are small enough that no tanh saturates.

    What a distribution reads of its own pixel besides the network's outputs, as mixtures do, is also in the field.

    Args:
        model: A `...ForCausalImageModeling` of any family. It is left as it is; its weights play no part.
        row (`int`), column (`int`), channel (`int`, defaults to 0): The dimension that is predicted, counted from 0.

    Returns:
        `torch.BoolTensor` of shape `(channels, height, width)`, True inside the field.

    Raises:
        ValueError, TypeError: If there is no such dimension, or `model` is of another kind.

    ```python
    >>> field = hf_pixelcnn.receptive_field(model, row=20, column=14)
    >>> field[0, 20].nonzero().flatten()  # columns that are seen in its own row
    ```
    """
    model = drawing_network(model)
    config = copy.deepcopy(model.config)
    height, width = as_height_and_width(config.image_size)
    for name, value, size in [
        ("row", row, height),
        ("column", column, width),
        ("channel", channel, config.num_channels),
    ]:
        if not (is_int(value) and 0 <= value < size):
            raise ValueError(f"`{name}` must be 0 ... {size - 1}, got {value!r}.")
    with torch.random.fork_rng(devices=[]), torch.device("cpu"), torch.inference_mode(False), torch.enable_grad():
        network = type(model)(config).double().eval()
        for module in network.modules():
            if isinstance(module, CausalConv2d):
                module.fold_weight_norm()  # direction and gain are another way to write the same weights
        make_positive(network)
        network.model.make_monotone()
        features = network.model.encoding.features_per_channel
        image = torch.ones(1, config.num_channels * features, height, width, dtype=torch.float64, requires_grad=True)
        network.model.encoding.register_forward_hook(lambda module, args, output: image)
        levels = torch.zeros(1, config.num_channels, height, width, dtype=torch.long)
        class_ids = torch.tensor([-1]) if config.num_classes else None
        parameters = network(levels, class_ids=class_ids, return_dict=True).logits
        pixel = network.output_distribution.pixels(parameters)[:, row, column]
        read, own_channels = read_by_level_logits(network.output_distribution, pixel.shape, channel)
        (gradient,) = torch.autograd.grad(pixel[read].sum() * GRADIENT_AT_PIXEL, image)
    field = (gradient[0] != 0).unflatten(0, (config.num_channels, features)).any(1)
    field[:, row, column] |= own_channels
    return field


def regions_of(seen: torch.Tensor, row: int, column: int) -> torch.Tensor:
    r"""
    What each pixel of an image is to a predicted one.

    Args:
        seen (`torch.BoolTensor` of shape `(height, width)`): The pixels that the prediction sees.
        row (`int`), column (`int`): The predicted pixel.

    Returns:
        `torch.LongTensor` of shape `(height, width)`: Indices into `REGIONS`. The blind spot is the part of the past
        that lies within reach, no higher and no further to either side than what is seen, and is not seen.
    """
    height, width = seen.shape
    past = torch.arange(height * width).view(height, width) < row * width + column
    found = past.long()
    rows, columns = seen.nonzero().T
    if len(rows):
        reach = int((columns - column).abs().max())
        within_reach = found[int(rows.min()) :, max(0, column - reach) : column + reach + 1]
        within_reach *= list(REGIONS).index("blind spot")
    found[seen] = list(REGIONS).index("receptive field")
    found[row, column] = list(REGIONS).index("predicted pixel")
    return found


__all__ = ["REGIONS", "receptive_field", "regions_of"]
