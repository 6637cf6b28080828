"""The README's table of exercises: each of them, solved, on the demo with several seeds.

    python tests/ablation.py                                     21 runs of five minutes on two cores
    python tests/ablation.py --seeds 0 --only detach fcn         two of them

A run that has ended is not done again. The solutions are in tests/exercises: a diff to apply, or a class table.
"""

import argparse
import json
import shutil
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path

import torch

ROOT = Path(__file__).resolve().parents[1]
EXERCISES = {  # what is changed: flags of train.py
    "ocr": [],
    "detach": [],
    "fcn": ["--head", "fcn"],
    "ground_truth": [],
    "upper_bound": [],
    "classes": [],
    "width": ["--model", "hr9s"],
}


def solve(exercise: str, folder: Path) -> None:
    """Copy the code to ``folder`` and change it as the exercise asks."""
    for path in (ROOT / "ocrnet", *ROOT.glob("*.py")):
        copy = shutil.copytree if path.is_dir() else shutil.copy
        copy(path, folder / path.name)
    diff = ROOT / f"tests/exercises/{exercise}.diff"
    if diff.exists():
        subprocess.run(["git", "apply", "--unsafe-paths", "--directory", str(folder), str(diff)], check=True, cwd="/")


def measure(exercise: str, seed: int, out: Path) -> dict:
    """Train and score, unless that is done: -> what ``evaluate.py --json`` says, and the parameters."""
    run, scores = out / f"{exercise}-{seed}", out / f"{exercise}-{seed}.json"
    if not scores.exists():
        with tempfile.TemporaryDirectory() as folder:
            solve(exercise, Path(folder))
            data = out / "data" / ("classes" if exercise == "classes" else "synthetic")
            if exercise == "classes":
                data.mkdir(parents=True, exist_ok=True)
                shutil.copy(ROOT / "tests/exercises/classes.json", data)
            train = [sys.executable, "train.py", "--demo", "--data", data, "--seed", str(seed), "--out", run]
            if not (run / "samples.png").exists():  # the last thing that a run writes
                subprocess.run([*train, "--resume", *EXERCISES[exercise]], check=True, cwd=folder)
            evaluate = [sys.executable, "evaluate.py", "--ckpt", run / "last.pt", "--data", data, "--json", scores]
            subprocess.run(evaluate, check=True, cwd=folder, stdout=subprocess.DEVNULL)
    state = torch.load(run / "last.pt", map_location="cpu", weights_only=True)
    parameters = sum(x["momentum_buffer"].numel() for x in state["optimizer"]["state"].values())
    return {**json.loads(scores.read_text()), "parameters": parameters}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2], metavar="N")
    parser.add_argument("--only", nargs="+", choices=EXERCISES, default=list(EXERCISES), metavar="NAME")
    parser.add_argument("--out", type=Path, default=Path("runs/ablation"), metavar="DIR")
    args = parser.parse_args()
    found = {name: [measure(name, seed, args.out.resolve()) for seed in args.seeds] for name in args.only}
    print(
        "| | parameters | mIoU of each seed | mean | mIoU of the 7 categories, mean |\n| --- | --- | --- | --- | --- |"
    )
    for name, scores in found.items():
        each = [100 * score["mIoU"] for score in scores]
        groups = statistics.mean(100 * score["mIoU_categories"] for score in scores)
        values = ", ".join(f"{value:.1f}" for value in each)
        print(f"| {name} | {scores[0]['parameters']:,} | {values} | {statistics.mean(each):.1f} | {groups:.1f} |")


if __name__ == "__main__":
    main()
