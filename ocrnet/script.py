"""How a script starts and ends: its argument parser, errors without a traceback, and stop signals."""

import argparse
import contextlib
import ctypes
import math
import os
import re
import signal
import sys
from collections.abc import Callable

from . import InputError

# of schedulers (SIGTERM, Slurm's SIGUSR1), closed terminals (SIGHUP), Ctrl-C (SIGINT) and Ctrl-\ (SIGQUIT)
NAMES = ("SIGTERM", "SIGUSR1", "SIGHUP", "SIGINT", "SIGQUIT")
STOP_SIGNALS = [getattr(signal, name) for name in NAMES if hasattr(signal, name)]
NO_MEMORY = "out of memory|can't allocate memory"  # in errors of PyTorch

received: list[signal.Signals] = []  # stop signals since ``catch_stop_signals``


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
    """Run ``main``. An InputError, an OSError or a lack of memory is printed as one line, and the exit status is 1.

    After a stop signal the exit status is 128 + its number, also where an error follows: the signal may have ended a
    data loader worker or closed the terminal.
    """
    try:
        return main()
    except KeyboardInterrupt:
        sys.exit(128 + signal.SIGINT)
    except (InputError, OSError, EOFError) as error:
        message = last_line(error)
        if received and isinstance(error, InputError):  # as that last.pt cannot be written
            with contextlib.suppress(OSError):  # of a closed terminal
                print(f"error: {message}", file=sys.stderr, flush=True)
    except (MemoryError, RuntimeError) as error:
        # while a CUDA graph is recorded another error follows the lack of memory
        errors = [error, *filter(None, [error.__cause__, error.__context__])]
        if not received and not any(isinstance(e, MemoryError) or re.search(NO_MEMORY, str(e)) for e in errors):
            raise
        message = (
            "out of memory: train.py needs less with --batch-size 1 and more --accum-steps, or with a smaller "
            "--crop-size; evaluate.py with --slide or a smaller --long-side"
        )
    # here the error is gone, and with it the data loader that its frames held
    sys.exit(128 + received[0] if received else f"error: {message}")


def last_line(error: Exception) -> str:
    """An error in one line. A data loader worker puts its traceback before the error."""
    return (str(error).strip() or repr(error)).splitlines()[-1].removeprefix("ocrnet.InputError: ")


def catch_stop_signals() -> None:
    """From now on stop signals are appended to ``received`` instead of ending the process.

    Under torchrun SIGTERM is also sent when torchrun itself ends, which would leave its processes behind. A data loader
    worker that ends is reported when its batch is asked for, not by an exception in the middle of a step.
    """
    received.clear()
    for number in STOP_SIGNALS:
        if signal.getsignal(number) != signal.SIG_IGN:  # as SIGHUP is under nohup
            signal.signal(number, lambda number, frame: received.append(signal.Signals(number)))
    if hasattr(signal, "SIGCHLD"):
        signal.signal(signal.SIGCHLD, signal.SIG_DFL)
    if "TORCHELASTIC_RUN_ID" in os.environ:
        end_with_parent(signal.SIGTERM)


def end_with_parent(number: signal.Signals) -> None:
    """Ask Linux to send a signal to this process when its parent ends. Elsewhere this does nothing."""
    with contextlib.suppress(AttributeError, OSError, TypeError):  # no prctl
        ctypes.CDLL(None).prctl(1, int(number))  # PR_SET_PDEATHSIG
