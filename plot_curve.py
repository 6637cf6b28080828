"""Plot training loss, learning rate and validation mIoU of one or more runs.

    python plot_curve.py runs/hr18                                      writes runs/hr18/curve.png
    python plot_curve.py runs/hr18 runs/hr48 --output both.png
    python plot_curve.py runs/hr18 train_sdaa_3rd.log --output both.png     with a log of mmengine
    python plot_curve.py runs/sdaa runs/cuda --compare                  are the losses those of the second?

A log is a run's folder, its log.jsonl, a .log.json of mmsegmentation 0.x, or a text log of mmengine (mmsegmentation
1.x). The label of a curve is the name of the folder or of the file.
"""

import sys
from pathlib import Path

from ocrnet.logs import Log, compare_losses, read_log
from ocrnet.plots import plot_curves
from ocrnet.script import make_parser, run_script

MAX_RELATIVE, MAX_ABSOLUTE = 0.05, 0.0002  # of the SDAA model zoo


def main() -> None:
    parser = make_parser(__doc__)
    parser.add_argument(
        "logs", nargs="+", type=Path, metavar="LOG", help="a run's folder, log.jsonl, or a log of mmsegmentation"
    )
    parser.add_argument(
        "--output", type=Path, metavar="PNG", help="None: curve.png beside the first log, unless --compare"
    )
    parser.add_argument("--compare", action="store_true", help="the loss of two logs; exits with 1 if they differ")
    args = parser.parse_args()
    if args.compare and len(args.logs) != 2:
        parser.error(f"--compare: expected two logs, found {len(args.logs)}")
    if args.output and args.output.suffix.lower() != ".png":
        parser.error(f"--output: expected a name that ends with .png, found {args.output}")
    logs = [read_log(path) for path in args.logs]
    names = [log.name for log in logs]
    logs = [log._replace(name=str(path)) if names.count(log.name) > 1 else log for log, path in zip(logs, args.logs)]
    first, output = args.logs[0], args.output
    if not output and not args.compare:
        output = (first if first.is_dir() else first.parent) / "curve.png"
    if output:  # first, as nobody may read what is printed
        plot_curves(logs, output)
    for log in logs:
        best = f", best mIoU {max(entry['mIoU'] for entry in log.val):.2%}" if log.val else ""
        print(f"{log.name}: {len(log.train)} training entries, {len(log.val)} validations{best}")
    if output:
        print(f"wrote {output}")
    if args.compare and not print_comparison(*logs):
        sys.exit(1)


def print_comparison(first: Log, second: Log) -> bool:
    """Print how far the first loss curve is from the second. Return whether it passes the SDAA model zoo's limits.

    The zoo's rule takes means of signed differences, so that a curve 39 % lower passes. Here they are absolute.
    """
    a, b = compare_losses(first, second)
    relative, absolute = abs((a - b) / b).mean(), abs(a - b).mean()
    passes = relative <= MAX_RELATIVE or absolute <= MAX_ABSOLUTE
    print(f"{len(a)} entries of {first.name} compared, those at iterations that both logs cover")
    print(f"final loss, smoothed: {first.name} {a[-1]:.4f}, {second.name} {b[-1]:.4f}")
    print(f"mean relative error {relative:.2%} (signed {((a - b) / b).mean():+.2%}), at most {MAX_RELATIVE:.0%}")
    print(f"or mean absolute error {absolute:.5f}, at most {MAX_ABSOLUTE}: {'pass' if passes else 'fail'}")
    return passes


if __name__ == "__main__":
    run_script(main)
