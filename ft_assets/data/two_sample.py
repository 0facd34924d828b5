"""Tell two samples of texts apart: a classifier two-sample test (Lopez-Paz and Oquab 2017).

If the texts of both samples are of one distribution, no classifier tells them apart: its area under
the ROC curve (AUC) on texts it was not trained on is 0.5. The classifier is kernel ridge regression
on character n-grams, lengths, and numbers of turns. Its cross-validated scores are linear in the
labels, so a thousand permutations of the labels cost one product of matrices, and the p-value
needs no approximation.
"""

import hashlib
import math
from collections.abc import Sequence
from dataclasses import dataclass
from statistics import NormalDist
from typing import Any

import numpy as np
import numpy.typing as npt

Array = npt.NDArray[np.float64]

GRAMS = (1, 2, 3, 4)  # characters
BUCKETS = 2**20
CHARACTERS = 2000  # of a text that are read
FOLDS = 5
RIDGE = 0.3  # of a kernel whose diagonal is 2
PERMUTATIONS = 999
SEED = 1
LEVEL = 0.01  # of the permutation test
POWER = 0.8
CONFIDENCE = 0.95
_BASE = np.uint64(0x9E3779B97F4A7C15)


@dataclass(frozen=True)
class Sampled:
    """A text of one of the samples; texts of one `cluster` repeat each other."""

    id: str
    text: str
    turns: int
    cluster: str


@dataclass(frozen=True)
class TwoSamples:
    """The outcome of the test on `size` texts of each sample.

    `low` and `high` are the 95 % interval of the AUC (DeLong et al. 1988, widened by how much more
    the permuted AUCs vary than those of independent scores). `p` is that of the permutation test,
    and `found` is the smallest AUC that the test finds in four of five cases.
    `scores` has each compared text by id, the first sample's first: above 0 it reads as one of the
    second sample.
    """

    size: int
    auc: float
    low: float
    high: float
    accuracy: float
    p: float
    found: float
    scores: tuple[dict[str, float], dict[str, float]]

    def differ(self, auc: float) -> bool:
        """Return True if the samples differ at the LEVEL, and by more than an AUC."""
        return self.p <= LEVEL and self.auc > auc


def compare(first: Sequence[Sampled], second: Sequence[Sampled], most: int) -> TwoSamples | None:
    """Compare two samples by at most `most` texts of each; None if one has fewer than FOLDS.

    One text of a cluster and sample is compared. Texts of one cluster are in one fold: otherwise
    the classifier would be trained on a copy that has the other label. Ids alone decide which texts
    are compared.
    """
    one, two = _one_a_cluster(first), _one_a_cluster(second)
    size = min(len(one), len(two), most)
    if size < FOLDS:
        return None
    texts = [*one[:size], *two[:size]]
    random = np.random.default_rng(SEED)
    _, clusters = np.unique([text.cluster for text in texts], return_inverse=True)
    scoring = _scoring(_kernel(texts), random.permutation(clusters.max() + 1)[clusters] % FOLDS)
    labels = np.repeat([-1.0, 1.0], size)
    scores = scoring @ labels
    permuted = _permuted(labels, clusters, random)
    auc = float(_aucs(scores[:, None], labels[:, None])[0])
    by_chance = _aucs(scoring @ permuted, permuted)
    # The folds share their training texts, so AUCs vary more than those of independent scores.
    more = float(by_chance.std()) / math.sqrt((2 * size + 1) / (12 * size * size))
    error = more * _standard_error(scores[:size], scores[size:])
    width = NormalDist().inv_cdf((1 + CONFIDENCE) / 2) * error
    found = np.quantile(by_chance, 1 - LEVEL) + NormalDist().inv_cdf(POWER) * by_chance.std()
    return TwoSamples(
        size,
        auc,
        max(0.0, auc - width),
        min(1.0, auc + width),
        float((np.sign(scores) == labels).mean()),
        float((1 + (by_chance >= auc).sum()) / (1 + PERMUTATIONS)),
        min(1.0, float(found)),
        (
            {text.id: float(score) for text, score in zip(one[:size], scores, strict=False)},
            {text.id: float(score) for text, score in zip(two[:size], scores[size:], strict=True)},
        ),
    )


def _one_a_cluster(texts: Sequence[Sampled]) -> list[Sampled]:
    """Return a text of each cluster, in the order of the hashes of their ids."""
    ordered = sorted(
        texts, key=lambda text: hashlib.sha256(text.id.encode()).digest(), reverse=True
    )
    return list({text.cluster: text for text in ordered}.values())


def _kernel(texts: Sequence[Sampled]) -> Array:
    """Return the similarities (n, n) of texts: of their n-grams, and of their lengths and turns."""
    grams = _weighted_grams([text.text for text in texts])
    kernel: Array = (grams @ grams.T).toarray()
    sizes = np.log1p([[len(text.text), text.turns] for text in texts])
    sizes = (sizes - sizes.mean(0)) / np.maximum(sizes.std(0), 1e-9)
    distances = ((sizes[:, None] - sizes[None]) ** 2).sum(2)
    return kernel + np.exp(-distances / 2)


def _weighted_grams(texts: Sequence[str]) -> Any:
    """Return the counts of each text's n-grams, their logarithms scaled to length 1.

    A gram of one text, or of all, tells nothing. Rare grams weigh no more than others: a shift is
    what many prompts of one side have.
    """
    import scipy.sparse

    found = [_grams(text[:CHARACTERS]) for text in texts]
    counts = scipy.sparse.csr_array(
        (
            np.concatenate([1 + np.log(count) for _, count in found]),
            np.concatenate([grams for grams, _ in found]),
            np.cumsum([0, *(len(grams) for grams, _ in found)]),
        ),
        shape=(len(texts), BUCKETS),
    )
    having = np.bincount(counts.indices, minlength=BUCKETS)
    counts.data *= ((having > 1) & (having < len(texts)))[counts.indices]
    lengths = np.maximum(np.sqrt(counts.multiply(counts).sum(1)), 1e-9)
    counts.data /= np.repeat(lengths, np.diff(counts.indptr))
    return counts


def _grams(text: str) -> tuple[npt.NDArray[np.int64], npt.NDArray[np.int64]]:
    """Return the buckets of a text's n-grams and how often each occurs."""
    letters = np.frombuffer(f"  {text}  ".encode("utf-32-le", "surrogatepass"), dtype=np.uint32)
    hashes = []
    for length in GRAMS:
        windows = np.lib.stride_tricks.sliding_window_view(letters, min(length, len(letters)))
        value = np.full(len(windows), np.uint64(length))
        for column in windows.T:
            value = (value + column) * _BASE
            value ^= value >> np.uint64(29)
        hashes.append(value)
    buckets = (np.concatenate(hashes) % np.uint64(BUCKETS)).astype(np.int64)
    return np.unique(buckets, return_counts=True)


def _scoring(kernel: Array, folds: npt.NDArray[np.int64]) -> Array:
    """Return the matrix (n, n) that turns labels into the scores of texts not trained on.

    The labels of a training are centred, so a text that is like no other has a score of 0.
    """
    scoring = np.zeros_like(kernel)
    for fold in range(FOLDS):
        test, train = np.flatnonzero(folds == fold), np.flatnonzero(folds != fold)
        if not len(test):
            continue
        own = kernel[np.ix_(train, train)] + RIDGE * np.eye(len(train))
        weights = np.linalg.solve(own, kernel[np.ix_(train, test)]).T
        scoring[np.ix_(test, train)] = weights - weights.mean(1, keepdims=True)
    return scoring


def _permuted(labels: Array, clusters: npt.NDArray[np.int64], random: np.random.Generator) -> Array:
    """Return permutations (n, PERMUTATIONS) of labels. A cluster of both samples stays of both."""
    members = np.bincount(clusters)[clusters]
    alone = np.flatnonzero(members == 1)
    permuted = np.repeat(labels[:, None], PERMUTATIONS, 1)
    permuted[alone] = random.permuted(permuted[alone], axis=0)
    swaps = random.choice([-1.0, 1.0], (clusters.max() + 1, PERMUTATIONS))[clusters]
    return np.where((members > 1)[:, None], permuted * swaps, permuted)


def _aucs(scores: Array, labels: Array) -> Array:
    """Return the AUC of each column of scores (n, k), for as many labels of -1 and 1."""
    from scipy.stats import rankdata

    positive = labels > 0
    ranks = np.where(positive, rankdata(scores, axis=0), 0).sum(0)
    count = positive.sum(0)
    return (ranks - count * (count + 1) / 2) / (count * (len(scores) - count))


def _standard_error(first: Array, second: Array) -> float:
    """Return the standard error of the AUC of two samples of scores (DeLong et al. 1988)."""
    above = np.sign(second[:, None] - first[None]) / 2 + 0.5
    variances = above.mean(0).var(ddof=1) / len(first) + above.mean(1).var(ddof=1) / len(second)
    return float(np.sqrt(variances))
