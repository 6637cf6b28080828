"""Plot training loss, learning rate and validation mIoU of one or more runs.

    python plot_curve.py runs/hr18                                      writes runs/hr18/curve.png
    python plot_curve.py runs/hr18 runs/hr48 --output both.png
    python plot_curve.py runs/hr18 train_sdaa_3rd.log --output both.png     with a log of mmengine

A log is a run's folder, its log.jsonl, or a text log of mmengine (mmsegmentation 1.x). The label of a curve is the name
of the folder or of the text log.
"""

from pathlib import Path

from ocrnet.logs import read_log
from ocrnet.script import make_parser, run_script
from ocrnet.visualize import plot_curves


def main() -> None:
    parser = make_parser(__doc__)
    parser.add_argument(
        "logs", nargs="+", type=Path, metavar="LOG", help="a run's folder, log.jsonl, or mmengine's log"
    )
    parser.add_argument("--output", type=Path, metavar="PNG", help="default: curve.png beside the first log")
    parser.add_argument("--log-scale", action="store_true", help="logarithmic axes for loss and learning rate")
    args = parser.parse_args()
    logs = [read_log(path) for path in args.logs]
    names = [log.name for log in logs]
    logs = [log._replace(name=str(path)) if names.count(log.name) > 1 else log for log, path in zip(logs, args.logs)]
    first = args.logs[0]
    output = args.output or (first if first.is_dir() else first.parent) / "curve.png"
    plot_curves(logs, output, args.log_scale)
    for log in logs:
        best = f", best mIoU {max(entry['mIoU'] for entry in log.val):.2%}" if log.val else ""
        print(f"{log.name}: {len(log.train)} training entries, {len(log.val)} validations{best}")
    print(f"wrote {output}")


if __name__ == "__main__":
    run_script(main)
