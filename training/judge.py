r"""
The share of samples of a class-conditional model that a classifier takes for the class they were drawn for.

    python training/judge.py --model runs/mnist_pixelcnn_pp --classifier model_cards/gated-pixelcnn-mnist-binary

Both are folders or Hub ids. The classifier is any class-conditional model of this package with the same classes, by
Bayes' rule. It sees the pictures through its own image processor, so its levels may differ. The images drawn are of all
classes in turn. The share of real images that the classifier gets right (`training/score.py --classify true`) is about
the most to expect.
"""

from dataclasses import dataclass, field

from command_line import CommandLineParser, check_first, one_line_errors

if __name__ == "__main__":
    check_first(__file__, __doc__)  # before the imports that take seconds: a typo is answered at once

import torch
from tqdm.auto import tqdm

from hf_pixelcnn.canvas_causal_image import bytes_to_draw
from hf_pixelcnn.checks_causal_image import check_memory
from hf_pixelcnn.training import InputError, load_classifier, load_model, load_processor, run_facts
from hf_pixelcnn.training.files import write_json
from hf_pixelcnn.training.saved_models import choose_device


@dataclass
class JudgeArguments:
    model: str = field(metadata={"help": "Folder or Hub id of the model that draws."})
    classifier: str = field(metadata={"help": "Folder or Hub id of a class-conditional model that judges."})
    num_images: int = field(default=1000, metadata={"help": "Images to draw, of the classes in turn."})
    seed: int = field(default=0, metadata={"help": "Seed of the images."})
    guidance_scale: float = field(default=1.0, metadata={"help": "As in `generate`; 1 is the model itself."})
    batch_size: int = field(default=100, metadata={"help": "Images drawn or judged at once."})
    device: str | None = field(default=None, metadata={"help": "cpu, cuda, ...; by default an accelerator if any."})
    output: str | None = field(default=None, metadata={"help": "JSON file to write."})


@one_line_errors
@torch.no_grad()
def main(arguments: list[str] | None = None):
    (args,) = CommandLineParser([JudgeArguments]).parse(arguments)
    device = choose_device(args.device)
    model, processor = load_model(args.model)
    classifier = load_classifier(args.classifier)
    judges_processor = load_processor(args.classifier, classifier.config)
    if processor is None or judges_processor is None:
        raise InputError("--model and --classifier must be models of images, with image processors.")
    names = [model.config.id2label[i] for i in range(model.config.num_classes)]
    judged = [classifier.config.id2label[i] for i in range(classifier.config.num_classes)]
    if not names or sorted(names) != sorted(judged):
        raise InputError(f"--model and --classifier must have the same classes, got {names} and {judged}.")
    model, classifier = model.to(device), classifier.to(device).eval()
    size = bytes_to_draw((args.num_images, model.config.num_channels, *model.config.image_size))
    check_memory(f"drawing {args.num_images} images", size, device)
    class_ids = torch.arange(args.num_images) % len(names)
    levels = model.generate(
        class_ids=class_ids,
        generator=torch.Generator().manual_seed(args.seed),
        guidance_scale=args.guidance_scale,
        max_batch_size=args.batch_size,
        show_progress=True,
    )
    right = torch.zeros(len(names), dtype=torch.long)
    for start in tqdm(range(0, len(levels), args.batch_size), desc="Judging", unit="batch"):
        part = slice(start, start + args.batch_size)
        pixel_values = judges_processor(processor.post_process(levels[part]), return_tensors="pt")["pixel_values"]
        answers = classifier(pixel_values.to(device)).logits.argmax(-1).cpu()
        for class_id, answer in zip(class_ids[part].tolist(), answers.tolist(), strict=True):
            right[class_id] += names[class_id] == judged[answer]
    share = right.sum().item() / len(levels)
    results = {
        "model": args.model,
        "classifier": args.classifier,
        "num_images": len(levels),
        "seed": args.seed,
        "guidance_scale": args.guidance_scale,
        "share_of_samples_taken_for_their_class": share,
        "by_class": {names[i]: right[i].item() / (class_ids == i).sum().item() for i in class_ids.unique().tolist()},
        **run_facts(device),
    }
    if args.output:
        write_json(results, args.output)
    print(f"{share:.1%} of {len(levels)} samples are taken for their class")


if __name__ == "__main__":
    main()
