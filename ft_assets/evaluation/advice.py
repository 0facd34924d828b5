"""Advise before a training: the decision tree of prompt, retrieval, rows, and fine-tune. No torch.

The tree walks from the cheapest answer to the most expensive one, and stops at the first that the
numbers of a sample support. A number on the wrong side of a threshold decides. Its interval tells
whether more rows could decide otherwise.
Not here: the measurement of the sample (steps/advise.py).
"""

from collections import Counter
from collections.abc import Iterable, Sequence
from typing import Literal

from pydantic import Field

from ft_assets.data.units import units
from ft_assets.evaluation.report_model import Difference, Estimate, Part, Retrieved
from ft_assets.evaluation.verdict.decision import beats
from ft_assets.markdown import Table

Outcome = Literal["prompt", "retrieve", "more rows", "another base", "fine-tune"]
BASE, FEW_SHOT = "base", "few_shot"
ADVICE = "advice.json"
# Of ln(vocabulary): the loss of a model that has learnt next to no language, as in the diagnosis.
UNTRAINED = 0.7
KNOWLEDGE = 0.5  # share of an answer that neither the question nor another row has
# Fewer rows than this change a model's form at best.
# https://platform.openai.com/docs/guides/supervised-fine-tuning: 50 to 100 rows show improvements.
MIN_ROWS = 50
CONFIDENCE = 0.95


class AdviceEvidence(Part):
    """What a sample of training rows shows.

    scores: the mean of the metric by way to ask: `base`, `few_shot`, and rivals with documents.
    against_base: of each other way. against_prompt: of each rival with documents against the better
    of base and few-shot prompt. bar: the score from which no fine-tune is needed, None without one.
    facts: the share of a reference's words that neither its question nor another row has. loss: the
    base's on the references, the lowest of base and few-shot prompt, in nats per token; uniform:
    that of a guess. not_asked: why a way was not asked.
    """

    metric: str
    higher_is_better: bool
    bar: float | None
    sampled: int
    train_groups: int
    heldout_groups: int
    min_heldout: int
    scores: dict[str, Estimate]
    against_base: dict[str, Difference]
    against_prompt: dict[str, Difference]
    retrieved: dict[str, Retrieved]
    facts: Estimate
    loss: float
    uniform: float
    pairs: int = 0
    not_asked: dict[str, str] = Field(default={})


class Node(Part):
    """A question of the tree: its evidence, what it decides, and what would change that.

    sure: the interval lies on one side of the threshold, or there is no threshold.
    """

    question: str
    evidence: list[str]
    decision: str
    sure: bool
    change: str


class Advice(Part):
    """advice.json: the outcome, the nodes up to it, and the numbers behind them."""

    outcome: Outcome
    nodes: list[Node]
    evidence: AdviceEvidence

    def headline(self) -> str:
        """Return the outcome as a sentence."""
        return HEADLINES[self.outcome]


HEADLINES: dict[Outcome, str] = {
    "prompt": "Do not fine-tune: a prompt reaches the bar.",
    "retrieve": "Do not fine-tune: retrieve. The task needs knowledge that documents can give.",
    "more rows": "Do not fine-tune yet: there are too few rows.",
    "another base": "Do not fine-tune this base: it hardly knows the language of the answers.",
    "fine-tune": "Fine-tune: neither a prompt nor retrieval reaches the bar, and rows are enough.",
}


def advise(found: AdviceEvidence) -> Advice:
    """Walk the tree. The nodes after the one that decides are not in the advice."""
    nodes: list[Node] = []
    for ask in (_prompt, _base, _retrieval, _rows):
        node, outcome = ask(found)
        nodes.append(node)
        if outcome is not None:
            return Advice(outcome=outcome, nodes=nodes, evidence=found)
    nodes.append(_fine_tune(found))
    return Advice(outcome="fine-tune", nodes=nodes, evidence=found)


Step = tuple[Node, Outcome | None]


def _prompt(found: AdviceEvidence) -> Step:
    prompted = [way for way in (BASE, FEW_SHOT) if way in found.scores]
    best = _best(found, prompted)
    evidence = [_score(found, way) for way in prompted]
    evidence += [f"{_label(way)}: not asked: {why}" for way, why in found.not_asked.items()]
    if FEW_SHOT in found.against_base:
        evidence.append(found.against_base[FEW_SHOT].describe(found.metric))
    question = "Does a prompt reach the bar?"
    if found.bar is None:
        change = f"advise.bar, the {found.metric} that is good enough for you"
        if found.metric == "loss":  # it takes the place of a metric, for which advise.bar is
            change = "an evaluation.metric that scores an answer alone, which can have a bar"
        decision = f"not decided: {found.metric} has no bar"
        return Node(
            question=question, evidence=evidence, decision=decision, sure=True, change=change
        ), None
    score, bar = found.scores[best], found.bar
    reached = _reaches(found, best)
    sure = not _holds(score, bar)
    decision = f"yes: {_label(best)}" if reached else f"no: {_label(best)} is the best"
    side = "below" if reached == found.higher_is_better else "above"
    change = f"{found.metric} {side} {bar:g} on more rows (advise.rows), or another advise.bar"
    if not reached:
        change += ", or better examples (data.few_shot, data.few_shot_system)"
    node = Node(
        question=f"{question} ({found.metric} {bar:g})",
        evidence=evidence,
        decision=decision,
        sure=sure,
        change=change,
    )
    return node, "prompt" if reached else None


def _base(found: AdviceEvidence) -> Step:
    share = found.loss / found.uniform
    hopeless = share > UNTRAINED
    node = Node(
        question="Does the base know the language of the answers?",
        evidence=[
            f"loss of the references {found.loss:.2f} nats/token, {share:.0%} of a uniform guess "
            f"({found.uniform:.2f}), at most {UNTRAINED:.0%}"
        ],
        decision="no" if hopeless else "yes",
        sure=True,
        change="an instruction-tuned base that was trained on this language and domain"
        if hopeless
        else f"a loss above {UNTRAINED * found.uniform:.2f}",
    )
    return node, "another base" if hopeless else None


def _retrieval(found: AdviceEvidence) -> Step:
    facts, bar = found.facts, found.bar
    knowledge = facts.mean >= KNOWLEDGE
    kind = "knowledge" if knowledge else "form or skill"
    evidence = [
        f"{facts.mean:.0%} [{facts.low:.0%}, {facts.high:.0%}] of an answer's words stand neither "
        f"in the question nor in another row: {kind}"
    ]
    evidence += [_score(found, way) for way in found.retrieved]
    evidence += [
        entry.describe(found.metric, f"the best prompt ({way})")
        for way, entry in found.against_prompt.items()
    ]
    evidence += [
        f"{way}: the reference stands in a chunk that was found for {one.answer_found} of "
        f"{one.rows} rows, and in any chunk for {one.answer_there}"
        for way, one in found.retrieved.items()
    ]
    evidence += [
        f"{way}: the documents have question and answer of {one.copied} rows themselves"
        for way, one in found.retrieved.items()
        if one.copied
    ]
    better = [way for way, entry in found.against_prompt.items() if beats(entry, CONFIDENCE)]
    reaching = [way for way in found.retrieved if _reaches(found, way)]
    lacking = [way for way, one in found.retrieved.items() if one.answer_found * 2 < one.rows]
    question = "Is knowledge missing, and does retrieval give it?"
    sure = not facts.low < KNOWLEDGE <= facts.high
    outcome: Outcome | None = "retrieve"
    if better or reaching:
        ways = better or reaching
        shown = "is better than the best prompt" if better else "reaches the bar"
        decision = f"yes: {', '.join(ways)} {shown}"
        sure = bool(better) or any(not _holds(found.scores[way], bar) for way in reaching)
        change = "documents that production does not have" + (
            "" if bar is None else f"; a fine-tune on the found chunks where {bar:g} is not reached"
        )
        if any(found.retrieved[way].copied for way in ways):
            change = f"documents without these rows themselves; {change}"
    elif knowledge and not found.retrieved:
        decision = "yes, by the words of the answers; retrieval is not measured"
        change = "evaluation.rivals with documents, which measures it; no documents at all"
    elif knowledge and len(lacking) == len(found.retrieved):
        decision = "yes, and these documents do not have the answers"
        change = "documents that have the answers"
    else:
        outcome = None
        decision = (
            "no: the chunks have the answers, and the model does not use them"
            if knowledge
            else "no: the answers are made of the questions and of what rows share"
        )
        change = "documents with which the base is better than with a prompt alone"
    node = Node(question=question, evidence=evidence, decision=decision, sure=sure, change=change)
    return node, outcome


def _rows(found: AdviceEvidence) -> Step:
    wanted = []
    if found.train_groups < MIN_ROWS:
        wanted.append(f"{MIN_ROWS - found.train_groups} more train rows")
    if found.heldout_groups < found.min_heldout:
        wanted.append(f"{found.min_heldout - found.heldout_groups} more held-out rows")
    node = Node(
        question="Are there enough rows?",
        evidence=[
            f"{found.train_groups} groups of train rows, at least {MIN_ROWS}",
            f"{found.heldout_groups} groups of held-out rows, at least {found.min_heldout} "
            "(gate.min_heldout_rows)",
        ],
        decision="no" if wanted else "yes",
        sure=True,
        change=" and ".join(wanted) or "fewer rows",
    )
    return node, "more rows" if wanted else None


def _fine_tune(found: AdviceEvidence) -> Node:
    base = found.scores[BASE]
    evidence = [f"room above the base: {_score(found, BASE)}"]
    if found.pairs:
        evidence.append(f"{found.pairs} preference pairs: DPO after SFT")
    return Node(
        question="What is left?",
        evidence=evidence,
        decision="fine-tune (SFT), and let the verdict judge it on held-out rows",
        sure=base.high < 1 or not found.higher_is_better,
        change="a prompt or documents that reach the bar",
    )


def _reaches(found: AdviceEvidence, way: str) -> bool:
    if found.bar is None:
        return False
    mean = found.scores[way].mean
    return mean >= found.bar if found.higher_is_better else mean <= found.bar


def _holds(score: Estimate, bar: float | None) -> bool:
    return bar is not None and score.low < bar <= score.high


def _best(found: AdviceEvidence, ways: Sequence[str]) -> str:
    sign = 1 if found.higher_is_better else -1
    return max(ways, key=lambda way: sign * found.scores[way].mean)


def _label(way: str) -> str:
    return "the few-shot prompt" if way == FEW_SHOT else "the base" if way == BASE else way


def _score(found: AdviceEvidence, way: str) -> str:
    one = found.scores[way]
    return (
        f"{_label(way)}: {found.metric} {one.mean:.3f} [{one.low:.3f}, {one.high:.3f}] on "
        f"{found.sampled} train rows"
    )


def fact_shares(rows: Iterable[tuple[str, str, str]]) -> list[float]:
    """Return for each row the share of its answer's words that nothing else has.

    rows: (group, question, answer). A word counts if neither the question of the row nor an answer
    of another group has it: it can only be known, not formed. A row without words has no share.
    """
    given = [(group, set(units(question)), units(answer)) for group, question, answer in rows]
    groups: dict[str, set[str]] = {}
    for group, _, answer in given:
        groups.setdefault(group, set()).update(answer)
    counts = Counter(word for words in groups.values() for word in words)
    return [
        sum(counts[word] == 1 and word not in question for word in answer) / len(answer)
        for _, question, answer in given
        if answer
    ]


def advice_table(advice: Advice) -> Table:
    """Return the nodes of the advice as a table."""
    header = ["question", "decision", "evidence", "what would change it"]
    return Table(
        header,
        [
            [node.question, node.decision, "; ".join(node.evidence), node.change]
            for node in advice.nodes
        ],
    )


def text_of(advice: Advice) -> str:
    """Return the advice as Markdown: the outcome, and the nodes with their evidence."""
    lines = [f"**{advice.headline()}**"]
    for number, node in enumerate(advice.nodes, 1):
        sure = "" if node.sure else " (the interval holds both answers)"
        lines += ["", f"{number}. {node.question} **{node.decision}**{sure}", ""]
        lines += [f"   - {line}" for line in node.evidence]
        lines.append(f"   - what would change it: {node.change}")
    return "\n".join(lines)
