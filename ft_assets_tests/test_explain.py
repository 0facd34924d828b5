"""`ft explain`: the five answers hold the numbers of the run in the store."""

import subprocess
import sys
from pathlib import Path

from ft_assets.artifacts import ArtifactStore
from ft_assets.evaluation.report_model import EvalReport
from ft_assets_tests.factories import ft

CHECK_TORCH = """
import sys
from pathlib import Path
from ft_assets.commands.explain import explain
from ft_assets.config import load_project
explain(load_project(Path("finetune.yaml")), "tiny")
assert "torch" not in sys.modules
"""


def test_five_answers_hold_the_numbers_of_the_run(finished: Path) -> None:
    done = ft(finished, "explain")
    assert done.returncode == 0, done.stderr
    text = " ".join(done.stdout.split())
    assert [f"{number}. " in done.stdout for number in range(1, 7)] == [True] * 5 + [False]
    store = ArtifactStore(finished / ".ft/store")
    trained = store.need("lora_adapter", "tiny").metrics
    rendered = store.need("chat_dataset", "tiny").metrics
    base = store.need("base_model", "tiny").metrics
    report = EvalReport.read(store.need("eval_report", "tiny").path / "report.json")
    share = f"{trained['trainable_percent']:.2f}%"
    assert f"{trained['trainable_parameters']:,}, which is {share}" in text
    assert f"{16 * base['parameters'] / 1e9:.2f} GB for all parameters" in text
    assert f"peaked at {trained['peak_train_memory_gb']:.1f} GB" in text
    assert f"{rendered['supervised_tokens']:,} of {rendered['tokens']:,} tokens" in text
    gain = report.comparisons["sft"]["base"][report.metric]
    assert f"sft against the base: {report.metric} {gain.mean:+.3f}" in text
    assert report.retention is not None
    assert f"On {report.retention.rows} of them" in text
    assert f"DPO used {store.need('dpo_adapter', 'tiny').metrics['pairs']} pairs" in text


def test_it_loads_no_torch(finished: Path) -> None:
    done = subprocess.run(
        [sys.executable, "-c", CHECK_TORCH], cwd=finished, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr


def test_project_without_a_run_is_told_in_one_sentence(project: Path) -> None:
    done = ft(project, "explain")
    assert done.returncode == 2
    assert "there is no eval_report yet, so there are no numbers to explain" in done.stderr
    assert len(done.stderr.splitlines()) == 2
