"""Damaged and hostile checkpoints: each is answered by one clear line that names file and key, and runs no code.

Every layout first loads as it should, so that what a case damages is the reason why it does not.
"""

from __future__ import annotations

import io
import json
import os
import pickle
import struct
import subprocess
import sys
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import save, save_file

from sts_fast import InputError, encode, load_sae

D_IN, D_SAE, K = 8, 24, 4
Build = Callable[[Path], Path]
Tensors = dict[str, torch.Tensor]


def tensors() -> Tensors:
    generator = torch.Generator().manual_seed(0)
    shapes = {"W_enc": (D_IN, D_SAE), "b_enc": (D_SAE,), "W_dec": (D_SAE, D_IN), "b_dec": (D_IN,)}
    return {name: torch.randn(shape, generator=generator) for name, shape in shapes.items()}


# --- one healthy checkpoint of each layout ---------------------------------------------------------------------------


def config(**changes: Any) -> dict[str, Any]:
    whole = {
        "architecture": "standard",
        "d_in": D_IN,
        "d_sae": D_SAE,
        "dtype": "float32",
        "apply_b_dec_to_input": True,
        "normalize_activations": "none",
        "metadata": {"hook_name": "blocks.1.hook_resid_post", "model_name": "tiny", "prepend_bos": False},
    }
    return {**whole, **changes}


def saelens(folder: Path, weights: Tensors | None = None, *, without: str = "", **changes: Any) -> Path:
    weights = dict(weights or tensors())
    settings = {name: value for name, value in config(**changes).items() if name != without}
    if settings.get("architecture") == "jumprelu":
        weights.setdefault("threshold", torch.rand(D_SAE))
    (folder / "cfg.json").write_text(json.dumps(settings))
    save_file(weights, folder / "sae_weights.safetensors")
    return folder


def jumprelu(folder: Path) -> Path:
    return saelens(folder, architecture="jumprelu")


def state_dict() -> Tensors:
    t = tensors()
    return {
        "encoder.weight": t["W_enc"].T.contiguous(),
        "encoder.bias": t["b_enc"],
        "decoder.weight": t["W_dec"].T.contiguous(),
        "bias": t["b_dec"],
    }


def dictionary_learning(folder: Path, state: Any = None, *, dict_class: Any = "AutoEncoder", **trainer: Any) -> Path:
    settings = {
        "trainer": {
            "dict_class": dict_class,
            "activation_dim": D_IN,
            "dict_size": D_SAE,
            "layer": 1,
            "lm_name": "tiny",
            "submodule_name": "resid_post_layer_1",
            **trainer,
        },
        "buffer": {"d_submodule": D_IN, "io": "out"},
    }
    (folder / "config.json").write_text(json.dumps(settings))
    torch.save(state_dict() if state is None else state, folder / "ae.pt")
    return folder


def top_k_state() -> dict[str, Any]:
    t = state_dict()
    t["b_dec"] = t.pop("bias")
    return {**t, "k": torch.tensor(K), "threshold": torch.tensor(0.5)}


def top_k_dictionary(folder: Path, **changes: Any) -> Path:
    return dictionary_learning(folder, {**top_k_state(), **changes}, dict_class="AutoEncoderTopK", k=K)


def qwen_scope(folder: Path, state: Any = None) -> Path:
    t = tensors()
    healthy = {"W_enc": t["W_enc"].T.contiguous(), "b_enc": t["b_enc"], "W_dec": t["W_dec"].T.contiguous()}
    folder = folder / f"SAE-Res-tiny-W1K-L0_{K}"
    folder.mkdir()
    torch.save({**healthy, "b_dec": t["b_dec"]} if state is None else state, folder / "layer1.sae.pt")
    return folder / "layer1.sae.pt"


def gemma_scope(folder: Path, **changes: Any) -> Path:
    folder = folder / "layer_1" / "width_24" / "average_l0_4"
    folder.mkdir(parents=True)
    arrays = {name: value.numpy() for name, value in tensors().items()} | {"threshold": np.full(D_SAE, 0.1, np.float32)}
    arrays = {name: value for name, value in {**arrays, **changes}.items() if value is not None}
    np.savez(folder / "params.npz", **arrays)
    return folder


def sparsify(folder: Path, *, missing: str = "", **changes: Any) -> Path:
    t = tensors()
    weights = {"encoder.weight": t["W_enc"].T.contiguous(), "encoder.bias": t["b_enc"]}
    weights |= {"W_dec": t["W_dec"], "b_dec": t["b_dec"]}
    folder = folder / "layers.1"
    folder.mkdir()
    settings = {"activation": "topk", "expansion_factor": 3, "normalize_decoder": True, "num_latents": D_SAE, "k": K}
    (folder / "cfg.json").write_text(json.dumps({**settings, "d_in": D_IN, "transcode": False, **changes}))
    save_file({name: value for name, value in weights.items() if name != missing}, folder / "sae.safetensors")
    return folder


def llama_scope(folder: Path, **changes: Any) -> Path:
    t = tensors()
    weights = {"encoder.weight": t["W_enc"].T.contiguous(), "encoder.bias": t["b_enc"]}
    weights |= {"decoder.weight": t["W_dec"].T.contiguous(), "decoder.bias": t["b_dec"]}
    settings = {
        "d_model": D_IN,
        "d_sae": D_SAE,
        "use_decoder_bias": True,
        "act_fn": "jumprelu",
        "jump_relu_threshold": 0.5,
        "norm_activation": "dataset-wise",
        "dataset_average_activation_norm": {"in": 10.0, "out": 10.0},
        "hook_point_in": "blocks.1.hook_resid_post",
        "hook_point_out": "blocks.1.hook_resid_post",
        "sparsity_include_decoder_norm": True,
        "apply_decoder_bias_to_pre_encoder": False,
        "top_k": K,
    }
    (folder / "hyperparams.json").write_text(json.dumps({**settings, **changes}))
    (folder / "checkpoints").mkdir()
    save_file(weights, folder / "checkpoints" / "final.safetensors")
    return folder


def named(folder: Path) -> Path:
    save_file(tensors(), folder / "encoder.safetensors")
    return folder / "encoder.safetensors"


HEALTHY: dict[str, Build] = {
    "saelens": saelens,
    "dictionary_learning": dictionary_learning,
    "dictionary_learning top-k": top_k_dictionary,
    "qwen_scope": qwen_scope,
    "gemma_scope": gemma_scope,
    "sparsify": sparsify,
    "llama_scope": llama_scope,
    "named tensors": named,
}


@pytest.mark.parametrize("layout", HEALTHY)
def test_what_the_cases_damage_loads_when_it_is_whole(layout: str, tmp_path: Path) -> None:
    sae = load_sae(HEALTHY[layout](tmp_path))
    assert (sae.d_in, sae.d_sae) == (D_IN, D_SAE)
    assert encode(sae, np.ones((3, D_IN), np.float32)).indptr[-1] > 0


# --- damage ----------------------------------------------------------------------------------------------------------


def cut(path: Path, share: float) -> None:
    path.write_bytes(path.read_bytes()[: int(path.stat().st_size * share)])


def safetensors_with_header(folder: Path, header: bytes, length: int | None = None) -> Path:
    saelens(folder)
    claimed = struct.pack("<Q", len(header) if length is None else length)
    (folder / "sae_weights.safetensors").write_bytes(claimed + header + bytes(64))
    return folder


def moved_offsets(folder: Path, offsets: list[int]) -> Path:
    saelens(folder)
    data = save(tensors())
    size = struct.unpack("<Q", data[:8])[0]
    header = json.loads(data[8 : 8 + size])
    header["W_enc"]["data_offsets"] = offsets
    text = json.dumps(header).encode()
    (folder / "sae_weights.safetensors").write_bytes(struct.pack("<Q", len(text)) + text + data[8 + size :])
    return folder


def with_tensor(name: str, value: torch.Tensor | None, **changes: Any) -> Build:
    def build(folder: Path) -> Path:
        weights = {key: tensor for key, tensor in tensors().items() if key != name}
        if value is not None:
            weights[name] = value
        return saelens(folder, weights, **changes)

    return build


def spoiled(name: str, value: float) -> torch.Tensor:
    tensor = tensors()[name]
    tensor.view(-1)[3] = value
    return tensor


def with_config(text: bytes) -> Build:
    def build(folder: Path) -> Path:
        saelens(folder)
        (folder / "cfg.json").write_bytes(text)
        return folder

    return build


class Payload:
    """What runs when it is unpickled: it leaves a file behind."""

    def __init__(self, marker: Path) -> None:
        self.marker = marker

    def __reduce__(self) -> tuple[Any, ...]:
        return os.system, (f"touch {self.marker}",)


def pickled(folder: Path, build: Callable[..., Path], *, legacy: bool = False) -> Path:
    state = {**state_dict(), "extra": Payload(folder / "ran")}
    found = build(folder, state)
    if legacy:
        target = next(path for path in folder.rglob("*.pt"))
        target.write_bytes(pickle.dumps(state))
    return found


def rezipped(path: Path, compression: int = zipfile.ZIP_STORED, **members: bytes) -> None:
    """The archive again, with some members put in the place of its own or beside them."""
    with zipfile.ZipFile(path) as archive:
        contents = {info.filename: archive.read(info) for info in archive.infolist()}
    prefix = next(iter(contents)).partition("/")[0] + "/" if path.suffix == ".pt" else ""
    with zipfile.ZipFile(path, "w", compression) as archive:
        for name, data in {**contents, **{prefix + key: data for key, data in members.items()}}.items():
            archive.writestr(name, data)


def pt_bomb(folder: Path) -> Path:
    dictionary_learning(folder)
    rezipped(folder / "ae.pt", zipfile.ZIP_DEFLATED, **{"data/9": bytes(200 << 20)})
    return folder


def npz_bomb(folder: Path) -> Path:
    folder = gemma_scope(folder)
    member = io.BytesIO()
    np.lib.format.write_array_header_1_0(member, {"descr": "<f4", "fortran_order": False, "shape": (50 << 20,)})
    rezipped(folder / "params.npz", zipfile.ZIP_DEFLATED, **{"W_enc.npy": member.getvalue() + bytes(200 << 20)})
    return folder


def npz_with_header(folder: Path, header: str) -> Path:
    folder = gemma_scope(folder)
    text = header.encode().ljust(118)
    member = b"\x93NUMPY\x01\x00" + struct.pack("<H", len(text)) + text + bytes(4 * D_IN * D_SAE)
    rezipped(folder / "params.npz", **{"W_enc.npy": member})
    return folder


def edited(build: Build, file: str, edit: Callable[[Path], object]) -> Build:
    def damage(folder: Path) -> Path:
        found = build(folder)
        edit(next(path for path in (found, *folder.rglob("*")) if path.name == file))
        return found

    return damage


def array_of_objects(folder: Path) -> Path:
    return gemma_scope(folder, W_enc=np.array([Payload(folder / "ran")], dtype=object))


def state_with(**changes: Any) -> Build:
    def build(folder: Path) -> Path:
        merged = {**state_dict(), **changes}
        return dictionary_learning(folder, {key: value for key, value in merged.items() if value is not None})

    return build


def link_to_itself(path: Path) -> None:
    path.unlink()
    path.symlink_to(path.name)


def fifo(path: Path) -> None:
    path.unlink()
    os.mkfifo(path)


def folder_instead(path: Path) -> None:
    path.unlink()
    path.mkdir()


WEIGHTS, CONFIG = "sae_weights.safetensors", "cfg.json"
LONG = 10**18
NPY_HEADER = "{{'descr': '<f4', 'fortran_order': False, 'shape': ({}, {})}}"
# name: how to build it, and what the line must name (a regular expression)
CASES: dict[str, tuple[Build, str]] = {
    # safetensors
    "truncated": (edited(saelens, WEIGHTS, lambda path: cut(path, 0.5)), WEIGHTS),
    "truncated header": (edited(saelens, WEIGHTS, lambda path: cut(path, 0.02)), WEIGHTS),
    "empty weights": (edited(saelens, WEIGHTS, lambda path: path.write_bytes(b"")), WEIGHTS),
    "text for weights": (edited(saelens, WEIGHTS, lambda path: path.write_text("404: Not Found")), WEIGHTS),
    "pointer for weights": (
        edited(saelens, WEIGHTS, lambda path: path.write_text("version https://git-lfs.github.com/spec/v1\n")),
        WEIGHTS,
    ),
    "header of 2^63 bytes": (lambda folder: safetensors_with_header(folder, b"{}", 2**63), WEIGHTS),
    "header no JSON": (lambda folder: safetensors_with_header(folder, b"{'W_enc': no}"), WEIGHTS),
    "header nested": (lambda folder: safetensors_with_header(folder, b'{"a":' * 50_000), WEIGHTS),
    "offsets past the end": (lambda folder: moved_offsets(folder, [0, LONG]), WEIGHTS),
    "offsets that overlap": (lambda folder: moved_offsets(folder, [8, 8 + 4 * D_IN * D_SAE]), WEIGHTS),
    "offsets that run backwards": (lambda folder: moved_offsets(folder, [4 * D_IN * D_SAE, 0]), WEIGHTS),
    "no weights file": (edited(saelens, WEIGHTS, Path.unlink), WEIGHTS),
    "weights a folder": (edited(saelens, WEIGHTS, folder_instead), WEIGHTS),
    "weights a pipe": (edited(saelens, WEIGHTS, fifo), WEIGHTS),
    "weights a link to itself": (edited(saelens, WEIGHTS, link_to_itself), WEIGHTS),
    # tensors
    "W_enc missing": (with_tensor("W_enc", None), "W_enc"),
    "b_enc missing": (with_tensor("b_enc", None), "b_enc"),
    "b_dec missing": (with_tensor("b_dec", None), "b_dec"),
    "W_enc transposed": (with_tensor("W_enc", torch.zeros(D_SAE, D_IN)), "d_in|W_enc"),
    "W_enc flat": (with_tensor("W_enc", torch.zeros(D_IN * D_SAE)), "W_enc"),
    "W_enc empty": (with_tensor("W_enc", torch.zeros(D_IN, 0)), "W_enc"),
    "W_enc of integers": (with_tensor("W_enc", torch.zeros(D_IN, D_SAE, dtype=torch.int64)), "W_enc"),
    "W_enc of bytes": (with_tensor("W_enc", torch.zeros(D_IN, D_SAE, dtype=torch.uint8)), "W_enc"),
    "W_enc NaN": (with_tensor("W_enc", spoiled("W_enc", float("nan"))), "W_enc"),
    "W_enc infinite": (with_tensor("W_enc", spoiled("W_enc", float("inf"))), "W_enc"),
    "b_enc NaN": (with_tensor("b_enc", spoiled("b_enc", float("nan"))), "b_enc"),
    "b_dec infinite": (with_tensor("b_dec", spoiled("b_dec", float("-inf"))), "b_dec"),
    "b_enc too short": (with_tensor("b_enc", torch.zeros(D_SAE - 1)), "b_enc"),
    "b_dec too long": (with_tensor("b_dec", torch.zeros(D_SAE)), "b_dec"),
    "threshold missing": (
        edited(
            lambda folder: saelens(folder, architecture="jumprelu"), WEIGHTS, lambda path: save_file(tensors(), path)
        ),
        "threshold",
    ),
    "threshold too short": (with_tensor("threshold", torch.zeros(3), architecture="jumprelu"), "threshold"),
    "threshold NaN": (
        with_tensor("threshold", torch.full((D_SAE,), float("nan")), architecture="jumprelu"),
        "threshold",
    ),
    # configs
    "no config": (edited(saelens, CONFIG, Path.unlink), r"cfg\.json|config"),
    "config no JSON": (with_config(b"{architecture: standard}"), CONFIG),
    "config a list": (with_config(b"[1, 2]"), CONFIG),
    "config empty": (with_config(b""), CONFIG),
    "config nested": (with_config(b'{"a":' * 100_000), CONFIG),
    "config no text": (with_config(bytes(range(128, 256))), CONFIG),
    "config a number of a million digits": (with_config(b'{"d_in": ' + b"9" * 1_000_000 + b"}"), CONFIG),
    "architecture unknown": (lambda folder: saelens(folder, architecture="crystal"), "crystal"),
    "architecture a list": (lambda folder: saelens(folder, architecture=["standard"]), "architecture"),
    "matching pursuit": (lambda folder: saelens(folder, architecture="matching_pursuit"), "matching_pursuit"),
    "temporal": (lambda folder: saelens(folder, architecture="temporal"), "temporal"),
    "k negative": (lambda folder: saelens(folder, architecture="topk", k=-1), r"\bk\b"),
    "k zero": (lambda folder: saelens(folder, architecture="topk", k=0), r"\bk\b"),
    "k over d_sae": (lambda folder: saelens(folder, architecture="topk", k=D_SAE + 1), r"\bk\b"),
    "k a fraction": (lambda folder: saelens(folder, architecture="topk", k=2.5), r"\bk\b"),
    "k a word": (lambda folder: saelens(folder, architecture="topk", k="many"), r"\bk\b"),
    "k missing": (lambda folder: saelens(folder, architecture="topk"), r"\bk\b"),
    "d_sae absurd": (lambda folder: saelens(folder, d_sae=LONG), "d_sae|W_enc"),
    "d_in negative": (lambda folder: saelens(folder, d_in=-D_IN), "d_in|W_enc"),
    "d_in a word": (lambda folder: saelens(folder, d_in="eight"), "d_in"),
    "normalisation unknown": (lambda folder: saelens(folder, normalize_activations="magic"), "normalize_activations"),
    "hook a number": (lambda folder: saelens(folder, metadata={"hook_name": 7}), "hook_name"),
    "metadata a list": (lambda folder: saelens(folder, metadata=[1]), "metadata"),
    # pickles and .pt files
    "payload in a .pt": (lambda folder: pickled(folder, dictionary_learning), r"ae\.pt would run code"),
    "payload in a legacy .pt": (
        lambda folder: pickled(folder, dictionary_learning, legacy=True),
        r"ae\.pt would run code",
    ),
    "payload in a Qwen-Scope .pt": (lambda folder: pickled(folder, qwen_scope), r"layer1\.sae\.pt would run code"),
    "a module in a .pt": (lambda folder: dictionary_learning(folder, torch.nn.Linear(D_IN, D_SAE)), r"ae\.pt"),
    "a list in a .pt": (lambda folder: dictionary_learning(folder, [torch.zeros(3)]), r"ae\.pt"),
    "a .pt cut short": (edited(dictionary_learning, "ae.pt", lambda path: cut(path, 0.7)), r"ae\.pt"),
    "a .pt of noise": (
        edited(dictionary_learning, "ae.pt", lambda path: path.write_bytes(bytes(range(256)))),
        r"ae\.pt",
    ),
    "a .pt that unpacks without end": (pt_bomb, r"ae\.pt"),
    "a .pt with a tensor larger than itself": (
        state_with(**{"encoder.weight": torch.zeros(1, 1).expand(1 << 20, 1 << 20)}),
        r"encoder\.weight",
    ),
    "a .pt with a sparse tensor": (
        state_with(**{"encoder.weight": torch.eye(D_SAE)[:, :D_IN].to_sparse()}),
        r"encoder\.weight",
    ),
    "a .pt with complex weights": (
        state_with(**{"encoder.weight": torch.zeros(D_SAE, D_IN, dtype=torch.complex64)}),
        r"encoder\.weight",
    ),
    "a .pt without its encoder": (state_with(**{"encoder.weight": None}), r"ae\.pt has no tensor"),
    "a .pt with a bias of the wrong length": (state_with(**{"encoder.bias": torch.zeros(3)}), r"encoder\.bias"),
    "a dictionary of an unknown class": (lambda folder: dictionary_learning(folder, dict_class="Oracle"), "Oracle"),
    "a dictionary whose class is a number": (lambda folder: dictionary_learning(folder, dict_class=3), "dict_class"),
    "a dictionary with k over its size": (
        lambda folder: dictionary_learning(
            folder, {**top_k_state(), "k": torch.tensor(99)}, dict_class="AutoEncoderTopK"
        ),
        r"\bk\b",
    ),
    "a Qwen-Scope without b_enc": (
        lambda folder: qwen_scope(folder, {"W_enc": tensors()["W_enc"].T, "b_dec": torch.zeros(D_IN)}),
        "b_enc",
    ),
    # .npz files
    "objects in an .npz": (array_of_objects, r"params\.npz"),
    "an .npz cut short": (edited(gemma_scope, "params.npz", lambda path: cut(path, 0.6)), r"params\.npz"),
    "an .npz that unpacks without end": (npz_bomb, r"params\.npz"),
    "an .npz with an absurd shape": (
        lambda folder: npz_with_header(
            folder, f"{{'descr': '<f4', 'fortran_order': False, 'shape': ({LONG}, {LONG})}}"
        ),
        "W_enc",
    ),
    "an .npz with a negative shape": (
        lambda folder: npz_with_header(folder, NPY_HEADER.format(-8, -24)),
        r"W_enc|params\.npz",
    ),
    "an .npz with code for a header": (
        lambda folder: npz_with_header(folder, "__import__('os').system('touch ran')"),
        r"params\.npz",
    ),
    "an .npz of text": (lambda folder: gemma_scope(folder, W_enc=np.full((D_IN, D_SAE), "x")), "W_enc"),
    "an .npz without threshold": (lambda folder: gemma_scope(folder, threshold=None), "threshold"),
    "an .npz with a short threshold": (
        lambda folder: gemma_scope(folder, threshold=np.ones(3, np.float32)),
        "threshold",
    ),
    # sparsify, Llama Scope, bare tensors
    "sparsify without encoder": (lambda folder: sparsify(folder, missing="encoder.weight"), r"encoder\.weight"),
    "sparsify with k over its latents": (lambda folder: sparsify(folder, k=D_SAE + 1), r"\bk\b"),
    "sparsify with an unknown activation": (lambda folder: sparsify(folder, activation="crystal"), "activation"),
    "Llama Scope with a word for a norm": (
        lambda folder: llama_scope(folder, dataset_average_activation_norm={"in": "ten"}),
        "dataset_average_activation_norm",
    ),
    "Llama Scope with a norm of zero": (
        lambda folder: llama_scope(folder, dataset_average_activation_norm={"in": 0.0, "out": 0.0}),
        "dataset_average_activation_norm",
    ),
    "Llama Scope with a word for a threshold": (
        lambda folder: llama_scope(folder, jump_relu_threshold="high"),
        "jump_relu_threshold",
    ),
    "tensors that are no SAE": (
        edited(named, "encoder.safetensors", lambda path: save_file({"x": torch.zeros(3)}, path)),
        r"encoder\.safetensors",
    ),
    "an empty folder": (lambda folder: folder, "SAE"),
    "a file of nothing": (
        edited(named, "encoder.safetensors", lambda path: path.write_bytes(b"")),
        r"encoder\.safetensors",
    ),
}


@pytest.mark.parametrize("name", CASES)
def test_one_clear_line_and_nothing_is_run(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    build, says = CASES[name]
    folder = tmp_path / "sae"
    folder.mkdir()
    monkeypatch.chdir(tmp_path)
    found = build(folder)
    with pytest.raises(InputError, match=says) as raised:
        encode(load_sae(found), np.ones((2, D_IN), np.float32))
    line = str(raised.value)
    assert "\n" not in line
    assert str(folder) in line
    assert len(line) < 600
    assert not list(tmp_path.rglob("ran"))


def test_there_are_sixty_of_them() -> None:
    assert len(CASES) >= 60


def test_the_command_says_one_line_and_exits_with_2(tmp_path: Path) -> None:
    found = pickled(tmp_path, dictionary_learning)
    ran = subprocess.run(
        [sys.executable, "-m", "sts_fast", "doctor", "--sae", found], capture_output=True, text=True, check=False
    )
    assert (ran.returncode, ran.stdout) == (2, "")
    assert ran.stderr.startswith("error: ")
    assert ran.stderr.count("\n") == 1
    assert not (tmp_path / "ran").exists()


def test_bombs_take_no_memory(tmp_path: Path) -> None:
    """Peak memory, in a process of its own, of reading archives that would unpack to 200 MB each."""
    saes = []
    for build in (pt_bomb, npz_bomb):
        folder = tmp_path / build.__name__
        folder.mkdir()
        saes.append(str(build(folder)))
    script = (
        "import resource, sys, torch, numpy, zipfile\n"
        "from sts_fast import load_sae, InputError\n"
        "before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss\n"
        "for sae in sys.argv[1:]:\n"
        "    try:\n        load_sae(sae)\n        sys.exit('it was read')\n    except InputError:\n        pass\n"
        "print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before)\n"
    )
    ran = subprocess.run([sys.executable, "-c", script, *saes], capture_output=True, text=True, check=True)
    assert int(ran.stdout) < 100_000  # kB
