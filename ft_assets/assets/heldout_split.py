"""The asset `heldout_split`: train, validation and held-out rows by hash of their prompt."""

import itertools
import json
import math
from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path

import dagster as dg
from pydantic import JsonValue

from ft_assets.artifacts import Artifact
from ft_assets.assets.own_rehearsal import answers_of_others, own_rehearsal_of
from ft_assets.config import DataSettings, EvaluationSettings, settings_version
from ft_assets.data.content import CONVERSATIONS
from ft_assets.data.excluded import excluded_ids
from ft_assets.data.leakage import leaks
from ft_assets.data.left_out import counted, left_out_rows
from ft_assets.data.mixing import read_sources, shares_table, shortages, source_name
from ft_assets.data.origins import PART as ORIGINS
from ft_assets.data.origins import origins_of, several
from ft_assets.data.split import make_split
from ft_assets.data.tables import TOKENIZED, read_table
from ft_assets.evaluation.context import Room
from ft_assets.evaluation.reachable import (
    places,
    read_targets,
    run_on_references,
    unreachable,
)
from ft_assets.evaluation.references import last_answer
from ft_assets.evaluation.setting_files import program_version, read_schema, user_metric_version
from ft_assets.job import StepResult
from ft_assets.markdown import table
from ft_assets.models.loading import context_length, load_tokenizer, stop_ids
from ft_assets.orchestration.declarations import Checked, Metrics, asset, check
from ft_assets.orchestration.links import rows_path
from ft_assets.orchestration.materializer import WARN, Materializer, result
from ft_assets.rows.types import ConversationRow, TokenizedRow

SPLITTING = {
    "heldout_share",
    "validation_share",
    "heldout_slice",
    "split_salt",
    "near_duplicate",
    "quoted",
    "max_left_out",
    "stratify",
}
SHOWN = 50  # rows that are left out
CELL = 120  # characters of their texts
LEFT_OUT = "left_out_"  # metrics by kind
Strata = dict[str, dict[str, int]]  # {stratum: {side of the split: rows}}


def _summary(metrics: Metrics) -> str:
    text = f"{metrics['train_rows']} train, {metrics['heldout_rows']} held-out rows"
    for name, shown in (("heldout_groups", "in {} groups"), ("left_out", "with {} left out")):
        text += " " + shown.format(metrics[name]) if metrics.get(name) else ""
    return text


@asset(
    deps=["chat_dataset", "raw_dataset"],
    group="data",
    kinds=["parquet"],
    code_version="9",
    schema=TOKENIZED.schema,
    summary=_summary,
)
def heldout_split(
    context: dg.AssetExecutionContext, materializer: dg.ResourceParam[Materializer]
) -> dg.MaterializeResult:
    """Train and held-out rows by hash of their prompt.

    The split is the same for every base model, and growing data moves no row.
    """
    data, store = materializer.project.data, materializer.store
    chat = store.need("chat_dataset", context.partition_key)
    raw = store.need("raw_dataset", None)
    targets = raw.path / "contamination.parquet"
    preferences = store.need("raw_preferences", None)
    exclude = excluded_ids(materializer.project.root, data.exclude)
    own = [made for made, _ in own_rehearsal_of(materializer, context.partition_key).values()]
    # data.exclude is of all base models. The table of this one's own answers is the last.
    answers = [*(answers_of_others(materializer, context.partition_key) if exclude else ()), *own]
    mixing = data.mixing()
    artifact, reused = materializer.materialize(
        context,
        identity={
            **data.model_dump(mode="json", include=SPLITTING),
            **({"exclude": exclude} if exclude else {}),
            **({"mixing": mixing} if mixing else {}),
        },
        inputs={
            "chat_dataset": (chat, None),
            "raw_dataset#contamination": (raw, "contamination"),
            **({f"raw_dataset#{ORIGINS}": (raw, ORIGINS)} if several(data) else {}),
        },
        make=lambda output: _split(
            *(chat.path, targets, output, data),
            _tables(raw, store.verified(preferences), *map(store.verified, answers)),
            exclude,
            origins_of(raw.path),
        ),
    )
    strata: Strata = json.loads((artifact.path / "info" / "strata.json").read_text())
    shown = {"strata": dg.MetadataValue.md(_table(strata))} if strata else {}
    made = {one.asset: one for one in (raw, preferences, *own, chat, artifact)}
    shown |= _left_out(made)
    if len(sources := read_sources(artifact.path)) > 1:
        shown["sources"] = dg.MetadataValue.md(table(*shares_table(sources)))
    page = dg.MetadataValue.url(rows_path(base_model=context.partition_key))
    rows = artifact.metrics["train_rows"]
    first = ("train_rows", "validation_rows", "heldout_rows", "retention_rows")
    more = {"rows_page": page, "dagster/partition_row_count": rows}
    return result(artifact, reused, first, **shown, **more)


def _tables(raw: Artifact, *others: Artifact) -> list[Path]:
    """Return the tables with all rows, as they were before they were tokenized."""
    conversations = (raw.path / f"{name}.parquet" for name in CONVERSATIONS.values())
    return [*conversations, *(path for one in others for path in one.path.glob("*.parquet"))]


def _split(
    chat: Path,
    targets: Path,
    output: Path,
    data: DataSettings,
    tables: Sequence[Path],
    exclude: Sequence[str],
    origins: Path | None,
) -> StepResult:
    split = make_split(chat, targets, output, data, tables, exclude, origins)
    return StepResult(split.counts, split.versions)


def raw_dataset_of(checked: Checked) -> Artifact:
    """Return the raw dataset, verified."""
    store = checked.materializer.store
    return store.verified(store.need("raw_dataset", None))


def _table(strata: Strata) -> str:
    lines = ["| stratum | train | validation | held-out |", "|---|---:|---:|---:|"]
    lines += [
        f"| {name} | {sides['train']} | {sides['validation']} | {sides['heldout']} |"
        for name, sides in sorted(strata.items())
    ]
    return "\n".join(lines)


def _left_out(made: Mapping[str, Artifact]) -> dict[str, dg.MarkdownMetadataValue]:
    """Return the rows that are left out at any step: their number by reason, and the first 50."""
    rows = left_out_rows({asset: artifact.path for asset, artifact in made.items()})
    first = list(itertools.islice(rows, SHOWN))
    counts = counted([artifact.metrics for artifact in made.values()])
    if not counts:
        return {}
    lines = [", ".join(f"{reason} {count}" for reason, count in counts.items()), ""]
    lines += ["| reason | row | text | repeats | text |", "|---|---|---|---|---|"]
    lines += [
        f"| {row['reason']} | {_cell(row['where'])} | {_cell(row['text'] or row['problem'])} "
        f"| {_cell(row['twin'])} | {_cell(row['twin_text'])} |"
        for row in first
    ]
    lines += ["", "`ft status --left-out` prints all of them, with the reasons in full."]
    return {"left_out_rows": dg.MetadataValue.md("\n".join(lines))}


def _cell(text: str) -> str:
    """Return text for a cell of a Markdown table."""
    return " ".join(text[:CELL].replace("|", "\\|").split())


@check(
    heldout_split,
    blocking=True,
    description="No prompt is on two sides: train, preferences, held-out, retention.",
    fix="remove one row of the pair from the data files, then run again",
)
def nothing_leaks(checked: Checked) -> dg.AssetCheckResult:
    """Fail with the first offending pair of ids. Train and preferences may share prompts."""
    split, data = checked.artifact.path, checked.project.data
    raw = raw_dataset_of(checked).path
    found = leaks(split, raw / "contamination.parquet", raw / "few_shot.parquet", data)
    if found.sentences:
        text = f"{found.sentences[0]} ({len(found.sentences)} in all)"
    else:
        text = "no prompt is on two sides"
        if data.near_duplicate:
            text += f", nor one that is {data.near_duplicate:.0%} alike"
        if left_out := checked.metrics.get("left_out"):
            kinds = ", ".join(
                f"{name.removeprefix(LEFT_OUT)} {count}"
                for name, count in checked.metrics.items()
                if name.startswith(LEFT_OUT)
            )
            text += f"; {left_out} rows that repeat a held-out row were left out ({kinds})"
    return dg.AssetCheckResult(
        passed=not found.sentences, description=text, metadata=dict(found.counts)
    )


@check(
    heldout_split,
    blocking=True,
    description="An answer that equals its reference gets the best score, on every held-out row.",
)
def references_can_be_reached(checked: Checked) -> dg.AssetCheckResult:
    """Fail with the file and line of each reference that the evaluation's metrics cannot reach."""
    project = checked.project
    settings = project.recipe(checked.name).evaluation
    targets = read_targets(checked.artifact.path / "heldout.parquet")
    raw = raw_dataset_of(checked)
    where = partial(places, raw.path)
    schema = read_schema(project, settings)
    errors = unreachable(targets, settings, project.gate, schema, where)
    own = settings.user_metric or settings.program
    if own and not errors and not (passed := _scored(checked, settings)).exists():
        errors = run_on_references(targets, settings, project.root, where)
        if not errors:
            _note(passed)
    text = f"each of {len(targets)} references has the best score against itself"
    return dg.AssetCheckResult(
        passed=not errors,
        description="\n".join(map(str, errors)) or text,
        metadata={"longest_reference_tokens": max((one.tokens for one in targets), default=0)},
    )


def _scored(checked: Checked, settings: EvaluationSettings) -> Path:
    """Return the file that notes that the user's code scored these references: once is enough."""
    project = checked.project
    decisive = [
        checked.artifact.part_version("heldout"),
        settings.model_dump(mode="json", include={"python", "program"}),
        user_metric_version(project, settings),
        program_version(project, settings),
    ]
    return noted(checked, decisive)


def noted(checked: Checked, decisive: list[JsonValue]) -> Path:
    """Return the file that holds what a check found for what decides it, if it found anything."""
    return checked.materializer.store.root / ".work" / "scored" / settings_version(decisive)


def _note(passed: Path) -> None:
    passed.parent.mkdir(parents=True, exist_ok=True)
    passed.touch()


@check(
    heldout_split,
    blocking=True,
    description="Each prompt to answer, the few-shot prompt too, leaves room for its answer.",
)
def prompts_fit_the_context(checked: Checked) -> dg.AssetCheckResult:
    """Fail with the number of few-shot examples that fit the model's context."""
    name, store, split = checked.name, checked.materializer.store, checked.artifact.path
    settings, data = checked.project.recipe(name).evaluation, checked.project.data
    raw = raw_dataset_of(checked).path
    examples = read_table(raw / "few_shot.parquet", row=ConversationRow)
    base = store.verified(store.need("base_model", name)).path
    room = Room(context_length(base), settings.max_new_tokens)
    heldout = read_table(split / "heldout.parquet", row=TokenizedRow)
    general = read_table(split / "retention.parquet", settings.retention_rows, row=TokenizedRow)
    error = room.rows_error(_prompts(heldout)) or room.rows_error(
        _prompts(general[: settings.retention_answers]), "retention"
    )
    fits = noted(
        checked,
        [
            store.need("base_model", name).data_version,
            checked.artifact.part_version("heldout"),
            store.need("raw_dataset", None).part_version("few_shot"),
            data.few_shot_system,
            settings.max_new_tokens,
        ],
    )
    if error is None and examples and not fits.exists():
        # Importing the tokenizer takes longer than the rest of a run with nothing to do.
        from ft_assets.chat.rendering import Renderer

        renderer = Renderer(load_tokenizer(base), stop_ids(base))
        error = room.few_shot_error(renderer, heldout, examples, data.few_shot_system)
        if error is None:
            _note(fits)
    limit = f"the context of {room.context} tokens" if room.context else "no limit of the context"
    return dg.AssetCheckResult(
        passed=error is None, description=str(error or f"prompts and answers fit {limit}")
    )


def _prompts(rows: list[TokenizedRow]) -> dict[str, int]:
    """Return the tokens of each row's prompt."""
    return {row["id"]: last_answer(row["supervised"])[0] for row in rows}


@check(heldout_split, description="Each entry with a number of rows has as many on the train side.")
def sources_are_as_asked(checked: Checked) -> dg.AssetCheckResult:
    """Warn with the entries of data.train and data.rehearsal that have fewer rows than asked."""
    sources = read_sources(checked.artifact.path)
    short = shortages(sources)
    text = "; ".join(f"{source_name(one.key, one.path)}: {one.portion}" for one in sources)
    if short:
        text = f"{'; '.join(short)}: all of them are trained; a weight above 1 repeats rows"
    return dg.AssetCheckResult(passed=not short, severity=WARN, description=text)


@check(heldout_split, description="Every value of data.stratify's field has held-out rows.")
def strata_are_held_out(checked: Checked) -> dg.AssetCheckResult:
    """Warn with the strata that have no held-out row: the verdict does not cover them."""
    file = checked.artifact.path / "info" / "strata.json"
    strata: Strata = json.loads(file.read_text())
    missing = [name for name, sides in strata.items() if not sides["heldout"]]
    text = "data.stratify is not set"
    if strata:
        text = f"{len(strata) - len(missing)} of {len(strata)} strata have held-out rows"
    if missing:
        text += f"; none: {', '.join(missing[:10])}; raise data.stratify.shares for them"
    return dg.AssetCheckResult(passed=not missing, severity=WARN, description=text)


@check(
    heldout_split, description="There are enough held-out rows to tell a better model from luck."
)
def heldout_is_large_enough(checked: Checked) -> dg.AssetCheckResult:
    """Warn below gate.min_heldout_rows. Rows that belong together count once."""
    rows = checked.metrics["heldout_rows"]
    groups = checked.metrics.get("heldout_groups", rows)
    least = checked.project.gate.min_heldout_rows
    return dg.AssetCheckResult(
        passed=groups >= least,
        severity=WARN,
        description=f"{groups} groups in {rows} held-out rows; gate.min_heldout_rows is {least}",
    )


@check(heldout_split, description="The held-out share is near data.heldout_share.")
def heldout_share_is_as_asked(checked: Checked) -> dg.AssetCheckResult:
    """Warn if the share is less than half or more than twice what was asked, and not by chance.

    By chance it is within three standard deviations of a binomial count of groups.
    """
    far, text = realised_share(checked.metrics)
    return dg.AssetCheckResult(passed=not far, severity=WARN, description=text)


def realised_share(metrics: Metrics) -> tuple[bool, str]:
    """Return whether the realised held-out share is far from the asked one, and a sentence."""
    if "heldout_share" not in metrics:
        return False, "data.heldout names the held-out rows"
    share, asked = metrics["heldout_share"], metrics["heldout_share_asked"]
    groups, largest = metrics["groups"], metrics["largest_group_rows"]
    chance = 3 * math.sqrt(asked * (1 - asked) / groups)
    far = not asked / 2 <= share <= asked * 2 and abs(share - asked) > chance
    text = f"{share:.1%} of the rows are held out; {asked:.1%} were asked for"
    if far:
        text += (
            f": a group is on one side as a whole, and the largest of {groups} groups has "
            f"{largest} rows; split it by the rows' `group`, or name a file in data.heldout"
        )
    return far, text
