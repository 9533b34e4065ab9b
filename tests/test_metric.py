import math
from pathlib import Path

import evaluate
import pytest

METRIC = str(Path(__file__).parent.parent / "training" / "bits_per_dim")


def test_the_metric_is_loaded_from_its_folder_and_weighs_images_by_their_dimensions():
    metric = evaluate.load(METRIC)
    metric.add_batch(predictions=[8 * math.log(2)], references=[8])
    metric.add_batch(predictions=[24 * 4 * math.log(2)], references=[24])
    assert metric.compute()["bits_per_dim"] == pytest.approx((8 * 1 + 24 * 4) / 32)
