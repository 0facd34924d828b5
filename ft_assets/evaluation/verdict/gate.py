"""The gate of `merged_model`: it opens only for a PASS about exactly these versions.

A stored verdict is not trusted. The report's files are checked against their hashes, and the
verdict is recomputed from the numbers.
"""

from collections.abc import Callable, Mapping

from ft_assets.artifacts import Artifact, verify_files
from ft_assets.config import ADAPTERS, GateSettings
from ft_assets.errors import ArtifactError, VerdictError
from ft_assets.evaluation.report_model import EvalReport, Verdict
from ft_assets.evaluation.verdict.decision import PASS, decide

BOUND = (
    "base_model",
    "lora_adapter",
    "dpo_adapter",
    "rl_adapter",
    "heldout",
    "retention",
    "evaluation",
)
MADE_FROM = (  # (artifact, what it must have been made from)
    ("heldout_split", "chat_dataset"),
    ("chat_dataset", "base_model"),
    ("lora_adapter", "base_model"),
    ("dpo_adapter", "base_model"),
    ("dpo_adapter", "lora_adapter"),
)
# Only where a project has the stage. Without it, the adapter must not have been made from one.
TEXT = (("text_adapter", "base_model"), ("lora_adapter", "text_adapter"))
RL = (("rl_adapter", "base_model"), ("rl_adapter", "lora_adapter"))


def require_lineage(used: Mapping[str, Artifact], where: str) -> None:
    """Raise VerdictError unless the artifacts were made from each other.

    This rejects an adapter of another base, and rows tokenized with another template.
    """
    links = [*MADE_FROM, *(link for link in (*TEXT, *RL) if link[0] in used)]
    for name, source in links:
        then = used[name].manifest.inputs.get(source)
        now = used[source].data_version if source in used else None
        if then != now:
            raise VerdictError(
                where=where,
                found=f"{name} was made from another {source} ({then}, now {now})",
                expected=f"a {name} of this {source}",
                fix=f"materialize {name} again (ft run)",
            )


def bound_versions(used: Mapping[str, Artifact], evaluation: str) -> dict[str, str]:
    """Return the versions that a verdict is bound to.

    The base's version covers its weights, tokenizer and template. evaluation: the version of the
    evaluation's settings and of their files.
    """
    return {
        **{
            name: used[name].data_version
            for name in ("base_model", *ADAPTERS.values())
            if name in used
        },
        **{part: used["heldout_split"].part_version(part) for part in ("heldout", "retention")},
        "evaluation": evaluation,
    }


def require_pass(
    report: Artifact | None,
    versions: Mapping[str, str],
    gate: GateSettings,
    where: str,
    verify: Callable[[Artifact], object] = verify_files,
) -> Verdict:
    """Return the verdict if it is a PASS for exactly these versions, or overridden by config.

    verify: raises ArtifactError for a report that is not as it was written, e.g. a store's.
    Raises VerdictError.
    """
    if report is None:
        raise VerdictError(
            where=where,
            found="there is no eval_report",
            expected="a PASS verdict",
            fix="materialize eval_report first",
        )
    try:
        verify(report)
        numbers = EvalReport.read(report.path / "report.json")
    except (ArtifactError, OSError) as error:
        raise VerdictError(
            where=where,
            found=f"the eval_report cannot be trusted: {error}",
            expected="the report as it was written",
            fix="materialize eval_report again",
        ) from None
    asked = numbers.gate_confidence or numbers.confidence
    if asked != gate.confidence:
        raise VerdictError(
            where=where,
            found=f"the verdict has a confidence of {asked}, and gate.confidence is "
            f"{gate.confidence} now",
            expected="a verdict at today's confidence: its intervals are made for it",
            fix="materialize eval_report again",
        )
    verdict = decide(numbers, gate)
    for name in BOUND:
        judged = verdict.bound_to.get(name)
        if judged != (now := versions.get(name)):
            raise VerdictError(
                where=where,
                found=f"the verdict is about another {name} ({judged}, now {now})",
                expected="a verdict about exactly these versions",
                fix="materialize eval_report again",
            )
    if verdict.status == PASS:
        return verdict
    if gate.override:
        return verdict.model_copy(
            update={"candidate": verdict.reported_candidate, "override": gate.override}
        )
    raise VerdictError(
        where=where,
        found=f"the verdict is {verdict.status}: {'; '.join(verdict.reasons)}",
        expected=PASS,
        fix="see eval_report for what to try; gate.override takes a written reason and is recorded",
    )
