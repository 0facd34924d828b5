"""`evaluate` modules of text overlap, one score in [0, 1] a row: ROUGE (rouge-score), BLEU and chrF (sacrebleu).

Sentence scores, so that candidates can be compared pair by pair: a corpus score has no interval of its own rows.
"""

from typing import Any

import datasets
import evaluate

FEATURES = datasets.Features(
    {"predictions": datasets.Value("string"), "references": datasets.Value("string")}
)


class Rouge(evaluate.Metric):
    """ROUGE-1, -2 and -L F-measures without stemming (Lin 2004)."""

    def _info(self) -> evaluate.MetricInfo:
        return evaluate.MetricInfo(
            description="ROUGE", citation="", inputs_description="texts", features=FEATURES
        )

    def _compute(self, predictions: list[str], references: list[str]) -> dict[str, Any]:  # pyright: ignore[reportIncompatibleMethodOverride]
        from rouge_score.rouge_scorer import RougeScorer

        kinds = ["rouge1", "rouge2", "rougeL"]
        scorer = RougeScorer(kinds, tokenizer=Words())
        rows = [
            scorer.score(reference, answer)
            for answer, reference in zip(predictions, references, strict=True)
        ]
        return {kind: [float(row[kind].fmeasure) for row in rows] for kind in kinds}


class Words:
    """A tokenizer for ROUGE that keeps every script: rouge-score's own drops all but a–z and 0–9."""

    def tokenize(self, text: str) -> list[str]:
        import regex

        return regex.findall(r"\p{Han}|\p{Hiragana}|\p{Katakana}|[\p{L}\p{M}\p{N}]+", text.lower())


class Bleu(evaluate.Metric):
    """Sentence BLEU with effective order and sacrebleu's default smoothing (Post 2018)."""

    def _info(self) -> evaluate.MetricInfo:
        return evaluate.MetricInfo(
            description="BLEU", citation="", inputs_description="texts", features=FEATURES
        )

    def _compute(self, predictions: list[str], references: list[str]) -> dict[str, Any]:  # pyright: ignore[reportIncompatibleMethodOverride]
        from sacrebleu import BLEU

        scorer = BLEU(effective_order=True)
        return {
            "bleu": [
                scorer.sentence_score(answer, [ref]).score / 100
                for answer, ref in zip(predictions, references, strict=True)
            ]
        }


class Chrf(evaluate.Metric):
    """chrF2, character 6-grams (Popović 2015)."""

    def _info(self) -> evaluate.MetricInfo:
        return evaluate.MetricInfo(
            description="chrF", citation="", inputs_description="texts", features=FEATURES
        )

    def _compute(self, predictions: list[str], references: list[str]) -> dict[str, Any]:  # pyright: ignore[reportIncompatibleMethodOverride]
        from sacrebleu import CHRF

        scorer = CHRF()
        return {
            "chrf": [
                scorer.sentence_score(answer, [ref]).score / 100
                for answer, ref in zip(predictions, references, strict=True)
            ]
        }
