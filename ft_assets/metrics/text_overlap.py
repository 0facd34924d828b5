"""Text overlap, one score in [0, 1] for each row: ROUGE (rouge-score), BLEU and chrF (sacrebleu).

They are sentence scores, so that candidates can be compared row by row. A corpus score has no
interval over its rows.
"""

from ft_assets.metrics.registry import Metric

ROUGE = ("rouge-score", "regex")


@Metric("rouge1", entry="rouge", packages=ROUGE)
def rouge1(answers: list[str], references: list[str]) -> list[float]:
    """Score the ROUGE-1 F-measure without stemming (Lin 2004)."""
    return _rouge("rouge1", answers, references)


@Metric("rouge2", entry="rouge", packages=ROUGE)
def rouge2(answers: list[str], references: list[str]) -> list[float]:
    """Score the ROUGE-2 F-measure without stemming (Lin 2004)."""
    return _rouge("rouge2", answers, references)


@Metric("rougeL", entry="rouge", packages=ROUGE)
def rouge_l(answers: list[str], references: list[str]) -> list[float]:
    """Score the ROUGE-L F-measure without stemming (Lin 2004)."""
    return _rouge("rougeL", answers, references)


@Metric("bleu", packages=("sacrebleu",))
def bleu(answers: list[str], references: list[str]) -> list[float]:
    """Score sentence BLEU, effective order, sacrebleu's default smoothing (Post 2018)."""
    from sacrebleu import BLEU

    scorer = BLEU(effective_order=True)
    return [
        scorer.sentence_score(answer, [reference]).score / 100
        for answer, reference in zip(answers, references, strict=True)
    ]


@Metric("chrf", packages=("sacrebleu",))
def chrf(answers: list[str], references: list[str]) -> list[float]:
    """Score chrF2, character 6-grams (Popović 2015)."""
    from sacrebleu import CHRF

    scorer = CHRF()
    return [
        scorer.sentence_score(answer, [reference]).score / 100
        for answer, reference in zip(answers, references, strict=True)
    ]


class Words:
    """A tokenizer for ROUGE that keeps every script; rouge-score's own keeps only a–z and 0–9."""

    def tokenize(self, text: str) -> list[str]:
        import regex

        return regex.findall(r"\p{Han}|\p{Hiragana}|\p{Katakana}|[\p{L}\p{M}\p{N}]+", text.lower())


def _rouge(kind: str, answers: list[str], references: list[str]) -> list[float]:
    from rouge_score.rouge_scorer import RougeScorer

    scorer = RougeScorer([kind], tokenizer=Words())
    return [
        float(scorer.score(reference, answer)[kind].fmeasure)
        for answer, reference in zip(answers, references, strict=True)
    ]
