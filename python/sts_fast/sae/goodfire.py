"""Goodfire and DeepSeek-R1: one .pt file with two linear layers, named after its model and layer."""

from __future__ import annotations

import re
from pathlib import Path

from sts_fast.sae.checkpoint import Checkpoint
from sts_fast.sae.decoder import Decoder
from sts_fast.sae.sae import SAE

FILE = re.compile(r"(.+)-SAE-l(\d+)\.pth?")
# The file's name leaves the organisation out.
ORGANISATIONS = {"Llama-": "meta-llama", "DeepSeek-": "deepseek-ai"}


def read(path: Path, *, dtype: str | None = None) -> SAE:
    """A ReLU SAE; the decoder's bias is not subtracted from its input."""
    file = Checkpoint(path)
    encoder, decoder = (
        ("encoder_linear", "decoder_linear") if "encoder_linear.weight" in file.shapes else ("encoder", "decoder")
    )
    W_enc = file.matrix(f"{encoder}.weight", (None, None), transposed=True)
    d_in, d_sae = W_enc.shape
    b_dec = file.vector(f"{decoder}.bias", d_in)
    name = FILE.fullmatch(path.name)
    model = name[1] if name else ""
    organisation = next((owner for start, owner in ORGANISATIONS.items() if model.startswith(start)), "")
    W_dec = f"{decoder}.weight"
    rows = file.matrix(W_dec, (d_sae, d_in), transposed=True) if W_dec in file.shapes else None
    b_enc = file.vector(f"{encoder}.bias", d_sae)
    file.refuse_unread()
    return SAE(
        architecture="standard",
        W_enc=W_enc.whole(dtype),
        b_enc=b_enc,
        b_dec=b_dec,
        apply_b_dec_to_input=False,
        hook_name=f"blocks.{name[2]}.hook_resid_post" if name else "",
        model_name=f"{organisation}/{model}" if organisation else model,
        prepend_bos=True,
        decoder=None if rows is None else Decoder(rows, b_dec),
        source=str(path),
        layout="Goodfire",
        origin={
            "architecture": "Goodfire's only one",
            "d_in": f"{encoder}.weight",
            "d_sae": f"{encoder}.weight",
            "input_norm": "Goodfire has none",
            "apply_b_dec_to_input": "Goodfire's convention",
            **({"hook_name": "the file's name", "model_name": "the file's name"} if name else {}),
        },
    )
