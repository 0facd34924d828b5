"""Take a tiny random model of each family through the steps of the graph, and write a table.

    python -m bench.models docs/models.md
    python -m bench.models - llama mistral3  # some families, to look at

Each step is the product's own, on the CPU: snapshot, packing probe, SFT with validation, DPO with
its proven reference, merge and audit, answers of a batch against one at a time, GGUF. A cell is
what the step returned or refused. An exception of a library is a crash, and the exit code is 1.
"""

import contextlib
import io
import logging
import re
import sys
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

from ft_assets.errors import FtError
from ft_assets_tests.families import FAMILIES, WHOLES, family_model, whole_model

TARGETS = ("attention", "all-linear")
STEPS = ("base", "SFT, validation", "packed", "DPO", "one row a pair", "merge", "answers", "GGUF")
ROWS, SHARED, NEW = 8, 30, 10  # prompts; their shared tokens; tokens of an answer
INTRODUCTION = """# Families of base models

`python -m bench.models docs/models.md` makes this page: a tiny random model of each family, of
the class that its files name, through the steps of the graph on a CPU. ✓ is proven, ✗ is refused
with the reason below, – is not reached. Two marks stand for the targets `attention` and
`all-linear`.

- **base**: the snapshot is whole, its text part answers as the whole model does, and a step and an
  answer of `base_model`'s dry run with these targets work.
- **SFT, validation**: trained, with the loss of validation rows.
- **packed**: documents of a row are isolated. – trains without packing.
- **DPO**: the reference is proven at step 0. **one row a pair**: both answers share their prompt.
  – scores them apart.
- **merge**: every tensor of the merged file is the base's, or base + adapter.
- **answers**: the merged model's greedy answers of a batch equal those of one row at a time, in
  fp32.
- **GGUF**: ft_assets writes it; ✗ needs llama.cpp's script.
"""


class Cell(NamedTuple):
    """The result of a step: a mark, and the reason of a refusal or a crash."""

    mark: str
    reason: str = ""


def cell(step: Callable[[], bool]) -> Cell:
    """Run a step. ✓ or – is what it returns; a refusal is ✗, another exception a crash."""
    try:
        return Cell("✓" if step() else "–")
    except FtError as error:
        return Cell("✗", " ".join(str(error).splitlines()[0].split()))
    except Exception as error:  # the point of this table: none may reach a user
        return Cell("CRASH", f"{type(error).__name__}: {' '.join(str(error).split())[:200]}")


def run(name: str, folder: Path) -> Iterator[tuple[str, str, Cell]]:
    """Yield (step, target, result) of a family; a base that is not whole has no target."""
    from ft_assets.config import BaseModelSettings, LoraSettings
    from ft_assets.models.snapshot import write_snapshot
    from ft_assets.models.source import source_identity
    from ft_assets.training.dry_run import try_base
    from ft_assets_tests.factories import tiny_tokenizer

    source, base = folder / "source", folder / "base"
    model = whole_model(name) if name in WHOLES else family_model(name, scale=1).bfloat16()
    model.save_pretrained(source)
    tiny_tokenizer().save_pretrained(source)
    base.mkdir()
    settings = BaseModelSettings(folder=str(source))
    identity = source_identity("base", settings, folder)
    written = cell(lambda: bool(write_snapshot("base", settings, folder, identity, None, base)))
    if written.mark != "✓":
        yield "base", "", written
        return
    for target in TARGETS:
        lora = LoraSettings(target_modules=target)
        tried = cell(lambda lora=lora: try_base("base_models.base", base, lora) is None)
        yield "base", target, tried
        for step, result in _trained(base, folder / target, target) if tried.mark == "✓" else ():
            yield step, target, result


def _trained(base: Path, folder: Path, target: str) -> Iterator[tuple[str, Cell]]:
    """Yield the results of the steps after the snapshot, up to one that another one needs."""
    from ft_assets.export.gguf import why_not
    from ft_assets.merging.merge import merge
    from ft_assets_tests.training import dpo, sft

    lora = {"target_modules": target, "lora_dropout": 0.0}
    found: dict[str, Any] = {}

    def train() -> bool:
        found["sft"] = sft(base, folder / "sft", lora=lora, num_train_epochs=1)
        return "validation_loss" in found["sft"]

    def prefer() -> bool:
        found["dpo"] = dpo(base, adapter, folder / "dpo", lora=lora, num_train_epochs=1)
        return found["dpo"]["reference_difference"] == 0

    def merged_files() -> bool:
        merged.mkdir()
        merge(base, adapter, merged)
        return _audited(base, adapter, merged)

    adapter, merged = folder / "sft" / "output", folder / "merged"
    yield "SFT, validation", cell(train)
    if "sft" not in found:
        return
    yield "packed", Cell("✓" if found["sft"].get("packing_leak") == 0 else "–")
    yield "DPO", cell(prefer)
    if "dpo" in found:
        yield "one row a pair", Cell("✓" if found["dpo"]["prompts_shared"] else "–")
    result = cell(merged_files)
    yield "merge", result
    if result.mark == "✓":
        yield "answers", cell(lambda: _answers_are_equal(merged))
        reason = why_not(merged)
        named = re.sub(r"^\w+ (?=is not one of)", "its class ", reason or "")
        yield "GGUF", Cell("✗", named) if reason else Cell("✓")


def _audited(base: Path, adapter: Path, merged: Path) -> bool:
    from peft import PeftModel

    from ft_assets.merging.audit import audit
    from ft_assets.models.loading import load_base

    result = audit(PeftModel.from_pretrained(load_base(base), str(adapter)), base, merged)
    if result.faults:
        raise AssertionError(result.faults[0])
    return result.modules == result.adapter_modules


def _answers_are_equal(merged: Path) -> bool:
    import torch

    from ft_assets.inference.generation import generate
    from ft_assets.models.loading import load_base, load_tokenizer, stop_ids
    from ft_assets_tests.training import make_rows

    model = load_base(merged, dtype=torch.float32)
    tokenizer, stops = load_tokenizer(merged), stop_ids(merged)
    rows = make_rows(ROWS, 3)
    shared = (rows[0]["input_ids"] * SHARED)[:SHARED]
    prompts = [shared + row["input_ids"][: 4 + index] for index, row in enumerate(rows)]
    together = generate(model, tokenizer, prompts, stops, NEW, ROWS)
    alone = [generate(model, tokenizer, [prompt], stops, NEW)[0] for prompt in prompts]
    if [answer.ids for answer in together] != [answer.ids for answer in alone]:
        raise AssertionError("a batch answers otherwise than one row at a time")
    return True


def table(results: dict[str, list[tuple[str, str, Cell]]]) -> str:
    """Return the page of the results by family."""
    lines = [INTRODUCTION, f"| family | {' | '.join(STEPS)} |", "|---" * (len(STEPS) + 1) + "|"]
    reasons: dict[str, list[str]] = {}
    for name, cells in results.items():
        by_step: dict[str, list[str]] = {step: [] for step in STEPS}
        for step, target, found in cells:
            by_step[step].append(found.mark)
            if found.reason:
                place = f"{name} ({target})" if target else name
                reasons.setdefault(f"{step}: {found.reason}", []).append(place)
        marks = [" ".join(by_step[step]) or "–" for step in STEPS]
        lines.append(f"| `{name}` | {' | '.join(marks)} |")
    every = [found.mark for cells in results.values() for *_, found in cells]
    counts = f"{every.count('✓')} proven, {every.count('✗')} refused"
    lines += ["", f"{len(results)} families: {counts}, {every.count('CRASH')} crashes.", ""]
    lines += ["## Reasons", "", "| step and reason | families |", "|---|---|"]
    lines += [f"| {reason} | {', '.join(places)} |" for reason, places in reasons.items()]
    return "\n".join(lines) + "\n"


def main() -> None:
    """Run the families that are named, all by default, and write or print the table."""
    from transformers import logging as hf_logging

    hf_logging.set_verbosity_error()
    logging.disable(logging.WARNING)
    results = {}
    target, *names = sys.argv[1:] or ["-"]
    for name in names or [*FAMILIES, *WHOLES]:
        with tempfile.TemporaryDirectory() as folder, contextlib.redirect_stdout(io.StringIO()):
            results[name] = list(run(name, Path(folder)))
        print(name, *[f"{step} {found.mark}" for step, _, found in results[name]], file=sys.stderr)
    if target == "-":
        print(table(results), end="")
    else:
        Path(target).write_text(table(results), encoding="utf-8")
    if any(found.mark == "CRASH" for cells in results.values() for *_, found in cells):
        sys.exit(1)


if __name__ == "__main__":
    main()
