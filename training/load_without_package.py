r"""
Load a saved model as somebody without the package would: transformers runs the source files in the folder.

    python -I training/load_without_package.py FOLDER QUESTION ANSWER

`publish.py` runs this in a fresh process. QUESTION is a safetensors file with `pixel_values`, `num_threads` and, for a
conditional model, `class_ids`. ANSWER becomes one with the `logits` of these images, one image drawn with seed 0
(`levels`) and, if the folder has an image processor, its pixels (`pixels`).
"""

import inspect
import sys
from pathlib import Path

import torch
from safetensors.torch import load_file, save_file


class HiddenPackage:
    """Import hook that makes `hf_pixelcnn` impossible to import, even if it is installed."""

    @staticmethod
    def find_spec(name, path=None, target=None):
        if name.partition(".")[0] == "hf_pixelcnn":
            raise ImportError(f"{name} is hidden, to see whether the folder works without it.")


@torch.no_grad()
def main(folder: str, question: str, answer: str):
    sys.meta_path.insert(0, HiddenPackage)
    from transformers import AutoModel
    from transformers.models.auto.image_processing_auto import AutoImageProcessor  # the real class in every version

    inputs = load_file(question)
    torch.set_num_threads(int(inputs.pop("num_threads")))
    model = AutoModel.from_pretrained(folder, trust_remote_code=True)
    condition = {"class_ids": [0]} if "class_ids" in inputs else {}
    tensors = {
        "logits": model(**inputs).logits,
        "levels": model.generate(generator=torch.Generator().manual_seed(0), **condition),
    }
    if Path(folder, "preprocessor_config.json").exists():
        processor = AutoImageProcessor.from_pretrained(folder, trust_remote_code=True)
        tensors["pixels"] = processor.post_process(tensors["levels"], output_type="pt")
    save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, answer)


if __name__ == "__main__":
    if len(sys.argv) != len(inspect.signature(main).parameters) + 1:
        sys.exit(__doc__)
    main(*sys.argv[1:])
