"""Times what profiles are for: many training sets on many domains, one query of a library, and their size on disk.

    python -m benchmarks.bench_cross [--trains 1000] [--domains 1000] [--width 65536] [--json results/cross.json]

Profiles are made up: 64 prompts of 100 tokens, with float32 activations of features that a Zipf law draws. Of 64 draws
a token 37 are different features, some 1,500 a prompt; of 124 it is 64, and 2,500 a prompt. Their size on disk is told
of both. A pair of scores, and its interval, is checked against a loop over prompts first.
"""

from __future__ import annotations

import argparse
import json
import resource
import tempfile
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

import sts_fast
from benchmarks.records import machine
from sts_fast.data.prompts import Prompt, PromptSet
from sts_fast.model.log import PromptLog
from sts_fast.profile.identity import Identity
from sts_fast.profile.profile import Profile
from sts_fast.profile.residuals import ResidualSums
from sts_fast.profile.rows import PromptRows, rounded
from sts_fast.statistics import grouped_ratio_interval, resamples

N_PROMPTS, N_TOKENS, N_DRAWS, D_IN = 64, 100, 5, 64
DRAWN, DRAWN_FOR_64 = 64, 124  # features a token, the same ones perhaps twice
POOL = 16  # profiles that are really different


def made_up(name: str, kind: str, width: int, seed: int, n_drawn: int = DRAWN) -> Profile:
    rng = np.random.default_rng(seed)
    order = rng.permutation(width)
    parts = [_prompt(rng, order, n_drawn) for _ in range(N_PROMPTS)]
    indptr = np.cumsum([0, *(len(part[0]) for part in parts)], dtype=np.int64)
    rows = PromptRows(width, indptr, *(np.concatenate(of) for of in zip(*parts, strict=True)))
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


def _prompt(rng: np.random.Generator, order: NDArray[np.int64], n_drawn: int) -> tuple[Any, ...]:
    """A prompt's entries: sums of float32 activations, as a model's are."""
    drawn = order[np.minimum(rng.zipf(1.15, (N_TOKENS, n_drawn)), len(order)) - 1]
    firings = np.unique(drawn * N_TOKENS + np.arange(N_TOKENS)[:, None])  # by feature, then by token
    features, first, of, n_fired = np.unique(
        firings // N_TOKENS, return_index=True, return_inverse=True, return_counts=True
    )
    h, shown = (rng.exponential(1.0, len(firings)).astype(np.float32) for _ in range(2))
    shift = shown.astype(np.float64) - h
    sums = (np.bincount(of, values) for values in (h, h.astype(np.float64) ** 2, shift, shift**2))
    sum_h, sum_sq_h, sum_shift, sum_sq_shift = sums
    strongest = np.maximum.reduceat(h, first)
    tokens = np.where(h == strongest[of], firings % N_TOKENS, N_TOKENS)
    at = np.minimum.reduceat(tokens, first)
    return (
        features.astype(np.int32), n_fired.astype(np.int32), sum_h, rounded(sum_sq_h), sum_shift, rounded(sum_sq_shift),
        strongest, at.astype(np.int32),
    )  # fmt: skip


def named(pool: list[Profile], n: int, kind: str) -> Iterator[Profile]:
    for i in range(n):
        profile, name = pool[i % len(pool)], f"{kind} {i}"
        identity = replace(profile.identity, set=name, kind=kind)
        yield profile.of(identity, replace(profile.prompt_set, name=name))


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


def on_disk(profile: Profile, folder: Path) -> dict[str, float]:
    profile.save(folder)
    return {
        "features_per_token": round(float(profile.rows.n_fired.sum()) / profile.n_tokens, 1),
        "features_per_prompt": round(len(profile.rows.indices) / N_PROMPTS),
        "kilobytes_per_prompt": round(sum(path.stat().st_size for path in folder.iterdir()) / N_PROMPTS / 1000, 1),
        "load_seconds": timed(lambda: Profile.load(folder))[0],
    }


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
        "prompts": N_PROMPTS,
    }  # fmt: skip
    everything = timed(
        lambda: sts_fast.cross(named(pool, options.trains, "train"), named(pool, options.domains, "domain"))
    )
    record["cross_seconds"], record["cross_processor_seconds"] = everything
    one = timed(lambda: sts_fast.cross(named(pool, 1, "train"), named(pool, options.domains, "domain")))
    record["one_train_seconds"], record["one_train_processor_seconds"] = one
    with tempfile.TemporaryDirectory() as folder:
        saved = [Path(folder) / f"set {i}" for i in range(POOL)]
        for profile, path in zip(pool, saved, strict=True):
            profile.save(path)
        cycled = [saved[i % POOL] for i in range(max(options.trains, options.domains))]
        of_domains = timed(lambda: sts_fast.cross(saved[:1], cycled[: options.domains]))
        record["one_train_from_files_seconds"], record["one_train_from_files_processor_seconds"] = of_domains
        of_trains = timed(lambda: sts_fast.cross(cycled[: options.trains], saved[:2], estimators=("act",)))
        record["two_domains_from_files_seconds"], record["two_domains_from_files_processor_seconds"] = of_trains
        record["on_disk"] = [
            on_disk(made_up("set", "train", options.width, 0, n_drawn), Path(folder) / str(n_drawn))
            for n_drawn in (DRAWN, DRAWN_FOR_64)
        ]
    record["peak_megabytes"] = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss // 1024
    print(json.dumps(record, indent=1))
    if options.json:
        options.json.write_text(json.dumps(record, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
