"""What the scripts share: their argument parser, errors without a traceback, and stop signals."""

import argparse
import contextlib
import ctypes
import json
import math
import os
import re
import shutil
import signal
import sys
from collections.abc import Callable
from pathlib import Path

from PIL import Image

from . import InputError

SOFTWARE = "OCRNet"  # the mark of the images that this program writes

# of schedulers (SIGTERM, Slurm's SIGUSR1), closed terminals (SIGHUP), Ctrl-C (SIGINT) and Ctrl-\ (SIGQUIT)
NAMES = ("SIGTERM", "SIGUSR1", "SIGHUP", "SIGINT", "SIGQUIT")
NO_MEMORY = "out of memory|can't allocate memory"  # in errors of PyTorch
STOP_SIGNALS = [getattr(signal, name) for name in NAMES if hasattr(signal, name)]


class HelpFormatter(argparse.ArgumentDefaultsHelpFormatter, argparse.RawDescriptionHelpFormatter):
    """Keep the lines of the description, and print defaults."""


def make_parser(description: str) -> argparse.ArgumentParser:
    return argparse.ArgumentParser(description=description, usage="%(prog)s [options]", formatter_class=HelpFormatter)


def number(kind: type, low: float, high: float = math.inf) -> Callable[[str], float]:
    """The ``type`` of an option: a finite number of this kind, int or float, from ``low`` to ``high``."""

    def parse(text: str) -> float:
        value = kind(text)
        if not (low <= value <= high and math.isfinite(value)):
            limit = f"{low} or more" if high == math.inf else f"{low} to {high}"
            raise argparse.ArgumentTypeError(f"expected {limit}, found {text}")
        return value

    parse.__name__ = kind.__name__  # in argparse's message on text that is no number
    return parse


def run_script(main: Callable[[], None]) -> None:
    """Run ``main``. An InputError, an OSError or a lack of memory is printed as one line, and the exit status is 1."""
    try:
        return main()
    except KeyboardInterrupt:
        sys.exit(128 + signal.SIGINT)
    except (InputError, OSError) as error:
        # a data loader worker prepends its traceback, whose last line is the error
        message = (str(error).strip() or repr(error)).splitlines()[-1].removeprefix("ocrnet.InputError: ")
    except (MemoryError, RuntimeError) as error:
        # while a CUDA graph is recorded another error follows the lack of memory
        errors = [error, *filter(None, [error.__cause__, error.__context__])]
        if not any(isinstance(e, MemoryError) or re.search(NO_MEMORY, str(e)) for e in errors):
            raise
        message = (
            "out of memory: train.py needs less with --batch-size 1 and more --accum-steps, or with a smaller "
            "--crop-size; evaluate.py with --slide or a smaller --long-side"
        )
    sys.exit(f"error: {message}")  # here the error is gone, and with it the data loader that its frames held


def fitting_workers(workers: int, batch_bytes: int) -> int:
    """At most as many data loader workers as there is shared memory for; a container often has 64 MiB of it.

    A worker makes two batches in advance, and one more is in use.
    """
    with contextlib.suppress(OSError):
        free = shutil.disk_usage("/dev/shm").free // int(os.environ.get("LOCAL_WORLD_SIZE", 1))
        return min(workers, free // (3 * batch_bytes))
    return workers


def check_output(path: Path) -> None:
    """Raise InputError if ``path`` exists, unless it is an image or the scores that this program wrote."""
    if path.is_file():  # not a pipe, from which reading would wait
        # PIL raises SyntaxError for bad PNGs
        with contextlib.suppress(OSError, SyntaxError), Image.open(path) as image:
            if image.info.get("Software") == SOFTWARE:
                return
        with contextlib.suppress(OSError, ValueError, AttributeError):
            if {"mIoU", "IoU"} <= json.loads(path.read_text()).keys():
                return
    if path.exists():
        raise InputError(f"{path}: exists, and is not an output of this program: choose another folder or name")


def catch_stop_signals() -> list[signal.Signals]:
    """From now on stop signals are appended to the returned list instead of ending the process.

    Under torchrun SIGTERM is also sent when torchrun itself ends, which would leave its processes behind. A data loader
    worker that ends is reported when its batch is asked for, not by an exception in the middle of a step.
    """
    received: list[signal.Signals] = []
    for number in STOP_SIGNALS:
        if signal.getsignal(number) != signal.SIG_IGN:  # as SIGHUP is under nohup
            signal.signal(number, lambda number, frame: received.append(signal.Signals(number)))
    if hasattr(signal, "SIGCHLD"):
        signal.signal(signal.SIGCHLD, signal.SIG_DFL)
    if "TORCHELASTIC_RUN_ID" in os.environ:
        end_with_parent(signal.SIGTERM)
    return received


def init_worker(worker_id: int) -> None:
    """``worker_init_fn`` of a DataLoader: leave stop signals to the training process, and end with it."""
    for number in {*STOP_SIGNALS} - {signal.SIGTERM}:  # by which Python ends its workers
        signal.signal(number, signal.SIG_IGN)
    end_with_parent(signal.SIGKILL)


def end_with_parent(number: signal.Signals) -> None:
    """Ask Linux to send a signal to this process when its parent ends. Elsewhere this does nothing."""
    with contextlib.suppress(AttributeError, OSError, TypeError):  # no prctl
        ctypes.CDLL(None).prctl(1, int(number))  # PR_SET_PDEATHSIG
