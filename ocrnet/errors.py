"""The one exception that is the user's to mend, not the programmer's, and how a script ends."""

import sys
from collections.abc import Callable

import torch.distributed as dist

# What Gloo says when it loses a process, which has no exception of its own.
GLOO = ("gloo/", "Application timeout caused pair closure", "Connection closed by peer", "Connection reset by peer")


class InputError(ValueError):
    """Bad input. Its message is one sentence: which file or flag, what was expected, what was found.

    The scripts print the sentence alone and exit with 1; any other exception keeps its traceback.
    """


def run_script(main: Callable[[], None]) -> None:
    """Run a script: what is no fault of the code becomes one sentence and exit status 1.

    That is an InputError, what the system says of a file, and a process of the run that is gone.
    """
    try:
        main()
    except (InputError, OSError) as error:
        # one that crossed from a loader's worker carries that worker's traceback before it
        sys.exit("error: " + str(error).strip().splitlines()[-1].split("InputError: ")[-1])
    except RuntimeError as error:
        if not isinstance(error, dist.DistError) and not any(words in str(error) for words in GLOO):
            raise
        reason = str(error).strip().splitlines()[0]
        sys.exit(f"error: another process of this run has ended, or did not answer within --timeout ({reason})")
