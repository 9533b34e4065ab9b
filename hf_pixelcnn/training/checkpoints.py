"""The `checkpoint-N` folders of a run: which are whole, and how far they are."""

import json
import os
import zipfile
from pathlib import Path

from safetensors import SafetensorError, safe_open
from transformers import TrainerState, TrainingArguments
from transformers.utils import logging

from .errors import InputError

logger = logging.get_logger(f"transformers.{__name__}")  # where `transformers.logging.set_verbosity` reaches

STATE_FILE = "trainer_state.json"  # which is written last
EMA_FILE = "ema.safetensors"


def state_of(checkpoint: str | Path) -> TrainerState:
    """What `Trainer` has counted and logged until a checkpoint."""
    return TrainerState.load_from_json(os.path.join(checkpoint, STATE_FILE))


def is_finished(args: TrainingArguments, checkpoint: str | Path) -> bool:
    """Whether all steps or epochs of a run are done at a checkpoint."""
    state = state_of(checkpoint)
    if args.max_steps > 0:
        return state.global_step >= args.max_steps
    return (state.epoch or 0) >= args.num_train_epochs


def _read(path: Path):
    """Read as much of a file as tells whether it is whole."""
    if path.name == STATE_FILE:
        TrainerState.load_from_json(str(path))
    elif path.suffix == ".json":
        json.loads(path.read_text(encoding="utf-8"))
    elif path.suffix == ".safetensors":
        with safe_open(path, "pt"):  # compares sizes
            pass
    elif path.suffix in (".pt", ".pth"):  # zip files with checksums
        with zipfile.ZipFile(path) as file:
            if (part := file.testzip()) is not None:
                raise zipfile.BadZipFile(f"the checksum of {part} is wrong")


def damage_in(checkpoint: str | Path) -> str | None:
    """Which file of a checkpoint is damaged or missing, and why; `None` if none is."""
    paths = sorted(Path(checkpoint).iterdir())
    for path in paths:
        try:
            _read(path)
        except (OSError, ValueError, TypeError, SafetensorError, zipfile.BadZipFile) as error:
            return f"{path} is damaged: {error}"
    names = {path.name for path in paths}
    is_resumable = "scheduler.pt" in names  # else only the model was to be saved
    for name, is_missing in (
        ("model.safetensors", not any(name.endswith(".safetensors") for name in names - {EMA_FILE})),
        ("optimizer.pt", is_resumable and not any(name.startswith("optimizer") for name in names)),
    ):
        if is_missing:
            return f"{Path(checkpoint, name)} is missing"
    return None


def _step(path: str | Path) -> int:
    """N of a path that ends in `checkpoint-N`; -1 for another."""
    number = Path(path).name.removeprefix("checkpoint-")
    return int(number) if number.isdecimal() else -1


def _complete(folder: str | Path) -> list[str]:
    """The `checkpoint-N` in `folder` whose last file is there, newest first."""
    paths = [path for path in Path(folder).glob("checkpoint-*") if _step(path) >= 0 and (path / STATE_FILE).is_file()]
    return [str(path) for path in sorted(paths, key=_step, reverse=True)]


def last_checkpoint(folder: str | Path) -> str | None:
    """The newest `checkpoint-N` in `folder` that is complete and not damaged, with a warning for each that is."""
    for path in _complete(folder):
        damage = damage_in(path)
        if damage is None:
            return path
        logger.warning(f"{damage}; going back to the checkpoint before.")
    return None


def check_whole(checkpoint: str | Path):
    r"""
    Check that a run can continue from a checkpoint.

    Raises:
        InputError: If a file of it is damaged; the message names it, and the newest checkpoint before that is not.
    """
    if (damage := damage_in(checkpoint)) is None:
        return
    earlier = (path for path in _complete(Path(checkpoint).parent) if _step(path) < _step(checkpoint))
    before = next((path for path in earlier if damage_in(path) is None), None)
    raise InputError(f"{damage}; " + (f"continue from {before}." if before else "no checkpoint before it is whole."))
