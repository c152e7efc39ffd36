"""circuit-tracer: a transcoder for each layer, layer_N.safetensors, beside a config.yaml that names their hooks."""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import yaml

from sts_fast.errors import InputError
from sts_fast.sae.checkpoint import Checkpoint
from sts_fast.sae.config import Config
from sts_fast.sae.decoder import Decoder
from sts_fast.sae.sae import SAE

FILE = re.compile(r"layer_(\d+)\.safetensors")
CONFIG_FILE = "config.yaml"
THRESHOLD = "activation_function.threshold"
KIND = "transcoder_set"


def recognises(path: Path, shapes: Mapping[str, tuple[int, ...]]) -> bool:
    """True where W_enc is [d_sae, d_in], as W_dec is, and the file's or a tensor's name is the library's too."""
    has_name = FILE.fullmatch(path.name) or THRESHOLD in shapes or "W_skip" in shapes
    return bool(has_name) and len(shapes.get("W_enc", ())) == 2 and shapes["W_enc"] == shapes.get("W_dec")


def read(path: Path, *, dtype: str | None = None) -> SAE:
    """A transcoder: JumpReLU with a threshold, TopK with k, else ReLU. b_dec is never subtracted from its input.

    Its hooks and model come from config.yaml. Of the k largest, those that are not positive do not fire.
    Raises InputError where the config asks for an activation or kind that is not supported.
    """
    folder, match = path.parent, FILE.fullmatch(path.name)
    config = _config(folder / CONFIG_FILE)
    file = Checkpoint(path)
    W_enc = file.matrix("W_enc", (None, None), transposed=True)
    d_in, d_sae = W_enc.shape
    b_enc, b_dec = file.vector("b_enc", d_sae), file.vector("b_dec", d_in)
    W_dec = file.matrix("W_dec", (d_sae, d_in))
    W_skip = file.matrix("W_skip", (d_in, d_in), transposed=True) if "W_skip" in file.shapes else None
    kind, activation = config.text("model_kind", KIND), config.text("activation")
    if kind != KIND:
        raise InputError(f"{config.where}: model_kind '{kind[:40]}' is not supported: use a {KIND}")
    if activation not in ("", "relu", "topk", "jumprelu"):
        raise InputError(f"{config.where}: activation '{activation[:40]}' is not supported: use relu, jumprelu or topk")
    own: dict[str, Any] = {}
    if activation == "topk" or (not activation and "k" in file.shapes):
        own["k"] = (config if config.has("k") else Config(path, {"k": _k(file)})).k(d_sae)
    elif activation == "jumprelu" or (not activation and THRESHOLD in file.shapes):
        own["threshold"] = file.vector(THRESHOLD, d_sae, or_number=True)
    place_in, place_out = config.text("feature_input_hook"), config.text("feature_output_hook")
    layer = match[1] if match else ""
    has_place = bool(place_in and layer)
    model_name = config.text("model_name")
    file.refuse_unread()
    config.refuse_unread("scan", "transcoders", "revision", "subfolder")
    return SAE(
        architecture="topk" if "k" in own else "jumprelu" if own else "standard",
        W_enc=W_enc.whole(dtype),
        b_enc=b_enc,
        b_dec=b_dec,
        **own,
        apply_b_dec_to_input=False,
        hook_name=f"blocks.{layer}.{place_in}" if has_place else "",
        target_hook_name=f"blocks.{layer}.{place_out}" if has_place and place_out else "unknown",
        model_name=model_name,
        prepend_bos=True,
        decoder=Decoder(W_dec, b_dec, W_skip),
        source=str(path),
        layout="circuit-tracer",
        origin={
            "architecture": "its tensors" if not activation else f"{CONFIG_FILE}: activation",
            "d_in": "W_enc",
            "d_sae": "W_enc",
            **({"k": CONFIG_FILE if config.has("k") else path.name} if "k" in own else {}),
            **({"threshold": THRESHOLD} if "threshold" in own else {}),
            **({"hook_name": f"{CONFIG_FILE}: feature_input_hook"} if has_place else {}),
            **({"model_name": CONFIG_FILE} if config.has("model_name") else {}),
            "input_norm": "circuit-tracer has none",
            "apply_b_dec_to_input": "circuit-tracer's convention",
        },
    )


def _config(path: Path) -> Config:
    if not path.is_file():
        return Config(path, {})
    try:
        values = yaml.safe_load(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, yaml.YAMLError) as error:
        raise InputError(f"{path} is not readable YAML: copy or download it again") from error
    if not isinstance(values, dict) or not all(isinstance(key, str) for key in values):
        raise InputError(f"{path} does not hold names with values: copy or download it again")
    return Config(path, values)


def _k(file: Checkpoint) -> int | None:
    return int(file.number("k")) if "k" in file.shapes else None
