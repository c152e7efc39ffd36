"""SAEs of every class of dictionary_learning, and their features, as the library itself recorded them."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from sparse_features import check_alike, dense

import sts_fast
from sts_fast.errors import InputError
from sts_fast.sae import load_sae
from sts_fast.sae.dictionary_learning import CLASSES, READS_INPUT, UNTRAINED_THRESHOLD
from sts_fast.sae.load import NO_PLACE

RECORDED = Path(__file__).parents[1] / "recorded" / "dictionary_learning"
TOLD_BY_CONFIG_ONLY = ("AutoEncoderTopK", "BatchTopKSAE")


@pytest.fixture(scope="module")
def recorded() -> dict[str, torch.Tensor]:
    return load_file(RECORDED / "features.safetensors")


def copy(name: str, folder: Path, **trainer: Any) -> Path:
    """A recorded SAE whose config.json says other things; None leaves an entry out."""
    shutil.copytree(RECORDED / name, folder)
    config = json.loads((folder / "config.json").read_text())
    config["trainer"] = {key: value for key, value in {**config["trainer"], **trainer}.items() if value is not None}
    (folder / "config.json").write_text(json.dumps(config))
    return folder


@pytest.mark.parametrize("name", CLASSES)
def test_features_and_reconstruction_are_the_librarys(name: str, recorded: dict[str, torch.Tensor]) -> None:
    sae, x = load_sae(RECORDED / name), recorded["x"].numpy()
    assert (sae.architecture, sae.hook_name, sae.model_name) == (CLASSES[name][0], "blocks.3.hook_resid_post", "tiny")
    assert sae.l0 == (5.0 if "Batch" in name else None)
    check_alike(dense(sae, x), recorded[f"{name}.features"].numpy())
    decoded = sae.reconstruct(x, sts_fast.encode(sae, x))
    assert decoded is not None
    assert torch.allclose(decoded, recorded[f"{name}.decoded"], rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("name", CLASSES)
def test_file_without_its_config(name: str, tmp_path: Path, recorded: dict[str, torch.Tensor]) -> None:
    shutil.copy(RECORDED / name / "ae.pt", tmp_path)
    if name in TOLD_BY_CONFIG_ONLY:
        with pytest.raises(InputError, match=r"may be an AutoEncoderTopK or a BatchTopKSAE: keep it beside its config"):
            load_sae(tmp_path / "ae.pt")
        return
    x = recorded["x"].numpy()
    check_alike(dense(load_sae(tmp_path / "ae.pt"), x), recorded[f"{name}.features"].numpy())


def test_options_of_all_trainers_are_ignored(tmp_path: Path) -> None:
    """Those that the library's trainers write beside the ones that are read."""
    training = {
        "trainer_class": "PAnnealTrainer", "lr": 1e-3, "sparsity_function": "Lp^p", "sparsity_penalty": 0.1, "seed": 1,
        "p_start": 1, "p_end": 0.2, "anneal_start": 15, "sparsity_queue_length": 10, "n_sparsity_updates": 10,
        "warmup_steps": 10, "resample_steps": 5, "steps": 100, "wandb_name": "x", "l1_penalty": 0.1, "decay_start": 3,
        "sparsity_warmup_steps": 5, "auxk_alpha": 0.03, "threshold_beta": 0.99, "threshold_start_step": 10,
        "top_k_aux": 32, "group_fractions": [0.5, 0.5], "group_weights": [1, 1], "group_sizes": [20, 20],
        "device": "cuda:0", "bandwidth": 0.001, "target_l0": 20,
    }  # fmt: skip
    assert load_sae(copy("AutoEncoder", tmp_path / "sae", **training)).notes == ()
    with pytest.raises(InputError, match="the key 'input_norm' may change the features"):
        load_sae(copy("AutoEncoder", tmp_path / "other", input_norm="rms"))


@pytest.mark.parametrize(
    ("io", "hook", "notes"),
    [("out", "blocks.3.hook_resid_post", ()), ("in", "", (NO_PLACE, READS_INPUT)), ("in_and_out", "", ())],
)
def test_the_side_that_was_read(io: str, hook: str, notes: tuple[str, ...], tmp_path: Path) -> None:
    folder = copy("AutoEncoder", tmp_path / "sae")
    config = json.loads((folder / "config.json").read_text())
    buffer = {"d_submodule": 12, "io": io, "n_ctxs": 3000, "ctx_len": 128, "refresh_batch_size": 32, "device": "cpu"}
    (folder / "config.json").write_text(json.dumps({**config, "buffer": buffer}))
    if io == "in_and_out":
        with pytest.raises(InputError, match="io 'in_and_out' is not supported: use an SAE, not a transcoder"):
            load_sae(folder)
        return
    sae = load_sae(folder)
    assert (sae.hook_name, sae.notes) == (hook, notes)


def test_threshold_before_training_is_noted(tmp_path: Path) -> None:
    folder = copy("BatchTopKSAE", tmp_path / "sae")
    state = torch.load(folder / "ae.pt", weights_only=True)
    torch.save({**state, "threshold": torch.tensor(-1.0)}, folder / "ae.pt")
    assert load_sae(folder).notes == (UNTRAINED_THRESHOLD,)


@pytest.mark.parametrize(
    ("trainer", "hook"),
    [
        ({"submodule_name": "mlp_out_layer_9"}, "blocks.9.hook_mlp_out"),
        ({"submodule_name": None}, "blocks.3.hook_resid_post"),
        ({"submodule_name": None, "layer": None}, ""),
    ],
)
def test_hook(trainer: dict[str, Any], hook: str, tmp_path: Path) -> None:
    assert load_sae(copy("AutoEncoder", tmp_path / "sae", **trainer)).hook_name == hook


@pytest.mark.parametrize(
    ("trainer", "message"),
    [
        ({"dict_class": "CrossCoder"}, "dict_class 'CrossCoder' is not supported, because it reads several layers"),
        ({"dict_class": "NewSAE"}, "dict_class 'NewSAE' is not supported, use one of AutoEncoder,"),
        ({"dict_class": 3}, "dict_class must be a text, but is 3"),
        ({"k": 7}, r"k is 7, but ae\.pt has 5"),
        ({"k": 41}, r"k is 41, but ae\.pt has 5"),
        ({"dict_size": 41}, "says dict_size = 41, but the weights have 40"),
        ({"dict_class": "GatedAutoEncoder"}, r"ae\.pt has no tensor 'r_mag'"),
    ],
)
def test_what_does_not_fit_together(trainer: dict[str, Any], message: str, tmp_path: Path) -> None:
    with pytest.raises(InputError, match=message):
        load_sae(copy("AutoEncoderTopK", tmp_path / "sae", **trainer))
