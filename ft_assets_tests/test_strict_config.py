"""finetune.yaml is read strictly: what would be changed or dropped is refused, by line."""

import itertools
from collections.abc import Callable
from pathlib import Path

import pytest

from ft_assets.config import load_project
from ft_assets.errors import ConfigError
from ft_assets_tests.factories import edit


def refused(project: Path) -> str:
    with pytest.raises(ConfigError) as caught:
        load_project(project / "finetune.yaml")
    return str(caught.value)


def append(project: Path, text: str) -> int:
    """Add text to finetune.yaml; return the number of its first line."""
    path = project / "finetune.yaml"
    before = path.read_text()
    path.write_text(f"{before}{text}")
    return before.count("\n") + 1


def test_key_that_is_written_twice_is_refused_with_both_lines(project: Path) -> None:
    line = append(project, "release:\n  margin: 0.1\n  margin: 0.2\n")
    said = refused(project)
    assert f"finetune.yaml:{line + 2}" in said
    assert f"the key margin is here and in line {line + 1}" in said
    assert "each key once" in said


@pytest.mark.parametrize(
    ("value", "expected"), [("1:30", '"1:30"'), ("010", '"010"'), ("1:30:00", '"1:30:00"')]
)
def test_number_that_yaml_reads_as_another_is_refused(
    project: Path, value: str, expected: str
) -> None:
    line = append(project, f"release:\n  margin: {value}\n")
    said = refused(project)
    assert f"finetune.yaml:{line + 1}" in said
    assert expected in said


def test_text_in_quotes_stays_a_text(project: Path) -> None:
    append(project, 'schedule: {cron: "0 3 * * 1"}\n')
    schedule = load_project(project / "finetune.yaml").schedule
    assert schedule is not None
    assert schedule.cron == "0 3 * * 1"


@pytest.mark.parametrize(
    ("content", "reason"),
    [
        ("data: Größe\n".encode("latin-1"), "is not UTF-8 text: byte"),
        ("data: {}\n".encode("utf-16"), "is not UTF-8 text: byte 0"),
        (b"data: " + b"[" * 5000 + b"]" * 5000, "is nested too deeply"),
        (b"data: 2026-13-45\n", "is not YAML"),
        (b"data: " + b"9" * 5000 + b"\n", "is not YAML"),
    ],
)
def test_file_that_cannot_be_read_is_a_clear_error(
    project: Path, content: bytes, reason: str
) -> None:
    (project / "finetune.yaml").write_bytes(content)
    assert reason in refused(project)


def test_errors_of_settings_have_no_words_of_the_library(project: Path) -> None:
    path = project / "finetune.yaml"
    text = path.read_text()
    path.write_text(text.replace("data:", "data:\n  few_shot_autos: true", 1))
    said = refused(project)
    assert "heldout_slice" in said and "few_shot_auto," not in said
    path.write_text(text.replace("data:", "data:\n  heldout_slice: 90", 1))
    said = refused(project)
    assert "heldout_slice: a share of" in said and "Value error" not in said


def test_root_is_not_a_key(project: Path) -> None:
    append(project, "root: /etc\n")
    assert "root: is not a known key" in refused(project)


def test_gate_of_margins_alone_proves_nothing_and_is_refused(project: Path) -> None:
    edit(project, gate={"metrics": {"exact": 0.5}})
    assert "at least one metric that must be `better`" in refused(project)
    edit(project, gate={"metrics": {"exact": "better", "loss": 0.5}})
    load_project(project / "finetune.yaml")


@pytest.mark.parametrize("margin", [".nan", ".inf", "0", "-0.1", "true", "no"])
def test_margin_is_a_finite_number_above_zero(project: Path, margin: str) -> None:
    path = project / "finetune.yaml"
    gate = f"gate: {{metrics: {{exact: better, loss: {margin}}}}}\n"
    path.write_text(path.read_text().split("gate:")[0] + gate)
    said = refused(project)
    assert "gate.metrics" in said
    assert "a finite number above 0" in said


@pytest.mark.parametrize("reason", ["", "   ", "\n"])
def test_blank_override_is_not_a_reason(project: Path, reason: str) -> None:
    edit(project, gate={"override": reason})
    assert "a blank text is not a reason" in refused(project)


def test_demo_and_init_read_strictly(make_project: Callable[[Path], Path], tmp_path: Path) -> None:
    load_project(Path(__file__).parents[1] / "finetune.yaml")
    load_project(make_project(tmp_path / "project") / "finetune.yaml")


@pytest.mark.parametrize(
    ("section", "values", "reason"),
    [
        (
            "sft",
            {"learning_rate": float("inf")},
            "sft.learning_rate: inf: Input should be a finite",
        ),
        ("sft", {"learning_rate": "inf"}, "sft.learning_rate: 'inf': Input should be a finite"),
        ("sft", {"learning_rate": 20}, "less than or equal to 1"),
        ("lora", {"r": 10**23}, "less than or equal to 16384"),
        ("sft", {"save_steps": 10**23}, "no count, size, rate or time is so large"),
        ("lora", {"r": True}, "true is no number"),
        ("lora", {"r": "x" * 100_000}, "unable to parse string as an integer"),
        ("sft", {"trainer": {"adam_epsilon": float("nan")}}, "sft.trainer.adam_epsilon: is nan"),
        ("sft", {"seed": -1}, "greater than or equal to 0"),
        ("gate", {"confidence": "nan"}, "finite number"),
        ("evaluation", {"python": {"function": "a:b", "seconds": "inf"}}, "finite number"),
    ],
)
def test_number_that_no_step_can_use_is_refused(
    project: Path, section: str, values: dict[str, object], reason: str
) -> None:
    edit(project, **{section: values})
    said = refused(project)
    assert reason in said
    assert len(said) < 500


@pytest.mark.parametrize(
    ("names", "reason"),
    [
        (["a" * 300], "has a name of 300 bytes"),
        ([".a"], "is not a name that a folder can safely have"),
        (["-rf"], "is not a name"),
        (["t\u0456ny"], "letters and digits of ASCII"),  # a Cyrillic letter
        (["_"], "is not a name"),
        (["a...b"], "is not a name"),
        (["CURRENT"], "is a name that the store uses itself"),
        (["Tiny", "tiny"], "differs from Tiny only in upper and lower case"),
        ([7], "has the key 7, which is no text"),
    ],
)
def test_name_of_a_base_is_safe_as_that_of_a_folder(
    project: Path, names: list[str], reason: str
) -> None:
    edit(project, base_models={name: {"folder": "m"} for name in names})
    assert reason in refused(project)


def test_anchors_do_not_grow_without_end(project: Path) -> None:
    lines = ["a: &a [x, x, x, x, x, x, x, x, x]"]
    for before, name in itertools.pairwise("abcdefghi"):
        lines.append(f"{name}: &{name} [{', '.join([f'*{before}'] * 9)}]")
    (project / "finetune.yaml").write_text("\n".join(lines))
    said = refused(project)
    assert "its anchors and aliases make more than 100000 values" in said
    assert len(said) < 400
    (project / "finetune.yaml").write_text("a: &a [*a]")
    assert "anchors and aliases" in refused(project)
