r"""
The cost of sampling and training, as one table.

    python training/benchmark.py                        # everything that fits into about 10 minutes on 2 cores
    python training/benchmark.py --cases grey --batch_sizes 1 16 64
    python training/benchmark.py --cases plain --batch_sizes 1 --train_cases plusplus_grey   # mainly training

Cases are the published models, by their folder in `model_cards`, and networks with random weights. Those cost the same
pixel by pixel, but how many passes or iterations an image takes depends on what a model has learnt.

The cost of a sampler is the time to draw a batch divided by the time of one full forward of the same batch, in the
same process and dtype; 1.0 is a sampler that computes everything once and has no overhead. `forwards` divides by the
eager forward in default memory format, `compiled` by the compiled one. `speed-up` is the time of the naive sampler
divided by the sampler's. Times are medians after a warm-up; forward passes and samplers take turns, each with another
seed every time, and `forwards` is the median of the quotients, so that what else the machine does matters less. A row
is printed only if its images pass the check of [`noise_rule_violations`]. `memory` is the peak of what a call
allocates, in MiB.

Samplers: `naive` runs a full forward for every dimension, `cropped` a forward on the rows that the dimension can see;
both are measured in part and scaled. `fixed_point` gives its number of iterations. Where one forward takes more than
2 seconds, `naive` is the forward's time scaled, and `cropped` and `fixed_point` are left out.

The last lines give the training rate, the share of the measured matrix-product rate that it reaches, and the part of
the time spent in convolutions: for `eager`, in float32, and for `fast`, compiled, in channels_last, with the fused
optimizer, and in bfloat16 where the processor supports it. On a CPU there is also the rate per second of processor
time, of all threads together, which other work on the machine changes less. `plusplus_grey` is the network of
`configs/mnist_pixelcnn_pp.yaml`.
"""

import contextlib
import itertools
import json
import math
import os
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

os.environ.setdefault("KINETO_LOG_LEVEL", "99")  # keeps the profiler, which measures memory, silent

from command_line import CommandLineParser, check_first, one_line_errors

if __name__ == "__main__":
    check_first(__file__, __doc__)  # before the imports that take seconds: a typo is answered at once

import numpy as np
import torch
from torch.profiler import ProfilerActivity, profile
from torch.utils.flop_counter import FlopCounterMode
from transformers import AutoModel

from hf_pixelcnn import GatedPixelCNNConfig, PixelCNNConfig, PixelCNNPPConfig, PixelRNNConfig, PixelSNAILConfig
from hf_pixelcnn.canvas_causal_image import draw_noise
from hf_pixelcnn.training import InputError, run_facts
from hf_pixelcnn.training.files import write_json
from hf_pixelcnn.training.records import has_fast_bfloat16, keep_freed_memory

CARDS = Path(__file__).parents[1] / "model_cards"
PUBLISHED = {path.parent.name: path.parent for path in sorted(CARDS.glob("*/config.json"))}
COLOUR = {"num_channels": 3, "num_levels": 256, "hidden_size": 66, "head_hidden_size": 66}
GREY = {"image_size": 28, "num_channels": 1, "num_levels": 2}
CASES = PUBLISHED | {
    "grey": GatedPixelCNNConfig(),  # the reference network
    "grey_64": GatedPixelCNNConfig(image_size=64),
    "grey_128": GatedPixelCNNConfig(image_size=128),
    "grey_256": GatedPixelCNNConfig(num_levels=256),
    "plain": PixelCNNConfig(),
    "colour": GatedPixelCNNConfig(image_size=32, **COLOUR),
    "colour_64": GatedPixelCNNConfig(image_size=64, **COLOUR),
    "plusplus": PixelCNNPPConfig(hidden_size=40, num_hidden_layers=2),
    "plusplus_grey": PixelCNNPPConfig(
        image_size=28, num_channels=1, hidden_size=32, num_hidden_layers=1, input_encoding="embedding", num_classes=10
    ),
    "snail": PixelSNAILConfig(hidden_size=32, num_hidden_layers=3, num_blocks=2, value_size=32, **GREY),
    "diagonal": PixelRNNConfig(),
    "row": PixelRNNConfig(recurrence="row_lstm"),
}
TOLERANCES = {torch.float64: 1e-9, torch.float32: 1e-4, torch.bfloat16: 0.1}
SLOW_FORWARD = 2.0  # seconds; of slower cases only forwards and the cached sampler are timed
NAIVE_DIMENSIONS = 8


@dataclass
class BenchmarkArguments:
    cases: list[str] = field(
        default_factory=lambda: ["gated-pixelcnn-mnist-binary", "pixelcnn-mnist-binary", "grey", "plain", "colour"],
        metadata={"help": f"Of {', '.join(CASES)}."},
    )
    batch_sizes: list[int] = field(default_factory=lambda: [1, 16, 64], metadata={"help": "Images drawn at once."})
    dtype: str = field(default="float32", metadata={"help": "float32, bfloat16 or float64."})
    device: str = field(default="cpu", metadata={"help": "Device."})
    compiled: bool = field(default=True, metadata={"help": "Also time the compiled forward (compiling takes a while)."})
    train: bool = field(default=True, metadata={"help": "Measure the training rate."})
    train_cases: list[str] = field(default_factory=lambda: ["plain", "grey"], metadata={"help": "Of which networks."})
    output: str | None = field(default=None, metadata={"help": "JSON file to write."})


class EnoughError(Exception):
    """Raised by a processor to stop the naive sampler."""


def median_seconds(
    call: Callable[[], object], device: torch.device, repeats: int = 5, clock: Callable[[], float] = time.perf_counter
) -> float:
    """Median seconds of `call` by a clock, after one call that does not count; of a single call if that is slow."""
    seconds = []
    while len(seconds) <= repeats:
        synchronize(device)
        start = clock()
        call()
        synchronize(device)
        seconds.append(clock() - start)
        if seconds[0] > 5 * SLOW_FORWARD:  # its first operations are warm-up enough
            return seconds[0]
        if len(seconds) == 2 and seconds[1] > SLOW_FORWARD:
            break
    return statistics.median(seconds[1:])


def synchronize(device: torch.device):
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def peak_bytes(call: Callable[[], object], device: torch.device) -> int:
    """The most memory that `call` holds at any time, in bytes, beyond what was held before."""
    if device.type == "cuda":
        before = torch.cuda.memory_allocated(device)
        torch.cuda.reset_peak_memory_stats(device)
        call()
        return torch.cuda.max_memory_allocated(device) - before
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiler:
        call()
    held = highest = 0
    for event in profiler.profiler.kineto_results.events():
        if event.name() == "[memory]":
            held += event.nbytes()
            highest = max(highest, held)
    return highest


@torch.no_grad()
def noise_rule_violations(model, output, noise: torch.Tensor, tolerance: float, class_ids=None) -> int:
    r"""
    Check drawn images against one full forward on them.

    Args:
        model: The model that drew them, in evaluation mode.
        output ([`PixelCNNGenerateOutput`]): Drawn without processors; scores, if it has any, are also checked.
        noise (`torch.DoubleTensor` of shape `(dims, batch)`): The numbers they were drawn with.
        tolerance (`float`): How far rounding may move a probability.
        class_ids (`torch.LongTensor` of shape `(batch,)`, *optional*): Their classes.

    Returns:
        `int`: How many dimensions break the rule: their scores differ from the forward's by more than the tolerance, or
        their level does not follow from their number and the forward's cumulative probabilities, and the number is not
        within the tolerance of a step.
    """
    logits = model(output.sequences, class_ids=class_ids).logits
    levels = output.sequences.permute(0, 2, 3, 1).flatten(1)  # (batch, dims)
    positions = itertools.product(*map(range, output.sequences.shape[2:]), range(output.sequences.shape[1]))
    violations = torch.zeros((), dtype=torch.long, device=levels.device)
    for n, (row, column, channel) in enumerate(positions):
        pixel = model.output_distribution.pixels(logits)[:, row, column]
        previous = levels[:, n - channel : n]
        probabilities = model.output_distribution.level_logits(pixel, channel, previous).double().exp()
        off = torch.zeros_like(levels[:, n], dtype=torch.bool)
        if output.scores is not None:
            off = (output.scores[n].double().exp() - probabilities).abs().amax(-1) > tolerance
        steps = torch.nn.functional.pad(probabilities.cumsum(-1), (1, 0))  # (batch, levels + 1)
        low, high = (steps.gather(1, levels[:, n : n + 1] + i)[:, 0] for i in (0, 1))
        violations += (off | (noise[n] < low - tolerance) | (noise[n] >= high + tolerance)).sum()
    return int(violations)


def paired_seconds(calls: list[Callable[[int], object]], device: torch.device, repeats: int) -> list[list[float]]:
    """Wall-clock seconds of calls that take turns, given the number of the turn; the first one does not count."""
    seconds = [[] for _ in calls]
    for turn in range(repeats + 1):
        for call, own in zip(calls, seconds, strict=True):
            synchronize(device)
            start = time.perf_counter()
            call(turn)
            synchronize(device)
            own.append(time.perf_counter() - start)
    return [own[1:] for own in seconds]


def build(name: str, args: "BenchmarkArguments"):
    """The model of a case, in evaluation mode."""
    case = CASES[name]
    if isinstance(case, Path):
        model = AutoModel.from_pretrained(case)
    else:
        torch.manual_seed(0)
        model = AutoModel.from_config(case)
    return model.to(torch.device(args.device), getattr(torch, args.dtype)).eval()


def conditions(model, batch: int) -> dict[str, torch.Tensor]:
    """All classes in turn for a conditional model, nothing for others."""
    return {"class_ids": torch.arange(batch) % model.config.num_classes} if model.config.num_classes else {}


def naive_seconds(model, batch: int, device: torch.device) -> float:
    """Seconds of the naive sampler, from its first dimensions."""

    def stop(levels, scores):
        if levels.shape[1] == NAIVE_DIMENSIONS:
            raise EnoughError
        return scores

    def first_dimensions():
        with contextlib.suppress(EnoughError):
            model.generate(num_images=batch, sampler="naive", logits_processor=[stop], **conditions(model, batch))

    # One more forward than levels drawn.
    return median_seconds(first_dimensions, device, repeats=3) / (NAIVE_DIMENSIONS + 1) * num_dims(model.config)


def cropped_seconds(forward: Callable[[int], object], model, device: torch.device) -> float:
    """Seconds of forwards on the rows that each dimension sees, from `forward(rows)` at five numbers of rows."""
    config = model.config
    most = int(min(model.model.rows_seen_above + 1, config.image_size[0]))
    measured = sorted({1, *(math.ceil(most * part / 4) for part in range(1, 5))})
    seconds = [median_seconds(lambda rows=rows: forward(rows), device, repeats=3) for rows in measured]
    rows_seen = np.minimum(np.arange(config.image_size[0]) + 1, most)
    return float(np.interp(rows_seen, measured, seconds).sum()) * config.image_size[1] * config.num_channels


def num_dims(config) -> int:
    """Dimensions of an image."""
    return config.num_channels * config.image_size[0] * config.image_size[1]


def compiled_seconds(model, forward: Callable[[torch.nn.Module], object], device: torch.device) -> float:
    """Seconds of `forward(network)`, with the compiled model as network."""
    fast = torch.compile(model, dynamic=False)
    for _ in range(2):  # compilation is not timed
        forward(fast)
    seconds = median_seconds(lambda: forward(fast), device)
    torch.compiler.reset()
    return seconds


def checked_sampler(model, sampler: str, batch: int) -> tuple[Callable[[int], object], int | None, int]:
    """
    A call that draws a batch by a seed, the iterations of `fixed_point`, and the [`noise_rule_violations`] of the
    images of seed 0, drawn once as they are timed and, by the cached sampler, once with scores.
    """
    inputs = conditions(model, batch)

    def draw(seed: int, **options):
        generator = torch.Generator().manual_seed(seed)
        return model.generate(num_images=batch, sampler=sampler, generator=generator, **inputs, **options)

    noise = draw_noise(torch.Generator().manual_seed(0), batch, num_dims(model.config), model.device)
    class_ids = {name: ids.to(model.device) for name, ids in inputs.items()}
    outputs = [draw(0, return_dict_in_generate=True)]
    if sampler == "cached":
        outputs.append(draw(0, return_dict_in_generate=True, output_scores=True))
    tolerance = TOLERANCES[model.dtype]
    violations = sum(noise_rule_violations(model, output, noise, tolerance, **class_ids) for output in outputs)
    return draw, outputs[0].num_iterations if sampler == "fixed_point" else None, violations


def sampling_rows(name: str, batch: int, args: BenchmarkArguments):
    """Rows of the table for one network and batch size."""
    device, model = torch.device(args.device), build(name, args)
    config = model.config
    pixel_values = torch.randint(config.num_levels, (batch, config.num_channels, *config.image_size), device=device)
    class_ids = {key: ids.to(device) for key, ids in conditions(model, batch).items()}

    def forward(network=model, rows=None):
        with torch.inference_mode():
            network(pixel_values[:, :, :rows], **class_ids)

    eager = median_seconds(forward, device)
    compiled = compiled_seconds(model, forward, device) if args.compiled else None
    is_slow = eager > SLOW_FORWARD
    naive = eager * num_dims(config) if is_slow else naive_seconds(model, batch, device)
    row = {
        "case": name,
        "image": "×".join(map(str, [*config.image_size, config.num_channels])),
        "levels": config.num_levels,
        "batch": batch,
        "dtype": args.dtype,
    }
    memory = peak_bytes(forward, device) / 2**20
    yield {**row, "sampler": "(forward)", "seconds": eager, "forwards": 1.0, "memory_mib": memory}
    yield {**row, "sampler": "naive*", "seconds": naive, "forwards": naive / eager}
    if not is_slow:
        cropped = cropped_seconds(lambda rows: forward(rows=rows), model, device)
        yield {
            **row,
            "sampler": "cropped*",
            "seconds": cropped,
            "forwards": cropped / eager,
            "speed_up": naive / cropped,
        }

    for sampler in ["cached"] if is_slow else ["cached", "fixed_point"]:
        draw, iterations, violations = checked_sampler(model, sampler, batch)
        if violations:
            print(f"{name}, batch {batch}, {sampler}: {violations} dimensions break the noise rule, row left out")
            continue
        forwards, draws = paired_seconds([lambda _: forward(), draw], device, repeats=max(3, 15 // batch))
        quotient = statistics.median(a / b for a, b in zip(draws, forwards, strict=True))
        yield {
            **row,
            "sampler": sampler,
            "seconds": statistics.median(draws),
            "forwards": quotient,
            "compiled_forwards": quotient * eager / compiled if compiled else None,
            "speed_up": naive / eager / quotient,
            "memory_mib": peak_bytes(lambda draw=draw: draw(0), device) / 2**20 if sampler == "cached" else None,
            "iterations": iterations,
        }


def matrix_product_rate(device: torch.device, dtype: torch.dtype, size: int = 2048) -> float:
    """Floating-point operations per second in large matrix products."""
    size = size if device.type == "cpu" else 4 * size
    a, b = torch.randn(2, size, size, device=device, dtype=dtype)
    return 2 * size**3 / median_seconds(lambda: a @ b, device, repeats=10)


def product_share(call: Callable[[], object], device: torch.device) -> float:
    """Share of the time of `call` that goes to convolutions and matrix products."""
    on_gpu = device.type == "cuda"
    with profile(activities=[ProfilerActivity.CUDA if on_gpu else ProfilerActivity.CPU]) as profiler:
        call()
        synchronize(device)
    products = total = 0.0
    for event in profiler.key_averages():
        seconds = event.self_device_time_total if on_gpu else event.self_cpu_time_total
        total += seconds
        is_fused = event.key.startswith(("triton_", "cpp_"))  # elementwise, named after what they follow
        if not is_fused and any(part in event.key.lower() for part in ("conv", "mm", "gemm", "xmma", "cutlass")):
            products += seconds
    return products / total


def training_rates(config, batch: int, device: torch.device) -> dict[str, dict]:
    """Images per second in training: `eager` in float32 and the default memory format, and `fast`."""
    fast_dtype = torch.bfloat16 if has_fast_bfloat16(device) else torch.float32
    pixel_values = torch.randint(config.num_levels, (batch, config.num_channels, *config.image_size), device=device)
    product_rates = {dtype: matrix_product_rate(device, dtype) for dtype in {torch.float32, fast_dtype}}
    rates = {}
    for kind, dtype, memory_format in (
        ("eager", torch.float32, torch.contiguous_format),
        ("fast", fast_dtype, torch.channels_last),
    ):
        torch.manual_seed(0)
        model = AutoModel.from_config(config).to(device, memory_format=memory_format).train()
        optimizer = torch.optim.AdamW(model.parameters(), fused=kind == "fast")
        class_ids = {key: ids.to(device) for key, ids in conditions(model, batch).items()}
        with FlopCounterMode(display=False) as counter:
            model(pixel_values, labels=pixel_values, **class_ids).loss.backward()
        network = torch.compile(model, dynamic=False) if kind == "fast" else model

        def step(network=network, optimizer=optimizer, dtype=dtype, class_ids=class_ids):
            with torch.autocast(device.type, dtype=torch.bfloat16, enabled=dtype == torch.bfloat16):
                loss = network(pixel_values, labels=pixel_values, **class_ids).loss
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()

        step()
        seconds = median_seconds(step, device, repeats=7)
        rates[kind] = {
            "images_per_second": batch / seconds,
            "dtype": str(dtype).removeprefix("torch."),
            "share_of_matrix_rate": counter.get_total_flops() / seconds / product_rates[dtype],
            "product_share": product_share(step, device),
        }
        if device.type == "cpu":
            processor_seconds = median_seconds(step, device, repeats=7, clock=time.process_time)
            rates[kind]["images_per_cpu_second"] = batch / processor_seconds
    return rates


HEADER = f"{'case':<27} image      levels  batch  sampler       seconds  forwards  compiled  speed-up  memory"


def sampling_line(row: dict) -> str:
    """A row of [`sampling_rows`] below `HEADER`."""
    numbers = [(row.get("compiled_forwards"), 2), (row.get("speed_up"), 1), (row.get("memory_mib"), 1)]
    compiled, speed_up, memory = ("-" if value is None else f"{value:.{digits}f}" for value, digits in numbers)
    iterations = f"  {row['iterations']} iterations" if row.get("iterations") else ""
    return (
        f"{row['case']:<27} {row['image']:<10} {row['levels']:>6}  {row['batch']:>5}  {row['sampler']:<11} "
        f"{row['seconds']:>9.3f} {row['forwards']:>9.2f} {compiled:>9} {speed_up:>9} {memory:>7}{iterations}"
    )


def training_line(rate: dict) -> str:
    """One of the [`training_rates`]."""
    per_cpu = rate.get("images_per_cpu_second")
    return (
        f"{rate['images_per_second']:.0f} images/s, {f'{per_cpu:.0f} per second of CPU time, ' if per_cpu else ''}"
        f"{rate['share_of_matrix_rate']:.0%} of the rate of {rate['dtype']} matrix products "
        f"({rate['product_share']:.0%} of the time in convolutions)"
    )


@one_line_errors
def main(arguments: list[str] | None = None):
    (args,) = CommandLineParser([BenchmarkArguments]).parse(arguments)
    for cases, known in ((args.cases, set(CASES)), (args.train_cases, CASES.keys() - PUBLISHED)):
        if unknown := sorted(set(cases) - known):
            names = ", ".join(name for name in CASES if name in known)
            raise InputError(f"unknown case {unknown[0]!r}; known are {names}.")
    if args.dtype not in ("float32", "bfloat16", "float64"):
        raise InputError(f"--dtype must be float32, bfloat16 or float64, got {args.dtype!r}.")
    torch.backends.cudnn.allow_tf32 = False  # a forward in float32 is held against samplers that multiply in float32
    start = time.perf_counter()
    print(HEADER + "\n" + "-" * len(HEADER))
    rows = []
    for name in args.cases:
        for batch in args.batch_sizes:
            for row in sampling_rows(name, batch, args):
                rows.append(row)
                print(sampling_line(row), flush=True)
    print("* measured in part and scaled")
    results = {"rows": rows, **run_facts(args.device)}
    if args.train:
        results["training"] = {}
        keep_freed_memory()  # as train.py does
        for name in args.train_cases:
            results["training"][name] = training_rates(CASES[name], 32, torch.device(args.device))
            for kind, rate in results["training"][name].items():
                print(f"training {name}, {kind}: {training_line(rate)}", flush=True)
    print(f"{json.dumps(results['device'])}, {time.perf_counter() - start:.0f} s in all")
    if args.output:
        write_json(results, args.output)


if __name__ == "__main__":
    main()
