"""A lone file of named tensors: safetensors, .pt or .npz without a config."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import numpy as np

from sts_fast.errors import InputError
from sts_fast.sae.checkpoint import Checkpoint, Matrix
from sts_fast.sae.config import Config
from sts_fast.sae.decoder import Decoder
from sts_fast.sae.sae import SAE

NAMES = {
    "W_enc": ("W_enc", "w_enc", "encoder.weight"),
    "b_enc": ("b_enc", "encoder.bias"),
    "W_dec": ("W_dec", "w_dec", "decoder.weight"),
    "b_dec": ("b_dec", "decoder.bias", "pre_bias", "bias"),
    "b_mag": ("b_mag", "mag_bias"),
    "b_gate": ("b_gate", "gate_bias"),
}
# A JumpReLU's threshold, or its logarithm, as it is called where the activation is a module of its own.
THRESHOLD = re.compile(
    r"((activation|activation_function|activation_fn|act|act_fn|jump_?relu|encoder)[._])*(log_)?(jump_?relu_)?threshold_?"
)
ASSUMED_B_DEC = "the file does not say whether {name} is subtracted from the input: it is assumed to be {taken}"


def read(path: Path, *, dtype: str | None = None) -> SAE:
    """An SAE by the names of its tensors: jumprelu with a threshold, gated with r_mag, topk with k, else ReLU.

    The lengths of the biases decide the orientation of W_enc. A bias called 'decoder.bias' is not subtracted from the
    input; any other b_dec is. Both are assumptions, and the notes say so.
    Raises InputError, with the names tried, where there is no W_enc or the biases leave its orientation open, and for a
    tensor of another name.
    """
    file = Checkpoint(path)
    names = {key: next((name for name in known if name in file.shapes), None) for key, known in NAMES.items()}
    names["threshold"] = next((name for name in sorted(file.shapes) if THRESHOLD.fullmatch(name)), None)
    if names["W_enc"] is None:
        raise InputError(
            f"{path} contains no encoder: looked for {', '.join(NAMES['W_enc'])}, but it has "
            f"{', '.join(sorted(file.shapes)[:8]) or 'no tensors'}"
        )
    W_enc = _oriented(file, names)
    d_in, d_sae = W_enc.shape

    def vector(key: str, width: int) -> Any:
        name = names.get(key, key)
        return np.zeros(width, np.float32) if name is None else file.vector(name, width)

    own: dict[str, Any] = {"b_enc": vector("b_enc", d_sae)}
    if "r_mag" in file.shapes:
        architecture = "gated"
        own |= {"b_enc": np.zeros(d_sae, np.float32), "r_mag": vector("r_mag", d_sae)}
        own |= {key: file.vector(names[key] or key, d_sae) for key in ("b_mag", "b_gate")}
    elif (threshold := names["threshold"]) is not None:
        architecture = "jumprelu"
        own["threshold"] = (
            file.exponential(threshold, d_sae) if "log_" in threshold else file.vector(threshold, d_sae, or_number=True)
        )
    elif "k" in file.shapes or file.values.has("k"):
        architecture = "topk"
        own["k"] = (Config(path, {"k": int(file.number("k"))}) if "k" in file.shapes else file.values).k(d_sae)
    else:
        architecture = "standard"
    subtracts = names["b_dec"] not in (None, "decoder.bias")
    b_dec = vector("b_dec", d_in)
    assumed = ASSUMED_B_DEC.format(name=names["b_dec"], taken="subtracted" if subtracts else "not subtracted")
    decoder = None
    if names["W_dec"] is not None:
        transposed = file.shapes[names["W_dec"]] == (d_in, d_sae)
        decoder = Decoder(file.matrix(names["W_dec"], (d_sae, d_in), transposed=transposed), b_dec)
    file.refuse_unread()
    origin = "the names of its tensors"
    return SAE(
        architecture=architecture,
        W_enc=W_enc.whole(dtype),
        b_dec=b_dec,
        **own,
        apply_b_dec_to_input=subtracts,
        decoder=decoder,
        source=str(path),
        layout="named tensors",
        needs_scaling=True,
        notes=(assumed,) if b_dec.any() else (),
        origin={
            "architecture": origin,
            "d_in": W_enc.name,
            "d_sae": W_enc.name,
            "input_norm": "assumed",
            "apply_b_dec_to_input": "assumed",
        },
    )


def _oriented(file: Checkpoint, names: dict[str, str | None]) -> Matrix:
    """W_enc [d_in, d_sae], transposed where the lengths of the biases require it.

    names: name in the file of each tensor of NAMES, None where the file has none
    """
    name = names["W_enc"] or ""
    shape = file.shapes[name]
    if len(shape) != 2:
        raise InputError(f"{file.path}: {name} has shape {list(shape)}, but a matrix is needed")
    per_feature = (names["b_enc"], names["b_gate"], names["threshold"])
    lengths = {file.shapes[key] for key in per_feature if key} - {(), (1,)}
    per_input = {file.shapes[key] for key in (names["b_dec"],) if key}
    fits = [
        transposed
        for transposed, (d_in, d_sae) in ((False, shape), (True, shape[::-1]))
        if lengths <= {(d_sae,)} and per_input <= {(d_in,)}
    ]
    if shape[0] == shape[1] or len(fits) == 2:
        # nn.Linear's convention for its names, the field's for W_enc.
        fits = [name == "encoder.weight"] if lengths or per_input else []
    if len(fits) != 1:
        raise InputError(
            f"{file.path}: {name} has shape {list(shape)}, and its biases do not show which width is d_in: "
            "name them b_enc [d_sae] and b_dec [d_in]"
        )
    return file.matrix(name, (None, None), transposed=fits[0])
