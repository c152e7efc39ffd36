"""What a forecast writes: a document that its schema accepts, files that are whole or not there, a table."""

from __future__ import annotations

import copy
import errno
import hashlib
import itertools
import json
import math
import re
import resource
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any, get_args

import jsonschema
import pyarrow.parquet as pq
import pytest
import tiny as tiny_material
from safetensors.numpy import load_file
from tiny import Tiny

import sts_fast
from sts_fast import files
from sts_fast.data.prompts import TokenClass
from sts_fast.forecast.estimators import BY_NAME, ESTIMATOR_OPTIONS, SIGNED, SIZES, SizeEstimator
from sts_fast.forecast.options import Controls, Dims
from sts_fast.forecast.run import (
    FEATURES_FILE,
    PROMPTS_FILE,
    SCORES_FILE,
    SHIFT_FILE,
    Score,
    belongs,
    save_beside,
    scores_schema,
    validate_scores,
)
from sts_fast.ops.shift import top_indices
from sts_fast.profile.means import FeatureMeans
from sts_fast.signed.signed import SIGNED_ESTIMATORS, SIGNED_FIELDS

FILES = {SCORES_FILE, SHIFT_FILE, PROMPTS_FILE, FEATURES_FILE}


@pytest.fixture(scope="module")
def forecast(tiny: Tiny) -> sts_fast.Forecast:
    return sts_fast.score(
        model=tiny.model,
        sae=tiny.saes["jumprelu"],
        train=tiny.train,
        domains=tiny.domains,
        estimators=("act", "icl"),
        controls="all",
        shots=1,
        domain_shots=1,
        top_n=20,
        limit=12,
    )


@pytest.fixture(scope="module")
def scores(forecast: sts_fast.Forecast) -> dict[str, Any]:
    return forecast.to_dict()


# --- the schema ---


def test_schema_is_one_and_accepts_a_forecast(scores: dict[str, Any]) -> None:
    schema = scores_schema()
    jsonschema.validators.validator_for(schema).check_schema(schema)
    validate_scores(scores)
    assert scores["schema_version"] == schema["properties"]["schema_version"]["const"]


def objects(schema: Any, path: str = "") -> list[tuple[str, dict[str, Any]]]:
    """(path, object schema) of every object described by name."""
    if not isinstance(schema, dict):
        return []
    found = [(path, schema)] if "properties" in schema else []
    for key, value in schema.items():
        found += objects(value, f"{path}/{key}")
    return found


def test_schema_names_every_key_and_wants_each() -> None:
    described = objects(scores_schema())
    assert len(described) >= 10
    for path, schema in described:
        assert schema["additionalProperties"] is False, path
        assert set(schema["required"]) == set(schema["properties"]), path


def test_schema_knows_the_estimators_of_the_table() -> None:
    schema = scores_schema()
    assert schema["$defs"]["estimator"]["enum"] == list(BY_NAME)
    [sizes] = schema["$defs"]["scores"]["patternProperties"]
    assert [name for name in BY_NAME if re.search(sizes, name)] == list(SIZES)
    assert schema["$defs"]["size_estimator"]["enum"] == list(SIZES) == list(get_args(SizeEstimator))
    estimators = schema["properties"]["settings"]["properties"]["estimators"]
    assert estimators["items"] == {"$ref": "#/$defs/size_estimator"}
    calibration = Path(sts_fast.__file__).parent / "outcomes" / "calibration" / "calibration.schema.json"
    assert json.loads(calibration.read_text())["properties"]["estimator"]["enum"] == list(BY_NAME)
    assert SIGNED == SIGNED_FIELDS
    assert set(ESTIMATOR_OPTIONS) == {*SIZES, *SIGNED_ESTIMATORS}


def test_schema_knows_the_choices_of_the_options() -> None:
    settings = scores_schema()["properties"]["settings"]["properties"]
    assert settings["tokens"]["enum"] == list(get_args(TokenClass))
    assert {*get_args(Dims)} < {*settings["dims"]["enum"]}
    assert settings["controls"]["enum"] == list(get_args(Controls))


def drop(*path: Any) -> Callable[[Any], None]:
    def change(document: Any) -> None:
        del step_into(document, path[:-1])[path[-1]]

    return change


def put(value: Any, *path: Any) -> Callable[[Any], None]:
    def change(document: Any) -> None:
        step_into(document, path[:-1])[path[-1]] = value

    return change


def step_into(document: Any, path: tuple[Any, ...]) -> Any:
    for key in path:
        document = document[key]
    return document


@pytest.mark.parametrize(
    "change",
    [
        drop("domains"),
        drop("domains", 0, "scores", "act", "ci"),
        drop("shift", "stability", "mean_overlap"),
        drop("provenance", "seed"),
        put("2.0", "schema_version"),
        put("high", "domains", 0, "scores", "act", "value"),
        put(-1.0, "domains", 0, "scores", "icl", "value"),
        put(None, "domains", 0, "scores", "icl"),
        put({"value": 1.0, "ci": [0.0, 2.0]}, "domains", 0, "scores", "new"),
        put([0.1], "domains", 0, "scores", "act", "ci"),
        put([0.1, 0.2, 0.3], "domains", 0, "scores", "act", "ci"),
        put(1.5, "domains", 0, "n_prompts"),
        put(-1, "train", "n_tokens"),
        put(1.0, "domains", 0, "accuracy"),
        put({"new": 1.0}, "domains", 0, "controls", "random"),
        put(None, "domains", 0, "controls", "random", "act"),
        put(1.0, "domains", 0, "controls", "random"),
        put("high", "domains", 0, "controls", "cosine_of_means", "cosine"),
        put({"perplexity": 1.0}, "domains", 0, "controls", "base_loss"),
        put([], "domains", 0, "controls"),
        drop("domains", 0, "controls"),
        put("none", "settings", "controls"),
        drop("settings", "controls"),
        put(1.5, "shift", "stability", "mean_overlap"),
        put("relu", "sae", "architecture"),
        put(["act", "act"], "settings", "estimators"),
        put([], "settings", "estimators"),
        put(["ntk"], "settings", "estimators"),
        put("first", "settings", "tokens"),
        put(-1, "shifted_features", 0, "index"),
        put("0" * 63, "provenance", "inputs", 0, "sha256"),
        put({}, "domains"),
    ],
)
def test_schema_rejects_a_broken_document(scores: dict[str, Any], change: Callable[[Any], None]) -> None:
    broken = copy.deepcopy(scores)
    change(broken)
    with pytest.raises(jsonschema.ValidationError):
        validate_scores(broken)


@pytest.mark.parametrize(
    "change",
    [
        drop("domains", 0, "controls", "base_loss"),  # a domain without answers
        put({}, "domains", 0, "controls"),
        put(-1.0, "domains", 0, "controls", "cosine_of_means", "cosine"),
        put({"act_sq": 1.0}, "domains", 0, "controls", "a control of one's own"),
        put("features", "settings", "controls"),
        put([], "domains"),
    ],
)
def test_schema_accepts_other_controls(scores: dict[str, Any], change: Callable[[Any], None]) -> None:
    changed = copy.deepcopy(scores)
    change(changed)
    validate_scores(changed)


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
def test_no_number_in_json_is_infinite(scores: dict[str, Any], value: float) -> None:
    broken = copy.deepcopy(scores)
    broken["domains"][0]["scores"]["act"]["value"] = value
    with pytest.raises(ValueError, match="JSON"):
        files.to_json(broken)
    with pytest.raises(ValueError, match="JSON"):
        validate_scores(broken)


# --- the files ---


def test_saved_files_hold_the_forecast(forecast: sts_fast.Forecast, tmp_path: Path) -> None:
    folder = tmp_path / "a" / "new folder"
    forecast.save(folder)
    assert {path.name for path in folder.iterdir()} == FILES
    saved = json.loads((folder / SCORES_FILE).read_text(encoding="utf-8"))
    assert saved == json.loads(files.to_json(forecast.to_dict()))
    assert pq.read_table(folder / PROMPTS_FILE).equals(forecast.prompts)
    assert pq.read_table(folder / FEATURES_FILE).equals(forecast.firings)
    arrays = load_file(folder / SHIFT_FILE)
    assert arrays["shifted_features"].tolist() == [feature.index for feature in forecast.shifted_features]
    for name, values in forecast.controls.items():
        assert arrays[name].tolist() == values.tolist()
        assert arrays[name].dtype == values.dtype
    assert arrays["random_features"].shape == (10, 20)
    assert arrays["low_shift_features"].ndim == 1
    assert arrays["most_active_features"].shape == (20,)
    assert arrays["raw_dimensions"].shape == (tiny_material.D_IN // 4,)
    assert arrays["mean_residual"].shape == (tiny_material.D_IN,)
    assert arrays["domain_mean_residuals"].shape == (len(forecast.domains), tiny_material.D_IN)
    means, _ = FeatureMeans.load(folder / SHIFT_FILE)
    assert means.squared_shift.tolist() == means.importance.tolist() == forecast.means.importance.tolist()
    assert means.sae_fingerprint == forecast.means.sae_fingerprint
    assert top_indices(means.importance, 20).tolist() == arrays["shifted_features"].tolist()


def test_saving_again_replaces_the_files(forecast: sts_fast.Forecast, tmp_path: Path) -> None:
    for name in FILES:
        (tmp_path / name).write_text("an older run")
    forecast.save(tmp_path)
    assert {path.name for path in tmp_path.iterdir()} == FILES
    assert json.loads((tmp_path / SCORES_FILE).read_text(encoding="utf-8"))["schema_version"] == "1.0"
    assert pq.read_table(tmp_path / PROMPTS_FILE).num_rows == forecast.prompts.num_rows


def test_a_forecast_is_loaded_as_it_was_saved(forecast: sts_fast.Forecast, tmp_path: Path) -> None:
    forecast.save(tmp_path / "one")
    loaded = sts_fast.Forecast.load(tmp_path / "one")
    assert loaded.to_dict() == json.loads((tmp_path / "one" / SCORES_FILE).read_text(encoding="utf-8"))
    assert loaded.domains == forecast.domains
    loaded.save(tmp_path / "two")
    for name in (SCORES_FILE, SHIFT_FILE):
        assert (tmp_path / "two" / name).read_bytes() == (tmp_path / "one" / name).read_bytes(), name
    assert loaded.prompts.equals(forecast.prompts)
    assert loaded.firings.equals(forecast.firings)


@pytest.mark.parametrize("below", [(), ("run",), ("deep", "run")], ids=str)
def test_a_file_in_the_place_of_the_folder(forecast: sts_fast.Forecast, tmp_path: Path, below: tuple[str, ...]) -> None:
    occupied = tmp_path / "occupied"
    occupied.write_text("mine")
    with pytest.raises(sts_fast.InputError, match="cannot write"):
        forecast.save(occupied.joinpath(*below))
    assert occupied.read_text() == "mine"
    assert list(tmp_path.iterdir()) == [occupied]


def test_an_invalid_forecast_is_not_saved(forecast: sts_fast.Forecast, tmp_path: Path) -> None:
    broken = replace(forecast, domains=[replace(forecast.domains[0], scores={"act": Score(math.nan, (0.0, 1.0))})])
    with pytest.raises(ValueError, match="JSON"):
        broken.save(tmp_path)
    assert list(tmp_path.iterdir()) == []


@contextmanager
def no_file_over(n_bytes: int) -> Iterator[None]:
    """Writing fails half-way through any larger file, as on a full disk."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (n_bytes, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


@pytest.mark.parametrize("older", [{}, dict.fromkeys(FILES, "an older run")], ids=["new", "over an older run"])
@pytest.mark.parametrize("failing", [PROMPTS_FILE, FEATURES_FILE, SHIFT_FILE, SCORES_FILE])
def test_nothing_half_written_where_writing_fails(
    forecast: sts_fast.Forecast,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    failing: str,
    older: dict[str, str],
) -> None:
    whole, folder = tmp_path / "whole", tmp_path / "folder"
    forecast.save(whole)
    folder.mkdir()
    for name, text in older.items():
        (folder / name).write_text(text)

    def write_half(path: Path, data: bytes) -> None:
        path.write_bytes(data[: len(data) // 2])
        raise OSError(errno.ENOSPC, "No space left on device")

    def write_text(path: Path, text: str, encoding: str) -> None:
        write_half(path, text.encode(encoding))

    def write_table(table: Any, path: Path, **options: Any) -> None:
        whole_write_table(table, path, **options)
        if FEATURES_FILE in path.name:
            write_half(path, path.read_bytes())

    # The larger files fail for want of room; a limit for the others would stop those first.
    whole_write_table, limit = pq.write_table, 10**9
    if failing == SCORES_FILE:
        monkeypatch.setattr(Path, "write_text", write_text)
    elif failing == FEATURES_FILE:
        monkeypatch.setattr(pq, "write_table", write_table)
    else:
        limit = {PROMPTS_FILE: 1000, SHIFT_FILE: (whole / SHIFT_FILE).stat().st_size - 1}[failing]
    with no_file_over(limit), pytest.raises(sts_fast.InputError, match="cannot write "):
        forecast.save(folder)
    monkeypatch.undo()
    assert {path.name: path.read_text() for path in folder.iterdir()} == older
    assert sorted(path.name for path in tmp_path.iterdir()) == ["folder", "whole"]


def test_an_earlier_run_is_replaced_with_all_that_it_holds(forecast: sts_fast.Forecast, tmp_path: Path) -> None:
    forecast.save(tmp_path / "run")
    (tmp_path / "run" / "validation.json").write_text("of the earlier run")
    forecast.save(tmp_path / "run")
    assert sorted(path.name for path in (tmp_path / "run").iterdir()) == sorted(FILES)
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "notes.txt").write_text("mine")
    with pytest.raises(sts_fast.InputError, match=r"mine holds notes\.txt, which a run does not have"):
        forecast.save(tmp_path / "mine")
    assert (tmp_path / "mine" / "notes.txt").read_text() == "mine"
    (tmp_path / "run" / "notes.txt").write_text("mine")
    with pytest.raises(sts_fast.InputError, match=r"run holds notes\.txt"):
        forecast.save(tmp_path / "run")


def test_a_further_file_belongs_to_the_run_that_it_was_written_beside(
    forecast: sts_fast.Forecast, tmp_path: Path
) -> None:
    forecast.save(tmp_path)
    save_beside(tmp_path, "further.json", {"a": 1})
    document = json.loads((tmp_path / "further.json").read_text(encoding="utf-8"))
    assert document["run"] == hashlib.sha256((tmp_path / SCORES_FILE).read_bytes()).hexdigest()
    assert belongs(tmp_path, document)
    (tmp_path / SCORES_FILE).write_text((tmp_path / SCORES_FILE).read_text() + "\n")
    assert not belongs(tmp_path, document)
    assert not belongs(tmp_path, {"a": 1})


def test_every_score_follows_from_the_prompts(forecast: sts_fast.Forecast) -> None:
    """STS = sum over a domain's prompts / number of its tokens, or pairs; of D_N, of every control, of the answers."""
    rows = [row for row in forecast.prompts.to_pylist() if row["stage"] in ("score", "answer")]
    for domain in forecast.domains:
        of = [row for row in rows if row["domain"] == domain.name and row["stage"] == "score"]
        n = {"act": sum(len(row["positions"]) for row in of), "icl": sum(len(row["paired"]) for row in of)}
        for estimator, n_read in n.items():
            for control in ("", "random", "low_shift", "most_active"):
                column = f"{control}_{estimator}_sum".removeprefix("_")
                wanted = domain.controls[control][estimator] if control else domain.scores[estimator].value
                assert wanted == pytest.approx(sum(row[column] for row in of) / n_read, rel=1e-12)
        answers = [row for row in rows if row["domain"] == domain.name and row["stage"] == "answer"]
        n_answer = sum(len(row["positions"]) for row in answers)
        nll = sum(row["answer_nll_sum"] for row in answers) / n_answer
        assert domain.controls["base_loss"]["nll"] == pytest.approx(nll, rel=1e-12)


# --- the table ---


def test_to_pandas_has_a_row_per_domain(forecast: sts_fast.Forecast) -> None:
    pytest.importorskip("pandas")
    table = forecast.to_pandas()
    assert table["name"].tolist() == [domain.name for domain in forecast.domains]
    assert table["act"].tolist() == [domain.scores["act"].value for domain in forecast.domains]
    assert table["icl_ci"].tolist() == [list(domain.scores["icl"].ci) for domain in forecast.domains]
    assert table["n_tokens"].tolist() == [domain.n_tokens for domain in forecast.domains]
    columns = [
        *itertools.product(("random", "low_shift", "most_active", "raw"), ("act", "icl")),
        *(
            ("cosine_of_means", "cosine"),
            ("cka", "cka"),
            ("probe", "logit"),
            ("base_loss", "nll"),
            ("base_accuracy", "accuracy"),
        ),
        *(
            ("text_similarity", "cosine"),
            ("text_compression", "saved"),
            ("text_length", "words"),
            ("text_digits", "share"),
        ),
    ]
    for control, name in columns:
        assert table[f"{control}_{name}"].tolist() == [domain.controls[control][name] for domain in forecast.domains]
    plain = set(forecast.to_dict()["domains"][0]) - {"controls", "scores"} | {"act", "act_ci", "icl", "icl_ci"}
    assert set(table.columns) == plain | {f"{control}_{name}" for control, name in columns}


def test_to_pandas_where_a_domain_has_no_answers(forecast: sts_fast.Forecast) -> None:
    pytest.importorskip("pandas")
    first, *others = forecast.domains
    silent = {name: values for name, values in first.controls.items() if not name.startswith("base_")}
    table = replace(forecast, domains=[replace(first, controls=silent), *others]).to_pandas()
    assert table["base_loss_nll"].isna().tolist() == [True, *(False for _ in others)]
    assert table["raw_act"].notna().all()


def test_to_pandas_without_domains(forecast: sts_fast.Forecast) -> None:
    pytest.importorskip("pandas")
    assert len(replace(forecast, domains=[]).to_pandas()) == 0


# --- where inputs came from ---


def test_inputs_are_recorded_by_their_hash(forecast: sts_fast.Forecast, tiny: Tiny) -> None:
    inputs = forecast.provenance["inputs"]
    expected = [
        *(("model", path) for path in sorted(tiny.model.iterdir())),
        *(("sae", path) for path in sorted(tiny.saes["jumprelu"].iterdir())),
        ("train", tiny.train),
        *(("domains", path) for path in tiny.domains.values()),
    ]
    assert sorted((entry["role"], entry["path"]) for entry in inputs) == sorted(
        (role, str(path)) for role, path in expected
    )
    for entry in inputs:
        assert entry["sha256"] == hashlib.sha256(Path(entry["path"]).read_bytes()).hexdigest()


def test_rows_in_memory_are_recorded_by_the_hash_of_their_rows(tiny: Tiny) -> None:
    lines = {path: [json.loads(line) for line in path.read_text().splitlines()] for path in tiny.domains.values()}
    train = [json.loads(line) for line in tiny.train.read_text().splitlines()]
    given: dict[str, Any] = {"model": tiny.model, "sae": tiny.saes["topk"], "top_n": 5, "estimators": ["act"]}
    of_files = sts_fast.score(train=tiny.train, domains=tiny.domains, **given)
    in_memory = sts_fast.score(
        train=train, domains={name: lines[path] for name, path in tiny.domains.items()},
        demos={"train": [train, tiny.domains["days"]]}, **given,
    )  # fmt: skip
    own = sts_fast.score(train=train, domains={name: lines[path] for name, path in tiny.domains.items()}, **given)
    assert own.domains == of_files.domains
    assert own.shifted_features == of_files.shifted_features

    def digest(rows: list[Any]) -> str:
        return hashlib.sha256("".join(json.dumps(row, sort_keys=True) + "\n" for row in rows).encode()).hexdigest()

    inputs = [entry for entry in in_memory.provenance["inputs"] if entry["role"] not in ("model", "sae")]
    assert [(entry["role"], entry["path"], entry["sha256"]) for entry in inputs] == [
        *(("domains", f"'{name}' in memory", digest(lines[path])) for name, path in tiny.domains.items()),
        ("demos", "'train 1' in memory", digest(train)),
        ("demos", str(tiny.domains["days"]), hashlib.sha256(tiny.domains["days"].read_bytes()).hexdigest()),
        ("train", "'train' in memory", digest(train)),
    ]


def test_files_below_a_folder_of_examples_are_hashed_too(tmp_path: Path) -> None:
    (tmp_path / "train").mkdir()
    (tmp_path / "dataset_dict.json").write_text("{}")
    (tmp_path / "train" / "data.arrow").write_bytes(b"rows")
    named = {entry["path"] for entry in files.hashed_inputs("train", [tmp_path])}
    assert named == {str(tmp_path / "dataset_dict.json"), str(tmp_path / "train" / "data.arrow")}
    assert {entry["path"] for entry in files.hashed_inputs("model", [tmp_path])} == {
        str(tmp_path / "dataset_dict.json")
    }


def test_a_forecast_shows_itself(forecast: sts_fast.Forecast) -> None:
    shown = repr(forecast)
    assert shown.startswith(f"Forecast('{forecast.train['name']}' on {len(forecast.domains)} domains by ")
    assert "\n" not in shown
    named = replace(forecast, domains=[replace(forecast.domains[0], name="<b>law")])
    page = named._repr_html_()
    assert "&lt;b&gt;law" in page
    assert f"{forecast.domains[0].scores['act'].value:.3g} [" in page
    assert "<td>" in page


def test_the_package_lists_its_public_names() -> None:
    assert dir(sts_fast) == sorted(sts_fast.__all__)
