"""Activations read from files: the scores of the model, without the model; and what is said of folders that are not."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import pytest
import torch
from safetensors.torch import load_file, save_file
from tiny import D_IN, LAYER, Tiny
from transformers import AutoModelForCausalLM, AutoTokenizer
from typer.testing import CliRunner

import sts_fast
from sts_fast import capture_activations
from sts_fast.cli.app import app
from sts_fast.errors import InputError
from sts_fast.model.stored import Activations, writing
from sts_fast.model.stored.index import Index

SAMPLING: dict[str, Any] = {"shots": 1, "domain_shots": 2}
HOOKS = [f"blocks.{LAYER}.hook_resid_post", "blocks.1.hook_mlp_out"]
# bfloat16 keeps 8 bits of a number, an error of up to 0.4%, which averages out over tokens; a firing may come or go.
BFLOAT16_TOLERANCE = 5e-3


@pytest.fixture(scope="module", autouse=True)
def one_torch_thread() -> Iterator[None]:
    n_before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(n_before)


def capture_tiny(tiny: Tiny, output: Path, **options: Any) -> Activations:
    defaults = {
        "model": tiny.model,
        "trains": {"train": tiny.train},
        "domains": tiny.domains,
        "hooks": HOOKS,
        "batch_tokens": 512,
    }
    return capture_activations(output=output, **{**defaults, **SAMPLING, **options})


@pytest.fixture(scope="module")
def captured(tiny: Tiny, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A float32 folder of a model that is not there any more, captured for an SAE of another architecture."""
    folder = tmp_path_factory.mktemp("activations")
    model = shutil.copytree(tiny.model, folder / "model")
    capture_activations(
        model=model,
        output=folder / "float32",
        saes=[sts_fast.load_sae(tiny.saes["jumprelu"])],
        hooks=HOOKS[1:],
        trains={"sums": tiny.train, "spelling": tiny.domains["spelling"]},
        domains=tiny.domains,
        activation_dtype="float32",
        **SAMPLING,
    )
    shutil.rmtree(model)
    return folder / "float32"


def numbers(forecast: sts_fast.Forecast) -> dict[str, Any]:
    """What a forecast says, less what it says about the model's own files and about how the SAE fits."""
    said = {key: forecast.to_dict()[key] for key in ("train", "shift", "domains", "shifted_features")}
    for feature in said["shifted_features"]:
        del feature["promoted_tokens"]
    return said


def deviations(expected: Any, found: Any) -> Iterator[float]:
    """Relative distance of every number of two nested values, of which all else must be the same."""
    if isinstance(expected, dict):
        assert list(expected) == list(found)
        expected, found = list(expected.values()), list(found.values())
    if isinstance(expected, (list, tuple)):
        for one, other in zip(expected, found, strict=True):
            yield from deviations(one, other)
    elif isinstance(expected, float):
        yield abs(expected - found) / max(abs(expected), 1e-300) if expected != found else 0.0
    else:
        assert expected == found


def largest_deviation(expected: sts_fast.Forecast, found: sts_fast.Forecast) -> float:
    return max(deviations(numbers(expected), numbers(found)))


@pytest.mark.parametrize(
    "options",
    [
        {"top_n": 24, "estimators": ("act", "icl", "act_sq")},
        {"top_n": 7, "estimators": ("act",)},
        {"top_n": 24, "dims": "active", "estimators": ("icl",)},
    ],
    ids=["all", "act", "active"],
)
@pytest.mark.parametrize("architecture", ["topk", "gated"])
def test_scores_of_a_folder_are_those_of_the_model(
    tiny: Tiny, captured: Path, architecture: str, options: dict[str, Any]
) -> None:
    given = {"train": tiny.train, "domains": tiny.domains, **SAMPLING, **options}
    expected = sts_fast.score(model=tiny.model, sae=tiny.saes[architecture], **given)
    found = sts_fast.score(model=captured, sae=tiny.saes[architecture], **given)
    assert largest_deviation(expected, found) <= 1e-6
    for column in ("base_ids", "demos_ids", "positions", "paired", "paired_demos", "n_sinks"):
        assert expected.prompts[column].equals(found.prompts[column])
    same = ("layer", "module", "side", "d_in", "dtype", "context_length", "revision")
    assert {key: found.model[key] for key in same} == {key: expected.model[key] for key in same}
    assert found.provenance["forward_passes"]["n_passes"] == 0


def test_several_saes_and_training_sets(tiny: Tiny, captured: Path, tmp_path: Path) -> None:
    given: dict[str, Any] = {
        "sae": [tiny.saes["standard"], tiny.saes["topk"]],
        "trains": {"sums": tiny.train, "spelling": tiny.domains["spelling"]},
        "domains": {"days": tiny.domains["days"]},
        "top_n": 24,
        **SAMPLING,
    }
    for expected, found in zip(
        sts_fast.compare(model=tiny.model, **given), sts_fast.compare(model=captured, **given), strict=True
    ):
        assert list(expected) == list(found)
        assert max(largest_deviation(expected[name], found[name]) for name in expected) <= 1e-6
    forecast = sts_fast.score(model=captured, sae=tiny.saes["topk"], train=tiny.train, domains=tiny.domains, **SAMPLING)
    forecast.save(tmp_path)
    assert json.loads((tmp_path / "scores.json").read_text())["shifted_features"][0]["promoted_tokens"] is None


def test_bfloat16_is_close(tiny: Tiny, tmp_path: Path) -> None:
    model = AutoModelForCausalLM.from_pretrained(tiny.model)
    capture_tiny(tiny, tmp_path / "bfloat16", model=model, tokenizer=AutoTokenizer.from_pretrained(tiny.model))
    given = {"sae": tiny.saes["standard"], "train": tiny.train, "domains": tiny.domains, "top_n": 24, **SAMPLING}
    expected = sts_fast.score(model=tiny.model, **given)
    found = sts_fast.score(model=tmp_path / "bfloat16", **given)
    indices = [{feature.index for feature in forecast.shifted_features} for forecast in (expected, found)]
    assert len(indices[0] & indices[1]) >= 22
    for one, other in zip(expected.domains, found.domains, strict=True):
        for name in ("act", "icl"):
            assert other.scores[name].value == pytest.approx(one.scores[name].value, rel=BFLOAT16_TOLERANCE)


def test_rows_are_what_the_model_gives(tiny: Tiny, captured: Path) -> None:
    index = json.loads((captured / "activations.json").read_text())
    one = next(one for one in index["sets"] if one["name"] == "days")
    prompts = pq.read_table(captured / one["folder"] / "prompts.parquet").to_pylist()
    model = AutoModelForCausalLM.from_pretrained(tiny.model)
    at = [hook["name"] for hook in index["hooks"]].index(HOOKS[0])
    for shard in one["shards"]:
        tensors = load_file(captured / shard["file"])
        n_rows = n_positions = 0
        for prompt in (prompts[i] for i in shard["prompts"]):
            kept = tensors[f"kept.{at}"][n_positions : n_positions + len(prompt["positions"])]
            read = torch.tensor(prompt["positions"])[kept]
            with torch.no_grad():
                states = model(torch.tensor([prompt["base_ids"]]), output_hidden_states=True).hidden_states
            rows = tensors[f"base.{at}"][n_rows : n_rows + len(read)]
            torch.testing.assert_close(rows, states[LAYER + 1][0, read], rtol=1e-4, atol=1e-4)
            n_positions, n_rows = n_positions + len(kept), n_rows + len(read)
        assert n_rows == len(tensors[f"base.{at}"])


class Killed(BaseException):
    """What no code of the package catches."""


@pytest.mark.parametrize("moment", ["behind the index", "before the index"])
def test_a_killed_run_resumes(tiny: Tiny, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, moment: str) -> None:
    monkeypatch.setattr(writing, "SHARD_PROMPTS", 5)
    capture_tiny(tiny, tmp_path / "whole")
    shards = sorted((tmp_path / "whole").rglob("*.safetensors"))
    assert len(shards) >= 6

    with monkeypatch.context() as patched:
        n_left = 3

        def die(*_: Any) -> None:
            nonlocal n_left
            n_left -= 1
            if n_left == 0:
                raise Killed

        if moment == "behind the index":
            with pytest.raises(Killed):
                capture_tiny(tiny, tmp_path / "killed", progress=die)
        else:
            save = Index.save
            patched.setattr(Index, "save", lambda index, folder: (die(), save(index, folder)))
            with pytest.raises(Killed):
                capture_tiny(tiny, tmp_path / "killed")
    with pytest.raises(InputError, match=r"has \d+ of the \d+ prompts .* run the same sts-fast capture again"):
        score_tiny(tiny, tmp_path / "killed")
    finished = json.loads((tmp_path / "killed" / "activations.json").read_text())["sets"][0]["shards"]
    assert finished
    kept = {shard["file"]: (tmp_path / "killed" / shard["file"]).stat().st_ino for shard in finished}

    # A shard that was finished, but was damaged since, is captured again, with those behind it in its set.
    lost = kept.popitem()[0] if len(kept) > 1 else None
    if lost is not None:
        (tmp_path / "killed" / lost).write_bytes(b"")
    capture_tiny(tiny, tmp_path / "killed")
    for path in (path for path in (tmp_path / "whole").rglob("*") if path.is_file()):
        assert (tmp_path / "killed" / path.relative_to(tmp_path / "whole")).read_bytes() == path.read_bytes(), path
    assert all((tmp_path / "killed" / file).stat().st_ino == inode for file, inode in kept.items())
    assert not list((tmp_path / "killed").rglob(".*.tmp"))
    with pytest.raises(InputError, match=r"contains other activations \(not the same settings, sets\): choose another"):
        capture_tiny(tiny, tmp_path / "killed", seed=1, limit=9)


def test_other_weights_under_the_same_name_do_not_finish_a_folder(tiny: Tiny, tmp_path: Path) -> None:
    model = shutil.copytree(tiny.model, tmp_path / "model")
    found = capture_tiny(tiny, tmp_path / "acts", model=model).weights_sha256()
    assert capture_tiny(tiny, tmp_path / "acts", model=model).weights_sha256() == found
    assert score_tiny(tiny, tmp_path / "acts").model["weights_sha256"] == found
    shutil.copy(tiny.tuned / "model.safetensors", model)
    with pytest.raises(InputError, match=r"contains other activations \(not the same model\): choose another --output"):
        capture_tiny(tiny, tmp_path / "acts", model=model)


def test_nothing_else_is_overwritten(tiny: Tiny, tmp_path: Path) -> None:
    """A folder that holds a model as 'model' is no place to put another one's config."""
    shutil.copytree(tiny.model, tmp_path / "model")
    with pytest.raises(InputError, match="has a 'model' that is not of activations: choose another --output"):
        capture_tiny(tiny, tmp_path, model=tmp_path / "model")
    assert (tmp_path / "model" / "model.safetensors").is_file()


def score_tiny(tiny: Tiny, folder: Path, **options: Any) -> sts_fast.Forecast:
    defaults = {"sae": tiny.saes["standard"], "train": tiny.train, "domains": tiny.domains, "top_n": 24, **SAMPLING}
    return sts_fast.score(model=folder, **{**defaults, **options})


@pytest.mark.parametrize(
    ("options", "says"),
    [
        ({"shots": 2}, r"was captured with --shots 1, not 2: give --shots 1, or capture again"),
        ({"domain_shots": 5}, "--domain-shots 2, not 5"),
        ({"tokens": "last"}, "--tokens query, not last"),
        ({"limit": None}, "--limit 256, not 0"),
        ({"seed": 3}, "--seed 0, not 3"),
        ({"controls": "all"}, "--controls all needs the whole model"),
        ({"estimators": ("act", "ntk")}, "--estimators ntk needs the whole model"),
        ({"dims": "tuned", "tuned": "elsewhere"}, "--dims tuned needs the model before and after training"),
        ({"device_map": "cpu"}, "--device-map needs a model to spread"),
        ({"layer": 3}, r"reads at blocks.3.hook_resid_post, but .* contains .*: capture again with --hook blocks.3"),
        ({"demos": {"days": "days"}}, "the domain 'days' was captured in .* with other demonstrations"),
        ({"domains": {"law": "days"}}, "the domain 'law' was not captured in .*, which contains spelling, days"),
        ({"domains": {"days": "spelling"}}, "the domain 'days' was captured in .* with other examples"),
        ({"train": "days"}, "the training set 'train' was not captured in .*, which contains sums, spelling"),
    ],
)
def test_what_was_not_captured_is_refused(tiny: Tiny, captured: Path, options: dict[str, Any], says: str) -> None:
    paths = {**tiny.domains, "elsewhere": tiny.tuned}
    for key, value in options.items():
        if isinstance(value, dict):
            options = {**options, key: {name: paths[path] for name, path in value.items()}}
        elif value in paths:
            options = {**options, key: paths[value]}
    with pytest.raises(InputError, match=says):
        score_tiny(tiny, captured, **options)


def edit_index(change: Callable[[dict[str, Any]], object]) -> Callable[[Path], None]:
    def edit(folder: Path) -> None:
        index = json.loads((folder / "activations.json").read_text())
        change(index)
        (folder / "activations.json").write_text(json.dumps(index))

    return edit


def edit_shard(change: Callable[[dict[str, torch.Tensor]], object]) -> Callable[[Path], None]:
    def edit(folder: Path) -> None:
        path = sorted((folder / "sets/0").glob("*.safetensors"))[0]
        tensors = load_file(path)
        change(tensors)
        save_file(tensors, path)
        edit_index(lambda index: [shard.pop("sha256") for one in index["sets"] for shard in one["shards"]])(folder)

    return edit


def flip_bit(folder: Path) -> None:
    """Of one of the numbers in a shard."""
    content = bytearray((folder / SHARD).read_bytes())
    content[len(content) // 2] ^= 1
    (folder / SHARD).write_bytes(content)


def truncate(name: str) -> Callable[[Path], None]:
    def cut(folder: Path) -> None:
        path = folder / name
        path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])

    return cut


SHARD = "sets/0/00000.safetensors"


@pytest.mark.parametrize(
    ("damage", "says"),
    [
        (lambda folder: (folder / SHARD).unlink(), rf"there is no shard .*{SHARD}: run the same sts-fast capture"),
        (truncate(SHARD), rf"shard .*{SHARD} is damaged"),
        (flip_bit, rf"shard .*{SHARD} is damaged: its SHA-256 is not the one in activations.json; delete it"),
        (edit_shard(lambda of: of.update({"base.0": of["base.0"][:, 1:].clone()})), rf"base.0 is .* not .*{D_IN}\]"),
        (edit_shard(lambda of: of.update({"demos.0": of["demos.0"][1:].clone()})), r"demos.0 is \["),
        (edit_shard(lambda of: of.update({"kept.0": of["kept.0"].int()})), r"kept.0 is .* int32, not .* bool"),
        (edit_shard(lambda of: of.update({"kept.0": of["kept.0"] & False})), "kept_paired.0 keeps tokens that kept.0"),
        (
            edit_shard(lambda of: of["base.0"].__setitem__((1, 2), torch.nan)),
            "base.0 contains NaN .* at row 1, column 2",
        ),
        (
            edit_shard(lambda of: of.update({"base.0": of["base.0"].to(torch.float8_e4m3fn)})),
            "base.0 is .* float8_e4m3fn, not .* of float32, bfloat16 or float16",
        ),
        (edit_shard(lambda of: of.pop("kept_paired.0")), "kept_paired.0"),
        (truncate("activations.json"), "activations.json is damaged"),
        (
            edit_index(lambda index: index.update(version=2)),
            "is sts-fast activations 2, but this reads .* 1: capture again",
        ),
        (edit_index(lambda index: index.pop("hooks")), "lacks 'hooks'"),
        (edit_index(lambda index: index["sets"][0].pop("name")), "lacks 'name'"),
        (edit_index(lambda index: index["sets"][0]["shards"].clear()), "has 0 of the"),
        (edit_index(lambda index: index["sets"][0].update(n_prompts=1)), "of the 1 prompts"),
        (truncate("sets/0/prompts.parquet"), "prompts.parquet is damaged"),
        (lambda folder: shutil.rmtree(folder / "model"), "lacks the folder model"),
    ],
)
def test_a_damaged_folder_is_told_in_a_line(
    tiny: Tiny, captured: Path, tmp_path: Path, damage: Callable[[Path], None], says: str
) -> None:
    folder = shutil.copytree(captured, tmp_path / "activations")
    damage(folder)
    with pytest.raises(InputError, match=says) as told:
        score_tiny(tiny, folder)
    assert "\n" not in str(told.value)


def test_other_tools_need_not_say_how_they_sampled(tiny: Tiny, captured: Path, tmp_path: Path) -> None:
    """What docs/activations.md calls optional may be left out, and rows may lie in shards of any size."""
    folder = shutil.copytree(captured, tmp_path / "activations")
    index = json.loads((folder / "activations.json").read_text())
    for one in index["sets"]:
        for key in ("n_too_long", "n_unanswered", "warnings", "examples_sha256", "demos_sha256", "prompts_sha256"):
            del one[key]
        for shard in one["shards"]:
            del shard["sha256"]
        if one["name"] == "sums":
            one["name"] = "train"
    index["hooks"] = [{"name": hook["name"], "d_in": hook["d_in"]} for hook in index["hooks"]]
    index = {key: index[key] for key in ("format", "version", "model", "hooks", "sets")}
    (folder / "activations.json").write_text(json.dumps(index))
    expected = score_tiny(tiny, captured)
    found = score_tiny(tiny, folder, seed=0, limit=7, shots=2)
    assert [domain.scores["icl"] for domain in found.domains] == [domain.scores["icl"] for domain in expected.domains]


def test_a_folder_without_questions_is_read_with_a_warning(tiny: Tiny, captured: Path, tmp_path: Path) -> None:
    folder = shutil.copytree(captured, tmp_path / "activations")
    said = [sts_fast.load_examples(path) for path in tiny.domains.values()]
    index = json.loads((folder / "activations.json").read_text())
    files = {
        one["name"]: folder / one["folder"] / "prompts.parquet" for one in index["sets"] if one["kind"] == "domain"
    }
    for examples, path in zip(said, files.values(), strict=True):
        table = pq.read_table(path)
        assert set(table["question"].to_pylist()) <= {example.question for example in examples}
        pq.write_table(table.drop_columns(["question"]), path)
    found, whole = score_tiny(tiny, folder), score_tiny(tiny, captured)
    [warning] = [warning for warning in found.warnings if "text of the questions" in warning]
    assert warning.startswith(f"the text of the questions is not known of {', '.join(files)}: ")
    assert not any("text of the questions" in warning for warning in whole.warnings)
    for domain, other in zip(found.domains, whole.domains, strict=True):
        named = {name for name in other.controls if name.startswith("text_")}
        assert named
        assert set(domain.controls) == set(other.controls) - named


def test_command_line(tiny: Tiny, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    runner = CliRunner()
    monkeypatch.setattr("sys.argv", ["sts-fast", "score"])
    sets = ["--train", str(tiny.train), *(f"--domains={name}={path}" for name, path in tiny.domains.items())]
    sets += ["--shots", "1", "--domain-shots", "2"]
    model = shutil.copytree(tiny.model, tmp_path / "model")
    folder = str(tmp_path / "activations")
    ran = runner.invoke(
        app, ["capture", "--model", str(model), "--sae", str(tiny.saes["gated"]), *sets, "--output", folder]
    )
    assert ran.exit_code == 0, ran.output
    assert "give it as --model" in ran.output
    shutil.rmtree(model)
    sae = ["--sae", str(tiny.saes["standard"]), "--top-n", "24"]
    ran = runner.invoke(app, ["score", "--model", folder, *sae, *sets, "--output", str(tmp_path / "run")])
    assert ran.exit_code == 0, ran.output
    scores = json.loads((tmp_path / "run" / "scores.json").read_text())
    assert scores["model"]["name"] == str(model)
    assert np.isfinite([domain["scores"]["icl"]["value"] for domain in scores["domains"]]).all()
    assert (tmp_path / "run" / "report.html").is_file()
    ran = runner.invoke(
        app, ["shift", "--model", folder, *sae, *sets[:2], "--shots", "1", "--output", str(tmp_path / "shift")]
    )
    assert ran.exit_code == 0, ran.output
