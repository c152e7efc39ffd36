"""Processes on this machine that read a plan's shards; a killed one is noticed, and its shard read again."""

from __future__ import annotations

import os
import signal
import threading
from collections import Counter
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass, field
from multiprocessing import connection, get_context, parent_process
from pathlib import Path
from queue import Empty, SimpleQueue

from sts_fast.data.prompts import Tell
from sts_fast.errors import InputError
from sts_fast.profile.work.merge import merge
from sts_fast.profile.work.plan import ProfilePlan
from sts_fast.profile.work.worker import Roots, Say, Worker, once, raise_failed

MOST_KILLS = 3  # of workers by one shard, before it is left out
GPUS = "CUDA_VISIBLE_DEVICES"


def run_local(
    plan: ProfilePlan,
    n_workers: int | None = None,
    *,
    roots: Roots | None = None,
    say: Say | None = None,
    tell: Tell | None = None,
) -> None:
    """Reads the missing shards with processes, one GPU each where there are GPUs, and merges.

    A program that calls this must be safe to import, under `if __name__ == "__main__":`, as for every process pool.

    n_workers: None: one a GPU, or one

    tell: is told how many shards are read, and of how many

    Raises InputError where a shard cannot be read, or killed its worker three times; the others are kept.
    """
    missing = plan.missing()
    driver = _Driver(plan, roots or {}, once(say), tell or (lambda done, total: None))
    for shard in missing:
        driver.queue.put(shard)
    driver.tell(len(plan.shards) - len(missing), len(plan.shards))
    gpus = _gpus()
    threads = [
        threading.Thread(target=driver.serve, args=(gpus[i % len(gpus)] if gpus else None,), daemon=True)
        for i in range(min(n_workers or len(gpus) or 1, len(missing)))
    ]
    for thread in threads:
        thread.start()
    try:
        while any(thread.is_alive() for thread in threads):
            threads[0].join(0.1)
            threads.sort(key=lambda thread: not thread.is_alive())
    finally:
        driver.stop()
    if driver.broken is not None:
        raise driver.broken
    raise_failed(plan, driver.failed)
    merge(plan)


@dataclass
class _Driver:
    """What the threads share that each drive one process. failed: by shard, why it could not be read."""

    plan: ProfilePlan
    roots: Roots
    say: Say
    tell: Tell
    queue: SimpleQueue[int] = field(default_factory=SimpleQueue)
    failed: dict[int, str] = field(default_factory=dict)
    kills: Counter[int] = field(default_factory=Counter)
    broken: BaseException | None = None
    stopped: bool = False
    n_done: int = 0
    pools: dict[int, ProcessPoolExecutor] = field(default_factory=dict)
    lock: threading.Lock = field(default_factory=threading.Lock)

    def serve(self, gpu: str | None) -> None:
        """Gives one process a shard after the other."""
        me = threading.get_ident()
        try:
            while not self.stopped:
                try:
                    shard = self.queue.get_nowait()
                except Empty:
                    return
                if me not in self.pools:
                    self.pools[me] = ProcessPoolExecutor(
                        1, get_context("spawn"), _start, (str(self.plan.folder), dict(self.roots), gpu)
                    )
                try:
                    lines = self.pools[me].submit(_read, shard).result()
                except BrokenProcessPool:
                    del self.pools[me]
                    self._was_killed(shard)
                except _CannotOpen as error:
                    raise InputError(str(error)) from error
                except InputError as error:
                    self.failed[shard] = str(error)
                else:
                    with self.lock:
                        for line in lines:
                            self.say(line)
                        self.n_done += 1
                        self.tell(len(self.plan.shards) - self.queue.qsize(), len(self.plan.shards))
        except BaseException as error:  # told by the main thread
            if not self.stopped:
                self.broken, self.stopped = error, True

    def _was_killed(self, shard: int) -> None:
        if self.stopped:
            return
        self.kills[shard] += 1
        if self.kills[shard] < MOST_KILLS:
            self.say(
                f"the worker of shard {shard} was killed ({self.kills[shard]} of {MOST_KILLS} times): it is read again"
            )
            self.queue.put(shard)
        else:
            self.failed[shard] = (
                f"its worker was killed {MOST_KILLS} times, as by running out of memory: plan with fewer --workers, a "
                "smaller --batch-tokens, or leave the set out"
            )

    def stop(self) -> None:
        self.stopped = True
        for pool in [*self.pools.values()]:
            for process in [*(pool._processes or {}).values()]:
                process.kill()
            pool.shutdown(wait=True, cancel_futures=True)


class _CannotOpen(InputError):
    """Raised in a worker where nothing can be read, whatever the shard."""


_worker: Worker | None = None
_lines: list[str] = []


def _start(plan: str, roots: Roots, gpu: str | None) -> None:
    """Prepares a worker's process, which ends with its driver."""
    global _worker
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the driver ends it
    driver = parent_process()
    assert driver is not None
    threading.Thread(target=_end_with, args=(driver.sentinel,), daemon=True).start()
    if gpu is not None:
        os.environ[GPUS] = gpu
    _worker = Worker(ProfilePlan.load(plan), roots, _lines.append)


def _end_with(sentinel: int) -> None:
    connection.wait([sentinel])
    os._exit(1)


def _read(shard: int) -> list[str]:
    """Reads a shard in a worker's process; returns what it said."""
    assert _worker is not None
    try:
        _worker.session  # noqa: B018
    except InputError as error:
        raise _CannotOpen(str(error)) from error
    try:
        _worker.read(shard, check_fit=shard == 0)
    except InputError as error:  # others of its kind cannot be sent
        raise InputError(str(error)) from error
    said, _lines[:] = [*_lines], []
    return said


def _gpus() -> list[str]:
    """The GPUs of this machine that are not hidden, as CUDA_VISIBLE_DEVICES names them."""
    if (visible := os.environ.get(GPUS)) is not None:
        return [name for name in visible.split(",") if name.strip()]
    return [str(i) for i in range(len([*Path("/proc/driver/nvidia/gpus").glob("*")]))]
