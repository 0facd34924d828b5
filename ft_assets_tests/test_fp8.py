"""Products with the base in FP8. A CPU multiplies the same FP8 numbers in fp32."""

import dataclasses
from pathlib import Path
from typing import Any

import pytest
import torch
from pydantic import ValidationError

from ft_assets.config import DpoSettings, LoraSettings, SftSettings
from ft_assets.errors import ConfigError
from ft_assets.hardware import no_fp8
from ft_assets.training import fp8, fp8_probe, prepare
from ft_assets.training.base_products import DenseProducts, dense_weight
from ft_assets.training.fp8 import E4M3, Fp8Products, quantize, quantize_base
from ft_assets.training.fp8_mlp import fuse_mlps
from ft_assets.training.fp8_probe import Fp8Error
from ft_assets.training.linears import fuse_linears, group_of
from ft_assets.training.memory_plan.estimate import predict
from ft_assets.training.memory_plan.plan import Data, Machine, Request, make_plan
from ft_assets.training.sft import train_sft
from ft_assets_tests.test_linears import adapted, loss_and_gradients
from ft_assets_tests.test_memory_plan import DATA, SHAPE
from ft_assets_tests.test_packing import rows

NUMBERS = torch.arange(256, dtype=torch.uint8).view(E4M3).float()  # all that e4m3 has
ABLE = Machine(True, 80e9, 2, True, 989e12, ranks=1, no_fp8="")


def test_each_row_becomes_the_nearest_fp8_numbers_of_its_own_scale() -> None:
    generator = torch.Generator().manual_seed(1)
    left, right = (torch.randn(6, size, generator=generator) for size in (40, 24))
    left[2] *= 1e4
    left[4], right[4] = 0, 0
    factors = [torch.rand(40, generator=generator), torch.rand(24, generator=generator)]
    together = torch.cat([left * factors[0], right * factors[1]], 1)
    numbers, scale = quantize([left, right], factors)
    assert torch.equal(scale[:, 0], together.abs().amax(1).clamp(min=1e-20) / 448)
    known = NUMBERS[~NUMBERS.isnan()]
    distance = ((together / scale)[..., None] - known).abs().amin(-1)
    assert torch.allclose((together / scale - numbers.float()).abs(), distance, atol=1e-4)
    assert torch.equal(quantize([left[1:2], right[1:2]], factors)[0].float(), numbers[1:2].float())


@pytest.mark.parametrize("quantized", [False, True], ids=["16 bits", "NF4"])
def test_both_directions_multiply_with_one_fp8_weight(tiny_model: Path, quantized: bool) -> None:
    """Outputs and input gradients are near those of the dense weights, per product."""
    model = adapted(tiny_model, quantized)
    attention = model.get_base_model().model.layers[1].self_attn
    bases = [getattr(attention, name).base_layer for name in ("q_proj", "k_proj", "v_proj")]
    dense = DenseProducts(bases)
    generator = torch.Generator().manual_seed(2)
    x = torch.randn(9, bases[0].in_features, generator=generator)
    given = [torch.randn(9, base.out_features, generator=generator) for base in bases]
    given[0] *= 30  # gradients of one sum may differ much in size
    expected = [*dense.outputs(x), dense.input_gradient(given)]
    some = dense.input_gradient([None, None, given[2]])
    exact = [dense_weight(base, torch.float32) for base in bases]
    products = Fp8Products(bases)
    found = [*products.outputs(x), products.input_gradient(given)]
    for one, other in zip(found, expected, strict=True):
        # e4m3 has three bits after the point: a relative error of at most 1/16 in each factor.
        assert (one - other).norm() < 0.06 * other.norm()
    partly = products.input_gradient([None, None, given[2]])
    assert (partly - some).norm() < 0.06 * some.norm()
    assert products.input_gradient([None, None, None]) is None
    for weight, before in zip(products.weights, exact, strict=True):
        across = torch.empty(*reversed(weight.shape), dtype=E4M3)
        weight.write_by_input(across)
        assert torch.equal(across.float().T, weight.by_output().float())
        after = weight.by_output().float() * weight.scale[:, None]
        assert torch.allclose(after, before, rtol=1 / 16, atol=float(weight.scale.max()) / 512)


@pytest.mark.parametrize("quantized", [False, True], ids=["16 bits", "NF4"])
@pytest.mark.parametrize("checkpointing", [False, True])
def test_a_model_in_fp8_learns_nearly_the_same(
    tiny_model: Path, quantized: bool, checkpointing: bool
) -> None:
    model = adapted(tiny_model, quantized)
    fuse_linears(model)
    loss, gradients = loss_and_gradients(model)
    assert quantize_base(model) == 14
    if checkpointing:
        model.gradient_checkpointing_enable({"use_reentrant": False})
    fp8_loss, found = loss_and_gradients(model)
    assert 0 < abs(loss - fp8_loss) < 0.05
    one, other = (torch.cat([g.flatten() for g in which.values()]) for which in (gradients, found))
    assert 0.95 < torch.cosine_similarity(one, other, 0) < 1
    with torch.no_grad():  # the validation loss is that of the numbers that train
        assert model(input_ids=torch.tensor([[5, 9]])).logits.isfinite().all()


ATTENTION = ["q_proj", "k_proj", "v_proj", "o_proj"]


@pytest.mark.parametrize("quantized", [False, True], ids=["16 bits", "NF4"])
def test_a_fused_mlp_computes_what_its_layers_compute(tiny_model: Path, quantized: bool) -> None:
    model = adapted(tiny_model, quantized, target_modules=ATTENTION)
    fuse_linears(model)
    quantize_base(model)
    loss, gradients = loss_and_gradients(model)
    assert fuse_mlps(model) == 2
    fused_loss, fused = loss_and_gradients(model)
    assert fused_loss == pytest.approx(loss, abs=1e-3)
    for name, gradient in gradients.items():
        assert torch.cosine_similarity(gradient.flatten(), fused[name].flatten(), 0) > 0.99, name
    block = model.get_base_model().model.layers[0].mlp
    x = torch.randn(1, 3, 64, generator=torch.Generator().manual_seed(4), requires_grad=True)
    dense = [dense_of(weight) for weight in block_weights(block)]
    exact = torch.nn.functional.silu(x @ dense[0].T) * (x @ dense[1].T) @ dense[2].T
    weights = torch.randn(exact.shape, generator=torch.Generator().manual_seed(5))
    (expected,) = torch.autograd.grad((exact * weights).sum(), x)
    out = block(x)
    (found,) = torch.autograd.grad((out * weights).sum(), x)
    assert (out - exact).norm() < 0.1 * exact.norm()
    assert (found - expected).norm() < 0.1 * expected.norm()


def dense_of(weight: Any) -> torch.Tensor:
    return weight.by_output().float() * weight.scale[:, None]


def block_weights(block: Any) -> list[Any]:
    wide, down = (group_of(getattr(block, name)) for name in ("gate_proj", "down_proj"))
    assert wide is not None and down is not None
    return [*wide.products.weights, *down.products.weights]  # type: ignore[attr-defined]


@pytest.mark.parametrize("change", ["gelu", "adapter", "16 bits"])
def test_another_block_is_not_fused(tiny_model: Path, change: str) -> None:
    targets = [*ATTENTION, *(["up_proj"] if change == "adapter" else [])]
    model = adapted(tiny_model, target_modules=targets)
    if change == "gelu":
        for layer in model.get_base_model().model.layers:
            layer.mlp.act_fn = torch.nn.GELU()
    fuse_linears(model)
    if change != "16 bits":
        quantize_base(model)
    assert fuse_mlps(model) == 0


def train(
    model: Path, folder: Path, said: list[str] | None = None, **lora: Any
) -> tuple[dict[str, Any], bytes]:
    output = folder / "out"
    output.mkdir(parents=True)
    metrics = train_sft(
        snapshot=model,
        rows=rows(24),
        validation=rows(4, seed=3),
        lora=LoraSettings(r=4, lora_dropout=0.1, target_modules="all-linear", **lora),
        sft=SftSettings(effective_batch=8, num_train_epochs=1, learning_rate=1e-3),
        checkpoints=folder / "c",
        output=output,
        report=lambda text, **_: said.append(text) if said is not None else None,
    )
    return dict(metrics), (output / "adapter_model.safetensors").read_bytes()


@pytest.fixture
def able(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let this CPU pass for a machine with FP8 products; it multiplies the FP8 numbers in fp32."""
    own = prepare.this_machine

    def machine(memory_limit_gb: float | None = None) -> Machine:
        return dataclasses.replace(own(memory_limit_gb), no_fp8="")

    monkeypatch.setattr("ft_assets.training.sft.this_machine", machine)


def test_training_in_fp8_is_proven_and_recorded(
    tiny_model: Path, tmp_path: Path, able: None
) -> None:
    plain, before = train(tiny_model, tmp_path / "plain")
    metrics, adapter = train(tiny_model, tmp_path / "fp8", base_compute="fp8")
    assert metrics["base_compute"] == "fp8" and metrics["fp8_linears"] == 14
    assert metrics["packed"] and metrics["packing_leak"] == 0
    assert 0 < abs(metrics["fp8_loss_shift"]) < fp8_probe.MAX_LOSS_SHIFT
    assert fp8_probe.MIN_COSINE < metrics["fp8_gradient_cosine"] < 1
    assert adapter != before and metrics["loss_last"] == pytest.approx(plain["loss_last"], abs=0.05)
    assert "base_compute" not in plain and "fp8_linears" not in plain


def test_sums_are_fast_only_if_the_probe_finds_them_as_good(
    tiny_model: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A Hopper loses up to a quarter of a sum whose terms have one sign."""
    own, asked = fp8.multiply, []
    share = {"lost": 0.0}

    def lossy(*given: Any) -> torch.Tensor:
        asked.append(given[5])
        return own(*given) * (1 - share["lost"] * given[5])

    monkeypatch.setattr(fp8, "multiply", lossy)
    for lost, fast in ((0.0, True), (0.2, False)):
        share["lost"] = lost
        model = adapted(tiny_model, target_modules=ATTENTION)
        fuse_linears(model)
        metrics = fp8_probe.prove_fp8(model, rows(8))
        assert metrics["fp8_fast_sums"] is fast and metrics["fp8_mlps"] == 2
        assert metrics["fp8_gradient_cosine"] > fp8_probe.MIN_COSINE
        asked.clear()
        loss_and_gradients(model)
        assert set(asked) == {fast}


@pytest.mark.parametrize("limit", ["MIN_COSINE", "MAX_LOSS_SHIFT"])
def test_a_base_that_fails_the_proof_trains_in_16_bits_or_not_at_all(
    tiny_model: Path, tmp_path: Path, able: None, monkeypatch: pytest.MonkeyPatch, limit: str
) -> None:
    monkeypatch.setattr(fp8_probe, limit, {"MIN_COSINE": 0.99999, "MAX_LOSS_SHIFT": 1e-9}[limit])
    with pytest.raises(Fp8Error, match=r"moves the loss by .* cosine 0\.\d+"):
        train(tiny_model, tmp_path / "fp8", base_compute="fp8")
    said: list[str] = []
    metrics, adapter = train(tiny_model, tmp_path / "auto", said, base_compute="auto")
    assert "base_compute" not in metrics
    assert any("stay in 16 bits: on 8 rows FP8 moves the loss" in text for text in said)
    assert adapter == train(tiny_model, tmp_path / "bf16")[1]


def test_this_cpu_refuses_fp8_and_auto_tells_why(tiny_model: Path, tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="a CPU has no FP8 products") as refused:
        train(tiny_model, tmp_path / "fp8", base_compute="fp8")
    assert refused.value.where == "lora.base_compute"
    said: list[str] = []
    metrics, _ = train(tiny_model, tmp_path / "auto", said, base_compute="auto")
    assert "base_compute" not in metrics
    assert "products with the base are in 16 bits: a CPU has no FP8 products" in said


def test_auto_that_began_in_fp8_is_not_continued_in_16_bits(
    tiny_model: Path, tmp_path: Path, able: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    begun, adapter = train(tiny_model, tmp_path / "a", base_compute="auto")
    assert begun["base_compute"] == "fp8"
    (tmp_path / "a/out").rename(tmp_path / "first")
    resumed, again = train(tiny_model, tmp_path / "a", base_compute="auto")
    assert resumed["resumed_from_step"] == 3 and again == adapter
    (tmp_path / "a/out").rename(tmp_path / "second")
    monkeypatch.setattr("ft_assets.training.sft.this_machine", prepare.this_machine)
    with pytest.raises(ConfigError, match="auto was fp8 when the checkpoints") as refused:
        train(tiny_model, tmp_path / "a", base_compute="auto")
    assert "lora.base_compute: bf16, which makes another version" in refused.value.fix


def test_the_key_changes_no_fingerprint_that_does_not_set_it() -> None:
    assert "base_compute" not in LoraSettings().model_dump(mode="json")
    assert "base_compute" not in LoraSettings(base_compute="bf16").model_dump_json()
    for value in ("fp8", "auto"):
        data = LoraSettings(base_compute=value).model_dump(mode="json")
        assert LoraSettings.model_validate(data).base_compute == value


@pytest.mark.parametrize("other", [{"method": "full"}, {"use_dora": True}], ids=str)
def test_fp8_is_refused_where_the_16_bit_weights_are_needed(other: dict[str, Any]) -> None:
    with pytest.raises(ValidationError, match="base_compute fp8 does not go with"):
        LoraSettings(base_compute="fp8", **other)
    lora, machine = (
        LoraSettings(base_compute="auto", **other),
        dataclasses.replace(ABLE, memory=2e11),
    )
    assert not make_plan(SHAPE, lora, SftSettings(), DATA, machine).fp8


@pytest.mark.parametrize(
    ("change", "why"),
    [
        ({"no_fp8": no_fp8("A100", (8, 0))}, "A100 has compute capability 8.0, and FP8 needs 8.9"),
        ({"ranks": 2}, "2 ranks train"),
    ],
)
def test_a_plan_in_fp8_needs_one_rank_on_an_able_gpu(change: dict[str, Any], why: str) -> None:
    machine = dataclasses.replace(ABLE, **change)
    with pytest.raises(ConfigError, match=why):
        make_plan(SHAPE, LoraSettings(base_compute="fp8"), SftSettings(), DATA, machine)
    settings = LoraSettings(base_compute="auto")
    assert not make_plan(SHAPE, settings, SftSettings(), DATA, machine).fp8
    assert make_plan(SHAPE, settings, SftSettings(), DATA, ABLE).metrics()["base_compute"] == "fp8"
    pairs = Data([200] * 16, False, answers=2, reference=True, fp8=False)
    lora = LoraSettings(base_compute="fp8")  # DPO multiplies in 16 bits
    assert not make_plan(SHAPE, lora, DpoSettings(), pairs, ABLE, "dpo").fp8
    assert no_fp8("L4", (8, 9)) == no_fp8("H100", (9, 0)) == ""


def test_a_16_bit_base_halves_in_fp8_after_it_has_been_whole() -> None:
    """The numbers of training.md: measured peaks of an 8B shape on an H100."""
    parts = {}
    for compute in ("bf16", "fp8"):
        lora = LoraSettings(method="lora", base_compute=compute)
        request = Request(SHAPE, lora, SftSettings(), DATA, ABLE)
        parts[compute] = {
            tokens: predict(SHAPE, next(request.setups("lora", tokens))) for tokens in (256, 18_471)
        }
    dense, halved = parts["bf16"], parts["fp8"]
    assert halved[256]["weights"] == pytest.approx(
        dense[256]["weights"] - SHAPE.linear_parameters, rel=1e-6
    )
    # Few tokens: the peak is the probe, before the 16-bit weights are replaced.
    assert halved[256]["total"] > dense[256]["weights"]
    assert halved[18_471]["total"] < dense[18_471]["total"]
