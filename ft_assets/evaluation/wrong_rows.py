"""Tell which rows have a wrong answer, by models that were not trained on them.

Of each token of an answer, two predictions are compared: p, of a model that reads the prompt, and
q, of the other answers alone (n-grams). A wrong row has a token that the answers make likely and
the prompt does not. Under H0 its token follows p, so the mean of q/p over the answer has the
expectation 1: it is an e-value (Shafer 2021). The mixture of rows

    prod_i (1 - e + e * E_i),  averaged over shares e of wrong rows,

is an e-value of the set. Rows are named only where it is at least 1 / `false_alarms`, which happens
to a set without wrong rows with at most that probability (Markov), if p is honest. So p has the
temperature >= 1, and the share of q in it, with which the set is most likely. Models that learnt
little have a share of q. If more than LARGEST_SHARE of the rows would be wrong, the models are.
"""

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

TEMPERATURES = (1.0, 1.25, 1.5, 2.0, 2.5, 3.0, 4.0)
CONTEXT = 2  # tokens before a token: in JSON, a key and the punctuation after it
SETTLED = 0.9  # a token that follows its context with this share is form, and tells nothing
LARGEST_SHARE = 0.2
SHARES = np.append(np.geomspace(0.002, LARGEST_SHARE, 16), [0.25, 0.3])  # of wrong rows
MIXED = (0.0, 0.02, 0.05, 0.1, 0.2, 0.35, 0.5, 0.7, 0.85, 1.0)  # shares of q in p
# nats of likelihood that a share of q must gain: one wrong token a row can be either
WORTH = 2.0
TAIL, LEAST_TAIL = 0.1, 8  # of the losses, for outliers: a share, and a number of rows
LARGEST = 60.0  # nats: exp does not overflow

Tokens = Sequence[int]


@dataclass(frozen=True)
class Answer:
    """The supervised tokens of a row. `starts`: where an answer of the conversation begins.

    `log_probabilities` are those of the tokens at each of TEMPERATURES, (tokens, temperatures).
    """

    tokens: list[int]
    starts: list[int]
    log_probabilities: np.ndarray


@dataclass(frozen=True)
class Suspicion:
    """How probably a row is wrong, and the token that shows it most (None: no token can)."""

    probability: float
    token: int | None


@dataclass(frozen=True)
class Found:
    """The suspicion of each row, and what holds for all of them.

    `evidence`: the e-value of the set, at most 1e300. `share`: of wrong rows, at its largest
    likelihood. `temperature`: of the models. `informed`: how much of their predictions of open
    tokens comes from the prompts, from 0 to 1.
    """

    rows: list[Suspicion]
    evidence: float
    share: float
    temperature: float
    informed: float

    def named(self, false_alarms: float, least: float) -> list[int]:
        """Return the numbers of the rows that are wrong with a probability of at least `least`."""
        if self.evidence * false_alarms < 1 or self.share > LARGEST_SHARE:
            return []
        return [at for at, row in enumerate(self.rows) if row.probability >= least]


class AnswerModel:
    """Predicts a token of an answer from the other answers alone.

    Witten-Bell interpolation of contexts of up to CONTEXT tokens (Bell, Cleary and Witten 1990).
    """

    def __init__(self, answers: Sequence[Answer], vocabulary: int) -> None:
        self.vocabulary = vocabulary
        self.counts: dict[Tokens, Counter[int]] = {}
        for answer in answers:
            for context, token in _events(answer):
                self.counts.setdefault(context, Counter())[token] += 1

    def predict(self, answer: Answer) -> tuple[np.ndarray, np.ndarray]:
        """Return (log q of each token, whether it is open), from the other answers.

        A token is open if its context does not settle it.
        """
        own: dict[Tokens, Counter[int]] = {}
        for context, token in _events(answer):
            own.setdefault(context, Counter())[token] += 1
        rest = {context: self.counts[context] - mine for context, mine in own.items()}
        found = np.empty(len(answer.tokens))
        is_open = np.zeros(len(answer.tokens), bool)
        events = iter(_events(answer))
        for at in range(len(answer.tokens)):
            probability = 1 / self.vocabulary
            for _ in range(CONTEXT + 1):
                context, token = next(events)
                seen = rest[context]
                if total := seen.total():
                    kinds = len(seen)
                    probability = (seen[token] + kinds * probability) / (total + kinds)
                    is_open[at] = max(seen.values()) < SETTLED * total
            found[at] = np.log(probability)
        return found, is_open


def _events(answer: Answer) -> list[tuple[Tokens, int]]:
    """Return (context, token) of each token, its contexts from the shortest to the longest."""
    starts = set(answer.starts)
    events: list[tuple[Tokens, int]] = []
    before: tuple[int, ...] = ()
    for at, token in enumerate(answer.tokens):
        if at in starts:
            before = (-1,) * CONTEXT
        events += [(before[CONTEXT - size :], token) for size in range(CONTEXT + 1)]
        before = (*before[1:], token)
    return events


def find_wrong(answers: Sequence[Answer], vocabulary: int) -> Found:
    """Return how probably each row is wrong. `vocabulary`: the number of tokens there are."""
    model = AnswerModel(answers, vocabulary)
    open_tokens: list[tuple[np.ndarray, np.ndarray]] = []  # log q, log p
    places: list[np.ndarray] = []
    for answer in answers:
        log_q, is_open = model.predict(answer)
        open_tokens.append((log_q[is_open], answer.log_probabilities[is_open]))
        places.append(np.flatnonzero(is_open))
    likelihoods = np.empty((len(MIXED), len(TEMPERATURES)))
    known: dict[tuple[int, int], _Rows] = {}
    for mixed, share_of_q in enumerate(MIXED):
        for at in range(len(TEMPERATURES)):
            known[mixed, at] = rows = _rows(open_tokens, at, share_of_q)
            likelihoods[mixed, at] = rows.fit + rows.sets.max() - WORTH * (mixed > 0)
    mixed, at = map(int, np.unravel_index(likelihoods.argmax(), likelihoods.shape))
    rows = known[mixed, at]
    most = rows.sets.max()
    share = float(SHARES[rows.sets.argmax()])
    wrong = share * rows.evidence
    return Found(
        [
            Suspicion(float(one), int(where[ratio.argmax()]) if len(where) else None)
            for one, ratio, where in zip(
                wrong / (wrong + 1 - share), rows.ratios, places, strict=True
            )
        ],
        float(np.exp(min(most, 690.0)) * np.exp(rows.sets - most).mean()),
        share,
        TEMPERATURES[at],
        1 - MIXED[mixed],
    )


@dataclass(frozen=True)
class _Rows:
    """log q/p of the open tokens of each row, its e-value, and those of the set, by SHARES.

    `fit`: the log-likelihood of the open tokens, as far as p explains them.
    """

    ratios: list[np.ndarray]
    evidence: np.ndarray
    sets: np.ndarray
    fit: float


def _rows(
    open_tokens: Sequence[tuple[np.ndarray, np.ndarray]], temperature: int, mixed: float
) -> _Rows:
    """Return the evidence of rows by p at a temperature, with a share of q in it."""
    log_p = [_mix(log_q, log_p[:, temperature], mixed) for log_q, log_p in open_tokens]
    ratios = [
        np.minimum(log_q - own, LARGEST) for (log_q, _), own in zip(open_tokens, log_p, strict=True)
    ]
    # Of a row without an open token it is 1.
    evidence = np.array([np.exp(one).mean() if len(one) else 1.0 for one in ratios])
    sets = np.array([np.log1p(share * (evidence - 1)).sum() for share in SHARES])
    return _Rows(ratios, evidence, sets, float(sum(own.sum() for own in log_p)))


def _mix(log_q: np.ndarray, log_p: np.ndarray, mixed: float) -> np.ndarray:
    """Return the log of p with a share of q in it."""
    with np.errstate(divide="ignore"):
        return np.logaddexp(log_q + np.log(mixed), log_p + np.log(1 - mixed))


def outliers(losses: Sequence[float], false_alarms: float) -> list[int]:
    """Return the numbers of the rows whose loss is far above the others'.

    The upper tenth is taken for a Pareto tail, whose shape follows from the median of its logs
    (Hill's estimator takes their mean, which outliers move). The limit is Bonferroni's: of losses
    with such a tail, or a lighter one, a row is named with a probability of at most about
    `false_alarms`: the shape is taken two standard errors above its estimate.
    """
    values = np.log(np.maximum(losses, 1e-6))
    begin = np.quantile(values, 1 - TAIL)
    tail = values[values > begin] - begin
    if len(tail) < LEAST_TAIL:
        return []
    # The median of m exponential values has a relative standard error of 1 / (ln 2 sqrt(m)).
    shape = np.median(tail) / np.log(2) * (1 + 2 / np.log(2) / np.sqrt(len(tail)))
    limit = begin + shape * np.log(len(tail) / false_alarms)
    return [int(at) for at in np.flatnonzero(values > limit)]
