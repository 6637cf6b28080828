"""Measure the table of exercises: train each solution on the demo with several seeds.

    python tests/exercises/ablation.py                                18 runs of 5 to 12 minutes on one core
    python tests/exercises/ablation.py --seeds 0 --only detach fcn    two of them
    python tests/exercises/ablation.py --max-iters 1500               other flags are those of train.py

Runs that are finished are not repeated, interrupted ones are resumed.
"""

import argparse
import statistics
import subprocess
import sys
from pathlib import Path

import torch

FOLDER = Path(__file__).resolve().parent
ROOT = FOLDER.parents[1]
sys.path.insert(0, str(ROOT))

from ocrnet.logs import read_log  # noqa: E402

FLAGS = {"fcn": ["--head", "fcn"], "width": ["--model", "hr9t"]}  # of train.py
EXERCISES = ["ocr", "detach", "fcn", "ground_truth", "upper_bound", "width"]


def measure(exercise: str, seed: int, folder: Path, flags: list[str]) -> tuple[float, int]:
    """Train an exercise. Return the mIoU of its last validation in %, and the number of trained parameters."""
    run, solution = folder / f"{exercise}-{seed}", FOLDER / f"{exercise}.py"
    paths = ["--data-path", folder / "synthetic", "--output-dir", run]
    command = [sys.executable, solution if solution.exists() else ROOT / "train.py", "--demo", "--resume", *paths]
    subprocess.run([*map(str, command), "--seed", str(seed), *FLAGS.get(exercise, []), *flags], check=True)
    state = torch.load(run / "last.pt", map_location="cpu", weights_only=True)
    parameters = sum(x["momentum_buffer"].numel() for x in state["optimizer"]["state"].values())
    return 100 * read_log(run).val[-1]["mIoU"], parameters


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2], metavar="N")
    parser.add_argument("--only", nargs="+", choices=EXERCISES, default=EXERCISES, metavar="NAME")
    parser.add_argument("--output-dir", type=Path, default=Path("runs/ablation"), metavar="DIR")
    args, flags = parser.parse_known_args()
    folder = args.output_dir.resolve()
    results = {name: [measure(name, seed, folder, flags) for seed in args.seeds] for name in args.only}
    print("| | trained parameters | mIoU of each seed | mean |\n| --- | --- | --- | --- |")
    for exercise, runs in results.items():
        miou, parameters = zip(*runs)
        each = ", ".join(f"{x:.1f}" for x in miou)
        print(f"| {exercise} | {parameters[0]:,} | {each} | {statistics.mean(miou):.1f} |")


if __name__ == "__main__":
    main()
