"""The model card: what the merged model is made of, how good it is, and its limits."""

import json
from typing import Any


def model_card(
    partition: str,
    source: dict[str, Any],
    verdict: dict[str, Any],
    report_markdown: str,
    equivalence: dict[str, Any],
    recipe: dict[str, Any],
    versions: dict[str, str],
) -> str:
    """Return README.md of the merged model."""
    lines = [
        "---",
        "library_name: transformers",
        "tags: [fine-tuned, lora, merged]",
        "---",
        f"# {partition}, fine-tuned",
        "",
        f"Merged from **{verdict['candidate']}** on the base `{source}`. The base's licence applies.",
        "",
        f"Verdict: **{verdict['status']}**. " + "; ".join(verdict["reasons"]) + ".",
    ]
    if "override" in verdict:
        lines += ["", f"> **Released without a PASS.** Reason given in gate.override: {verdict['override']}"]
    lines += ["", "## Merged model against base + adapter", "", "| measure | value |", "|---|---|"]
    lines += [f"| {name} | {value:.5g} |" if isinstance(value, float) else f"| {name} | {value} |" for name, value in equivalence.items()]
    lines += ["", "## Evaluation", "", report_markdown.replace("\n# ", "\n### ").replace("\n## ", "\n### ").lstrip("# ")]
    lines += [
        "",
        "## Recipe",
        "",
        "```json",
        json.dumps(recipe, indent=1),
        "```",
        "",
        "## Versions",
        "",
        "```json",
        json.dumps(versions, indent=1),
        "```",
        "",
    ]
    return "\n".join(lines)
