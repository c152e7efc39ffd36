"""Hidden states in the layout of vLLM's files: the scores of the model, and what is said of files that cannot be read.

No server runs here: the files are written by hand, after vLLM's documentation, from the model run unbatched.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from tiny import CONTEXT, D_IN, LAYER, Tiny
from transformers import AutoModelForCausalLM
from typer.testing import CliRunner

import sts_fast
from sts_fast.cli.app import app
from sts_fast.errors import InputError
from sts_fast.model.stored.exported import Export, Request, layer_number

HOOKS = [f"blocks.{LAYER}.hook_resid_post", "blocks.1.hook_resid_pre"]
LAYERS = [0, 1, LAYER + 1]
SAMPLING: dict[str, Any] = {"shots": 1, "domain_shots": 2, "limit": 12}

Edit = Callable[[dict[str, torch.Tensor]], object]


@pytest.fixture(scope="module", autouse=True)
def one_torch_thread() -> Iterator[None]:
    n_before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(n_before)


def given(tiny: Tiny, **options: Any) -> dict[str, Any]:
    sets = {"trains": {"train": tiny.train}, "domains": tiny.domains}
    return {"model": tiny.model, "hooks": HOOKS, **sets, **SAMPLING, **options}


@pytest.fixture(scope="module")
def serve(tiny: Tiny, tmp_path_factory: pytest.TempPathFactory) -> Callable[[list[dict[str, Any]], Path], None]:
    """Writes what vLLM's ExampleHiddenStatesConnector does of each request, from the model run on it alone."""
    model = AutoModelForCausalLM.from_pretrained(tiny.model)

    def answer(requests: list[dict[str, Any]], folder: Path) -> None:
        folder.mkdir()
        for i, request in enumerate(requests):
            ids = torch.tensor(request["prompt_token_ids"])
            with torch.no_grad():
                states = model(ids[None], output_hidden_states=True).hidden_states
            hidden = torch.stack([states[layer][0] for layer in LAYERS], dim=1)
            save_file({"hidden_states": hidden, "token_ids": ids}, folder / f"cmpl-{i:04x}-0-9f.safetensors")
            (folder / f"cmpl-{i:04x}-0-9f.safetensors.lock").touch()

    return answer


@pytest.fixture(scope="module")
def exported(tiny: Tiny, serve: Any, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("export")
    asked = sts_fast.export_requests(**given(tiny))
    assert asked.layers == LAYERS
    asked.save(folder / "prompts.jsonl")
    requests = [json.loads(line) for line in (folder / "prompts.jsonl").read_text().splitlines()]
    assert len({tuple(request["prompt_token_ids"]) for request in requests}) == len(requests) == len(asked.requests)
    assert {"id", "prompt_token_ids"} == set(requests[0])
    serve(requests, folder / "float32")
    return folder / "float32"


@pytest.mark.parametrize("architecture", ["topk", "gated"])
def test_scores_are_those_of_the_model(tiny: Tiny, exported: Path, tmp_path: Path, architecture: str) -> None:
    sae = tiny.saes[architecture]
    said: list[str] = []
    # Neither the weights nor the place of the files' folder is needed.
    model = shutil.copytree(tiny.model, tmp_path / "model", ignore=shutil.ignore_patterns("*.safetensors"))
    sts_fast.capture_activations(
        **given(tiny, model=model),
        output=tmp_path / "acts",
        export=exported,
        activation_dtype="float32",
        say=said.append,
    )
    assert any("requests of" in line and "in float32" in line for line in said)
    options = {"sae": sae, "train": tiny.train, "domains": tiny.domains, "top_n": 24, **SAMPLING}
    expected = sts_fast.score(model=tiny.model, **options)
    found = sts_fast.score(model=tmp_path / "acts", **options)
    for one, other in zip(expected.domains, found.domains, strict=True):
        for name in ("act", "icl"):
            assert other.scores[name].value == pytest.approx(one.scores[name].value, rel=1e-5)
    for one, other in zip(expected.shifted_features, found.shifted_features, strict=True):
        assert one.index == other.index
    for column in ("base_ids", "demos_ids", "positions", "paired", "paired_demos", "n_sinks"):
        assert expected.prompts[column].equals(found.prompts[column])
    assert sum(expected.prompts["n_sinks"].to_pylist()) > 0
    same = ("layer", "module", "side", "d_in", "dtype", "context_length", "revision")
    assert {key: found.model[key] for key in same} == {key: expected.model[key] for key in same}
    assert found.model["weights_sha256"] is None


def test_bfloat16_is_close(tiny: Tiny, exported: Path, tmp_path: Path) -> None:
    rounded = shutil.copytree(exported, tmp_path / "export")
    for path in rounded.glob("*.safetensors"):
        tensors = load_file(path)
        save_file({**tensors, "hidden_states": tensors["hidden_states"].bfloat16()}, path)
    said: list[str] = []
    options = given(tiny, hooks=HOOKS[:1], domains={"days": tiny.domains["days"]}, export=rounded, export_layers=LAYERS)
    sts_fast.capture_activations(**options, output=tmp_path / "acts", say=said.append)
    assert any("in bfloat16" in line for line in said)
    options = {"train": tiny.train, "domains": {"days": tiny.domains["days"]}, "top_n": 24, **SAMPLING}
    expected = sts_fast.score(model=tiny.model, sae=tiny.saes["standard"], **options)
    found = sts_fast.score(model=tmp_path / "acts", sae=tiny.saes["standard"], **options)
    assert found.model["dtype"] == "bfloat16"
    for name in ("act", "icl"):
        assert found.domains[0].scores[name].value == pytest.approx(expected.domains[0].scores[name].value, rel=1e-3)


def test_another_export_leaves_nothing_of_the_one_before(tiny: Tiny, exported: Path, tmp_path: Path) -> None:
    """A run that stopped at a damaged file may have read a wrong export until then."""
    wrong = shutil.copytree(exported, tmp_path / "export")
    options = given(tiny, domains={}, output=tmp_path / "acts")
    for i, path in enumerate(sorted(wrong.glob("*.safetensors"))):
        tensors = load_file(path)
        tensors["hidden_states"][:, 2] *= 3
        if i == 23:  # the last one of the training set
            tensors["hidden_states"][3, 2] = torch.nan
        save_file(tensors, path)
    with pytest.MonkeyPatch.context() as patched:
        patched.setattr("sts_fast.model.stored.writing.SHARD_PROMPTS", 2)
        with pytest.raises(InputError, match="has NaN"):
            sts_fast.capture_activations(**options, export=wrong)
        index = json.loads((tmp_path / "acts" / "activations.json").read_text())
        assert index["sets"][0]["shards"]
        sts_fast.capture_activations(**options, export=exported)
        sts_fast.capture_activations(**{**options, "output": tmp_path / "fresh"}, export=exported)
    for path in (path for path in (tmp_path / "fresh").rglob("*") if path.is_file()):
        assert (tmp_path / "acts" / path.relative_to(tmp_path / "fresh")).read_bytes() == path.read_bytes(), path


def of_one(edit: Edit) -> Callable[[Path], None]:
    """Damages one file, of a long sequence with demonstrations that is not the first."""

    def damage(folder: Path) -> None:
        path = max(sorted(folder.glob("*.safetensors"))[4:], key=lambda path: path.stat().st_size)
        tensors = load_file(path)
        edit(tensors)
        save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, path)

    return damage


def of_all(edit: Edit) -> Callable[[Path], None]:
    def damage(folder: Path) -> None:
        for path in folder.glob("*.safetensors"):
            tensors = load_file(path)
            edit(tensors)
            save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, path)

    return damage


def rows(change: Callable[[torch.Tensor], torch.Tensor]) -> Edit:
    return lambda of: of.update(hidden_states=change(of["hidden_states"]))


def tokens(change: Callable[[torch.Tensor], torch.Tensor]) -> Edit:
    """Changed tokens, with as many rows."""

    def edit(of: dict[str, torch.Tensor]) -> None:
        of["token_ids"] = change(of["token_ids"])
        of["hidden_states"] = torch.randn(len(of["token_ids"]), *of["hidden_states"].shape[1:])

    return edit


def stale(of: dict[str, torch.Tensor]) -> None:
    """The first rows are those of what a block of the cache held before."""
    of["hidden_states"][:20] = of["hidden_states"][20:40].clone()


def at(index: Any, value: float) -> Edit:
    return lambda of: of["hidden_states"].__setitem__(index, value)


def drop_one(folder: Path) -> None:
    sorted(folder.glob("*.safetensors"))[5].unlink()


def cut_short(folder: Path) -> None:
    path = sorted(folder.glob("*.safetensors"))[5]
    path.write_bytes(path.read_bytes()[:-100])


def twice(folder: Path) -> None:
    shutil.copy(sorted(folder.glob("*.safetensors"))[5], folder / "again.safetensors")


CACHED = "start the server with --no-enable-prefix-caching and --no-enable-chunked-prefill, and export again"


@pytest.mark.parametrize(
    ("damage", "says"),
    [
        (drop_one, r"lacks 1 of \d+ requests, such as train/train/sums-.*/(base|demos): send prompts.jsonl again"),
        (lambda folder: [path.unlink() for path in folder.iterdir()], "contains no .safetensors of a server: send"),
        (of_one(tokens(lambda ids: torch.cat([ids[:1], ids]))), "has BOS twice at the start of the tokens of the requ"),
        (of_one(tokens(lambda ids: torch.cat([ids[5:6], ids]))), "has one token more at the start .*: send the token"),
        (of_one(tokens(lambda ids: ids[1:])), "lacks the first of the tokens of the request .*: send the token ids"),
        (of_one(tokens(lambda ids: ids[:-9])), r"has only \d+ of the \d+ tokens of the request .*--max-model-len \d+"),
        (of_all(tokens(lambda ids: ids[:25])), r"has only 25 of the \d+ tokens of the request .*--max-model-len \d+"),
        (of_all(tokens(lambda ids: torch.cat([ids[:1], ids]))), "has BOS twice at the start of the tokens of the requ"),
        (of_one(tokens(lambda ids: ids[9:])), r"has only \d+ of the \d+ tokens of the request .*truncate_prompt_tok"),
        (
            of_one(tokens(lambda ids: torch.cat([ids, ids[:3]]))),
            "has 3 tokens more .*: export again with max_tokens 1, or without inc",
        ),
        (of_one(tokens(lambda ids: torch.cat([ids[:30], ids[31:]]))), "other tokens from position 30 on .*: send the"),
        (of_one(rows(lambda hidden: hidden[16:])), rf"has rows of \d+ of its \d+ tokens: {CACHED}"),
        (of_one(at((3, 2), torch.nan)), f"has NaN or infinity after layer {LAYER} at token 3: start the server with"),
        (of_one(at((3, 2), 0.0)), f"has only zeros after layer {LAYER} at token 3, which was not computed: {CACHED}"),
        (of_one(stale), rf"start with the same \d+ tokens, but have other rows there: {CACHED}"),
        (of_all(rows(lambda hidden: hidden[:, :, 1:])), rf"has {D_IN - 1} numbers per token, but the model has {D_IN}"),
        (
            of_all(rows(lambda hidden: hidden[:, :2])),
            r"is \[\d+, 2, 64\], not \[n_tokens, 3, d\]: name .* \(0, 1, 3 ar",
        ),
        (of_all(rows(lambda hidden: hidden[:, 0])), r"is \[\d+, 64\], not \[n_tokens, 3, d\]"),
        (of_all(rows(lambda hidden: hidden[:, [1, 2, 2]])), "layer 0 of .* has other numbers for token .* --export-la"),
        (
            of_all(rows(lambda hidden: hidden[:, [0, 0, 2]])),
            "layer 1 of .* same numbers wherever a token stands, so it",
        ),
        (
            of_all(rows(lambda hidden: hidden.to(torch.float8_e4m3fn))),
            r"is F8_E4M3, not F32, BF16, F16: start .*--dtyp",
        ),
        (of_one(rows(torch.Tensor.bfloat16)), "is bfloat16, but files before it are float32: they are of two servers"),
        (of_one(lambda of: of.pop("token_ids")), "is no whole file of vLLM's ExampleHiddenStatesConnector .*token_ids"),
        (cut_short, "is no whole file of vLLM's .*: wait until the server has written it, or delete it"),
        (twice, r"again.safetensors and .* are of the same tokens: delete the older"),
    ],
)
def test_what_an_export_leaves_out_is_told_in_a_line(
    tiny: Tiny, exported: Path, tmp_path: Path, damage: Callable[[Path], None], says: str
) -> None:
    folder = shutil.copytree(exported, tmp_path / "export")
    damage(folder)
    with pytest.raises(InputError, match=says) as told:
        sts_fast.capture_activations(**given(tiny), output=tmp_path / "acts", export=folder)
    assert "\n" not in str(told.value)


@pytest.mark.parametrize(
    ("options", "says"),
    [
        ({"seed": 1}, r"not their text, of a prompts.jsonl of these options"),
        ({"hooks": ["blocks.1.hook_mlp_out"]}, "export the residual stream between layers, not blocks.1.hook_mlp_out"),
        (
            {"export_layers": [0, 1, 2]},
            f"{HOOKS[0]} is layer 3 of an export, of which --export-layer names 0, 1, 2: exp",
        ),
        ({"export_layers": [3, 1, 0]}, "--export-layer 3, 1, 0 is not ascending"),
        ({"export_layers": [1, 3, 4]}, "layer 1 of .* so it is the embedding"),
    ],
)
def test_another_export_than_was_asked_for(
    tiny: Tiny, exported: Path, tmp_path: Path, options: dict[str, Any], says: str
) -> None:
    with pytest.raises(InputError, match=says):
        sts_fast.capture_activations(**given(tiny, **options), output=tmp_path / "acts", export=exported)
    assert not (tmp_path / "acts" / "sets/0/00000.safetensors").exists()


def test_numbers_of_layers() -> None:
    assert layer_number("blocks.7.hook_resid_pre") == layer_number("blocks.6.hook_resid_post") == 7
    assert layer_number("blocks.0.hook_resid_pre") == 0


def test_a_request_is_found_by_its_tokens(tmp_path: Path) -> None:
    for name, ids in (("b", [5, 6]), ("a", [5, 7])):
        hidden = torch.zeros(2, 1, 3)
        save_file({"hidden_states": hidden, "token_ids": torch.tensor(ids)}, tmp_path / f"{name}.safetensors")
    wanted = [Request("one", np.array([5, 7], np.int32))]
    assert Export(tmp_path, [], wanted, [0]).dtype == "float32"


def test_lengths_that_a_server_decides_are_told(tiny: Tiny, exported: Path, tmp_path: Path) -> None:
    model = shutil.copytree(tiny.model, tmp_path / "model")
    config = json.loads((model / "config.json").read_text())
    config["rope_parameters"] = {"rope_type": "dynamic", "factor": 2.0, "rope_theta": 10000.0}
    (model / "config.json").write_text(json.dumps(config))
    said: list[str] = []
    sts_fast.capture_activations(**given(tiny, model=model), output=tmp_path / "acts", export=exported, say=said.append)
    assert any(line.startswith("warning: ") and line.endswith(f"give them at most {CONTEXT}") for line in said)


def test_command_line(tiny: Tiny, serve: Any, tmp_path: Path) -> None:
    runner = CliRunner()
    acts = tmp_path / "acts"
    words = ["capture", "--model", str(tiny.model), "--sae", str(tiny.saes["gated"]), "--train", str(tiny.train)]
    words += ["--shots", "1", "--limit", "8", "--dims", "active", "--output", str(acts)]
    ran = runner.invoke(app, [*words, "--prompts-only"])
    assert ran.exit_code == 0, ran.output
    assert "have layers 0, 3 exported, and give the folder with --from-export" in ran.output
    requests = [json.loads(line) for line in (acts / "prompts.jsonl").read_text().splitlines()]
    assert len(requests) == 8  # without demonstrations
    serve(requests, tmp_path / "export")
    layers = [word for layer in LAYERS for word in ("--export-layer", str(layer))]
    ran = runner.invoke(app, [*words, "--from-export", str(tmp_path / "export"), *layers])
    assert ran.exit_code == 0, ran.output
    assert "contains 8 prompts of 1 sets" in ran.output
    for more, says in (
        (["--prompts-only", "--from-export", "x"], "--prompts-only comes before --from-export: give one of them"),
        (["--export-layer", "3"], "--export-layer is of no use without --from-export: give both"),
    ):
        with pytest.raises(InputError, match=says):
            runner.invoke(app, [*words, *more], catch_exceptions=False)
