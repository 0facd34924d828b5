"""TRL options that `trainer:` may not set, each with the reason.

The proofs, the resume or the records rely on them, or they would have no effect.
"""

from ft_assets.config import TrainSettings
from ft_assets.errors import ConfigError, nearest

# Options under another name in our settings.
_RENAMED = {
    "gradient_accumulation_steps": "effective_batch and micro_batch",
    "per_device_train_batch_size": "micro_batch",
    "data_seed": "seed",
    "activation_checkpointing": "gradient_checkpointing",
}
_REASONS: dict[str, tuple[str, ...]] = {
    "checkpoints are stored under the version, so that only the same version resumes": (
        "output_dir",
        "resume_from_checkpoint",
    ),
    "a retry needs complete checkpoints with the state of optimizer, schedule and random numbers": (
        "save_strategy",
        "save_total_limit",
        "save_only_model",
        "save_on_each_node",
        "ignore_data_skip",
        "restore_callback_states_from_checkpoint",
        "enable_jit_checkpoint",
        "load_best_model_at_end",
        "metric_for_best_model",
        "greater_is_better",
    ),
    "a retry must train on the rows in the same order": (
        "train_sampling_strategy",
        "length_column_name",
        "shuffle_dataset",
        "full_determinism",
        "dataloader_in_order",
    ),
    "every row is trained on; rows that are too long were filtered and counted before "
    "(chat.max_length)": (
        "max_length",
        "truncation_mode",
        "dataloader_drop_last",
    ),
    "rows are tokenized, masked and proven before; nothing is rendered or masked again": (
        "dataset_text_field",
        "dataset_kwargs",
        "dataset_num_proc",
        "chat_template_path",
        "assistant_only_loss",
        "completion_only_loss",
        "eos_token",
        "pad_token",
        "remove_unused_columns",
        "label_names",
    ),
    "the base model is loaded from the snapshot that was checked": (
        "model_init_kwargs",
        "trust_remote_code",
    ),
    "a loss that is not finite must be seen": ("logging_nan_inf_filter",),
    "every step is reported and kept in the curve": (
        "logging_steps",
        "logging_strategy",
        "logging_first_step",
    ),
    "when memory runs out the micro-batch is already halved, at the same effective batch": (
        "auto_find_batch_size",
    ),
    "ft_assets measures validation itself (eval_steps of sft or dpo), always on the validation "
    "slice": (
        "eval_strategy",
        "eval_steps",
        "do_eval",
        "eval_on_start",
        "eval_delay",
        "per_device_eval_batch_size",
        "eval_accumulation_steps",
        "eval_do_concat_batches",
        "eval_use_gather_object",
        "batch_eval_metrics",
        "include_for_metrics",
        "prediction_loss_only",
        "bf16_full_eval",
        "fp16_full_eval",
    ),
    "a training step only trains": ("do_train", "do_predict"),
    "the memory plan decides which layers are checkpointed, and how": (
        "gradient_checkpointing_kwargs",
        "activation_checkpointing_kwargs",
    ),
    "the graph decides where a cache is used": ("use_cache",),
    "the launcher starts and joins the ranks and sets how they shard the base "
    "(launcher.sharding)": (
        "ddp_backend",
        "ddp_timeout",
        "fsdp",
        "fsdp_config",
        "deepspeed",
        "parallelism_config",
    ),
    "the reference is the SFT policy, proven before the first step": (
        "precompute_ref_log_probs",
        "precompute_ref_batch_size",
        "sync_ref_model",
        "ref_model_mixup_alpha",
        "ref_model_sync_steps",
    ),
    "a model is published only after its verdict": (
        "push_to_hub",
        "hub_model_id",
        "hub_strategy",
        "hub_token",
        "hub_private_repo",
        "hub_always_push",
        "hub_revision",
    ),
    "sft.packing packs conversations, in the micro-batches that the memory plan chose": (
        "padding_free",
        "packing_strategy",
        "eval_packing",
    ),
    "the device is detected, not set": ("use_cpu", "local_rank"),
}
REFUSED = {name: reason for reason, names in _REASONS.items() for name in names}
# Options that would have no effect in one of the steps.
_PADDED = {"pad_to_multiple_of": "micro-batches must be as long as the memory plan counted them"}
_RL_SAMPLING = (
    "answers are sampled by the seeded rule of rl.temperature, so that a resume samples the same"
)
_RL: dict[str, tuple[str, ...]] = {
    _RL_SAMPLING: (
        "top_p",
        "top_k",
        "min_p",
        "repetition_penalty",
        "generation_kwargs",
        "cache_implementation",
        "use_transformers_continuous_batching",
        "transformers_continuous_batching_config",
        "use_transformers_paged",
        "use_vllm",
        "ds3_gather_for_generation",
        "max_tool_calling_iterations",
    ),
    "each step samples its own answers, once": (
        "num_iterations",
        "steps_per_generation",
        "generation_batch_size",
        "num_generations_eval",
    ),
    "rl.n is the number of answers": ("num_generations",),
    "evaluation.max_new_tokens is the longest answer": ("max_completion_length",),
    "rl.rewards has the weights": ("reward_weights",),
    "the policy is trained as it answers, without dropout": ("disable_dropout",),
    "prompts are rendered and proven before": ("chat_template_kwargs", "pad_to_multiple_of"),
    "the curves are in the Dagster UI": (
        "log_completions",
        "log_completions_hub_repo",
        "log_multimodal",
        "log_unique_prompts",
        "num_completions_to_print",
    ),
    "its state is not in our checkpoints; entropy_coef is constant": (
        "use_adaptive_entropy",
        "entropy_coef_delta",
        "entropy_coef_max",
        "entropy_coef_min",
        "entropy_target",
    ),
    "the head computes as the memory plan counted it": ("cast_lm_head_to_fp32",),
    "the loss is of sampled tokens, and has no labels": (
        "label_smoothing_factor",
        "average_tokens_across_devices",
    ),
}
REFUSED_IN = {
    "rl": {name: reason for reason, names in _RL.items() for name in names},
    "sft": _PADDED,
    "text": _PADDED,
    "dpo": {
        "label_smoothing_factor": "DPO's own option is label_smoothing",
        "average_tokens_across_devices": "DPO's loss is a mean over pairs, not over tokens",
    },
}


def check_trainer(settings: TrainSettings, key: str, known: set[str]) -> None:
    """Raise ConfigError for an option of `trainer:` that cannot be set.

    That is one that TRL does not have, that has a setting of its own, or that is refused.
    """
    for name in settings.trainer:
        where = f"{key}.trainer.{name}"
        if name in type(settings).model_fields or name in _RENAMED:
            raise ConfigError(
                where=where,
                found="has a setting of its own",
                expected="options without a setting of their own",
                fix=f"set {key}.{_RENAMED.get(name, name)}",
            )
        reason = REFUSED.get(name) or REFUSED_IN.get(key, {}).get(name)
        if name.startswith("vllm_"):
            reason = _RL_SAMPLING
        if reason:
            raise ConfigError(
                where=where,
                found="cannot be set",
                expected="an option that the graph does not control",
                fix=f"remove it: {reason}",
            )
        if name not in known:
            raise ConfigError(
                where=where,
                found="is not an option of TRL's config",
                expected="an option by the name that TRL gives it",
                fix=nearest(name, sorted(known), "see TRL's documentation"),
            )
