"""Measure the table of exercises: train each solution on the demo with several seeds, and evaluate it.

    python tests/exercises/ablation.py                                18 runs of 5 to 12 minutes on one core
    python tests/exercises/ablation.py --seeds 0 --only detach fcn    two of them
    python tests/exercises/ablation.py --max-iters 1500               other flags are those of train.py

Runs that are finished are not repeated, interrupted ones are resumed.
"""

import argparse
import json
import statistics
import subprocess
import sys
from pathlib import Path

import torch

FOLDER = Path(__file__).resolve().parent
ROOT = FOLDER.parents[1]
EXERCISES = {  # flags of train.py
    "ocr": [],
    "detach": [],
    "fcn": ["--head", "fcn"],
    "ground_truth": [],
    "upper_bound": [],
    "width": ["--model", "hr9t"],
}


def commands(exercise: str) -> tuple[list[str], list[str]]:
    """The commands that train and evaluate an exercise, without flags."""
    solution = FOLDER / f"{exercise}.py"
    if solution.exists():
        return [sys.executable, str(solution)], [sys.executable, str(solution), "evaluate"]
    return [sys.executable, str(ROOT / "train.py")], [sys.executable, str(ROOT / "evaluate.py")]


def measure(exercise: str, seed: int, output_dir: Path, flags: list[str], data: Path) -> dict:
    """Train and evaluate unless that is done. Return the scores of ``evaluate.py --json``, and trained parameters."""
    run, scores = output_dir / f"{exercise}-{seed}", output_dir / f"{exercise}-{seed}.json"
    if not scores.exists():
        train, evaluate = commands(exercise)
        train += ["--demo", "--data-path", str(data), "--output-dir", str(run), "--seed", str(seed), "--resume"]
        subprocess.run(train + EXERCISES[exercise] + flags, check=True)
        evaluate += ["--ckpt", str(run / "last.pt"), "--data-path", str(data), "--json", str(scores)]
        subprocess.run(evaluate, check=True, stdout=subprocess.DEVNULL)
    state = torch.load(run / "last.pt", map_location="cpu", weights_only=True)
    parameters = sum(x["momentum_buffer"].numel() for x in state["optimizer"]["state"].values())
    return {**json.loads(scores.read_text()), "parameters": parameters}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2], metavar="N")
    parser.add_argument("--only", nargs="+", choices=EXERCISES, default=list(EXERCISES), metavar="NAME")
    parser.add_argument("--output-dir", type=Path, default=Path("runs/ablation"), metavar="DIR")
    args, flags = parser.parse_known_args()
    folder = args.output_dir.resolve()
    results = {
        exercise: [measure(exercise, seed, folder, flags, folder / "synthetic") for seed in args.seeds]
        for exercise in args.only
    }
    print("| | trained parameters | mIoU of each seed | mean |\n| --- | --- | --- | --- |")
    for exercise, runs in results.items():
        miou = [100 * scores["mIoU"] for scores in runs]
        each, mean = ", ".join(f"{x:.1f}" for x in miou), statistics.mean(miou)
        print(f"| {exercise} | {runs[0]['parameters']:,} | {each} | {mean:.1f} |")


if __name__ == "__main__":
    main()
