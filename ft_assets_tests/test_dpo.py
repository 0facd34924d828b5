"""Test DPO: TRL's losses with a shared prompt, the proof of the reference, and its reuse.

The log-probabilities of the reference are kept by version.
"""

import json
import math
import random
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from trl.trainer.dpo_config import DPOConfig

from ft_assets.config import DpoSettings, LoraSettings
from ft_assets.config.training import DPO_LOSSES
from ft_assets.errors import ConfigError, TrainingError
from ft_assets.models import loading
from ft_assets.models.loading import load_tokenizer
from ft_assets.training import dpo as module
from ft_assets.training import pair_trainer
from ft_assets.training.adapter import trained_adapter
from ft_assets.training.length_order import LengthOrder
from ft_assets.training.pair_trainer import PairTrainer
from ft_assets.training.pairs import branch_mask, row_length
from ft_assets_tests.training import LORA, dpo, make_pairs, score_by_the_base, sft


@pytest.fixture(scope="module")
def adapter(tiny_model: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("sft")
    sft(tiny_model, folder, num_train_epochs=6, learning_rate=0.02)
    return folder / "output"


@pytest.fixture
def exact(monkeypatch: pytest.MonkeyPatch) -> None:
    """Compute in fp32, so that comparisons can be exact."""
    for place in (loading, module):
        monkeypatch.setattr(place, "compute_dtype", lambda: torch.float32)


def trainer(base: Path, adapter: Path, folder: Path, shares: bool, **options: Any) -> PairTrainer:
    """Return a trainer on the SFT adapter.

    Its reference differs a little from the policy, so that no loss is trivial.
    """
    chance = random.Random(3)
    pairs = [
        {
            **pair,
            "ref_chosen_logps": -20 - chance.random(),
            "ref_rejected_logps": -40 + chance.random(),
        }
        for pair in make_pairs(6)
    ]
    pairs = [
        {name: value for name, value in pair.items() if name not in ("id", "group")}
        for pair in pairs
    ]
    settings = LoraSettings.model_validate({**LORA, "lora_dropout": 0.0})
    args = DPOConfig(
        output_dir=str(folder),
        max_length=None,
        remove_unused_columns=False,
        use_cpu=True,
        bf16=False,
        report_to=[],
        gradient_checkpointing=False,
        per_device_train_batch_size=6,
        label_smoothing=0.1,
        **options,
    )
    return PairTrainer(
        model=trained_adapter(base, settings, adapter),
        args=args,
        pairs=pairs,
        tokenizer=load_tokenizer(base),
        shares=shares,
    )


def loss_and_gradient(the_trainer: PairTrainer) -> tuple[float, torch.Tensor]:
    batch = next(iter(the_trainer.get_train_dataloader()))
    the_trainer.model.zero_grad()
    loss = the_trainer.compute_loss(the_trainer.model, batch)
    loss.backward()
    parts = [
        value.grad.flatten()
        for value in the_trainer.model.parameters()
        if value.requires_grad and value.grad is not None
    ]
    return loss.item(), torch.cat(parts)


def test_reference_of_other_kernels_is_not_read(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    loaded: Any = SimpleNamespace(shares=True, ld_alpha=None)
    plan: Any = SimpleNamespace(micro_batch=1)
    keys = set()
    for spec in (None, "liger"):
        monkeypatch.setattr("importlib.util.find_spec", lambda _, spec=spec: spec)
        store = module.ReferenceStore.of(
            loaded, tmp_path, tmp_path, LoraSettings(), plan, tmp_path / "checkpoints"
        )
        keys.add(module.reference_key("base", "sft", store.lora, [], store.how))
    assert len(keys) == 2


@pytest.mark.slow
@pytest.mark.usefixtures("exact")
def test_every_loss_of_trl_is_the_same_with_the_prompt_scored_once(
    tiny_model: Path, adapter: Path, tmp_path: Path
) -> None:
    ours, theirs = (trainer(tiny_model, adapter, tmp_path, shares) for shares in (True, False))
    for name in DPO_LOSSES:
        for one in (ours, theirs):
            one.loss_types = [name]
        (loss, gradient), (expected, wanted) = loss_and_gradient(ours), loss_and_gradient(theirs)
        assert loss == pytest.approx(expected, abs=1e-5, rel=1e-5), name
        assert torch.nn.functional.cosine_similarity(gradient, wanted, 0) > 0.9999, name
        assert wanted.norm() > 0, name
    metrics = [one._metrics["train"] for one in (ours, theirs)]
    for name in (
        "rewards/margins",
        "logps/chosen",
        "entropy",
        "mean_token_accuracy",
        "logits/rejected",
    ):
        assert metrics[0][name] == pytest.approx(metrics[1][name], abs=1e-4), name


@pytest.mark.usefixtures("exact")
def test_every_combination_of_trl_options_is_the_same(
    tiny_model: Path, adapter: Path, tmp_path: Path
) -> None:
    for options in (
        {"ld_alpha": 0.5},
        {"f_divergence_type": "js_divergence"},
        {"loss_type": ["sigmoid", "sft"], "loss_weights": [1.0, 0.5]},
        {"use_weighting": True},
    ):
        results = [
            loss_and_gradient(trainer(tiny_model, adapter, tmp_path, shares, **options))[0]
            for shares in (True, False)
        ]
        assert results[0] == pytest.approx(results[1], abs=1e-5)


@pytest.fixture(scope="module")
def mixture(tiny_model: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Write a tiny mixture of experts, whose routing has a loss of its own."""
    from transformers import MixtralConfig, MixtralForCausalLM

    folder, tokenizer = tmp_path_factory.mktemp("mixture"), load_tokenizer(tiny_model)
    torch.manual_seed(0)
    config = MixtralConfig(
        vocab_size=len(tokenizer),
        hidden_size=64,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        num_local_experts=4,
        num_experts_per_tok=2,
        router_aux_loss_coef=0.02,
        max_position_embeddings=256,
        eos_token_id=2,
        bos_token_id=None,
        pad_token_id=tokenizer.pad_token_id,
    )
    MixtralForCausalLM(config).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


@pytest.mark.slow
def test_experts_are_trained_with_their_own_loss_by_sft_and_dpo(
    mixture: Path, tmp_path: Path
) -> None:
    lora = {"target_modules": "attention"}
    for name, coefficient in (("with", None), ("without", 0.0)):
        options = {"router_aux_loss_coef": coefficient}
        sft(mixture, tmp_path / name, lora=lora, num_train_epochs=1, trainer=options)
        metrics = dpo(
            mixture,
            tmp_path / name / "output",
            tmp_path / name / "dpo",
            lora=lora,
            num_train_epochs=1,
            trainer=options,
        )
        assert metrics["prompts_shared"] is (name == "without")
        assert metrics["reference_difference"] <= 1e-3
    for part in ("output", "dpo/output"):
        first, plain = (
            json.loads((tmp_path / name / part / "info/curve.json").read_text())[0]["loss"]
            for name in ("with", "without")
        )
        # Two of four experts at a time, with even routing: the loss is 2 * 0.02.
        assert 0.02 < first - plain < 0.2, part


def test_the_known_losses_are_those_trl_takes() -> None:
    import inspect

    from trl.trainer.dpo_trainer import DPOTrainer

    source = inspect.getsource(DPOTrainer._compute_loss)
    assert {name for name in DPO_LOSSES if f'loss_type == "{name}"' in source} == set(DPO_LOSSES)
    assert source.count('loss_type == "') == len(DPO_LOSSES)


def test_a_branch_sees_the_prompt_and_itself() -> None:
    segments = torch.tensor([[0, 1, 1, 2, 2, 3]])
    seen = branch_mask(segments, torch.tensor([[0, 1, 2, 1, 2, 0]]))[0, 0]
    assert [row.nonzero().flatten().tolist() for row in seen] == [
        [0],
        [0, 1],
        [0, 1, 2],
        [0, 3],
        [0, 3, 4],
        [5],
    ]
    windowed = branch_mask(segments, torch.tensor([[0, 1, 2, 1, 2, 0]]), window=2)[0, 0]
    assert windowed[2].nonzero().flatten().tolist() == [1, 2]
    assert windowed[4].nonzero().flatten().tolist() == [3, 4]


def test_model_that_cannot_share_a_prompt_is_scored_as_trl_does(
    tiny_model: Path, adapter: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Inject a mask that lets each branch attend to the other, as a model without a mask does."""
    from ft_assets.training import pairs

    monkeypatch.setattr(
        pairs,
        "branch_mask",
        lambda segments, *_: torch.ones(
            segments.shape[1], segments.shape[1], dtype=torch.bool
        ).tril()[None, None],
    )
    metrics = dpo(tiny_model, adapter, tmp_path)
    assert metrics["prompts_shared"] is False
    # This plan does not share prompts from the beginning.
    alone = dpo(tiny_model, adapter, tmp_path / "alone", share_prompts=False)
    planned = ("largest_micro_batch_tokens", "predicted_memory_gb", "micro_batch")
    assert [metrics[name] for name in planned] == [alone[name] for name in planned]


@pytest.mark.usefixtures("exact")
@pytest.mark.parametrize(("moved", "shared"), [("every batch", True), ("shared rows", False)])
def test_a_difference_is_held_against_what_another_batch_alone_changes(
    tiny_model: Path,
    adapter: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    moved: str,
    shared: bool,
) -> None:
    """Inject the rounding of an 8B model in bf16: 0.1 nats per token.

    It is in every batch, or in shared rows only.
    """
    real = PairTrainer.token_scores

    def rounded(self: PairTrainer, inputs: Any, shares: bool) -> torch.Tensor:
        scores = real(self, inputs, shares)
        chance = torch.Generator().manual_seed(len(scores) + shares)
        return scores + (0.1 if shares or moved == "every batch" else 0.0) * torch.randn(
            scores.shape, generator=chance
        )

    monkeypatch.setattr(PairTrainer, "token_scores", rounded)
    monkeypatch.setattr(pair_trainer, "half_precision", lambda _: True)
    one = trainer(tiny_model, adapter, tmp_path, True)
    assert one.check_prompt_sharing() is shared
    assert one.sharing["sharing_difference"] > 0.05


def test_reference_is_proven_and_the_first_loss_is_ln_2(
    tiny_model: Path, adapter: Path, tmp_path: Path
) -> None:
    # The proof also holds for a training with dropout.
    metrics = dpo(tiny_model, adapter, tmp_path, trainer={"disable_dropout": False})
    assert metrics["reference_difference"] <= 1e-3
    assert metrics["reference_loss"] == pytest.approx(math.log(2), abs=0.01)
    assert metrics["prompts_shared"] is True


def test_sft_term_is_added_to_the_loss_and_keeps_the_proof(
    tiny_model: Path, adapter: Path, tmp_path: Path
) -> None:
    first = {"max_steps": 1, "trainer": {"disable_dropout": True}}
    plain = dpo(tiny_model, adapter, tmp_path / "plain", **first)
    losses = [
        dpo(tiny_model, adapter, tmp_path / str(weight), sft_weight=weight, **first)
        for weight in (1.0, 3.0)
    ]
    for metrics in losses:
        assert metrics["reference_difference"] <= 1e-3
        assert metrics["reference_loss"] == pytest.approx(plain["reference_loss"], abs=1e-6)
    term = losses[0]["loss_first"] - plain["loss_first"]  # the cross-entropy of the chosen answers
    assert term > 0.1
    assert losses[1]["loss_first"] - plain["loss_first"] == pytest.approx(3 * term, rel=0.02)


@pytest.mark.parametrize(
    ("settings", "found"),
    [
        ({"method": "kto", "sft_weight": 1.0}, "sft_weight is of pairs"),
        ({"loss_type": ["sigmoid", "sft"], "sft_weight": 1.0}, "loss_type has sft"),
    ],
)
def test_sft_term_without_its_place_is_refused(settings: dict[str, Any], found: str) -> None:
    with pytest.raises(ValueError, match=found):
        DpoSettings.model_validate(settings)


def test_base_as_the_reference_fails_the_proof(
    tiny_model: Path, adapter: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(module, "score_reference", score_by_the_base)
    with pytest.raises(TrainingError, match="policy and reference differ by"):
        dpo(tiny_model, adapter, tmp_path)
    assert not list((tmp_path / "output").iterdir())


def test_reference_of_another_policy_fails_the_proof_even_if_it_was_kept(
    tiny_model: Path, adapter: Path, tmp_path: Path
) -> None:
    dpo(tiny_model, adapter, tmp_path)
    file = next(tmp_path.glob("reference-*/*.json"))
    kept = json.loads(file.read_text())
    file.write_text(
        json.dumps(
            {**kept, "values": [[chosen + 0.01, rejected] for chosen, rejected in kept["values"]]}
        )
    )
    with pytest.raises(TrainingError, match="reference"):
        dpo(tiny_model, adapter, tmp_path)


def test_reference_is_computed_once_for_all_betas(
    tiny_model: Path, adapter: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    calls, real = [], module.score_reference
    monkeypatch.setattr(module, "score_reference", lambda *args: calls.append(1) or real(*args))
    for folder, changes in (
        ("one", {}),
        ("two", {"beta": 0.3, "learning_rate": 2e-3, "loss_type": "ipo"}),
    ):
        (tmp_path / folder / "output").mkdir(parents=True)
        module.train_dpo(
            snapshot=tiny_model,
            sft_adapter=adapter,
            pairs=make_pairs(6),
            lora=LoraSettings.model_validate(LORA),
            dpo=settings(**changes),
            checkpoints=tmp_path / "work" / folder,
            output=tmp_path / folder / "output",
            report=lambda *_, **__: None,
        )
    assert len(calls) == 1
    module.train_dpo(
        snapshot=tiny_model,
        sft_adapter=adapter,
        pairs=make_pairs(7),
        lora=LoraSettings.model_validate(LORA),
        dpo=settings(),
        checkpoints=tmp_path / "work/three",
        output=tmp_path / "one/output",
        report=lambda *_, **__: None,
    )
    assert len(calls) == 2  # other pairs


def settings(**changes: Any) -> Any:
    from ft_assets.config import DpoSettings
    from ft_assets_tests.training import DPO

    return DpoSettings.model_validate({**DPO, **changes})


def test_no_second_copy_of_any_weight(tiny_model: Path, adapter: Path, tmp_path: Path) -> None:
    one = trainer(tiny_model, adapter, tmp_path, True)
    assert one.ref_model is None
    assert list(one.model.peft_config) == ["default"]
    assert not [name for name, _ in one.model.named_parameters() if ".ref." in name]


def test_padding_is_never_in_the_loss_even_where_it_is_the_end_of_turn(
    tiny_model: Path, adapter: Path, tmp_path: Path
) -> None:
    one = trainer(tiny_model, adapter, tmp_path, True)
    one.data_collator.pad_token_id = 2  # <|im_end|>
    batch = one.data_collator(one.pairs)
    answers = sum(len(pair["chosen_ids"]) + len(pair["rejected_ids"]) for pair in one.pairs)
    assert int(batch["completion_mask"].sum()) == answers
    assert int((batch["shared_labels"] != -100).sum()) == answers
    # Only the last token of each answer is an end of turn.
    assert int((batch["shared_labels"] == 2).sum()) == 2 * len(one.pairs)


def test_order_puts_like_lengths_together_and_is_the_same_in_every_process() -> None:
    lengths = [row_length(pair) for pair in make_pairs(50)]
    order = LengthOrder(lengths, 8, 1)
    first = list(order)
    assert sorted(first) == list(range(50))
    torch.rand(5)
    assert first == list(LengthOrder(lengths, 8, 1))
    order.set_epoch(1)
    assert list(order) != first
    steps = [[lengths[row] for row in first[begin : begin + 8]] for begin in range(0, 50, 8)]
    assert sum(max(step) * len(step) for step in steps) / sum(lengths) < 1.1
    assert len(steps[-1]) == 2  # the incomplete step is the last


def test_loss_that_does_not_exist_is_named_with_its_nearest(tiny_model: Path) -> None:
    with pytest.raises(ValueError, match="did you mean 'sigmoid'"):
        settings(loss_type="sigmoyd")


def test_value_that_trl_refuses_is_the_users_error(
    tiny_model: Path, adapter: Path, tmp_path: Path
) -> None:
    with pytest.raises(ConfigError, match=r"dpo\.trainer"):
        dpo(
            tiny_model,
            adapter,
            tmp_path,
            trainer={"f_divergence_type": "no such", "optim": "no_such_optimizer"},
        )


def test_loss_of_another_trainer_is_refused_with_the_name_of_its_trainer() -> None:
    for name, words in (
        ("orpo", "ORPO"),
        ("simpo", "SimPO, a loss of the CPO trainer"),
    ):
        with pytest.raises(ValueError, match=f"{name}' is not a loss of DPO but {words}") as caught:
            settings(loss_type=["sigmoid", name])
        assert "did you mean" not in str(caught.value)


def test_exo_pair_without_its_label_smoothing_is_refused_at_once() -> None:
    for loss in ("exo_pair", ["sigmoid", "exo_pair"]):
        with pytest.raises(ValueError, match=r"set dpo\.trainer\.label_smoothing"):
            settings(loss_type=loss)
    settings(loss_type="exo_pair", trainer={"label_smoothing": 1e-3})


def test_what_only_trls_trainer_refuses_is_the_users_error_too(
    tiny_model: Path, adapter: Path, tmp_path: Path
) -> None:
    with pytest.raises(
        ConfigError, match=r"dpo\.trainer: WPO-style weighting is not implemented for 'aot'"
    ):
        dpo(tiny_model, adapter, tmp_path, loss_type="aot", trainer={"use_weighting": True})
    with pytest.raises(ConfigError, match=r"dpo\.trainer: [\s\S]*min_lr"):
        dpo(tiny_model, adapter, tmp_path, lr_scheduler_type="cosine_with_min_lr")


def test_pairs_are_weighted_as_wpo_does(tiny_model: Path, adapter: Path, tmp_path: Path) -> None:
    metrics = dpo(tiny_model, adapter, tmp_path, trainer={"use_weighting": True})
    assert metrics["prompts_shared"] is False  # its weights come from TRL's own pass
    assert metrics["reference_difference"] <= 1e-3
