"""Score each held-out reference against itself, as if a model had generated exactly its tokens.

A row on which even the reference fails is a row on which no model can succeed. Its cause is in the
data or in the settings, so it is found before any training. Needs no model and no tokenizer:
chat_dataset stores the text that the reference's tokens decode to.
"""

import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from ft_assets.config import EvaluationSettings, GateSettings
from ft_assets.data.tables import Table
from ft_assets.errors import EvaluationError
from ft_assets.evaluation.references import last_answer, stored_reference
from ft_assets.metrics import Metric, Option
from ft_assets.metrics.json_schema import schema_problem
from ft_assets.metrics.label import option_index
from ft_assets.metrics.program import program_outcomes
from ft_assets.metrics.registry import ROUNDING
from ft_assets.metrics.tool_calls import unread_calls
from ft_assets.metrics.user_function import UserFunction
from ft_assets.metrics.values import Values
from ft_assets.rows.types import ConversationRow, Message, TokenizedRow, ToolCall

COLUMNS = ["id", "messages", "options", "supervised", "expected", "decoded"]
SHOWN = 80  # characters of a text in a message
PLACES = 5  # further rows that a message names
Where = Callable[[Sequence[str]], Mapping[str, str]]


@dataclass(frozen=True)
class Target:
    """A held-out reference. decoded: the text of an answer with exactly its tokens.

    tokens: the length of that answer with its end of turn. options: the row's own options.
    messages: the turns before the answer. calls: those of the row's own answer.
    """

    id: str
    reference: str
    decoded: str
    tokens: int
    options: tuple[str, ...] = ()
    messages: tuple[Message, ...] = ()
    calls: tuple[ToolCall, ...] = ()


def _require_text(one: Target) -> None:
    """Raise EvaluationError for a reference that has no text: every empty answer equals it."""
    if not one.reference:
        raise EvaluationError(
            where="a held-out row",
            found="the reference is empty without the tokenizer's special tokens",
            expected="a text: special tokens are dropped from answers",
            fix="correct the row, or hold out rows with a text",
        )


def _require_readable_calls(one: Target) -> None:
    """Raise EvaluationError unless the calls of a row can be read from its decoded text."""
    problem = unread_calls(one.decoded, one.calls) if one.calls else None
    if problem is not None:
        raise EvaluationError(
            where="a held-out row",
            found=f"the template writes the calls as {one.decoded[:SHOWN]!r}: {problem}",
            expected="calls as JSON, name{…}, Python calls, <function=…> or <arg_key> tags",
            fix="set chat.chat_template to one that writes one of these, or use metric: exact "
            "or a metric of your own (python, program) in place of tool_calls",
        )


@dataclass(frozen=True)
class _Measure:
    """A metric with the settings that its function gets."""

    metric: Metric
    option: Option
    values: Values

    def scores(self, targets: Sequence[Target]) -> list[float]:
        """Score each reference against itself."""
        decoded = [one.decoded for one in targets]
        return self.metric.score(
            decoded, [one.reference for one in targets], self.option, self.values
        )


@dataclass(frozen=True)
class _Problem:
    """What is wrong with the rows `ids`, of which `found` describes the first."""

    ids: list[str]
    found: str
    expected: str
    fix: str


def read_targets(heldout: Path) -> list[Target]:
    """Read the references of a table that heldout_split wrote."""
    rows = Table[TokenizedRow](heldout, COLUMNS)
    return [target(row, stored_reference(row)) for row in rows]


def target(row: TokenizedRow, reference: str) -> Target:
    """Return the reference of a row with the text that its tokens decode to."""
    begin, end = last_answer(row["supervised"])
    decoded, options = row.get("decoded"), tuple(row.get("options", ()))
    *asked, answer = row["messages"]
    calls = tuple(answer.get("tool_calls", ()))
    return Target(
        id=row["id"],
        reference=reference,
        decoded=reference if decoded is None else decoded,
        tokens=end - begin,
        options=options,
        messages=tuple(asked),
        calls=calls,
    )


def unreachable(
    targets: Sequence[Target],
    settings: EvaluationSettings,
    gate: GateSettings,
    schema: Option,
    where: Where,
) -> list[EvaluationError]:
    """Return an error for each reason why references cannot be reached, with file and line.

    schema: the parsed `evaluation.json_schema`. where: returns {row id: its file and line}.
    """
    long = _too_long(targets, settings, gate, _judged(settings, gate))
    unfit = unscored(targets, settings, gate, schema, where)
    return [*(_error(problem, where) for problem in long), *unfit]


def unscored(
    targets: Sequence[Target],
    settings: EvaluationSettings,
    gate: GateSettings,
    schema: Option,
    where: Where,
) -> list[EvaluationError]:
    """Return an error for each reason why references have no score, or not the best one."""
    judged = _judged(settings, gate)
    problems = [*_refused(targets, _require_text)]
    if settings.choice == "options":
        problems += _refused(targets, lambda one: option_index(one.reference, [*one.options]))
    if settings.tool_calls:
        problems += _refused(targets, _require_readable_calls)
    told: set[tuple[str, str]] = set()  # a row is told once for each key of finetune.yaml
    for metric in settings.measured():
        strict = metric in judged
        if not metric.of_answer or (metric.any_reference and not metric.config and not strict):
            continue  # a metric that no verdict needs, and that every reference has
        option = schema if metric.config == "json_schema" else settings.option(metric)
        measure, key = _Measure(metric, option, settings.values), metric.config or metric.name
        known = [one for one in targets if (key, one.id) not in told]
        found = [*_below_the_best(measure, known, strict)]
        told.update((key, row) for problem in found for row in problem.ids)
        problems += found
    return [_error(problem, where) for problem in problems]


def run_on_references(
    targets: Sequence[Target], settings: EvaluationSettings, root: Path, where: Where
) -> list[EvaluationError]:
    """Run the user's function and program on each reference. Return what the program refuses.

    Raises EvaluationError if one of them cannot be started, or the function raises.
    """
    if settings.user_metric:
        named = where([one.id for one in targets])
        UserFunction(settings.user_metric, root).scores(
            [(named[one.id], one.decoded, one.reference, one.messages) for one in targets]
        )
    if not settings.program:
        return []
    outcomes = program_outcomes(
        settings.program,
        root,
        [one.decoded for one in targets],
        [one.reference for one in targets],
        [one.messages for one in targets],
    )
    pairs = zip(targets, outcomes, strict=True)
    failed = [(one, outcome) for one, outcome in pairs if outcome.code != 0]
    if not failed:
        return []
    first, outcome = failed[0]
    problem = _Problem(
        [one.id for one, _ in failed],
        f"the program does not pass the reference {first.reference[:SHOWN]!r} itself ({outcome})",
        "exit code 0 for an answer that equals its reference",
        "correct the row, or evaluation.program",
    )
    return [_error(problem, where)]


def _judged(settings: EvaluationSettings, gate: GateSettings) -> list[Metric]:
    """Return the metrics that must be reached: those of the verdict, and those with a key."""
    goals = {settings.metric, *gate.metrics}
    return [
        metric
        for metric in settings.measured()
        if metric.name in goals or (metric.config and not metric.always)
    ]


def _too_long(
    targets: Sequence[Target],
    settings: EvaluationSettings,
    gate: GateSettings,
    judged: Iterable[Metric],
) -> Iterator[_Problem]:
    """Yield the rows whose reference is longer than an answer can be.

    A truncated answer scores 0 by a metric of whole answers. A graded score of it is a score, but
    the answer does not end by itself, which counts for `gate.min_stop_rate`.
    """
    limit = settings.max_new_tokens
    longest = max((one.tokens for one in targets), default=0)
    whole = [one.name for one in judged if _of_whole_answers(one)]
    by_length = sorted(targets, key=lambda one: -one.tokens)
    cut = [one for one in by_length if one.tokens - 1 > limit]
    unended = [one for one in by_length if one.tokens > limit]
    if whole and cut:
        yield _Problem(
            [one.id for one in cut],
            f"the reference has {cut[0].tokens - 1} tokens",
            f"at most evaluation.max_new_tokens, {limit}: {whole[0]} of a truncated answer is 0",
            f"set evaluation.max_new_tokens to {longest}, the longest with its end of turn",
        )
    elif targets and 1 - len(unended) / len(targets) < gate.min_stop_rate:
        yield _Problem(
            [one.id for one in unended],
            f"{len(unended)} of {len(targets)} references do not end within "
            f"evaluation.max_new_tokens, {limit}",
            f"at least the share gate.min_stop_rate, {gate.min_stop_rate:g}, that ends",
            f"set evaluation.max_new_tokens to {longest}, the longest with its end of turn",
        )


def _of_whole_answers(metric: Metric) -> bool:
    """Return True if a truncated answer scores 0."""
    if not metric.of_answer:
        return metric.name == "program"
    return metric.binary or metric.config is not None or not metric.any_reference


def _below_the_best(
    measure: _Measure, targets: Sequence[Target], strict: bool
) -> Iterator[_Problem]:
    """Yield the rows whose reference has not the best score, or none at all.

    strict: False for a metric that only the report shows. A missing score is a problem even then.
    """
    try:
        scores = measure.scores(targets)
    except EvaluationError:
        yield from _refused(targets, lambda one: measure.scores([one]))
        return
    metric = measure.metric
    best = 1.0 if metric.higher_is_better else 0.0
    short = [
        (one, score)
        for one, score in zip(targets, scores, strict=True)
        if not math.isclose(score, best, abs_tol=ROUNDING)
    ]
    if short and strict and metric.bounded:
        yield _explained(measure, *short[0], [one.id for one, _ in short])


def _refused(targets: Iterable[Target], score: Callable[[Target], object]) -> Iterator[_Problem]:
    """Yield the rows on which a score cannot be computed."""
    errors: dict[str, EvaluationError] = {}
    for one in targets:
        try:
            score(one)
        except EvaluationError as error:
            errors[one.id] = error
    if errors:
        first = next(iter(errors.values()))
        yield _Problem(list(errors), first.found, first.expected, first.fix)


def _explained(measure: _Measure, one: Target, score: float, ids: list[str]) -> _Problem:
    metric = measure.metric
    key = f"evaluation.{metric.config or 'metric'}"
    found = f"the reference {one.reference[:SHOWN]!r} itself has {metric.name} {score:g}"
    if metric.name == "schema":
        found += f": {schema_problem(one.decoded, measure.option)}"
    if one.decoded == one.reference:
        return _Problem(
            ids,
            found,
            f"{metric.name} 1 for an answer that equals its reference",
            f"correct the row, or {key}",
        )
    return _Problem(
        ids,
        f"{found}, because its tokens decode to {one.decoded[:SHOWN]!r}",
        "a reference that the tokenizer gives back",
        f"write the reference as it is decoded, correct the chat template, or change {key}",
    )


def _error(problem: _Problem, where: Where) -> EvaluationError:
    first, *others = problem.ids
    named = where(problem.ids[: PLACES + 1])
    more = ""
    if others:
        places = ", ".join(named[one] for one in others[:PLACES])
        beyond = ", …" if len(others) > PLACES else ""
        more = f" ({len(problem.ids)} rows in all; also {places}{beyond})"
    return EvaluationError(
        where=named[first], found=problem.found + more, expected=problem.expected, fix=problem.fix
    )


def places(raw_dataset: Path, ids: Sequence[str]) -> dict[str, str]:
    """Return {row id: file and line} of held-out rows, from the tables of raw_dataset."""
    wanted = set(ids)
    found = {one: f"held-out row {one}" for one in ids}
    for name in ("conversations", "heldout"):
        for row in Table[ConversationRow](raw_dataset / f"{name}.parquet", ["id", "source"]):
            if row["id"] in wanted:
                found[row["id"]] = row["source"]
    return found
