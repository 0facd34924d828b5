"""Step: render and tokenize every conversation and preference pair with the model's own template, proven row by row."""

import statistics
from typing import Any

from ft_assets.chat.rendering import ProofFailed, render_answer, render_supervised
from ft_assets.config import ChatSettings
from ft_assets.data.tables import REJECTED, TOKENIZED, TOKENIZED_PREFERENCE, read_table, rows_version, write_table
from ft_assets.job import Job, Report, StepResult
from ft_assets.models.loading import load_tokenizer, stop_ids
from ft_assets.steps._run import main


def step(job: Job, report: Report) -> StepResult:
    settings = ChatSettings.model_validate(job.settings)
    snapshot = job.inputs["base_model"]
    tokenizer, stops = load_tokenizer(snapshot), stop_ids(snapshot)
    ledger: dict[str, Any] = {}
    refused: list[dict[str, str]] = []
    parts = {}
    for name in ("conversations", "rehearsal", "heldout", "retention"):
        rows, too_long = [], 0
        for row in read_table(job.inputs["raw_dataset"] / f"{name}.parquet"):
            try:
                rendered = render_supervised(tokenizer, row["messages"], stops)
            except ProofFailed as problem:
                refused.append({"where": f"{name} {row['id']} ({row['source']})", "problem": str(problem)})
                continue
            if len(rendered.input_ids) > settings.max_length:
                too_long += 1
                continue
            rows.append({**row, "input_ids": rendered.input_ids, "supervised": rendered.supervised})
        write_table(job.output / f"{name}.parquet", rows, TOKENIZED)
        parts[name] = rows_version(rows)
        ledger.update({f"{name}_rows": len(rows), f"{name}_too_long": too_long})
        if name == "conversations":
            ledger.update(_ledger(rows))
        report(f"rendered {name}", rows=len(rows), too_long=too_long)
    pairs, too_long = [], 0
    for row in read_table(job.inputs["raw_preferences"] / "preferences.parquet"):
        try:
            prompt, chosen = render_answer(tokenizer, row["messages"], row["chosen"], stops)
            _, rejected = render_answer(tokenizer, row["messages"], row["rejected"], stops)
        except ProofFailed as problem:
            refused.append({"where": f"preference {row['id']} ({row['source']})", "problem": str(problem)})
            continue
        if len(prompt) + max(len(chosen), len(rejected)) > settings.max_length:
            too_long += 1
            continue
        pairs.append({**row, "prompt_ids": prompt, "chosen_ids": chosen, "rejected_ids": rejected})
    write_table(job.output / "preferences.parquet", pairs, TOKENIZED_PREFERENCE)
    parts["preferences"] = rows_version(pairs)
    (job.output / "info").mkdir()
    write_table(job.output / "info" / "refused.parquet", refused, REJECTED)
    total = sum(count for key, count in ledger.items() if key.endswith(("_rows", "_too_long"))) + len(pairs) + too_long + len(refused)
    ledger.update({"preferences_rows": len(pairs), "preferences_too_long": too_long, "refused": len(refused), "total": total})
    if refused:
        ledger["first_refused"] = f"{refused[0]['where']}: {refused[0]['problem']}"
    return StepResult(ledger, parts)


def _ledger(rows: list[dict[str, Any]]) -> dict[str, Any]:
    if not rows:
        return {}
    lengths = sorted(len(row["input_ids"]) for row in rows)
    tokens, supervised = sum(lengths), sum(sum(row["supervised"]) for row in rows)
    return {
        "tokens": tokens,
        "supervised_tokens": supervised,
        "supervised_percent": round(100 * supervised / tokens, 2),
        "length_median": statistics.median(lengths),
        "length_p95": lengths[min(len(lengths) - 1, int(0.95 * len(lengths)))],
        "length_max": lengths[-1],
    }


if __name__ == "__main__":
    main(step)
