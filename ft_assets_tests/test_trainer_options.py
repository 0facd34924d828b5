"""`trainer:` lets nothing through that the proofs, the resume or the records rely on; `report_to` really reports."""

import json
import shutil
from pathlib import Path

import pytest
from trl.trainer.dpo_config import DPOConfig
from trl.trainer.sft_config import SFTConfig

from ft_assets.config import DpoSettings, LoraSettings, SftSettings
from ft_assets.errors import ConfigError
from ft_assets.training import trackers
from ft_assets.training.options import trainer_options
from ft_assets.training.refused import REFUSED
from ft_assets_tests.conftest import edit
from ft_assets_tests.pipeline import artifact, materialize
from ft_assets_tests.training import sft


def said(trainer: dict, settings: type = SftSettings, kind: type = SFTConfig) -> str:
    with pytest.raises(ConfigError) as caught:
        trainer_options(settings(trainer=trainer), "sft", Path("/nowhere"), kind)
    return str(caught.value)


def test_option_that_a_proof_relies_on_is_refused_with_the_reason() -> None:
    assert "sft.trainer.output_dir: cannot be set" in said({"output_dir": "/tmp"})
    assert "only the same version resumes" in said({"output_dir": "/tmp"})
    assert "left out and counted before" in said({"max_length": 5})
    assert "the SFT policy, proven" in said({"precompute_ref_log_probs": True}, DpoSettings, DPOConfig)
    assert "must be seen" in said({"logging_nan_inf_filter": True})


def test_option_with_a_setting_of_its_own_is_refused_with_its_name() -> None:
    assert "set sft.learning_rate" in said({"learning_rate": 1.0})
    assert "set sft.effective_batch and micro_batch" in said({"gradient_accumulation_steps": 2})


def test_unknown_option_is_refused_with_the_nearest() -> None:
    assert "did you mean 'adam_beta1'" in said({"adam_beta_1": 0.9})


def test_every_refused_name_is_an_option_of_trl() -> None:
    import dataclasses

    known = {field.name for kind in (SFTConfig, DPOConfig) for field in dataclasses.fields(kind)}
    assert set(REFUSED) <= known


def test_other_options_reach_trl() -> None:
    options = trainer_options(
        SftSettings(micro_batch=4, trainer={"adam_beta2": 0.98, "neftune_noise_alpha": 5.0}), "sft", Path("/nowhere"), SFTConfig
    )
    config = SFTConfig(**options)
    assert (config.adam_beta2, config.neftune_noise_alpha) == (0.98, 5.0)


def test_optimizer_without_its_package_is_the_users_error_before_weights_load(tiny_model: Path, tmp_path: Path) -> None:
    (tmp_path / "base").mkdir()
    for file in tiny_model.iterdir():
        if "safetensors" not in file.name:
            shutil.copy(file, tmp_path / "base")
    header = (tiny_model / "model.safetensors").read_bytes()
    (tmp_path / "base/model.safetensors").write_bytes(header[: 8 + int.from_bytes(header[:8], "little")])  # no weights: they could not load
    with pytest.raises(ConfigError, match=r"sft\.trainer\.optim: [\s\S]*galore"):
        sft(tmp_path / "base", tmp_path, trainer={"optim": "galore_adamw", "optim_target_modules": ["q_proj"]})


def test_adapter_on_the_head_is_refused_at_once() -> None:
    with pytest.raises(ValueError, match="lm_head would never be trained"):
        LoraSettings(target_modules=["q_proj", "lm_head"])


def test_missing_tracker_is_named_with_its_pip_line(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(trackers.PACKAGES, "mlflow", "no_such_package")
    with pytest.raises(ConfigError, match=r"sft\.report_to: mlflow: its package is not installed[\s\S]*pip install no_such_package"):
        trainer_options(SftSettings(micro_batch=4, report_to=["mlflow"]), "sft", Path("/nowhere"), SFTConfig)


def test_tensorboard_gets_the_curve_and_it_is_kept(tiny_model: Path, tmp_path: Path) -> None:
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    sft(tiny_model, tmp_path, num_train_epochs=1, report_to=["tensorboard"])
    events = EventAccumulator(str(tmp_path / "output/info/tensorboard"))
    events.Reload()
    curve = json.loads((tmp_path / "output/info/curve.json").read_text())
    losses = [event.value for event in events.Scalars("train/loss")]
    assert losses == pytest.approx([entry["loss"] for entry in curve], abs=1e-3)
    assert {"train/learning_rate", "train/grad_norm", "eval/loss"} <= set(events.Tags()["scalars"])


def test_trackers_and_save_steps_change_no_version_and_keys_are_in_no_job_file(copy: Path, monkeypatch: pytest.MonkeyPatch) -> None:
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
