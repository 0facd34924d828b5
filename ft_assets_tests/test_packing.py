"""Test packing.

The loss and the gradient equal those of one conversation at a time. Each row occurs once per epoch.
A leak between conversations is detected and refused.
"""

import contextlib
import json
import random
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, get_peft_model
from transformers import AttentionInterface, AutoModelForCausalLM
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import AttentionMaskInterface, sdpa_mask
from trl.trainer.sft_trainer import DataCollatorForLanguageModeling, SFTTrainer

from ft_assets.config import LoraSettings, SftSettings
from ft_assets.errors import MemoryPlanError, TrainingError
from ft_assets.hardware import compute_dtype
from ft_assets.training import isolation
from ft_assets.training.attention import NAME, register
from ft_assets.training.batches import StepBatches, largest_micro_batch, steps
from ft_assets.training.cpu_loss import supervised_loss
from ft_assets.training.isolation import leak, prove_isolation
from ft_assets.training.linears import fuse_linears
from ft_assets.training.memory_plan.model_shape import snapshot_shape
from ft_assets.training.memory_plan.plan import Data, Machine, make_plan
from ft_assets.training.packed_mixers import separate_documents
from ft_assets.training.sft import train_sft
from ft_assets_tests.families import family_model
from ft_assets_tests.training import sft


def rows(count: int, longest: int = 40, seed: int = 0) -> list[dict[str, Any]]:
    draw = random.Random(seed)
    found = []
    for index in range(count):
        ids = [draw.randrange(5, 300) for _ in range(draw.randint(4, longest))]
        supervised = [place >= len(ids) // 2 for place in range(len(ids))]
        labels = [token if flag else -100 for token, flag in zip(ids, supervised, strict=True)]
        found.append(
            {"input_ids": ids, "labels": labels, "supervised": supervised, "group": str(index)}
        )
    return found


def adapted(folder: Path, **config: Any) -> Any:
    torch.manual_seed(0)
    base = AutoModelForCausalLM.from_pretrained(
        folder, dtype=torch.float32, attn_implementation="sdpa", **config
    )
    model = get_peft_model(
        base, LoraConfig(r=4, target_modules="all-linear", task_type="CAUSAL_LM")
    )
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter, std=0.1)
    return model.train()


def loss_and_gradient(
    model: Any, batches: list[list[dict[str, Any]]], packed: bool
) -> tuple[float, torch.Tensor]:
    collator = DataCollatorForLanguageModeling(pad_token_id=3, padding_free=packed)
    columns = [
        [{key: row[key] for key in ("input_ids", "labels")} for row in group] for group in batches
    ]
    items = sum(label != -100 for group in batches for row in group for label in row["labels"][1:])
    model.zero_grad()
    total = 0.0
    for group in columns:
        loss = supervised_loss(model, collator(group), items)
        loss.backward()
        total += loss.item()
    return total, torch.cat(
        [parameter.grad.flatten() for parameter in model.parameters() if parameter.grad is not None]
    )


@pytest.mark.parametrize("packing", [True, False])
def test_the_loss_of_a_gpu_is_trls_own(
    packing: bool, tiny_model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Compare the losses in every micro-batch of a real training, with its own divisor.

    The injected fault makes the code treat the CPU as a GPU.
    """
    from ft_assets.training import sft as module

    real, theirs = module.ResumingSFTTrainer.compute_loss, SFTTrainer.compute_loss
    calls: list[int] = []

    def compared(
        self: Any,
        model: Any,
        inputs: Any,
        return_outputs: bool = False,
        num_items_in_batch: Any = None,
    ) -> Any:
        weights = [weight for weight in model.parameters() if weight.requires_grad]
        expected = theirs(self, model, dict(inputs), False, num_items_in_batch)
        wanted = torch.autograd.grad(expected, weights)
        with monkeypatch.context() as patched:
            patched.setattr(
                SFTTrainer, "compute_loss", lambda *_: pytest.fail("TRL's loss was taken")
            )
            ours = real(self, model, inputs, return_outputs, num_items_in_batch)
        found = torch.autograd.grad(ours, weights, retain_graph=True)
        # The divisor counts the tokens of the whole step, not of this micro-batch.
        assert num_items_in_batch > (inputs["labels"][:, 1:] != -100).sum()
        assert ours.item() == pytest.approx(expected.item(), rel=1e-4)
        assert (
            torch.nn.functional.cosine_similarity(
                *(torch.cat([part.flatten() for part in parts]) for parts in (found, wanted)), 0
            )
            > 0.999
        )
        assert all(
            torch.allclose(one, other, rtol=0.02, atol=1e-4)
            for one, other in zip(found, wanted, strict=True)
        )
        calls.append(1)
        return ours

    monkeypatch.setattr(module, "ResumingCpuSFTTrainer", module.ResumingSFTTrainer)
    monkeypatch.setattr(module.ResumingSFTTrainer, "quiet_on", ("cpu",))
    monkeypatch.setattr(module.ResumingSFTTrainer, "compute_loss", compared)
    sft(
        tiny_model,
        tmp_path,
        num_train_epochs=1,
        rows=16,
        lora={"lora_dropout": 0.0},
        packing=packing,
    )
    assert len(calls) == 8  # 16 rows in batches of two


@pytest.mark.parametrize("window", [None, 8], ids=["causal", "sliding window"])
def test_packed_loss_and_gradient_equal_one_row_at_a_time(
    tiny_model: Path, window: int | None
) -> None:
    sample = rows(9)
    model = adapted(tiny_model)
    if window:
        from transformers import MistralConfig, MistralForCausalLM

        config = {
            key: getattr(model.config, key)
            for key in ("vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers")
        }
        torch.manual_seed(0)
        base = MistralForCausalLM(
            MistralConfig(
                **config, num_attention_heads=4, num_key_value_heads=2, sliding_window=window
            )
        )
        base.set_attn_implementation("sdpa")
        model = get_peft_model(
            base,
            LoraConfig(
                r=4, target_modules="all-linear", init_lora_weights=False, task_type="CAUSAL_LM"
            ),
        ).train()
    loss, gradient = loss_and_gradient(model, [[row] for row in sample], packed=False)
    fuse_linears(model)
    model.get_base_model().set_attn_implementation(register())
    packed_loss, packed = loss_and_gradient(model, [sample[:4], sample[4:]], packed=True)
    assert abs(loss - packed_loss) < 1e-5
    assert torch.cosine_similarity(gradient, packed, 0) > 0.9999
    assert torch.allclose(gradient, packed, atol=1e-5, rtol=1e-3)


def test_what_is_not_packed_is_stock_sdpa(tiny_model: Path) -> None:
    model = adapted(tiny_model).eval().get_base_model()
    ids = torch.tensor([[5, 6, 7, 8, 9], [3, 3, 10, 11, 12]])
    mask = torch.tensor([[1, 1, 1, 1, 1], [0, 0, 1, 1, 1]])
    expected = model(input_ids=ids, attention_mask=mask).logits
    words = model.generate(ids, attention_mask=mask, max_new_tokens=6, do_sample=False)
    model.set_attn_implementation(register())
    assert torch.equal(model(input_ids=ids, attention_mask=mask).logits, expected)
    assert torch.equal(
        model.generate(ids, attention_mask=mask, max_new_tokens=6, do_sample=False), words
    )


def test_documents_given_by_positions_alone_are_apart_too(tiny_model: Path) -> None:
    model = adapted(tiny_model).eval().get_base_model()
    model.set_attn_implementation(register())
    first, second = torch.tensor([[5, 6, 7, 8]]), torch.tensor([[9, 10, 11]])
    alone = torch.cat([model(input_ids=first).logits, model(input_ids=second).logits], 1)
    both = model(
        input_ids=torch.cat([first, second], 1), position_ids=torch.tensor([[0, 1, 2, 3, 0, 1, 2]])
    ).logits
    assert torch.allclose(alone, both, atol=1e-5)


def test_the_probe_passes_the_real_attention_and_refuses_a_leaky_one(tiny_model: Path) -> None:
    collator = DataCollatorForLanguageModeling(pad_token_id=3, padding_free=True)
    model = adapted(tiny_model)
    model.get_base_model().set_attn_implementation(register())
    assert leak(model, rows(3), collator) == 0.0

    def leaky(
        module: Any, query: Any, key: Any, value: Any, attention_mask: Any, **kwargs: Any
    ) -> Any:
        return sdpa_attention_forward(
            module, query, key, value, None, **{**kwargs, "is_causal": True}
        )

    AttentionInterface.register("leaky", leaky)
    AttentionMaskInterface.register(
        "leaky", lambda **kwargs: None if kwargs["attention_mask"] is None else sdpa_mask(**kwargs)
    )
    model.get_base_model().set_attn_implementation("leaky")
    with pytest.raises(TrainingError, match="must not see each other"):
        prove_isolation(model, rows(3), collator)


# A short convolution, linear attention, an SSM beside attention, and an SSM alone.
MIXERS = ["lfm2", "qwen3_5_text", "falcon_h1", "granitemoehybrid", "mamba2"]


@pytest.mark.parametrize("family", MIXERS)
def test_mixers_read_packed_documents_one_by_one(family: str) -> None:
    """Packed logits and gradients equal those of each document alone, also beside padding."""
    collator = DataCollatorForLanguageModeling(pad_token_id=3, padding_free=True)
    model = family_model(family)
    model.set_attn_implementation(register())
    draw = random.Random(0)
    documents = [[draw.randrange(4, 90) for _ in range(size)] for size in (9, 23, 5, 70, 66)]
    batch = collator([{"input_ids": ids, "labels": ids} for ids in documents])
    del batch["labels"]
    weight = next(model.parameters())
    alone = torch.cat(
        [model(input_ids=torch.tensor([ids]), use_cache=False).logits for ids in documents], 1
    )
    (wanted,) = torch.autograd.grad(alone.square().sum(), weight)

    def packs() -> bool:
        # transformers refuses boundaries without kernels for them; of Mamba 2 it drops them.
        with contextlib.suppress(ValueError):
            return torch.allclose(model(**batch, use_cache=False).logits, alone, atol=1e-5)
        return False

    assert not packs()
    undo = separate_documents(model)
    packed = model(**batch, use_cache=False).logits
    (gradient,) = torch.autograd.grad(packed.square().sum(), weight)
    assert packs()
    assert torch.allclose(gradient, wanted, atol=1e-4 * float(wanted.abs().max()))
    one = collator([{"input_ids": documents[0], "labels": documents[0]}])
    del one["labels"]
    assert torch.allclose(model(**one).logits, alone[:, : len(documents[0])], atol=1e-5)
    padded = torch.tensor([documents[0], [3] * 4 + documents[2]])
    assert torch.allclose(model(padded).logits[:1], model(padded[:1]).logits, atol=1e-5)
    undo()
    assert not packs()


@pytest.mark.parametrize("family", MIXERS)
def test_the_probe_finds_a_mixer_that_reads_across_documents(
    family: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The leak is injected: each mixer gets the packed row without its boundaries."""

    def across(inner: Any, _: Any, *args: Any, **kwargs: Any) -> Any:
        hidden = args[0] if args else kwargs["hidden_states"]
        return inner(hidden)

    collator = DataCollatorForLanguageModeling(pad_token_id=3, padding_free=True)
    model = family_model(family)
    model.set_attn_implementation(register())
    with monkeypatch.context() as leaking:
        leaking.setattr("ft_assets.training.packed_mixers._forward", across)
        undo = separate_documents(model)
    with pytest.raises(TrainingError, match="must not see each other"):
        prove_isolation(model, rows(3), collator)
    undo()
    separate_documents(model)
    assert prove_isolation(model, rows(3), collator) == 0.0


def test_packing_that_leaks_is_refused_or_left_out(
    tiny_model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    leaking(monkeypatch)
    said: list[str] = []

    def run(packing: Any) -> dict[str, Any]:
        settings = SftSettings(packing=packing, effective_batch=8, max_steps=2, learning_rate=1e-2)
        lora = LoraSettings(r=2, lora_dropout=0)
        output = tmp_path / f"out-{packing}"
        output.mkdir()
        return train_sft(
            snapshot=tiny_model,
            rows=rows(16),
            validation=[],
            lora=lora,
            sft=settings,
            checkpoints=tmp_path / f"c-{packing}",
            output=output,
            report=lambda text, **_: said.append(text),
        )

    with pytest.raises(TrainingError, match=r"sft\.packing"):
        run(True)
    metrics = run("auto")
    assert metrics["packed"] is False
    assert any("packing is off" in text for text in said)


def leaking(monkeypatch: pytest.MonkeyPatch) -> None:
    """Remove the separation of documents: the attention kernel itself does not leak."""
    monkeypatch.setattr(
        "ft_assets.training.attention._boundaries",
        lambda query, **_: (torch.tensor([0, query.shape[2]]), query.shape[2]),
    )


def test_without_packing_the_plan_is_made_anew(
    tiny_model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    leaking(monkeypatch)
    uneven = [*rows(14, 6), *rows(2, 200, seed=1)]  # 303 tokens packed, or 3,168 padded
    settings, lora, limit = (
        SftSettings(packing="auto", effective_batch=16, max_steps=2),
        LoraSettings(r=2, lora_dropout=0),
        0.006,
    )
    machine, lengths = (
        Machine(False, limit * 1e9, compute_dtype().itemsize),
        [len(row["input_ids"]) for row in uneven],
    )
    packed, padded = (
        make_plan(snapshot_shape(tiny_model), lora, settings, Data(lengths, kind), machine)
        for kind in (True, False)
    )
    assert packed.micro_batch > padded.micro_batch
    plans: list[dict[str, Any]] = []
    (tmp_path / "out").mkdir()
    metrics = train_sft(
        snapshot=tiny_model,
        rows=uneven,
        validation=[],
        lora=lora,
        sft=settings,
        checkpoints=tmp_path / "c",
        output=tmp_path / "out",
        report=lambda text, **numbers: plans.append(numbers) if text == "plan" else None,
        memory_limit_gb=limit,
    )
    assert padded.metrics().items() <= metrics.items()
    assert [padded.metrics().items() <= said.items() for said in plans] == [True]
    assert json.loads((tmp_path / "out/info/plan.json").read_text()) == padded.metrics()


def test_memory_that_runs_out_in_the_probe_is_no_fault_of_the_attention(
    tiny_model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    own, sizes = isolation._logits, []

    def full(model: Any, documents: list[list[int]], collator: Any) -> torch.Tensor:
        sizes.append(max(map(len, documents)))
        if sizes[-1] > most:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2 GiB")
        return own(model, documents, collator)

    monkeypatch.setattr(isolation, "_logits", full)

    def run(name: str) -> dict[str, Any]:
        settings = SftSettings(packing="auto", effective_batch=8, max_steps=2)
        (tmp_path / name).mkdir()
        lora = LoraSettings(r=2, lora_dropout=0)
        return train_sft(
            snapshot=tiny_model,
            rows=rows(16, 200),
            validation=[],
            lora=lora,
            sft=settings,
            checkpoints=tmp_path / f"c-{name}",
            output=tmp_path / name,
            report=lambda *_, **__: None,
        )

    most = 64
    metrics = run("shorter")
    assert (metrics["packed"], metrics["packing_leak"], sizes[-1]) == (True, 0.0, 64)
    most = 8
    with pytest.raises(MemoryPlanError, match="three documents of 16 tokens do not fit"):
        run("none")


@pytest.mark.slow
def test_the_same_run_packed_and_padded_ends_in_the_same_loss(
    tiny_model: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("ft_assets.models.loading.compute_dtype", lambda: torch.float32)
    monkeypatch.setattr("ft_assets.training.trl_options.compute_dtype", lambda: torch.float32)
    losses = []
    for packing, micro in ((True, None), (False, 2), (True, 4)):
        output = tmp_path / f"{packing}{micro}"
        output.mkdir()
        settings = SftSettings(
            packing=packing,
            effective_batch=8,
            micro_batch=micro,
            num_train_epochs=2,
            learning_rate=1e-2,
        )
        lora = LoraSettings(r=4, lora_dropout=0, target_modules="all-linear")
        metrics = train_sft(
            snapshot=tiny_model,
            rows=rows(20),
            validation=[],
            lora=lora,
            sft=settings,
            checkpoints=output / "c",
            output=output,
            report=lambda *_, **__: None,
        )
        assert metrics["steps"] == 6
        assert metrics["packed"] is packing
        losses.append([metrics["loss_first"], metrics["loss_last"]])
    assert losses[0] == pytest.approx(losses[1], abs=2e-4)
    assert losses[0] == pytest.approx(losses[2], abs=2e-4)


@pytest.mark.parametrize("packed", [True, False])
@pytest.mark.parametrize(
    ("count", "batch", "accumulation"), [(50, 8, 2), (7, 8, 4), (33, 16, 16), (64, 16, 1)]
)
def test_every_row_is_trained_once_an_epoch_in_the_steps_of_its_batch(
    packed: bool, count: int, batch: int, accumulation: int
) -> None:
    lengths = [len(row["input_ids"]) for row in rows(count)]
    sampler = StepBatches(lengths, batch, accumulation, 5, packed)
    orders = []
    for epoch in (0, 1):
        sampler.set_epoch(epoch)
        batches = list(sampler)
        assert len(batches) == len(sampler)
        assert sorted(row for rows_ in batches for row in rows_) == list(range(count))
        largest = largest_micro_batch(lengths, batch, accumulation, 5, 2, packed)
        sizes = [
            sum(lengths[row] for row in group)
            if packed
            else len(group) * max(lengths[row] for row in group)
            for group in batches
        ]
        assert max(sizes) <= largest
        orders.append(batches)
    assert (
        count <= batch or orders[0] != orders[1]
    )  # if one step has all rows, the order does not matter
    assert {frozenset(row for group in orders[0][:accumulation] for row in group)} == {
        frozenset(
            row for group in list(StepBatches(lengths, batch, 1, 5, packed))[:1] for row in group
        )
    }


@pytest.mark.parametrize("packed", [True, False])
@pytest.mark.parametrize(
    ("count", "batch", "accumulation", "ranks"),
    [(50, 8, 2, 2), (33, 16, 2, 4), (34, 16, 1, 3), (64, 16, 2, 8)],
)
def test_ranks_share_each_steps_rows(
    packed: bool, count: int, batch: int, accumulation: int, ranks: int
) -> None:
    """Test that each rank has `accumulation` micro-batches per step.

    Rows are repeated only in a step with fewer rows than ranks (the last of 33 rows has one).
    """
    lengths = [len(row["input_ids"]) for row in rows(count)]
    shares = [
        list(StepBatches(lengths, batch, accumulation, 5, packed, rank, ranks))
        for rank in range(ranks)
    ]
    assert len({len(share) for share in shares}) == 1
    assert all(
        len(share) == len(StepBatches(lengths, batch, accumulation, 5, packed, 0, ranks))
        for share in shares
    )
    assert all(group for share in shares for group in share)
    full = count // batch
    for number, expected in enumerate(steps(count, batch, 5, 0)):
        mine = [
            group
            for share in shares
            for group in share[number * accumulation : (number + 1) * accumulation]
        ]
        found = sorted(row for group in mine for row in group)
        assert set(found) == set(expected)
        assert number >= full or found == sorted(expected)


def test_packed_micro_batches_are_balanced() -> None:
    lengths = [len(row["input_ids"]) for row in rows(64, longest=100)]
    for group in [
        list(StepBatches(lengths, 32, 4, 1, True))[start : start + 4] for start in (0, 4)
    ]:
        tokens = [sum(lengths[row] for row in batch) for batch in group]
        assert max(tokens) - min(tokens) <= max(lengths)


def test_the_attentions_name_is_not_taken_for_a_flash_attention() -> None:
    assert "flash" not in NAME
