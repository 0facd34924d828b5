"""The asset `own_rehearsal`: the base's own answers to general prompts, for rehearsal."""

import dagster as dg

from ft_assets.artifacts import Artifact, file_sha256
from ft_assets.config import Project
from ft_assets.data.content import PROMPTS
from ft_assets.data.ingest import require_valid
from ft_assets.data.left_out import KIND
from ft_assets.data.tables import CONVERSATION, read_table
from ft_assets.errors import DataError
from ft_assets.markdown import table
from ft_assets.orchestration.declarations import Checked, Metrics, asset, check
from ft_assets.orchestration.links import rows_path
from ft_assets.orchestration.materializer import ERROR, WARN, Inputs, Materializer, result
from ft_assets.rows.types import ConversationRow
from ft_assets.steps import own_rehearsal as step

SHOWN = 20  # rows in the metadata
CELL = 160  # characters of a cell
ADVICE = {  # by the reason why most answers are left out
    "cut off": "raise data.rehearsal_max_new_tokens",
    "template": "see info/rejected.parquet: this base's template does not take the answers",
    "too long": "shorten the prompts, or lower data.rehearsal_max_new_tokens",
}
GENERAL = "name files of general conversations in data.rehearsal"


def has_own_rehearsal(project: Project) -> bool:
    """Return True if the bases answer general prompts for rehearsal."""
    return project.data.rehearsal_self


def own_rehearsal_stage(*assets: str):
    """Return the function that names further inputs of an asset: `assets`, with the stage."""
    return lambda project: assets if has_own_rehearsal(project) else ()


def _summary(metrics: Metrics) -> str:
    return f"{metrics['rows']} answers to {metrics['prompts']} general prompts"


@asset(
    deps=["base_model", "raw_dataset"],
    group="data",
    kinds=["parquet"],
    code_version="1",
    gpu=True,
    schema=CONVERSATION.schema,
    summary=_summary,
    only_if=has_own_rehearsal,
)
def own_rehearsal(
    context: dg.AssetExecutionContext, materializer: dg.ResourceParam[Materializer]
) -> dg.MaterializeResult:
    """The base's own answers to general prompts: trained beside the task, against forgetting.

    They are sampled with a fixed seed. One that is cut off, empty, or repetitive is left out.
    """
    name, project, store = context.partition_key, materializer.project, materializer.store
    data = project.data
    inputs: Inputs = {"base_model": (store.need("base_model", name), None)}
    if data.rehearsal_prompts:
        raw = store.need("raw_dataset", None)
        require_valid(raw.metrics, data.max_invalid, raw.asset)
        inputs = {**inputs, f"raw_dataset#{PROMPTS}": (raw, PROMPTS)}
    artifact, reused = materializer.materialize(
        context,
        identity={
            "max_new_tokens": data.rehearsal_max_new_tokens,
            "prompts": None if data.rehearsal_prompts else file_sha256(step.SHIPPED),
        },
        inputs=inputs,
        step=lambda: step.Settings(
            max_new_tokens=data.rehearsal_max_new_tokens,
            batch_size=project.recipe(name).evaluation.batch_size,
        ),
        libraries="infer",
    )
    page = rows_path(table="own_rehearsal", base_model=name)
    return result(
        artifact,
        reused,
        ("rows", "prompts"),
        answers=dg.MetadataValue.md(_first(artifact)),
        rows_page=dg.MetadataValue.url(page),
        **{"dagster/partition_row_count": artifact.metrics["rows"]},
    )


def _first(artifact: Artifact) -> str:
    """Return the first answers as a table in Markdown."""
    rows = read_table(artifact.path / f"{step.TABLE}.parquet", SHOWN, row=ConversationRow)
    lines = [[_cell(turn["content"]) for turn in row["messages"][-2:]] for row in rows]
    return table(["prompt", "the base's answer"], lines)


def _cell(text: str) -> str:
    return " ".join(text.split())[:CELL].replace("|", "\\|")


def own_rehearsal_of(materializer: Materializer, name: str) -> Inputs:
    """Return the input of what reads the answers: {} without them. Raises DataError for none."""
    if not has_own_rehearsal(materializer.project):
        return {}
    made = materializer.store.need("own_rehearsal", name)
    if not made.metrics["rows"]:
        raise DataError(
            where=f"own_rehearsal[{name}]",
            found=f"none of {made.metrics['prompts']} prompts has an answer to train on: "
            + _reasons(made.metrics),
            expected="the base's own answers to general prompts (data.rehearsal: self)",
            fix=_advice(made.metrics),
        )
    return {"own_rehearsal": (made, None)}


def answers_of_others(materializer: Materializer, name: str) -> list[Artifact]:
    """Return the answers of the other base models, as far as they are made: their ids are known."""
    project = materializer.project
    others = [other for other in project.base_models if other != name]
    made = (materializer.store.current("own_rehearsal", other) for other in others)
    return [one for one in made if one] if has_own_rehearsal(project) else []


@check(
    own_rehearsal,
    blocking=True,
    description="The base answers general prompts well enough to rehearse its answers.",
)
def base_answers_general_prompts(checked: Checked) -> dg.AssetCheckResult:
    """Fail without an answer. Warn if fewer than half of the prompts have one."""
    metrics = checked.metrics
    rows, prompts = metrics["rows"], metrics["prompts"]
    enough = rows * 2 >= prompts
    text = f"{rows} of {prompts} prompts have an answer"
    text += f"; left out: {reasons}" if (reasons := _reasons(metrics)) else ""
    return dg.AssetCheckResult(
        passed=enough,
        severity=WARN if rows else ERROR,
        description=text if enough else f"{text}. To do: {_advice(metrics)}",
    )


def _kinds(metrics: Metrics) -> dict[str, int]:
    found = {name.removeprefix(KIND): n for name, n in metrics.items() if name.startswith(KIND)}
    return dict(sorted(found.items(), key=lambda entry: -entry[1]))


def _reasons(metrics: Metrics) -> str:
    return ", ".join(f"{kind} {count}" for kind, count in _kinds(metrics).items())


def _advice(metrics: Metrics) -> str:
    own = ADVICE.get(next(iter(_kinds(metrics)), ""))
    return f"{own}, or {GENERAL}" if own else GENERAL
