"""Atomic file writing, and a progress bar over a pool of workers."""

import os
import re
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import Executor
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from tqdm import tqdm


@contextmanager
def atomic_write(path: Path) -> Iterator[Path]:
    """Yield a temporary path beside ``path``; rename it to ``path`` on success, remove it on failure.

    At any moment ``path`` is the complete old file or the complete new one.
    """
    part = path.with_name(f"{path.name}.part{os.getpid()}")
    try:
        yield part
        os.replace(part, path)
    finally:
        part.unlink(missing_ok=True)


def remove_partial_files(paths: Iterable[Path]) -> None:
    """Remove the temporary files of ``atomic_write`` among ``paths``, which killed processes leave behind."""
    for path in paths:
        if re.fullmatch(r"\.part\d+", path.suffix):
            path.unlink()


def parallel_map(
    pool: Executor, function: Callable[[Any], Any], items: Sequence, description: str, quiet: bool = False
) -> list:
    """Return ``function`` of every item, in order, computed by ``pool``, which is closed at the end.

    On a terminal a progress bar is shown unless ``quiet``. The first exception of ``function`` is raised.
    """
    with pool:
        results = pool.map(function, items, chunksize=8)
        return list(tqdm(results, description, len(items), leave=False, disable=True if quiet or not items else None))
