"""Tiny random models of many architectures, with sliding windows far shorter than what tests put before a query."""

from __future__ import annotations

from typing import Any

N_LAYERS, VOCABULARY, D_MODEL, WINDOW = 4, 60, 32, 10

COMMON: dict[str, Any] = {
    "vocab_size": VOCABULARY,
    "hidden_size": D_MODEL,
    "num_hidden_layers": N_LAYERS,
    "num_attention_heads": 4,
    "intermediate_size": 48,
    "max_position_embeddings": 256,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": 0,
}
GROUPED = {**COMMON, "num_key_value_heads": 2}
HEADS = {**GROUPED, "head_dim": 8}
SLIDING = {**HEADS, "sliding_window": WINDOW}
EXPERTS = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 24}
GEMMA3 = {**SLIDING, "query_pre_attn_scalar": 8, "layer_types": ["sliding_attention", "full_attention"] * 2}
LINEAR = {
    "linear_num_value_heads": 4,
    "linear_num_key_heads": 2,
    "linear_key_head_dim": 8,
    "linear_value_head_dim": 8,
    "shared_expert_intermediate_size": 24,
    "layer_types": ["linear_attention", "full_attention"] * 2,
}
MAMBA = {"mamba_d_state": 8, "mamba_d_conv": 4}
VISION = {
    "hidden_size": 16,
    "intermediate_size": 16,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "image_size": 16,
    "patch_size": 8,
}

# By name: class of the config, class of the model, options of the config.
FAMILIES: dict[str, tuple[str, str, dict[str, Any]]] = {
    "llama": ("Llama", "LlamaForCausalLM", GROUPED),
    "mistral": ("Mistral", "MistralForCausalLM", {**GROUPED, "sliding_window": WINDOW}),
    "qwen2": (
        "Qwen2",
        "Qwen2ForCausalLM",
        {**GROUPED, "use_sliding_window": True, "sliding_window": WINDOW, "max_window_layers": 2},
    ),
    "qwen3": ("Qwen3", "Qwen3ForCausalLM", HEADS),
    "qwen3_moe": ("Qwen3Moe", "Qwen3MoeForCausalLM", {**HEADS, **EXPERTS}),
    "gemma2": ("Gemma2", "Gemma2ForCausalLM", {**SLIDING, "query_pre_attn_scalar": 8}),
    "gemma3_text": ("Gemma3Text", "Gemma3ForCausalLM", GEMMA3),
    "gemma3_multimodal": (
        "Gemma3",
        "Gemma3ForConditionalGeneration",
        {
            "text_config": GEMMA3,
            "vision_config": VISION,
            "mm_tokens_per_image": 1,
            "image_token_index": 58,
            "boi_token_index": 57,
            "eoi_token_index": 59,
        },
    ),
    "phi3": ("Phi3", "Phi3ForCausalLM", {**GROUPED, "sliding_window": WINDOW}),
    "gpt2": (
        "GPT2",
        "GPT2LMHeadModel",
        {"vocab_size": VOCABULARY, "n_embd": D_MODEL, "n_layer": N_LAYERS, "n_head": 4, "n_positions": 256},
    ),
    "gpt_neox": ("GPTNeoX", "GPTNeoXForCausalLM", {**COMMON, "rotary_pct": 0.5}),
    "gpt_neo": (
        "GPTNeo",
        "GPTNeoForCausalLM",
        {
            "vocab_size": VOCABULARY,
            "hidden_size": D_MODEL,
            "num_layers": N_LAYERS,
            "num_heads": 4,
            "max_position_embeddings": 256,
            "window_size": WINDOW,
            "attention_types": [[["global", "local"], N_LAYERS // 2]],
        },
    ),
    "bloom": (
        "Bloom",
        "BloomForCausalLM",
        {"vocab_size": VOCABULARY, "hidden_size": D_MODEL, "n_layer": N_LAYERS, "n_head": 4},
    ),
    "olmo2": ("Olmo2", "Olmo2ForCausalLM", GROUPED),
    "gpt_oss": ("GptOss", "GptOssForCausalLM", {**SLIDING, "num_local_experts": 4, "num_experts_per_tok": 2}),
    "llama4": (
        "Llama4Text",
        "Llama4ForCausalLM",
        {
            **HEADS,
            "attention_chunk_size": 16,
            "num_local_experts": 4,
            "intermediate_size_mlp": 48,
            "interleave_moe_layer_step": 2,
        },
    ),
    "qwen3_next": ("Qwen3Next", "Qwen3NextForCausalLM", {**HEADS, **EXPERTS, **LINEAR}),
    "jamba": (
        "Jamba",
        "JambaForCausalLM",
        {
            **GROUPED,
            **MAMBA,
            "num_experts": 4,
            "num_experts_per_tok": 2,
            "attn_layer_period": 2,
            "attn_layer_offset": 1,
            "expert_layer_period": 2,
            "expert_layer_offset": 1,
            "mamba_expand": 2,
            "mamba_dt_rank": 4,
            "use_mamba_kernels": False,
        },
    ),
    "falcon_h1": (
        "FalconH1",
        "FalconH1ForCausalLM",
        {
            **HEADS,
            **MAMBA,
            "mamba_d_ssm": 32,
            "mamba_n_heads": 4,
            "mamba_d_head": 8,
            "mamba_n_groups": 1,
            "mamba_chunk_size": 8,
        },
    ),
}


def make_model(family: str) -> Any:
    """A random model whose weights are large enough that every layer and position matters."""
    import torch
    import transformers

    config_class, model_class, options = FAMILIES[family]
    config = getattr(transformers, f"{config_class}Config")(**options)
    torch.manual_seed(0)
    model = getattr(transformers, model_class)(config)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter) * 0.15)
    return model.eval()
