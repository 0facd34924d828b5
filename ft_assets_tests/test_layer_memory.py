"""Test the measured memory of a layer. On a CPU the tensors that autograd keeps are counted."""

import contextlib
from collections.abc import Iterator
from typing import Any

import pytest
import torch
from peft import LoraConfig, get_peft_model
from trl.trainer.sft_trainer import DataCollatorForLanguageModeling

from ft_assets.training import layer_memory
from ft_assets.training.layer_memory import measure_layers
from ft_assets.training.linears import fuse_linears
from ft_assets.training.memory_plan.estimate import Setup, predict
from ft_assets.training.memory_plan.model_shape import shape_of
from ft_assets_tests.families import family_model

ROWS: Any = [{"input_ids": [*range(4, 104)], "supervised": [True] * 100}] * 3


class Meter:
    """Counts the bytes of the tensors that autograd keeps, each storage once."""

    def __init__(self, frozen: set[int]) -> None:
        self.frozen = frozen
        self.held: dict[int, int] = {}
        self.now = self.most = 0

    def pack(self, tensor: torch.Tensor) -> Any:
        return _Held(self, tensor.detach())  # an output's history would hold itself

    def add(self, tensor: torch.Tensor, step: int) -> None:
        place = tensor.untyped_storage().data_ptr()
        before = self.held.get(place, 0)
        self.held[place] = before + step
        if place not in self.frozen and 0 in (before, self.held[place]):
            self.now += step * tensor.untyped_storage().nbytes()
            self.most = max(self.most, self.now)


class _Held:
    def __init__(self, meter: Meter, tensor: torch.Tensor) -> None:
        self.meter, self.tensor = meter, tensor
        meter.add(tensor, 1)

    def __del__(self) -> None:
        self.meter.add(self.tensor, -1)


@contextlib.contextmanager
def metered(model: Any, monkeypatch: pytest.MonkeyPatch) -> Iterator[Meter]:
    weights = (*model.parameters(), *model.buffers())
    meter = Meter({weight.untyped_storage().data_ptr() for weight in weights})
    monkeypatch.setattr(layer_memory, "_allocated", lambda: meter.now)
    with torch.autograd.graph.saved_tensors_hooks(meter.pack, lambda held: held.tensor):
        yield meter


def adapted(family: str) -> Any:
    config = LoraConfig(r=4, target_modules="all-linear", task_type="CAUSAL_LM")
    model = get_peft_model(family_model(family), config)
    fuse_linears(model)
    return model


@pytest.mark.parametrize("family", ["llama", "qwen3_5_text", "lfm2", "gemma3n_text"])
def test_layers_are_measured_one_at_a_time(family: str, monkeypatch: pytest.MonkeyPatch) -> None:
    model = adapted(family)
    collator = DataCollatorForLanguageModeling(pad_token_id=0)
    with metered(model, monkeypatch) as meter:
        kept = measure_layers(model, ROWS, collator, autocast=False)
        assert kept is not None
        assert 0 < kept.mean <= kept.largest
        # The whole model keeps four layers for these tokens; the measurement never holds two.
        assert meter.most < 1.5 * kept.largest * layer_memory.MORE
        meter.most = 0
        ids = torch.tensor([[*range(4, 196)], [*range(4, 196)]])
        outputs = model(input_ids=ids, use_cache=False)
        whole = meter.most
    layers = 4 * kept.mean * ids.numel()
    assert layers == pytest.approx(whole, rel=0.35)  # the rest is the head
    del outputs
    assert not any(module._forward_hooks for module in model.modules())


def test_a_measured_layer_takes_the_place_of_the_formula() -> None:
    shape = shape_of({"hidden_size": 64, "num_hidden_layers": 4, "vocab_size": 512})
    kept = layer_memory.Kept(mean=1000.0, largest=3000.0)
    setup = Setup.of(shape, 4, "attention", tokens=100, checkpointed_layers=1, kept=kept)
    parts = predict(shape, setup)
    assert parts["activations"] == 100 * (3 * 1000 + 2 * 64)
    assert parts["recomputed_layer"] == 100 * 3000
