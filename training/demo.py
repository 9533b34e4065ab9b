r"""
Real digits in a few minutes, without a GPU and without a network.

    python training/demo.py --output_dir demo

First a published model draws digits and completes real ones, within seconds: `published_samples.png` and
`published_completions.png`. Then a small Gated PixelCNN is trained from scratch on the 11,000 MNIST digits that come
with the project (pixels above 127 are 1), for a fixed number of steps, but at most 4 minutes, in which nothing but
training counts. It is saved beside `samples.png` (64 new digits) and `completions.png` (upper halves given, lower
halves drawn), and its bits per dimension on 100 test digits, before and after, are printed. If they end above 0.105,
where many samples are not digits yet, it says so.
"""

import time
from dataclasses import dataclass, field
from pathlib import Path

from command_line import CommandLineParser, check_first, one_line_errors

if __name__ == "__main__":
    check_first(__file__, __doc__)  # before the imports that take seconds: a typo is answered at once
    print("Loading torch and transformers ...", flush=True)

import torch
from transformers import AutoModel, PrinterCallback, TrainerCallback, set_seed

from hf_pixelcnn import GatedPixelCNNConfig, PixelCNNImageProcessor, image_grid
from hf_pixelcnn.likelihood_causal_image import bits_per_dim
from hf_pixelcnn.sampling_causal_image import num_threads
from hf_pixelcnn.training import (
    LevelDataset,
    PixelCNNTrainer,
    PixelCNNTrainingArguments,
    collate_levels,
    load_model,
    load_split,
    nats_per_image,
    save_picture,
)
from hf_pixelcnn.training.files import held
from hf_pixelcnn.training.pictures import add_captions, completion_grid

ROOT = Path(__file__).resolve().parent.parent
DIGITS = ROOT / "tests" / "data" / "mnist_digits"
PUBLISHED = ROOT / "model_cards" / "pixelcnn-pp-mnist"
# The first kernel is wide because that is cheap and lets a pixel see 15 rows above it: half a digit.
CONFIG = GatedPixelCNNConfig(hidden_size=32, num_hidden_layers=8, first_kernel_size=17, head_hidden_size=32)
BATCH_SIZE = 16
ENOUGH_BITS = 0.105  # per dimension: below, most of what is drawn are digits; at 0.12 about half of it


@dataclass
class DemoArguments:
    output_dir: str = field(default="demo", metadata={"help": "Folder for the model and the pictures."})
    max_steps: int = field(default=3000, metadata={"help": "Training steps."})
    max_seconds: float = field(default=240.0, metadata={"help": "Stop training after this many seconds in any case."})
    seed: int = field(default=0, metadata={"help": "Seed of weights, order of images, and samples."})


def say(text: str):
    print(text, flush=True)


class TrainingClock(TrainerCallback):
    r"""
    Stops training after a time, says how far it is, and finds out whether several threads are faster than one.

    On cores that others use, too, a step with two threads can take 8 times as long as with one. So the first three
    steps have one thread, and the next ones all, unless these turn out slower.

    Args:
        max_seconds (`float`): Of training.
        max_threads (`int`): How many to try.
        every (`float`): Seconds from one line to the next.
    """

    def __init__(self, max_seconds: float, max_threads: int, every: float = 20.0):
        self.max_seconds, self.max_threads, self.every = max_seconds, max_threads, every
        self.seconds: list[float] = []  # of each step

    def on_train_begin(self, args, state, control, **kwargs):
        self.start = self.said = self.step_start = time.perf_counter()

    def on_step_end(self, args, state, control, **kwargs):
        now = time.perf_counter()
        self.seconds.append(now - self.step_start)
        self.choose_threads()
        if now - self.said > self.every:
            self.said = now
            say(f"   step {state.global_step} of at most {state.max_steps}, {now - self.start:.0f} s")
        control.should_training_stop = control.should_training_stop or now - self.start > self.max_seconds
        self.step_start = now

    def choose_threads(self):
        step, with_one = len(self.seconds), min(self.seconds[:3])
        if step == 3:
            torch.set_num_threads(self.max_threads)
        elif (step == 4 and self.seconds[-1] > 2 * with_one) or (step == 5 and self.seconds[-1] > with_one):
            torch.set_num_threads(1)


def draw_pictures(model, processor, digits: LevelDataset, name: str, seed: int, samples: Path, completions: Path):
    r"""
    Draw new digits and complete given ones, as two captioned pictures.

    Args:
        model, processor: The model, with or without classes, and its image processor.
        digits ([`LevelDataset`]): Eight images whose upper halves are kept; with classes if the model has them.
        name (`str`): The model, in the captions.
        seed (`int`): Of the samples.
        samples (`Path`), completions (`Path`): Where to write the pictures.
    """
    num_classes = model.config.num_classes
    classes = {"class_ids": torch.arange(num_classes).repeat_interleave(6)} if num_classes else {"num_images": 64}
    drawn = model.generate(generator=torch.Generator().manual_seed(seed), **classes)
    grid = image_grid(processor.post_process(drawn), 6 if num_classes else None)
    names = [str(model.config.id2label[i]) for i in range(num_classes)]
    kinds = ", a row for each class" if num_classes else ""
    save_picture(add_captions(grid, f"Drawn by {name}{kinds}; seed {seed}, not selected", names), samples, seed=seed)

    batch = collate_levels([digits[i] for i in range(8)])
    upper_half = torch.zeros(28, 28, dtype=torch.bool)
    upper_half[:14] = True
    drawn = model.generate(
        pixel_values=batch["labels"].repeat_interleave(6, dim=0),
        known_mask=upper_half,
        class_ids=batch["class_ids"].repeat_interleave(6) if num_classes else None,
        generator=torch.Generator().manual_seed(seed),
    )
    grid = completion_grid(processor.post_process(batch["labels"]), upper_half, processor.post_process(drawn))
    title = f"Test digits, their given upper halves, and six lower halves drawn by {name}; seed {seed}, not selected"
    save_picture(add_captions(grid, title, columns=["original", "given", *["drawn"] * 6]), completions, seed=seed)


def show_published(output: Path, seed: int):
    """The first stage: what a trained model does."""
    name = f"{PUBLISHED.parent.name}/{PUBLISHED.name}"
    if not (PUBLISHED / "config.json").exists():
        say(f"1. Left out: {name}, a published model, is not in this copy of the project.")
        return
    say(f"1. A published model, {name}, draws 60 digits and completes 8 (some seconds)")
    model, processor = load_model(str(PUBLISHED))
    digits = LevelDataset(load_split(str(DIGITS), "test[:8]"), model.config.num_levels, processor, with_classes=True)
    paths = output / "published_samples.png", output / "published_completions.png"
    draw_pictures(model, processor, digits, name, seed, *paths)
    say(f"   look at {paths[0]} and {paths[1]}")


@torch.no_grad()
def bits_of(model, test_digits: LevelDataset) -> float:
    """Bits per dimension of the first 100 test digits."""
    batch = collate_levels([test_digits[i] for i in range(100)])
    nats = sum(nats_per_image(model.eval(), part).sum().item() for part in batch["pixel_values"].split(50))
    return bits_per_dim(nats, batch["pixel_values"].numel())


def train(demo: DemoArguments, model, processor, digits: LevelDataset, clock: TrainingClock) -> int:
    """Train a model and save the average of its weights; returns the number of steps."""
    args = PixelCNNTrainingArguments(
        output_dir=demo.output_dir,
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
        logging_strategy="no",
        report_to=[],
        disable_tqdm=True,
        seed=demo.seed,
        use_cpu=True,
    )
    trainer = PixelCNNTrainer(model, args, train_dataset=digits, processing_class=processor, callbacks=[clock])
    trainer.remove_callback(PrinterCallback)  # the clock says what is worth a line
    trainer.train()
    trainer.save_model()
    return trainer.state.global_step


def advice(demo: DemoArguments, steps: int, bits: float, seconds: float) -> str:
    """What to say when training ended before most of what is drawn are digits."""
    is_time = steps < demo.max_steps
    why = f"the {demo.max_seconds:g} s were over" if is_time else "these were all its steps"
    return (
        f"   Many of these are not digits yet: {bits:.3f} bits/dim, where most are below {ENOUGH_BITS}, and about half "
        f"at 0.12.\n   After {steps} steps in {seconds:.0f} s {why}. Longer training makes them better:\n"
        f"   python training/demo.py --output_dir {demo.output_dir} --max_seconds {3 * demo.max_seconds:.0f} "
        f"--max_steps {2 * demo.max_steps}"
    )


def show(demo: DemoArguments, output: Path):
    """All stages."""
    output.mkdir(parents=True, exist_ok=True)
    max_threads = torch.get_num_threads()
    with num_threads(1):  # only training is large enough to try more
        show_published(output, demo.seed)

        say(f"2. A new model, and the digits of {DIGITS.relative_to(ROOT)}")
        processor = PixelCNNImageProcessor(num_levels=2, binarization="threshold")
        digits, test_digits = (
            LevelDataset(load_split(str(DIGITS), split), num_levels=2, processor=processor)
            for split in ("train", "test")
        )
        set_seed(demo.seed)
        model = AutoModel.from_config(CONFIG)
        before = bits_of(model, test_digits)
        say(f"   {model.num_parameters():,} parameters, untrained: {before:.3f} bits/dim on 100 test digits")
        say(f"3. It is trained on {len(digits):,} digits, {demo.max_steps:,} steps or {demo.max_seconds:.0f} s")
        clock = TrainingClock(demo.max_seconds, max_threads)
        steps = train(demo, model, processor, digits, clock)
        seconds = sum(clock.seconds)
        threads = torch.get_num_threads()
    with num_threads(1):
        ended_with = f"{threads} thread{'s' * (threads > 1)} in the end"
        say(f"   {steps} steps of {BATCH_SIZE} digits in {seconds:.0f} s, {ended_with}")
        model = AutoModel.from_pretrained(output)  # what was saved: the average of the weights
        after = bits_of(model, test_digits)
        say(f"4. After training: {after:.3f} bits/dim, {before:.3f} before. The model draws 64 digits and completes 8")
        name = f"the model trained here ({steps} steps, {after:.3f} bits/dim)"
        paths = output / "samples.png", output / "completions.png"
        draw_pictures(model, processor, test_digits, name, demo.seed, *paths)
    say(f"   look at {paths[0]} and {paths[1]}; the model is in {output}")
    if after > ENOUGH_BITS:
        say(advice(demo, steps, after, seconds))


@one_line_errors
def main(arguments: list[str] | None = None):
    (demo,) = CommandLineParser([DemoArguments]).parse(arguments)
    with held(demo.output_dir):
        show(demo, Path(demo.output_dir))


if __name__ == "__main__":
    main()
