"""What numbers an argument may be, whichever script it belongs to. Nothing here imports torch."""

import math
from collections.abc import Mapping
from typing import NamedTuple


class Open(NamedTuple):
    """A bound that a number must not reach."""

    bound: float


MOST = 2**31 - 1  # what any count may be; memory is a matter of its own
LEAST_AND_MOST = {  # by name of the argument
    "adam_beta1": (0, Open(1)),
    "adam_beta2": (0, Open(1)),
    "adam_epsilon": (Open(0), math.inf),
    "batch_size": (1, MOST),
    "class_dropout": (0, Open(1)),
    "columns": (1, MOST),
    "dataloader_num_workers": (0, 1024),
    "dataloader_prefetch_factor": (1, MOST),
    "ema_decay": (0, Open(1)),
    "eval_delay": (0, MOST),
    "eval_steps": (Open(0), MOST),
    "gradient_accumulation_steps": (1, MOST),
    "image_size": (1, MOST),
    "learning_rate": (0, math.inf),
    "logging_steps": (Open(0), MOST),
    "max_dims": (1, 2**62),
    "max_grad_norm": (0, math.inf),
    "max_seconds": (0, math.inf),
    "max_steps": (-1, MOST),  # -1: none
    "mutation_rate": (0, 1),
    "num_binarizations": (1, MOST),
    "num_heat_maps": (1, 10_000),
    "num_images": (1, MOST),
    "num_samples": (1, 10_000),
    "num_train_epochs": (Open(0), MOST),
    "per_device_eval_batch_size": (1, MOST),
    "per_device_train_batch_size": (1, MOST),
    "save_steps": (Open(0), MOST),
    "save_total_limit": (1, MOST),
    "seed": (0, 2**64 - 1),
    "warmup_steps": (0, MOST),
    "weight_decay": (0, math.inf),
}
ANY_NUMBER = (-(2**63), 2**63 - 1)  # what torch takes


def check_numbers(arguments: Mapping[str, object]):
    r"""
    Check all numbers among arguments: finite, and within the bounds that go with their names.

    Args:
        arguments (mapping of `str` to anything): Values by name; those that are no numbers are not checked.

    Raises:
        ValueError: If one is not; the message names it, and what would work.
    """
    for name, value in arguments.items():
        if isinstance(value, bool) or not isinstance(value, int | float):
            continue
        if isinstance(value, float) and not math.isfinite(value):
            raise ValueError(f"`{name}` must be a finite number, got {value}.")
        least, most = LEAST_AND_MOST.get(name, ANY_NUMBER)
        if isinstance(least, Open):
            wanted = None if value > least.bound else f"above {least.bound}"
        else:
            wanted = None if value >= least else f"at least {least}"
        if isinstance(most, Open):
            wanted = wanted if value < most.bound else f"below {most.bound}"
        else:
            wanted = wanted if value <= most else f"at most {most}"
        if wanted:
            raise ValueError(f"`{name}` must be {wanted}, got {value}.")
