"""Times a whole forecast beside the bare forward passes it cannot do without, and beside the published way of doing it.

    python -m benchmarks.bench_forecast [--quick | --seven-b] [--threads 1] [--json benchmarks/results/forecast.json]

A random Llama, questions of 100 tokens, two long demonstrations of the training set and five of each domain; with
--seven-b (`make gpu STAGES=table`) the shape of Qwen2.5-7B in bfloat16 on a GPU, an SAE 131,072 wide, and questions as
long as those that LIMO was tested on. First the results of both ways are compared, then they are timed in turns:

  ours      sts_fast.score(...), as a user calls it
  floor     the same passes that ours sent through the model, up to the hook, and nothing else
  alone     each query with its demonstrations in a pass of its own, up to the hook: nothing shared
  authors   as published, on transformers instead of vLLM: the whole model over every prompt (generation off, logits of
            the last token only, prompts without demonstrations in batches), the SAE forward with its decoder, dense
            features of the tokens read joined to one growing tensor a set, saved to disk and loaded, then the
            notebook's sums; with two things put right that would make it wrong or slow for no reason: rows are paired
            token by token, and features are kept of the tokens read alone. Where --sample is less than the queries of
            a set, that many are run and their time counts for all; joining, saving and sums are done in full. On a GPU
            the features stay there, as wide as the model's numbers.

Processor time counts where the machine is shared; with --threads 1 it is that of one core. Memory is the growth of the
process, one of its own, beyond model and libraries; on a GPU, of what is allocated there.
"""

from __future__ import annotations

import argparse
import json
import platform
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field, fields, replace
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import torch
from tokenizers import Tokenizer, models, pre_tokenizers
from torch.nn.utils.rnn import pad_sequence
from transformers import DynamicCache, LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast
from transformers.cache_utils import DynamicLayer

import sts_fast
from benchmarks.timing import synchronize
from sts_fast.data.examples import Example
from sts_fast.data.prompts import Prompt
from sts_fast.data.sets import Kind, Sampling
from sts_fast.data.template import PromptTemplate
from sts_fast.model.language_model import LanguageModel
from sts_fast.model.packing import as_cache
from sts_fast.sae import SAE

N_WORDS = 2000
# Lengths of the 1,245 questions that LIMO evaluates on (GAIR-NLP/LIMO, eval/data: AIME, AMC, MATH, OlympiadBench), by
# the share of questions that are shorter; three characters count as a token.
LIMO_SHARES = (0, 0.1, 0.25, 0.5, 0.75, 0.9, 0.95, 0.99, 1)
LIMO_LENGTHS = (7, 25, 39, 64, 104, 165, 210, 455, 1472)
# Features that fire on a token, in the mean.
MEAN_L0 = 82
TOP_N = 100
SHIFT = "shift of train"


@dataclass(frozen=True)
class Workload:
    """Sizes; tokens are counted per query, without what the template adds, and are LIMO's where there are 0 of them."""

    d_model: int = 512
    n_layers: int = 16
    layer: int = 9
    d_sae: int = 4096
    n_domains: int = 8
    shift_queries: int = 200
    domain_queries: int = 100
    query_tokens: int = 100
    demo_tokens: int = 4000
    domain_demo_tokens: int = 200
    sample: int = 2
    d_mlp: int = 1536
    n_keys: int = 4
    vocabulary: int = 0
    dtype: str = "float32"
    device: str = "cpu"

    def query_lengths(self, n: int) -> list[int]:
        """The same ones for every set, in no order."""
        spread = np.interp((np.arange(n) + 0.5) / n, LIMO_SHARES, LIMO_LENGTHS).astype(int)
        lengths = [self.query_tokens] * n if self.query_tokens else spread.tolist()
        return [lengths[i] for i in np.random.default_rng(1).permutation(n)]

    def arithmetic(self) -> tuple[float, float]:
        """Multiplications by weights per token: of the layers that are run, and of the SAE."""
        d_head = 64 if self.d_model < 2048 else 128
        attention = 2 * self.d_model**2 + 2 * self.d_model * self.n_keys * d_head
        return (self.layer + 1) * (attention + 3 * self.d_model * self.d_mlp), self.d_model * self.d_sae


QUICK = Workload(
    d_model=384, n_layers=12, layer=7, d_sae=2048, n_domains=2, shift_queries=40, domain_queries=40, demo_tokens=1000,
    d_mlp=1152, n_keys=3,
)  # fmt: skip
SEVEN_B = Workload(
    d_model=3584, n_layers=28, layer=19, d_sae=131_072, n_domains=2, query_tokens=0, d_mlp=18_944, vocabulary=152_064,
    dtype="bfloat16", device="cuda",
)  # fmt: skip
# What both ways are run on in full first, to be compared: in float32, on the same device.
CHECKED = {
    **{"d_model": 384, "n_layers": 6, "layer": 3, "d_sae": 2048, "d_mlp": 1152, "n_keys": 3, "vocabulary": 0},
    **{"n_domains": 2, "shift_queries": 8, "domain_queries": 8, "demo_tokens": 200, "sample": 8, "dtype": "float32"},
}


class World:
    """Model, SAE and questions of a workload."""

    def __init__(self, work: Workload) -> None:
        self.work = work
        words = ["?", "Question:", "Answer:", *(f"w{i}" for i in range(N_WORDS))]
        tokenizer = Tokenizer(models.WordLevel({word: i for i, word in enumerate(words)}, unk_token="?"))
        tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
        self.tokenizer = PreTrainedTokenizerFast(tokenizer_object=tokenizer, unk_token="?")
        torch.manual_seed(0)
        config = LlamaConfig(
            vocab_size=work.vocabulary or len(words),
            hidden_size=work.d_model,
            intermediate_size=work.d_mlp,
            num_hidden_layers=work.n_layers,
            num_attention_heads=work.d_model // (64 if work.d_model < 2048 else 128),
            num_key_value_heads=work.n_keys,
            max_position_embeddings=32768,
            initializer_range=0.05,
        )
        dtype = getattr(torch, work.dtype)
        torch.set_default_dtype(dtype)
        try:
            with torch.device(work.device):
                self.model = LlamaForCausalLM(config).eval()
        finally:
            torch.set_default_dtype(torch.float32)
        rng = np.random.default_rng(0)

        def text(n: int) -> str:
            return " ".join(f"w{i}" for i in rng.integers(0, N_WORDS, n))

        def examples(name: str, n_queries: int, shots: int, n_demo: int) -> list[Example]:
            demos = [Example(f"{name} demo {i}", text(50), text(n_demo - 50)) for i in range(shots)]
            lengths = work.query_lengths(n_queries)
            return demos + [Example(f"{name} {i}", text(length), None) for i, length in enumerate(lengths)]

        self.train = examples("train", work.shift_queries, 2, work.demo_tokens)
        self.domains = {
            f"domain {i}": examples(f"domain {i}", work.domain_queries, 5, work.domain_demo_tokens)
            for i in range(work.n_domains)
        }
        ids = torch.from_numpy(rng.integers(3, N_WORDS, (4, 64))).to(work.device)
        x = LanguageModel(self.model, work.layer).run(input_ids=ids)[0].flatten(0, 1).float()
        self.W_enc = torch.randn(work.d_model, work.d_sae, device=work.device) / work.d_model**0.5
        self.W_dec = torch.randn(work.d_sae, work.d_model, device=work.device, dtype=dtype) / work.d_sae**0.5
        product = x @ self.W_enc
        border = statistics.NormalDist().inv_cdf(1 - MEAN_L0 / work.d_sae)
        self.b_enc = -(product.mean(dim=0) + border * product.std(dim=0))
        self.sae = SAE(
            "standard",
            self.W_enc.cpu().numpy(),
            self.b_enc.cpu().numpy(),
            np.zeros(work.d_model, np.float32),
            apply_b_dec_to_input=False,
            hook_name=f"blocks.{work.layer}.hook_resid_post",
            source="random",
        )
        if work.dtype != "float32":
            self.sae = self.sae.with_dtype("bfloat16")
        self.W_enc, self.b_enc = self.W_enc.to(dtype), self.b_enc.to(dtype)

    @cached_property
    def prompts(self) -> dict[str, list[Prompt]]:
        """As a forecast sends them, by set."""
        template, sampling, made = PromptTemplate(self.tokenizer), Sampling(limit=None), {}
        for name, examples in {"train": self.train, **self.domains}.items():
            kind: Kind = "train" if name == "train" else "domain"
            made[name] = sampling.prompts(name, examples, None, template, None, kind=kind, show=True).prompts
        return made

    def forecast(self, **options: Any) -> Any:
        return sts_fast.score(
            model=self.model,
            sae=self.sae,
            tokenizer=self.tokenizer,
            train=self.train,
            domains=self.domains,
            limit=None,
            top_n=TOP_N,
            **options,
        )


@dataclass
class Clock:
    """Seconds of the clock and of the processor, by part."""

    device: str
    wall: dict[str, float] = field(default_factory=dict)
    cpu: dict[str, float] = field(default_factory=dict)

    @contextmanager
    def of(self, part: str, times: float = 1.0) -> Iterator[None]:
        wall, cpu = time.perf_counter(), time.process_time()
        yield
        synchronize(self.device)
        self.wall[part] = self.wall.get(part, 0) + times * (time.perf_counter() - wall)
        self.cpu[part] = self.cpu.get(part, 0) + times * (time.process_time() - cpu)


def run_ours(world: World, recorded: dict[str, list[dict[str, Any]]] | None = None) -> tuple[Any, Clock]:
    """A forecast, its time by stage from the first pass of each; recorded: is given the passes' inputs by stage."""
    clock, marks, stage_inputs = Clock(world.work.device), [], []
    run = LanguageModel.run

    def watched(decoder: LanguageModel, **inputs: Any) -> Any:
        if not marks:
            marks.append((time.perf_counter(), time.process_time()))
        if recorded is not None:
            stage_inputs.append(inputs)
        return run(decoder, **inputs)

    def tell(stage: str, done: int, total: int) -> None:
        if done == total and marks:
            synchronize(world.work.device)
            now = time.perf_counter(), time.process_time()
            clock.wall[stage], clock.cpu[stage] = (after - before for after, before in zip(now, marks[-1], strict=True))
            marks.append(now)
            if recorded is not None:
                recorded[stage] = list(stage_inputs)
                stage_inputs.clear()

    LanguageModel.run = watched  # type: ignore[method-assign]
    try:
        forecast = world.forecast(progress=tell)
    finally:
        LanguageModel.run = run  # type: ignore[method-assign]
    return forecast, clock


def run_floor(world: World, recorded: dict[str, list[dict[str, Any]]]) -> Clock:
    """The passes that were recorded, again; a cache that they filled starts empty, one that they only read is there."""
    clock, decoder, filled = Clock(world.work.device), LanguageModel(world.model, world.work.layer), {}
    for stage, passes in recorded.items():
        with clock.of(stage):
            for inputs in passes:
                cache = next((value for value in inputs.values() if isinstance(value, DynamicCache)), None)
                if cache is not None and any(type(layer) is DynamicLayer for layer in cache.layers):
                    inputs = inputs | as_cache(world.model, filled.setdefault(id(cache), DynamicCache()))
                decoder.run(**inputs)
    return clock


def run_alone(world: World) -> Clock:
    """Queries of the training set, without and with demonstrations, each in a pass of its own."""
    work, prompts = world.work, world.prompts["train"]
    clock, decoder = Clock(work.device), LanguageModel(world.model, work.layer)
    sample = prompts[: work.sample]
    with clock.of(SHIFT, len(prompts) / len(sample)):
        for prompt in sample:
            for ids in (prompt.base_ids, prompt.demos_ids):
                decoder.run(input_ids=torch.from_numpy(ids.astype(np.int64))[None].to(work.device), use_cache=False)
    return clock


def run_authors(world: World, folder: Path) -> tuple[Any, Clock]:
    """The published way; see the top. Returns (mean squared shift [d_sae], STS_act and STS_ICL by domain) and times."""
    work = world.work
    clock, W_enc, b_enc = Clock(work.device), world.W_enc, world.b_enc
    seen: list[torch.Tensor] = []
    handle = world.model.model.layers[work.layer].register_forward_hook(
        lambda module, args, output: seen.append(output[0] if isinstance(output, tuple) else output)
    )

    def dump(name: str, prompts: list[Prompt], ids_of: str, positions_of: str, batch: int) -> Path:
        features = torch.empty(0, work.d_sae, device=work.device, dtype=W_enc.dtype)
        prompts = sorted(prompts, key=lambda prompt: len(prompt.base_ids))  # next to no padding
        parts = [prompts[start : start + batch] for start in range(0, len(prompts), batch)]
        n_run = min(len(parts), -(-work.sample // batch))
        chosen = [parts[(2 * i + 1) * len(parts) // (2 * n_run)] for i in range(n_run)]  # short and long ones
        times = len(prompts) / sum(map(len, chosen))
        made = []
        for part in chosen:
            with clock.of("forward", times):
                seen.clear()
                sequences = [torch.from_numpy(getattr(prompt, ids_of).astype(np.int64)) for prompt in part]
                ids = pad_sequence(sequences, batch_first=True)  # on the right, where no token before it looks
                world.model(input_ids=ids.to(work.device), use_cache=False, logits_to_keep=1)
                x = torch.cat([seen[0][i][getattr(prompt, positions_of)] for i, prompt in enumerate(part)])
            with clock.of("encode", times):
                made.append(torch.relu(x @ W_enc + b_enc))
            with clock.of("decode", times):
                made[-1] @ world.W_dec
        for i, part in enumerate(parts):
            n_rows = sum(len(getattr(prompt, positions_of)) for prompt in part)
            rows = made[i % len(made)]
            rows = rows.repeat(-(-n_rows // len(rows)), 1)[:n_rows] if len(rows) < n_rows else rows[:n_rows]
            with clock.of("cat"):
                features = torch.cat([features, rows])
        with clock.of("disk"):
            torch.save(features, folder / f"{name} {ids_of}.pt")
        return folder / f"{name} {ids_of}.pt"

    batch = max(1, 4096 // (2 + (work.query_tokens or max(LIMO_LENGTHS[:-1]))))
    try:
        with torch.inference_mode():
            act, icl, mean_squared_shift, top = {}, {}, None, None
            for name, prompts in world.prompts.items():
                files = (
                    dump(name, prompts, "base_ids", "paired", batch),
                    dump(name, prompts, "demos_ids", "paired_demos", 1),
                )
                with clock.of("disk"):
                    base, demos = (torch.load(file, weights_only=True) for file in files)
                with clock.of("sums"):
                    if name == "train":
                        mean_squared_shift = ((demos - base) ** 2).mean(dim=0)
                        top = mean_squared_shift.topk(TOP_N).indices
                    else:
                        act[name] = float(base[:, top].sum(dim=1).mean())
                        icl[name] = float(((demos - base)[:, top] ** 2).sum(dim=1).mean())
                del base, demos
                for file in files:  # of 131,072 features, a disk may hold no more than one set
                    file.unlink()
    finally:
        handle.remove()
    return (mean_squared_shift, act, icl), clock


def check(forecast: Any, authors: Any) -> str:
    """Asserts that both ways found the same."""
    mean_squared_shift, act, icl = authors
    expected = mean_squared_shift.double().cpu().numpy()
    found = forecast.stats.mean_squared_shift
    error = float(np.abs(found - expected).max() / expected.max())
    top = {int(j) for j in np.argsort(-expected)[:TOP_N]}
    n_same = len(top & {feature.index for feature in forecast.shifted_features})
    off = max(
        abs(domain.scores[kind].value / values[domain.name] - 1)
        for domain in forecast.domains
        for kind, values in (("act", act), ("icl", icl))
    )
    if error > 1e-3 or n_same < TOP_N - 1 or off > 1e-3:
        raise AssertionError(f"the two ways differ: shift by {error:.1e}, top {n_same}/{TOP_N}, scores by {off:.1e}")
    return f"same results: mean squared shift within {error:.0e}, top {n_same}/{TOP_N}, scores within {off:.0e}"


def memory_in_use(field: str) -> int:
    """VmRSS: what this process holds, in bytes; VmHWM: the most it has held since it was last reset."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(1024 * int(line.split()[1]) for line in lines if line.startswith(field))


def measure_memory(world: World, side: str) -> int:
    """By how many bytes this process (or the GPU) grew, beyond model and libraries, while it forecast."""

    def run(world: World) -> None:
        with tempfile.TemporaryDirectory() as folder:
            if side == "ours":
                world.forecast()
            else:
                run_authors(world, Path(folder))

    on_gpu = world.work.device != "cpu"
    if not on_gpu:  # what runs first loads libraries
        run(World(replace(world.work, **CHECKED)))
    world.prompts  # noqa: B018
    if on_gpu:
        torch.cuda.reset_peak_memory_stats()
    else:
        Path("/proc/self/clear_refs").write_text("5")
    before = torch.cuda.memory_allocated() if on_gpu else memory_in_use("VmRSS")
    run(world)
    return (torch.cuda.max_memory_allocated() if on_gpu else memory_in_use("VmHWM")) - before


def memory_of(work: Workload, side: str, threads: int) -> int:
    """The same in a process of its own."""
    command = [sys.executable, "-m", "benchmarks.bench_forecast", "--memory", side, "--threads", str(threads)]
    options = [word for name, value in asdict(work).items() for word in (f"--{name.replace('_', '-')}", str(value))]
    ran = subprocess.run([*command, *options], capture_output=True, text=True, check=True)
    return int(ran.stdout.splitlines()[-1])


def median_of(clocks: list[Clock], kind: str, part: str) -> float:
    return statistics.median(getattr(clock, kind)[part] for clock in clocks)


def measured(
    work: Workload, *, rounds: int, threads: int, note: Callable[[dict[str, Any]], object] = lambda _: None
) -> dict[str, Any]:
    """All of it: the two ways compared, timed in turns, and their memory; note(found) for each part at once."""
    with tempfile.TemporaryDirectory() as folder:
        world = World(replace(work, **CHECKED))
        checked = check(world.forecast(), run_authors(world, Path(folder))[0])
    print(checked)
    note({"checked": checked})

    world, recorded = World(work), {}
    forecast, _ = run_ours(world, recorded)
    ours, floor = [], []
    for _ in range(rounds):
        ours.append(run_ours(world)[1])
        floor.append(run_floor(world, recorded))
        note({"rounds": [{"ours": dict(ours[-1].wall), "floor": dict(floor[-1].wall)}]})
    recorded.clear()
    alone = run_alone(world)
    note({"alone": dict(alone.wall)})
    with tempfile.TemporaryDirectory() as folder:
        _, authors = run_authors(world, Path(folder))

    weights, sae = work.arithmetic()
    stages = {"shift": [SHIFT], "score": [name for name in ours[0].wall if name != SHIFT]}
    device = platform.processor() or platform.machine() if work.device == "cpu" else torch.cuda.get_device_name()
    found: dict[str, Any] = {
        "machine": f"{device}, torch {torch.__version__}",
        "threads": threads,
        "workload": asdict(work),
        "checked": checked,
        "forward_passes": forecast.provenance["forward_passes"],
        "sae_share_of_arithmetic": sae / weights,
    }
    for kind in ("wall", "cpu") if work.device == "cpu" else ("wall",):
        mine = {stage: sum(median_of(ours, kind, part) for part in parts) for stage, parts in stages.items()}
        bare = {stage: sum(median_of(floor, kind, part) for part in parts) for stage, parts in stages.items()}
        parts = getattr(authors, kind)
        total, whole = sum(mine.values()), sum(parts.values())
        lean = whole - parts["disk"] - parts["cat"] - parts["decode"]
        found[kind] = {
            "ours_seconds": mine,
            "floor_seconds": bare,
            "over_floor": {stage: mine[stage] / bare[stage] for stage in stages},
            "alone_seconds": getattr(alone, kind)[SHIFT],
            "alone_over_ours": getattr(alone, kind)[SHIFT] / mine["shift"],
            "authors_seconds": parts,
            "authors_over_ours": whole / total,
            "authors_without_disk_cat_decode_over_ours": lean / total,
        }
    print(json.dumps(found, indent=1), flush=True)
    note(found)
    in_process = work.device != "cpu"
    found["memory_bytes"] = {
        side: measure_memory(world, side) if in_process else memory_of(work, side, threads)
        for side in ("ours", "authors")
    }
    print(json.dumps(found["memory_bytes"]))
    note({"memory_bytes": found["memory_bytes"]})
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    sizes = parser.add_mutually_exclusive_group()
    sizes.add_argument("--quick", action="store_true", help="a smaller model and fewer, shorter prompts")
    sizes.add_argument("--seven-b", action="store_true", help="the shape of Qwen2.5-7B, on a GPU")
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--rounds", type=int, default=3, help="turns of ours and the floor; medians count")
    parser.add_argument("--json", type=Path)
    parser.add_argument("--memory", choices=("ours", "authors"), help=argparse.SUPPRESS)
    for option in fields(Workload):
        parser.add_argument(f"--{option.name.replace('_', '-')}", type=type(option.default))
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    sts_fast.set_num_threads(arguments.threads)
    given = {option.name: getattr(arguments, option.name) for option in fields(Workload)}
    preset = QUICK if arguments.quick else SEVEN_B if arguments.seven_b else Workload()
    work = replace(preset, **{name: value for name, value in given.items() if value is not None})
    if arguments.memory:
        print(measure_memory(World(work), arguments.memory))
        return
    found = measured(work, rounds=arguments.rounds, threads=arguments.threads)
    if arguments.json:
        arguments.json.parent.mkdir(parents=True, exist_ok=True)
        arguments.json.write_text(json.dumps(found, indent=1) + "\n")


if __name__ == "__main__":
    main()
