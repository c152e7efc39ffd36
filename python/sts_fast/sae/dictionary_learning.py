"""dictionary_learning: ae.pt, and a config.json that names its class."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import numpy as np

from sts_fast.errors import InputError
from sts_fast.sae.checkpoint import Checkpoint
from sts_fast.sae.config import Config
from sts_fast.sae.decoder import Decoder
from sts_fast.sae.sae import SAE

CONFIG_FILE, WEIGHTS_FILE = "config.json", "ae.pt"

# By class: the core's architecture, and the tensor subtracted from the input ('' for none).
CLASSES = {
    "AutoEncoder": ("standard", "bias"),
    "AutoEncoderNew": ("standard", ""),
    "GatedAutoEncoder": ("gated", "decoder_bias"),
    "JumpReluAutoEncoder": ("jumprelu", ""),
    "AutoEncoderTopK": ("topk", "b_dec"),
    "BatchTopKSAE": ("jumprelu", "b_dec"),
    "MatryoshkaBatchTopKSAE": ("jumprelu", "b_dec"),
}
# Tensors that a class's encode at inference does not use.
UNUSED_TENSORS = {
    "AutoEncoderTopK": ("threshold",),
    "BatchTopKSAE": ("k",),
    "MatryoshkaBatchTopKSAE": ("k", "group_sizes", "active_groups"),
}
REFUSED = {
    "IdentityDict": "it has no weights",
    "CrossCoder": "it reads several layers at once",
    "BatchTopKCrossCoder": "it reads several layers at once",
}
# Options of its trainers that only they have.
OF_TRAINING = (
    "sparsity_function", "sparsity_queue_length", "n_sparsity_updates", "p_start", "p_end", "anneal_start",
    "anneal_end", "group_sizes",
)  # fmt: skip
READS_INPUT = "it reads the input of its submodule, not its output"
UNTRAINED_THRESHOLD = "its threshold is negative, as before training: it works as a ReLU SAE"


def read(path: Path, *, dtype: str | None = None) -> SAE:
    """An SAE of any of the library's classes, from its folder or its file.

    Features are those of the class's own encode at inference, on the weights as stored: the k largest of each row for
    AutoEncoderTopK, the learnt threshold for the batch variants.
    Raises InputError where there is no config.json and the names of the tensors fit no class, or two.
    """
    folder, weights = (path, path / WEIGHTS_FILE) if path.is_dir() else (path.parent, path)
    file = Checkpoint(weights)
    has_config = (folder / CONFIG_FILE).is_file()
    config = Config.read(folder / CONFIG_FILE) if has_config else Config(folder, {})
    trainer = config.part("trainer")
    class_name = trainer.text("dict_class") or class_by_names(file)
    if class_name not in CLASSES:
        reason = f"because {REFUSED[class_name]}" if class_name in REFUSED else f"use one of {', '.join(CLASSES)}"
        raise InputError(f"{trainer.where}: dict_class '{class_name[:40]}' is not supported, {reason}")
    activation, input_bias = CLASSES[class_name]

    linear = "encoder.weight" in file.shapes
    W_enc = file.matrix("encoder.weight" if linear else "W_enc", (None, None), transposed=linear)
    d_in, d_sae = W_enc.shape
    trainer.check_widths(activation_dim=d_in, dict_size=d_sae)
    own: dict[str, Any] = {"b_enc": np.zeros(d_sae, np.float32)}
    notes: tuple[str, ...] = ()
    if activation == "gated":
        own |= {"r_mag": file.vector("r_mag", d_sae)}
        own |= {"b_mag": file.vector("mag_bias", d_sae), "b_gate": file.vector("gate_bias", d_sae)}
    else:
        own["b_enc"] = file.vector("encoder.bias" if linear else "b_enc", d_sae)
    if activation == "jumprelu":
        own["threshold"] = file.vector("threshold", d_sae, or_number=class_name != "JumpReluAutoEncoder")
        notes = (UNTRAINED_THRESHOLD,) if (own["threshold"] < 0).all() else ()
    if activation == "topk":
        own["k"] = _k(file, trainer, d_sae)
    b_dec = file.vector(input_bias or ("decoder.bias" if linear else "b_dec"), d_in)
    decoder_name = "decoder.weight" if linear else "W_dec"
    W_dec = file.matrix(decoder_name, (d_sae, d_in), transposed=linear) if decoder_name in file.shapes else None
    place = _place(trainer)
    k = trainer.whole("k")
    io = config.part("buffer").text("io")
    if io == "in_and_out":
        raise InputError(f"{config.where}: io 'in_and_out' is not supported: use an SAE, not a transcoder")
    if io == "in":  # the submodule's name means its output
        place, notes = "", (*notes, READS_INPUT)
    file.refuse_unread(*UNUSED_TENSORS.get(class_name, ()))
    trainer.refuse_unread(*OF_TRAINING)
    config.refuse_unread()
    return SAE(
        architecture=activation,
        W_enc=W_enc.whole(dtype),
        b_dec=b_dec,
        **own,
        apply_b_dec_to_input=bool(input_bias),
        hook_name=place,
        model_name=trainer.text("lm_name"),
        prepend_bos=True,
        l0=float(k) if k is not None and "Batch" in class_name else None,
        decoder=None if W_dec is None else Decoder(W_dec, b_dec),
        source=str(path),
        layout="dictionary_learning",
        notes=notes,
        origin={
            "architecture": f"{CONFIG_FILE}: dict_class {class_name}"
            if has_config
            else f"the names of its tensors: {class_name}",
            "d_in": W_enc.name,
            "d_sae": W_enc.name,
            **({"k": CONFIG_FILE if trainer.has("k") else weights.name} if "k" in own else {}),
            **({"threshold": weights.name} if "threshold" in own else {}),
            **({"hook_name": f"{CONFIG_FILE}: submodule_name or layer"} if place else {}),
            "model_name": CONFIG_FILE,
            "input_norm": "dictionary_learning has none",
            "apply_b_dec_to_input": f"{class_name}'s convention",
            **({"l0": f"{CONFIG_FILE}: k"} if "Batch" in class_name else {}),
        },
    )


def class_by_names(file: Checkpoint) -> str:
    """The class that has these tensors; raises InputError where none or two have."""
    names = set(file.shapes)
    if {"encoder.weight", "r_mag", "gate_bias", "mag_bias"} <= names:
        return "GatedAutoEncoder"
    if {"encoder.weight", "encoder.bias", "bias"} <= names:
        return "AutoEncoder"
    if {"encoder.weight", "encoder.bias", "decoder.bias"} <= names:
        return "AutoEncoderNew"
    if {"W_enc", "threshold", "group_sizes"} <= names:
        return "MatryoshkaBatchTopKSAE"
    if {"W_enc", "b_enc", "W_dec", "b_dec", "threshold"} == names:
        return "JumpReluAutoEncoder"
    known = {"encoder.weight", "encoder.bias", "b_dec"} <= names
    reason = "may be an AutoEncoderTopK or a BatchTopKSAE" if known else "has tensors of none of its classes"
    raise InputError(f"{file.path} {reason}: keep it beside its {CONFIG_FILE}, which says which class it is")


def _k(file: Checkpoint, trainer: Config, d_sae: int) -> int:
    stored = file.number("k") if "k" in file.shapes else None
    if trainer.has("k") and stored is not None and stored != trainer.values["k"]:
        raise InputError(f"{trainer.where}: k is {trainer.values['k']}, but {file.path.name} has {stored:g}")
    if not trainer.has("k") and stored is not None:
        return Config(file.path, {"k": int(stored)}).k(d_sae)
    return trainer.k(d_sae)


def _place(trainer: Config) -> str:
    """Hook name of 'resid_post_layer_3' and the like; else the residual stream after `layer`, as sae-lens assumes."""
    match = re.fullmatch(
        r"(resid_pre|resid_mid|resid_post|mlp_out|attn_out)_layer_(\d+)", trainer.text("submodule_name")
    )
    if match:
        return f"blocks.{match[2]}.hook_{match[1]}"
    layer = trainer.whole("layer")
    return "" if layer is None else f"blocks.{layer}.hook_resid_post"
