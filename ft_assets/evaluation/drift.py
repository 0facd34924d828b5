"""How a model's answers differ from those of the model before it, whatever their quality.

A release can be better on average and still surprise its users: longer answers, another form, more
refusals. Nothing is judged here: each number is told with the interval of its change.
"""

from collections.abc import Sequence

import regex

from ft_assets.config import GateSettings
from ft_assets.evaluation.drift_model import Change, ChangedAnswer, Drift, Prompts
from ft_assets.evaluation.report_model import Estimate
from ft_assets.evaluation.scored_rows import ScoredRow
from ft_assets.evaluation.verdict.statistics import compare, interval

SHOWN = 5
LONGEST = 300  # characters of a shown answer
SEED = 1
_LETTER = regex.compile(r"\p{L}")
_SCRIPTS = ("Latin", "Cyrillic", "Arabic", "Hebrew", "Devanagari", "Thai", "Greek", "Hangul")
_SCRIPT = {
    "Han or Kana": regex.compile(r"[\p{Script=Han}\p{Script=Hiragana}\p{Script=Katakana}]"),
    **{name: regex.compile(rf"\p{{Script={name}}}") for name in _SCRIPTS},
}
_FORMS = {
    "JSON": regex.compile(r"\s*[{\[].*[}\]]\s*", regex.DOTALL),
    "code": regex.compile(r".*```.*", regex.DOTALL),
    "list": regex.compile(r"(?:.*\n)?\s*(?:[-*•]|\d+[.)]) .*", regex.DOTALL),
    "paragraphs": regex.compile(r".*\n.*", regex.DOTALL),
}


def drift_of(
    ids: Sequence[str],
    before: Sequence[ScoredRow],
    after: Sequence[ScoredRow],
    gate: GateSettings,
    prompts: Prompts,
) -> Drift:
    """Compare the answers to the same rows, which have these ids."""
    pairs = list(zip(before, after, strict=True))
    groups = [new.cluster or row for row, (_, new) in zip(ids, pairs, strict=True)]
    differ = [float(old.answer.strip() != new.answer.strip()) for old, new in pairs]

    def change(values: list[tuple[float, float]], bounded: bool = True) -> Change:
        olds, news = [old for old, _ in values], [new for _, new in values]
        found = compare(news, olds, gate.confidence, SEED, groups=groups, bounded=bounded)
        estimate = Estimate(mean=found.mean, low=found.low, high=found.high)
        return Change(before=_mean(olds), after=_mean(news), change=estimate)

    low, high = interval(differ, gate.confidence, SEED, groups)
    examples = [
        ChangedAnswer(id=row, before=old.answer[:LONGEST], after=new.answer[:LONGEST])
        for row, (old, new), changed in zip(ids, pairs, differ, strict=True)
        if changed
    ]
    return Drift(
        prompts=prompts,
        rows=len(pairs),
        changed=Estimate(mean=_mean(differ), low=low, high=high),
        form=_mean([float(form_of(old.answer) != form_of(new.answer)) for old, new in pairs]),
        script=_mean([float(script_of(old.answer) != script_of(new.answer)) for old, new in pairs]),
        tokens=change([(float(old.tokens), float(new.tokens)) for old, new in pairs], False),
        stopped=change([(float(old.stopped), float(new.stopped)) for old, new in pairs]),
        refused=change(
            [(old.scores.get("refused", 0.0), new.scores.get("refused", 0.0)) for old, new in pairs]
        ),
        examples=examples[:SHOWN],
    )


def form_of(answer: str) -> str:
    """Return the form of an answer: JSON, code, list, paragraphs or one line."""
    return next((name for name, form in _FORMS.items() if form.fullmatch(answer)), "one line")


def script_of(answer: str) -> str:
    """Return the script of most letters of an answer, "" if it has no letters."""
    counts = {name: len(script.findall(answer)) for name, script in _SCRIPT.items()}
    counts["other"] = len(_LETTER.findall(answer)) - sum(counts.values())
    name = max(counts, key=lambda name: counts[name])
    return name if counts[name] > 0 else ""


def _mean(values: Sequence[float]) -> float:
    return sum(values) / len(values)
