r"""
What models are trained and scored with: data sets of levels, a `Trainer`, exact scores, pictures, records and cards.

Needs the extra `train`: `pip install "hf_pixelcnn[train]"`.

```python
from hf_pixelcnn.training import LevelDataset, PixelCNNTrainer, PixelCNNTrainingArguments, load_split
```

The names listed here are public. Others in its modules serve the commands in `training/`, and may change.
"""

from importlib.util import find_spec

if _missing := [name for name in ("accelerate", "datasets", "filelock", "matplotlib") if find_spec(name) is None]:
    raise ImportError(f"hf_pixelcnn.training needs {', '.join(_missing)}: pip install 'hf_pixelcnn[train]'.")

from .cards import model_card
from .checkpoints import last_checkpoint
from .data_collator import DataCollatorForCausalImageModeling
from .data_sources import class_names, load_split
from .errors import InputError
from .level_dataset import LevelDataset, LevelStream, collate_classes, collate_levels
from .pictures import draw_heat_maps, draw_loss_curve, draw_samples, save_picture
from .progress import EpochLines
from .receptive_fields import draw_receptive_fields
from .records import run_facts
from .saved_models import load_classifier, load_model, load_processor
from .scoring import (
    calibration_error,
    class_probabilities,
    classification_metrics,
    nats_per_image,
    score,
    score_by_class,
    split_nats,
)
from .trainer import PixelCNNTrainer, PixelCNNTrainingArguments

__all__ = [
    "DataCollatorForCausalImageModeling",
    "EpochLines",
    "InputError",
    "LevelDataset",
    "LevelStream",
    "PixelCNNTrainer",
    "PixelCNNTrainingArguments",
    "calibration_error",
    "class_names",
    "class_probabilities",
    "classification_metrics",
    "collate_classes",
    "collate_levels",
    "draw_heat_maps",
    "draw_loss_curve",
    "draw_receptive_fields",
    "draw_samples",
    "last_checkpoint",
    "load_classifier",
    "load_model",
    "load_processor",
    "load_split",
    "model_card",
    "nats_per_image",
    "run_facts",
    "save_picture",
    "score",
    "score_by_class",
    "split_nats",
]
