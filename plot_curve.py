"""Draw loss, learning rate and validation mIoU of one or more runs.

    python plot_curve.py runs/hr18                                  writes runs/hr18/curve.png
    python plot_curve.py runs/hr18 runs/hr48 --out both.png
    python plot_curve.py runs/hr18 train_sdaa_3rd.log --out both.png    beside a log of mmengine

A log is a run's folder, its log.jsonl, or the text that mmengine (mmsegmentation 1.x) prints or writes. A curve
is labelled with the run's folder, or with the name of a text log.
"""

import argparse
from functools import partial
from pathlib import Path

from ocrnet.errors import run_script
from ocrnet.visualize import plot_curves, read_log


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__,
        formatter_class=partial(argparse.RawDescriptionHelpFormatter, max_help_position=27, width=100),
    )
    parser.add_argument(
        "logs", nargs="+", type=Path, metavar="LOG", help="a run's folder, log.jsonl, or mmengine's log"
    )
    parser.add_argument(
        "--out", type=Path, metavar="PNG", help="PNG to write (default: curve.png beside the first log)"
    )
    parser.add_argument("--log-scale", action="store_true", help="loss and learning rate on logarithmic axes")
    args = parser.parse_args()
    logs = [read_log(path) for path in args.logs]
    names = [log.name for log in logs]
    logs = [log._replace(name=str(path)) if names.count(log.name) > 1 else log for log, path in zip(logs, args.logs)]
    first = args.logs[0]
    out = args.out or (first if first.is_dir() else first.parent) / "curve.png"
    plot_curves(logs, out, args.log_scale)
    for log in logs:
        best = f", best mIoU {max(entry['mIoU'] for entry in log.val):.2%}" if log.val else ""
        print(f"{log.name}: {len(log.train)} training entries, {len(log.val)} validations{best}")
    print(f"wrote {out}")


if __name__ == "__main__":
    run_script(main)
