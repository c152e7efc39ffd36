"""Summary of an SAE's properties in words, each with the file or key that it was read from."""

from __future__ import annotations

from sts_fast.places import split_name
from sts_fast.sae.sae import SAE

MISSING = "not said"
NORMS = {
    "none": "none",
    "layer_norm": "layer_norm of every row",
    "constant_norm_rescale": "every row scaled to the norm sqrt(d_in)",
}


def summary(sae: SAE) -> dict[str, str]:
    """Text by name of the property, with its origin, a file or key, in brackets."""
    lines = {
        "SAE": sae.source,
        "layout": sae.layout or "made by hand",
        "architecture": _from(sae, sae.architecture + (f", k = {sae.k}" if sae.k else ""), "architecture", "k"),
        "widths": _from(sae, f"d_in {sae.d_in}, d_sae {sae.d_sae}, {_dtype(sae)}", "d_in"),
        "trained on": _from(sae, sae.model_name, "model_name"),
        "hook": _from(sae, sae.hook_name + _layer(sae), "hook_name"),
        "predicts": _from(sae, sae.target_hook_name, "target_hook_name"),
        "normalisation": _from(sae, _normalisation(sae), "input_scale" if sae.input_scale != 1 else "input_norm"),
        "b_dec": _from(
            sae,
            "subtracted from the input" if sae.apply_b_dec_to_input else "not subtracted from the input",
            "apply_b_dec_to_input",
        ),
        "threshold": _from(sae, "of each feature" if sae.threshold is not None else "", "threshold"),
        "folding": ", ".join(_folded(sae)) or "nothing",
        "mean L0": _from(sae, "" if sae.l0 is None else f"{sae.l0:g}", "l0"),
        "decoder": "on disk, read by rows" if sae.decoder else "",
        "notes": "; ".join(sae.notes) or "none",
    }
    missing = [name for name in ("trained on", "hook", "mean L0", "decoder") if not lines[name]]
    optional = ("predicts", "threshold")
    shown = {name: line or MISSING for name, line in lines.items() if line or name not in optional}
    return shown | {"missing": ", ".join(missing) or "nothing"}


def _from(sae: SAE, value: str, *fields: str) -> str:
    origins = ", ".join(dict.fromkeys(sae.origin[field] for field in fields if sae.origin.get(field)))
    return f"{value} [{origins}]" if value and origins else value


def _dtype(sae: SAE) -> str:
    return str(sae.W_enc.dtype).removeprefix("torch.")


def _layer(sae: SAE) -> str:
    place, layer = split_name(sae.hook_name)
    if place not in ("resid_pre", "resid_post"):
        return ""
    return f" (read {'after' if place == 'resid_post' else 'before'} layer {layer})"


def _normalisation(sae: SAE) -> str:
    if sae.input_scale != 1:
        return f"rows are multiplied by {sae.input_scale:.6g}"
    return NORMS[sae.input_norm]


def _folded(sae: SAE) -> list[str]:
    """Parts of the SAE that are folded into the core's biases and scales; it computes one product and an activation."""
    folded = []
    if sae.apply_b_dec_to_input and sae.b_dec.any():
        folded.append("b_dec W_enc into the biases")
    if sae.input_scale != 1:
        folded.append("the input's scale into the features' scale")
    if sae.W_dec_norm is not None:
        folded.append("the norms of W_dec into scale and biases")
    if sae.r_mag is not None:
        folded.append("exp(r_mag) into the scale")
    return folded
