"""Take one training step and one answer of a new base model, before anything is paid for.

Families differ in what their layers return, and in the arguments that they take. What fails in the
first step of a training, hours later, fails here with the name of the class.
"""

from pathlib import Path

import torch

from ft_assets.compat.trl import drop_unknown_routing_loss
from ft_assets.config import LoraSettings
from ft_assets.config.training import ALL_LINEAR
from ft_assets.errors import FtError, ModelError
from ft_assets.inference.generation import generate
from ft_assets.models.loading import load_base, load_tokenizer, stop_ids
from ft_assets.models.padding import padding_token
from ft_assets.models.targets import linears_of, save_linears
from ft_assets.training.adapter import adapted
from ft_assets.training.cpu_loss import supervised_loss

ROWS = (12, 8)  # tokens of the rows of the step; the second one is padded
NEW_TOKENS = 2


def try_base(where: str, snapshot: Path, lora: LoraSettings) -> str | None:
    """Record the base's linear layers, put the adapter of `lora` on it, and try it on the CPU.

    The adapter of `method: full` is one of all linear layers. Returns None, or what failed on a
    machine with a GPU: its kernels may be others. Raises ModelError for a base that fails without a
    GPU, and TrainingError for layers in lora.target_modules that the base does not have.
    """
    base = load_base(snapshot, dtype=torch.bfloat16, on_cpu=True)
    drop_unknown_routing_loss(base)
    save_linears(linears_of(base), snapshot)
    plain = LoraSettings(
        method="lora",
        r=1,
        target_modules=ALL_LINEAR if lora.method == "full" else lora.target_modules,
    )
    model = adapted(base, snapshot, plain)
    try:
        _one_step(model, snapshot)
        _one_answer(model, snapshot)
    except FtError:
        raise
    except Exception as error:  # a class of transformers raises anything
        return _refused(where, base, error)
    return None


def _one_step(model: torch.nn.Module, snapshot: Path) -> None:
    """Compute the loss and the gradients of two rows. Raises ValueError if one is not finite."""
    rows = _rows(model)
    width = max(ROWS)
    pad = padding_token(model, load_tokenizer(snapshot))
    inputs = {
        "input_ids": torch.tensor([row + [pad] * (width - len(row)) for row in rows]),
        "labels": torch.tensor([row + [-100] * (width - len(row)) for row in rows]),
        "attention_mask": torch.tensor([[1] * len(r) + [0] * (width - len(r)) for r in rows]),
    }
    loss = supervised_loss(model.train(), inputs, None)
    loss.backward()
    trained = [one for one in model.parameters() if one.requires_grad]
    gradients = [one.grad for one in trained if one.grad is not None]
    if not torch.isfinite(loss):
        raise ValueError(f"the loss of a step is {loss:g}")
    if not all(bool(torch.isfinite(one).all()) for one in gradients):
        raise ValueError("a gradient of a step is not finite")
    if not any(bool(one.any()) for one in gradients):
        raise ValueError("no layer with an adapter gets a gradient")
    model.zero_grad(set_to_none=True)


def _one_answer(model: torch.nn.Module, snapshot: Path) -> None:
    prompts = _rows(model)
    generate(model, load_tokenizer(snapshot), prompts, stop_ids(snapshot), NEW_TOKENS, len(prompts))


def _rows(model: torch.nn.Module) -> list[list[int]]:
    """Return rows of tokens from the middle of the vocabulary, where placeholders are not."""
    middle = model.config.get_text_config().vocab_size // 2  # type: ignore[union-attr]
    return [[middle + index for index in range(count)] for count in ROWS]


def _refused(where: str, base: torch.nn.Module, error: Exception) -> str:
    """Return what failed on a machine with a GPU. Raises ModelError without one."""
    text = " ".join(str(error).split())[:200]
    found = (
        f"a training step and an answer of {type(base).__name__} fail "
        f"({type(error).__name__}: {text})"
    )
    if torch.cuda.is_available():
        return f"on a CPU, {found}"
    raise ModelError(
        where=where,
        found=found,
        expected="a base that the installed libraries train and generate with",
        fix="set lora.target_modules to other layers, or name another base",
    ) from error
