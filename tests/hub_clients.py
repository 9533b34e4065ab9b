r"""
What people do with a Hub, for processes that `test_hub.py` starts: `python tests/hub_clients.py WHAT FOLDER`.

Each function returns what it saw, which is printed as JSON; the test looks at it and at the server.
"""

import json
import os
import sys
from pathlib import Path

import torch

sys.path += [str(Path(__file__).parent), str(Path(__file__).parent.parent / "training")]


def error_of(call, *args, **kwargs) -> str:
    """Type and message of the error that a call ends with."""
    try:
        call(*args, **kwargs)
    except (Exception, SystemExit) as error:
        return f"{type(error).__name__}: {error}"
    return "no error"


def push(folder: Path) -> dict:
    """Push a model, a pipeline, a training run and a data set, and read them back."""
    from conftest import build_model, random_inputs, seeded
    from datasets import Dataset, load_dataset
    from huggingface_hub import snapshot_download
    from PIL import Image
    from transformers import AutoModel, pipeline

    from hf_pixelcnn import PixelCNNImagePipeline, PixelCNNImageProcessor
    from hf_pixelcnn.training import PixelCNNTrainer, PixelCNNTrainingArguments

    seen = {}
    model, processor = build_model("gated_pixelcnn", num_levels=4, num_classes=3), PixelCNNImageProcessor(num_levels=4)
    inputs = random_inputs(model)
    torch.save({"inputs": inputs, "logits": model(**inputs).logits.detach()}, folder / "expected.pt")

    seen["wrong token"] = error_of(model.push_to_hub, "tester/model", token="hf_wrong")
    seen["reader"] = error_of(model.push_to_hub, "tester/model", token="hf_reader")
    model.push_to_hub("tester/model")
    seen["wrong token, known repo"] = error_of(model.push_to_hub, "tester/model", token="hf_wrong")
    seen["reader, known repo"] = error_of(model.push_to_hub, "tester/model", token="hf_reader")
    processor.push_to_hub("tester/model")
    PixelCNNImagePipeline(model, image_processor=processor).push_to_hub("tester/pipe", max_shard_size="3KB")
    model.push_to_hub("tester/private", private=True)
    seen["private, without a token"] = error_of(AutoModel.from_pretrained, "tester/private", token=False)
    AutoModel.from_pretrained("tester/private")
    seen["snapshot"] = sorted(os.listdir(snapshot_download("tester/model")))
    seen["no such repo"] = error_of(AutoModel.from_pretrained, "tester/none")

    model.push_to_hub("tester/bare")
    pipe = pipeline("unconditional-image-generation", model="tester/bare")  # has no image processor
    seen["bare levels"] = pipe.image_processor.num_levels
    seen["bare images"] = len(pipe(class_ids=[0, 1], generator=seeded()).images)

    images = [{"pixel_values": levels.numpy(), "class_ids": 0} for levels in inputs["pixel_values"].byte()]
    args = PixelCNNTrainingArguments(
        output_dir=str(folder / "trained"),
        hub_model_id="tester/trained",
        push_to_hub=True,
        ema_decay=0.9,
        max_steps=3,
        per_device_train_batch_size=2,
        eval_strategy="no",
        disable_tqdm=True,
        use_cpu=True,
    )
    args.set_push_to_hub("tester/trained", strategy="all_checkpoints")  # would publish what belongs to the run
    trainer = PixelCNNTrainer(model, args, train_dataset=images, processing_class=processor)
    trainer.train()
    trainer.push_to_hub()
    torch.save(trainer.ema.average, folder / "average.pt")

    rows = Dataset.from_dict({"image": [Image.new("L", (6, 5), shade) for shade in (0, 100)], "label": [0, 1]})
    rows.push_to_hub("tester/shades")
    loaded = load_dataset("tester/shades", split="train")
    seen["shades"] = [loaded[i]["image"].getpixel((0, 0)) for i in range(len(loaded))]
    return seen


def publish(folder: Path) -> dict:
    """`training/publish.py`, from the first time to a new version; the dry run alone checks without the package."""
    import publish as script
    from conftest import build_model

    from hf_pixelcnn import PixelCNNImageProcessor

    run = folder / "run"
    build_model("pixelcnn", num_classes=2).save_pretrained(run)
    PixelCNNImageProcessor(num_levels=2, binarization="threshold", threshold=3).save_pretrained(run)
    results = {"dataset": "tester/shades", "split": "test", "num_images": 2, "bits_per_dim": 0.1234567, "seed": 1}
    (run / "results.json").write_text(json.dumps(results))
    words = ["--model", str(run), "--repo_id", "tester/published"]
    seen = {}

    script.main([*words, "--dry_run", "true"])
    seen["after the dry run"] = error_of(script.HfApi().model_info, "tester/published")
    script.check_folder = lambda folder, model: None
    for token in ("", "hf_wrong", "hf_reader"):
        os.environ["HF_TOKEN"] = token
        seen[f"token {token!r}"] = error_of(script.main, words)
    os.environ["HF_TOKEN"] = "hf_writer"
    script.main(words)
    script.main([*words, "--commit_message", "The same again"])
    script.main([*words, "--commit_message", "In shards", "--max_shard_size", "3KB"])
    (run / "results.json").write_text(json.dumps(results | {"bits_per_dim": 0.2}))
    script.main([*words, "--commit_message", "New score", "--max_shard_size", "3KB", "--revision", "v2"])
    seen["private, but known"] = error_of(script.main, [*words, "--private", "true"])
    script.main([*words[:2], "--repo_id", "tester/secret", "--private", "true"])
    script.check_space = lambda folder: None
    space = ["--space", "true", "--output_dir", str(folder / "space"), "--repo_id", "tester/page"]
    script.main(space)
    script.main([*space, "--commit_message", "The same again"])
    script.HfApi().create_repo("tester/other-page", repo_type="space", space_sdk="gradio")
    script.HfApi().upload_file(
        path_or_fileobj=b"mine", path_in_repo="mine.py", repo_id="tester/other-page", repo_type="space"
    )
    seen["a Space of somebody else"] = error_of(script.main, [*space[:-1], "tester/other-page"])
    script.HfApi().create_repo("tester/else")
    for name in ("model.safetensors", "LICENSE"):
        script.HfApi().upload_file(path_or_fileobj=b"mine", path_in_repo=name, repo_id="tester/else")
    seen["of somebody else"] = error_of(script.main, [*words[:2], "--repo_id", "tester/else"])
    os.environ["HF_TOKEN"] = "hf_reader"
    seen["reader, known repo"] = error_of(script.main, [*words, "--commit_message", "Not allowed"])
    return seen


def load_with_package(folder: Path) -> dict:
    return load(folder, {})


def load_without_package(folder: Path) -> dict:
    from load_without_package import HiddenPackage

    sys.meta_path.insert(0, HiddenPackage)
    from transformers import AutoModel

    seen = {"not trusted": error_of(AutoModel.from_pretrained, "tester/model")}
    return seen | load(folder, {"trust_remote_code": True})


def load(folder: Path, trust: dict) -> dict:
    """Load what `push` and `publish` have pushed."""
    import re

    if not trust:
        import hf_pixelcnn  # noqa: F401
    from huggingface_hub import hf_hub_download
    from transformers import AutoModel, pipeline
    from transformers.models.auto.image_processing_auto import AutoImageProcessor  # the real class in every version

    seen, expected = {}, torch.load(folder / "expected.pt")
    for repo_id in ("tester/model", "tester/pipe"):
        model = AutoModel.from_pretrained(repo_id, **trust)
        seen[f"{repo_id} is right"] = torch.equal(model(**expected["inputs"]).logits, expected["logits"])
        seen[f"{repo_id} levels"] = AutoImageProcessor.from_pretrained(repo_id, **trust).num_levels
    seen["module"] = type(model).__module__
    average = AutoModel.from_pretrained("tester/trained", **trust).state_dict()
    seen["trained is the average"] = all(
        torch.allclose(average[name], value) for name, value in torch.load(folder / "average.pt").items()
    )
    task = [] if trust else ["unconditional-image-generation"]
    pipe = pipeline(*task, model="tester/pipe", **trust)
    seen["pipeline"] = type(pipe).__name__, len(pipe(class_ids=[0, 1, 2]).images)
    for revision in ("main", "v2"):
        card = Path(hf_hub_download("tester/published", "README.md", revision=revision)).read_text(encoding="utf-8")
        seen[f"card {revision}"] = card
    code = re.findall(r"^```python\n(.*?)^```", card, re.MULTILINE | re.DOTALL)[1 if trust else 0]
    code = code.replace("import AutoImageProcessor, ", "import ")  # a placeholder in transformers 5.17
    names = {"AutoImageProcessor": AutoImageProcessor}
    exec(code, names)
    seen["images of the card"] = [image.size for image in names["images"]]
    return seen


if __name__ == "__main__":
    print("\n" + json.dumps(globals()[sys.argv[1]](Path(sys.argv[2]))))
