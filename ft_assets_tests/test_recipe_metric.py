"""Follow the recipe "Add a metric" of CONTRIBUTING.md: add one file, and change no other."""

import json
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

PACKAGE = Path(__file__).parents[1] / "ft_assets"
RECIPE = PACKAGE.parent / "CONTRIBUTING.md"
USE = """
import json
from pathlib import Path

from ft_assets.config import GateSettings, load_project
from ft_assets.evaluation.answer_scores import score_answers
from ft_assets.evaluation.leaderboard import judged_entry, rank
from ft_assets.evaluation.report import summarise
from ft_assets.evaluation.scored_rows import Scored
from ft_assets.evaluation.verdict.decision import decide
from ft_assets_tests.reports import EVIDENCE, scored_row

settings = load_project(Path("finetune.yaml")).recipe("tiny").evaluation
references = [f"word {index} and more words" for index in range(40)]
answers = {
    "base": [f"word {index} and more words, and then some" for index in range(40)],
    "sft": references,
}
heldout = {}
for name, texts in answers.items():
    scores = score_answers(texts, references, settings)
    heldout[name] = [
        scored_row(text, **{metric: values[index] for metric, values in scores.items()})
        for index, text in enumerate(texts)
    ]
report = summarise(Scored(heldout=heldout), settings, GateSettings(), {}, EVIDENCE)
verdict = decide(report, GateSettings())
costs = dict.fromkeys(
    ("memory_gb", "gpu_seconds", "train_tokens_per_s", "answer_tokens_per_s", "bytes")
)
entries = [
    judged_entry(name, report, GateSettings(), ["row"], costs, "–") for name in ("better", "worse")
]
entries[1] = {**entries[1], "score": 0.5}
print(json.dumps({
    "names": settings.metric_names(),
    "scores": {name: report.scores[name]["length_error"] for name in answers},
    "gain": report.comparisons["sft"]["base"]["length_error"].mean,
    "verdict": verdict.status,
    "first": rank(entries, GateSettings())[0]["name"],
}))
"""


def code_of_the_recipe() -> str:
    """Return the Python code block of the recipe."""
    section = RECIPE.read_text().split("## Add a metric")[1].split("\n## ")[0]
    block = re.search(r"```python\n(.*?)```", section, re.DOTALL)
    assert block is not None
    return re.sub(r"^   ", "", block[1], flags=re.MULTILINE)


@pytest.mark.slow
def test_metric_of_the_recipe_is_validated_scored_and_judged(tmp_path: Path) -> None:
    shutil.copytree(PACKAGE, tmp_path / "ft_assets", ignore=shutil.ignore_patterns("__pycache__"))
    (tmp_path / "ft_assets/metrics/length_error.py").write_text(code_of_the_recipe())
    (tmp_path / "ft_assets_tests").symlink_to(Path(__file__).parent)
    (tmp_path / "finetune.yaml").write_text(
        "data: {train: [train.jsonl]}\nbase_models: {tiny: {folder: tiny}}\n"
        "evaluation: {metrics: [length_error], metric: length_error}\n"
        "gate: {metrics: {length_error: better}}\n"
    )
    done = subprocess.run(
        [sys.executable, "-c", USE],
        cwd=tmp_path,
        env={"PYTHONPATH": str(tmp_path), "PATH": ""},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout)
    assert found["names"] == ["exact", "length_error", "loss", "token_accuracy"]
    assert found["scores"] == {"base": 0.6, "sft": 0.0}
    assert found["gain"] == pytest.approx(0.6)  # a lower error is a gain
    assert found["verdict"] == "PASS"
    assert found["first"] == "better"
