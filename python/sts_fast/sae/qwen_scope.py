"""Qwen-Scope: a file layerN.sae.pt for each layer, in a repository named after the model and k."""

from __future__ import annotations

import re
from pathlib import Path

from sts_fast.errors import InputError
from sts_fast.sae.checkpoint import Checkpoint
from sts_fast.sae.config import Config
from sts_fast.sae.decoder import Decoder
from sts_fast.sae.sae import SAE

FILE = re.compile(r"layer(\d+)\.sae\.pt")


def read(path: Path, *, dtype: str | None = None) -> SAE:
    """A TopK SAE; W_enc is [d_sae, d_in] and W_dec [d_in, d_sae] in the file, and b_dec is not subtracted."""
    file = Checkpoint(path)
    W_enc = file.matrix("W_enc", (None, None), transposed=True)
    d_in, d_sae = W_enc.shape
    repository = re.search(r"SAE-Res-(.+?)-W\d+K-L0_(\d+)", str(path.absolute()))
    k_origin = path.name if file.values.has("k") else "its folder's name"
    if not file.values.has("k") and not repository:
        raise InputError(
            f"{path} does not contain its k: keep it in a folder named as its repository, which ends in k (…-L0_50)"
        )
    values = file.values if file.values.has("k") or not repository else Config(path, {"k": int(repository[2])})
    layer = FILE.fullmatch(path.name)
    b_dec, b_enc = file.vector("b_dec", d_in), file.vector("b_enc", d_sae)
    W_dec = file.matrix("W_dec", (d_sae, d_in), transposed=True) if "W_dec" in file.shapes else None
    file.refuse_unread()
    return SAE(
        architecture="topk",
        W_enc=W_enc.whole(dtype),
        b_enc=b_enc,
        b_dec=b_dec,
        k=values.k(d_sae),
        apply_b_dec_to_input=False,
        hook_name=f"blocks.{layer[1]}.hook_resid_post" if layer else "",
        model_name=f"Qwen/{repository[1]}" if repository else "",
        prepend_bos=True,
        decoder=None if W_dec is None else Decoder(W_dec, b_dec),
        source=str(path),
        layout="Qwen-Scope",
        origin={
            "architecture": "Qwen-Scope's only one",
            "d_in": "W_enc",
            "d_sae": "W_enc",
            "k": k_origin,
            "hook_name": "the file's name",
            "input_norm": "Qwen-Scope has none",
            "apply_b_dec_to_input": "Qwen-Scope's convention",
            **({"model_name": "its folder's name"} if repository else {}),
        },
    )
