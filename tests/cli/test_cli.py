"""The command line: what it prints and writes, and one line on standard error for whatever cannot be used."""

from __future__ import annotations

import datetime
import errno
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import html_tree
import jsonschema
import numpy as np
import pyarrow.parquet as pq
import pytest
import torch
import transformers
import yaml
from native import c_library
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import WhitespaceSplit

import sts_fast
from sts_fast import cli
from sts_fast.forecast.run import scores_schema
from sts_fast.model.language_model import LanguageModel

WORDS = ["<unk>", "<bos>", "<eos>", "Question:", "Answer:", *(f"w{i}" for i in range(60))]
D_IN, D_SAE, N_LAYERS, CONTEXT = 16, 48, 3, 48
N_ROWS = 14

# What a run says of itself on standard error, in a log as on a terminal.
SAID = re.compile(
    r"(warning: .*|.*: .*question from .*; [\d,]+ rows?\b.*|"
    r"forward passes of .*: (packed|cached|copied|plain) .*|[\d,]+ forward passes of .* tokens/s|"
    r".*: [\d,]+ of [\d,]+ (prompts|examples)(, .* a second, .* s left)?(; \d+% of all sets(, .* left)?)?|"
    r".*: resampling its \d+ prompts keeps .*|.* of the pairs of domains are apart; .*)$"
)
FILES = ["features.parquet", "prompts.parquet", "report.html", "run.yaml", "scores.json", "shift.safetensors"]
BELOW = [name for name in FILES if name != "run.yaml"]


@dataclass(frozen=True)
class Options:
    """A command line as option -> value; a list repeats the option, None leaves it out, True stands alone."""

    command: str
    values: dict[str, Any] = field(default_factory=dict)

    def with_(self, **changes: Any) -> Options:
        return replace(self, values={**self.values, **{name.replace("_", "-"): v for name, v in changes.items()}})

    def words(self) -> list[str]:
        words = [self.command]
        for name, value in self.values.items():
            for one in value if isinstance(value, list) else [] if value is None else [value]:
                words += [f"--{name}"] if one is True else [f"--{name}", str(one)]
        return words

    @property
    def output(self) -> Path:
        return Path(self.values["output"])


@dataclass(frozen=True)
class Ran:
    code: int
    out: str
    err: str


def question(rng: np.random.Generator, n_words: int = 6) -> str:
    return " ".join(f"w{i}" for i in rng.integers(0, 60, n_words))


def write_rows(path: Path, n: int = N_ROWS, *, answered: bool = True, n_words: int = 6, seed: int = 0) -> Path:
    rng = np.random.default_rng(seed)
    rows = [
        {"question": question(rng, n_words), **({"answer": question(rng, 2)} if answered else {})} for _ in range(n)
    ]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path


def write_model(folder: Path, *, d_in: int = D_IN, seed: int = 0) -> Path:
    torch.manual_seed(seed)
    transformers.LlamaForCausalLM(
        transformers.LlamaConfig(
            vocab_size=len(WORDS),
            hidden_size=d_in,
            intermediate_size=32,
            num_hidden_layers=N_LAYERS,
            num_attention_heads=2,
            max_position_embeddings=CONTEXT,
            initializer_range=0.3,
        )
    ).save_pretrained(folder)
    core = Tokenizer(WordLevel({word: i for i, word in enumerate(WORDS)}, unk_token="<unk>"))
    core.pre_tokenizer = WhitespaceSplit()
    tokenizer = transformers.PreTrainedTokenizerFast(
        tokenizer_object=core, unk_token="<unk>", bos_token="<bos>", eos_token="<eos>"
    )
    tokenizer.save_pretrained(folder)
    return folder


def write_sae(folder: Path, *, d_in: int = D_IN, **config: Any) -> Path:
    generator = torch.Generator().manual_seed(1)
    folder.mkdir()
    tensors = {
        "W_enc": torch.randn(d_in, D_SAE, generator=generator),
        "b_enc": 0.1 * torch.randn(D_SAE, generator=generator),
        "b_dec": 0.1 * torch.randn(d_in, generator=generator),
    }
    save_file(tensors, folder / "sae_weights.safetensors")
    settings = {"architecture": "standard", "d_in": d_in, "d_sae": D_SAE, "normalize_activations": "none"}
    metadata = {"hook_name": "blocks.1.hook_resid_post", "prepend_bos": True}
    (folder / "cfg.json").write_text(json.dumps({**settings, "metadata": metadata, **config}))
    return folder


@pytest.fixture(scope="module")
def material(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with model, tuned, sae, train.jsonl and domains/{red,blue}.jsonl; only read."""
    folder = tmp_path_factory.mktemp("material")
    write_model(folder / "model")
    write_model(folder / "tuned", seed=1)
    write_sae(folder / "sae")
    write_rows(folder / "train.jsonl")
    (folder / "domains").mkdir()
    write_rows(folder / "domains" / "red.jsonl", seed=1)
    write_rows(folder / "domains" / "blue.jsonl", seed=2)
    return folder


@pytest.fixture
def score(material: Path, tmp_path: Path) -> Options:
    """A command line that works."""
    return Options(
        "score",
        {
            "model": material / "model",
            "sae": material / "sae",
            "train": material / "train.jsonl",
            "domains": [str(material / "domains")],
            "shots": 1,
            "domain-shots": 1,
            "top-n": 5,
            "device": "cpu",
            "output": tmp_path / "run",
        },
    )


@pytest.fixture
def run(monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]) -> Callable[..., Ran]:
    def run_main(*words: Any) -> Ran:
        """`sts-fast WORDS` in this process."""
        if len(words) == 1 and isinstance(words[0], Options):
            words = tuple(words[0].words())
        monkeypatch.setattr(sys, "argv", ["sts-fast", *map(str, words)])
        capfd.readouterr()
        code = 0
        try:
            cli.main()
        except SystemExit as end:
            code = int(end.code or 0)
        return Ran(code, *capfd.readouterr())

    return run_main


def contents(folder: Path) -> dict[str, bytes]:
    if not folder.is_dir():
        return {}
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def assert_refused(ran: Ran) -> str:
    """Exit code 2 and one line, behind what a run had to say of itself before; returns it."""
    assert ran.code == 2
    assert ran.out == ""
    assert ran.err.endswith("\n")
    *said, error = ran.err.splitlines()
    assert all(SAID.match(line) for line in said), said
    assert error.startswith("error: ")
    assert len(error) > 25
    return error


def forecast_of(folder: Path, domain: str) -> dict[str, Any]:
    """A domain of scores.json."""
    domains = json.loads((folder / "scores.json").read_text())["domains"]
    return next(found for found in domains if found["name"] == domain)


# What works -----------------------------------------------------------------------------------------------------------


def test_names_are_text_and_no_markup(score: Options, run: Callable[..., Ran], tmp_path: Path) -> None:
    [folder] = score.values["domains"]
    source = Path(folder) / "red.jsonl"
    ran = run(score.with_(domains=f"[red]x[/y]={source}", output=tmp_path / "o[bold]"))
    assert (ran.code, ran.err.count("Traceback")) == (0, 0)
    assert "[red]x[/y]" in ran.out
    assert str(tmp_path / "o[bold]") in ran.err.replace("\n", "")


def test_score_prints_its_conclusion_and_a_table_and_writes_files(score: Options, run: Callable[..., Ran]) -> None:
    ran = run(score)
    assert ran.code == 0
    # The page's first sentence, and then each domain once.
    lead = html_tree.read_page(score.output / "report.html").one("p", class_="lead").text()
    conclusion, _, rest = ran.out.partition("\n\n")
    assert html_tree.plain(conclusion) == html_tree.plain(lead)
    assert rest.startswith("Forecast size of change, by STS_act")
    assert "STS_act [95%]" in rest
    assert "STS_icl [95%]" in rest
    assert [row.split()[1] for row in rest.splitlines() if row.startswith("│")] == sorted(
        ("red", "blue"), key=lambda name: -forecast_of(score.output, name)["scores"]["act"]["value"]
    )
    # There is no terminal here to draw progress on.
    *said, last = ran.err.splitlines()
    assert last == f"Results are in {score.output}"
    assert all(SAID.match(line) for line in said), said
    assert sorted(contents(score.output)) == FILES

    scores = json.loads((score.output / "scores.json").read_text())
    jsonschema.validate(scores, scores_schema())
    by_name = {domain["name"]: domain for domain in scores["domains"]}
    assert sorted(by_name) == ["blue", "red"]
    for domain in by_name.values():
        assert domain["n_prompts"] == N_ROWS  # with several draws, no row is set aside
        assert set(domain["scores"]) == {"act", "icl"}
        for found in domain["scores"].values():
            assert found["value"] > 0
            assert f"{found['value']:.3g}" in ran.out
    assert len(scores["shifted_features"]) == 5
    assert pq.read_table(score.output / "prompts.parquet").num_rows == 3 * N_ROWS
    assert sts_fast.Forecast.load(score.output).means.importance.argsort()[::-1][:5].tolist() == [
        feature["index"] for feature in scores["shifted_features"]
    ]


def test_domains_are_printed_highest_first(score: Options, run: Callable[..., Ran]) -> None:
    ran = run(score.with_(estimators="act"))
    scores = json.loads((score.output / "scores.json").read_text())
    order = [d["name"] for d in sorted(scores["domains"], key=lambda domain: -domain["scores"]["act"]["value"])]
    assert ran.out.index(order[0]) < ran.out.index(order[1])
    assert "STS_icl" not in ran.out


def test_json_goes_to_standard_output_alone(score: Options, run: Callable[..., Ran]) -> None:
    ran = run(score.with_(json=True))
    assert ran.code == 0
    said = ran.err.splitlines()
    assert all(SAID.match(line) for line in said), said
    for what, n_lines in (("forward passes of", 2), ("resampling its", 1), ("pairs of domains are apart", 2)):
        assert sum(what in line for line in said) == n_lines
    scores = json.loads(ran.out)
    jsonschema.validate(scores, scores_schema())
    assert ran.out == (score.output / "scores.json").read_text()


def test_a_quiet_run_tells_its_result_and_its_warnings(score: Options, run: Callable[..., Ran], tmp_path: Path) -> None:
    rows = tmp_path / "law.jsonl"
    rows.write_text(write_rows(tmp_path / "few.jsonl").read_text() + "[]\n")
    loud, quiet = score.with_(train=rows, output=tmp_path / "loud"), score.with_(train=rows, quiet=True)
    told, silent = run(loud), run(quiet)
    assert silent.out == told.out
    warnings = [line for line in told.err.splitlines() if line.startswith("warning: ")]
    assert warnings
    assert silent.err.splitlines() == warnings
    commands = [json.loads((o.output / "scores.json").read_text())["provenance"]["command"] for o in (loud, quiet)]
    assert commands[0] == commands[1]
    again = run(quiet).err.splitlines()
    assert [line for line in again if line not in warnings] == [
        f"warning: {score.output} holds results already: these are in {score.output}-2"
    ]


def test_dry_run_tells_and_writes_nothing(
    score: Options, run: Callable[..., Ran], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(LanguageModel, "run", None)
    ran = run(score.with_(dry_run=True))
    assert (ran.code, ran.err) == (0, "")
    for text in ("red asks “w", "question from question, answer from answer", "forward passes of", "GB of memory"):
        assert text in " ".join(ran.out.split())
    assert not score.output.exists()
    told = json.loads(run(score.with_(dry_run=True, json=True)).out)
    assert [(planned["name"], planned["use"]) for planned in told["sets"]] == [
        ("train", "shift"),
        ("blue", "score"),
        ("red", "score"),
    ]
    assert {planned["n_prompts"] for planned in told["sets"]} == {N_ROWS}
    assert told["cost"]["n_answer_tokens"] == 0


def test_rows_that_are_read_and_left_out_are_said(score: Options, run: Callable[..., Ran], tmp_path: Path) -> None:
    law = write_rows(tmp_path / "law.jsonl", seed=3)
    rows = law.read_text().splitlines()
    rows = [*rows, rows[5], *(json.dumps(row) for row in (None, {"question": ""}, {"question": None}, [1]))]
    law.write_text("\n".join(rows))
    score = score.with_(domains=[*score.values["domains"], str(law)], estimators="act")
    ran = run(score)
    assert ran.code == 0
    said = ran.err.splitlines()
    n = N_ROWS + 5
    left_out = "2 with no question in 'question', 1 with nothing instead of named fields, "
    left_out += "1 with a list instead of named fields"
    columns = "question from question, answer from answer"
    assert f"train, blue, red, law: {columns}; {3 * N_ROWS + n} rows, 4 left out: {left_out}" in said
    assert f"warning: 4 of the {n} rows of 'law' were left out: {left_out}" in said
    assert "warning: examples that repeat another one are left out (1 of the 15 examples of 'law')" in said
    scores = json.loads((score.output / "scores.json").read_text())
    jsonschema.validate(scores, scores_schema())
    blocks = {name: block for block in scores["provenance"]["rows"] for name in block["sets"]}
    assert [blocks[name]["n_rows"] for name in ("train", "blue", "red", "law")] == [N_ROWS, N_ROWS, N_ROWS, n]
    assert sum(blocks["law"]["left_out"].values()) == 4
    assert {domain["name"]: domain["n_prompts"] for domain in scores["domains"]}["law"] == N_ROWS

    told = run(score.with_(dry_run=True))
    assert "2 rows with no question in 'question' are left out" in told.out
    assert told.err.startswith(f"warning: 4 of the {n} rows of 'law'")
    for command in (score.with_(strict=True), score.with_(strict=True, dry_run=True)):
        error = assert_refused(run(command))
        assert error.startswith(f"error: {law}: row {N_ROWS + 2} has nothing instead of named fields")


def test_dry_run_of_a_comparison(score: Options, run: Callable[..., Ran], material: Path) -> None:
    trains = [f"{name}={material / 'train.jsonl'}" for name in ("one", "other")]
    told = json.loads(run(replace(score, command="compare").with_(train=trains, dry_run=True, json=True)).out)
    assert [planned["name"] for planned in told["sets"]] == ["one", "other", "blue", "red"]


def test_dry_run_refuses_what_a_run_would_refuse(score: Options, run: Callable[..., Ran]) -> None:
    error = assert_refused(run(score.with_(dry_run=True, layer=99)))
    assert "99" in error
    assert_refused(run(score.with_(dry_run=True, shots=99)))
    assert "--device-map" in assert_refused(run(score.with_(dry_run=True, device=None, device_map="bad")))
    assert "nowhere.json" in assert_refused(run(score.with_(dry_run=True, calibration="nowhere.json")))
    tokens = assert_refused(run(score.with_(dry_run=True, tokens="words")))
    assert tokens.startswith("error: Invalid value for '--tokens': 'words' is not one of 'query', 'template'")


def test_shift_measures_the_training_set_alone(score: Options, run: Callable[..., Ran]) -> None:
    shift = replace(score.with_(domains=None, domain_shots=None), command="shift")
    ran = run(shift)
    assert ran.code == 0
    assert "Most shifted of 48 features" in ran.out
    assert "Forecast" not in ran.out
    scores = json.loads((shift.output / "scores.json").read_text())
    jsonschema.validate(scores, scores_schema())
    assert scores["domains"] == []
    assert json.loads(run(shift.with_(json=True)).out)["shifted_features"] == scores["shifted_features"]


def test_compare_puts_training_sets_side_by_side(score: Options, run: Callable[..., Ran], tmp_path: Path) -> None:
    [folder] = score.values["domains"]
    candidates = [f"first={score.values['train']}", f"{folder}/red.jsonl"]
    both = replace(score.with_(train=candidates, domains=f"blue={folder}/blue.jsonl"), command="compare")
    ran = run(both)
    assert ran.code == 0
    assert sorted(path.name for path in both.output.iterdir()) == [
        "compare.json", "first", "red", "report.html", "run.yaml",
    ]  # fmt: skip
    comparison = json.loads((both.output / "compare.json").read_text())
    assert [train["name"] for train in comparison["trains"]] == ["first", "red"]
    assert comparison["domains"] == ["blue"]
    for name in ("first", "red"):
        assert sorted(contents(both.output / name)) == BELOW
        alone = json.loads((both.output / name / "scores.json").read_text())["domains"][0]
        act = alone["scores"]["act"]
        assert comparison["scores"]["act"][name] == {"value": [act["value"]], "ci": [act["ci"]]}
        assert f"{act['value']:.3g}" in ran.out
    assert run("report", both.output).code == 0
    of_first = json.loads((both.output / "first" / "scores.json").read_text())["domains"][0]
    single = score.with_(domains=f"blue={folder}/blue.jsonl", output=tmp_path / "single", json=True)
    assert json.loads(run(single).out)["domains"][0]["scores"]["act"] == {
        key: pytest.approx(of_first["scores"]["act"][key], rel=1e-12) for key in ("value", "ci")
    }


def test_earlier_results_stay_unless_they_are_to_be_replaced(
    score: Options, run: Callable[..., Ran], tmp_path: Path
) -> None:
    """And nothing of them is left among the new ones; what others put there is never touched."""
    [folder] = score.values["domains"]
    first = [f"first={score.values['train']}", f"second={folder}/red.jsonl"]
    options = score.with_(domains=f"blue={folder}/blue.jsonl", output=tmp_path / "out")
    both = replace(options.with_(train=first), command="compare")
    assert run(both).code == 0
    held = contents(tmp_path / "out")
    ran = run(options)
    assert ran.err.splitlines()[-1] == f"Results are in {tmp_path / 'out-2'}"
    assert sorted(contents(tmp_path / "out-2")) == FILES
    assert contents(tmp_path / "out") == held
    (tmp_path / "out-2" / "validation.json").write_text("{}")
    assert run(options.with_(output=tmp_path / "out-2", overwrite=True)).code == 0
    assert sorted(contents(tmp_path / "out-2")) == FILES
    assert sorted(path.name for path in tmp_path.iterdir()) == ["out", "out-2"]
    shutil.copy(score.values["train"], tmp_path / "out-2" / "selected.jsonl")
    inside = options.with_(train=tmp_path / "out-2" / "selected.jsonl", output=tmp_path / "out-2", overwrite=True)
    assert "out-2/selected.jsonl, which the command reads" in assert_refused(run(inside))
    assert (tmp_path / "out-2" / "selected.jsonl").is_file()
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "scores.json").write_text("mine")
    message = assert_refused(run(options.with_(output=tmp_path / "mine", overwrite=True)))
    assert "holds something that sts-fast did not write" in message
    assert contents(tmp_path / "mine") == {"scores.json": b"mine"}


def test_results_carry_the_day_in_their_name(
    score: Options, run: Callable[..., Ran], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    ran = run(score.with_(output=None))
    name = f"sts-fast-score-{datetime.date.today().isoformat()}"
    assert ran.err.splitlines()[-1] == f"Results are in {name}"
    assert sorted(contents(tmp_path / name)) == FILES


def test_options_come_from_a_file_and_are_written_to_one(
    score: Options, run: Callable[..., Ran], tmp_path: Path
) -> None:
    [folder] = score.values["domains"]
    domains = [f"{name}={folder}/{name}.jsonl" for name in ("red", "blue")]
    assert run(score.with_(domains=domains, threads=1)).code == 0
    written = score.output / "run.yaml"
    options = yaml.safe_load(written.read_text(encoding="utf-8"))
    assert options["domains"] == domains
    assert options["top-n"] == "5"
    assert not {"output", "threads", "json", "overwrite", "config"} & {*options}
    ran = run("score", "--config", written, "--output", tmp_path / "again")
    assert ran.code == 0, ran.err
    again, first = (json.loads((place / "scores.json").read_text()) for place in (tmp_path / "again", score.output))
    assert again["domains"] == first["domains"]
    assert again["provenance"]["command"] == first["provenance"]["command"].replace(" --threads 1", "")
    fewer = run("score", f"--config={written}", "--top-n", "3", "--json", "--output", tmp_path / "fewer")
    assert json.loads(fewer.out)["settings"]["top_n"] == 3
    config = tmp_path / "config.yaml"
    for text, message in (
        ("- a\n", "is no file of options: give names and values"),
        ("top-n: {a: 1}\n", "top-n must be a value, or a list of some"),
        ("top-n: [\n", "cannot be read as a file of options"),
        ("colour: red\n", "No such option: --colour"),
        ("limit: [20, 30]\n", "config.yaml: limit takes one value, and 2 are listed: give one"),
    ):
        config.write_text(text, encoding="utf-8")
        assert message in assert_refused(run("score", "--config", config))
    assert "cannot be read" in assert_refused(run("score", "--config", tmp_path / "none.yaml"))
    assert "--config is given twice" in assert_refused(run("score", "--config", written, "--config", written))


def test_a_run_that_fails_keeps_what_it_has_read(
    score: Options, run: Callable[..., Ran], monkeypatch: pytest.MonkeyPatch
) -> None:
    calls: list[str] = []

    def counted(reader: Any, kind: Any, prompt_set: Any, tuned: Any = None) -> Any:
        calls.append(prompt_set.name)
        if prompt_set.name == "red" and calls.count("red") == 1:
            raise KeyboardInterrupt
        return rows(reader, kind, prompt_set, tuned)

    rows = LanguageModel.rows
    monkeypatch.setattr(LanguageModel, "rows", counted)
    ran = run(score)
    kept = score.output.with_name(f".{score.output.name}.kept")
    assert (
        f"What was done so far (2 profiles) is kept in {kept}: the same command goes on from there"
        in ran.err.splitlines()
    )
    assert ran.err.splitlines()[-1] == "error: interrupted: no result was written"
    assert not score.output.exists()
    assert [path.name for path in score.output.parent.glob(".*.tmp")] == []
    [damaged] = kept.glob("blue-*/residuals.safetensors")
    damaged.write_bytes(b"")
    ran = run(score)
    assert ran.code == 0
    assert f"{damaged.parent} is damaged: it is made again" in ran.err.splitlines()
    assert calls == ["train", "blue", "red", "blue", "red"]
    assert not kept.exists()
    assert sorted(contents(score.output)) == FILES
    assert run(score.with_(output=score.output.with_name("undisturbed"))).code == 0
    first, second = contents(score.output), contents(score.output.with_name("undisturbed"))
    for name in ("features.parquet", "prompts.parquet", "shift.safetensors", "run.yaml"):
        assert first[name] == second[name]


def test_several_files_are_one_training_set(score: Options, run: Callable[..., Ran], material: Path) -> None:
    [folder] = score.values["domains"]
    files = [f"{material}/train.jsonl", f"{folder}/blue.jsonl"]
    of_both = score.with_(train=files, domains=f"red={folder}/red.jsonl")
    told = json.loads(run(of_both.with_(dry_run=True, json=True)).out)
    assert [(of["name"], of["n_prompts"], of["source"]) for of in told["sets"]] == [
        ("train", 2 * N_ROWS, ", ".join(files)),
        ("red", N_ROWS, f"{folder}/red.jsonl"),
    ]
    assert f"from {files[0]}, {files[1]}; question from question" in run(of_both.with_(dry_run=True)).out
    named = [f"both={files[0]}", f"one={files[0]}", f"both={files[1]}"]
    compare = replace(of_both, command="compare")
    told = json.loads(run(compare.with_(train=named, dry_run=True, json=True)).out)
    assert [(of["name"], of["n_prompts"]) for of in told["sets"]] == [
        ("both", 2 * N_ROWS), ("one", N_ROWS), ("red", N_ROWS),
    ]  # fmt: skip
    assert run(of_both).code == 0
    inputs = json.loads((of_both.output / "scores.json").read_text())["provenance"]["inputs"]
    assert [entry["path"] for entry in inputs if entry["role"] == "train"] == files


def test_splits_that_are_not_read_are_named(score: Options, run: Callable[..., Ran], tmp_path: Path) -> None:
    for name in ("law", "art"):
        (tmp_path / "mmlu" / name).mkdir(parents=True)
        for seed, split in enumerate(("dev", "test")):
            write_rows(tmp_path / "mmlu" / name / f"{split}.jsonl", seed=seed)
    ran = run(score.with_(domains=tmp_path / "mmlu"))
    assert ran.code == 0
    assert "Not read beside the domains: dev\n" in ran.err
    scores = json.loads((score.output / "scores.json").read_text())
    assert [domain["name"] for domain in scores["domains"]] == ["art", "law"]
    assert [entry["path"] for entry in scores["provenance"]["inputs"] if entry["role"] == "domains"] == [
        str(tmp_path / "mmlu" / name / "test.jsonl") for name in ("art", "law")
    ]


@pytest.mark.parametrize("train", ["..={}", "a/b={}", ["{}", "{}"], ["train={}", "{}"], ["{}", "train={}"]])
def test_candidates_need_names_of_their_own(score: Options, run: Callable[..., Ran], train: str | list[str]) -> None:
    named = [one.format(score.values["train"]) for one in ([train] if isinstance(train, str) else train)]
    assert "needs a name of its own" in assert_refused(run(replace(score.with_(train=named), command="compare")))


def test_validate_and_report(score: Options, run: Callable[..., Ran], tmp_path: Path) -> None:
    [folder] = score.values["domains"]
    domains = [f"{name}={folder}/{color}.jsonl" for name, color in zip("abcd", ["red", "blue"] * 2, strict=True)]
    score = score.with_(domains=domains)
    assert run(score).code == 0
    before_validation = (score.output / "report.html").read_text()
    table = tmp_path / "changes.csv"
    table.write_text("domain,change,stderr\na,0.1,0.01\nb,-0.2,0.01\nc,0.05,0.01\nd,0.3,0.01\n")

    # The run of a comparison, whose page gets the outcome too.
    of_run = {"value": [1.0, 2.0, 3.0, 4.0], "ci": [[0.0, 5.0]] * 4}
    compared = {"trains": [{"name": score.output.name}], "domains": list("abcd"), "shared_features": [[1.0]]}
    (score.output.parent / "compare.json").write_text(
        json.dumps(compared | {"scores": {"act": {score.output.name: of_run}}})
    )
    (score.output.parent / "report.html").touch()

    ran = run("validate", score.output, "--before", table)
    assert ran.code == 0
    assert "Pearson" in ran.out
    assert "Did the forecasts come true?" in (score.output.parent / "report.html").read_text()
    validation = json.loads((score.output / "validation.json").read_text())
    assert [domain["name"] for domain in validation["domains"]] == ["a", "b", "c", "d"]
    printed = json.loads(run("validate", score.output, "--before", table, "--json").out)
    assert printed | {"run": validation["run"]} == validation
    after_validation = (score.output / "report.html").read_text()
    assert validation["verdict"].split()[0] in after_validation
    assert after_validation != before_validation

    (score.output / "report.html").unlink()
    ran = run("report", score.output)
    assert (ran.code, ran.out.replace("\n", "")) == (0, str(score.output / "report.html"))
    assert (score.output / "report.html").read_text() == after_validation
    (score.output.parent / "compare.json").unlink()
    assert "scores.json" in assert_refused(run("report", tmp_path))
    assert "missing.csv" in assert_refused(run("validate", score.output, "--before", tmp_path / "missing.csv"))


def test_a_field_of_no_set_is_refused_without_domains_too(score: Options, run: Callable[..., Ran]) -> None:
    shift = replace(score.with_(domains=None, domain_shots=None, question_field="nosuch=text"), command="shift")
    assert "a field is named for 'nosuch'" in assert_refused(run(shift))


def test_score_and_shift_agree_about_the_features(score: Options, run: Callable[..., Ran]) -> None:
    shift = replace(score.with_(domains=None, domain_shots=None, json=True), command="shift")
    features = json.loads(run(shift).out)["shifted_features"]
    assert json.loads(run(score.with_(json=True)).out)["shifted_features"] == features


@pytest.mark.parametrize("dims", ["icl", "active", "tuned"])
@pytest.mark.parametrize("tokens", ["query", "last", "answer", "all"])
def test_all_ways_to_choose_and_to_read(
    dims: str, tokens: str, score: Options, run: Callable[..., Ran], material: Path
) -> None:
    options = score.with_(dims=dims, tokens=tokens, estimators="act, icl,act_sq", json=True, limit=9)
    ran = run(options.with_(tuned=material / "tuned") if dims == "tuned" else options)
    assert ran.code == 0
    scores = json.loads(ran.out)
    assert (scores["settings"]["dims"], scores["settings"]["tokens"]) == (dims, tokens)
    assert scores["settings"]["estimators"] == ["act", "icl", "act_sq"]
    assert [domain["n_prompts"] for domain in scores["domains"]] == [9, 9]
    if tokens == "last":
        assert [domain["n_tokens"] for domain in scores["domains"]] == [9, 9]


def test_a_limit_of_zero_takes_all(score: Options, run: Callable[..., Ran]) -> None:
    scores = json.loads(run(score.with_(limit=0, json=True)).out)
    assert scores["settings"]["limit"] is None
    assert [domain["n_prompts"] for domain in scores["domains"]] == [N_ROWS] * 2


def test_the_command_is_recorded_less_what_changes_no_number(score: Options, run: Callable[..., Ran]) -> None:
    command = json.loads(run(score.with_(json=True, threads=1)).out)["provenance"]["command"]
    assert command.startswith("sts-fast score --model ")
    assert "--top-n 5" in command
    assert not {"--output", "--threads", "--json"} & set(command.split())


def test_show_prompts_prints_what_is_sent_to_standard_error(score: Options, run: Callable[..., Ran]) -> None:
    shown = run(score.with_(json=True, show_prompts=True))
    plain = run(score.with_(json=True))
    assert "--- " not in plain.err
    scores = json.loads(shown.out)
    for name in ("train", *(domain["name"] for domain in scores["domains"])):
        for how in ("without", "with"):
            assert shown.err.count(f"--- {name}, prompt 1 of ") == 2
            assert re.search(rf"--- {name}, prompt 1 of \d+, {how} demonstrations, \d+ tokens\n.*Answer:", shown.err)
    assert scores["provenance"]["prompts_sha256"] == json.loads(plain.out)["provenance"]["prompts_sha256"]
    other = json.loads(run(score.with_(json=True, shots=2)).out)["provenance"]["prompts_sha256"]
    assert other != scores["provenance"]["prompts_sha256"]


def test_threads_change_no_number(score: Options, run: Callable[..., Ran]) -> None:
    before = sts_fast.get_num_threads()
    try:
        one, three = (json.loads(run(score.with_(json=True, threads=n)).out) for n in (1, 3))
    finally:
        sts_fast.set_num_threads(before)
    for scores in (one, three):
        del scores["provenance"]["created_at"]
        for timed in ("seconds", "tokens_per_second"):
            del scores["provenance"]["forward_passes"][timed]
    assert one == three


def test_fields_and_demonstrations(score: Options, run: Callable[..., Ran], tmp_path: Path) -> None:
    rows = [{"q": f"w{i} w{i + 1}", "a": "w3", "also": f"w{i} w9 w9"} for i in range(10)]
    path = tmp_path / "odd.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    shown = write_rows(tmp_path / "shown.jsonl", 2, seed=5)
    options = score.with_(
        domains=[f"odd={path}"],
        question_field=["odd=also"],
        answer_field=["odd=a"],
        demos=[f"train={shown}"],
        demo_draws=1,
        json=True,
    )
    ran = run(options)
    assert ran.code == 0
    assert json.loads(ran.out)["domains"][0]["n_prompts"] == 9  # the first row demonstrates
    assert json.loads(ran.out)["train"]["n_prompts"] == N_ROWS  # the demonstrations come from elsewhere
    rows_sent = pq.read_table(options.output / "prompts.parquet").to_pylist()
    sent = next(row for row in rows_sent if row["domain"] == "odd")
    assert [WORDS[i] for i in sent["demos_ids"][:7]] == ["<bos>", "Question:", "w0", "w9", "w9", "Answer:", "w3"]
    assert [WORDS[i] for i in sent["base_ids"]] == ["<bos>", "Question:", "w1", "w9", "w9", "Answer:"]


def test_a_field_of_the_training_set_alone(score: Options, run: Callable[..., Ran], tmp_path: Path) -> None:
    rows = [{"text": f"w{i} w{i + 1}", "reply": "w3", "question": "w8"} for i in range(12)]
    (tmp_path / "own.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    options = score.with_(
        train=tmp_path / "own.jsonl",
        question_field=["train=text"],
        answer_field=["train=reply"],
        demo_draws=1,
        json=True,
    )
    assert run(options).code == 0
    sent = pq.read_table(options.output / "prompts.parquet").to_pylist()[0]
    assert [WORDS[i] for i in sent["base_ids"]] == ["<bos>", "Question:", "w1", "w2", "Answer:"]


def test_a_layer_may_be_given(score: Options, run: Callable[..., Ran]) -> None:
    assert json.loads(run(score.with_(json=True, layer=0)).out)["model"]["layer"] == 0
    assert json.loads(run(score.with_(json=True, hook="model.layers.2")).out)["model"]["layer"] == 2
    assert json.loads(run(score.with_(json=True)).out)["model"]["layer"] == 1


def test_several_saes_side_by_side(score: Options, run: Callable[..., Ran], tmp_path: Path) -> None:
    """One folder each, their ranks compared; places given once for each; with `compare` a folder for each set too."""
    [folder], sae = score.values["domains"], score.values["sae"]
    write_rows(tmp_path / "green.jsonl", seed=3)
    domains = [folder, f"green={tmp_path / 'green.jsonl'}"]
    both = score.with_(sae=[sae, sae], hook=["blocks.0.hook_mlp_out", "resid_mid"], layer=[0, 1], domains=domains)
    assert "is not one of the places" in assert_refused(run(both.with_(hook="nonsense")))
    both = both.with_(hook=["mlp_out", "resid_mid"])
    ran = run(both)
    assert ran.code == 0, ran.err
    names = ["sae@blocks.0.hook_mlp_out", "sae@blocks.1.hook_resid_mid"]
    assert sorted(path.name for path in both.output.iterdir()) == ["compare.json", "run.yaml", *names]
    comparison = json.loads((both.output / "compare.json").read_text())
    assert [one["name"] for one in comparison["saes"]] == names
    scores = [json.loads((both.output / name / "scores.json").read_text()) for name in names]
    assert all(sorted(contents(both.output / name)) == BELOW for name in names)
    assert [one["model"]["layer"] for one in scores] == [0, 1]
    for name, one in zip(names, scores, strict=True):
        values = [domain["scores"]["act"]["value"] for domain in one["domains"]]
        assert comparison["scores"]["act"]["train"][name]["value"] == values
        assert f"read at {one['sae']['hook_name']}" in ran.out
    [[one, r], [other_r, other]] = comparison["rank_correlation"]["act"]["train"]
    ranks = [
        np.argsort(np.argsort([domain["scores"]["act"]["value"] for domain in scores[i]["domains"]])) for i in (0, 1)
    ]
    assert (one, other, r) == pytest.approx((1, 1, np.corrcoef(*ranks)[0, 1]))
    assert other_r == r
    assert json.loads(run(both.with_(json=True)).out) == comparison
    (tmp_path / "changes.csv").write_text("domain,change\ngreen,0.1\nlaw,0.2\n")
    for words in (["report", both.output], ["validate", both.output, "--before", tmp_path / "changes.csv"]):
        assert f"folders that do ({', '.join(names)}): give one of them" in assert_refused(run(*words))

    sets = replace(both.with_(train=[f"x={score.values['train']}"], output=tmp_path / "sets"), command="compare")
    assert run(sets).code == 0
    assert sorted(path.name for path in (sets.output / names[0]).iterdir()) == ["compare.json", "report.html", "x"]
    assert "--hook is given 3 times for 2 SAEs" in assert_refused(run(both.with_(hook=["a", "b", "c"])))


def test_what_is_left_out_is_told(score: Options, run: Callable[..., Ran], tmp_path: Path) -> None:
    path = write_rows(tmp_path / "mixed.jsonl", 12)
    with path.open("a") as file:
        for i in range(3):
            file.write(json.dumps({"question": "w1 " * (60 + i)}) + "\n")
    ran = run(score.with_(domains=[str(path)]))
    assert ran.code == 0
    assert "3 of mixed" in ran.out


def test_more_features_than_shift_is_warned_about_on_standard_error(
    score: Options, run: Callable[..., Ran], tmp_path: Path
) -> None:
    sae = write_sae(tmp_path / "sae", normalize_activations="expected_average_only_in")
    ran = run(score.with_(sae=sae))
    assert ran.code == 0
    assert "expected_average_only_in" not in ran.out
    assert "warning: SAE: its config says 'expected_average_only_in'" in ran.err


# Help, version, doctor ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("words", [["--help"], ["score", "--help"], ["shift", "--help"], ["doctor", "--help"], []])
def test_help(words: list[str], run: Callable[..., Ran]) -> None:
    ran = run(*words)
    assert (ran.code, ran.err) == (0, "")
    assert "Usage: sts-fast" in ran.out
    for name in {"score": ["--model", "--domains", "--output"], "doctor": ["--sae"]}.get("".join(words[:1]), []):
        assert name in ran.out


def test_version(run: Callable[..., Ran]) -> None:
    assert run("--version") == Ran(0, f"{sts_fast.__version__}\n", "")


def test_cmakedir(run: Callable[..., Ran]) -> None:
    package = c_library().parent / "cmake" / "sts_fast"
    assert run("--cmakedir") == Ran(0, f"{package}\n", "")
    assert (package / "sts_fastConfig.cmake").is_file()


def test_doctor(run: Callable[..., Ran]) -> None:
    ran = run("doctor")
    assert (ran.code, ran.err) == (0, "")
    facts = json.loads(run("doctor", "--json").out)
    assert facts["sts-fast"] == sts_fast.__version__
    assert facts["torch"].startswith(torch.__version__.partition("+")[0])
    assert facts["self-check"].startswith("ok ")
    assert facts["GPU"].startswith("none that torch")
    for name in ("sts-fast", "python", "numpy", "torch", "CPU core", "GPU", "self-check"):
        assert name in ran.out
    assert "ok (largest" in ran.out


def test_doctor_says_what_was_understood_of_an_sae(run: Callable[..., Ran], material: Path, tmp_path: Path) -> None:
    ran = run("doctor", "--sae", material / "sae", "--json")
    assert (ran.code, ran.err) == (0, "")
    facts = json.loads(ran.out)
    assert facts["architecture"] == "standard [cfg.json: standard]"
    assert facts["widths"] == "d_in 16, d_sae 48, float32 [W_enc]"
    assert facts["hook"] == "blocks.1.hook_resid_post (read after layer 1) [cfg.json: hook_name]"
    assert facts["b_dec"] == "subtracted from the input [SAELens' default]"
    assert (facts["notes"], facts["decoder"]) == ("none", "not said")
    odd = write_sae(tmp_path / "odd", architecture="topk", k=7, apply_b_dec_to_input=False, metadata={})
    facts = json.loads(run("doctor", "--sae", odd, "--json").out)
    assert facts["architecture"] == "topk, k = 7 [cfg.json: topk, cfg.json]"
    assert facts["b_dec"] == "not subtracted from the input [cfg.json]"
    assert facts["hook"] == "not said"
    assert facts["missing"].startswith("trained on, hook, mean L0")


def test_doctor_tells_what_score_would_read(score: Options, run: Callable[..., Ran]) -> None:
    doctor = replace(score.with_(output=None), command="doctor")
    told = json.loads(run(doctor.with_(json=True)).out)
    dry = json.loads(run(score.with_(dry_run=True, json=True)).out)
    assert told["widths"] == "d_in 16, d_sae 48, float32 [W_enc]"
    assert told["forecast"]["sets"] == dry["sets"]
    assert not score.output.exists()
    assert run(score).code == 0
    sent = pq.read_table(score.output / "prompts.parquet").to_pylist()
    for planned in dry["sets"]:
        first = next(row for row in sent if row["domain"] == planned["name"])
        assert planned["first"] == first["question"]
        assert planned["first_lengths"] == [len(first[ids]) for ids in ("base_ids", "demos_ids")]
    ran = run(doctor)
    n, n_behind = dry["sets"][0]["first_lengths"]
    assert f"({n} tokens, {n_behind} behind demonstrations)" in ran.out
    assert "to tell what a forecast would read, give --sae too" in assert_refused(run(doctor.with_(sae=None)))


def test_doctor_prints_long_paths_whole(run: Callable[..., Ran], tmp_path: Path) -> None:
    sae = write_sae(tmp_path / ("long" * 50))
    assert str(sae) in "".join(line.strip() for line in run("doctor", "--sae", sae).out.splitlines())


def test_doctor_refuses_what_score_refuses(run: Callable[..., Ran], tmp_path: Path) -> None:
    assert "no SAE at" in assert_refused(run("doctor", "--sae", tmp_path / "nothing"))
    odd = write_sae(tmp_path / "odd", architecture="crosscoder")
    assert "'crosscoder' is not supported" in assert_refused(run("doctor", "--sae", odd))


# What is refused ------------------------------------------------------------------------------------------------------

Make = Callable[[Options, Path], Options]


def with_file(content: bytes, name: str = "bad.jsonl", option: str = "train") -> Make:
    def make(score: Options, folder: Path) -> Options:
        (folder / name).write_bytes(content)
        return score.with_(**{option: [str(folder / name)]})

    return make


def with_domain(**rows: Any) -> Make:
    return lambda score, folder: score.with_(domains=[f"law={write_rows(folder / 'law.jsonl', **rows)}"])


def with_train(**rows: Any) -> Make:
    return lambda score, folder: score.with_(train=write_rows(folder / "own.jsonl", **rows))


def with_broken_model(change: Callable[[Path], Any], option: str = "model") -> Make:
    def make(score: Options, folder: Path) -> Options:
        copied = Path(shutil.copytree(score.values["model"], folder / "broken"))
        change(copied)
        return score.with_(**{option: copied})

    return make


def with_broken_sae(change: Callable[[Path], Any]) -> Make:
    def make(score: Options, folder: Path) -> Options:
        copied = Path(shutil.copytree(score.values["sae"], folder / "broken"))
        change(copied)
        return score.with_(sae=copied)

    return make


def poison(folder: Path) -> None:
    weights = load_file(folder / "model.safetensors")
    weights["model.layers.1.mlp.down_proj.weight"][0, 0] = float("nan")
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})


def cut_off(name: str) -> Callable[[Path], Any]:
    return lambda folder: (folder / name).write_bytes((folder / name).read_bytes()[:-100])


def with_(**changes: Any) -> Make:
    return lambda score, folder: score.with_(**changes)


REFUSED: dict[str, tuple[Make, str]] = {
    # the training set and the domains
    "no training file": (with_(train="nowhere.jsonl"), "nowhere.jsonl does not exist; give a .jsonl"),
    "no training set of the hub": (with_(train="acme/quiz:main"), "acme/quiz:main is no file or folder, and no such"),
    "training file twice": (
        lambda score, folder: score.with_(train=[score.values["train"]] * 2),
        "train.jsonl is given twice for the set 'train'; give it once",
    ),
    "unknown format": (with_file(b"a\tb\n", "rows.txt"), "rows.txt"),
    "no header": (with_file(b"Who?,me\nWhy?,you\n", "rows.csv"), "rows.csv has no column known to hold questions"),
    "training file empty": (with_file(b""), "bad.jsonl"),
    "training file not JSON": (with_file(b"{'question': 1}\n"), "bad.jsonl"),
    "training file random": (with_file(np.random.default_rng(0).bytes(900)), "bad.jsonl"),
    "training file without questions": (with_file(b'{"a": 1}\n'), "bad.jsonl"),
    "domain file missing": (with_(domains=["law=nowhere.jsonl"]), "nowhere.jsonl"),
    "domain file empty": (with_file(b"", "law.jsonl", "domains"), "law.jsonl"),
    "domain folder empty": (
        lambda score, folder: (folder / "none").mkdir() or score.with_(domains=[str(folder / "none")]),
        "none",
    ),
    "domain named twice": (
        lambda score, folder: score.with_(domains=[f"law={score.values['train']}"] * 2),
        "'law'",
    ),
    "domain called train": (
        lambda score, folder: score.with_(domains=[f"train={score.values['train']}"]),
        "a domain cannot be called 'train'",
    ),
    "no answered row to demonstrate with": (with_train(answered=False), "has 0 answered examples, but 1"),
    "no answered row in a domain": (with_domain(answered=False), "'law' has 0 answered examples, but 1"),
    "more shots than examples": (with_(shots=50), "'train' has 14 answered examples, but 50"),
    "more shots than a domain has": (with_(domain_shots=50), "has 14 answered examples, but 50"),
    "all examples shown": (with_(shots=N_ROWS), "'train' has 14 answered examples, 14 of them too long"),
    "few training prompts": (with_train(n=7), "the training set keeps 7 prompts, but at least 8 are needed"),
    "few prompts in a domain": (with_domain(n=5), "domain 'law' keeps 5 prompts, but at least 8"),
    "limit below the least": (with_(limit=7), "keeps 7 prompts, but at least 8 are needed (add examples, or raise"),
    "training prompts overrun the context": (
        with_train(n_words=60),
        "'train' has 14 answered examples, 14 of them too long to leave room for a question",
    ),
    "domain prompts overrun the context": (
        with_domain(n_words=30),
        "'law' has 14 answered examples, 14 of them too long",
    ),
    "no answers to read": (
        lambda score, folder: with_domain(answered=False)(score, folder).with_(tokens="answer", estimators="act"),
        "14 have no answer to read",
    ),
    "demonstrations for nobody": (
        lambda score, folder: score.with_(demos=[f"green={score.values['train']}"]),
        "demonstrations are given for 'green'",
    ),
    "field that no row has": (with_(question_field=["nothing"]), "nothing"),
    "field of no set": (with_(answer_field=["green=answer"]), "green"),
    "field without a name": (with_(question_field=["train="]), "--question-field takes FIELD or SET=FIELD"),
    # the SAE
    "no SAE": (with_(sae="./nowhere"), "there is no SAE at ./nowhere"),
    "SAE of another width": (
        lambda score, folder: score.with_(sae=write_sae(folder / "wide", d_in=32)),
        "has 16 after layer 1: give an SAE",
    ),
    "SAE weights cut off": (with_broken_sae(cut_off("sae_weights.safetensors")), "not a readable safetensors file"),
    "SAE config cut off": (with_broken_sae(cut_off("cfg.json")), "cfg.json is not readable JSON"),
    "SAE without weights": (
        with_broken_sae(lambda folder: (folder / "sae_weights.safetensors").unlink()),
        "no sae_weights.safetensors",
    ),
    "SAE of unknown architecture": (
        lambda score, folder: score.with_(sae=write_sae(folder / "new", architecture="crosscoder")),
        "architecture 'crosscoder' is not supported",
    ),
    "SAE that says no layer": (
        lambda score, folder: score.with_(sae=write_sae(folder / "new", metadata={})),
        "does not say which layer it reads: give --layer",
    ),
    "SAE of a hook that no model has": (
        lambda score, folder: score.with_(sae=write_sae(folder / "new", metadata={"hook_name": "blocks.1.hook_k"})),
        "has no module 'blocks.1.hook_k'",
    ),
    "layer beyond the model": (with_(layer=3), "has layers 0 to 2, but layer 3 is to be read"),
    "layer below zero": (with_(layer=-1), "layer"),
    "hook beyond the model": (with_(hook="blocks.9.hook_resid_post"), "has layers 0 to 2, but layer 9"),
    "place of no layer": (with_(hook="resid_mid"), "--hook resid_mid exists in every layer: choose one"),
    "layer and hook": (with_(layer=1, hook="blocks.1.hook_resid_post"), "--layer and --hook say the same thing"),
    "more features than there are": (with_(top_n=D_SAE + 1), "--top-n is 49, but the SAE"),
    # the model
    "training file with a name too long": (with_(train="x" * 5000), "does not exist; give a .jsonl"),
    "SAE with a name too long": (with_(sae="x" * 5000), "there is no SAE at xxx"),
    "no model": (with_(model="./nowhere"), "there is no model folder ./nowhere"),
    "model weights cut off": (with_broken_model(cut_off("model.safetensors")), "cannot load the model"),
    "model of unknown type": (
        with_broken_model(lambda folder: (folder / "config.json").write_text('{"model_type": "no_such_type"}')),
        "no_such_type",
    ),
    "model without tokenizer": (
        with_broken_model(lambda folder: [path.unlink() for path in folder.glob("token*")]),
        "cannot load the",
    ),
    "NaN activations": (with_broken_model(poison), "gives NaN or infinity after layer 1 for example"),
    "NaN activations of the tuned model": (
        lambda score, folder: with_broken_model(poison, "tuned")(score, folder).with_(dims="tuned"),
        "broken gives NaN or infinity after layer 1 for example",
    ),
    "tuned model of another width": (
        lambda score, folder: score.with_(dims="tuned", tuned=write_model(folder / "wide", d_in=32)),
        "has 32 after layer 1: give an SAE that was trained on this place",
    ),
    "unknown device": (with_(device="toaster"), "'toaster'"),
    # options
    "unknown option": (with_(colour="red"), "--colour"),
    "missing option": (with_(model=None), "--model"),
    "no domains": (with_(domains=None), "--domains"),
    "dims of no kind": (with_(dims="all"), "--dims"),
    "tokens of no kind": (with_(tokens="first"), "--tokens"),
    "dtype of no kind": (with_(dtype="int8"), "--dtype"),
    "sae dtype of no kind": (with_(sae_dtype="float16"), "--sae-dtype"),
    "unknown estimator": (with_(estimators="act,votes"), "not 'votes'"),
    "no estimator": (with_(estimators=""), "estimators"),
    "estimator twice": (with_(estimators="act,act"), "each once"),
    "dims tuned without tuned": (with_(dims="tuned"), "--dims tuned and --tuned MODEL go together"),
    "tuned without dims tuned": (with_(tuned="somewhere"), "--dims tuned and --tuned MODEL go together"),
    "no threads": (with_(threads=0), "--threads must lie between 1 and 1024, not 0"),
    "precision of no kind": (with_(precision="fp8"), "--precision must be one of bf16, bf16x2, fp32, got 'fp8'"),
    "negative limit": (with_(limit=-1), "--limit must be"),
    "no shots": (with_(shots=0), "--shots must be at least 1, not 0"),
    "no domain shots": (with_(domain_shots=0), "--domain-shots must be at least 1, not 0"),
    "no features": (with_(top_n=0), "--top-n must be at least 1, not 0"),
    "no batch": (with_(batch_tokens=0), "--batch-tokens must be at least 1, not 0"),
    "negative seed": (with_(seed=-1), "--seed"),
    "a number that is none": (with_(limit="many"), "--limit"),
    "threads without end": (with_(threads=1025), "--threads must lie between 1 and 1024, not 1025"),
    "a number given twice": (with_(limit=[20, 30]), "--limit is given twice or more often, but takes one value"),
    "a number beyond 64 bits": (with_(threads=10**30), "--threads must lie between 1 and 1024"),
}


@pytest.mark.parametrize("fault", REFUSED)
def test_refused_in_one_line_with_nothing_written(
    fault: str, score: Options, run: Callable[..., Ran], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "made").mkdir()
    make, message = REFUSED[fault]
    options = make(score, tmp_path / "made")
    assert message in assert_refused(run(options))
    assert contents(options.output) == {}
    assert sorted(path.name for path in tmp_path.iterdir() if path != options.output) == ["made"]

    # What an earlier run has left there stays as it was.
    options.output.mkdir(exist_ok=True)
    (options.output / "scores.json").write_text("earlier")
    assert_refused(run(options))
    assert contents(options.output) == {"scores.json": b"earlier"}


@pytest.mark.parametrize("words", [["forecast"], ["--colour"], ["score"], ["doctor", "extra"]])
def test_words_that_are_no_command(words: list[str], run: Callable[..., Ran]) -> None:
    assert_refused(run(*words))


def test_output_where_a_file_stands(score: Options, run: Callable[..., Ran], tmp_path: Path) -> None:
    (tmp_path / "run").write_text("mine")
    message = assert_refused(run(score))
    assert f"{tmp_path / 'run'} holds something that sts-fast did not write" in message
    message = assert_refused(run(score.with_(output=tmp_path / "run" / "inner")))
    assert f"cannot write {tmp_path / 'run' / '.inner.kept'}: Not a directory" in message
    assert (tmp_path / "run").read_text() == "mine"


def test_output_that_cannot_be_written_in_the_end(
    score: Options, run: Callable[..., Ran], monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*args: Any, **options: Any) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr("pyarrow.parquet.write_table", full)
    message = assert_refused(run(score))
    assert message.endswith("No space left on device")
    assert not score.output.exists()


def test_out_of_memory(score: Options, run: Callable[..., Ran], monkeypatch: pytest.MonkeyPatch) -> None:
    def exhausted(self: LanguageModel, **inputs: Any) -> Any:
        raise MemoryError

    monkeypatch.setattr(LanguageModel, "run", exhausted)
    assert "out of memory: lower --batch-tokens" in assert_refused(run(score))
    assert contents(score.output) == {}


def test_an_error_that_only_speaks_of_memory_is_shown_as_it_is(
    run: Callable[..., Ran], monkeypatch: pytest.MonkeyPatch
) -> None:
    def aliased(**options: Any) -> None:
        raise RuntimeError("more than one element of the written-to tensor refers to a single memory location")

    monkeypatch.setattr(sys.modules["sts_fast.cli.demo"], "run_demo", aliased)
    with pytest.raises(RuntimeError, match="a single memory location"):
        run("demo")


@pytest.mark.parametrize("at", [1, 4])
def test_interrupted_while_it_runs(
    at: int, score: Options, run: Callable[..., Ran], monkeypatch: pytest.MonkeyPatch
) -> None:
    calls = []
    run_model = LanguageModel.run

    def pressed(self: LanguageModel, **inputs: Any) -> Any:
        calls.append(1)
        if len(calls) == at:
            signal.raise_signal(signal.SIGINT)
        return run_model(self, **inputs)

    monkeypatch.setattr(LanguageModel, "run", pressed)
    assert assert_refused(run(score)) == "error: interrupted: no result was written"
    assert len(calls) == at
    assert contents(score.output) == {}


# As while a dataclass is being made: `python -m` then ends by the signal, though the interrupt was caught; and as while
# a class names its members, where Python 3.11 raises RuntimeError instead.
@pytest.mark.parametrize("raised", ["exec('raise KeyboardInterrupt')", "raise RuntimeError from KeyboardInterrupt()"])
def test_interrupted_while_classes_are_made(raised: str, tmp_path: Path) -> None:
    (tmp_path / "interrupted.py").write_text(
        "from sts_fast.cli import app\n"
        "def interrupted(*args, **options):\n"
        f"    {raised}\n"
        "app.app = interrupted\n"
        "app.main()\n"
    )
    command = [sys.executable, "-m", "interrupted"]
    ran = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, check=False)
    assert (ran.returncode, ran.stderr) == (2, "error: interrupted\n")


# As a process of its own ----------------------------------------------------------------------------------------------


def start(*words: Any) -> subprocess.Popen[str]:
    return subprocess.Popen(
        [sys.executable, "-W", "ignore", "-m", "sts_fast", *map(str, words)],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env={**os.environ, "HF_HUB_OFFLINE": "1"},
    )


def ended(process: subprocess.Popen[str]) -> Ran:
    out, err = process.communicate(timeout=120)
    return Ran(process.returncode, out, err)


def test_as_a_process(score: Options, material: Path) -> None:
    good, bad = start(*score.with_(json=True).words()), start("score", "--model", material / "model")
    ran = ended(good)
    assert ran.code == 0
    assert ran.out == (score.output / "scores.json").read_text()
    assert all(SAID.match(line) for line in ran.err.splitlines())
    assert "--train" in assert_refused(ended(bad))


@pytest.mark.parametrize("sent", [signal.SIGINT, signal.SIGTERM])
def test_interrupted_as_a_process(sent: signal.Signals, score: Options, tmp_path: Path) -> None:
    many = write_rows(tmp_path / "many.jsonl", 20_000)
    process = start(*score.with_(train=many, limit=0, batch_tokens=1).words())
    deadline = time.monotonic() + 60
    while not any(tmp_path.glob(".run.*.tmp")) and time.monotonic() < deadline:
        time.sleep(0.02)
    time.sleep(5)  # torch is imported, which a signal may leave half done
    assert process.poll() is None
    process.send_signal(sent)
    assert assert_refused(ended(process)) == "error: interrupted: no result was written"
    assert contents(score.output) == {}
