"""Processes on this machine that read a plan's shards; a killed one is noticed, and its shard read again."""

from __future__ import annotations

import os
import signal
import threading
import time
from collections import Counter
from collections.abc import Sequence
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
from sts_fast.profile.work.worker import Outcome, Roots, Say, once, raise_failed, read_shard

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
    n_done = len(plan.shards) - len(missing)
    driver = _Driver(plan, roots or {}, once(say), tell or (lambda done, total: None), n_done)
    for shard in missing:
        driver.queue.put(shard)
    driver.tell(n_done, len(plan.shards))
    gpus = _gpus()
    threads = [
        threading.Thread(target=driver.serve, args=(gpus[i % len(gpus)] if gpus else None,), daemon=True)
        for i in range(min(n_workers or len(gpus) or 1, len(missing)))
    ]
    try:
        for thread in threads:
            thread.start()
        while any(thread.is_alive() for thread in threads):
            threads[0].join(0.1)
            threads.sort(key=lambda thread: not thread.is_alive())
    finally:
        driver.stop(threads)
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
    n_done: int
    queue: SimpleQueue[int] = field(default_factory=SimpleQueue)
    failed: dict[int, str] = field(default_factory=dict)
    kills: Counter[int] = field(default_factory=Counter)
    broken: BaseException | None = None
    stopped: bool = False
    pools: dict[int, ProcessPoolExecutor] = field(default_factory=dict)
    lock: threading.Lock = field(default_factory=threading.Lock)

    def serve(self, gpu: str | None) -> None:
        """Gives one process a shard after the other."""
        if hasattr(signal, "pthread_sigmask"):  # its process inherits this: the driver ends it
            signal.pthread_sigmask(signal.SIG_BLOCK, (signal.SIGINT, signal.SIGTERM))
        me = threading.get_ident()
        try:
            while not self.stopped:
                try:
                    shard = self.queue.get_nowait()
                except Empty:
                    return
                if me not in self.pools:
                    self.pools[me] = ProcessPoolExecutor(1, get_context("spawn"), _start, (gpu,))
                try:
                    outcome = self.pools[me].submit(read_shard, str(self.plan.folder), dict(self.roots), shard).result()
                except BrokenProcessPool:
                    del self.pools[me]
                    self._was_killed(shard)
                else:
                    self._ended(shard, outcome)
        except BaseException as error:  # told by the main thread
            if not self.stopped:
                self.broken, self.stopped = error, True

    def _ended(self, shard: int, outcome: Outcome) -> None:
        if outcome.is_hopeless:
            raise InputError(outcome.error or "")
        with self.lock:
            for line in outcome.lines:
                self.say(line)
            if outcome.error is not None:
                self.failed[shard] = outcome.error
            self.n_done += 1
            self.tell(self.n_done, len(self.plan.shards))

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
            why = (
                f"its worker was killed {MOST_KILLS} times, as by running out of memory: plan with fewer --workers, a "
                "smaller --batch-tokens, or leave the set out"
            )
            self._ended(shard, Outcome([], why))

    def stop(self, threads: Sequence[threading.Thread]) -> None:
        """Kills all processes, until the threads that start them have ended."""
        self.stopped = True
        while True:
            pools = [*self.pools.values()]
            for process in [process for pool in pools for process in [*(pool._processes or {}).values()]]:
                process.kill()
            if not any(thread.is_alive() for thread in threads):
                break
            time.sleep(0.05)
        for pool in pools:
            pool.shutdown()


def _start(gpu: str | None) -> None:
    """Prepares a worker's process, which ends with its driver."""
    driver = parent_process()
    assert driver is not None
    threading.Thread(target=_end_with, args=(driver.sentinel,), daemon=True).start()
    if gpu is not None:
        os.environ[GPUS] = gpu


def _end_with(sentinel: int) -> None:
    connection.wait([sentinel])
    os._exit(1)


def _gpus() -> list[str]:
    """The GPUs of this machine that are not hidden, as CUDA_VISIBLE_DEVICES names them."""
    if (visible := os.environ.get(GPUS)) is not None:
        return [name for name in visible.split(",") if name.strip()]
    return [str(i) for i in range(len([*Path("/proc/driver/nvidia/gpus").glob("*")]))]
