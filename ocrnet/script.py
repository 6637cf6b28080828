"""What the scripts share: their argument parser, and errors printed without a traceback."""

import argparse
import sys
from collections.abc import Callable

import torch.distributed as dist

from .errors import InputError

# Gloo raises RuntimeError with these texts when a process is gone.
GLOO_ERRORS = (
    "gloo/", "Application timeout caused pair closure", "Connection closed by peer", "Connection reset by peer"
)  # fmt: skip


class HelpFormatter(argparse.RawDescriptionHelpFormatter):
    """Keep the description's lines, and add the default where there is one."""

    def __init__(self, prog: str):
        super().__init__(prog, max_help_position=30, width=110)

    def _get_help_string(self, action: argparse.Action) -> str:
        if action.default in (None, False, argparse.SUPPRESS) or "default" in action.help:
            return action.help
        values = action.default if isinstance(action.default, list) else [action.default]
        return f"{action.help} (default: {' '.join(map(str, values))})"


def make_parser(description: str, usage: str | None = None) -> argparse.ArgumentParser:
    return argparse.ArgumentParser(usage=usage, description=description, formatter_class=HelpFormatter)


def run_script(main: Callable[[], None]) -> None:
    """Run ``main``. Print an InputError, an OSError or the loss of another process as one line and exit with 1."""
    try:
        main()
    except (InputError, OSError) as error:
        # a DataLoader worker prepends its traceback, whose last line is the error
        sys.exit("error: " + str(error).strip().splitlines()[-1].removeprefix(f"{InputError.__module__}.InputError: "))
    except RuntimeError as error:
        if not isinstance(error, dist.DistError) and not any(text in str(error) for text in GLOO_ERRORS):
            raise
        reason = str(error).strip().splitlines()[0]
        sys.exit(f"error: another process of this run has ended, or did not answer within --timeout ({reason})")
