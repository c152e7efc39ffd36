"""Llama Scope: hyperparams.json with checkpoints/final.safetensors; later, config.json with sae_weights."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import numpy as np

from sts_fast.errors import InputError
from sts_fast.sae.checkpoint import Checkpoint
from sts_fast.sae.config import Config
from sts_fast.sae.decoder import Decoder
from sts_fast.sae.sae import FORGOTTEN_FOLDING, SAE

CONFIG_FILE, WEIGHTS_FOLDER = "hyperparams.json", "checkpoints"
LATER_CONFIG_FILE, LATER_WEIGHTS_FILE = "config.json", "sae_weights.safetensors"


def read(folder: Path, *, dtype: str | None = None) -> SAE:
    """A JumpReLU SAE on inputs scaled to a mean norm of sqrt(d_in).

    With s = sqrt(d_in) / (mean norm of the inputs in training), h = pre where pre = s x W_enc + b_enc > s threshold.
    """
    is_later = not (folder / CONFIG_FILE).is_file()
    config = Config.read(folder / (LATER_CONFIG_FILE if is_later else CONFIG_FILE))
    file = Checkpoint(folder / LATER_WEIGHTS_FILE if is_later else _weights(folder))
    config_name = Path(config.where).name
    if config.text("act_fn", "jumprelu").lower() not in ("jumprelu", "relu"):
        raise InputError(
            f"{config.where}: act_fn '{config.text('act_fn')[:40]}' is not supported: use jumprelu or relu"
        )
    if config.flag("use_glu_encoder"):
        raise InputError(f"{config.where}: use_glu_encoder is not supported: use an SAE with one encoder")
    W_enc = file.matrix("encoder.weight", (None, None), transposed=True)
    d_in, d_sae = W_enc.shape
    config.check_widths(d_model=d_in, d_sae=d_sae)
    b_dec = file.vector("decoder.bias", d_in) if config.flag("use_decoder_bias", True) else np.zeros(d_in, np.float32)

    scale, scale_out = _scales(config, d_in)
    own: dict[str, Any] = {}
    if "log_jumprelu_threshold" in file.shapes:
        own["threshold"] = file.exponential("log_jumprelu_threshold", d_sae)
    elif config.text("act_fn", "jumprelu").lower() == "jumprelu":
        threshold = config.number("jump_relu_threshold")
        if threshold is None:
            raise InputError(f"{config.where} has no jump_relu_threshold: copy or download it again")
        own["threshold"] = np.full(d_sae, threshold * (scale or 1), np.float32)
    hook_name, target = config.text("hook_point_in"), config.text("hook_point_out")
    is_transcoder = bool(target) and target != hook_name
    return SAE(
        architecture="jumprelu" if own else "standard",
        W_enc=W_enc.whole(dtype),
        b_enc=file.vector("encoder.bias", d_sae) if "encoder.bias" in file.shapes else np.zeros(d_sae, np.float32),
        b_dec=b_dec,
        **own,
        apply_b_dec_to_input=config.flag("apply_decoder_bias_to_pre_encoder") and not is_transcoder,
        input_scale=scale or 1.0,
        hook_name=hook_name,
        target_hook_name=target if is_transcoder else "",
        model_name=config.text("model_name"),
        prepend_bos=True,
        decoder=Decoder(
            file.matrix("decoder.weight", (d_sae, d_in), transposed=True),
            b_dec,
            scale=(scale_out or 1.0) if is_transcoder else 1.0,
        )
        if "decoder.weight" in file.shapes
        else None,
        source=str(folder),
        layout="Llama Scope",
        needs_scaling=not scale,
        notes=() if scale else (FORGOTTEN_FOLDING,),
        origin={
            "architecture": f"{config_name}: act_fn",
            "d_in": "encoder.weight",
            "d_sae": "encoder.weight",
            "hook_name": f"{config_name}: hook_point_in",
            "threshold": f"{config_name}: jump_relu_threshold, scaled as the input is"
            if "log_jumprelu_threshold" not in file.shapes
            else file.path.name,
            "input_norm": f"{config_name}: none but the scale",
            "input_scale": f"{config_name}: sqrt(d_in) / dataset_average_activation_norm"
            if scale
            else "not in its files",
            "apply_b_dec_to_input": config_name,
        },
    )


def _weights(folder: Path) -> Path:
    files = sorted((folder / WEIGHTS_FOLDER).glob("*.safetensors"))
    final = folder / WEIGHTS_FOLDER / "final.safetensors"
    if final in files or len(files) == 1:
        return final if final in files else files[0]
    raise InputError(f"{folder / WEIGHTS_FOLDER} has no final.safetensors: copy or download the SAE's whole folder")


def _scales(config: Config, d_in: int) -> tuple[float | None, float | None]:
    """Factor of the inputs, and divisor of a transcoder's outputs; None where the config has none."""
    norms = config.part("dataset_average_activation_norm")
    scales: list[float | None] = []
    for key in ("in", "out"):
        norm = norms.number(key)
        if norm is not None and not norm > 0:
            raise InputError(f"{norms.where}: {key} must be a positive number, but is {norm}")
        scales.append(None if norm is None else math.sqrt(d_in) / norm)
    return scales[0], scales[1]
