"""Step: score all candidates on the same held-out rows, summarise, decide."""

import json
import statistics

import pyarrow as pa
import pyarrow.parquet as pq

from ft_assets.config import EvaluationSettings, GateSettings
from ft_assets.data.tables import read_table
from ft_assets.evaluation.candidates import score
from ft_assets.evaluation.plots import data_uri, score_plot
from ft_assets.evaluation.report import markdown, summarise, to_json
from ft_assets.evaluation.verdict import decide
from ft_assets.job import Job, Report, StepResult
from ft_assets.steps._run import main


def step(job: Job, report: Report) -> StepResult:
    settings, gate = EvaluationSettings.model_validate(job.settings["evaluation"]), GateSettings.model_validate(job.settings["gate"])
    split, raw = job.inputs["heldout_split"], job.inputs["raw_dataset"]
    heldout, retention = read_table(split / "heldout.parquet"), read_table(split / "retention.parquet")[: settings.retention_rows]
    adapters = {"sft": job.inputs["lora_adapter"]}
    if job.settings["has_dpo"]:
        adapters["dpo"] = job.inputs["dpo_adapter"]
    few_shot = read_table(raw / "few_shot.parquet")
    rows, losses, seconds = score(
        job.inputs["base_model"], adapters, heldout, retention, few_shot, job.settings["few_shot_system"], settings, report
    )
    numbers = summarise(rows, losses, settings, gate, job.settings["bound_to"])
    verdict = decide(numbers, gate)
    text = markdown(numbers, verdict, rows, heldout, job.partition or "")
    (job.output / "report.json").write_text(to_json(numbers))
    (job.output / "verdict.json").write_text(to_json(verdict))
    (job.output / "report.md").write_text(text)
    flat = [
        {
            "candidate": name,
            "id": row["id"],
            "prompt": json.dumps(row["messages"][:-1], ensure_ascii=False),
            "reference": row["messages"][-1]["content"],
            **answer,
        }
        for name, answers in rows.items()
        for row, answer in zip(heldout, answers, strict=True)
    ]
    pq.write_table(pa.Table.from_pylist(flat), job.output / "rows.parquet")
    (job.output / "info").mkdir()
    picture = score_plot(numbers)
    (job.output / "info" / "scores.png").write_bytes(picture)
    (job.output / "info" / "scores.txt").write_text(data_uri(picture))
    metrics = {f"{name}_{settings.metric}": round(numbers["scores"][name][settings.metric], 4) for name in rows}
    best = verdict["candidate"] or "sft"
    return StepResult(
        {
            "verdict": verdict["status"],
            "candidate": verdict["candidate"] or "none",
            "reason": "; ".join(verdict["reasons"]),
            "heldout_rows": len(heldout),
            **metrics,
            "gain_vs_base": round(numbers["comparisons"][best]["base"][settings.metric]["mean"], 4),
            "stop_rate": round(numbers["scores"][best]["stop_rate"], 4),
            **({"retention_change": round(numbers["retention"][best]["mean"], 4)} if numbers["retention"][best] else {}),
            "seconds": round(sum(seconds.values()), 1),
            "tokens_per_s": round(
                sum(statistics.fmean(row["tokens"] for row in rows[name]) * len(heldout) for name in rows) / sum(seconds.values()), 1
            ),
        }
    )


if __name__ == "__main__":
    main(step)
