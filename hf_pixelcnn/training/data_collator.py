"""Batches for the `Trainer` of transformers from data sets that an image processor was mapped over."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import torch


@dataclass
class DataCollatorForCausalImageModeling:
    r"""
    Makes batches of levels whose labels are the levels themselves; a column of classes becomes `class_ids`.

    The default collator of transformers would pass a column of classes as `labels`, which here are levels to predict.
    With `prediction_loss_only=True` no logits are gathered, which are large. Leave `label_smoothing_factor` of
    `TrainingArguments` at 0: `Trainer` smooths outside of the model, in place of the likelihood.

    Args:
        class_column (`str`, *optional*): The column of classes of a conditional model, such as `"label"`; without it
            the batch has no classes.

    Example:

    ```python
    >>> rows = load_dataset("ylecun/mnist", split="train").map(
    ...     lambda rows: processor(rows["image"]), batched=True, remove_columns="image"
    ... )
    >>> collator = DataCollatorForCausalImageModeling(class_column="label")
    >>> trainer = Trainer(model, arguments, train_dataset=rows, data_collator=collator)
    ```
    """

    class_column: str | None = None

    def __call__(self, items: Sequence[dict]) -> dict[str, torch.Tensor]:
        r"""
        Args:
            items (sequence of `dict`): `pixel_values`, levels `(channels, height, width)` as an array, a tensor or
                nested lists, and the column of classes, if it was named.

        Returns:
            `dict`: `pixel_values` and `labels`, the same levels, int64 `(batch, channels, height, width)`; with classes
            also `class_ids`, int64 `(batch,)`, -1 for `None`.

        Raises:
            KeyError: If the items lack `pixel_values` or the column of classes; the message lists what they have.
        """
        for name in ("pixel_values", *([self.class_column] if self.class_column else [])):
            if name not in items[0]:
                raise KeyError(
                    f"the items have no column {name!r}, only {sorted(items[0])}; `Trainer` drops columns that it does "
                    "not know with `remove_unused_columns=True`."
                )
        levels = torch.from_numpy(np.stack([np.asarray(item["pixel_values"]) for item in items])).long()
        batch = {"pixel_values": levels, "labels": levels}
        if self.class_column:
            classes = [item[self.class_column] for item in items]
            batch["class_ids"] = torch.tensor([-1 if class_id is None else int(class_id) for class_id in classes])
        return batch
