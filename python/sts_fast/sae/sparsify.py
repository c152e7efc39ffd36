"""EleutherAI's sparsify: a folder, named after the module it reads, of cfg.json and sae.safetensors."""

from __future__ import annotations

from pathlib import Path

from sts_fast.errors import InputError
from sts_fast.sae.checkpoint import Checkpoint
from sts_fast.sae.config import Config
from sts_fast.sae.decoder import Decoder
from sts_fast.sae.sae import SAE

CONFIG_FILE, WEIGHTS_FILE = "cfg.json", "sae.safetensors"


def read(folder: Path, *, dtype: str | None = None) -> SAE:
    """A TopK SAE, which always subtracts b_dec, or a transcoder, which never does.

    Its weights are encoder.weight [d_sae, d_in] and W_dec [d_sae, d_in].
    """
    config = Config.read(folder / CONFIG_FILE)
    file = Checkpoint(folder / WEIGHTS_FILE)
    if config.text("activation", "topk") != "topk":
        raise InputError(
            f"{config.where}: activation '{config.text('activation')[:40]}' is not supported: use an SAE with topk"
        )
    if config.flag("signed"):
        raise InputError(f"{config.where}: signed is not supported: use an SAE whose features are not negative")
    W_enc = file.matrix("encoder.weight", (None, None), transposed=True)
    d_in, d_sae = W_enc.shape
    config.check_widths(d_in=d_in, **({"num_latents": d_sae} if config.whole("num_latents") else {}))
    is_transcoder = config.flag("transcode")
    b_dec = file.vector("b_dec", d_in)
    W_skip = file.matrix("W_skip", (d_in, d_in), transposed=True) if config.flag("skip_connection") else None
    W_dec = file.matrix("W_dec", (d_sae, d_in)) if "W_dec" in file.shapes else None
    k, b_enc = config.k(d_sae), file.vector("encoder.bias", d_sae)
    file.refuse_unread()
    config.refuse_unread()
    run = folder.parent / "config.json"
    run_config = Config.read(run) if run.is_file() else Config(run, {})
    module = folder.name
    return SAE(
        architecture="topk",
        W_enc=W_enc.whole(dtype),
        b_enc=b_enc,
        b_dec=b_dec,
        k=k,
        apply_b_dec_to_input=not is_transcoder,
        hook_name=f"{module}.input" if is_transcoder else module,
        target_hook_name=module if is_transcoder else "",
        model_name=run_config.text("model"),
        prepend_bos=True,
        decoder=None if W_dec is None else Decoder(W_dec, b_dec, W_skip),
        source=str(folder),
        layout="sparsify",
        origin={
            "architecture": f"{CONFIG_FILE}: activation",
            "d_in": "encoder.weight",
            "d_sae": "encoder.weight",
            "k": CONFIG_FILE,
            "hook_name": "the folder's name",
            "input_norm": "sparsify has none",
            "apply_b_dec_to_input": f"{CONFIG_FILE}: transcode" if is_transcoder else "sparsify's convention",
            **({"model_name": "../config.json"} if run_config.has("model") else {}),
        },
    )
