"""`Trainer` for likelihood models of images: exact evaluation, an average of the weights, exact resumption."""

import contextlib
import math
import os
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from accelerate.utils import DynamoBackend
from safetensors.torch import load_file, save_file
from torch.utils.data import DataLoader
from transformers import Trainer, TrainerCallback, TrainingArguments
from transformers.integrations.integration_utils import get_available_reporting_integrations
from transformers.trainer import TRAINING_ARGS_NAME
from transformers.trainer_utils import TrainOutput, speed_metrics
from transformers.training_args import OptimizerNames
from transformers.utils import logging

from ..checks_causal_image import check_count, evaluation_mode
from ..modeling_causal_image import CausalImageLikelihood
from .checkpoints import EMA_FILE, STATE_FILE, check_whole, is_finished, last_checkpoint, state_of
from .errors import InputError
from .files import all_written_beside
from .level_dataset import LevelDataset, check_seed, collate_classes, collate_levels
from .records import has_fast_bfloat16
from .scoring import metrics_of, nats_per_image

logger = logging.get_logger(f"transformers.{__name__}")  # where `transformers.logging.set_verbosity` reaches


WITHOUT_USE = {  # arguments of `TrainingArguments`, and why they would do nothing or harm here
    "label_smoothing_factor": "the loss is a likelihood",
    "bf16_full_eval": "scores are of the weights as they are",
    "fp16_full_eval": "scores are of the weights as they are",
    "dataloader_persistent_workers": "workers that stay would show what was drawn for the first epoch again and again",
    "do_predict": "there is nothing to predict; training/score.py scores a split",
    "neftune_noise_alpha": "it is noise on the vectors of words",
    "use_liger_kernel": "its kernels are those of language models",
}


@dataclass
class PixelCNNTrainingArguments(TrainingArguments):
    """`TrainingArguments` with an average of the weights, a memory format, and defaults that suit our batches."""

    if TYPE_CHECKING:  # transformers names a folder where none is given
        output_dir: str = ""
    ema_decay: float = field(
        default=0.0,
        metadata={
            "help": "Decay of the exponential moving average of the weights, which is what is evaluated and saved; "
            "0 for none. In step t = 0, 1, ... it is min(ema_decay, (1 + t) / (10 + t))."
        },
    )
    do_train: bool = field(default=True, metadata={"help": "Whether to train; only True means something here."})
    channels_last: bool = field(default=False, metadata={"help": "Keep convolution weights in channels_last format."})
    eval_strategy: str = field(
        default="epoch", metadata={"help": "When to evaluate.", "choices": ["no", "steps", "epoch"]}
    )
    save_strategy: str = field(
        default="epoch", metadata={"help": "When to save a checkpoint.", "choices": ["no", "steps", "epoch", "best"]}
    )
    logging_steps: float = field(default=50, metadata={"help": "Steps from one log of the training loss to the next."})
    dataloader_drop_last: bool = field(
        default=True, metadata={"help": "Leave out the last, smaller training batch of an epoch."}
    )
    logging_nan_inf_filter: bool = field(
        default=False, metadata={"help": "Log the mean of earlier losses in place of NaN; here NaN ends the training."}
    )
    remove_unused_columns: bool = field(
        default=False, metadata={"help": "Whether to drop unused columns; batches have none."}
    )
    ddp_find_unused_parameters: bool | None = field(
        default=False, metadata={"help": "Whether some parameters may get no gradient; here all get one."}
    )
    hub_strategy: str = field(
        default="end", metadata={"help": "When `push_to_hub` pushes; a push at a checkpoint would tell too much."}
    )

    def __post_init__(self):
        if not 0 <= self.ema_decay < 1:
            raise ValueError(f"`ema_decay` must be in [0, 1), got {self.ema_decay}.")
        for name in ("per_device_train_batch_size", "per_device_eval_batch_size"):
            check_count(name, getattr(self, name))
        for name, reason in WITHOUT_USE.items():
            if getattr(self, name):
                raise ValueError(f"`{name}` cannot be used: {reason}.")
        if not self.do_train:
            raise ValueError("`do_train` must be True: these are arguments of training; training/score.py scores.")
        if self.hub_strategy != "end":
            raise ValueError(
                f"`hub_strategy` must be end, got {str(self.hub_strategy)!r}: a push at a checkpoint would publish "
                "training_args.bin, with folders and tokens, and weights that are not the average."
            )
        check_seed(self.seed)
        self.use_cpu = self.use_cpu or not torch.accelerator.is_available()  # else `bf16` is refused on a CPU
        if self.bf16 and self.use_cpu and not has_fast_bfloat16("cpu"):
            logger.warning("This CPU is slower in bfloat16: training in float32 instead.")
            self.bf16 = False
        self._check_names()
        super().__post_init__()
        if self.optim_args and self.optim in ("adamw_torch", "adamw_torch_fused"):
            raise ValueError(
                f"`optim_args` cannot be used: {OptimizerNames(self.optim).value} reads none, but `adam_beta1`, "
                "`adam_beta2`, `adam_epsilon` and `weight_decay`."
            )

    def __getstate__(self):
        """Without the token: `training_args.bin` in a checkpoint is a pickle of this."""
        return {**vars(self), "hub_token": None}

    def _check_names(self):
        """Raise `ValueError` for a name that means nothing here."""
        reporters = [self.report_to] if isinstance(self.report_to, str) else self.report_to or []
        _check_known("report_to", reporters, ["all", "none", *get_available_reporting_integrations()])
        for name in ("log_level", "log_level_replica"):
            _check_known(name, [getattr(self, name)], ["passive", *logging.get_log_levels_dict()])
        if self.metric_for_best_model:
            metric = self.metric_for_best_model.removeprefix("eval_")
            _check_known("metric_for_best_model", [metric], ["loss", "bits_per_dim", "nats_per_image"])
        if self.torch_compile_backend:
            registered = torch._dynamo.list_backends(None)
            backends = [name.lower() for name in DynamoBackend.list() if name.lower() in registered]
            _check_known("torch_compile_backend", [self.torch_compile_backend], backends)
        if self.torch_compile_mode:
            _check_known("torch_compile_mode", [self.torch_compile_mode], list(torch._inductor.list_mode_options()))


def _check_known(name: str, wanted: Sequence[str], known: Sequence[str]):
    """Raise `ValueError` unless all names that an argument has are known ones."""
    if unknown := [word for word in wanted if word not in known]:
        raise ValueError(f"`{name}` must be {' or '.join(known)}, got {unknown[0]!r}; others may need a package.")


@contextlib.contextmanager
def _setting(names: str) -> Iterator[None]:
    """Name the arguments whose values an optimizer or a schedule cannot be made with."""
    try:
        yield
    except (ValueError, TypeError, KeyError, AssertionError, ImportError, ArithmeticError) as error:
        raise InputError(f"{names}: {error}") from error


class WeightAverage:
    r"""
    Exponential moving average of the parameters of a model, in float32 or wider.

    After step t = 0, 1, ... of the optimizer: average ← d · average + (1 − d) · weight with
    d = min(decay, (1 + t) / (10 + t)); it starts at the initial weights.

    Args:
        model (`nn.Module`): Its parameters are averaged.
        decay (`float`): In (0, 1).
    """

    def __init__(self, model: torch.nn.Module, decay: float):
        self.decay = decay
        self.parameters = dict(model.named_parameters())
        self.average = {
            name: p.detach().to(torch.promote_types(p.dtype, torch.float32), copy=True)
            for name, p in self.parameters.items()
        }

    @torch.no_grad()
    def update(self, step: int):
        """Add the weights after step `step` of the optimizer, counted from 0, to the average."""
        decay = min(self.decay, (1 + step) / (10 + step))
        weights = [p.detach().to(self.average[name].dtype) for name, p in self.parameters.items()]
        averages = list(self.average.values())
        torch._foreach_lerp_(averages, weights, 1 - decay)  # pyright: ignore[reportPrivateImportUsage] - as torch.optim

    @contextlib.contextmanager
    def in_use(self):
        """Context in which the model has the averaged weights; afterwards it has its own again."""
        own = {name: p.detach().clone() for name, p in self.parameters.items()}
        try:
            self._write(self.average)
            yield
        finally:
            self._write(own)

    @torch.no_grad()
    def _write(self, values: dict[str, torch.Tensor]):
        for name, p in self.parameters.items():
            p.copy_(values[name])

    def save(self, folder: str):
        """Write `ema.safetensors`."""
        tensors = {name: tensor.contiguous() for name, tensor in self.average.items()}
        save_file(tensors, os.path.join(folder, EMA_FILE), metadata={"format": "pt"})

    def load(self, folder: str):
        """Continue from the `ema.safetensors` of a checkpoint."""
        path = os.path.join(folder, EMA_FILE)
        if not os.path.isfile(path):
            raise ValueError(f"Cannot resume with `ema_decay` above 0: {folder} has no {EMA_FILE}.")
        for name, tensor in load_file(path).items():
            self.average[name].copy_(tensor)


class _StepCallback(TrainerCallback):
    """Keeps the average and the epoch of the data set up to date, and the log complete at each checkpoint."""

    def __init__(self, trainer: "PixelCNNTrainer"):
        self.trainer = trainer

    def on_train_begin(self, args, state, control, **kwargs):
        self.trainer.spent_before = time_spent(state.log_history)

    def on_epoch_begin(self, args, state, control, **kwargs):
        set_epoch = getattr(self.trainer.train_dataset, "set_epoch", None)
        if set_epoch is not None:
            set_epoch(int(state.epoch or 0))

    def on_step_end(self, args, state, control, **kwargs):
        if self.trainer.ema is not None:
            self.trainer.ema.update(state.global_step - 1)
        self._log_before_saving(control)

    def on_epoch_end(self, args, state, control, **kwargs):
        self._log_before_saving(control)

    def _log_before_saving(self, control):
        # `Trainer` does not save what it has summed since the last log, so nothing may be pending.
        control.should_log = control.should_log or control.should_save


class PixelCNNTrainer(Trainer):
    r"""
    `Trainer` for the `...ForCausalImageModeling` models, and for `...ForImageClassification`.

    - The loss is in nats per dimension, over all accumulated batches of all processes; a classifier has its own.
    - `evaluate` scores each image of the split once, whatever the batch size and the number of processes, and adds up
      in float64: `eval_loss` (nats per dimension), `eval_bits_per_dim`, `eval_nats_per_image`. No logits are kept.
    - With `ema_decay`, `evaluate` and `save_model` use the averaged weights. A `checkpoint-N` holds the raw weights,
      from which training resumes exactly, and the average in `ema.safetensors`.
    - The config of a class-conditional model gets the `class_dropout` of the data set.

    Args:
        model: A model with `log_prob`.
        args ([`PixelCNNTrainingArguments`]): Arguments.
        data_collator: [`collate_levels`] by default, [`collate_classes`] for a classifier, whose evaluation is a
            likelihood and keeps the default; [`DataCollatorForCausalImageModeling`] for images of a mapped processor.
        kwargs: As for `Trainer`; a data set for evaluation is a `torch.utils.data.Dataset` of known length.
    """

    args: PixelCNNTrainingArguments
    model: CausalImageLikelihood
    eval_dataset: LevelDataset

    def __init__(self, model, args: PixelCNNTrainingArguments, data_collator=collate_levels, **kwargs):
        if args.channels_last:
            model = model.to(memory_format=torch.channels_last)
        super().__init__(model, args, data_collator=data_collator, **kwargs)
        class_dropout = getattr(self.train_dataset, "class_dropout", None)
        if self.model.config.num_classes and (class_dropout or self.model.config.class_dropout is None):
            self.model.config.class_dropout = class_dropout  # without any, fine-tuning leaves what there was
        self.ema = None
        self.spent_before, self.started = time_spent([]), None
        self.nats_function = nats_per_image
        if args.torch_compile:
            backend, mode = args.torch_compile_backend or "inductor", args.torch_compile_mode
            self.nats_function = torch.compile(nats_per_image, dynamic=False, backend=backend, mode=mode)
        self.add_callback(_StepCallback(self))

    def train(self, resume_from_checkpoint: str | bool | None = None, **kwargs):
        r"""
        As `Trainer.train`; `True` resumes from the last checkpoint that is whole. At a checkpoint where all steps or
        epochs are done, nothing is trained: the model becomes what it was there.

        Raises:
            InputError: If a file of the checkpoint is damaged.
            ValueError: If there is no checkpoint.
        """
        if resume_from_checkpoint is True:
            resume_from_checkpoint = last_checkpoint(self.args.output_dir)
            if resume_from_checkpoint is None:
                raise ValueError(f"There is no checkpoint in {self.args.output_dir} to resume from.")
        elif resume_from_checkpoint:
            check_whole(resume_from_checkpoint)
        if self.args.ema_decay:
            self.ema = WeightAverage(self.model, self.args.ema_decay)
            if resume_from_checkpoint:
                self.ema.load(resume_from_checkpoint)
        if resume_from_checkpoint and is_finished(self.args, resume_from_checkpoint):
            return self._take_over(resume_from_checkpoint)
        self.started = clocks()
        try:
            return super().train(resume_from_checkpoint=resume_from_checkpoint, **kwargs)
        finally:
            self.started = None

    def _take_over(self, checkpoint: str) -> TrainOutput:
        """The end of a finished run: its weights and its log."""
        self.state = state_of(checkpoint)
        self._load_from_checkpoint(checkpoint)
        if self.args.load_best_model_at_end and self.state.best_model_checkpoint:
            self._load_best_model()
        losses = [row["loss"] for row in self.state.log_history if "loss" in row]
        return TrainOutput(self.state.global_step, losses[-1] if losses else math.nan, {})

    def create_optimizer(self, *args, **kwargs):
        """As in `Trainer`, with an [`InputError`] where the arguments do not make one."""
        with _setting("`optim` and `optim_args` cannot be used"):
            return super().create_optimizer(*args, **kwargs)

    def create_scheduler(self, *args, **kwargs):
        """As in `Trainer`, with an [`InputError`] where the arguments do not make one."""
        with _setting("`lr_scheduler_type` and `lr_scheduler_kwargs` cannot be used"):
            return super().create_scheduler(*args, **kwargs)

    def log(self, logs: dict[str, float], *args, **kwargs):
        r"""
        As in `Trainer`; what is logged in training has the `seconds` it took so far, and the `core_seconds` that its
        process spent on all cores, evaluations included and those before a checkpoint that it was resumed from.

        Raises:
            InputError: If the training loss is not finite: nothing that comes after it would be worth anything.
        """
        if self.started is not None:
            for name, now in clocks().items():
                logs[name] = round(self.spent_before[name] + now - self.started[name], 2)
        super().log(logs, *args, **kwargs)
        if not math.isfinite(float(logs.get("loss", 0.0))):
            raise InputError(
                f"the loss is {logs['loss']} at step {self.state.global_step}: the training has diverged. Lower "
                f"`learning_rate` ({self.args.learning_rate}), or continue from a checkpoint with another seed."
            )

    def averaged_weights(self):
        """Context in which the model has the averaged weights, if there are any."""
        return contextlib.nullcontext() if self.ema is None else self.ema.in_use()

    @torch.no_grad()
    def evaluate(
        self,
        eval_dataset: LevelDataset | dict[str, LevelDataset] | None = None,
        ignore_keys: list[str] | None = None,
        metric_key_prefix: str = "eval",
    ) -> dict[str, float]:
        r"""
        Score a split with the averaged weights, if there are any.

        Args:
            eval_dataset ([`LevelDataset`] or another of known length, or a `dict` of some, *optional*): By default the
                trainer's own. The name of each in a `dict` follows the prefix, as in `eval_digits_loss`.
            ignore_keys: Not used; no outputs are collected.
            metric_key_prefix (`str`): Start of the names of the metrics.

        Returns:
            `dict` with `eval_loss` (nats per dimension), `eval_bits_per_dim`, `eval_nats_per_image` and speeds.

        Raises:
            ValueError: If there is no data set.
        """
        images = self.eval_dataset if eval_dataset is None else eval_dataset
        if images is None:
            raise ValueError("`eval_dataset` is needed: give it to `evaluate`, or when the trainer is made.")
        if isinstance(images, dict):
            scores = [self.evaluate(own, ignore_keys, f"{metric_key_prefix}_{name}") for name, own in images.items()]
            return {name: value for metrics in scores for name, value in metrics.items()}
        args, start = self.args, time.time()
        own_share = torch.utils.data.Subset(images, range(args.process_index, len(images), args.world_size))
        loader = DataLoader(
            own_share,
            args.eval_batch_size,
            collate_fn=collate_levels if self.data_collator is collate_classes else self.data_collator,
            num_workers=args.dataloader_num_workers,
            generator=torch.Generator(),  # training draws the same numbers with and without evaluation
        )
        self.callback_handler.eval_dataloader = loader  # pyright: ignore[reportAttributeAccessIssue] - begins as None
        sums = torch.zeros(3, dtype=torch.float64, device=args.device)  # nats, images, dimensions
        with self.averaged_weights(), evaluation_mode(self.model):
            for batch in loader:
                sums += self._score_batch(batch)
                self.control = self.callback_handler.on_prediction_step(args, self.state, self.control)
        nats, num_images, num_dims = map(float, self.accelerator.reduce(sums, "sum"))
        values = metrics_of(nats, int(num_images), int(num_dims))
        values = {"loss": values.pop("nats_per_dim"), **values}
        metrics = {f"{metric_key_prefix}_{name}": value for name, value in values.items()}
        metrics |= speed_metrics(
            metric_key_prefix,
            start,
            num_samples=len(images),
            num_steps=math.ceil(len(images) / (args.eval_batch_size * args.world_size)),
        )
        self.log(metrics)
        self.control = self.callback_handler.on_evaluate(args, self.state, self.control, metrics)
        return metrics

    def _score_batch(self, batch: dict[str, torch.Tensor]) -> torch.Tensor:
        """Nats, images and dimensions of a batch, `torch.DoubleTensor` `(3,)`."""
        batch = self._prepare_inputs(batch)
        pixel_values, class_ids = batch["pixel_values"], batch.get("class_ids")
        count, num_dims = len(pixel_values), pixel_values.numel()
        if self.args.torch_compile and count < self.args.eval_batch_size:  # keep the shape that was compiled
            repeat = torch.arange(self.args.eval_batch_size, device=pixel_values.device) % count
            pixel_values, class_ids = pixel_values[repeat], None if class_ids is None else class_ids[repeat]
        with self.accelerator.autocast():
            nats = self.nats_function(self.model, pixel_values, class_ids)[:count].sum()
        return torch.stack((nats, nats.new_tensor(count), nats.new_tensor(num_dims)))

    def save_model(self, output_dir: str | None = None, _internal_call: bool = False):
        """
        Save the averaged model, if there is one, in files that appear when all are written; a `checkpoint-N` gets the
        raw weights and also the average. Source files are only written by `push_to_hub`, and `training_args.bin`, which
        belongs to a run and holds its folders and tokens, only to checkpoints.
        """
        is_push = _internal_call and output_dir is None
        code = (
            contextlib.nullcontext() if is_push else without_code(self.model, self.model.config, self.processing_class)
        )
        if _internal_call and output_dir is not None:
            with code:
                super().save_model(output_dir, _internal_call)
            if self.ema is not None and self.args.should_save:
                self.ema.save(output_dir)
            return
        with code, self.averaged_weights():
            if not self.args.should_save:
                super().save_model(output_dir, _internal_call)
                return
            with all_written_beside(output_dir or self.args.output_dir) as beside:
                super().save_model(str(beside), _internal_call=True)
                (beside / TRAINING_ARGS_NAME).unlink(missing_ok=True)
        if self.args.push_to_hub and not _internal_call:
            self.push_to_hub(commit_message="Model save", revision=self.args.hub_revision)

    def _save_checkpoint(self, model, trial):
        """As in `Trainer`; what an interrupted run left under the name of this checkpoint no longer counts."""
        if self.args.should_save:
            folder = os.path.join(self._get_output_dir(trial), f"checkpoint-{self.state.global_step}")
            Path(folder, STATE_FILE).unlink(missing_ok=True)
        super()._save_checkpoint(model, trial)

    def _push_from_checkpoint(self, checkpoint_folder: str):
        """Nothing, whatever `set_push_to_hub` has asked for: see `hub_strategy`."""

    def _load_best_model(self):
        super()._load_best_model()
        folder = self.state.best_model_checkpoint
        if self.ema is not None and folder is not None:
            self.ema.load(folder)


def clocks() -> dict[str, float]:
    """Seconds of wall-clock time, and those that this process and its finished children spent on all cores."""
    return {"seconds": time.perf_counter(), "core_seconds": sum(os.times()[:4])}


def time_spent(log_history: Sequence[dict]) -> dict[str, float]:
    """The [`clocks`] of training until the end of a log, what came before a checkpoint it was resumed from included."""
    last = next((row for row in reversed(log_history) if "seconds" in row), {})
    return {name: last.get(name, 0.0) for name in clocks()}


@contextlib.contextmanager
def without_code(*things: object):
    """Context in which `save_pretrained` of models, configs and processors writes no source files beside them."""
    own: dict[Any, str | None] = {type(thing): vars(type(thing)).get("_auto_class") for thing in things}
    classes = [cls for cls in own if getattr(cls, "_auto_class", None) is not None]
    for cls in classes:
        cls._auto_class = None
    try:
        yield
    finally:
        for cls in classes:
            if own[cls] is None:  # inherited
                del cls._auto_class
            else:
                cls._auto_class = own[cls]
