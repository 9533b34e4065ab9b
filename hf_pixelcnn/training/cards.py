"""Model cards: how to load a trained model, and what is known about it. Their text is in `model_card.md`."""

import re
from pathlib import Path

from huggingface_hub import EvalResult, ModelCard, ModelCardData
from transformers import PreTrainedModel

from .. import FAMILIES
from ..image_processing_causal_image import PixelCNNImageProcessor

TEMPLATE = Path(__file__).with_name("model_card.md")
TASK = "unconditional-image-generation"
METRICS = {  # keys in results.json: names, and digits worth giving
    "bits_per_dim": ("bits per dimension", 4),
    "nats_per_dim": ("nats per dimension", 4),
    "nats_per_image": ("nats per image", 2),
}


def model_card(
    place: str,
    is_on_hub: bool,
    model: PreTrainedModel,
    processor: PixelCNNImageProcessor | None,
    results: dict,
    recipe: str | None,
    license: str,
    sample_seed: str | None = None,
    has_curve: bool = False,
) -> ModelCard:
    r"""
    The card of a published model. It claims nothing beyond `results`.

    Args:
        place (`str`): What the card gives to `from_pretrained`; its last part is the name of the model.
        is_on_hub (`bool`): Whether that is a repository on the Hub, which holds source files, or a folder without them.
        model, processor: The model, and its image processor (`None` for codes).
        results (`dict`): What training/train.py writes to `results.json`, or nothing.
        recipe (`str`, *optional*): Text of the recipe of the run.
        license (`str`): Licence of the weights, as the Hub spells it.
        sample_seed (`str`, *optional*): Seed of the grid `samples.png`, if that is known.
        has_curve (`bool`): Whether there is a `loss_curve.png`.
    """
    config, name = model.config, Path(place).name
    levels = describe_levels(processor, config.num_levels)
    channels = {1: "one channel", 3: "three channels"}.get(config.num_channels, f"{config.num_channels} channels")
    return ModelCard.from_template(
        card_data(name, config.model_type, levels, results, license),
        template_path=str(TEMPLATE),
        name=name,
        place=place,
        is_on_hub=is_on_hub,
        has_processor=processor is not None,
        request=request_of_four(config.num_classes),
        config=config,
        family=FAMILIES[config.model_type],
        num_parameters=f"{model.num_parameters():,}",
        size="×".join(map(str, config.image_size)),
        channels=channels,
        how_good=how_good(results),
        levels=levels,
        rows_seen=model.model.rows_seen_above,
        scores=table_of_scores(results),
        training=facts_of_training(results),
        command=training_command(results),
        quality=results.get("quality"),
        sample_seed=sample_seed,
        has_curve=has_curve,
        commit=results.get("commit"),
        recipe=recipe,
    )


def how_good(results: dict) -> list[str]:
    """What was measured, in a few words each; nothing if nothing was."""
    words = []
    if "bits_per_dim" in results:
        where = f" on `{results['split']}` of `{results['dataset']}`" if "split" in results else ""
        words.append(f"**{results['bits_per_dim']:.4f} bits per dimension**{where}")
    if judged := results.get("judged"):  # by training/judge.py
        share = judged["share_of_samples_taken_for_their_class"]
        words.append(
            f"{share:.1%} of {judged['num_images']:,} samples are taken for their class by `{judged['classifier']}`"
        )
        if "accuracy_of_the_classifier" in judged:  # by training/score.py
            words[-1] += f", which is right about {judged['accuracy_of_the_classifier']:.1%} of real images"
    return words


def training_command(results: dict) -> str | None:
    """The command that trains such a model, from its start, in a copy of the project."""
    if "command" not in results:
        return None
    command = re.sub(r" --resume_from_checkpoint(=| +)\S+", "", results["command"])
    return f"python training/{command}" if command.startswith("train.py") else command


def describe_levels(processor: PixelCNNImageProcessor | None, num_levels: int) -> str:
    """How images become levels, in a few words."""
    if processor is None:
        return f"{num_levels:,} symbols"
    if processor.binarization == "threshold":
        return f"two levels: pixels above {processor.threshold} are 1"
    if processor.binarization == "stochastic":
        return "two levels, drawn: a pixel is 1 with probability pixel / 255"
    if num_levels == 2:
        return "two levels: pixels above 127 are 1"
    return "8-bit pixels" if num_levels == 256 else f"{num_levels} levels: floor(pixel · {num_levels} / 256)"


def card_data(name: str, model_type: str, levels: str, results: dict, license: str) -> ModelCardData:
    """The metadata of a card. What `results` does not hold is left out."""
    dataset = results.get("dataset", "")
    scores = [
        EvalResult(
            task_type=TASK,
            dataset_type=dataset,
            dataset_name=f"{dataset}, {levels}",
            dataset_split=results.get("split"),
            metric_type=key,
            metric_name=metric,
            metric_value=round(results[key], digits),
        )
        for key, (metric, digits) in METRICS.items()
        if key in results
    ]
    return ModelCardData(
        license=license,
        library_name="transformers",
        pipeline_tag=TASK,
        tags=list(dict.fromkeys([model_type.replace("_", "-"), "pixelcnn", "autoregressive", "likelihood"])),
        datasets=[dataset] if re.fullmatch(r"[\w.-]+/[\w.-]+", dataset) else None,
        metrics=[score.metric_type for score in scores] or None,
        model_name=name if scores else None,
        eval_results=scores or None,
    )


def request_of_four(num_classes: int) -> str:
    """Arguments of `generate` that draw four images."""
    second = min(1, num_classes - 1)
    wanted = f"class_ids={[0, 0, second, second]}" if num_classes else "num_images=4"
    return f"{wanted}, generator=torch.Generator().manual_seed(0)"


def table_of_scores(results: dict) -> dict[str, str]:
    """Cells of the table of results by their titles; empty if nothing was measured."""
    measured = {name: f"{results[key]:.{digits}f}" for key, (name, digits) in METRICS.items() if key in results}
    if not measured:
        return {}
    cells = {"data set": f"`{results['dataset']}`"}
    if "split" in results:
        cells["split"] = f"`{results['split']}`"
    if "num_images" in results:
        cells["images"] = f"{results['num_images']:,}"
    return cells | measured


def facts_of_training(results: dict) -> list[str]:
    """How the model was trained, as far as the run wrote it down."""
    facts = []
    if "training_split" in results:
        facts.append(f"on `{results['training_split']}` of `{results['dataset']}`")
    for key, unit in (("num_training_images", "images"), ("epochs", "epochs"), ("steps", "steps")):
        if key in results:
            facts.append(f"{round(results[key], 2):,} {unit}")
    if "seed" in results:
        facts.append(f"seed {results['seed']}")
    if "training_seconds" in results and "--resume_from_checkpoint" not in results.get("command", ""):
        facts.append(f"{results['training_seconds'] / 60:.1f} minutes on {results.get('device', 'one machine')}")
    if "training_core_seconds" in results:
        facts.append(f"{results['training_core_seconds'] / 3600:.2g} core-hours")
    return facts
