"""The text of a new finetune.yaml, with comments: what a library that writes YAML would lose."""

import glob
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

import yaml

from ft_assets.commands.init.base_source import BaseSource

if TYPE_CHECKING:
    from ft_assets.commands.init.survey import Found

HELDOUT_AIMED_AT = 100  # rows: with fewer, only a large gain is significant
SMALL = """\
# Defaults fit a 7-8B model. This one is small: it needs a higher learning rate and all linear
# layers.
lora: {r: 16, lora_alpha: 32, target_modules: all-linear}
sft: {num_train_epochs: 2, learning_rate: 1.0e-3, effective_batch: 8, micro_batch: 8}"""
USUAL = """\
# Defaults fit a 7-8B model: r 16, alpha 32, attention, 2e-4. Below 1B, take these:
# lora: {target_modules: all-linear}
# sft: {learning_rate: 1.0e-3, effective_batch: 8}"""


def project_text(relative: Callable[[Path], str], source: BaseSource, found: "Found") -> str:
    """Return the file's text. `relative` returns a path as the file names it."""
    answers, sources = found.answers, found.sources

    def entries(key: str, paths: list[Path]) -> str:
        return f"{key}: {_inline([glob.escape(relative(path)) for path in paths])}"

    heldout = (
        f"  {entries('heldout', sources.heldout)}"
        if sources.heldout
        else "  # heldout: [data/production.jsonl]"
    )
    preferences = (
        f"  {entries('preferences', sources.preferences)}   "
        if sources.preferences
        else "  # preferences: [data/pairs.jsonl]      "
    )
    return f"""\
# The one file you edit. Paths are relative to it. An unknown key is an error that names the nearest
# known one.

data:
  # {found.shape}
  {entries("train", sources.train)}{_reading(found)}
  # Prefer held-out rows that look like production and were never trained on. Without them, a share
  # of train is held out.
{heldout}
  heldout_share: {share(found)}
  # retention: general prompts. Without them, forgetting is not measured.
  # retention: [data/general.jsonl]
  # rehearsal: general conversations, trained beside the task against forgetting. `self`: the base
  # makes them, by its own answers to prompts that ft_assets has.
  # rehearsal: [self]                    # or files: [data/more_general.jsonl]
{preferences}# prompt, chosen, rejected: DPO after SFT
  # text: [documents]                    # continued pretraining before SFT, on .txt, .md, `text`
  # few_shot: [data/few_shot.jsonl]      # the rival: the base with these examples in its prompt

base_models:                             # one partition of the graph each
  {_inline(source.name)}:
    {source.kind}: {_inline(source.value)}{_revision(source)}

{SMALL if source.is_default else USUAL}

evaluation:
{_evaluation(found)}
  max_new_tokens: {answers.max_new_tokens}  # the longest answer has {answers.longest} bytes

# What a PASS needs; docs/verdict.md has every key:
# gate: {{max_retention_loss: 0.2, min_heldout_rows: 40}}
# Retrain on a schedule, which you switch on in the UI:
# schedule: {{cron: "0 3 * * 1", timezone: Europe/Berlin}}
"""


def _reading(found: "Found") -> str:
    """Return the lines that say how the rows are read."""
    lines: list[str] = []
    if found.columns:
        lines.append(f"columns: {_inline({'train': found.columns})}")
    if found.encoding:
        lines.append(f"encoding: {_inline(found.encoding)}")
    if found.sources.ignored:
        lines.append(f"ignored: {_inline(found.sources.ignored)}")
    if found.sources.ignored_keys:
        lines.append(f"ignore_turn_keys: {_inline(found.sources.ignored_keys)}")
    if found.unread:
        lines.append(f"# Not read: {found.unread}. Name here what is left out on purpose:")
        lines.append("# ignored: []")
    return "".join(f"\n  {line}" for line in lines)


def _evaluation(found: "Found") -> str:
    answers = found.answers
    seen = "" if found.ended else f" in the first {found.total} rows"
    if answers.json_fields:
        metric = "field_f1" if len(answers.json_fields) > 1 else "exact"
        other = "; exact: only the whole object counts" if metric == "field_f1" else ""
        return (
            f"  # Every answer is a JSON object with these keys{seen}.\n"
            f"  json_fields: {_inline(answers.json_fields)}\n"
            f"  metric: {metric}  # the verdict is about this one{other}"
        )
    if answers.labels:
        return (
            f"  # Every answer is one of these{seen}. The metric ignores case, quotes and a final "
            "full stop.\n"
            f"  labels: {_inline(answers.labels)}\n"
            "  metric: label  # the verdict is about this one"
        )
    return (
        "  # The answers are free text. exact fits short ones; for longer ones set "
        "metrics: [rouge, chrf] and metric: chrf, or a judge.\n"
        "  metric: exact  # the verdict is about this one"
    )


def share(found: "Found") -> float:
    """Return a share that holds out enough rows, but never more than three in ten."""
    if not found.ended:
        return 0.1
    return round(min(0.3, max(0.1, HELDOUT_AIMED_AT / found.answers.count)), 2)


def _revision(source: BaseSource) -> str:
    if source.kind != "hub":
        return ""
    return (
        "\n    # revision: main                     # a commit here needs no hub once it is in "
        "the cache"
    )


def _inline(value: Any) -> str:
    """Return a value as YAML on one line, quoted where it must be."""
    text = yaml.safe_dump(
        value, default_flow_style=True, width=10**9, allow_unicode=True, sort_keys=False
    )
    return text.removesuffix("\n").removesuffix("\n...").strip()
