"""Who runs the cells: processes of this machine, or a Ray cluster. Each takes one cell at a time."""

import logging
import os
import signal
import sys
import threading
from collections.abc import Iterator
from concurrent.futures import Future, ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from contextlib import contextmanager, suppress
from multiprocessing import get_context, parent_process
from pathlib import Path
from typing import Any

from resseq.ablation.cell import Cell, run_cell
from resseq.ablation.grid import AblateOptions


class Processes:
    """A pool of one process for each cell at work, so that a process that dies takes no other cell with it.

    What the processes print goes to workers.log in the output folder.
    """

    def __init__(self, options: AblateOptions):
        self.log = options.folder / "workers.log"
        self.pids: dict[ProcessPoolExecutor, Future[int]] = {}
        self.idle: list[ProcessPoolExecutor] = []
        self.busy: dict[Future[Any], ProcessPoolExecutor] = {}

    def submit(self, cell: Cell, pickled: bytes) -> Future[Any]:
        pool = self.idle.pop() if self.idle else self._start()
        future = pool.submit(run_cell, cell, pickled)
        self.busy[future] = pool
        return future

    def _start(self) -> ProcessPoolExecutor:
        pool = ProcessPoolExecutor(1, get_context("spawn"), _begin, (self.log,))
        with _launching():
            self.pids[pool] = pool.submit(os.getpid)
        return pool

    def release(self, future: Future[Any]) -> None:
        """Take back the process of a future that is done, if it lives."""
        pool = self.busy.pop(future)
        if future.exception() is None:
            self.idle.append(pool)
        else:
            del self.pids[pool]
            pool.shutdown()

    def close(self, stop: bool) -> None:
        """End the processes; those at work first save their cells, if they are told to stop."""
        for pid in self.pids.values() if stop else ():
            with suppress(BrokenProcessPool, ProcessLookupError):
                os.kill(pid.result(), signal.SIGTERM)
        for pool in self.pids:
            pool.shutdown(cancel_futures=True)


@contextmanager
def _launching() -> Iterator[None]:
    """A new process must not take the Ctrl-C that is for its parent, nor run the script again that called us."""
    main = vars(sys.modules["__main__"])
    hidden = {name: main[name] for name in ("__spec__", "__file__") if name in main}
    main.update(__spec__=None, __file__=None)
    signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT})
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_UNBLOCK, {signal.SIGINT})
        del main["__file__"]
        main.update(hidden)


def _begin(log: Path) -> None:
    """Settle in a new process: out of the terminal's reach, and gone when the parent is."""
    os.setpgid(0, 0)
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    signal.pthread_sigmask(signal.SIG_UNBLOCK, {signal.SIGINT})
    file = os.open(log, os.O_WRONLY | os.O_APPEND | os.O_CREAT)
    os.dup2(file, sys.stdout.fileno())
    os.dup2(file, sys.stderr.fileno())
    threading.Thread(target=_follow, daemon=True).start()


def _follow() -> None:
    parent = parent_process()
    assert parent is not None
    parent.join()
    os._exit(1)


class Ray:
    """A Ray task for each cell; the machines share the output folder."""

    def __init__(self, options: AblateOptions):
        try:
            import ray  # pyright: ignore[reportMissingImports]
        except ImportError as error:
            raise ValueError(
                "ablate: --engine ray needs Ray; got a Python without it. Type pip install ray."
            ) from error
        self.ray, self.ours = ray, not ray.is_initialized()
        if self.ours:
            ray.init(address=options.ray_address, log_to_driver=False, logging_level=logging.WARNING)
        resources = {"num_cpus": options.threads, "num_gpus": options.gpus_per_cell}
        self.task = ray.remote(**resources, max_retries=0)(run_cell)
        self.stored: dict[bytes, Any] = {}
        self.busy: dict[Future[Any], Any] = {}

    def submit(self, cell: Cell, pickled: bytes) -> Future[Any]:
        if pickled not in self.stored:
            self.stored[pickled] = self.ray.put(pickled)
        reference = self.task.remote(cell, self.stored[pickled])
        future = reference.future()
        self.busy[future] = reference
        return future

    def release(self, future: Future[Any]) -> None:
        del self.busy[future]

    def close(self, stop: bool) -> None:
        left = list(self.busy.values())
        for reference in left if stop else ():
            self.ray.cancel(reference)
        if left:
            self.ray.wait(left, num_returns=len(left))  # until they have saved
        if self.ours:
            self.ray.shutdown()


ENGINES = {"local": Processes, "ray": Ray}
