"""Shared by the solutions: run train.py or evaluate.py after a solution has replaced a function of ocrnet.

    python tests/exercises/NAME.py [options of train.py]
    python tests/exercises/NAME.py evaluate --ckpt FILE [options of evaluate.py]

A solution imports this module before ocrnet, which it makes importable.
"""

import sys
from collections.abc import Sequence
from pathlib import Path

from torch import Tensor

sys.path.insert(0, str(Path(__file__).resolve().parents[2]))

import evaluate as evaluate_script
import train as train_script
from ocrnet.data.datasets import EvalDataset
from ocrnet.device import Accelerator
from ocrnet.models import OCRHead
from ocrnet.script import run_script


def run() -> None:
    """train.py with the arguments of this process; evaluate.py if the first is ``evaluate``."""
    script = train_script
    if sys.argv[1:2] == ["evaluate"]:
        script = evaluate_script
        del sys.argv[1]
    run_script(script.main)


def keep_labels() -> None:
    """From now on ``OCRHead.label``, (B, H, W), is the label of the images in each training or validation step."""
    if given := {"--images", "--export", "--flip", "--scales", "--slide"} & {*sys.argv}:
        sys.exit(f"error: {given.pop()}: the solution needs the label of the whole image: leave it out")
    prepare_batch, get_item, evaluate = train_script.prepare_batch, EvalDataset.__getitem__, train_script.evaluate

    def prepare_batch_keeping_label(batch: Sequence[Tensor], accelerator: Accelerator) -> tuple[Tensor, Tensor]:
        image, OCRHead.label = prepare_batch(batch, accelerator)
        return image, OCRHead.label

    def get_item_keeping_label(dataset: EvalDataset, index: int) -> tuple[Tensor, ...]:
        image, label = get_item(dataset, index)
        OCRHead.label = label[None]
        return image, label

    def evaluate_in_process(forward, dataset, accelerator, workers=0, criterion=None):
        # without workers an image is read in this process, right before its prediction
        return evaluate(forward, dataset, accelerator, 0, criterion)

    Accelerator.graph = lambda accelerator, function: function  # a recorded forward pass would keep the first label
    train_script.prepare_batch = prepare_batch_keeping_label
    EvalDataset.__getitem__ = get_item_keeping_label
    train_script.evaluate = evaluate_script.evaluate = evaluate_in_process
