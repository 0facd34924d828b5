"""Kept inputs of the fuzzers, and mutations of them: a result or our own error, nothing else.

A few mutations here; `make chaos` tries many (FT_CHAOS_EXAMPLES). An input that was a finding is
kept in corpus/.
"""

import os
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from ft_assets.config import load_project
from ft_assets.data.canonical import conversation, preference
from ft_assets.data.file_formats import read_rows
from ft_assets.errors import ConfigError, DataError
from ft_assets.rows.values import RowProblem

CORPUS = Path(__file__).parent / "corpus"
EXAMPLES = 5 * int(os.environ.get("FT_CHAOS_EXAMPLES", "6"))
ROWS = sorted((CORPUS / "rows").iterdir())
CONFIGS = sorted((CORPUS / "config").iterdir())
drawn = settings(max_examples=EXAMPLES, deadline=None, suppress_health_check=list(HealthCheck))


@st.composite
def mutated(draw: st.DrawFn, files: list[Path]) -> tuple[str, bytes]:
    """Return the name and the bytes of a kept input with a part replaced."""
    file = draw(st.sampled_from(files))
    data = file.read_bytes()
    start = draw(st.integers(0, len(data)))
    end = draw(st.integers(start, min(len(data), start + 20)))
    other = draw(st.sampled_from(files)).read_bytes()[:200]
    piece = draw(st.one_of(st.binary(max_size=8), st.just(other), st.just(data[start:end] * 3)))
    return file.name, data[:start] + piece + data[end:]


def read(path: Path) -> None:
    """Read a file of rows. Anything but rows, row problems or a DataError is a finding."""
    for form in (conversation, preference):
        try:
            for row in read_rows(path):
                assert (row.value is None) == (row.problem is not None)
                if row.value is not None:
                    _canonical(form, row.value)
        except DataError as error:
            assert str(path) in str(error) or "data.encoding" in str(error)


def _canonical(form: object, value: object) -> None:
    try:
        form(value)  # type: ignore[operator]
    except RowProblem as problem:
        str(problem).encode()


def load(path: Path) -> None:
    """Load a configuration. Anything but a project or a ConfigError of one screen is a finding."""
    try:
        load_project(path)
    except ConfigError as error:
        assert len(str(error)) < 4000
        assert "SECRET" not in str(error)


@pytest.mark.parametrize("file", ROWS, ids=lambda file: file.name)
def test_kept_rows(file: Path) -> None:
    read(file)


@pytest.mark.parametrize("file", CONFIGS, ids=lambda file: file.stem)
def test_kept_configurations(file: Path) -> None:
    load(file)


@drawn
@given(mutated(ROWS))
def test_mutated_rows(tmp_path_factory: pytest.TempPathFactory, given: tuple[str, bytes]) -> None:
    path = tmp_path_factory.getbasetemp() / given[0]
    path.write_bytes(given[1])
    read(path)


@drawn
@given(mutated(CONFIGS))
def test_mutated_configurations(
    tmp_path_factory: pytest.TempPathFactory, given: tuple[str, bytes]
) -> None:
    path = tmp_path_factory.getbasetemp() / "finetune.yaml"
    path.write_bytes(given[1])
    load(path)
