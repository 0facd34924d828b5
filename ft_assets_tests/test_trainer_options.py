"""Test the `trainer:` options and the trackers of `report_to`.

`trainer:` refuses every option that the proofs, the resume or the records rely on.
"""

import dataclasses
import json
import shutil
from pathlib import Path

import pytest
from trl.trainer.dpo_config import DPOConfig
from trl.trainer.grpo_config import GRPOConfig
from trl.trainer.rloo_config import RLOOConfig
from trl.trainer.sft_config import SFTConfig

from ft_assets.config import DpoSettings, LoraSettings, RlSettings, SftSettings
from ft_assets.errors import ConfigError, TrainingError
from ft_assets.training import trackers
from ft_assets.training.trl_options import trainer_options
from ft_assets.training.trl_refused_options import REFUSED, check_trainer
from ft_assets_tests.factories import edit
from ft_assets_tests.pipeline import artifact, materialize
from ft_assets_tests.training import same, sft


def refusal(trainer: dict, settings: type = SftSettings, kind: type = SFTConfig) -> str:
    with pytest.raises(ConfigError) as caught:
        trainer_options(settings(trainer=trainer), "sft", Path("/nowhere"), kind)
    return str(caught.value)


def test_option_that_a_proof_relies_on_is_refused_with_the_reason() -> None:
    assert "sft.trainer.output_dir: cannot be set" in refusal({"output_dir": "/tmp"})
    assert "only the same version resumes" in refusal({"output_dir": "/tmp"})
    assert "filtered and counted before" in refusal({"max_length": 5})
    assert "the SFT policy, proven" in refusal(
        {"precompute_ref_log_probs": True}, DpoSettings, DPOConfig
    )
    assert "must be seen" in refusal({"logging_nan_inf_filter": True})


def test_option_with_a_setting_of_its_own_is_refused_with_its_name() -> None:
    assert "set sft.learning_rate" in refusal({"learning_rate": 1.0})
    assert "set sft.effective_batch and micro_batch" in refusal({"gradient_accumulation_steps": 2})


def test_unknown_option_is_refused_with_the_nearest() -> None:
    assert "did you mean 'adam_beta1'" in refusal({"adam_beta_1": 0.9})


def test_every_refused_name_is_an_option_of_trl() -> None:
    known = {field.name for kind in (SFTConfig, DPOConfig) for field in dataclasses.fields(kind)}
    assert set(REFUSED) <= known


# The options that users may set: each reaches TRL and has an effect there. Add a new option of TRL
# either here or to the refused options.
REACH = {
    "accelerator_config",
    "activation_offloading",
    "adam_beta1",
    "adam_beta2",
    "adam_epsilon",
    "bf16",
    "dataloader_multiprocessing_context",
    "dataloader_num_workers",
    "dataloader_persistent_workers",
    "dataloader_pin_memory",
    "dataloader_prefetch_factor",
    "ddp_broadcast_buffers",
    "ddp_bucket_cap_mb",
    "ddp_find_unused_parameters",
    "ddp_static_graph",
    "debug",
    "disable_tqdm",
    "fp16",
    "include_num_input_tokens_seen",
    "liger_kernel_config",
    "log_level",
    "log_level_replica",
    "log_on_each_node",
    "lr_scheduler_kwargs",
    "neftune_noise_alpha",
    "optim",
    "optim_args",
    "optim_target_modules",
    "project",
    "router_aux_loss_coef",
    "run_name",
    "skip_memory_metrics",
    "tf32",
    "torch_compile",
    "torch_compile_backend",
    "torch_compile_mode",
    "torch_empty_cache_steps",
    "trackio_bucket_id",
    "trackio_space_id",
    "trackio_static_space_id",
    "use_liger_kernel",
}
REACH_SFT = {"average_tokens_across_devices", "label_smoothing_factor", "loss_type"}
REACH_DPO = {
    "disable_dropout",
    "discopop_tau",
    "f_alpha_divergence_coef",
    "f_divergence_type",
    "label_smoothing",
    "ld_alpha",
    "loss_weights",
    "pad_to_multiple_of",
    "use_weighting",
}


REACH_RL = REACH - {"activation_offloading"}
REACH_RLOO = {
    "epsilon",
    "epsilon_high",
    "mask_truncated_completions",
    "normalize_advantages",
    "reward_clip_range",
}
REACH_GRPO = {
    "delta",
    "entropy_coef",
    "epsilon",
    "epsilon_high",
    "importance_sampling_level",
    "loss_type",
    "mask_truncated_completions",
    "multi_objective_aggregation",
    "off_policy_mask_threshold",
    "sapo_temperature_neg",
    "sapo_temperature_pos",
    "scale_rewards",
    "top_entropy_quantile",
    "use_bias_correction_kl",
    "vespo_k_neg",
    "vespo_k_pos",
    "vespo_lambda_neg",
    "vespo_lambda_pos",
}


@pytest.mark.parametrize(
    ("key", "kind", "settings", "reach"),
    [
        ("sft", SFTConfig, SftSettings, REACH | REACH_SFT),
        ("dpo", DPOConfig, DpoSettings, REACH | REACH_DPO),
        ("rl", GRPOConfig, RlSettings, REACH_RL | REACH_GRPO),
        ("rl", RLOOConfig, RlSettings, REACH_RL | REACH_RLOO),
    ],
)
def test_every_option_of_trl_is_refused_or_ours_or_reaches_it(
    key: str, kind: type, settings: type, reach: set[str]
) -> None:
    taken, refused = set(), set()
    known = {field.name for field in dataclasses.fields(kind)}
    for name in known:
        try:
            check_trainer(settings(trainer={name: None}), key, known)
            taken.add(name)
        except ConfigError:
            refused.add(name)
    assert taken == reach
    assert taken | refused == known


def test_options_of_the_loader_reach_it(
    tiny_model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from ft_assets.training import prepare as setup

    calls, real = [], setup.DataLoader
    monkeypatch.setattr(
        setup, "DataLoader", lambda *args, **more: calls.append(more) or real(*args, **more)
    )
    loader = {
        "dataloader_num_workers": 1,
        "dataloader_prefetch_factor": 3,
        "dataloader_persistent_workers": True,
    }
    sft(
        tiny_model,
        tmp_path / "one",
        num_train_epochs=1,
        trainer={**loader, "dataloader_multiprocessing_context": "fork"},
    )
    expected = {
        "num_workers": 1,
        "prefetch_factor": 3,
        "persistent_workers": True,
        "multiprocessing_context": "fork",
    }
    assert calls[0].items() >= expected.items()
    sft(tiny_model, tmp_path / "two", num_train_epochs=1)
    assert same(tmp_path / "one/output", tmp_path / "two/output")
    with pytest.raises(
        ConfigError, match=r"sft\.trainer: persistent_workers option needs num_workers"
    ):
        sft(tiny_model, tmp_path / "three", trainer={"dataloader_persistent_workers": True})


def test_other_options_reach_trl() -> None:
    options = trainer_options(
        SftSettings(micro_batch=4, trainer={"adam_beta2": 0.98, "neftune_noise_alpha": 5.0}),
        "sft",
        Path("/nowhere"),
        SFTConfig,
    )
    config = SFTConfig(**options)
    assert (config.adam_beta2, config.neftune_noise_alpha) == (0.98, 5.0)


def test_optimizer_without_its_package_is_the_users_error_before_weights_load(
    tiny_model: Path, tmp_path: Path
) -> None:
    (tmp_path / "base").mkdir()
    for file in tiny_model.iterdir():
        if "safetensors" not in file.name:
            shutil.copy(file, tmp_path / "base")
    header = (tiny_model / "model.safetensors").read_bytes()
    # The file has a header only, so loading the weights would fail.
    (tmp_path / "base/model.safetensors").write_bytes(
        header[: 8 + int.from_bytes(header[:8], "little")]
    )
    with pytest.raises(ConfigError, match=r"sft\.trainer\.optim: [\s\S]*galore"):
        sft(
            tmp_path / "base",
            tmp_path,
            trainer={"optim": "galore_adamw", "optim_target_modules": ["q_proj"]},
        )


def test_adapter_on_the_head_is_refused_at_once() -> None:
    with pytest.raises(ValueError, match="lm_head would never be trained"):
        LoraSettings(target_modules=["q_proj", "lm_head"])


def test_missing_tracker_is_named_with_its_pip_line(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(trackers.PACKAGES, "mlflow", "no_such_package")
    with pytest.raises(
        ConfigError,
        match=r"sft\.report_to: mlflow: its package is not installed"
        r"[\s\S]*pip install no_such_package",
    ):
        trainer_options(
            SftSettings(micro_batch=4, report_to=["mlflow"]), "sft", Path("/nowhere"), SFTConfig
        )


def test_tensorboard_gets_the_curve_and_it_is_kept(tiny_model: Path, tmp_path: Path) -> None:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    sft(tiny_model, tmp_path, num_train_epochs=1, report_to=["tensorboard"])
    events = EventAccumulator(str(tmp_path / "output/info/tensorboard"))
    events.Reload()
    curve = json.loads((tmp_path / "output/info/curve.json").read_text())
    losses = [event.value for event in events.Scalars("train/loss")]
    assert losses == pytest.approx([entry["loss"] for entry in curve], abs=1e-3)
    assert {"train/learning_rate", "train/grad_norm", "eval/loss"} <= set(events.Tags()["scalars"])


def test_trackers_and_save_steps_change_no_version_and_keys_are_in_no_job_file(
    copy: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("WANDB_API_KEY", "a-secret-key")
    before = artifact(copy, "lora_adapter")
    edit(copy, sft={"save_steps": 7, "report_to": ["tensorboard"]}, dpo={"save_steps": 9})
    assert materialize(copy, "recipe,lora_adapter,dpo_adapter").success
    assert artifact(copy, "lora_adapter") == before
    edit(copy, sft={"num_train_epochs": 1})
    assert materialize(copy, "recipe,lora_adapter").success
    jobs = list((copy / ".ft/store/.work/jobs").glob("*/*.json"))
    assert jobs
    assert not [path for path in jobs if "a-secret-key" in path.read_text()]


@pytest.mark.parametrize(("warmup", "error"), [(0.03, None), (3, r"lower sft\.warmup_steps to 0")])
def test_training_of_one_step_learns_or_names_the_warmup_that_takes_it(
    tiny_model: Path, tmp_path: Path, warmup: float, error: str | None
) -> None:
    if error is None:
        assert sft(tiny_model, tmp_path, max_steps=1, warmup_steps=warmup)["largest_update"] > 0
        return
    with pytest.raises(TrainingError, match=error):
        sft(tiny_model, tmp_path, max_steps=1, warmup_steps=warmup)
