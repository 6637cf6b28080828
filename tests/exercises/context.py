"""Exercise 5: discs whose class depends on a distant lamp, seen by a backbone without and with context. See README.md.

    python tests/exercises/context.py table                            12 runs of a minute; the table and context.png
    python tests/exercises/context.py --model local --head fcn --data-path runs/context/data --output-dir runs/local

``table`` writes the data set. Without it this is train.py, or evaluate.py after ``evaluate``, with the backbone
``local``.
"""

import argparse
import itertools
import json
import random
import statistics
import subprocess
import sys
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image, ImageDraw
from solution import run
from torch import Tensor

from ocrnet.checkpoint import load_model
from ocrnet.data.classes import read_classes
from ocrnet.data.datasets import EvalDataset, find_samples
from ocrnet.device import Accelerator
from ocrnet.explain import explain
from ocrnet.inference import make_forward
from ocrnet.models import BACKBONES
from ocrnet.models.resnet import ResNet
from ocrnet.plots import plt
from ocrnet.script import run_script


class LocalResNet(ResNet):
    """image (B, 3, H, W) -> ResNet's first stage (B, 256, H/4, W/4), for regions and pixels. It sees 27x27 pixels."""

    out_channels, reduction, dropout, head_channels = (256, 256), 2, 0.0, (128, 64)

    def __init__(self):
        super().__init__((2, 1, 1, 1))
        del self.layer2, self.layer3, self.layer4

    def forward(self, image: Tensor) -> tuple[Tensor, Tensor]:
        x = self.layer1(self.maxpool(self.relu(self.bn1(self.conv1(image)))))  # (B, 256, H/4, W/4)
        return x, x


BACKBONES["local"] = LocalResNet
CLASSES = {"background": (0, 0, 0), "lamp": (255, 255, 0), "go": (0, 200, 0), "stop": (200, 0, 0)}
SPLITS = {"train": 200, "val": 50}
FLAGS = "--crop-size 96 160 --batch-size 4 --max-iters 300 --lr 0.1 --scale-range 1 1 --no-color-jitter --workers 1"


def draw(rng: random.Random) -> tuple[Image.Image, Image.Image]:
    """An image and its label in the colors of ``CLASSES``: a lamp on the left, and gray discs on the right."""
    state = rng.choice(("go", "stop"))
    image = Image.frombytes("L", (160, 96), rng.randbytes(160 * 96)).point(lambda x: 100 + x // 8).convert("RGB")
    label = Image.new("RGB", image.size, CLASSES["background"])

    def paint(box: tuple[int, ...], color: tuple[int, ...], name: str) -> None:
        ImageDraw.Draw(image).ellipse(box, fill=color)
        ImageDraw.Draw(label).ellipse(box, fill=CLASSES[name])

    x, y = rng.randrange(4, 12), rng.randrange(4, 76)
    paint((x, y, x + 16, y + 16), (40, 220, 60) if state == "go" else (220, 50, 40), "lamp")
    for _ in range(rng.randrange(2, 5)):
        x, y, size = rng.randrange(72, 136), rng.randrange(0, 72), rng.randrange(16, 24)
        paint((x, y, x + size, y + size), (rng.randrange(200, 256),) * 3, state)
    return image, label


def write_discs(root: Path) -> None:
    """Write the data set in the plain layout."""
    for split, count in SPLITS.items():
        for folder in ("images", "labels"):
            (root / folder / split).mkdir(parents=True, exist_ok=True)
        for i in range(count):
            image, label = draw(random.Random(f"{split} {i}"))
            image.save(root / "images" / split / f"{i}.png")
            label.save(root / "labels" / split / f"{i}.png")
    rows = [{"name": name, "id": k, "train_id": k, "color": CLASSES[name]} for k, name in enumerate(CLASSES)]
    (root / "classes.json").write_text(json.dumps(rows))


def weight_of_lamp(ckpt: Path, data: Path) -> float:
    """The mean relation w_ik between the pixels i of the discs and the region k of the lamp."""
    model, lamp, weights = load_model(ckpt)[0], list(CLASSES).index("lamp"), []
    for image, label in EvalDataset(find_samples(data, "val"), read_classes(data)):
        w = explain(model, image, Accelerator("cpu")).w[lamp]  # (h, w)
        small = F.interpolate(label[None, None].float(), size=w.shape, mode="nearest")[0, 0]  # (h, w)
        weights.append(w[small > lamp])
    return torch.cat(weights).mean().item()


def draw_predictions(folder: Path, seed: int, path: Path, count: int = 4) -> None:
    """Images, labels and what the backbone ``local`` predicts without and with OCR, a row per validation image."""
    samples = find_samples(folder / "data", "val")[:count]
    models = [load_model(folder / f"local-{head}-{seed}" / "last.pt")[0] for head in ("fcn", "ocr")]
    palette, accelerator = np.array(list(CLASSES.values()), np.uint8), Accelerator("cpu")
    fig, axes = plt.subplots(count, 4, figsize=(10, 1.6 * count), layout="constrained")
    for row, (image, label) in zip(axes, EvalDataset(samples, read_classes(folder / "data"))):
        predictions = [make_forward(model, accelerator)(image[None])[0][0].argmax(0) for model in models]
        for axis, shown in zip(row, (image.permute(1, 2, 0), *(palette[x] for x in (label, *predictions)))):
            axis.imshow(shown)
            axis.axis("off")
    for axis, title in zip(axes[0], ("image", "label", "without OCR", "with OCR")):
        axis.set_title(title)
    fig.savefig(path, dpi=90)
    plt.close(fig)


def train_and_score(model: str, head: str, seed: int, folder: Path) -> dict:
    """The scores of ``evaluate.py --json`` for a run in ``folder``, which is trained unless that is done."""
    run_folder, data = folder / f"{model}-{head}-{seed}", folder / "data"
    scores, this = run_folder.with_suffix(".json"), [sys.executable, __file__]
    if not scores.exists():
        settings = f"--model {model} --head {head} --seed {seed} {FLAGS} --resume".split()
        evaluate = ["evaluate", "--ckpt", run_folder / "last.pt", "--json", scores]
        for flags in ([*settings, "--output-dir", run_folder], evaluate):
            subprocess.run([*this, *flags, "--data-path", data], check=True, stdout=subprocess.DEVNULL)
    return json.loads(scores.read_text())


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("command", choices=["table"])
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2], metavar="N")
    parser.add_argument("--output-dir", type=Path, default=Path("runs/context"), metavar="DIR")
    args = parser.parse_args()
    folder = args.output_dir
    if not (folder / "data").exists():
        write_discs(folder / "data")
    print("| backbone | head | mIoU of each seed | mean | mean IoU of the discs | w from discs to the lamp |")
    print("| --- | --- | --- | --- | --- | --- |")
    for model, head in itertools.product(("local", "hr18t"), ("fcn", "ocr")):
        results = [train_and_score(model, head, seed, folder) for seed in args.seeds]
        miou = [100 * scores["mIoU"] for scores in results]
        discs = statistics.mean(50 * (scores["IoU"]["go"] + scores["IoU"]["stop"]) for scores in results)
        ckpts = [folder / f"{model}-{head}-{seed}" / "last.pt" for seed in args.seeds if head == "ocr"]
        weights = ", ".join(f"{weight_of_lamp(ckpt, folder / 'data'):.2f}" for ckpt in ckpts)
        each = ", ".join(f"{x:.1f}" for x in miou)
        print(f"| {model} | {head} | {each} | {statistics.mean(miou):.1f} | {discs:.1f} | {weights} |", flush=True)
    draw_predictions(folder, args.seeds[0], folder / "context.png")


if __name__ == "__main__":
    if sys.argv[1:2] == ["table"]:
        run_script(main)
    else:
        run()
