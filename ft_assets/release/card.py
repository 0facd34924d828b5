"""Write the model card of a merged model.

It has the origin of the model, its quality, the unmeasured risks, and the steps to reproduce it.
This is a pure function of `CardFacts` (card_facts.py) and the evaluation. The front matter is
written by huggingface_hub's own class, so that the hub can read it. Nothing is guessed: if the base
does not state a licence, the card does not either.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Self

from ft_assets.evaluation.plots import LABELS
from ft_assets.evaluation.report_markdown import (
    heldout_count,
    retention_table,
    score_table,
    step_table,
    use_sentence,
)
from ft_assets.evaluation.report_model import Estimate, EvalReport, Verdict
from ft_assets.markdown import table
from ft_assets.models.license import BaseLicense
from ft_assets.release.card_facts import CardFacts, DataFacts, TemplateFacts
from ft_assets.release.provenance import PROVENANCE

LATER = ("dpo", "rl")  # candidates whose training goes on from SFT


@dataclass(frozen=True)
class MergedFile:
    """The measurements of the merged file itself: its score, and its distance from the adapter.

    score, adapter_score: by the gate's metric. gain: against the base. merge_base: the weights it
    was merged onto, if there was a choice. measures: all measurements under their names.
    """

    score: float
    adapter_score: float
    gain: Estimate
    merge_base: str | None
    measures: Mapping[str, Any]

    @classmethod
    def of(cls, metrics: Mapping[str, Any], metric: str) -> Self:
        """Read the measurements from the keys of the manifest of a merged model."""
        return cls(
            score=metrics[f"merged_{metric}"],
            adapter_score=metrics[f"adapter_{metric}"],
            gain=Estimate(
                mean=metrics["merged_gain"],
                low=metrics["merged_gain_low"],
                high=metrics["merged_gain_high"],
            ),
            merge_base=metrics.get("merge_base"),
            measures=metrics,
        )


def model_card(facts: CardFacts, verdict: Verdict, report: EvalReport, file: MergedFile) -> str:
    """Write README.md of the merged model.

    report: of the evaluation. If the file was merged onto the NF4 round trip of the base, which the
    evaluation did not judge, the report with the file in place of its adapter.
    """
    sections = [
        _opening(facts, verdict, report, file),
        _usage(facts),
        _results(verdict, report, file),
        _general_prompts(report),
        _limits(facts, verdict, report),
        _data(facts),
        _training(facts, verdict),
        _equivalence(file),
        _reproduction(facts),
    ]
    body = "\n\n".join(section for section in sections if section)
    return f"---\n{_front_matter(facts, verdict, report, file)}\n---\n\n{body}\n"


def _front_matter(facts: CardFacts, verdict: Verdict, report: EvalReport, file: MergedFile) -> str:
    from huggingface_hub import EvalResult, ModelCardData

    metric = report.metric
    others = (
        f"base {report.scores['base'][metric]:.4f}, "
        f"adapter before the merge {file.adapter_score:.4f}"
    )
    result = EvalResult(
        task_type="text-generation",
        dataset_type="private",
        dataset_name=f"held-out rows {facts.heldout.fingerprint}",
        metric_type=metric,
        metric_name=f"{metric} of this file on {report.heldout_rows} held-out rows ({others})",
        metric_value=round(file.score, 4),
    )
    later = [verdict.candidate] if verdict.candidate in LATER else []
    data = ModelCardData(
        base_model=facts.base.hub or facts.license.derived_from,
        license=facts.license.license or "unknown",  # type: ignore[arg-type]  # a list is allowed
        license_name=facts.license.name,
        license_link=facts.license.link,
        library_name="transformers",
        pipeline_tag="text-generation",
        tags=["fine-tuned", facts.method, *later, "merged", f"verdict-{verdict.status.lower()}"],
        datasets=facts.hub_datasets or None,
        model_name=facts.partition,
        eval_results=[result],
        data_fingerprints={rows.name: rows.fingerprint for rows in facts.data},
    )
    return data.to_yaml()


def _opening(facts: CardFacts, verdict: Verdict, report: EvalReport, file: MergedFile) -> str:
    base = facts.base
    label = LABELS[verdict.merged_candidate]
    gain = file.gain
    interval = f"[{gain.low:+.3f}, {gain.high:+.3f}]"
    lines = [
        f"# {facts.partition}, fine-tuned",
        "",
        f"`{base.source}` with its {label} merged in: {base.parameters:,} parameters in bf16.",
        "",
        f"**Verdict: {verdict.status}** on {report.heldout_rows} held-out rows, "
        "about the adapter before the merge.",
        "",
        *[f"- {reason}" for reason in verdict.reasons],
        "",
        f"**This file itself**, scored again from disk: {report.metric} {file.score:.3f}, "
        f"{gain.mean:+.3f} against the base {interval}; "
        f"the adapter before the merge: {file.adapter_score:.3f}.",
    ]
    if verdict.override is not None:
        reason = f"Reason given in `gate.override`: {verdict.override}"
        lines += ["", f"> **Released without a PASS.** {reason}"]
    version = f"revision `{base.revision}`" if base.revision else f"content `{base.fingerprint}`"
    derived = facts.license.derived_from
    origin = f"`{base.source}`, {version}{f', made from `{derived}`' if derived else ''}"
    context = base.context or "not stated"
    rows = [
        ["base model", origin],
        ["architecture", f"{base.architecture}, {base.layers} layers, context {context}"],
        ["licence", _license(facts.license)],
    ]
    return "\n".join([*lines, "", table(["", ""], rows)])


def _license(stated: BaseLicense) -> str:
    if stated.identifier is None:
        why = f" ({stated.stated_in})" if stated.stated_in else ""
        return f"unknown: see the base; its metadata states none{why}"
    more = " ".join(part for part in (f"`{stated.identifier}`", stated.name, stated.link) if part)
    return f"{more}, passed on from the base (stated in {stated.stated_in})"


def _usage(facts: CardFacts) -> str:
    tokens = facts.recipe.evaluation.max_new_tokens
    system = ", and with the system turn of its data" if facts.has_system_turn else ""
    return f"""## Use

```python
from transformers import pipeline

chat = pipeline("text-generation", "path/to/this/folder", dtype="bfloat16")
messages = [{{"role": "user", "content": "…"}}]
answer = chat(messages, max_new_tokens={tokens}, do_sample=False)[0]
print(answer["generated_text"][-1]["content"])
```

It was trained and judged with the chat template in this folder, with greedy decoding{system}. \
{_template(facts.template)}"""


def _template(template: TemplateFacts) -> str:
    """Describe the differences from the base in template, stop tokens and tokenizer."""
    changed: list[str] = []
    if template.chat_template:
        own = f"`{template.chat_template}` of the recipe, not the base's own"
        changed.append(f"the chat template is {own}")
    if template.template_name:
        changed.append(f"of its chat templates only `{template.template_name}` is kept")
    changed += [
        f"the template has `{name}` set to `{value}`"
        for name, value in template.template_kwargs.items()
    ]
    if template.system_turn == "user":
        changed.append("the template puts the system turn into the first user turn")
    added = template.added
    if added is not None:
        changed += [f"generation also stops at `{token}`" for token in added.stops_added]
        if added.pad_added:
            changed.append(f"`{added.pad_added}` is the pad token, where it had none")
    unknown = ""
    if added is None:
        unknown = " Whether a stop or pad token was added to the base's was not recorded."
    if not changed:
        return f"The base's template, its stop tokens and its tokenizer are unchanged.{unknown}"
    return (
        f"Unlike in the base, {'; '.join(changed)}. "
        f"Otherwise its template, stop tokens and tokenizer are unchanged.{unknown}"
    )


def _results(verdict: Verdict, report: EvalReport, file: MergedFile) -> str:
    label = LABELS[verdict.merged_candidate]
    if file.merge_base == "dequantized":
        meaning = (
            f"{label}, here and below, is this file itself. It was merged onto the NF4 round trip "
            "of the base,\nso it is a different model from the one that the evaluation judged, the "
            "adapter on the 16-bit base."
        )
    else:
        meaning = (
            f"{label}, here and below, is the judged adapter on the 16-bit base. The change by "
            "rounding it into this file\nis in the section before the last."
        )
    percent = f"{100 * report.confidence:.4g} %"
    return "\n".join(
        [
            f"## Results on {heldout_count(report)}",
            "",
            table(*score_table(report)),
            "",
            meaning,
            "",
            f"Intervals have {percent} confidence. Paired, row by row:",
            "",
            table(*step_table(report)),
        ]
    )


def _general_prompts(report: EvalReport) -> str:
    general = report.retention
    if general is None:
        return ""
    title = f"## General prompts: {general.rows}, of which {general.answered} were answered"
    return "\n".join([title, "", table(*retention_table(report))])


def _limits(facts: CardFacts, verdict: Verdict, report: EvalReport) -> str:
    tokens = facts.recipe.evaluation.max_new_tokens
    lines = [
        "The claim is: better than its base *on these rows, by this metric*. Whether it is good "
        "enough for you is your decision.",
        f"Answers were capped at {tokens} tokens and decoded greedily; sampling was not measured.",
    ]
    used = use_sentence(report)
    lines.append(f"{used[0].upper()}{used[1:]}.")
    if report.retention is None:
        lines.append("**What it forgot was not measured**: there were no general prompts.")
    if not report.harness.scores:
        lines.append("No public benchmark was run.")
    if "few_shot" not in report.scores:
        lines.append("It was not compared with a few-shot prompt to the base.")
    lines.append(
        "Safety, bias, and languages or topics that the held-out rows do not have were not "
        "measured."
    )
    lines.append(
        "Quantized formats of it (GGUF, NF4) answer somewhat differently; their agreement is "
        "stated beside them."
    )
    difference = report.comparisons[verdict.merged_candidate]["base"][report.metric]
    if difference.detectable:
        lines.append(
            f"{difference.n} rows detect a difference of {difference.detectable:.3f} four times in "
            "five; a smaller one can be missed."
        )
    return "\n".join(["## Limits", "", *[f"- {line}" for line in lines]])


def _data(facts: CardFacts) -> str:
    rows = [[one.name, _count(one), f"`{one.fingerprint}`"] for one in facts.data]
    note = [facts.data_note, ""] if facts.data_note else []
    meaning = (
        "A fingerprint is the hash of the rows' content, independent of order, file names and "
        "duplicates."
    )
    header = ["data", "rows", "fingerprint"]
    return "\n".join(["## Data", "", table(header, rows), "", *note, meaning])


def _count(rows: DataFacts) -> str:
    return "–" if rows.rows is None else f"{rows.rows:,}"


def _training(facts: CardFacts, verdict: Verdict) -> str:
    recipe = facts.recipe.model_dump(mode="json")
    later = (verdict.candidate,) if verdict.candidate in LATER else ()
    text = ("text",) if "text" in recipe else ()
    stages = ("lora", *text, "sft", *later)
    settings = [
        [f"`{stage}.{name}`", f"`{value}`"]
        for stage in stages
        for name, value in recipe[stage].items()
        if value not in (None, {}, [])
    ]
    numbers = [[name, str(value)] for name, value in facts.training.items()]
    tables = [table(["", ""], numbers), "", table(["setting", "value"], settings)]
    return "\n".join(["## Training", "", *tables])


def _equivalence(file: MergedFile) -> str:
    rows = [
        [name.replace("_", " "), f"{value:.5g}" if isinstance(value, float) else str(value)]
        for name, value in file.measures.items()
    ]
    note = "Read from disk after the merge, on the same held-out prompts."
    title = "## The file against base + adapter"
    return "\n".join([title, "", note, "", table(["measure", "value"], rows)])


def _reproduction(facts: CardFacts) -> str:
    libraries = " ".join(f"{name}=={version}" for name, version in facts.libraries.items())
    judged = ", ".join(
        f"{name.replace('_', ' ')} `{version}`" for name, version in facts.bound_to.items()
    )
    return f"""## How to make it again

With the data above and this `finetune.yaml` (other keys have their defaults):

```yaml
{facts.yaml.rstrip()}
```

```bash
ft run --base {facts.partition}
```

Versions: Python {facts.python}, {libraries}.

The verdict is about exactly these versions: {judged}.

{_integrity(facts)}"""


def _integrity(facts: CardFacts) -> str:
    text = f"`{PROVENANCE}` beside this card has the data, base, and steps with their hashes."
    if facts.signed_with is None:
        return text
    return (
        f"{text} Merged in a project that signs with the key of SHA-256 `{facts.signed_with}`.\n"
        "`model_signing verify key . --signature model.sig --public_key release.pub` verifies a "
        "pushed release."
    )
