"""When OCR pays: train the demo with and without OCR for more and more iterations, and plot both.

    python tests/exercises/when_ocr_pays.py                               24 runs, six hours on one core
    python tests/exercises/when_ocr_pays.py --iters 500 1000 --seeds 0    four of them
    python tests/exercises/when_ocr_pays.py --weight-decay 5e-4           other flags are those of train.py
    python tests/exercises/when_ocr_pays.py --weights runs/fcn/best.pt --output-dir runs/pretrained

Each point is a run of its own, with the whole schedule. Runs that are finished are not repeated, interrupted ones are
resumed. The table and --output-dir/when_ocr_pays.png show all finished runs of that folder.
"""

import argparse
import json
import statistics
from pathlib import Path

import solution  # noqa: F401  makes ocrnet importable
import torch.nn.functional as F
from ablation import measure

from ocrnet.checkpoint import load_model
from ocrnet.data.classes import IGNORE_INDEX
from ocrnet.data.datasets import EvalDataset
from ocrnet.data.layout import find_samples
from ocrnet.device import Accelerator
from ocrnet.explain import explain
from ocrnet.visualize import plt

HEADS = {"ocr": "OCR", "fcn": "without OCR"}


def own_class_share(ckpt: Path, data: Path) -> float:
    """The mean of w_ik over the pixels of the validation images, with k the class of pixel i."""
    model, _ = load_model(ckpt)
    accelerator, total, count = Accelerator("cpu"), 0.0, 0
    for image, label in EvalDataset(find_samples(data, "val")):
        w = explain(model, image, accelerator).w  # (K, h, w)
        small = F.interpolate(label[None, None].float(), size=w.shape[1:], mode="nearest")[0, 0].long()  # (h, w)
        valid = small != IGNORE_INDEX
        own = w.gather(0, small.masked_fill(~valid, 0)[None])[0]
        total, count = total + own[valid].sum().item(), count + valid.sum().item()
    return total / count


def finished(folder: Path, head: str) -> dict[int, list[float]]:
    """mIoU in % of the finished runs of a head in ``folder``: iterations -> one per seed."""
    scores = sorted(folder.glob(f"*/{head}-*.json"), key=lambda path: (int(path.parent.name), path.name))
    results: dict[int, list[float]] = {}
    for path in scores:
        results.setdefault(int(path.parent.name), []).append(100 * json.loads(path.read_text())["mIoU"])
    return results


def plot(results: dict[str, dict[int, list[float]]], shares: dict[int, list[float]], path: Path) -> None:
    """mIoU of each name and share of the own class in %, against iterations: mean and range of the seeds."""
    fig, axes = plt.subplots(1, 2, figsize=(10, 3.6), layout="constrained")
    for axis, lines in zip(axes, (results, {"OCR": shares})):
        for name, runs in lines.items():
            mean, low, high = zip(*((statistics.mean(x), min(x), max(x)) for x in runs.values()))
            (line,) = axis.plot(list(runs), mean, marker="o", label=name)
            axis.fill_between(list(runs), low, high, alpha=0.2, color=line.get_color())
        axis.set(xscale="log", xlabel="iterations")
        axis.set_xticks(list(shares), [f"{n:,}" for n in shares])
        axis.minorticks_off()
        axis.grid(alpha=0.3)
    axes[0].set(ylabel="mIoU of val, %", title="mean and range of the seeds")
    axes[0].legend()
    axes[1].set(ylabel="%", title="a pixel's weight w for the region of its own class")
    fig.savefig(path, dpi=110)
    plt.close(fig)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--iters", type=int, nargs="+", default=[500, 1000, 3000, 10000], metavar="N")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2], metavar="N")
    parser.add_argument("--weights", type=Path, metavar="FILE", help="start from the backbone of this file")
    parser.add_argument("--output-dir", type=Path, default=Path("runs/when_ocr_pays"), metavar="DIR")
    args, more = parser.parse_known_args()
    folder = args.output_dir.resolve()
    start = ["--weights", str(args.weights.resolve())] if args.weights else []
    for n in args.iters:
        flags = ["--max-iters", str(n), "--val-every", str(n), *start, *more]
        for seed in args.seeds:
            for head in HEADS:
                measure(head, seed, folder / str(n), flags, folder / "data")
    results = {name: finished(folder, head) for head, name in HEADS.items()}
    shares = {
        n: [100 * own_class_share(ckpt, folder / "data/synthetic") for ckpt in folder.glob(f"{n}/ocr-*/last.pt")]
        for n in results["OCR"]
    }
    print(
        "| iterations | OCR | without | difference of the means | w of the own class |\n| --- | --- | --- | --- | --- |"
    )
    for n in shares:
        each = [runs[n] for runs in results.values()]
        scores = " | ".join(", ".join(f"{x:.1f}" for x in runs) for runs in each)
        difference = statistics.mean(each[0]) - statistics.mean(each[1])
        print(f"| {n:,} | {scores} | {difference:+.1f} | {statistics.mean(shares[n]):.0f} % |")
    plot(results, shares, folder / "when_ocr_pays.png")


if __name__ == "__main__":
    main()
