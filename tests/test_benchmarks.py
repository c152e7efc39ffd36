"""The benchmarks themselves: a wrong contestant gets no time, results survive, the pages show what was committed."""

from __future__ import annotations

import importlib
import json
import os
import subprocess
import sys
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import exact_sae
import numpy as np
import pytest
import torch
from benchmarks import memory, oracle, records, tables, timing
from benchmarks.__main__ import main
from benchmarks.benches import OPS, make_bench
from benchmarks.cases import Bench, Case, Size
from benchmarks.peers import command as peers
from benchmarks.peers import encode, influence, question, texts
from study.world import grpo, rl, rl_table

from sts_fast import SparseFeatures
from sts_fast.demo import demo

SIZE = Size(d_in=40, d_sae=640, rows=30)


@pytest.fixture(scope="module", autouse=True)
def sae_lens_has_been_imported() -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # its own imports are of deprecated modules
        import sae_lens  # noqa: F401


@pytest.fixture(autouse=True)
def not_compiled(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch, "compile", lambda function, **_: function)


@pytest.fixture(scope="module", params=OPS)
def bench(request: pytest.FixtureRequest) -> Bench:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(torch, "compile", lambda function, **_: function)
        return make_bench(request.param, SIZE, "cpu")


@pytest.mark.parametrize("program", sorted(path.stem for path in Path(memory.__file__).parent.glob("bench_*.py")))
def test_every_program_finds_what_it_imports(program: str) -> None:
    importlib.import_module(f"benchmarks.{program}")


def changed(result: Any, change: Callable[[np.ndarray[Any, Any]], object]) -> Any:
    """A copy of any result with every array of numbers changed."""
    if isinstance(result, dict):
        return {key: changed(value, change) for key, value in result.items()}
    if isinstance(result, SparseFeatures):
        return SparseFeatures(*(changed(part, change) for part in result.parts), result.d_sae)
    if isinstance(result, tuple):
        return type(result)(*(changed(value, change) for value in result))
    array = result.numpy() if isinstance(result, torch.Tensor) else result
    if not isinstance(array, np.ndarray) or array.dtype.kind != "f":
        return result
    array = array.copy()
    change(array)
    return torch.from_numpy(array) if isinstance(result, torch.Tensor) else array


def lose_one(array: np.ndarray[Any, Any]) -> None:
    """Every fiftieth number, none of them alike, becomes zero."""
    array.flat[::50] = 0


def drift(array: np.ndarray[Any, Any]) -> None:
    array *= 1 + 1e-4


@torch.no_grad()
def test_every_contestant_agrees_with_float64(bench: Bench) -> None:
    timed = timing.measure(bench, threads=1, seconds=0)["contestants"]
    assert [len(each["seconds"]) for each in timed.values()] == [timing.MIN_ROUNDS] * len(bench.contestants)
    assert all(each["error"] <= 5 * bench.case.tolerance for each in timed.values())


@pytest.mark.parametrize("change", [lose_one, drift])
@torch.no_grad()
def test_a_wrong_result_is_refused(bench: Bench, change: Callable[[np.ndarray[Any, Any]], object]) -> None:
    for contestant in bench.contestants:
        result = contestant.run(*bench.inputs, lap=lambda _: None)
        bench.check(contestant.name, result, bench.inputs)
        with pytest.raises(oracle.WrongResult, match="differs from float64"):
            bench.check(contestant.name, changed(result, change), bench.inputs)


def test_wrong_contestant_gets_no_time(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    def wrong(*_: Any) -> Bench:
        one = make_bench("encode", SIZE, "cpu")
        right = one.contestants[0].run
        one.contestants[0].run = lambda *inputs, lap: changed(right(*inputs, lap=lap), drift)
        return one

    monkeypatch.setattr("benchmarks.__main__.make_bench", wrong)
    assert main(["--quick", "--ops", "encode", "--threads", "1"]) == 2
    assert "sts_fast" in (said := capsys.readouterr()).err
    assert said.out == ""


@pytest.mark.parametrize("architecture", ["standard", "jumprelu", "topk"])
def test_oracle_agrees_with_the_equations_of_the_tests(architecture: str) -> None:
    case = Case(SIZE, architecture)
    columns = np.arange(SIZE.d_sae)
    h = oracle.top_k_features(case, case.base) if architecture == "topk" else oracle.features(case, case.base, columns)
    assert np.all((h.low <= h.value) & (h.value <= h.high))
    assert np.mean(h.low != h.high) < 1e-3
    np.testing.assert_allclose(h.value, exact_sae.features(case.sae, case.base), rtol=1e-12, atol=1e-12)


def test_measurements_are_kept_and_replaced(tmp_path: Path) -> None:
    path = tmp_path / "machine.json"
    record = {"op": "shift", "d_in": 2, "d_sae": 8, "rows": 5, "threads": 1, "seconds": [1 / 3, 2.0]}
    for each in (record, {**record, "threads": 2}, {**record, "seconds": [4.0]}):
        records.add(path, {"processor": "p"}, "timings", each)
    document = records.load(path)
    assert document == json.loads(path.read_text(encoding="utf-8"))
    assert [(each["threads"], each["seconds"]) for each in document["timings"]] == [(1, [4.0]), (2, [0.33333, 2.0])]
    path.write_text("{}", encoding="utf-8")
    with pytest.raises(ValueError, match="give another file"):
        records.add(path, {}, "timings", record)


def test_command_writes_what_it_measured(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "machine.json"
    options = ["--sizes", "40x640", "--rows", "30", "--threads", "1", "--seconds", "0", "--results", str(path)]
    assert main([*options, "--measure", "time", "--ops", "shift", "subset"]) == 0
    document = records.load(path)
    assert [each["op"] for each in document["timings"]] == ["shift", "subset"]
    assert "2 threads" not in capsys.readouterr().out
    page = tables.tables([(path, document)])
    assert all(name in page for name in document["timings"][0]["contestants"])
    assert "torch.compile" in tables.headline([(path, document)])


@torch.no_grad()
def test_memory_sees_dense_features() -> None:
    rows = 20_000
    one = make_bench("encode", Size(d_in=8, d_sae=1024, rows=rows), "cpu")
    dense = 4 * rows * 1024
    peer, ours = (memory.extra_bytes(one, name) for name in ("dense, then to_sparse", "sts_fast"))
    assert peer > 0.9 * dense
    assert peer - ours > 0.5 * dense  # of results, both count theirs


def test_pytest_runs_them_too() -> None:
    """Each contestant is checked and then timed under pytest-benchmark."""
    environment = {name: value for name, value in os.environ.items() if not name.startswith("PYTEST_")}
    environment["STS_BENCHMARK_SIZE"] = "8x128x16"
    ran = subprocess.run(
        [sys.executable, "-m", "pytest", "-q", "benchmarks", "--benchmark-only", "-k", "encode and not lens",
         "--benchmark-max-time=0", "--benchmark-min-rounds=1", "--benchmark-columns=median"],
        cwd=Path(__file__).parents[1], env=environment, capture_output=True,
        text=True, check=False,
    )  # fmt: skip
    assert ran.returncode == 0, ran.stdout
    assert "test_op[encode-torch backend]" in ran.stdout
    assert "4 passed" in ran.stdout


def test_pages_show_the_committed_results() -> None:
    for page, text in tables.pages():
        shown = page.read_text(encoding="utf-8")
        assert shown == tables.between_markers(shown, text), "python -m benchmarks --write-tables brings it up to date"


PEER_SIZE = Size(d_in=40, d_sae=640, rows=600)
SMALL_QUESTIONS: dict[str, Callable[[], question.Question]] = {
    "topk": lambda: encode.topk(PEER_SIZE),
    "relu": lambda: encode.relu(PEER_SIZE),
    "texts": lambda: texts.texts(70),
    "influence": lambda: influence.influence(demo.TRAINS[:1], demo.TRAINS[:4], n_prompts=4, seeds=(0,)),
}


def ask(monkeypatch: pytest.MonkeyPatch, path: Path, questions: dict[str, Callable[[], question.Question]]) -> int:
    """The command with these questions where no peer is installed."""
    monkeypatch.setattr(memory, "in_a_fork", lambda run: run())  # this process has threads
    monkeypatch.setattr(timing, "MIN_ROUNDS", 2)
    monkeypatch.setattr(peers, "QUESTIONS", questions)
    for name in set(question.PACKAGES) - {"sts_fast"}:
        monkeypatch.setitem(question.PACKAGES, name, "no-such-package")
    return peers.main(["--seconds", "0", "--results", str(path)])


def test_peers_that_are_not_installed_are_skipped_by_name(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = tmp_path / "peers.json"
    assert ask(monkeypatch, path, SMALL_QUESTIONS) == 0
    said = capsys.readouterr().out
    found = json.loads(path.read_text(encoding="utf-8"))["questions"]
    assert list(found) == list(SMALL_QUESTIONS)
    for record in found.values():
        assert all(name.startswith("sts_fast") for name in record["contestants"])
        assert all(each["error"] < 1e-3 for each in record["contestants"].values())
        assert all(f"Not here: {name}" in said for name in record["skipped"])
    skipped = {name.split(",")[0] for record in found.values() for name in record["skipped"]}
    assert skipped == set(question.PACKAGES) - {"sts_fast"}
    assert all(-1 <= each["r"] <= 1 for each in found["influence"]["contestants"].values())


def test_a_wrong_answer_beside_peers_gets_no_time(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    def wrong() -> question.Question:
        asked = encode.topk(PEER_SIZE)
        right = asked.contestants[0].run
        asked.contestants[0].run = lambda *inputs, lap: changed(right(*inputs, lap=lap), drift)
        return asked

    path = tmp_path / "peers.json"
    assert ask(monkeypatch, path, {"topk": wrong}) == 2
    assert "sts_fast: a feature differs from float64" in capsys.readouterr().err
    assert not path.exists()


@pytest.mark.parametrize("kind", [None, "step"])
def test_a_wrong_forecast_is_refused(kind: Any) -> None:
    names = demo.TRAINS[:2]
    world = influence.World(names[:1], names, 4, (0,))
    result = influence.ours(world, kind, names[:1], names, lambda _: None)
    contestant = f"sts_fast, {kind or 'ntk'}"
    assert influence.check(world, contestant, result, (names[:1], names)) < 1e-4
    with pytest.raises(oracle.WrongResult, match="differs from float64"):
        influence.check(world, contestant, result._replace(values=result.values * 1.01), (names[:1], names))


def test_the_page_shows_the_measured_peers() -> None:
    ((page, text),) = peers.pages()
    shown = page.read_text(encoding="utf-8")
    assert shown == tables.between_markers(shown, text, "peers"), "python -m benchmarks peers --write-tables"


def test_rl_runs_are_counted_and_their_features_compared() -> None:
    """Two runs by hand: one whose reward rises and whose features are known, one whose reward does not."""
    n, d_sae = len(rl.DOMAINS), 40
    shift = np.tile(np.arange(d_sae, 0, -1.0), (n, 1))  # demonstrations of every domain shift features 0 to 31 most
    dims = {name: [[list(range(rl.TOP_N))]] * len(grpo.TRAINS) for name in rl.DIMS}
    row = {
        "regime": "rising", "train": grpo.TRAINS[0], "seed": 0, "rewards": [0.2] * 5 + [0.9] * 10,
        "dims": list(range(8, 40)), "share_of_top_n": 0.5,
        **{shots: {o: np.arange(float(n)) for o in ("dP", "dloss", "daccuracy", "z_dP", "z_dloss")}
           for shots in ("zero-shot", "few-shot")},
    }  # fmt: skip
    raw = {
        "act": shift, "icl": shift, "trials": [row, {**row, "seed": 1, "rewards": [0.5] * 15}],
        "before": {shots: {"P": np.arange(float(n)), "loss": -np.arange(float(n))} for shots in row if "shot" in shots},
        "forecast": {"dims": dims, "direct": {"one": np.tile(-np.arange(float(n)), (len(grpo.TRAINS), 1))}},
    }  # fmt: skip
    found = rl.compact(raw)["rising"]
    assert found["trainings"] == [[grpo.TRAINS[0], 0]]
    assert found["not_counted"] == [[grpo.TRAINS[0], 1]]
    assert found["rewards"] == [[0.2, 0.9]]
    assert set(map(tuple, found["overlap"].values())) == {(24.0,)}
    assert found["zero-shot dP"]["one"] == {"signed": [-1.0], "size": [1.0], "auc_distinct": [None]}
    assert found["zero-shot dP"]["base P(answer)"]["signed"] == [1.0]


def test_the_cost_of_watching_a_training_is_what_was_measured() -> None:
    measured = json.loads((records.RESULTS / "monitor.json").read_text(encoding="utf-8"))
    page = records.RESULTS.parents[1] / "docs" / "training.md"
    cost, docs = measured["cost"], " ".join(page.read_text(encoding="utf-8").split())
    assert len(measured["measurement_cpu_seconds"]) >= 10
    assert cost["highest"] <= 0.02
    assert f"{cost['median']:.1%} of the training's" in docs
    assert f"{cost['lowest']:.1%} to {cost['highest']:.1%}" in docs
    assert f"{measured['tokens_per_step']:,} tokens a step, probes of {measured['tokens_per_probe']:.0f} tokens" in docs


def test_pages_of_the_rl_study_show_its_results() -> None:
    for page, text in rl_table.pages():
        assert page.read_text(encoding="utf-8") == text, "python -m study.world rl brings it up to date"
