"""Test that each hook into a library still has the shape that ft_assets/compat relies on.

The libraries are TRL, transformers, accelerate, PEFT, liger and torch. After a failure, read the
library's change, adapt the hook in ft_assets/compat, and raise the upper bound in pyproject.toml.
"""

import importlib.util
import inspect
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, get_peft_model
from transformers import AutoModelForCausalLM, Trainer
from trl.trainer.dpo_config import DPOConfig
from trl.trainer.dpo_trainer import DPOTrainer
from trl.trainer.grpo_trainer import GRPOTrainer
from trl.trainer.kto_trainer import KTOTrainer
from trl.trainer.rloo_trainer import RLOOTrainer
from trl.trainer.sft_trainer import SFTTrainer

from ft_assets.compat import accelerate as accelerate_hooks
from ft_assets.compat import torch as torch_hooks
from ft_assets.compat import transformers as transformers_hooks
from ft_assets.compat import trl as trl_hooks
from ft_assets.compat.peft import active_lora, is_plain
from ft_assets.models.loading import load_tokenizer
from ft_assets.training.label_trainer import LabelTrainer
from ft_assets.training.pair_trainer import PairTrainer
from ft_assets.training.rl_trainer import GroupTrainer, LeaveOneOutTrainer
from ft_assets.training.sft import ResumingCpuSFTTrainer, ResumingSFTTrainer
from ft_assets_tests.training import make_pairs

OURS = (
    (PairTrainer, DPOTrainer),
    (LabelTrainer, KTOTrainer),
    (GroupTrainer, GRPOTrainer),
    (LeaveOneOutTrainer, RLOOTrainer),
    (ResumingSFTTrainer, SFTTrainer),
    (ResumingCpuSFTTrainer, SFTTrainer),
)


def parameters(method: Any) -> tuple[str, ...]:
    return tuple(inspect.signature(method).parameters)[1:]


@pytest.mark.parametrize(("ours", "theirs"), OURS)
def test_each_overridden_underscore_method_is_declared(ours: type, theirs: type) -> None:
    declared = {*transformers_hooks.OVERRIDDEN, *trl_hooks.OVERRIDDEN[theirs.__name__]}
    overridden = {
        name
        for kind in ours.__mro__
        if kind.__module__.startswith("ft_assets.")
        for name in vars(kind)
        if name.startswith("_") and not name.startswith("__") and hasattr(theirs, name)
    }
    assert overridden and overridden <= declared
    assert set(trl_hooks.OVERRIDDEN[theirs.__name__]) <= overridden


def test_overridden_methods_have_the_parameters_that_we_accept() -> None:
    for theirs in (DPOTrainer, KTOTrainer, GRPOTrainer, RLOOTrainer, SFTTrainer):
        own = trl_hooks.OVERRIDDEN[theirs.__name__]
        assert own.keys() <= vars(theirs).keys()
        for name, expected in {**transformers_hooks.OVERRIDDEN, **own}.items():
            assert parameters(getattr(theirs, name)) == expected, name
    assert vars(Trainer).keys() >= set(transformers_hooks.OVERRIDDEN)


@pytest.fixture
def pair_trainer(tiny_model: Path, tmp_path: Path) -> PairTrainer:
    """Return a DPO trainer on a fresh adapter, before its first loss."""
    base = AutoModelForCausalLM.from_pretrained(tiny_model, dtype=torch.float32)
    model = get_peft_model(base, LoraConfig(r=4, task_type="CAUSAL_LM"))
    args = DPOConfig(
        output_dir=str(tmp_path),
        max_length=None,
        remove_unused_columns=False,
        use_cpu=True,
        bf16=False,
        report_to=[],
        gradient_checkpointing=False,
        per_device_train_batch_size=2,
    )
    pairs = [
        {name: row[name] for name in ("prompt_ids", "chosen_ids", "rejected_ids")}
        for row in make_pairs(2)
    ]
    return PairTrainer(
        model=model, args=args, pairs=pairs, tokenizer=load_tokenizer(tiny_model), shares=False
    )


def loss(trainer: PairTrainer) -> float:
    batch = next(iter(trainer.get_train_dataloader()))
    inputs = transformers_hooks.prepare_inputs(trainer, batch)
    return float(trainer.compute_loss(trainer.model, inputs))


def test_trl_makes_a_reference_copy_under_the_name_that_is_deleted(
    pair_trainer: PairTrainer, monkeypatch: pytest.MonkeyPatch, tiny_model: Path, tmp_path: Path
) -> None:
    assert trl_hooks.REFERENCE_ADAPTER not in pair_trainer.model.peft_config
    assert "default" in pair_trainer.model.peft_config
    monkeypatch.setattr("ft_assets.training.pair_trainer.drop_reference_copy", lambda model: None)
    args = pair_trainer.args
    pairs = pair_trainer.pairs
    kept = PairTrainer(
        model=pair_trainer.model,
        args=args,
        pairs=pairs,
        tokenizer=load_tokenizer(tiny_model),
        shares=False,
    )
    assert trl_hooks.REFERENCE_ADAPTER in kept.model.peft_config
    trl_hooks.drop_reference_copy(kept.model)
    assert list(kept.model.peft_config) == ["default"]


def test_trl_reads_the_reference_from_the_rows(pair_trainer: PairTrainer) -> None:
    source = inspect.getsource(DPOTrainer._compute_loss)
    assert "self.precompute_ref_logps" in source
    assert pair_trainer.precompute_ref_logps is True
    loss(pair_trainer)  # TRL would score a second model without the rows' columns
    for name in ("use_weighting", "aux_loss_enabled", "ld_alpha", "loss_types", "loss_weights"):
        assert hasattr(pair_trainer, name), name


def test_trl_fused_head_returns_a_number_for_each_token(pair_trainer: PairTrainer) -> None:
    batch = next(iter(pair_trainer.get_train_dataloader()))
    labels = batch["input_ids"].masked_fill(batch["completion_mask"] == 0, -100)
    inputs = {name: batch[name] for name in ("input_ids", "attention_mask")}
    outputs = trl_hooks.fused_head(pair_trainer.model, **inputs, labels=labels, use_cache=False)
    rows, length = labels.shape
    for name in trl_hooks.TOKEN_OUTPUTS:
        assert getattr(outputs, name).shape == (rows, length - 1), name
    shifted = trl_hooks.fused_head(pair_trainer.model, **inputs, shift_labels=labels)
    assert shifted.log_probs.shape == (rows, length)
    assert (outputs.log_probs[labels[:, 1:] == -100] == 0).all()


def test_trl_metrics_are_separated_restored_and_discarded(pair_trainer: PairTrainer) -> None:
    loss(pair_trainer)
    before = {name: list(values) for name, values in trl_hooks.step_metrics(pair_trainer).items()}
    tokens = pair_trainer._total_train_tokens
    assert tokens > 0 and {"rewards/accuracies", "rewards/margins"} <= before.keys()
    with trl_hooks.separate_metrics(pair_trainer):
        assert not trl_hooks.step_metrics(pair_trainer)
        loss(pair_trainer)
        assert pair_trainer._total_train_tokens > tokens
    assert trl_hooks.step_metrics(pair_trainer) == before
    assert pair_trainer._total_train_tokens == tokens
    trl_hooks.discard_step_metrics(pair_trainer)
    assert not trl_hooks.step_metrics(pair_trainer) and pair_trainer._total_train_tokens == 0


def test_transformers_writes_and_loads_a_checkpoint(
    pair_trainer: PairTrainer, tmp_path: Path
) -> None:
    pair_trainer.create_optimizer_and_scheduler(1)
    transformers_hooks.save_checkpoint(pair_trainer)
    weight = next(part for part in pair_trainer.model.parameters() if part.requires_grad)
    expected = weight.detach().clone()
    weight.data.add_(1.0)
    transformers_hooks.load_checkpoint_weights(pair_trainer, tmp_path / "checkpoint-0")
    assert torch.equal(weight, expected)
    assert "get_optimizer_cls_and_kwargs" in vars(Trainer)


def test_transformers_keeps_the_source_path_where_it_is_removed(
    tiny_model: Path, tmp_path: Path
) -> None:
    model = AutoModelForCausalLM.from_pretrained(tiny_model)
    assert model.config._name_or_path == str(tiny_model)
    transformers_hooks.forget_source_path(model)
    model.save_pretrained(tmp_path)
    assert str(tiny_model) not in (tmp_path / "config.json").read_text()


def test_accelerate_looks_the_guard_up_where_it_is_replaced(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    import accelerate.accelerator

    original = accelerate.accelerator.model_has_dtensor
    assert parameters(original) == () and len(inspect.signature(original).parameters) == 1
    assert "model_has_dtensor(model)" in inspect.getsource(
        accelerate.accelerator.Accelerator.prepare_model
    )
    monkeypatch.setattr(
        accelerate.accelerator, "model_has_dtensor", original
    )  # undone after the test
    accelerate_hooks.allow_sharded_weights_in_ddp()
    assert accelerate.accelerator.model_has_dtensor(torch.nn.Linear(1, 1)) is False


def test_accelerate_gathers_through_the_methods_that_are_replaced(
    pair_trainer: PairTrainer,
) -> None:
    accelerator = pair_trainer.accelerator
    originals = accelerator.gather, accelerator.gather_for_metrics
    value = object()
    with accelerate_hooks.without_gathering(accelerator):
        assert accelerator.gather(value) is value
        assert accelerator.gather_for_metrics(value) is value
    assert (accelerator.gather, accelerator.gather_for_metrics) == originals
    source = inspect.getsource(DPOTrainer)
    for call in ("self.accelerator.gather(", "self.accelerator.gather_for_metrics("):
        assert call in source


@pytest.mark.parametrize(
    ("options", "plain"),
    [
        ({}, True),
        ({"use_rslora": True}, True),
        ({"use_dora": True}, False),
        ({"lora_bias": True}, False),
    ],
)
def test_peft_layer_names_what_it_computes(options: dict[str, bool], plain: bool) -> None:
    model = torch.nn.Sequential(torch.nn.Linear(8, 6))
    config = LoraConfig(r=4, lora_alpha=8, lora_dropout=0.1, target_modules=["0"], **options)
    layer = get_peft_model(model, config).base_model.model[0]  # type: ignore[arg-type]
    assert is_plain(layer) is plain
    layer.train()
    lora = active_lora(layer)
    assert lora is not None
    assert (tuple(lora.a.shape), tuple(lora.b.shape)) == ((4, 8), (6, 4))
    assert lora.scale == (4.0 if options.get("use_rslora") else 2.0)
    assert lora.dropout == 0.1
    layer.eval()
    assert active_lora(layer).dropout == 0.0  # type: ignore[union-attr]
    if plain:  # this formula replaces the layer's own forward
        x = torch.randn(3, 8)
        torch.nn.init.normal_(lora.b)
        expected = layer.base_layer(x) + lora.scale * x @ lora.a.T @ lora.b.T
        assert torch.allclose(layer(x), expected, atol=1e-5)
    layer.enable_adapters(False)
    assert active_lora(layer) is None


def test_torch_has_the_operator_and_the_attributes() -> None:
    schema = torch.ops.aten._flash_attention_forward.default._schema
    names = [argument.name for argument in schema.arguments]
    assert names[:10] == [
        "query",
        "key",
        "value",
        "cum_seq_q",
        "cum_seq_k",
        "max_q",
        "max_k",
        "dropout_p",
        "is_causal",
        "return_debug_mask",
    ]
    assert {"scale", "window_size_left", "window_size_right"} <= set(names)
    assert parameters(torch.cuda.memory._set_allocator_settings) == ()
    assert "_ddp_params_and_buffers_to_ignore" in inspect.getsource(
        torch.nn.parallel.DistributedDataParallel.__init__
    )
    model = torch.nn.Linear(2, 2)
    torch_hooks.ignore_in_ddp(model, (name for name in ("weight",)))
    assert model._ddp_params_and_buffers_to_ignore == ["weight"]


@pytest.mark.skipif(
    importlib.util.find_spec("liger_kernel") is None, reason="liger is installed on GPU machines"
)
def test_liger_has_the_function_that_changes_a_loaded_model() -> None:
    from liger_kernel.transformers import monkey_patch  # type: ignore[import-not-found]

    assert "llama" in monkey_patch.MODEL_TYPE_TO_APPLY_LIGER_FN
    assert "model" in inspect.signature(monkey_patch._apply_liger_kernel_to_instance).parameters
