"""Fine-tuning as any tutorial of transformers does it: `map` the processor, collate, `Trainer`."""

import pytest
import torch
from conftest import DIGITS, build_model
from datasets import load_dataset
from transformers import Trainer, TrainingArguments

from hf_pixelcnn import PixelCNNImageProcessor
from hf_pixelcnn.training import DataCollatorForCausalImageModeling

pytestmark = [pytest.mark.slow, pytest.mark.versions]


@pytest.mark.parametrize("num_classes", [0, 10])
def test_the_trainer_of_transformers_trains_with_mapped_images(tmp_path, num_classes):
    rows = load_dataset(DIGITS, split="train[:32]", cache_dir=str(tmp_path / "cache"))
    processor = PixelCNNImageProcessor(num_levels=4, size={"height": 8, "width": 8})
    rows = rows.map(lambda some: processor(some["image"]), batched=True, remove_columns="image")
    model = build_model("pixelcnn", num_levels=4, image_size=8, num_classes=num_classes)
    arguments = TrainingArguments(
        tmp_path / "run", max_steps=4, per_device_train_batch_size=8, prediction_loss_only=True, report_to=[]
    )
    collator = DataCollatorForCausalImageModeling(class_column="label" if num_classes else None)
    trainer = Trainer(model, arguments, train_dataset=rows, eval_dataset=rows, data_collator=collator)
    pixel_values = torch.tensor(rows["pixel_values"])
    class_ids = {"class_ids": torch.tensor(rows["label"])} if num_classes else {}
    before = trainer.evaluate()["eval_loss"]
    with torch.no_grad():
        assert before == pytest.approx(-model.log_prob(pixel_values, **class_ids).mean().item(), rel=1e-5)
    trainer.train()
    assert trainer.evaluate()["eval_loss"] < before
    with pytest.raises(KeyError, match=r"no column 'digit', only \['label', 'pixel_values'\]"):
        DataCollatorForCausalImageModeling(class_column="digit")([rows[0]])
    with pytest.raises(ValueError, match="classes are `class_ids`"):  # as the default collator has it
        model(pixel_values, labels=torch.tensor(rows["label"]), **class_ids)
