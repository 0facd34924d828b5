"""Damaged files of a base model are named before anything is loaded; its template must end."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from ft_assets.chat.template_text import TemplateText
from ft_assets.errors import ModelError, TemplateError
from ft_assets.models import template_limits
from ft_assets.models.source import locate_folder, locate_gguf, read_template, require_unquantized
from ft_assets.models.template_limits import require_ends
from ft_assets_tests.factories import tiny_tokenizer

GOOD = {"config.json": b'{"model_type": "llama"}', "tokenizer_config.json": b"{}"}


@pytest.mark.parametrize(
    "name",
    ["config.json", "generation_config.json", "tokenizer_config.json", "m.safetensors.index.json"],
)
@pytest.mark.parametrize(
    ("content", "problem"),
    [
        (b"", "is not JSON"),
        (b"{", "is not JSON"),
        (b"[]", "holds a list instead of an object"),
        (b"null", "holds null instead of an object"),
        ('{"name": "é"}'.encode("latin-1"), "is not UTF-8 text: byte 10 is 0xe9"),
        (b"[" * 100_000, "nested too deeply"),
        (b'{"a": "\xff\xfe"}', "is not UTF-8 text"),
    ],
)
def test_damaged_json_of_a_base_is_named(
    tmp_path: Path, name: str, content: bytes, problem: str
) -> None:
    for file, text in {**GOOD, name: content}.items():
        (tmp_path / file).write_bytes(text)
    with pytest.raises(ModelError, match=problem) as refused:
        locate_folder("b", str(tmp_path), tmp_path)
    assert str(tmp_path / name) in str(refused.value)


def test_parts_of_a_base_that_are_no_objects_are_named(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text('{"text_config": null}')
    assert locate_folder("b", str(tmp_path), tmp_path) == tmp_path
    require_unquantized("b", tmp_path)
    (tmp_path / "config.json").write_text('{"quantization_config": [4]}')
    with pytest.raises(ModelError, match="holds a list as quantization_config"):
        locate_folder("b", str(tmp_path), tmp_path)
    (tmp_path / "config.json").unlink()
    (tmp_path / "adapter_config.json").write_text("[")
    with pytest.raises(ModelError, match=r"adapter_config.json is not JSON"):
        locate_folder("b", str(tmp_path), tmp_path)


@pytest.mark.parametrize(
    ("content", "problem"),
    [(b"", "it is empty"), (b"<html>", "it begins with b'<htm'"), (b"GGU", "begins with b'GGU'")],
)
def test_file_that_is_no_gguf_is_named(tmp_path: Path, content: bytes, problem: str) -> None:
    (tmp_path / "m.gguf").write_bytes(content)
    with pytest.raises(ModelError, match=problem) as refused:
        locate_gguf("b", "m.gguf", tmp_path)
    assert str(tmp_path / "m.gguf") in str(refused.value)
    assert "trust_remote_code" not in str(refused.value)


def test_template_file_in_another_encoding_is_named(tmp_path: Path) -> None:
    (tmp_path / "own.jinja").write_bytes("{{ 'é' }}".encode("latin-1"))
    with pytest.raises(Exception, match=r"own.jinja is not UTF-8 text: byte 4 is 0xe9"):
        read_template("b", "own.jinja", tmp_path)


LOOP = "{% for a in range(99999) %}{% for b in range(99999) %}{% endfor %}{% endfor %}"
GROW = (
    "{% set n = namespace(x='ab') %}{% for i in range(60) %}{% set n.x = n.x + n.x %}{% endfor %}"
)


@pytest.mark.parametrize(
    ("template", "problem"),
    [
        (LOOP, "within 1 s of CPU time"),
        (GROW, "memory|CPU time"),
        ("{% for x %}", "cannot be parsed: line 1"),
        ("{{ raise_exception('no') }}", None),
        ("{% macro f() %}{{ f() }}{{ f() }}{% endmacro %}{{ f() }}", None),
    ],
    ids=["loop", "grow", "syntax", "refusal", "recursion"],
)
def test_template_must_end_in_seconds(
    template: str, problem: str | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(template_limits, "PROBE_SECONDS", 1)
    monkeypatch.setattr(template_limits, "PROBE_MEMORY", 1 << 28)
    tokenizer: Any = tiny_tokenizer()
    tokenizer.chat_template = template
    if problem is None:
        require_ends("base_models.b.chat", tokenizer)
        return
    with pytest.raises(TemplateError, match=problem):
        require_ends("base_models.b.chat", tokenizer)


def test_template_that_loops_for_one_conversation_ends_and_two_megabytes_are_written(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    tokenizer: Any = tiny_tokenizer()
    long = "what is the river " * 120_000
    assert long in TemplateText(tokenizer, frozenset()).text([{"role": "user", "content": long}])
    tokenizer.chat_template = "{% if 'loop' in messages[0].content %}" + LOOP + "{% endif %}"
    which = TemplateText(tokenizer, frozenset())
    limited: Callable[..., Any] = template_limits.limited
    monkeypatch.setattr("ft_assets.chat.template_text.limited", lambda: limited(0.5))
    assert which.text([{"role": "user", "content": "red"}]) == ""
    with pytest.raises(TemplateError, match="a conversation of 1 turns and 4 characters"):
        which.text([{"role": "user", "content": "loop"}])
