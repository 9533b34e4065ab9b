r"""
Real digits in a few minutes, without a GPU and without a network.

    python training/demo.py --output_dir demo

Trains a small Gated PixelCNN on the 11,000 MNIST digits that come with the project (pixels above 127 are 1), for a
fixed number of steps, but at most 4 minutes. Prints bits per dimension on 1,000 test digits before and after, and
writes `samples.png` (64 new digits) and `completions.png` (upper halves given, lower halves drawn) beside the model.
"""

import shutil
import statistics
import time
from dataclasses import dataclass, field
from pathlib import Path

import torch
from command_line import CommandLineParser, one_line_errors
from transformers import AutoModel, TrainerCallback, set_seed

from hf_pixelcnn import GatedPixelCNNConfig, PixelCNNImageProcessor
from hf_pixelcnn.pictures_causal_image import image_grid
from hf_pixelcnn.training import (
    LevelDataset,
    PixelCNNTrainer,
    PixelCNNTrainingArguments,
    collate_levels,
    completion_grid,
    has_fast_bfloat16,
    load_split,
    score,
)

DIGITS = Path(__file__).resolve().parent.parent / "tests" / "data" / "mnist_digits"
# The first kernel is wide because that is cheap and lets a pixel see 15 rows above it: half a digit.
CONFIG = GatedPixelCNNConfig(hidden_size=32, num_hidden_layers=8, first_kernel_size=17, head_hidden_size=32)
BATCH_SIZE = 32


@dataclass
class DemoArguments:
    output_dir: str = field(default="demo", metadata={"help": "Folder for the model and the pictures."})
    max_steps: int = field(default=1500, metadata={"help": "Training steps."})
    max_seconds: float = field(default=240.0, metadata={"help": "Stop training after this many seconds in any case."})
    seed: int = field(default=0, metadata={"help": "Seed of weights, order of images, and samples."})


class WallClockStop(TrainerCallback):
    """Stops training at a moment given by `time.perf_counter()`."""

    def __init__(self, deadline: float):
        self.deadline = deadline

    def on_step_end(self, args, state, control, **kwargs):
        control.should_training_stop = control.should_training_stop or time.perf_counter() > self.deadline


def seconds_per_step(bf16: bool, torch_compile: bool) -> float:
    """Median time of a training step with these settings; the first ones, which compile, do not count."""
    model = AutoModel.from_config(CONFIG).to(memory_format=torch.channels_last).train()
    network = torch.compile(model, dynamic=False) if torch_compile else model
    optimizer = torch.optim.AdamW(model.parameters())
    levels = torch.randint(2, (BATCH_SIZE, 1, 28, 28), dtype=torch.uint8)
    labels, seconds = levels.long(), []
    for _ in range(6):
        start = time.perf_counter()
        with torch.autocast("cpu", dtype=torch.bfloat16, enabled=bf16):
            loss = network(levels, labels=labels).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        seconds.append(time.perf_counter() - start)
    return statistics.median(seconds[2:])


def fastest_settings() -> dict[str, bool]:
    """`bf16` if the processor supports it; `torch_compile` if it works here and is faster, which is tried."""
    bf16 = has_fast_bfloat16("cpu")
    trials = [{"bf16": bf16, "torch_compile": False}]
    if shutil.which("g++") or shutil.which("clang++"):
        trials.append({"bf16": bf16, "torch_compile": True})
    timed = []
    for settings in trials:
        try:
            timed.append((seconds_per_step(**settings), settings))
        except Exception as error:  # a compiler that does not work: the demo runs without it
            print(f"{settings} does not work here ({type(error).__name__}), going on without")
    for seconds, settings in timed:
        print(f"{BATCH_SIZE / seconds:6.0f} images/s with {settings}")
    return min(timed, key=lambda pair: pair[0])[1]


@one_line_errors
def main(arguments: list[str] | None = None):
    (demo,) = CommandLineParser([DemoArguments]).parse(arguments)
    start = time.perf_counter()
    output = Path(demo.output_dir)
    processor = PixelCNNImageProcessor(num_levels=2, binarization="threshold")
    digits, test_digits = (
        LevelDataset(load_split(str(DIGITS), split), num_levels=2, processor=processor) for split in ("train", "test")
    )
    print(f"{len(digits)} digits to train on, {len(test_digits)} to test on")
    args = PixelCNNTrainingArguments(
        output_dir=str(output),
        max_steps=demo.max_steps,
        per_device_train_batch_size=BATCH_SIZE,
        learning_rate=2e-3,
        lr_scheduler_type="constant_with_warmup",
        warmup_steps=100,
        adam_beta2=0.99,
        ema_decay=0.998,
        channels_last=True,
        eval_strategy="no",
        save_strategy="no",
        logging_steps=250,
        seed=demo.seed,
        use_cpu=True,
        **fastest_settings(),
    )
    set_seed(demo.seed)
    model = AutoModel.from_config(CONFIG)
    before = score(model, test_digits, 100, collate_levels)
    trainer = PixelCNNTrainer(
        model,
        args,
        train_dataset=digits,
        processing_class=processor,
        callbacks=[WallClockStop(start + demo.max_seconds)],
    )
    trainer.train()
    trainer.save_model()

    model = AutoModel.from_pretrained(output)  # what was saved: the average of the weights
    after = score(model, test_digits, 100, collate_levels)
    samples = model.generate(num_images=64, generator=torch.Generator().manual_seed(demo.seed), show_progress=True)
    image_grid(processor.post_process(samples)).save(output / "samples.png")

    originals = collate_levels([test_digits[i] for i in range(8)])["labels"]
    upper_half = torch.zeros(28, 28, dtype=torch.bool)
    upper_half[:14] = True
    drawn = model.generate(
        pixel_values=originals.repeat_interleave(6, dim=0),
        known_mask=upper_half,
        generator=torch.Generator().manual_seed(demo.seed),
        show_progress=True,
    )
    images = [processor.post_process(levels) for levels in (originals, drawn)]
    completion_grid(images[0], upper_half, images[1]).save(output / "completions.png")

    for moment, scores in (("before", before), ("after", after)):
        print(f"{moment:>6} training: {scores['bits_per_dim']:.4f} bits/dim, {scores['nats_per_image']:.1f} nats/image")
    print(f"pictures and model are in {output}/ ({trainer.state.global_step} steps)")


if __name__ == "__main__":
    main()
