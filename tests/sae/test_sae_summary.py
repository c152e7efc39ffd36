"""What doctor prints of an SAE."""

from __future__ import annotations

from pathlib import Path

from llama_scope_layout import write_llama_scope
from test_sae import tensors_of, write_sae

from sts_fast.sae import load_sae
from sts_fast.sae.summary import summary


def test_each_line_says_where_it_came_from(tmp_path: Path) -> None:
    config = {"rescale_acts_by_decoder_norm": True}
    lines = summary(load_sae(write_sae(tmp_path / "sae", "topk", config=config)))
    assert lines == {
        "SAE": str(tmp_path / "sae"),
        "layout": "SAELens",
        "architecture": "topk, k = 3 [cfg.json: topk, cfg.json]",
        "widths": "d_in 6, d_sae 20, float32 [W_enc]",
        "trained on": "tiny [cfg.json]",
        "hook": "blocks.3.hook_resid_post (read after layer 3) [cfg.json: hook_name]",
        "normalisation": "none [cfg.json: normalize_activations none]",
        "b_dec": "subtracted from the input [cfg.json]",
        "folding": "b_dec W_enc into the biases, the norms of W_dec into scale and biases",
        "mean L0": "not said",
        "decoder": "on disk, read by rows",
        "notes": "none",
        "missing": "mean L0",
    }


def test_scaled_input_and_other_places(tmp_path: Path) -> None:
    out = "blocks.15.hook_mlp_out"
    lines = summary(load_sae(write_llama_scope(tmp_path / "sae", tensors_of("standard"), hook_point_out=out)))
    assert lines["normalisation"].startswith("rows are multiplied by 0.612372 [hyperparams.json: sqrt(d_in) / dataset")
    assert lines["folding"] == "the input's scale into the features' scale"
    assert lines["predicts"] == out
    assert lines["threshold"] == "of each feature [hyperparams.json: jump_relu_threshold, scaled as the input is]"
    lines = summary(load_sae(write_sae(tmp_path / "z", config={"metadata": {"hook_name": "blocks.1.attn.hook_z"}})))
    assert lines["hook"] == "blocks.1.attn.hook_z [cfg.json: hook_name]"
