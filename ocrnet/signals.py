"""SIGTERM and Ctrl-C: the training process stops after its step, its data loader workers wait for it."""

import os
import signal
import threading
import time

import torch


class StopSignal:
    """Record SIGTERM (from schedulers) and SIGINT (Ctrl-C) as a request to stop after the current iteration.

    A second Ctrl-C, more than a second later, raises KeyboardInterrupt.

    Attributes:
        received: the first signal that arrived, None before.
    """

    def __init__(self):
        self.received: signal.Signals | None = None
        signal.signal(signal.SIGTERM, self._receive)
        signal.signal(signal.SIGINT, self._receive)

    def requested(self, also: bool = False) -> torch.Tensor:
        """1.0 if a signal arrived or ``also``, else 0.0; a tensor, to be summed over ranks."""
        return torch.tensor(float(self.received is not None or also))

    def _receive(self, number: int, frame: object) -> None:
        if number == signal.SIGINT and self.received and time.monotonic() > self.since + 1:  # not one sent twice
            raise KeyboardInterrupt
        self.received, self.since = signal.Signals(number), time.monotonic()


def ignore_signals_in_worker(worker_id: int) -> None:
    """``worker_init_fn`` of a DataLoader: end with the parent process or by its SIGTERM only, and ignore SIGINT.

    Terminals and schedulers signal every process of a run. A worker that dies first ends the training process with
    an exception before it can save. A worker that outlives its parent holds the connections that it has inherited
    open, and the other ranks do not see that its parent is gone.
    """
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    if not hasattr(signal, "sigtimedwait"):  # macOS, Windows
        return
    signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGTERM})

    def wait_for_parent() -> None:
        parent, received = os.getppid(), None
        while os.getppid() == parent and (received is None or received.si_pid != parent):
            received = signal.sigtimedwait({signal.SIGTERM}, 0.2)
        os._exit(0)

    threading.Thread(target=wait_for_parent, daemon=True).start()
