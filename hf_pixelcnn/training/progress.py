"""What a training run says while it runs: a bar, and one line for each epoch."""

from tqdm import tqdm
from transformers import PrinterCallback, ProgressCallback, Trainer, TrainerCallback

from ..likelihood_causal_image import bits_per_dim


class EpochLines(TrainerCallback):
    r"""
    Prints one line for each epoch and for each evaluation: the mean loss in training since the line before, the score
    of the evaluation, and the seconds of training so far.

    Args:
        eval_name (`str`): What is evaluated, such as the name of a split.
        is_likelihood (`bool`): Whether the training loss is a likelihood in nats per dimension, which is then said in
            bits; that of a classifier is not.
    """

    def __init__(self, eval_name: str = "evaluation", is_likelihood: bool = True):
        self.eval_name, self.is_likelihood = eval_name, is_likelihood
        self.loss, self.first_step, self.last_step, self.seconds, self.ends_epoch = 0.0, 0, 0, 0.0, False

    def on_train_begin(self, args, state, control, **kwargs):
        self.first_step = self.last_step = state.global_step
        self.loss = 0.0

    def on_epoch_end(self, args, state, control, **kwargs):
        control.should_log = self.ends_epoch = True

    def on_log(self, args, state, control, logs=None, **kwargs):
        logs = logs or {}
        self.seconds = logs.get("seconds", self.seconds)
        if "loss" in logs:
            self.loss += logs["loss"] * (state.global_step - self.last_step)
            self.last_step = state.global_step
            if self.ends_epoch and not control.should_evaluate:
                self.say(state)

    def on_evaluate(self, args, state, control, metrics=None, **kwargs):
        if metrics and "eval_bits_per_dim" in metrics:
            self.say(state, f"{self.eval_name} {metrics['eval_bits_per_dim']:.4f} bits/dim")

    def say(self, state, evaluation: str | None = None):
        """Print a line."""
        parts = [] if evaluation is None else [evaluation]
        steps = self.last_step - self.first_step
        if steps > 0:
            mean = self.loss / steps
            said = f"{bits_per_dim(mean, 1):.4f} bits/dim" if self.is_likelihood else f"loss {mean:.4f}"
            parts.insert(0, f"training {said}")
        place = f"epoch {state.epoch or 0:.3g}, step {state.global_step} of {state.max_steps}"
        if state.is_world_process_zero:
            tqdm.write(f"{place}, {self.seconds:.0f} s: {', '.join(parts)}")
        self.first_step, self.loss, self.ends_epoch = self.last_step, 0.0, False


class _Bar(ProgressCallback):
    """The bar of transformers, without the dictionaries that it prints."""

    def on_log(self, args, state, control, logs=None, **kwargs):
        pass


def say_epochs(trainer: Trainer, lines: EpochLines):
    """Let a trainer print `lines` instead of the dictionaries of transformers; its bar stays."""
    trainer.remove_callback(PrinterCallback)
    had_bar = trainer.pop_callback(ProgressCallback) is not None
    if had_bar:
        trainer.add_callback(_Bar())
    trainer.add_callback(lines)
