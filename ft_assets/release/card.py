"""The model card: what the merged model is made of, how good it is, what was not measured, and how to make it again.

A pure function of plain data; `CardFacts` comes from assets/card_facts.py. The front matter is written by huggingface_hub's
own class, so that the hub reads it. Nothing is guessed: a base that states no licence has none here.
"""

from collections.abc import Mapping
from typing import Any

from ft_assets.evaluation.plots import LABELS
from ft_assets.evaluation.report_markdown import retention_table, score_table, step_table
from ft_assets.evaluation.report_model import EvalReport, Verdict
from ft_assets.markdown import table as markdown_table

CardFacts = Mapping[str, Any]


def model_card(
    facts: CardFacts,
    verdict: Verdict,
    report: EvalReport,
    equivalence: Mapping[str, Any],
) -> str:
    """Return README.md of the merged model.

    facts: what assets/card_facts.py collects. verdict, report: verdict.json and report.json of the evaluation (the report with the
    file in its adapter's place, where the evaluation judged another model: merged onto what NF4 makes of the base). equivalence:
    how good the merged file itself is and how far from base + adapter, as the merge step measured it.
    """
    sections = [
        _opening(facts, verdict, report, equivalence),
        _use(facts),
        _results(verdict, report, equivalence),
        _general(report),
        _limits(facts, verdict, report),
        _data(facts),
        _training(facts, verdict),
        _merge(equivalence),
        _again(facts),
    ]
    body = "\n\n".join(section for section in sections if section)
    return f"---\n{_front_matter(facts, verdict, report, equivalence)}\n---\n\n{body}\n"


def _front_matter(
    facts: CardFacts,
    verdict: Verdict,
    report: EvalReport,
    equivalence: Mapping[str, Any],
) -> str:
    from huggingface_hub import EvalResult, ModelCardData

    license_ = facts["license"]
    candidate, metric = verdict.candidate, report.metric
    heldout = next(row for row in facts["data"] if row["name"] == "held-out")
    result = EvalResult(
        task_type="text-generation",
        dataset_type="private",
        dataset_name=f"held-out rows {heldout['fingerprint']}",
        metric_type=metric,
        metric_name=f"{metric} of this file on {report.heldout_rows} held-out rows (base {report.scores['base'][metric]:.4f}, "
        f"adapter before the merge {equivalence[f'adapter_{metric}']:.4f})",
        metric_value=round(equivalence[f"merged_{metric}"], 4),
    )
    data = ModelCardData(
        base_model=facts["base"]["hub"] or license_["derived_from"],
        license=license_["license"] or "unknown",
        license_name=license_["name"],
        license_link=license_["link"],
        library_name="transformers",
        pipeline_tag="text-generation",
        tags=[
            "fine-tuned",
            facts["method"],
            *(["dpo"] if candidate == "dpo" else []),
            "merged",
            f"verdict-{verdict.status.lower()}",
        ],
        datasets=facts["hub_datasets"] or None,
        model_name=facts["partition"],
        eval_results=[result],
        data_fingerprints={row["name"]: row["fingerprint"] for row in facts["data"]},
    )
    return data.to_yaml()


def _candidate(verdict: Verdict) -> str:
    assert verdict.candidate is not None, "a merged model has a candidate"
    return verdict.candidate


def _opening(
    facts: CardFacts,
    verdict: Verdict,
    report: EvalReport,
    equivalence: Mapping[str, Any],
) -> str:
    base, license_, metric = facts["base"], facts["license"], report.metric
    lines = [f"# {facts['partition']}, fine-tuned", ""]
    lines += [
        f"`{base['source']}` with its {LABELS[_candidate(verdict)]} merged in: {base['parameters']:,} parameters in bf16.",
        "",
    ]
    lines += [
        f"**Verdict: {verdict.status}** on {report.heldout_rows} held-out rows, about the adapter before the merge.",
        "",
    ]
    lines += [f"- {reason}" for reason in verdict.reasons]
    low, high = equivalence["merged_gain_low"], equivalence["merged_gain_high"]
    lines += [
        "",
        f"**This file itself**, asked again from disk: {metric} {equivalence[f'merged_{metric}']:.3f}, ",
    ]
    lines[-1] += f"{equivalence['merged_gain']:+.3f} against the base [{low:+.3f}, {high:+.3f}]; "
    lines[-1] += f"the adapter before the merge: {equivalence[f'adapter_{metric}']:.3f}."
    if verdict.override is not None:
        lines += [
            "",
            f"> **Released without a PASS.** Reason given in `gate.override`: {verdict.override}",
        ]
    revision = (
        f"revision `{base['revision']}`" if base["revision"] else f"content `{base['fingerprint']}`"
    )
    derived = f", made from `{license_['derived_from']}`" if license_["derived_from"] else ""
    table = [
        ["", ""],
        ["base model", f"`{base['source']}`, {revision}{derived}"],
        [
            "architecture",
            f"{base['architecture']}, {base['layers']} layers, context {base['context'] or 'not stated'}",
        ],
        ["licence", _license(license_)],
    ]
    return "\n".join([*lines, "", markdown_table(table[0], table[1:])])


def _license(license_: Mapping[str, Any]) -> str:
    if license_["license"] is None:
        why = f" ({license_['stated_in']})" if license_["stated_in"] else ""
        return f"unknown: see the base; its metadata states none{why}"
    more = " ".join(part for part in (license_["name"], license_["link"]) if part)
    return f"`{license_['license']}`{f' {more}' if more else ''}, passed on from the base (stated in {license_['stated_in']})"


def _use(facts: CardFacts) -> str:
    return f"""## Use

```python
from transformers import pipeline

chat = pipeline("text-generation", "path/to/this/folder", dtype="bfloat16")
messages = [{{"role": "user", "content": "…"}}]
print(chat(messages, max_new_tokens={facts["max_new_tokens"]}, do_sample=False)[0]["generated_text"][-1]["content"])
```

It was trained and judged with the chat template in this folder, with greedy decoding{_system(facts)}. {_words(facts["words"])}"""


def _words(words: Mapping[str, Any]) -> str:
    """Return what differs from the base in template, stop tokens and tokenizer."""
    changed = (
        [f"the chat template is `{words['chat_template']}` of the recipe, not the base's own"]
        if words["chat_template"]
        else []
    )
    changed += (
        [f"of its chat templates only `{words['template_name']}` is kept"]
        if words["template_name"]
        else []
    )
    changed += [
        f"the template has `{name}` set to `{value}`"
        for name, value in words["template_kwargs"].items()
    ]
    changed += (
        ["the template puts the system turn into the first user turn"]
        if words["system_turn"] == "user"
        else []
    )
    settled = words["settled"]
    changed += (
        [f"generation also stops at `{token}`" for token in settled["stops_added"]]
        if settled
        else []
    )
    changed += (
        [f"`{settled['pad_added']}` is the pad token, where it had none"]
        if settled and settled["pad_added"]
        else []
    )
    unknown = (
        "" if settled else " Whether a stop or pad token was added to the base's was not recorded."
    )
    if not changed:
        return f"The base's template, its stop tokens and its tokenizer are unchanged.{unknown}"
    return f"Unlike in the base, {'; '.join(changed)}. Else its template, stop tokens and tokenizer are unchanged.{unknown}"


def _system(facts: CardFacts) -> str:
    return ", and with the system turn that its data has" if facts["has_system_turn"] else ""


def _results(verdict: Verdict, report: EvalReport, equivalence: Mapping[str, Any]) -> str:
    lines = [
        f"## Results on {report.heldout_rows} held-out rows",
        "",
        markdown_table(*score_table(report)),
        "",
    ]
    label = LABELS[_candidate(verdict)]
    if equivalence.get("merge_base") == "dequantized":
        lines.append(
            f"{label}, here and below, is this file itself: merged onto what NF4 makes of the base it is another model than the"
        )
        lines.append("one that the evaluation judged, which is the adapter on the 16-bit base.")
    else:
        lines.append(
            f"{label}, here and below, is the adapter on the 16-bit base, as it was judged; what rounding it into this file changed"
        )
        lines.append("stands in the last but one section.")
    percent = f"{report.confidence:.0%}".replace("%", " %")
    lines += [
        "",
        f"Intervals are {percent} bootstrap intervals. Paired, row by row:",
        "",
        markdown_table(*step_table(report)),
    ]
    return "\n".join(lines)


def _general(report: EvalReport) -> str:
    general = report.retention
    if general is None:
        return ""
    title = f"## General prompts: {general.rows}, of which {general.answered} were answered"
    return "\n".join([title, "", markdown_table(*retention_table(report))])


def _limits(facts: CardFacts, verdict: Verdict, report: EvalReport) -> str:
    lines = [
        "Better than its base *on these rows, by this metric* is the claim; good enough for you is yours to judge."
    ]
    lines.append(
        f"Answers were capped at {facts['max_new_tokens']} tokens and decoded greedily; sampling was not measured."
    )
    if report.retention is None:
        lines.append("**What it forgot was not measured**: there were no general prompts.")
    if not report.harness.scores:
        lines.append("No public benchmark was run.")
    if "few_shot" not in report.scores:
        lines.append("It was not compared with a few-shot prompt to the base.")
    lines.append(
        "Safety, bias, and languages or topics that the held-out rows do not have were not measured."
    )
    lines.append(
        "Quantized forms of it (GGUF, NF4) answer somewhat differently; their agreement stands beside them."
    )
    entry = report.comparisons[_candidate(verdict)]["base"][report.metric]
    if entry.detectable:
        lines.append(
            f"{entry.n} rows find a difference of {entry.detectable:.3f} four times in five; a smaller one can go unseen."
        )
    return "\n".join(["## Limits", "", *[f"- {line}" for line in lines]])


def _data(facts: CardFacts) -> str:
    table = [["data", "rows", "fingerprint"]]
    table += [
        [
            row["name"],
            f"{row['rows']:,}" if row["rows"] is not None else "–",
            f"`{row['fingerprint']}`",
        ]
        for row in facts["data"]
    ]
    note = "A fingerprint is the hash of the rows' content: order, file names and doubles do not count."
    return "\n".join(
        [
            "## Data",
            "",
            markdown_table(table[0], table[1:]),
            "",
            *([facts["data_note"], ""] if facts["data_note"] else []),
            note,
        ]
    )


def _training(facts: CardFacts, verdict: Verdict) -> str:
    stages = ("lora", "sft", "dpo") if verdict.candidate == "dpo" else ("lora", "sft")
    rows = [["setting", "value"]]
    for stage in stages:
        rows += [
            [f"`{stage}.{name}`", f"`{value}`"]
            for name, value in facts["recipe"][stage].items()
            if value not in (None, {}, [])
        ]
    did = [["", ""], *[[name, str(value)] for name, value in facts["training"].items()]]
    return "\n".join(
        ["## Training", "", markdown_table(did[0], did[1:]), "", markdown_table(rows[0], rows[1:])]
    )


def _merge(equivalence: Mapping[str, Any]) -> str:
    lines = [
        "## The file against base + adapter",
        "",
        "Read from disk after the merge, on the same held-out prompts.",
        "",
    ]
    rows = [["measure", "value"]]
    for name, value in equivalence.items():
        rows.append(
            [name.replace("_", " "), f"{value:.5g}" if isinstance(value, float) else str(value)]
        )
    return "\n".join([*lines, markdown_table(rows[0], rows[1:])])


def _again(facts: CardFacts) -> str:
    versions = " ".join(f"{name}=={version}" for name, version in facts["versions"].items())
    return f"""## How to make it again

With the data above beside this `finetune.yaml` (what is not named has its default):

```yaml
{facts["yaml"].rstrip()}
```

```bash
ft run --base {facts["partition"]}
```

Versions: Python {facts["python"]}, {versions}.

Judged were exactly these versions: {_bound(facts["bound_to"])}."""


def _bound(versions: Mapping[str, str]) -> str:
    return ", ".join(f"{name.replace('_', ' ')} `{version}`" for name, version in versions.items())
