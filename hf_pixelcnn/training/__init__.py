r"""
What models are trained and scored with: data sets of levels, a `Trainer`, exact scores, pictures, records and cards.

Needs the extra `train`: `pip install "hf_pixelcnn[train]"`.

```python
from hf_pixelcnn.training import LevelDataset, PixelCNNTrainer, PixelCNNTrainingArguments, load_split
```
"""

from importlib.util import find_spec

if _missing := [name for name in ("accelerate", "datasets", "filelock", "matplotlib") if find_spec(name) is None]:
    raise ImportError(f"hf_pixelcnn.training needs {', '.join(_missing)}: pip install 'hf_pixelcnn[train]'.")

from .cards import model_card
from .checkpoints import check_whole, damage_in, is_finished, last_checkpoint, state_of
from .data_collator import DataCollatorForCausalImageModeling
from .data_sources import (
    class_names,
    class_numbers,
    find_class_column,
    find_image_column,
    load_split,
    names_in,
    num_channels_of,
    read_class_ids,
    stored,
)
from .errors import InputError
from .files import (
    all_written_beside,
    check_new_folder,
    folder_beside,
    held,
    is_new_or_empty,
    write_json,
    write_text,
    written_beside,
)
from .level_dataset import (
    LevelDataset,
    LevelStream,
    check_classes_of,
    collate_classes,
    collate_levels,
    first_image,
    level_options,
)
from .pictures import (
    add_captions,
    check_picture_path,
    completion_grid,
    draw_heat_maps,
    draw_loss_curve,
    draw_samples,
    grid_of_classes,
    mixed_choice,
    readable_picture,
    save_picture,
)
from .progress import EpochLines, say_epochs
from .receptive_fields import draw_receptive_fields
from .records import has_fast_bfloat16, keep_freed_memory, run_facts
from .saved_models import check_finite, choose_device, load_classifier, load_config, load_model, load_processor
from .scoring import (
    calibration_error,
    class_probabilities,
    classification_metrics,
    metrics_of,
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
    "add_captions",
    "all_written_beside",
    "calibration_error",
    "check_classes_of",
    "check_finite",
    "check_new_folder",
    "check_picture_path",
    "check_whole",
    "choose_device",
    "class_names",
    "class_numbers",
    "class_probabilities",
    "classification_metrics",
    "collate_classes",
    "collate_levels",
    "completion_grid",
    "damage_in",
    "draw_heat_maps",
    "draw_loss_curve",
    "draw_receptive_fields",
    "draw_samples",
    "find_class_column",
    "find_image_column",
    "first_image",
    "folder_beside",
    "grid_of_classes",
    "has_fast_bfloat16",
    "held",
    "is_finished",
    "is_new_or_empty",
    "keep_freed_memory",
    "last_checkpoint",
    "level_options",
    "load_classifier",
    "load_config",
    "load_model",
    "load_processor",
    "load_split",
    "metrics_of",
    "mixed_choice",
    "model_card",
    "names_in",
    "nats_per_image",
    "num_channels_of",
    "read_class_ids",
    "readable_picture",
    "run_facts",
    "save_picture",
    "say_epochs",
    "score",
    "score_by_class",
    "split_nats",
    "state_of",
    "stored",
    "write_json",
    "write_text",
    "written_beside",
]
