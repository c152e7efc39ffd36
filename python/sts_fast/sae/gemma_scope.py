"""Gemma Scope: params.npz in folders named by layer and width; Gemma Scope 2: params.safetensors beside config.json."""

from __future__ import annotations

import math
import re
from pathlib import Path

from sts_fast.errors import InputError
from sts_fast.sae.checkpoint import Checkpoint
from sts_fast.sae.config import Config
from sts_fast.sae.decoder import Decoder
from sts_fast.sae.sae import SAE

WEIGHTS_FILES = ("params.npz", "params.safetensors")
CONFIG_FILE = "config.json"
PATH, ASSUMED = "the path", "assumed, as the path does not say"


def read(folder: Path, *, dtype: str | None = None) -> SAE:
    """A JumpReLU SAE or transcoder; b_dec is not subtracted from its input.

    Its hook, model and L0 come from config.json, or from the names of its folders as on the hub.
    """
    file = Checkpoint(next(folder / name for name in WEIGHTS_FILES if (folder / name).is_file()))
    names = {name.lower(): name for name in file.shapes}

    def called(name: str) -> str:
        return names.get(name, name)

    W_enc = file.matrix(called("w_enc"), (None, None))
    d_in, d_sae = W_enc.shape
    d_out = (file.shapes.get(called("b_dec")) or (d_in,))[0]
    b_dec = file.vector(called("b_dec"), d_out)
    is_cross_layer = len(file.shapes.get(called("w_dec"), ())) == 3
    config = Config.read(folder / CONFIG_FILE) if (folder / CONFIG_FILE).is_file() else Config(folder, {})
    if config.text("architecture", "jump_relu") != "jump_relu":
        raise InputError(f"{config.where}: architecture '{config.text('architecture')[:40]}' is not jump_relu")
    place = _place(folder, config)
    skip = called("affine_skip_connection")
    has_skip = skip in file.shapes
    if config.flag("affine_connection", has_skip) != has_skip:
        raise InputError(f"{config.where} and {file.path.name} differ about affine_connection: download both again")
    decoder = None
    if called("w_dec") in file.shapes and not is_cross_layer:
        decoder = Decoder(
            file.matrix(called("w_dec"), (d_sae, d_out)),
            b_dec,
            file.matrix(skip, (d_in, d_out)) if has_skip else None,
        )
    b_enc, threshold = (file.vector(called(name), d_sae) for name in ("b_enc", "threshold"))
    file.refuse_unread(*((called("w_dec"), skip) if is_cross_layer else ()))
    is_embedding = place["hook_name"][0] == "hook_embed"
    l0 = config.number("l0")
    config.refuse_unread("width", "type", "site", "l0_target", "size")
    if l0 is None and (match := re.search(r"average_l0_(\d+)", str(folder))):
        l0 = float(match[1])
    return SAE(
        architecture="jumprelu",
        W_enc=W_enc.whole(dtype),
        b_enc=b_enc,
        b_dec=b_dec,
        threshold=threshold,
        apply_b_dec_to_input=False,
        # SAEs of the embedding were trained without Gemma's factor of sqrt(d_in).
        input_scale=1 / math.sqrt(d_in) if is_embedding else 1.0,
        hook_name=place["hook_name"][0],
        target_hook_name=place["target_hook_name"][0],
        model_name=place["model_name"][0],
        prepend_bos=True,
        l0=l0,
        decoder=decoder,
        source=str(folder),
        layout="Gemma Scope 2" if file.path.suffix == ".safetensors" else "Gemma Scope",
        notes=("its decoder writes to several layers, and is not used",) if is_cross_layer else (),
        origin={
            "architecture": "Gemma Scope's only one",
            "d_in": called("w_enc"),
            "d_sae": called("w_enc"),
            "threshold": file.path.name,
            "input_norm": "Gemma Scope has none",
            "apply_b_dec_to_input": "Gemma Scope's convention",
            **{key: origin for key, (value, origin) in place.items() if value},
            **({"l0": CONFIG_FILE if config.has("l0") else PATH} if l0 else {}),
        },
    )


def _place(folder: Path, config: Config) -> dict[str, tuple[str, str]]:
    """hook_name, target_hook_name and model_name, each as (value, origin)."""
    path = str(folder.absolute())
    fields = {"hook_name": ("", ""), "target_hook_name": ("", ""), "model_name": _model(path)}
    if config.has("model_name"):
        fields["model_name"] = (config.text("model_name"), CONFIG_FILE)
    if config.has("hf_hook_point_in"):
        # 'model.layers.3.output' is the module itself; '.input' stays in the name.
        # An SAE's config has the same place as its output.
        read, predicted = (config.text(f"hf_hook_point_{side}").removesuffix(".output") for side in ("in", "out"))
        fields["hook_name"] = (read, CONFIG_FILE)
        fields["target_hook_name"] = ("" if predicted == read else predicted, CONFIG_FILE)
        return fields
    match = re.search(r"layer_(\d+)", path)
    if match is None:
        return fields | ({"hook_name": ("hook_embed", PATH)} if "embedding" in path else {})
    layer, parts = match[1], path.lower()
    if "transcoder" in parts:
        if "gemma-scope-2-" in parts or config.values:
            hook = f"model.layers.{layer}.pre_feedforward_layernorm"
            fields["target_hook_name"] = (f"model.layers.{layer}.post_feedforward_layernorm", PATH)
        else:
            hook = f"blocks.{layer}.ln2.hook_normalized"
            fields["target_hook_name"] = (f"blocks.{layer}.hook_mlp_out", PATH)
        return fields | {"hook_name": (hook, PATH)}
    for pattern, place in ((r"mlp_out|-mlp\b", "hook_mlp_out"), (r"attn_out|-att\b", "attn.hook_z")):
        if re.search(pattern, parts):
            return fields | {"hook_name": (f"blocks.{layer}.{place}", PATH)}
    origin = PATH if re.search(r"resid_post|-res\b", parts) else ASSUMED
    return fields | {"hook_name": (f"blocks.{layer}.hook_resid_post", origin)}


def _model(path: str) -> tuple[str, str]:
    if match := re.search(r"gemma-scope-2-(\w+)-(pt|it)", path):
        return f"google/gemma-3-{match[1]}-{match[2]}", PATH
    if match := re.search(r"gemma-scope-(\d+b)-(pt|it)", path):
        return f"google/gemma-2-{match[1]}" + ("-it" if match[2] == "it" else ""), PATH
    return "", ""
