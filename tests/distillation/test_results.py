"""The result of fine-tuning, as the report holds it."""

import json

import msgspec
from torch import nn

from sepconvert.distillation.results import Epoch, FinetuneResult
from sepconvert.report.schema import report

START = Epoch(0, 0, None, "start", heldout_loss=2.0, divergence=0.5, accuracy=None, seconds=0.25)
TUNED = Epoch(1, 15, 1.5, "average", heldout_loss=1.0, divergence=0.25, accuracy=None, seconds=1.5)


def test_the_object_of_the_report():
    result = FinetuneResult(nn.Identity(), (START, TUNED), TUNED, "bf16", stopped=None)
    document = json.loads(json.dumps(result.to_dict(), allow_nan=False))
    assert document.keys() == {"history", "delivered", "precision", "stopped"}
    assert document["history"][1] == document["delivered"]
    assert document["history"][0] == {
        "epoch": 0, "step": 0, "loss": None, "weights": "start", "heldout_loss": 2.0, "divergence": 0.5,
        "accuracy": None, "seconds": 0.25,
    }  # fmt: skip
    assert msgspec.convert(document["delivered"], report.Epoch).weights == "average"
