"""What the configurations of all families have in common, those of masked kernels, and those of gated blocks."""

import difflib
import math
from collections import Counter
from collections.abc import Iterable
from dataclasses import Field, field, fields
from typing import TYPE_CHECKING, TypeGuard

from huggingface_hub.dataclasses import strict
from transformers import PreTrainedConfig
from transformers.utils import logging

MAX_SCALED_LEVELS = 256
MAX_EMBEDDED_LEVELS = 16384
NO_NAMES = {0: "LABEL_0", 1: "LABEL_1"}  # what transformers calls the classes of a model that says nothing about them
FORMAT_VERSION = 1  # of `config.json`; raised when files written from then on mean something else to older code

logger = logging.get_logger(f"transformers.{__name__}")  # where `transformers.logging.set_verbosity` reaches


def is_int(value: object) -> TypeGuard[int]:
    """Whether `value` is an int that counts or numbers something; `True` and `False` do not."""
    return isinstance(value, int) and not isinstance(value, bool)


class SavedPipelines(dict):
    """
    The pipelines whose code is saved with a model, by task. `pipeline(model=...)` reads its task off here, and asks for
    trust in code for a task that is found here: those that are registered need none.
    """

    def __contains__(self, task):
        from transformers.pipelines import PIPELINE_REGISTRY

        return super().__contains__(task) and task not in PIPELINE_REGISTRY.supported_tasks


def as_height_and_width(image_size: int | list[int] | tuple[int, ...]) -> list[int]:
    r"""
    `[height, width]` of an image size, which may be one number for both.

    Raises:
        ValueError: If `image_size` is neither a positive int nor two of them.
    """
    size = list(image_size) if isinstance(image_size, list | tuple) else [image_size, image_size]
    if len(size) != 2 or not all(is_int(length) and length > 0 for length in size):
        raise ValueError(f"`image_size` must be a positive int or [height, width], got {image_size!r}.")
    return size


def names_by_id(label2id: dict[str, int]) -> dict[int, str]:
    """`id2label` of a `label2id`, in the order of the ids."""
    return {int(class_id): name for name, class_id in sorted(label2id.items(), key=lambda item: int(item[1]))}


def agreed_num_classes(
    num_classes: int | None = None, num_labels: int | None = None, id2label: dict | None = None
) -> int | None:
    r"""
    The number of classes that was asked for in any of three ways, or None.

    Raises:
        ValueError: If `num_labels` is not a number of classes, or the ways contradict each other.
    """
    if num_labels is not None and (not is_int(num_labels) or num_labels < 0):
        raise ValueError(f"`num_labels` must be an int of at least 0, the number of classes, got {num_labels!r}.")
    counts = {"num_classes": num_classes, "num_labels": num_labels, "id2label": len(id2label) if id2label else None}
    counts = {name: count for name, count in counts.items() if count is not None}
    if len(set(counts.values())) > 1:
        given = ", ".join(f"`{name}` {count}" for name, count in counts.items())
        raise ValueError(f"The numbers of classes contradict each other: {given}. One of them is enough.")
    return next(iter(counts.values()), None)


def check_same_names(id2label: dict | None, label2id: dict | None):
    """Raise if both are given and give the classes different names."""
    if id2label and label2id and {name: int(class_id) for class_id, name in id2label.items()} != label2id:
        raise ValueError(
            f"`id2label` and `label2id` contradict each other: {id2label} and {label2id}. `id2label` is enough."
        )


def check_format_version(version: object):
    """Raise unless a config with this `format_version` means what this code takes it to mean."""
    if not is_int(version):
        raise ValueError(f"`format_version` of a saved config must be an int, got {version!r}.")
    if version > FORMAT_VERSION:
        raise ValueError(
            f"The saved config has `format_version` {version}; this version of hf_pixelcnn "
            f"reads up to {FORMAT_VERSION}. Update the package."
        )


@strict
class CausalImageModelingConfig(PreTrainedConfig):
    r"""
    Base configuration of models that factorise p(image) over the dimensions of an image in raster order.

    Args:
        image_size (`int` or `[height, width]`, defaults to 28):
            Size that `generate` draws by default; stored as `[height, width]`. The networks are fully convolutional
            and accept any other size.
        num_channels (`int`, defaults to 1):
            Colour channels; within a pixel they are predicted in order (R, then G, then B).
        num_levels (`int`, defaults to 2):
            Values `0 ... num_levels - 1` of one dimension: 2 to 256, up to 16,384 with `input_encoding="embedding"`.
        hidden_size (`int`):
            Features of the residual stream. Divisible by `num_channel_groups`.
        num_hidden_layers (`int`):
            Depth; what counts as one layer is said by each family.
        head_hidden_size (`int`):
            Features of the 1×1 layers between residual stream and output. Divisible by `num_channel_groups`.
        num_head_layers (`int`, defaults to 2):
            Number of those 1×1 layers; 0 connects the output to the residual stream.
        dropout (`float`, defaults to 0.0):
            Probability with which a feature of a residual branch is dropped in training.
        num_classes (`int`, defaults to 0):
            Classes of a class-conditional model, 0 for none. Above 0 it sets `id2label` and `label2id`, to the names in
            either that is given. Where it is not given, `num_labels` or those names say how many there are; the two
            names `LABEL_0` and `LABEL_1` alone, which transformers gives every config, do not.
        output_distribution (`str`, *optional*):
            `"bernoulli"` (two levels only), `"categorical"` or `"logistic_mixture"`. Defaults to `"bernoulli"` for two
            levels and to `"categorical"` for more.
        num_logistic_mix (`int`, defaults to 10):
            Components of `"logistic_mixture"`.
        input_encoding (`str`, defaults to `"scaled"`):
            `"scaled"` maps levels to [-1, 1]; `"embedding"` gives every level of every channel a learned vector, for
            symbols without an order such as VQ-VAE codes.
        format_version (`int`, defaults to 1):
            Version of the meaning of the fields and weights; a saved model of a newer one is refused.
        class_dropout (`float`, *optional*):
            Share of training images that were shown without their class, which guidance and class -1 need: 0 for a
            model that has seen none, `None` where nobody knows. [`~hf_pixelcnn.training.PixelCNNTrainer`] writes it.
        class_prior (list of `float` or `"learned"`, *optional*):
            Read by `...ForImageClassification` alone, like the two fields below: probability of each class before its
            image is seen. Defaults to equal ones; `"learned"` makes it a parameter, which starts there.
        class_temperature (`float`, defaults to 1.0):
            Divides the log-probabilities of classes; above 1 it makes them less certain.
        generative_weight (`float`, defaults to 0.5):
            Share of the generative term in the loss of a classifier, 0 to 1; the rest is cross-entropy.

    As in transformers, other keywords are kept and have no effect; one that is nearly a field gives a warning.

    Raises:
        ValueError: If `num_labels` is no number of classes, or another one than `num_classes`.
        huggingface_hub.errors.StrictDataclassError: If a field has the wrong type or a value that no network can be
            built from; the message names the field, the value and what would work.
    """

    image_size: int | list[int] | tuple[int, ...] = 28
    num_channels: int = 1
    num_levels: int = 2
    hidden_size: int = 64
    num_hidden_layers: int = 5
    head_hidden_size: int = 64
    num_head_layers: int = 2
    dropout: float | int = 0.0
    num_classes: int = 0
    output_distribution: str | None = None
    num_logistic_mix: int = 10
    input_encoding: str = "scaled"
    format_version: int = FORMAT_VERSION
    class_dropout: float | int | None = None
    class_prior: list[float | int] | tuple[float | int, ...] | str | None = None
    class_temperature: float | int = 1.0
    generative_weight: float | int = 0.5

    if TYPE_CHECKING:  # `__post_init__` makes these two wherever they are not given
        id2label: dict[int, str] = field(default_factory=dict)
        label2id: dict[str, int] = field(default_factory=dict)

    # Fields of ours that say nothing about the distribution of an image whose size and class are given.
    fields_without_effect_on_likelihood = frozenset(
        {
            "image_size",
            "dropout",
            "format_version",
            "class_dropout",
            "class_prior",
            "class_temperature",
            "generative_weight",
        }
    )

    def __post_init__(self, **kwargs):
        size = self.image_size
        self.image_size = list(size) if isinstance(size, list | tuple) else [size, size]
        if isinstance(self.class_prior, tuple):
            self.class_prior = list(self.class_prior)
        if self.output_distribution is None:
            self.output_distribution = "bernoulli" if self.num_levels == 2 else "categorical"
        self.settle_names()
        if "custom_pipelines" in kwargs:
            kwargs["custom_pipelines"] = SavedPipelines(kwargs["custom_pipelines"])
        self.settle_num_classes(kwargs.pop("num_labels", None))
        if not kwargs.pop("_is_saved", False):
            self.warn_of_misspelt(kwargs)
        if self.num_classes > 0 and self.id2label is None:
            kwargs["num_labels"] = self.num_classes
        super().__post_init__(**kwargs)
        if self.num_classes > 0:
            self.label2id = {name: class_id for class_id, name in self.id2label.items()}

    def settle_names(self):
        """Let `id2label` be the names that were given, whichever way; None until transformers makes some."""
        if self.id2label is None and self.label2id:
            self.id2label = names_by_id(self.label2id)
        if self.id2label is not None and {int(key): name for key, name in self.id2label.items()} == NO_NAMES:
            self.id2label = None  # pyright: ignore[reportAttributeAccessIssue]

    def settle_num_classes(self, num_labels: int | None):
        """Let `num_classes` say how many there are, whichever way that was given."""
        if self.num_classes == 0:
            self.num_classes = agreed_num_classes(num_labels=num_labels, id2label=self.id2label) or 0
        else:
            agreed_num_classes(num_classes=self.num_classes, num_labels=num_labels)

    @classmethod
    def from_dict(cls, config_dict, **kwargs):
        r"""
        As in transformers, but fields given as keywords are checked together with the saved ones. Another number of
        classes, by `num_classes`, `num_labels` or `id2label`, drops the saved names of classes.

        Raises:
            ValueError: If `config_dict` was written by a newer version of this code, or the keywords contradict each
                other.
        """
        check_format_version(config_dict.get("format_version", FORMAT_VERSION))
        overrides = {field.name: kwargs.pop(field.name) for field in fields(cls) if field.name in kwargs}
        if overrides.get("label2id") and not overrides.get("id2label"):
            overrides["id2label"] = names_by_id(overrides["label2id"])
        wanted = {name: overrides.get(name) for name in ("num_classes", "id2label")}
        num_classes = agreed_num_classes(**wanted, num_labels=kwargs.pop("num_labels", None))
        check_same_names(overrides.get("id2label"), overrides.get("label2id"))
        saved = config_dict.get("num_classes")
        if saved == 0 or num_classes not in (None, saved):  # the names are no one's, or other classes'
            config_dict = {
                key: x for key, x in config_dict.items() if key not in ("id2label", "label2id", "num_labels")
            }
        if num_classes is not None:
            overrides["num_classes"] = num_classes
        return super().from_dict({**config_dict, **overrides, "_is_saved": True}, **kwargs)

    @classmethod
    def warn_of_misspelt(cls, names: Iterable[str]):
        """Warn of keywords that are no fields, which a config keeps as transformers does, but nearly: a slip."""
        known = [field.name for field in cls.own_fields()]
        for name in names:
            if near := difflib.get_close_matches(name, known, n=1, cutoff=0.8):
                logger.warning_once(
                    f"{cls.__name__} has no field `{name}`: it has no effect. The nearest is `{near[0]}`."
                )

    @property
    def num_channel_groups(self) -> int:
        """
        Groups that features are split into, so that the network predicts a channel from the earlier ones of its pixel:
        one per channel; a single one with a mixture, which joins the channels itself and whose network sees earlier
        pixels only.
        """
        return 1 if self.output_distribution == "logistic_mixture" else self.num_channels

    @classmethod
    def own_fields(cls) -> list[Field]:
        """The fields that describe a model: those of this package, not those that transformers gives every config."""
        inherited = {field.name for field in fields(PreTrainedConfig)}
        return [field for field in fields(cls) if field.name not in inherited]

    def likelihood_settings(self) -> dict:
        """
        The fields that act on likelihoods and differ from their defaults, by name: with the weights they say which
        distribution a model is. A later version that has more fields, with neutral defaults, gives the same.
        """
        return {
            field.name: getattr(self, field.name)
            for field in sorted(self.own_fields(), key=lambda field: field.name)
            if field.name not in self.fields_without_effect_on_likelihood and getattr(self, field.name) != field.default
        }

    def validate_sizes(self):
        as_height_and_width(self.image_size)
        for name, least in {
            "hidden_size": 1,
            "num_hidden_layers": 1,
            "head_hidden_size": 1,
            "num_head_layers": 0,
            "num_logistic_mix": 1,
            "num_classes": 0,
        }.items():
            if getattr(self, name) < least:
                raise ValueError(f"`{name}` must be at least {least}, got {getattr(self, name)}.")
        if not 0 <= self.dropout < 1:
            raise ValueError(f"`dropout` must be in [0, 1), got {self.dropout}.")

    def validate_levels(self):
        if self.input_encoding not in ("scaled", "embedding"):
            raise ValueError(f"`input_encoding` must be 'scaled' or 'embedding', got {self.input_encoding!r}.")
        most = MAX_EMBEDDED_LEVELS if self.input_encoding == "embedding" else MAX_SCALED_LEVELS
        if not 2 <= self.num_levels <= most:
            raise ValueError(
                f"`num_levels` must be between 2 and {most} with input_encoding={self.input_encoding!r}, "
                f"got {self.num_levels}."
                + (" Codes, which have no order, take input_encoding='embedding'." if most < self.num_levels else "")
            )

    def validate_output_distribution(self):
        if self.output_distribution not in ("bernoulli", "categorical", "logistic_mixture"):
            raise ValueError(
                "`output_distribution` must be 'bernoulli', 'categorical' or 'logistic_mixture', "
                f"got {self.output_distribution!r}."
            )
        if self.output_distribution == "bernoulli" and self.num_levels != 2:
            raise ValueError(
                f"`output_distribution='bernoulli'` has two levels, but `num_levels` is {self.num_levels}; "
                "use 'categorical'."
            )

    def validate_channel_groups(self):
        if self.num_channels < 1:
            raise ValueError(f"`num_channels` must be at least 1, got {self.num_channels}.")
        for name in ("hidden_size", "head_hidden_size"):
            if getattr(self, name) % self.num_channel_groups:
                raise ValueError(
                    f"`{name}` must be divisible by `num_channels` ({self.num_channels}), because features are split "
                    f"into one group per channel, got {getattr(self, name)}."
                )

    def check_half_splits(self, reason: str):
        """Raise unless half of the features can be split into one group per channel, which a family needs."""
        groups = self.num_channel_groups
        if self.hidden_size % (2 * groups):
            divisor = "2" if groups == 1 else f"2 * `num_channels` ({2 * groups})"
            raise ValueError(f"`hidden_size` must be divisible by {divisor}, because {reason}, got {self.hidden_size}.")

    def validate_classes(self):
        if self.num_classes > 0 and len(self.id2label) != self.num_classes:
            raise ValueError(
                f"`id2label` must name each of the {self.num_classes} classes (`num_classes`), "
                f"got {len(self.id2label)} names."
            )
        if self.num_classes > 0 and set(self.id2label) != set(range(self.num_classes)):
            raise ValueError(
                f"`id2label` must number the classes 0 ... {self.num_classes - 1}, got {sorted(self.id2label)}."
            )
        (name, count), *_ = Counter(self.id2label.values()).most_common(1) or [("", 0)]
        if self.num_classes > 0 and count > 1:
            raise ValueError(f"`id2label` must give each class a name of its own, but {count} are {name!r}.")

    def validate_class_dropout(self):
        if self.class_dropout is not None and not 0 <= self.class_dropout < 1:
            raise ValueError(f"`class_dropout` must be in [0, 1), got {self.class_dropout}.")

    def validate_classification(self):
        prior = self.class_prior
        if isinstance(prior, str) and prior != "learned":
            raise ValueError(f"`class_prior` must be None, a list of probabilities or 'learned', got {prior!r}.")
        if isinstance(prior, list | tuple):
            if len(prior) != self.num_classes:
                raise ValueError(
                    f"`class_prior` must have one probability for each of the {self.num_classes} classes "
                    f"(`num_classes`), got {len(prior)}."
                )
            if not min(prior) >= 0 or not abs(sum(prior) - 1) <= 1e-5:
                raise ValueError(f"`class_prior` must be probabilities that sum to 1, got {prior}, sum {sum(prior)}.")
        if not 0 < self.class_temperature < math.inf:
            raise ValueError(f"`class_temperature` must be a finite number above 0, got {self.class_temperature}.")
        if not 0 <= self.generative_weight <= 1:
            raise ValueError(f"`generative_weight` must be in [0, 1], got {self.generative_weight}.")


@strict
class MaskedKernelConfig(CausalImageModelingConfig):
    r"""
    Base configuration of families whose layers are k×k kernels with a mask.

    The fields are those of [`CausalImageModelingConfig`] and those below.

    Args:
        kernel_size (`int`, defaults to 3):
            Odd size of the kernels after the first layer.
        first_kernel_size (`int`, defaults to 7):
            Odd size of the kernel of the first layer.
    """

    kernel_size: int = 3
    first_kernel_size: int = 7

    def validate_kernels(self):
        for name in ("kernel_size", "first_kernel_size"):
            size = getattr(self, name)
            if size < 1 or size % 2 == 0:
                raise ValueError(f"`{name}` must be odd and positive, so that a kernel has a centre, got {size}.")
        if self.first_kernel_size < 3:
            raise ValueError("`first_kernel_size` must be at least 3: a masked 1×1 kernel sees nothing, got 1.")


@strict
class GatedBlockConfig(CausalImageModelingConfig):
    r"""
    Base configuration of families of gated residual blocks, whose networks see earlier pixels only.

    The fields are those of [`CausalImageModelingConfig`] and those below. The defaults are those of CIFAR-10:
    `image_size` 32, 3 channels, 256 levels. `num_head_layers` defaults to 0. Colours need
    `output_distribution="logistic_mixture"`, which is the default, except for one channel of two levels or of symbols
    (`input_encoding="embedding"`).

    Args:
        dropout (`float`, defaults to 0.5):
            Probability with which an element is dropped before the second convolution of a block in training.
        weight_norm (`bool`, defaults to `True`):
            Whether layers have a direction and a gain in place of a weight. `fold_weight_norm` of the model turns it
            off, which leaves fewer parameters and the same function.
    """

    image_size: int | list[int] | tuple[int, ...] = 32
    num_channels: int = 3
    num_levels: int = 256
    num_head_layers: int = 0
    dropout: float | int = 0.5
    weight_norm: bool = True

    def __post_init__(self, **kwargs):
        has_order = self.num_levels > 2 and self.input_encoding == "scaled"
        if self.output_distribution is None and (self.num_channels > 1 or has_order):
            self.output_distribution = "logistic_mixture"
        super().__post_init__(**kwargs)

    def validate_channel_groups(self):
        if self.num_channels > 1 and self.output_distribution in ("bernoulli", "categorical"):
            raise ValueError(
                f"`output_distribution` of a {self.model_type} must be 'logistic_mixture' for images of more than one "
                f"channel, because its network sees earlier pixels only, got {self.output_distribution!r} for "
                f"{self.num_channels}; a pixelcnn or gated_pixelcnn can have it."
            )
        super().validate_channel_groups()


__all__ = ["CausalImageModelingConfig", "GatedBlockConfig", "MaskedKernelConfig", "as_height_and_width", "is_int"]
