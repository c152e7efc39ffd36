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


# How the inputs were normalised: by their mean norm, by each one's norm, or by weights that include the factor.
NORMS = ("dataset-wise", "token-wise", "inference", "none")
KINDS = ("sae", "transcoder")
NORM_TENSORS = "dataset_average_activation_norm."
DECODER_NORM = (
    "its config says sparsity_include_decoder_norm, but the rows of its W_dec have other norms than 1, which are not "
    "used: if training multiplied by them before it compared with the threshold, the features are wrong"
)
UNIT = 0.02  # deviation from 1 of norms that were rounded to bfloat16
# Keys of training, and constraints that the weights obey since.
OF_TRAINING = (
    "top_k", "force_unit_decoder_norm", "jumprelu_threshold_window", "lp", "tp_size", "ddp_size",
    "remove_gradient_parallel_to_decoder_directions", "use_batch_norm_mse", "use_ddp", "exp_name", "exp_series",
    "result_dir", "exp_result_dir",
)  # fmt: skip


def read(folder: Path, *, dtype: str | None = None) -> SAE:
    """A JumpReLU SAE or transcoder, mostly on inputs scaled to a mean norm of sqrt(d_in).

    With s = sqrt(d_in) / (mean norm of the inputs in training), h = pre where pre = s x W_enc + b_enc > s threshold.
    With sparsity_include_decoder_norm, training compared pre times the norm of the feature's row of W_dec; published
    SAEs have norms of 1, and for others a note says that the norms are not used, as in sae-lens.
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
    for key, known in (("norm_activation", NORMS), ("sae_type", KINDS)):
        if config.text(key, known[0]) not in known:
            raise InputError(
                f"{config.where}: {key} '{config.text(key)[:40]}' is not supported: use {' or '.join(known)}"
            )
    W_enc = file.matrix("encoder.weight", (None, None), transposed=True)
    d_in, d_sae = W_enc.shape
    config.check_widths(d_model=d_in, d_sae=d_sae)
    has_b_dec = config.flag("use_decoder_bias", True)
    b_dec = file.vector("decoder.bias", d_in) if has_b_dec else np.zeros(d_in, np.float32)
    b_enc = file.vector("encoder.bias", d_sae) if "encoder.bias" in file.shapes else np.zeros(d_sae, np.float32)
    W_dec = file.matrix("decoder.weight", (d_sae, d_in), transposed=True) if "decoder.weight" in file.shapes else None
    hook_name, target = config.text("hook_point_in"), config.text("hook_point_out")
    is_transcoder = bool(target) and target != hook_name

    norm = config.text("norm_activation", NORMS[0])
    scale, scale_out = _scales(config, file, (hook_name, target or hook_name), d_in)
    if norm != "dataset-wise":
        scale = scale_out = 1.0
    own: dict[str, Any] = {}
    if "log_jumprelu_threshold" in file.shapes:
        own["threshold"] = file.exponential("log_jumprelu_threshold", d_sae)
    elif config.text("act_fn", "jumprelu").lower() == "jumprelu":
        threshold = config.number("jump_relu_threshold")
        if threshold is None:
            raise InputError(f"{config.where} has no jump_relu_threshold: copy or download it again")
        own["threshold"] = np.full(d_sae, threshold * (scale or 1), np.float32)
    compares_decoded = config.flag("sparsity_include_decoder_norm") and bool(own)
    is_unit = W_dec is None or not compares_decoded or bool(np.allclose(W_dec.row_norms(), 1, atol=UNIT))
    file.refuse_unread(*(name for name in file.shapes if name.startswith(NORM_TENSORS)), "decoder.bias")
    config.refuse_unread(*OF_TRAINING)
    # Each output was normalised by its own norm, which no decoder knows.
    if norm == "token-wise" and is_transcoder:
        W_dec = None
    return SAE(
        architecture="jumprelu" if own else "standard",
        W_enc=W_enc.whole(dtype),
        b_enc=b_enc,
        b_dec=b_dec,
        **own,
        apply_b_dec_to_input=config.flag("apply_decoder_bias_to_pre_encoder") and not is_transcoder,
        input_norm="constant_norm_rescale" if norm == "token-wise" else "none",
        input_scale=scale or 1.0,
        hook_name=hook_name,
        target_hook_name=target if is_transcoder else "",
        model_name=config.text("model_name"),
        prepend_bos=True,
        decoder=None if W_dec is None else Decoder(W_dec, b_dec, scale=(scale_out or 1.0) if is_transcoder else 1.0),
        source=str(folder),
        layout="Llama Scope",
        needs_scaling=not scale,
        notes=(*(() if scale else (FORGOTTEN_FOLDING,)), *(() if is_unit else (DECODER_NORM,))),
        origin={
            "architecture": f"{config_name}: act_fn",
            "d_in": "encoder.weight",
            "d_sae": "encoder.weight",
            "hook_name": f"{config_name}: hook_point_in",
            "threshold": f"{config_name}: jump_relu_threshold, scaled as the input is"
            if "log_jumprelu_threshold" not in file.shapes
            else file.path.name,
            "input_norm": f"{config_name}: norm_activation {norm}",
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


def _scales(config: Config, file: Checkpoint, hooks: tuple[str, str], d_in: int) -> tuple[float | None, float | None]:
    """Factor of the inputs, and divisor of a transcoder's outputs; None where neither config nor weights have it."""
    norms = config.part("dataset_average_activation_norm")
    scales: list[float | None] = []
    for key, hook in zip(("in", "out"), hooks, strict=True):
        norm, stored = norms.number(key), f"{NORM_TENSORS}{hook}"
        if norm is None and not norms.values and stored in file.shapes:
            norm = file.number(stored)
        if norm is not None and not norm > 0:
            raise InputError(f"{norms.where}: {key} must be a positive number, but is {norm}")
        scales.append(None if norm is None else math.sqrt(d_in) / norm)
    return scales[0], scales[1]
