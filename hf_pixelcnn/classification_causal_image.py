"""Classification by Bayes' rule over a class-conditional likelihood, the same for all families."""

import math

import torch
import torch.nn.functional as F
from torch.utils.checkpoint import checkpoint
from transformers.modeling_outputs import ImageClassifierOutput
from transformers.utils import logging
from transformers.utils.generic import can_return_tuple

from .checks_causal_image import check_class_labels, check_levels
from .configuration_causal_image import CausalImageModelingConfig, as_height_and_width
from .modeling_causal_image import CausalImageLikelihood, ClassPrior, mean_of

logger = logging.get_logger(f"transformers.{__name__}")  # where `transformers.logging.set_verbosity` reaches


class ImageClassification(CausalImageLikelihood):
    r"""
    What `...ForImageClassification` of every family is, given `backbone_class`:

        logits(c) = (log p(x | c) + log p(c)) / temperature

    with p(c) from `config.class_prior` and the temperature `config.class_temperature`; with temperature 1 the softmax
    of the logits is p(c | x). The weights are those of `...ForCausalImageModeling`, under the same names: a checkpoint
    of either loads as the other.

    It costs one forward pass per class, one class at a time, so memory does not grow with the number of classes; in
    training neither, because each pass is computed again for its gradient (so a step costs a third more). Fine-tune
    with `dropout=0`: the passes of different classes would drop different features.
    """

    def __init__(self, config: CausalImageModelingConfig):
        if config.num_classes < 1:
            raise ValueError(
                f"{type(self).__name__} needs a class-conditional model, but `num_classes` is {config.num_classes}."
            )
        super().__init__(config)
        self.class_prior = ClassPrior(config.num_classes) if config.class_prior == "learned" else None
        self.post_init()

    def log_prior(self, device: torch.device | str = "cpu") -> torch.Tensor:
        """log p(c), `(num_classes,)`, on a device: that of the weights may be none (on disk, or in `DataParallel`)."""
        if self.class_prior is not None:
            return self.class_prior().to(device)
        if self.config.class_prior is None:
            return torch.full((self.config.num_classes,), -math.log(self.config.num_classes), device=device)
        return torch.tensor(self.config.class_prior, dtype=torch.float32, device=device).log()

    def log_likelihood(self, pixel_values: torch.Tensor, class_id: int) -> torch.Tensor:
        """log p(x | c) in nats of each image for one class, `(batch,)`, at least float32."""
        class_ids = torch.full(pixel_values.shape[:1], class_id, device=pixel_values.device)
        return self.log_prob(pixel_values, class_ids=class_ids).sum(dim=(1, 2, 3))

    def _warn_of_what_harms(self, height: int, width: int):
        """Say once what makes probabilities of classes meaningless, and is no error."""
        if torch.compiler.is_compiling():
            return
        if self.training and self.config.dropout > 0:
            logger.warning_once(
                f"A classifier learns from noise with `dropout` {self.config.dropout}, as the passes of different "
                "classes drop different features: load it with `dropout=0`."
            )
        own = as_height_and_width(self.config.image_size)
        if height * width > 4 * own[0] * own[1]:
            logger.warning_once(
                f"Images of {height}×{width} are classified by a model of {own[0]}×{own[1]}: it knows nothing of them, "
                "and is slow. Make them of its size first."
            )

    @can_return_tuple
    def forward(
        self,
        pixel_values: torch.Tensor,
        *,
        labels: torch.Tensor | None = None,
        output_hidden_states: bool | None = None,
        num_items_in_batch: torch.Tensor | int | None = None,
    ) -> ImageClassifierOutput:
        r"""
        Args:
            pixel_values (`torch.LongTensor` of shape `(batch, channels, height, width)`):
                Integer levels `0 ... num_levels - 1`, any integer dtype.
            labels (`torch.LongTensor` of shape `(batch,)`, *optional*):
                The class of each image. With them there is a loss,

                    generative_weight · (-log p(x | label) / dimensions) - (1 - generative_weight) · log p(label | x),

                the mean over images of a generative term, in nats per dimension, and a discriminative one, the
                cross-entropy of `logits` in nats (Bouchard & Triggs 2004, The Trade-off between Generative and
                Discriminative Classifiers, section 3, here with the generative term per dimension).
            output_hidden_states (`bool`, *optional*):
                Whether to return the hidden states of the network for images without a class, as `...Model` gives
                them: one more pass.
            num_items_in_batch (`torch.Tensor` or `int`, *optional*):
                What to divide the summed loss by instead of the batch size; `Trainer` passes the number of labels of
                all accumulated batches.

        Returns:
            `ImageClassifierOutput` with `loss`, `logits`, `torch.FloatTensor` `(batch, num_classes)`, and
            `hidden_states`; or a tuple with `return_dict=False`.

        Raises:
            ValueError, TypeError: If an argument has the wrong dtype, shape or range. Compiled and exported code does
            not check the range.
        """
        check_levels("pixel_values", pixel_values, self.config)
        self._warn_of_what_harms(*pixel_values.shape[2:])
        if labels is not None:
            check_class_labels(labels, pixel_values.shape[0], self.config)
        by_class = [
            checkpoint(self.log_likelihood, pixel_values, class_id, use_reentrant=False)
            if torch.is_grad_enabled()
            else self.log_likelihood(pixel_values, class_id)
            for class_id in range(self.config.num_classes)
        ]
        log_likelihood = torch.stack(by_class, dim=1)  # (batch, num_classes)
        logits = (log_likelihood + self.log_prior(log_likelihood.device)) / self.config.class_temperature
        loss = None
        if labels is not None:
            labels, weight = labels.to(logits.device, torch.long), self.config.generative_weight
            nats_per_dim = -log_likelihood.gather(1, labels[:, None]).sum() / pixel_values[0].numel()
            cross_entropy = F.cross_entropy(logits, labels, reduction="sum")
            count = pixel_values.shape[0] if num_items_in_batch is None else num_items_in_batch
            discriminative = (1 - weight) * cross_entropy if weight < 1 else 0  # infinite where the prior is 0
            loss = mean_of(weight * nats_per_dim + discriminative, count)
        keep = self.config.output_hidden_states if output_hidden_states is None else output_hidden_states
        features = self.model(pixel_values, output_hidden_states=True, return_dict=True) if keep else None
        return ImageClassifierOutput(loss=loss, logits=logits, hidden_states=features and features.hidden_states)


__all__ = ["ImageClassification"]
