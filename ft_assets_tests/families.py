"""Tiny random models of the families that people fine-tune, of the class that their files name."""

from typing import Any

VOCABULARY = 400
WINDOW = 24  # tokens of a sliding window or an attention chunk
SIZES: dict[str, Any] = {
    "vocab_size": VOCABULARY,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 512,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": 3,
}
SLIDING: dict[str, Any] = {
    "sliding_window": WINDOW,
    "layer_types": ["sliding_attention", "full_attention"] * 2,
    "head_dim": 16,
}
LINEAR: dict[str, Any] = {
    "layer_types": ["linear_attention", "full_attention"] * 2,
    "head_dim": 16,
    "linear_num_value_heads": 4,
    "linear_num_key_heads": 2,
    "linear_key_head_dim": 16,
    "linear_value_head_dim": 16,
}
MAMBA: dict[str, Any] = {"mamba_n_heads": 8, "mamba_d_head": 16, "mamba_d_state": 16}
EXPERTS: dict[str, Any] = {
    "num_experts": 4,
    "num_experts_per_tok": 2,
    "moe_intermediate_size": 32,
    "head_dim": 16,
}
# By transformers' model type: the sizes that differ from SIZES.
FAMILIES: dict[str, dict[str, Any]] = {
    "llama": {},
    "llama4_text": {
        "head_dim": 16,
        "num_local_experts": 4,
        "num_experts_per_tok": 1,
        "intermediate_size_mlp": 96,
        "attention_chunk_size": WINDOW,
        "moe_layers": [1, 3],
        "no_rope_layers": [1, 1, 1, 0],
    },
    "mistral": {"sliding_window": WINDOW, "head_dim": 16},
    "ministral": SLIDING,
    "ministral3": {"head_dim": 16},
    "mixtral": {"num_local_experts": 4, "num_experts_per_tok": 2, "head_dim": 16},
    "qwen2": {"sliding_window": WINDOW, "use_sliding_window": True, "max_window_layers": 2},
    "qwen3": {"head_dim": 16},
    "qwen3_moe": EXPERTS,
    "qwen3_next": {**LINEAR, **EXPERTS, "shared_expert_intermediate_size": 32},
    "qwen3_5_text": LINEAR,
    "gemma": {"head_dim": 16},
    "gemma2": SLIDING,
    "gemma3_text": SLIDING,
    "gemma3n_text": {
        **SLIDING,
        "vocab_size_per_layer_input": VOCABULARY,
        "hidden_size_per_layer_input": 8,
        "laurel_rank": 8,
        "num_kv_shared_layers": 2,
        "altup_num_inputs": 2,
        "activation_sparsity_pattern": [0.0] * 4,
        "intermediate_size": [96] * 4,
    },
    "gemma4_text": {
        **SLIDING,
        "global_head_dim": 16,
        "vocab_size_per_layer_input": VOCABULARY,
        "hidden_size_per_layer_input": 8,
        "num_kv_shared_layers": 0,
    },
    "phi": {},
    "phi3": {"sliding_window": WINDOW},
    "olmo2": {},
    "olmo3": SLIDING,
    "granite": {},
    "granitemoehybrid": {
        "mamba_n_heads": 8,
        "mamba_d_head": 16,
        "mamba_d_state": 16,
        "layer_types": ["mamba", "attention"] * 2,
        "num_local_experts": 0,
        "shared_intermediate_size": 96,
    },
    "smollm3": {},
    "lfm2": {"layer_types": ["conv", "full_attention"] * 2},
    "falcon_h1": {
        "head_dim": 16,
        "mamba_d_ssm": 64,
        "mamba_n_heads": 4,
        "mamba_d_head": 16,
        "mamba_d_state": 16,
    },
    "glm4": {"head_dim": 16},
    "deepseek_v3": {
        "n_routed_experts": 4,
        "num_experts_per_tok": 2,
        "n_group": 1,
        "topk_group": 1,
        "moe_intermediate_size": 32,
        "n_shared_experts": 1,
        "first_k_dense_replace": 1,
        "q_lora_rank": 32,
        "kv_lora_rank": 16,
        "qk_rope_head_dim": 8,
        "qk_nope_head_dim": 8,
        "v_head_dim": 16,
        "num_key_value_heads": 4,
    },
    "gpt_oss": {**SLIDING, "num_local_experts": 4, "num_experts_per_tok": 2},
    "cohere": {},
    "cohere2": SLIDING,
    "exaone4": SLIDING,
    "stablelm": {},
    "starcoder2": {"sliding_window": WINDOW},
    "gpt2": {"n_inner": 96},
    "gpt_neox": {},
    "mamba2": {"num_heads": 8, "head_dim": 16, "state_size": 16, "n_groups": 1, "chunk_size": 32},
    "rwkv": {"attention_hidden_size": 64, "context_length": 512},
}


def family_model(name: str, scale: float = 2) -> Any:
    """Return a random fp32 model of a family.

    scale: a factor of the matrices; with 2 the logits are far from ties.
    """
    import torch
    from transformers import AutoConfig, AutoModelForCausalLM

    torch.manual_seed(0)
    config = AutoConfig.for_model(name, **{**SIZES, **FAMILIES[name]})
    model = AutoModelForCausalLM.from_config(config).float().eval()
    for parameter in model.parameters():
        if parameter.dim() > 1:
            parameter.data.mul_(scale)
    return model


PICTURES: dict[str, Any] = {
    "hidden_size": 32,
    "intermediate_size": 32,
    "num_hidden_layers": 1,
    "num_attention_heads": 2,
    "image_size": 16,
    "patch_size": 4,
}
QWEN_PICTURES: dict[str, Any] = {
    "depth": 1,
    "hidden_size": 32,
    "intermediate_size": 32,
    "num_heads": 2,
    "out_hidden_size": 64,
    "patch_size": 4,
    "num_position_embeddings": 16,
}
QWEN_TOKENS = {
    "image_token_id": 5,
    "video_token_id": 6,
    "vision_start_token_id": 7,
    "vision_end_token_id": 8,
}
# By the model type of the files: the family of the text part, and the rest of the config.
WHOLES: dict[str, tuple[str, dict[str, Any]]] = {
    "qwen3_5": ("qwen3_5_text", {"vision_config": QWEN_PICTURES, **QWEN_TOKENS}),
    "gemma3": (
        "gemma3_text",
        {
            "vision_config": PICTURES,
            "mm_tokens_per_image": 4,
            "image_token_index": 5,
            "boi_token_index": 6,
            "eoi_token_index": 7,
        },
    ),
    "gemma4": (
        "gemma4_text",
        {
            "vision_config": {**PICTURES, "num_key_value_heads": 2, "head_dim": 16},
            "audio_config": None,
            "image_token_id": 5,
            "boi_token_id": 6,
            "eoi_token_id": 7,
        },
    ),
    "mistral3": (
        "mistral",
        {
            "vision_config": {**PICTURES, "model_type": "pixtral"},
            "image_token_index": 5,
            "spatial_merge_size": 1,
        },
    ),
    "llama4": (
        "llama4_text",
        {
            "vision_config": {
                **PICTURES,
                "projector_input_dim": 32,
                "projector_output_dim": 32,
                "vision_output_dim": 32,
            }
        },
    ),
    "qwen3_vl": (
        "qwen2",
        {"vision_config": {**QWEN_PICTURES, "deepstack_visual_indexes": []}, **QWEN_TOKENS},
    ),
}


def whole_model(name: str, **text: Any) -> Any:
    """Return a random bf16 model that also sees, of the class that the family's files name."""
    import torch
    from transformers import AutoConfig, AutoModelForImageTextToText

    family, rest = WHOLES[name]
    parts = {"model_type": family, **SIZES, **FAMILIES[family], **text}
    torch.manual_seed(0)
    config = AutoConfig.for_model(name, text_config=parts, **rest)
    return AutoModelForImageTextToText.from_config(config).to(torch.bfloat16)
