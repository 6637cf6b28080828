"""When OCR pays: train the demo with and without OCR for more and more iterations, and plot both.

    python tests/exercises/when_ocr_pays.py                       24 runs, hours on two cores
    python tests/exercises/when_ocr_pays.py --iters 500 1500 --seeds 0
    python tests/exercises/when_ocr_pays.py --weights runs/fcn/best.pt --output-dir runs/pretrained

Each point is a run of its own, with the whole schedule. Runs that are finished are not repeated, interrupted ones are
resumed. The figure is --output-dir/when_ocr_pays.png.
"""

import argparse
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


def plot(results: dict[str, list[list[float]]], iters: list[int], shares: list[list[float]], path: Path) -> None:
    """``results`` by name: for each number of iterations the mIoU of each seed."""
    fig, (left, right) = plt.subplots(1, 2, figsize=(10, 3.6), layout="constrained")
    for name, runs in results.items():
        mean = [statistics.mean(each) for each in runs]
        line = left.plot(iters, mean, marker="o", label=name)[0]
        low, high = [min(each) for each in runs], [max(each) for each in runs]
        left.fill_between(iters, low, high, alpha=0.2, color=line.get_color())
    left.set(xscale="log", xlabel="iterations", ylabel="mIoU of val, %", title="mean and range of the seeds")
    left.legend()
    right.plot(iters, [100 * statistics.mean(each) for each in shares], marker="o")
    right.set(xscale="log", xlabel="iterations", ylabel="%", title="a pixel's weight w for the region of its own class")
    for axis in (left, right):
        axis.set_xticks(iters, [f"{n:,}" for n in iters])
        axis.minorticks_off()
        axis.grid(alpha=0.3)
    fig.savefig(path, dpi=110)
    plt.close(fig)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--iters", type=int, nargs="+", default=[500, 1500, 5000, 15000], metavar="N")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2], metavar="N")
    parser.add_argument("--weights", type=Path, metavar="FILE", help="start from the backbone of this file")
    parser.add_argument("--output-dir", type=Path, default=Path("runs/when_ocr_pays"), metavar="DIR")
    args = parser.parse_args()
    folder = args.output_dir.resolve()
    start = ["--weights", str(args.weights.resolve())] if args.weights else []
    results, shares = {"OCR": [], "without OCR": []}, []
    for n in args.iters:
        flags = ["--max-iters", str(n), "--val-every", str(n), *start]
        for name, head in (("OCR", "ocr"), ("without OCR", "fcn")):
            runs = [measure(head, seed, folder / str(n), flags, folder / "data") for seed in args.seeds]
            results[name].append([100 * scores["mIoU"] for scores in runs])
        ckpts = [folder / str(n) / f"ocr-{seed}" / "last.pt" for seed in args.seeds]
        shares.append([own_class_share(ckpt, folder / "data" / "synthetic") for ckpt in ckpts])
        ocr, fcn = results["OCR"][-1], results["without OCR"][-1]
        difference = statistics.mean(ocr) - statistics.mean(fcn)
        each = [", ".join(f"{x:.1f}" for x in runs) for runs in (ocr, fcn)]
        share = 100 * statistics.mean(shares[-1])
        print(f"| {n:,} | {each[0]} | {each[1]} | {difference:+.1f} | {share:.0f} % |", flush=True)
        plot(results, args.iters[: len(shares)], shares, folder / "when_ocr_pays.png")


if __name__ == "__main__":
    main()
