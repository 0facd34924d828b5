"""finetune.yaml is read strictly: what would be changed or dropped is refused, by line."""

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
