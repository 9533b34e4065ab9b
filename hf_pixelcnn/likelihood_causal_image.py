r"""
Output distributions, which give network outputs a meaning for the levels of a pixel; raster order, and the noise rule.

Each class has four things: the number of parameters it needs per pixel, `log_prob` for training and scoring all
dimensions in parallel, and of one dimension `level_logits`, the probabilities of all its levels, and `icdf`, the level
that a random number stands for.
"""

import math
from collections.abc import Sequence

import torch
import torch.nn.functional as F


def at_least_float32(x: torch.Tensor) -> torch.Tensor:
    return x if x.dtype == torch.float64 else x.float()


def log_one_minus_exp(x: torch.Tensor) -> torch.Tensor:
    """
    log(1 − e⁻ˣ) of x ≥ 0; finite, because an x that has underflowed counts as the smallest number.

    Of small x it is log x − x/2 + x²/24 (the rest is below x⁴/2880), because compiled code computes expm1 as e⁻ˣ − 1.
    """
    limit = 2**-10
    small = x.clamp(torch.finfo(x.dtype).tiny, limit)
    series = small.log() - small / 2 + small.square() / 24
    return torch.where(x < limit, series, torch.log(-torch.expm1(-x.clamp(min=limit))))


def to_raster(images: torch.Tensor) -> torch.Tensor:
    """`(batch, channels, height, width)` to `(batch, dims)` in raster order: by rows, then columns, then channels."""
    return images.permute(0, 2, 3, 1).flatten(1)


def from_raster(dims: torch.Tensor, shape: Sequence[int]) -> torch.Tensor:
    """`(batch, dims)` in raster order to images of `shape` `(batch, channels, height, width)`."""
    _, channels, height, width = shape
    return dims.view(-1, height, width, channels).permute(0, 3, 1, 2).contiguous()


def levels_from_noise(scores: torch.Tensor, noise: torch.Tensor) -> torch.Tensor:
    r"""
    The noise rule: the first level whose cumulative probability exceeds the number; if rounding leaves none, the last
    level that adds to it; -1 if no level has a probability.

    Args:
        scores (`torch.FloatTensor` of shape `(..., num_levels)`): Log-probabilities up to a constant.
        noise (`torch.DoubleTensor` of shape `(...)`): Numbers in [0, 1).

    Returns:
        `torch.LongTensor` of shape `(...)`.
    """
    cumulative = scores.softmax(-1, dtype=torch.float64).cumsum_(-1)
    below_all = cumulative[..., -1:] * (1 - 2**-53)  # the next number below; NaN where no level has a probability
    levels = torch.searchsorted(cumulative, torch.minimum(noise[..., None], below_all), right=True)
    return levels.masked_fill_(below_all.isnan(), -1)[..., 0]


class LevelConditional:
    """The levels of one dimension given its past: what samplers and the codec ask for."""

    def level_logits(
        self, parameters: torch.Tensor, channel: int, previous_channels: torch.Tensor | None = None
    ) -> torch.Tensor:
        r"""
        Normalised log-probabilities of all levels of one channel of one pixel.

        Args:
            parameters (`torch.Tensor` of shape `(..., num_channels)`, `(..., num_channels, num_levels)` or
                `(..., num_parameters)`): Parameters of the pixel, see [`~OutputDistribution.pixels`].
            channel (`int`):
                The channel asked for.
            previous_channels (`torch.LongTensor` of shape `(..., channel)`, *optional*):
                Levels of the earlier channels of the pixel. Mixtures need them; distributions whose network has seen
                them do not.

        Returns:
            `torch.FloatTensor` of shape `(..., num_levels)`, at least float32, whose exponentials sum to 1.
        """
        raise NotImplementedError

    def icdf(
        self,
        parameters: torch.Tensor,
        channel: int,
        noise: torch.Tensor,
        previous_channels: torch.Tensor | None = None,
        level_logits: torch.Tensor | None = None,
    ) -> torch.Tensor:
        r"""
        Levels by the noise rule, see [`levels_from_noise`]: the inverse of the cumulative distribution function.

        Args:
            parameters, channel, previous_channels: See [`~OutputDistribution.level_logits`].
            noise (`torch.DoubleTensor` of shape `(...)`): Numbers in [0, 1).
            level_logits (`torch.FloatTensor` of shape `(..., num_levels)`, *optional*): What that gave, if it is known.

        Returns:
            `torch.LongTensor` of shape `(...)`; -1 where no level has a probability, because parameters are not finite.
        """
        if level_logits is None:
            level_logits = self.level_logits(parameters, channel, previous_channels)
        return levels_from_noise(level_logits, noise)

    def draw_channels(
        self, parameters: torch.Tensor, noise: torch.Tensor, previous_channels: torch.Tensor
    ) -> torch.Tensor:
        r"""
        Levels of several channels of one pixel by the noise rule, one after the other.

        Args:
            parameters, previous_channels: See [`~OutputDistribution.level_logits`].
            noise (`torch.DoubleTensor` of shape `(n, ...)`): Numbers in [0, 1) of the next `n` channels.

        Returns:
            `torch.LongTensor` of shape `(..., n)`.
        """
        level = self.icdf(parameters, previous_channels.shape[-1], noise[0].contiguous(), previous_channels)[..., None]
        if len(noise) == 1:
            return level
        previous_channels = torch.cat((previous_channels, level), -1)
        return torch.cat((level, self.draw_channels(parameters, noise[1:], previous_channels)), -1)


class OutputDistribution(LevelConditional):
    r"""
    One distribution over the levels of every dimension.

    Args:
        num_channels (`int`): Channels of a pixel.
        num_levels (`int`): Levels of a dimension.
    """

    def __init__(self, num_channels: int, num_levels: int):
        self.num_channels = num_channels
        self.num_levels = num_levels

    @classmethod
    def from_config(cls, config) -> "OutputDistribution":
        """The distribution that a model's configuration describes."""
        return cls(config.num_channels, config.num_levels)

    @property
    def num_parameters(self) -> int:
        """Numbers per pixel that the network has to output."""
        raise NotImplementedError

    def from_outputs(self, outputs: torch.Tensor) -> torch.Tensor:
        """Arrange network outputs `(batch, num_parameters, height, width)` as parameters."""
        raise NotImplementedError

    def pixels(self, parameters: torch.Tensor) -> torch.Tensor:
        """Parameters with the pixels in front, `(batch, height, width, ...)`, as `level_logits` takes them."""
        raise NotImplementedError

    def log_prob(self, parameters: torch.Tensor, levels: torch.Tensor) -> torch.Tensor:
        """log p of every level in nats: `(batch, channels, height, width)`, at least float32."""
        raise NotImplementedError


class BernoulliOutput(OutputDistribution):
    """Two levels; the parameter is the log-odds of level 1. Parameters `(batch, channels, height, width)`."""

    @property
    def num_parameters(self):
        return self.num_channels

    def from_outputs(self, outputs):
        return outputs

    def pixels(self, parameters):
        return parameters.movedim(1, -1)

    def log_prob(self, parameters, levels):
        sign = levels.to(torch.int8) * 2 - 1  # p(1) = sigmoid(x), p(0) = sigmoid(-x)
        return F.logsigmoid(at_least_float32(parameters) * sign)

    def level_logits(self, parameters, channel, previous_channels=None):
        log_odds = at_least_float32(parameters[..., channel : channel + 1])
        return F.log_softmax(F.pad(log_odds, (1, 0)), dim=-1)  # log-odds of level 0 against itself are 0

    def icdf(self, parameters, channel, noise, previous_channels=None, level_logits=None):
        """Levels by the noise rule: 1 if the number is not below p(0)."""
        log_odds = parameters[..., channel].double()
        levels = (noise >= torch.sigmoid(-log_odds)).long()
        return levels.masked_fill_((log_odds < torch.inf).logical_not_(), -1)


class CategoricalOutput(OutputDistribution):
    """One logit for every level. Parameters `(batch, channels, height, width, num_levels)`."""

    @property
    def num_parameters(self):
        return self.num_channels * self.num_levels

    def from_outputs(self, outputs):
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

    def icdf(self, parameters, channel, noise, previous_channels=None, level_logits=None):
        """Levels by the noise rule, which normalises."""
        return levels_from_noise(at_least_float32(parameters[..., channel, :]), noise)


class LogisticMixtureOutput(OutputDistribution):
    r"""
    A mixture of logistic distributions over the pixel, each level being a bin of width 1 around its number.

    Component k gives level l of channel c the mass between the edges of its bin,

        p_k(l) = σ((l + ½ − μ) / s) − σ((l − ½ − μ) / s)

    where the lowest bin reaches down to −∞ and the highest up to ∞. In units of [-1, 1] the mean of a channel is linear
    in the levels of the earlier ones, with coefficients in (−1, 1), and no scale is below e⁻⁷. The channels of a pixel
    share the component, so they are dependent:

        p(c | earlier) = Σ_k w_k p_k(c),    w_k ∝ π_k Π_{c' < c} p_k(c')

    Edges are computed once, in units of levels, in which they are exact: neighbours share them, and the levels sum to
    1 in float32. A bin's mass is taken as σ(b) σ(−a) (1 − e^(a − b)), whose logarithm is exact however small it is, and
    gives a mean far away a gradient.

    Parameters `(batch, height, width, num_parameters)` of a pixel, in this order and in units of [-1, 1]: `M` logits
    of the components; `(num_channels, M)` means; `(num_channels, M)` logarithms of scales; `(pairs, M)` numbers whose
    tanh are the coefficients, the pairs being green from red, blue from red, blue from green: 10 M for three channels.

    Args:
        num_channels (`int`), num_levels (`int`): As for all distributions.
        num_components (`int`): Components, `num_logistic_mix` in a configuration.

    Reference: Salimans et al. 2017, PixelCNN++, sections 2.1 and 2.2, https://huggingface.co/papers/1701.05517
    """

    log_scales = (-7.0, 80.0)  # the floor of the paper, and a number whose inverse float32 can hold

    def __init__(self, num_channels: int, num_levels: int, num_components: int):
        super().__init__(num_channels, num_levels)
        self.num_components = num_components
        self.half_range = (num_levels - 1) / 2

    @classmethod
    def from_config(cls, config):
        return cls(config.num_channels, config.num_levels, config.num_logistic_mix)

    @property
    def sizes(self) -> list[int]:
        """Numbers of logits, means, log-scales and coefficients of one component."""
        return [1, self.num_channels, self.num_channels, self.num_channels * (self.num_channels - 1) // 2]

    @property
    def num_parameters(self):
        return self.num_components * sum(self.sizes)

    def from_outputs(self, outputs):
        return outputs.movedim(1, -1)

    def pixels(self, parameters):
        return parameters

    def components(self, parameters: torch.Tensor) -> tuple[torch.Tensor, ...]:
        """Logits `(..., 1, M)`, means, logarithms of scales and coefficients `(..., channels or pairs, M)`."""
        parts = at_least_float32(parameters).unflatten(-1, (sum(self.sizes), self.num_components))
        return parts.split(self.sizes, dim=-2)

    def centred(self, levels: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
        """Levels counted from the middle of their range, which is 0 in [-1, 1]."""
        return levels.to(dtype) - self.half_range

    def channel_means(self, means, coefficients, previous: torch.Tensor) -> torch.Tensor:
        """Means in centred levels `(..., n + 1, M)` of the first channels, given n centred levels `(..., n)`."""
        count = previous.shape[-1] + 1
        means = means[..., :count, :] * self.half_range
        for c in range(1, count):
            pairs = slice(c * (c - 1) // 2, c * (c + 1) // 2)
            means[..., c, :] += (coefficients[..., pairs, :].tanh() * previous[..., :c, None]).sum(-2)
        return means

    def inverse_scales(self, log_scales: torch.Tensor) -> torch.Tensor:
        """1 / scale in units of levels, within what the paper and the dtype allow."""
        return torch.exp(-math.log(self.half_range) - log_scales.clamp(*self.log_scales))

    def level_log_mass(
        self, levels: torch.Tensor, means: torch.Tensor, inverse_scales: torch.Tensor, log_widths: torch.Tensor
    ) -> torch.Tensor:
        """
        log p_k of centred levels `(..., 1)` under components `(..., M)`; `log_widths` are log(1 − e^(−1 / scale)).
        """
        is_lowest, is_highest = levels == -self.half_range, levels == self.half_range
        above = F.logsigmoid((levels + 0.5 - means) * inverse_scales).masked_fill(is_highest, 0)
        below = F.logsigmoid((means - (levels - 0.5)) * inverse_scales).masked_fill(is_lowest, 0)
        return above + below + log_widths.masked_fill(is_lowest | is_highest, 0)

    def log_prob(self, parameters, levels):
        logits, means, log_scales, coefficients = self.components(parameters)
        levels = self.centred(levels.permute(0, 2, 3, 1), means.dtype)  # (batch, height, width, channels)
        means = self.channel_means(means, coefficients, levels[..., :-1])
        inverse_scales = self.inverse_scales(log_scales)
        log_widths = log_one_minus_exp(inverse_scales)
        log_mass = self.level_log_mass(levels[..., None], means, inverse_scales, log_widths)  # (..., channels, M)
        earlier = F.pad(log_mass[..., :-1, :], (0, 0, 1, 0)).cumsum(-2)
        log_weights = (logits + earlier).log_softmax(-1)
        return torch.logsumexp(log_weights + log_mass, dim=-1).permute(0, 3, 1, 2)

    def component_logistics(self, parameters, channel: int, previous_channels) -> tuple[torch.Tensor, ...]:
        """Of one channel, given the earlier ones: log w + constant, means in centred levels, 1 / scales `(..., M)`."""
        logits, means, log_scales, coefficients = self.components(parameters)
        inverse_scales = self.inverse_scales(log_scales[..., : channel + 1, :])
        log_weights = logits[..., 0, :]
        if channel == 0:
            return log_weights, means[..., 0, :] * self.half_range, inverse_scales[..., 0, :]
        previous = self.centred(previous_channels, means.dtype)
        means = self.channel_means(means, coefficients, previous)
        earlier_scales = inverse_scales[..., :-1, :]
        log_widths = log_one_minus_exp(earlier_scales)
        log_mass = self.level_log_mass(previous[..., None], means[..., :-1, :], earlier_scales, log_widths)
        return log_weights + log_mass.sum(-2), means[..., channel, :], inverse_scales[..., channel, :]

    def level_logits(self, parameters, channel, previous_channels=None):
        log_weights, mean, inverse_scale = self.component_logistics(parameters, channel, previous_channels)
        inverse_scale = inverse_scale[..., None]

        # The sum over components of w σ(b) σ(-a) (1 - e^(a - b)). An edge z gives σ(±z) = e^min(±z, 0) σ(|z|), of which
        # the exponents and the logarithm of the rest are summed up first, and their highest value kept apart.
        edges = torch.arange(self.num_levels + 1, device=mean.device, dtype=mean.dtype) - (self.half_range + 0.5)
        z = (edges - mean[..., None]).mul_(inverse_scale)  # (..., M, num_levels + 1)
        z[..., 0], z[..., -1] = -torch.inf, torch.inf
        rest = z.abs().clamp_(max=50).sigmoid_()  # beyond 50 it is 1
        exponents = z[..., 1:].clamp(max=0).sub_(z[..., :-1].clamp(min=0))
        width = log_one_minus_exp(inverse_scale)
        exponents += width + log_weights.log_softmax(-1)[..., None]
        exponents[..., :1] -= width  # the outermost bins
        exponents[..., -1:] -= width
        highest = exponents.detach().amax(-2, keepdim=True)
        terms = (exponents - highest).clamp_(min=-80).exp_()  # less adds nothing, and takes long
        return (terms * rest[..., 1:] * rest[..., :-1]).sum(-2).log_().add_(highest[..., 0, :])

    def icdf(self, parameters, channel, noise, previous_channels=None, level_logits=None):
        """Levels by the noise rule, see `draw_channels`."""
        if previous_channels is None:
            previous_channels = noise.new_zeros(*noise.shape, 0, dtype=torch.long)
        return self.draw_channels(parameters, noise[None], previous_channels)[..., 0]

    def draw_channels(self, parameters, noise, previous_channels):
        """
        Levels by the noise rule, without the probabilities of all levels; what channels share is computed once. All in
        float64; parameters that are not finite leave no channel a level.
        """
        logits, means, log_scales, coefficients = self.components(parameters.double())
        inverse_scales = self.inverse_scales(log_scales)
        first, last = previous_channels.shape[-1], previous_channels.shape[-1] + len(noise) - 1
        log_widths = torch.log(-torch.expm1(-inverse_scales)).unbind(-2) if last > 0 else ()
        means, inverse_scales = (means * self.half_range).unbind(-2), inverse_scales.unbind(-2)
        coefficients = coefficients.tanh().unbind(-2)
        noise = (noise * (1 - 2**-50)).contiguous()  # below the sum of all weights, which rounding may leave below 1
        log_weights, weights = logits[..., 0, :], logits
        drawn, centred = [], list(self.centred(previous_channels, logits.dtype)[..., None].unbind(-2))
        for c in range(last + 1):
            mean, inverse_scale = means[c], inverse_scales[c]
            for k in range(c):
                mean = torch.addcmul(mean, coefficients[c * (c - 1) // 2 + k], centred[k])
            log_weights = torch.addcmul(log_weights, mean, inverse_scale, value=0)  # NaN where these are not finite
            if c >= first:
                weights = log_weights.softmax(-1)
                drawn.append(self.first_above(noise[c - first], weights, mean, inverse_scale))
                centred.append(self.centred(drawn[-1], mean.dtype).unsqueeze(-1))
            if c < last:
                log_weights = log_weights + self.level_log_mass(centred[c], mean, inverse_scale, log_widths[c])
        return torch.stack(drawn, -1).masked_fill_(weights[..., :1].isnan(), -1)

    def first_above(self, noise: torch.Tensor, weights, means, inverse_scales) -> torch.Tensor:
        r"""
        The first level below whose upper edge lies more mass than a number, of numbers `(...)` and components
        `(..., M)`. Below the edge e it is Σ_k w_k σ((e - μ_k) / s_k). It is compared at every n-th edge, then at those
        between two of these; n² is at least the number of levels. A few numbers are compared at all edges at once.
        """
        means = (means + (self.half_range + 0.5)).unsqueeze(-1)  # now the edge below a level is at its number
        inverse_scales, weights, noise = (x.unsqueeze(-1) for x in (inverse_scales, weights, noise))

        def count_below(edges: torch.Tensor) -> torch.Tensor:
            cumulative = (edges - means).mul_(inverse_scales).sigmoid_().mul_(weights).sum(-2)
            return torch.searchsorted(cumulative, noise, right=True)

        options = {"dtype": means.dtype, "device": means.device}
        if noise.numel() * self.num_levels <= 1024:
            return count_below(torch.arange(1, self.num_levels, **options)).squeeze(-1)
        stride = math.isqrt(self.num_levels - 1) + 1
        level = stride * count_below(torch.arange(stride, self.num_levels, stride, **options))
        level = level + count_below(level.unsqueeze(-1) + torch.arange(1, stride, **options))
        return level.clamp_(max=self.num_levels - 1).squeeze(-1)


class GuidedConditional(LevelConditional):
    r"""
    The levels of one dimension under guidance: log-probabilities without a class plus `scale` times what the class adds
    to them, normalised. The parameters of a batch are those with classes, then those without.

    Args:
        distribution ([`OutputDistribution`]): Of the model.
        scale (`float`): The guidance scale; 1 is the distribution with classes.
    """

    def __init__(self, distribution: OutputDistribution, scale: float):
        self.distribution, self.scale = distribution, scale

    def level_logits(self, parameters, channel, previous_channels=None):
        both = None if previous_channels is None else torch.cat((previous_channels, previous_channels))
        logits = self.distribution.level_logits(parameters, channel, both)
        with_class, without = logits.chunk(2)
        return (without + self.scale * (with_class - without)).log_softmax(-1)


OUTPUT_DISTRIBUTIONS = {
    "bernoulli": BernoulliOutput,
    "categorical": CategoricalOutput,
    "logistic_mixture": LogisticMixtureOutput,
}


def distribution_of(config) -> OutputDistribution:
    """The distribution that a model's configuration names, with the sizes it says."""
    return OUTPUT_DISTRIBUTIONS[config.output_distribution].from_config(config)


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


__all__ = [
    "OUTPUT_DISTRIBUTIONS",
    "BernoulliOutput",
    "CategoricalOutput",
    "GuidedConditional",
    "LevelConditional",
    "LogisticMixtureOutput",
    "OutputDistribution",
    "bits_per_dim",
    "distribution_of",
    "from_raster",
    "levels_from_noise",
    "to_raster",
]
