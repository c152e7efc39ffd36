"""SAEs by name, out of made-up caches of the hub and without a network."""

from __future__ import annotations

import json
import os
import sys
import warnings
from collections.abc import Callable
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path
from threading import Thread
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import save_file
from sparse_features import dense
from test_sae import D_IN, D_SAE, tensors_of, write_sae

from sts_fast.errors import InputError
from sts_fast.sae import load_sae

pytestmark = pytest.mark.filterwarnings("ignore")


@pytest.fixture(scope="module")
def sae_lens() -> Any:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # its own imports warn
        return pytest.importorskip("sae_lens")


@pytest.fixture
def hub_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[[str], Path]:
    """The folder in which huggingface_hub would find a repository's files, had it downloaded them before."""
    from huggingface_hub import constants

    cache = tmp_path / "cache"
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(cache))
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)

    def put(repository: str) -> Path:
        root = cache / f"models--{repository.replace('/', '--')}"
        revision = "0" * 40
        (root / "refs").mkdir(parents=True, exist_ok=True)
        (root / "refs" / "main").write_text(revision)
        (root / "snapshots" / revision).mkdir(parents=True, exist_ok=True)
        return root / "snapshots" / revision

    return put


def acts() -> np.ndarray:
    return np.random.default_rng(0).normal(size=(40, D_IN)).astype(np.float32)


def put_saelens(root: Path) -> None:
    hook = "blocks.8.hook_resid_pre"
    write_sae(root / hook, config={"metadata": ..., "hook_name": hook, "model_name": "gpt2-small", "prepend_bos": True})


def put_gemma_scope(root: Path) -> None:
    folder = root / "layer_20" / "width_16k" / "average_l0_68"
    folder.mkdir(parents=True)
    tensors = {name: tensor.numpy() for name, tensor in tensors_of("jumprelu").items()}
    np.savez(folder / "params.npz", **tensors)


def put_llama_scope(root: Path) -> None:
    from llama_scope_layout import write_llama_scope
    from sae_lens.loading.pretrained_saes_directory import get_norm_scaling_factor

    # sae-lens scales the threshold by what the file says, and the input by its own list's factor: the same on the hub.
    norm = D_IN**0.5 / (get_norm_scaling_factor("llama_scope_lxr_8x", "l15r_8x") or 1)
    write_llama_scope(
        root / "Llama3_1-8B-Base-L15R-8x",
        tensors_of("standard"),
        dataset_average_activation_norm={"in": norm, "out": norm},
    )


def put_qwen_scope(root: Path) -> None:
    w = tensors_of("topk")
    torch.save(
        {"W_enc": w["W_enc"].T, "W_dec": w["W_dec"].T, "b_enc": w["b_enc"], "b_dec": w["b_dec"]}, root / "layer7.sae.pt"
    )


RELEASES: dict[str, tuple[str, str, Callable[[Path], None], dict[str, Any]]] = {
    "SAELens": (
        "gpt2-small-res-jb/blocks.8.hook_resid_pre",
        "jbloom/GPT2-Small-SAEs-Reformatted",
        put_saelens,
        {"architecture": "standard", "hook_name": "blocks.8.hook_resid_pre", "model_name": "gpt2-small"},
    ),
    "Gemma Scope": (
        "gemma-scope-9b-pt-res-canonical/layer_20/width_16k/canonical",
        "google/gemma-scope-9b-pt-res",
        put_gemma_scope,
        {"architecture": "jumprelu", "hook_name": "blocks.20.hook_resid_post", "model_name": "google/gemma-2-9b"},
    ),
    "Llama Scope": (
        "llama_scope_lxr_8x/l15r_8x",
        "fnlp/Llama3_1-8B-Base-LXR-8x",
        put_llama_scope,
        {"architecture": "jumprelu", "hook_name": "blocks.15.hook_resid_post", "model_name": "meta-llama/Llama-3.1-8B"},
    ),
}


@pytest.mark.parametrize("layout", RELEASES)
def test_a_release_is_read_as_sae_lens_reads_it_without_a_network(
    layout: str, hub_cache: Callable[[str], Path], sae_lens: Any
) -> None:
    name, repository, put, fields = RELEASES[layout]
    put(hub_cache(repository))
    sae = load_sae(name)
    assert {key: getattr(sae, key) for key in fields} == fields
    assert sae.source == name
    assert sae.layout.startswith(layout)

    from sae_lens.loading import pretrained_sae_loaders as loaders

    def of_these_widths(**arguments: Any) -> Any:  # sae-lens knows the widths of Gemma by heart
        config, weights, sparsity = loaders.gemma_2_sae_huggingface_loader(**arguments)
        return {**config, "d_in": D_IN, "d_sae": D_SAE}, weights, sparsity

    with torch.no_grad():
        theirs = sae_lens.SAE.from_pretrained(
            *name.split("/", 1), converter=of_these_widths if layout == "Gemma Scope" else None
        )
        expected = theirs.encode(torch.from_numpy(acts())).numpy()
    assert (expected > 0).any()
    assert np.allclose(dense(sae, acts()), expected, rtol=1e-5, atol=1e-5)


def test_what_a_release_says_beyond_its_files(hub_cache: Callable[[str], Path], sae_lens: Any) -> None:
    put_saelens(hub_cache("jbloom/GPT2-Small-SAEs-Reformatted"))
    sae = load_sae("gpt2-small-res-jb/blocks.8.hook_resid_pre")
    (note,) = sae.notes
    assert "a model that TransformerLens had changed (center_writing_weights=True)" in note
    assert sae.metadata["neuronpedia_id"] == "gpt2-small/8-res-jb"
    put_qwen_scope(hub_cache("Qwen/SAE-Res-Qwen3-8B-Base-W64K-L0_50"))
    with pytest.raises(InputError, match="k must be a whole number between 1 and d_sae = 20, but is 50"):
        load_sae("qwen-scope-3-8b-base-w64k-l50/layer7")


@pytest.mark.parametrize("version", [None, "6.0.0"])
def test_settings_that_only_the_list_has(version: str | None, hub_cache: Callable[[str], Path], sae_lens: Any) -> None:
    """mistral-7b-res-wg: the list says constant_norm_rescale, and the file none; it overrides files of any version."""
    from sae_lens.loading.pretrained_saes_directory import get_pretrained_saes_directory

    release = get_pretrained_saes_directory()["mistral-7b-res-wg"]
    sae_id, path = next(iter(release.saes_map.items()))
    said = {"hook_name": "blocks.8.hook_resid_pre", "model_name": "mistral-7b"}
    config = {"metadata": {"sae_lens_version": version, **said}} if version else {"metadata": ..., **said}
    write_sae(hub_cache(release.repo_id) / path, config=config)
    sae = load_sae(f"mistral-7b-res-wg/{sae_id}")
    assert sae.input_norm == "constant_norm_rescale"
    with torch.no_grad():
        theirs = sae_lens.SAE.from_pretrained("mistral-7b-res-wg", sae_id)
        expected = theirs.encode(torch.from_numpy(acts() * 7)).numpy()
    assert (expected > 0).any()
    assert np.allclose(dense(sae, acts() * 7), expected, rtol=1e-5, atol=1e-5)
    assert len(np.flatnonzero(dense(sae, acts() * 7))) == len(np.flatnonzero(expected))


def test_every_override_of_the_list_is_understood(sae_lens: Any) -> None:
    """The list's keys are read, or say nothing about features: a new one shows up here."""
    from sae_lens.loading.pretrained_saes_directory import get_pretrained_saes_directory

    releases = get_pretrained_saes_directory().values()
    keys = {key for release in releases if release.conversion_func is None for key in release.config_overrides or {}}
    assert keys <= {"normalize_activations", "model_from_pretrained_kwargs", "dataset_path"}


def test_a_transcoder_of_circuit_tracer_beside_its_config(hub_cache: Callable[[str], Path]) -> None:
    w = tensors_of("standard")
    for folder in (".", "small"):
        root = hub_cache("owner/transcoders") / folder
        root.mkdir(exist_ok=True)
        save_file({**w, "W_enc": w["W_enc"].T.contiguous()}, root / "layer_3.safetensors")
        (root / "config.yaml").write_text("feature_input_hook: mlp.hook_in\nfeature_output_hook: mlp.hook_out")
        name = f"owner/transcoders:{folder}/layer_3.safetensors".replace("./", "")
        assert load_sae(name).hook_name == "blocks.3.mlp.hook_in"


def test_a_release_of_a_rare_layout_is_loaded_by_sae_lens(hub_cache: Callable[[str], Path], sae_lens: Any) -> None:
    from sae_lens.loading.pretrained_saes_directory import get_pretrained_saes_directory

    release = get_pretrained_saes_directory()["gpt2-small-hook-z-kk"]
    root, file = hub_cache(release.repo_id), release.saes_map["blocks.0.hook_z"]
    torch.save(tensors_of("standard"), root / file)
    said = {"act_size": D_IN, "dict_size": D_SAE, "act_name": "blocks.0.attn.hook_z"}
    (root / file.replace(".pt", "_cfg.json")).write_text(json.dumps(said))
    sae = load_sae("gpt2-small-hook-z-kk/blocks.0.hook_z")
    assert (sae.architecture, sae.hook_name, sae.model_name) == ("standard", "blocks.0.attn.hook_z", "gpt2-small")
    with torch.no_grad():
        theirs = sae_lens.SAE.from_pretrained("gpt2-small-hook-z-kk", "blocks.0.hook_z")
        expected = theirs.encode(torch.from_numpy(acts().reshape(-1, 2, 3))).numpy()
    assert np.allclose(dense(sae, acts()), expected, rtol=1e-5, atol=1e-5)
    assert sae.decoder is not None
    torch.save({**tensors_of("standard"), "extra": Payload(root / "executed")}, root / file)
    with pytest.raises(InputError, match="sae-lens cannot load release 'gpt2-small-hook-z-kk'"):
        load_sae("gpt2-small-hook-z-kk/blocks.0.hook_z")
    assert not (root / "executed").exists()


class Payload:
    """What a pickle may do to those who load it."""

    def __init__(self, marker: Path) -> None:
        self.marker = marker

    def __reduce__(self) -> Any:
        return os.mkdir, (str(self.marker),)


def test_files_of_a_repository(hub_cache: Callable[[str], Path]) -> None:
    root = hub_cache("owner/saes")
    write_sae(root / "layer_3")
    write_sae(root / "layer_4", "jumprelu")
    sae = load_sae("owner/saes:layer_3")
    assert (sae.source, sae.d_sae) == ("owner/saes:layer_3", D_SAE)
    assert load_sae("owner/saes:layer_4/sae_weights.safetensors").architecture == "jumprelu"
    write_sae(hub_cache("owner/one"))
    assert load_sae("owner/one").d_in == D_IN


def test_a_hub_that_cannot_be_reached(
    hub_cache: Callable[[str], Path], monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    """The cache serves without the hub too, and what is not in it is told without the hub's retries and log lines."""
    from huggingface_hub import constants

    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(constants, "ENDPOINT", "http://127.0.0.1:9")
    write_sae(hub_cache("owner/one"))
    assert load_sae("owner/one").d_in == D_IN
    with pytest.raises(
        InputError, match="cannot get owner/two from the hub: it is not in the cache, and the hub could"
    ):
        load_sae("owner/two:layer_3")
    with pytest.raises(InputError, match="no repository of that name is available"):
        load_sae("owner/two")
    assert capfd.readouterr().err == ""


def test_a_hub_that_answers_with_an_error(hub_cache: Callable[[str], Path], monkeypatch: pytest.MonkeyPatch) -> None:
    """The cache serves where it has the SAE; elsewhere the hub's reason is reported, and not that nothing is there."""
    from huggingface_hub import constants

    class Broken(BaseHTTPRequestHandler):
        def do_GET(self) -> None:
            self.send_error(500, "Out of order")

        def log_message(self, *args: Any) -> None:
            pass

    write_sae(hub_cache("owner/one"))
    write_sae(hub_cache("owner/saes") / "layer_3")
    with HTTPServer(("127.0.0.1", 0), Broken) as server:
        Thread(target=server.serve_forever, daemon=True).start()
        monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
        monkeypatch.setattr(constants, "ENDPOINT", f"http://127.0.0.1:{server.server_port}")
        assert load_sae("owner/one").d_in == D_IN
        assert load_sae("owner/saes:layer_3").d_in == D_IN
        for name in ("owner/saes", "owner/nothing"):
            with pytest.raises(InputError, match=f"the files of {name} on the hub .*500.* as {name}:folder"):
                load_sae(name)
        server.shutdown()


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("no-such-release/x/y", "sae-lens knows no release 'no-such-release'"),
        ("owner/nothing", "no repository of that name is available"),
        ("gpt2-small-res-jb/no-such-id", r"release 'gpt2-small-res-jb' has no SAE 'no-such-id': its ids are blocks\.0"),
        ("gpt2-small-res-jb/blocks.9.hook_resid_pre", "cannot get jbloom/GPT2-Small-SAEs-Reformatted from the hub"),
        ("temporal-sae-gemma-2-2b/blocks.12.hook_resid_post", "sae-lens cannot load release 'temporal-sae-gemma-2-2b'"),
        ("owner/saes", r"contains no SAE in its root, but its folders may \(layer_3\): give one as owner/saes:folder"),
        ("owner/saes:layer_9", "the repository owner/saes has no 'layer_9'"),
        ("owner/saes:../../../etc", "is not a folder or file of the repository"),
        ("owner/saes:/etc/passwd", "is not a folder or file of the repository"),
    ],
)
def test_what_cannot_be_had(name: str, message: str, hub_cache: Callable[[str], Path], sae_lens: Any) -> None:
    write_sae(hub_cache("owner/saes") / "layer_3")
    with pytest.raises(InputError, match=message) as e:
        load_sae(name)
    assert "\n" not in str(e.value)


def test_without_sae_lens_releases_say_what_to_install(
    hub_cache: Callable[[str], Path], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    for name in [name for name in sys.modules if name.startswith("sae_lens")]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, "sae_lens", None)
    with pytest.raises(InputError, match=r"there is no folder gpt2-small-res-jb/.*pip install 'sts-fast\[sae-lens\]'"):
        load_sae("gpt2-small-res-jb/blocks.8.hook_resid_pre")
    assert load_sae(write_sae(tmp_path / "sae")).d_sae == D_SAE
    write_sae(hub_cache("owner/saes") / "layer_3")
    assert load_sae("owner/saes:layer_3").d_sae == D_SAE
