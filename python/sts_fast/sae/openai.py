"""OpenAI's sparse_autoencoder: a file for each layer, with pre_bias, latent_bias and the name of its activation."""

from __future__ import annotations

import re
from pathlib import Path

from sts_fast.errors import InputError
from sts_fast.sae.checkpoint import Checkpoint
from sts_fast.sae.decoder import Decoder
from sts_fast.sae.sae import SAE

MARK = "latent_bias"  # a tensor that no other layout has
ASSUMED = "the file does not name its activation: it is assumed to be ReLU, on inputs that are not normalised"
# Folders of the published SAEs of gpt2-small, with the place that they mean.
PLACES = {
    "resid_delta_attn": "hook_attn_out",
    "resid_post_attn": "hook_resid_mid",
    "resid_delta_mlp": "hook_mlp_out",
    "resid_post_mlp": "hook_resid_post",
}
PUBLISHED = re.compile(rf"({'|'.join(PLACES)})(?:_v\w+)?/autoencoders/(\d+)\.\w+")


def read(path: Path, *, dtype: str | None = None) -> SAE:
    """A ReLU SAE, or a TopK SAE on layer-normed inputs; pre_bias is subtracted, after the normalisation.

    As in the library, the name 'TopK' of the activation also says that each token's input is normalised.
    Raises InputError for other activations.
    """
    file = Checkpoint(path)
    W_enc = file.matrix("encoder.weight", (None, None), transposed=True)
    d_in, d_sae = W_enc.shape
    b_enc, b_dec = file.vector("latent_bias", d_sae), file.vector("pre_bias", d_in)
    # A tied decoder contains the encoder's matrix.
    tied = "decoder.linear.weight" in file.shapes
    name = "decoder.linear.weight" if tied else "decoder.weight"
    W_dec = file.matrix(name, (d_sae, d_in), transposed=not tied) if name in file.shapes else None
    activation = file.values.text("activation", "ReLU")
    state = file.values.part("activation_state_dict")
    after = state.text("postact_fn", "ReLU")
    if activation not in ("ReLU", "TopK") or after != "ReLU":
        wrong = activation if activation not in ("ReLU", "TopK") else f"{activation} with {after}"
        raise InputError(f"{path}: activation '{wrong[:40]}' is not supported: use an SAE with ReLU or TopK")
    is_topk = activation == "TopK"
    k = state.k(d_sae) if is_topk else 0
    state.refuse_unread()
    file.refuse_unread()
    place = PUBLISHED.search(path.absolute().as_posix())
    has_activation = file.values.has("activation")
    said = f"{path.name}: activation" if has_activation else "assumed"
    return SAE(
        architecture="topk" if is_topk else "standard",
        W_enc=W_enc.whole(dtype),
        b_enc=b_enc,
        b_dec=b_dec,
        k=k,
        input_norm="layer_norm" if is_topk else "none",
        hook_name=f"blocks.{place[2]}.{PLACES[place[1]]}" if place else "",
        model_name="gpt2-small" if place else "",
        decoder=None if W_dec is None else Decoder(W_dec, b_dec),
        source=str(path),
        layout="OpenAI",
        notes=() if has_activation else (ASSUMED,),
        origin={
            "architecture": said,
            "d_in": "encoder.weight",
            "d_sae": "encoder.weight",
            **({"k": f"{path.name}: activation_state_dict"} if is_topk else {}),
            **({"hook_name": "the path", "model_name": "the path"} if place else {}),
            "input_norm": said,
            "apply_b_dec_to_input": "OpenAI's convention",
        },
    )
