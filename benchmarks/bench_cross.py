"""Times what profiles are for: many training sets on many domains, one query of a library, and their size on disk.

    python -m benchmarks.bench_cross [--trains 1000] [--domains 1000] [--width 65536] [--json results/cross.json]

Profiles are made up: 64 prompts of 100 tokens, 64 features a token drawn by a Zipf law over the width, so that a prompt
has some 2,000 of them. A pair of scores, and its interval, is checked against a loop over prompts first.
"""

from __future__ import annotations

import argparse
import json
import resource
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np

import sts_fast
from benchmarks.records import machine
from sts_fast.data.prompts import Prompt, PromptSet
from sts_fast.model.log import PromptLog
from sts_fast.profile.identity import Identity
from sts_fast.profile.profile import Profile
from sts_fast.profile.residuals import ResidualSums
from sts_fast.profile.rows import PromptRows
from sts_fast.statistics import grouped_ratio_interval, resamples

N_PROMPTS, N_TOKENS, L0, N_DRAWS, D_IN = 64, 100, 64, 5, 64
POOL = 16  # profiles that are really different


def made_up(name: str, kind: str, width: int, seed: int) -> Profile:
    rng = np.random.default_rng(seed)
    order = rng.permutation(width)
    parts: dict[str, list[Any]] = {field: [] for field in ("n_fired", "sum_h", "sum_sq_h", "sum_shift", "sum_sq_shift")}
    indptr, indices, strongest, at = [0], [], [], []
    for _ in range(N_PROMPTS):
        drawn = order[np.minimum(rng.zipf(1.15, N_TOKENS * L0), width) - 1]
        features, n_fired = np.unique(drawn, return_counts=True)
        n = len(features)
        h = rng.exponential(1.0, n).astype(np.float32).astype(np.float64)
        shift = rng.normal(0, 0.3, n)
        for field, values in zip(parts, (n_fired, h * n_fired, h**2 * n_fired, shift, shift**2), strict=True):
            parts[field].append(values)
        indices.append(features)
        indptr.append(indptr[-1] + n)
        strongest.append(h)
        at.append(rng.integers(0, N_TOKENS, n))
    joined = {field: np.concatenate(values) for field, values in parts.items()}
    rows = PromptRows(
        width, np.asarray(indptr, np.int64), np.concatenate(indices).astype(np.int32),
        joined["n_fired"].astype(np.int32), joined["sum_h"], joined["sum_sq_h"], joined["sum_shift"],
        joined["sum_sq_shift"], np.concatenate(strongest).astype(np.float32), np.concatenate(at).astype(np.int32),
    )  # fmt: skip
    ids, every = np.zeros(N_TOKENS, np.int32), np.arange(N_TOKENS, dtype=np.int32)
    prompts = [Prompt(str(i), ids, ids, every, every, every, 0, 0, "?", i % N_DRAWS) for i in range(N_PROMPTS)]
    prompt_set = PromptSet(name, prompts, 0, 0)
    log = PromptLog(prompt_set)
    log.kept = log.kept_paired = [np.ones(N_TOKENS, bool)] * N_PROMPTS
    log.n_read = log.n_pairs = np.full(N_PROMPTS, N_TOKENS)
    residuals = ResidualSums.zero(D_IN)
    residuals.counts[...] = N_PROMPTS * N_TOKENS
    model = {
        "name": "made up",
        "dtype": "float32",
        "revision": None,
        "weights_sha256": "0",
        "module": "m",
        "side": "output",
    }
    sae = {
        "source": "made up",
        "fingerprint": "0",
        "architecture": "relu",
        "d_in": D_IN,
        "d_sae": width,
        "hook_name": "m",
    }
    sampling = {"shots": 2, "demo_draws": N_DRAWS, "tokens": "query", "limit": N_PROMPTS, "seed": 0}
    identity = Identity(name, kind, model, sae, sampling, None, name, name)
    return Profile(identity, prompt_set, log, rows, residuals)


def named(pool: list[Profile], n: int, kind: str) -> Iterator[Profile]:
    return (pool[i % len(pool)].named(f"{kind} {i}", kind) for i in range(n))


def check(trains: list[Profile], domains: list[Profile], top_n: int) -> None:
    """Raises ValueError where a score or its interval is not that of a loop over prompts."""
    found = sts_fast.cross(trains, domains, top_n=top_n)
    for i, train in enumerate(trains[:2]):
        top = set(np.argsort(-train.rows.totals("sum_sq_shift"), kind="stable")[:top_n].tolist())
        for k, domain in enumerate(domains[:2]):
            for name, sums, groups in (("act", domain.rows.sum_h, 0), ("icl", domain.rows.sum_sq_shift, 1)):
                of_prompts = np.asarray([
                    sum(
                        sums[e]
                        for e in range(domain.rows.indptr[p], domain.rows.indptr[p + 1])
                        if int(domain.rows.indices[e]) in top
                    )
                    for p in range(N_PROMPTS)
                ])  # fmt: skip
                n = np.full(N_PROMPTS, float(N_TOKENS))
                draw_of = domain.prompt_set.draw_of * groups
                interval = grouped_ratio_interval(of_prompts, n, resamples(N_PROMPTS, 0, domain.name), draw_of)
                close = np.isclose(found.values[name][i, k], of_prompts.sum() / n.sum(), rtol=1e-12)
                if not (close and np.allclose(found.intervals[name][:, i, k], interval, rtol=1e-10)):
                    raise ValueError(f"{name} of {train.name} on {domain.name} is wrong")


def timed(run: Any) -> tuple[float, float]:
    clock, processor = time.perf_counter(), time.process_time()
    run()
    return round(time.perf_counter() - clock, 2), round(time.process_time() - processor, 2)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--trains", type=int, default=1000)
    parser.add_argument("--domains", type=int, default=1000)
    parser.add_argument("--width", type=int, default=65_536)
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    pool = [made_up(f"set {i}", "train", options.width, i) for i in range(POOL)]
    check(pool[:3], pool[3:6], 100)
    record: dict[str, Any] = {
        "machine": machine("cpu"), "trains": options.trains, "domains": options.domains, "width": options.width,
        "prompts": N_PROMPTS, "features_per_prompt": round(len(pool[0].rows.indices) / N_PROMPTS),
    }  # fmt: skip
    everything = timed(
        lambda: sts_fast.cross(named(pool, options.trains, "train"), named(pool, options.domains, "domain"))
    )
    record["cross_seconds"], record["cross_processor_seconds"] = everything
    one = timed(lambda: sts_fast.cross(named(pool, 1, "train"), named(pool, options.domains, "domain")))
    record["one_train_seconds"], record["one_train_processor_seconds"] = one
    with tempfile.TemporaryDirectory() as folder:
        pool[0].save(Path(folder) / "set")
        size = sum(path.stat().st_size for path in (Path(folder) / "set").iterdir())
        record["kilobytes_per_prompt"] = round(size / N_PROMPTS / 1000, 1)
        record["load_seconds"] = timed(lambda: Profile.load(Path(folder) / "set"))[0]
    record["peak_megabytes"] = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss // 1024
    print(json.dumps(record, indent=1))
    if options.json:
        options.json.write_text(json.dumps(record, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
