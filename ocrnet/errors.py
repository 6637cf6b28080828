"""The one exception that is the user's to mend, not the programmer's."""

import sys
from collections.abc import Callable


class InputError(ValueError):
    """Bad input. Its message is one sentence: which file or flag, what was expected, what was found.

    The scripts print the sentence alone and exit with 1; any other exception keeps its traceback.
    """


def run(main: Callable[[], None]) -> None:
    """Run a script: an InputError, or what the system says of a file, becomes one sentence and exit status 1."""
    try:
        main()
    except (InputError, OSError) as error:
        # one that crossed from a loader's worker carries that worker's traceback before it
        sys.exit("error: " + str(error).strip().splitlines()[-1].split("InputError: ")[-1])
