r"""
Numbers of the published models that must not move, in `tests/golden/<model>.safetensors` for tests/test_golden.py.

    python tests/write_golden.py                    # writes all of them anew
    python tests/write_golden.py pixelcnn-pp-mnist  # or some

Write them anew only if a change of likelihoods or samples at fixed weights and seeds is meant: CONTRIBUTING.md says
what that means. The images are bundled digits, or those of `tests/golden/images_<channels>x<size>.safetensors`.
"""

import argparse
from pathlib import Path

import torch
from datasets import load_dataset
from safetensors.torch import load_file, save_file
from transformers import AutoModel
from transformers.models.auto.image_processing_auto import AutoImageProcessor  # the real class in every version

import hf_pixelcnn

ROOT = Path(__file__).parent.parent
GOLDEN = ROOT / "tests" / "golden"
MODELS = sorted(path.parent.name for path in ROOT.glob("model_cards/*/config.json"))
NUM_IMAGES = 8
NUM_DIGITS = 200
BAND = slice(10, 18)  # rows of what the stream holds: decoding goes pixel by pixel
PIXELS = 37  # every 37th pixel's parameters are kept: a number that visits all columns


def load(name: str, dtype: torch.dtype = torch.float64):
    """A published model and its image processor."""
    folder = ROOT / "model_cards" / name
    return AutoModel.from_pretrained(folder, dtype=dtype), AutoImageProcessor.from_pretrained(folder)


def bundled_digits(processor) -> tuple[torch.Tensor, torch.Tensor]:
    """Levels `(200, 1, 28, 28)` and classes `(200,)` of the first test digits in tests/data."""
    rows = load_dataset(str(ROOT / "tests" / "data" / "mnist_digits"), split=f"test[:{NUM_DIGITS}]")
    return processor(rows["image"][:], return_tensors="pt")["pixel_values"], torch.tensor(rows["label"][:])


def images_for(model, processor) -> tuple[torch.Tensor, torch.Tensor]:
    """Eight images as levels, and their classes."""
    config = model.config
    path = GOLDEN / f"images_{config.num_channels}x{config.image_size[0]}.safetensors"
    if path.exists():
        images = load_file(path)
        return images["pixel_values"], images["class_ids"]
    return tuple(part[:NUM_IMAGES] for part in bundled_digits(processor))


@torch.no_grad()
def likelihood(model, pixel_values: torch.Tensor, class_ids: torch.Tensor) -> dict[str, torch.Tensor]:
    """`log_prob` of every dimension, and the parameters of some pixels, `(pixels, images, ...)`."""
    condition = {"class_ids": class_ids} if model.config.num_classes else {}
    parameters = model.output_distribution.pixels(model(pixel_values, **condition).logits).flatten(1, 2)
    return {
        "log_prob": model.log_prob(pixel_values, **condition).contiguous(),
        "logits": parameters[:, ::PIXELS].movedim(1, 0).contiguous(),
    }


@torch.no_grad()
def digit_nats(model, processor) -> torch.Tensor:
    """Nats per image of the digits, a mean in float64."""
    pixel_values, class_ids = bundled_digits(processor)
    condition = {"class_ids": class_ids} if model.config.num_classes else {}
    return -model.log_prob(pixel_values, **condition).double().sum((1, 2, 3)).mean()


def sample(model) -> torch.Tensor:
    """One image of seed 0, of class 0 where there are classes."""
    condition = {"class_ids": 0} if model.config.num_classes else {}
    return model.generate(generator=torch.Generator().manual_seed(0), **condition)


def write(name: str):
    model, processor = load(name)
    pixel_values, class_ids = images_for(model, processor)
    condition = {"class_ids": class_ids[:2]} if model.config.num_classes else {}
    single = load(name, torch.float32)[0]
    stream = hf_pixelcnn.compress(single, pixel_values[:2, :, BAND].long(), **condition)
    tensors = {
        "pixel_values": pixel_values.short(),
        "class_ids": class_ids.short(),
        **likelihood(model, pixel_values, class_ids),
        "sample": sample(model).short(),
        "stream": torch.frombuffer(bytearray(stream), dtype=torch.uint8),
    }
    if model.config.num_channels == 1:
        tensors["digit_nats"] = digit_nats(single, processor)
    save_file(tensors, GOLDEN / f"{name}.safetensors")
    print(f"{GOLDEN / name}.safetensors")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("models", nargs="*", help=f"Of {', '.join(MODELS)}; all if none is named.")
    names = parser.parse_args().models
    if unknown := set(names) - set(MODELS):
        parser.error(f"unknown models {sorted(unknown)}; known are {', '.join(MODELS)}")
    for model_name in names or MODELS:
        write(model_name)
