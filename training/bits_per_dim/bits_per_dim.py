"""Bits per dimension as a metric of the `evaluate` library: `evaluate.load("training/bits_per_dim")`."""

import datasets
import evaluate
import numpy as np


class BitsPerDim(evaluate.Metric):
    def _info(self):
        return evaluate.MetricInfo(
            description="Mean negative log-likelihood of images in bits per dimension.",
            citation="",
            inputs_description=(
                "predictions: negative log-likelihood of each image in nats; references: dimensions of each image."
            ),
            features=datasets.Features(
                {"predictions": datasets.Value("float64"), "references": datasets.Value("int64")}
            ),
        )

    def _compute(self, predictions, references):
        return {"bits_per_dim": float(np.sum(predictions) / np.sum(references) / np.log(2))}
