"""One family in full, and the table of all families in docs/models.md."""

import re
from pathlib import Path

from bench.models import STEPS, run
from ft_assets_tests.families import FAMILIES, WHOLES

DOCS = Path(__file__).parents[1] / "docs" / "models.md"


def test_hybrid_that_also_sees_goes_through_every_step(tmp_path: Path) -> None:
    """Its linear attention would see other documents and the other answer of a pair."""
    found = {(step, target): cell for step, target, cell in run("qwen3_5", tmp_path)}
    assert found.pop(("base", "")).mark == "✓"
    for target in ("attention", "all-linear"):
        marks = [found[step, target].mark for step in STEPS[1:]]
        assert marks == ["✓", "–", "✓", "–", "✓", "✓", "✗"], found
        assert "is not one of" in found["GGUF", target].reason


def test_table_has_every_family_and_no_crash() -> None:
    text = DOCS.read_text(encoding="utf-8")
    listed = re.findall(r"^\| `(\w+)` \|", text, re.MULTILINE)
    assert listed == [*FAMILIES, *WHOLES]
    assert len(listed) >= 25
    assert "CRASH" not in text
