"""A Ray cluster that reads a plan's shards: Ray places, retries and watches tasks, on one machine or many."""

from __future__ import annotations

import logging
import os
import signal
import socket
from dataclasses import dataclass
from typing import Any

from sts_fast.data.prompts import Tell
from sts_fast.errors import InputError, one_line
from sts_fast.profile.work.local import MOST_KILLS
from sts_fast.profile.work.merge import merge
from sts_fast.profile.work.plan import ProfilePlan
from sts_fast.profile.work.worker import Outcome, Roots, Say, once, raise_failed, read_shard

CONNECT_SECONDS = 10


@dataclass(frozen=True)
class RayCluster:
    """Where tasks run, and what each takes of it.

    address: of a cluster that runs already, as in `ray.init`; None starts one on this machine, for this plan alone
    n_workers: tasks at a time; None: as many as the cluster has room for
    gpus:    of one task, where a share of one lets several tasks use it; None: one where the cluster has some
    """

    address: str | None = None
    n_workers: int | None = None
    gpus: float | None = None


def run_ray(
    plan: ProfilePlan,
    cluster: RayCluster = RayCluster(),
    *,
    roots: Roots | None = None,
    say: Say | None = None,
    tell: Tell | None = None,
) -> None:
    """Reads the missing shards as tasks of Ray, and merges. Every node must see the plan's library, and has sts_fast.

    tell: is told how many shards are read, and of how many

    Raises InputError without the package ray, where no cluster answers, or where a shard cannot be read or killed its
    worker three times; the others are kept.
    """
    try:
        import ray
    except ImportError as error:
        raise InputError("--executor ray needs the package ray: pip install 'sts-fast[ray]'") from error
    started = not ray.is_initialized()
    if started:
        _start(cluster, plan.work.threads)
    try:
        failed = _run(plan, cluster, dict(roots or {}), once(say), tell or (lambda done, total: None))
    finally:
        if started:
            ray.shutdown()
    raise_failed(plan, failed)
    merge(plan)


def _start(cluster: RayCluster, threads: int) -> None:
    import ray

    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    os.environ.setdefault("RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO", "0")  # Ray's coming default, of which it warns
    ends_by = signal.getsignal(signal.SIGTERM)
    try:
        if cluster.address is not None:
            _reach(cluster.address)
            ray.init(address=cluster.address, log_to_driver=False, logging_level=logging.ERROR)
        else:
            n_cpus = None if cluster.n_workers is None else cluster.n_workers * threads
            ray.init(num_cpus=n_cpus, include_dashboard=False, log_to_driver=False, logging_level=logging.ERROR)
    except (OSError, RuntimeError, ValueError) as error:
        where = "on this machine" if cluster.address is None else f"at {cluster.address}"
        raise InputError(f"no Ray cluster answers {where} ({one_line(error)}): start one, or omit --address") from error
    finally:
        signal.signal(signal.SIGTERM, ends_by)  # Ray puts its own in place


def _reach(address: str) -> None:
    """Raises OSError where nothing listens at host:port, for which Ray itself looks for minutes."""
    host, colon, port = address.removeprefix("ray://").rpartition(":")
    if colon and port.isdigit():
        socket.create_connection((host, int(port)), timeout=CONNECT_SECONDS).close()


def _run(plan: ProfilePlan, cluster: RayCluster, roots: dict[str, str], say: Say, tell: Tell) -> dict[int, str]:
    """Returns by shard why it could not be read."""
    import ray

    # A worker keeps its model for the next task, which Ray would not do by itself on a GPU.
    gpus = cluster.gpus
    if gpus is None:
        gpus = 1 if plan.loading.device != "cpu" and ray.cluster_resources().get("GPU") else 0  # type: ignore[no-untyped-call]
    resources: Any = {"num_cpus": plan.work.threads, "num_gpus": gpus}
    task: Any = ray.remote(**resources, max_retries=MOST_KILLS - 1, max_calls=0)(read_shard)
    nodes = [node["Resources"] for node in ray.nodes() if node["Alive"]]  # type: ignore[no-untyped-call]
    if not any(node.get("CPU", 0) >= plan.work.threads and node.get("GPU", 0) >= gpus for node in nodes):
        say(
            f"warning: no node of the cluster has {plan.work.threads} CPUs and {gpus} GPUs, which a task takes, and it "
            "waits for one: --threads and --gpus say how many"
        )
    waiting = plan.missing()
    running: dict[Any, int] = {}
    failed: dict[int, str] = {}
    done = len(plan.shards) - len(waiting)
    tell(done, len(plan.shards))
    try:
        while waiting or running:
            while waiting and len(running) < (cluster.n_workers or len(plan.shards)):
                shard = waiting.pop(0)
                running[task.remote(str(plan.folder), roots, shard)] = shard
            [ready], _ = ray.wait([*running], num_returns=1)
            shard = running.pop(ready)
            try:
                outcome: Outcome = ray.get(ready)
            except ray.exceptions.RayTaskError as error:
                raise error.cause from None
            except ray.exceptions.RayError as lost:
                outcome = Outcome([], f"its worker was lost {MOST_KILLS} times ({one_line(lost)})")
            for line in outcome.lines:
                say(line)
            if outcome.is_hopeless:
                raise InputError(outcome.error or "")
            if outcome.error is not None:
                failed[shard] = outcome.error
            done += 1
            tell(done, len(plan.shards))
    except BaseException:
        for task_running in running:
            ray.cancel(task_running, force=True)
        raise
    return failed
