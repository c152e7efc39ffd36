"""Names of the places in a model where SAEs read, as strings."""

from __future__ import annotations

import re

from sts_fast.errors import InputError

OTHER_TOWERS = ("vision", "visual", "audio", "expert", "encoder")

# The places of a layer, by the names that SAEs give them.
PLACES = {
    "resid_pre": "the residual stream before the layer",
    "attn_out": "what attention adds to it",
    "resid_mid": "the residual stream between attention and MLP",
    "mlp_normalized": "what enters the MLP, normed, before the norm's gain and bias",
    "mlp_in": "what enters the MLP, normed",
    "mlp_out": "what the MLP adds",
    "resid_post": "the residual stream after the layer",
    "hook_z": "attention's heads, before its output projection",
}
# Places that TransformerLens names after a module in the layer.
INNER = {"hook_z": "attn.hook_z", "mlp_normalized": "ln2.hook_normalized"}
SPELLINGS = {
    **{f"hook_{place}": place for place in PLACES if place != "hook_z"},
    **{"attn.hook_z": "hook_z", "hook_z": "hook_z", "attn.hook_out": "attn_out"},
    **{
        "ln2.hook_normalized": "mlp_normalized",
        "mlp.hook_in": "mlp_in",
        "mlp.hook_out": "mlp_out",
        "hook_in": "resid_pre",
        "hook_out": "resid_post",
    },
}


def place_name(place: str, layer: int) -> str:
    """The full name of a place of a layer: ('mlp_out', 25) is 'blocks.25.hook_mlp_out'.

    Raises InputError for what is no such place.
    """
    place = place.removeprefix("hook_") if place != "hook_z" else place
    if place not in PLACES:
        raise InputError(f"'{place}' is not one of the places of a layer: {', '.join(PLACES)}")
    return f"blocks.{layer}." + INNER.get(place, f"hook_{place}")


def split_name(name: str) -> tuple[str, int | None]:
    """A hook's place and layer: ('mlp_out', 25) for 'blocks.25.hook_mlp_out'; for a module, its path and layer.

    A layer of a vision or audio tower is none of the decoder's.
    """
    match = re.fullmatch(r"blocks\.(\d+)\.([\w.]+)", name)
    if match and match[2] in SPELLINGS:
        return SPELLINGS[match[2]], int(match[1])
    number = re.search(r"(?:^|\.)(\d+)(?:\.|$)", name)
    if number and any(tower in name[: number.start()] for tower in OTHER_TOWERS):
        return name, None
    if match := re.fullmatch(r"(?:[a-z_]+\.)*(?:layers|h|blocks)\.(\d+)(\.output|\.input)?", name):
        return "resid_pre" if match[2] == ".input" else "resid_post", int(match[1])
    return name, int(number[1]) if number else None


def layer_of(place: str | int, n_layers: int, *, name: str) -> int | None:
    """Index of the decoder layer that a place belongs to; None outside of the layers.

    Raises InputError where the model, called `name`, has no such layer.
    """
    layer = place if isinstance(place, int) else split_name(place)[1]
    if layer is not None and not 0 <= layer < n_layers:
        raise InputError(f"{name} has layers 0 to {n_layers - 1}, but layer {layer} is to be read")
    return layer
