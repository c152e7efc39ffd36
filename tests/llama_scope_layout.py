"""A folder in Llama Scope's layout, written by hand after what its checkpoints hold."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file


def write_llama_scope(folder: Path, tensors: dict[str, torch.Tensor], **hyperparams: Any) -> Path:
    """tensors: W_enc [d_in, d_sae], b_enc, W_dec, b_dec."""
    d_in, d_sae = tensors["W_enc"].shape
    (folder / "checkpoints").mkdir(parents=True)
    hook = "blocks.15.hook_resid_post"
    said = {"hook_point_in": hook, "hook_point_out": hook, "d_model": d_in, "d_sae": d_sae, "act_fn": "jumprelu"}
    said |= {"jump_relu_threshold": 0.6, "dataset_average_activation_norm": {"in": 4.0, "out": 5.0}}
    said |= {"norm_activation": "dataset-wise", "apply_decoder_bias_to_pre_encoder": False, "use_decoder_bias": True}
    (folder / "hyperparams.json").write_text(json.dumps({**said, **hyperparams}))
    weights = {"encoder.weight": tensors["W_enc"].T, "encoder.bias": tensors["b_enc"]}
    weights |= {"decoder.weight": tensors["W_dec"].T, "decoder.bias": tensors["b_dec"]}
    save_file({name: w.contiguous() for name, w in weights.items()}, folder / "checkpoints" / "final.safetensors")
    return folder
