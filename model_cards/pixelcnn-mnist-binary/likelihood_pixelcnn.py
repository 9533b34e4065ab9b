r"""
Output distributions: what the numbers that a network puts out say about the levels of a pixel.

Each class has three things: the number of parameters it needs a pixel, `log_prob` for training and scoring all
dimensions in parallel, and `level_logits`, through which everything goes that samples or codes one dimension.
"""

import math

import torch
import torch.nn.functional as F


def at_least_float32(x: torch.Tensor) -> torch.Tensor:
    return x if x.dtype == torch.float64 else x.float()


class OutputDistribution:
    r"""
    One distribution over the levels of every dimension.

    Args:
        num_channels (`int`): Channels of a pixel.
        num_levels (`int`): Levels of a dimension.
    """

    def __init__(self, num_channels: int, num_levels: int):
        self.num_channels = num_channels
        self.num_levels = num_levels

    @property
    def num_parameters(self) -> int:
        """Numbers a pixel that the network has to put out."""
        raise NotImplementedError

    def parameters(self, outputs: torch.Tensor) -> torch.Tensor:
        """Arrange network outputs `(batch, num_parameters, height, width)` as parameters."""
        raise NotImplementedError

    def pixels(self, parameters: torch.Tensor) -> torch.Tensor:
        """Parameters with the pixels in front, `(batch, height, width, ...)`, as `level_logits` takes them."""
        raise NotImplementedError

    def log_prob(self, parameters: torch.Tensor, levels: torch.Tensor) -> torch.Tensor:
        """log p of every level in nats: `(batch, channels, height, width)`, at least float32."""
        raise NotImplementedError

    def level_logits(
        self, parameters: torch.Tensor, channel: int, previous_channels: torch.Tensor | None = None
    ) -> torch.Tensor:
        r"""
        Normalised log-probabilities of all levels of one channel of one pixel.

        Args:
            parameters (`torch.Tensor` of shape `(..., num_channels)`, or with more trailing dimensions):
                Parameters of the pixel, see [`~OutputDistribution.pixels`].
            channel (`int`):
                The channel asked for.
            previous_channels (`torch.LongTensor` of shape `(..., channel)`, *optional*):
                Levels of the earlier channels of the pixel; distributions whose network has seen them ignore it.

        Returns:
            `torch.FloatTensor` of shape `(..., num_levels)`, at least float32, whose exponentials sum to 1.
        """
        raise NotImplementedError


class BernoulliOutput(OutputDistribution):
    """Two levels; the parameter is the log-odds of level 1. Parameters `(batch, channels, height, width)`."""

    @property
    def num_parameters(self):
        return self.num_channels

    def parameters(self, outputs):
        return outputs

    def pixels(self, parameters):
        return parameters.movedim(1, -1)

    def log_prob(self, parameters, levels):
        sign = levels.to(torch.int8) * 2 - 1  # p(1) = sigmoid(x), p(0) = sigmoid(-x)
        return F.logsigmoid(at_least_float32(parameters) * sign)

    def level_logits(self, parameters, channel, previous_channels=None):
        log_odds = at_least_float32(parameters[..., channel : channel + 1])
        return F.log_softmax(F.pad(log_odds, (1, 0)), dim=-1)  # log-odds of level 0 against itself are 0


class CategoricalOutput(OutputDistribution):
    """One logit for every level. Parameters `(batch, channels, height, width, num_levels)`."""

    @property
    def num_parameters(self):
        return self.num_channels * self.num_levels

    def parameters(self, outputs):
        return outputs.unflatten(1, (self.num_channels, self.num_levels)).movedim(2, -1)

    def pixels(self, parameters):
        return parameters.movedim(1, 3)

    def log_prob(self, parameters, levels):
        logits = self.pixels(parameters)  # (batch, height, width, channels, levels): memory order of the head
        levels = levels.permute(0, 2, 3, 1)
        nll = F.cross_entropy(at_least_float32(logits).flatten(0, 3), levels.flatten().long(), reduction="none")
        return -nll.view(levels.shape).permute(0, 3, 1, 2)

    def level_logits(self, parameters, channel, previous_channels=None):
        return F.log_softmax(at_least_float32(parameters[..., channel, :]), dim=-1)


OUTPUT_DISTRIBUTIONS = {"bernoulli": BernoulliOutput, "categorical": CategoricalOutput}


def bits_per_dim(nats: float, num_dims: int) -> float:
    r"""
    Convert a negative log-likelihood in nats, summed over `num_dims` dimensions, to bits per dimension.

    Returns:
        `float`: `nats / (num_dims * ln 2)`; 8.0 for a uniform model of 8-bit images.

    Raises:
        ValueError: If `num_dims` is not positive.
    """
    if num_dims <= 0:
        raise ValueError(f"`num_dims` must be positive, got {num_dims}.")
    return nats / (num_dims * math.log(2))


__all__ = ["OUTPUT_DISTRIBUTIONS", "BernoulliOutput", "CategoricalOutput", "OutputDistribution", "bits_per_dim"]
