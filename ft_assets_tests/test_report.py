"""Test the HTML page, its rows, the changes since the previous report, and harness tasks.

Tasks of lm-evaluation-harness are general prompts.
"""

import base64
import io
import json
import re
from collections.abc import Callable
from pathlib import Path

import pyarrow.parquet as pq

from ft_assets_tests.factories import WORDS, edit, ft, write_jsonl
from ft_assets_tests.pipeline import UP_TO_REPORT, artifact, failure, materialize, read


def test_page_needs_nothing_beside_it_and_holds_every_row(copy: Path) -> None:
    page = (artifact(copy, "eval_report") / "info/report.html").read_text()
    assert not re.findall(r'(?:src|href)="(?!data:)', page)
    assert page.count("data:image/png;base64,") >= 4  # scores, wins and losses, two curves
    assert '<span class="badge">PASS</span>' in page
    rows = pq.read_table(
        io.BytesIO(
            base64.b64decode(
                re.findall(r'href="data:application/vnd.apache.parquet;base64,([^"]+)"', page)[0]
            )
        )
    )
    heldout = read(copy, "eval_report", "report.json")["heldout_rows"]
    assert rows.num_rows == 4 * heldout
    assert {
        "candidate",
        "id",
        "prompt",
        "reference",
        "answer",
        "stopped",
        "refused",
        "repetition",
        "exact",
        "loss",
    } <= set(rows.column_names)
    for title in (
        "Ten largest gains",
        "Ten largest losses",
        "Which step helped",
        "general prompts (retention)",
        "What was judged",
    ):
        assert title in page


def test_page_escapes_what_models_write(copy: Path) -> None:
    from ft_assets.evaluation.report_html import _bold

    assert (
        _bold("<script>alert(1)</script> **yes**")
        == "&lt;script&gt;alert(1)&lt;/script&gt; <b>yes</b>"
    )


def test_report_says_what_changed_since_the_previous_one(copy: Path) -> None:
    assert "First report" in (artifact(copy, "eval_report") / "info/changes.md").read_text()
    edit(copy, evaluation={"max_new_tokens": 1})
    materialize(copy, "answers,eval_report")
    text = (artifact(copy, "eval_report") / "info/changes.md").read_text()
    assert "Verdict: PASS → FAIL." in text
    assert "What changed: evaluation." in text
    assert "| SFT adapter |" in text


def test_changed_metric_names_file_and_line_of_a_row_that_it_cannot_score(copy: Path) -> None:
    edit(copy, evaluation={"json_fields": ["a"]})
    said = failure(materialize(copy, "eval_report"))
    assert re.search(r"(heldout|train)\.jsonl:\d+: the reference is", said), said
    assert "a JSON object with the keys a" in said


def test_ft_report_names_the_page(copy: Path) -> None:
    done = ft(copy, "report", "--page")
    assert done.returncode == 0, done.stderr
    assert Path(done.stdout.strip()).read_text().startswith("<!doctype html>")


def harness_task(folder: Path) -> None:
    rows = [
        {"word": WORDS[index], "choices": WORDS[:6], "label": (index + 1) % 6} for index in range(6)
    ] * 4
    write_jsonl(folder / "tasks/rows.jsonl", rows)
    (folder / "tasks/next_word.yaml").write_text(
        "task: next_word\ndataset_path: json\n"
        f"dataset_kwargs: {{data_files: {{test: {folder}/tasks/rows.jsonl}}}}\ntest_split: test\n"
        "output_type: multiple_choice\ndoc_to_text: 'after {{word}} 1'\n"
        "doc_to_choice: '{{choices}}'\ndoc_to_target: '{{label}}'\n"
        "metric_list: [{metric: acc, aggregation: mean, higher_is_better: true}]\n"
    )


def test_harness_tasks_are_general_prompts_with_a_tolerance(healthy: Callable[..., Path]) -> None:
    folder = healthy(evaluation={"lm_eval": ["next_word"], "lm_eval_path": "tasks"})
    harness_task(folder)
    materialize(folder, UP_TO_REPORT)
    report = read(folder, "eval_report", "report.json")
    assert (
        report["harness"]["scores"]["base"]["next_word acc"] > 0.5
    )  # the base was trained on this task
    assert report["harness"]["comparisons"]["sft"]["base"]["next_word acc"]["n"] == 24
    reasons = json.dumps(read(folder, "eval_report", "verdict.json"))
    assert "next_word acc of general prompts" in reasons
    assert "## lm-evaluation-harness" in (artifact(folder, "eval_report") / "report.md").read_text()


def test_unknown_harness_task_is_named(copy: Path) -> None:
    edit(copy, evaluation={"lm_eval": ["no_such_task"]})
    assert "evaluation.lm_eval: no_such_task: is not a task" in failure(
        materialize(copy, "answers")
    )
