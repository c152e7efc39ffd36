"""SAEs and transcoders written by sparsify, encoded as by it."""

from __future__ import annotations

import json
import warnings
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from sparse_features import check_alike, dense

import sts_fast
from sts_fast.errors import InputError
from sts_fast.places import split_name
from sts_fast.sae import load_sae

D_IN, D_SAE, K = 12, 40, 5


@pytest.fixture(scope="module")
def sparsify() -> Any:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # its own imports warn
        return pytest.importorskip("sparsify")


def make(sparsify: Any, folder: Path, *, dtype: torch.dtype = torch.float32, **options: Any) -> Any:
    coder = sparsify.SparseCoder(D_IN, sparsify.SparseCoderConfig(num_latents=D_SAE, k=K, **options), dtype=dtype)
    generator = torch.Generator().manual_seed(3)
    with torch.no_grad():
        for parameter in coder.parameters():
            parameter.copy_(torch.randn(parameter.shape, generator=generator))
    coder.save_to_disk(folder)
    return coder


def acts() -> np.ndarray:
    return np.random.default_rng(1).normal(size=(300, D_IN)).astype(np.float32) + 0.3


@pytest.mark.parametrize("skip", [False, True])
@pytest.mark.parametrize("transcode", [False, True])
def test_features_and_reconstruction_are_sparsifys(transcode: bool, skip: bool, tmp_path: Path, sparsify: Any) -> None:
    coder = make(sparsify, tmp_path / "layers.3.mlp", transcode=transcode, skip_connection=skip)
    sae, x = load_sae(tmp_path / "layers.3.mlp"), torch.from_numpy(acts())
    assert (sae.k, sae.d_sae, sae.apply_b_dec_to_input) == (K, D_SAE, not transcode)
    hooks = ("layers.3.mlp.input", "layers.3.mlp") if transcode else ("layers.3.mlp", "")
    assert (sae.hook_name, sae.target_hook_name) == hooks
    with torch.no_grad():
        values, indices, pre = coder.encode(x)
        expected = torch.zeros(len(x), D_SAE).scatter_(1, indices, values)
        decoded = coder(x).sae_out
    ordered = pre.sort(dim=1, descending=True).values
    room = torch.where(pre >= ordered[:, [K - 1]], pre - ordered[:, [K]], ordered[:, [K - 1]] - pre).numpy()
    check_alike(dense(sae, acts()), expected.numpy(), room)
    ours = sae.reconstruct(acts(), sts_fast.encode(sae, acts()))
    assert ours is not None
    assert torch.allclose(ours, decoded, rtol=1e-4, atol=1e-4)


def test_model_of_the_run(tmp_path: Path, sparsify: Any) -> None:
    make(sparsify, tmp_path / "h.3", dtype=torch.bfloat16)
    (tmp_path / "config.json").write_text(json.dumps({"model": "gpt2"}))
    sae = load_sae(tmp_path / "h.3")
    assert (sae.model_name, split_name(sae.hook_name)[1], str(sae.W_enc.dtype)) == ("gpt2", 3, "torch.bfloat16")
    # A folder with one SAE further down stands for it; with two it does not say which.
    assert load_sae(tmp_path).source == str(tmp_path / "h.3")
    make(sparsify, tmp_path / "h.4", dtype=torch.bfloat16)
    with pytest.raises(InputError, match=r"contains no SAE, but its subfolders may \(h\.3, h\.4\): give one of them"):
        load_sae(tmp_path)


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ({"activation": "groupmax"}, "activation 'groupmax' is not supported"),
        ({"signed": True}, "signed is not supported"),
        ({"num_latents": 41}, "says num_latents = 41, but the weights have 40"),
        ({"k": 0}, "k must be a whole number between 1 and d_sae = 40, but is 0"),
        ({"transcode": "no"}, "transcode must be true or false, but is 'no'"),
        ({"skip_connection": True}, "has no tensor 'W_skip'"),
    ],
)
def test_what_is_refused(config: dict[str, Any], message: str, tmp_path: Path, sparsify: Any) -> None:
    make(sparsify, tmp_path)
    said = json.loads((tmp_path / "cfg.json").read_text())
    (tmp_path / "cfg.json").write_text(json.dumps({**said, **config}))
    with pytest.raises(InputError, match=message):
        load_sae(tmp_path)
