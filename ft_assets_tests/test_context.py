"""A prompt that leaves no room for its answer in the model's context is refused before training."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from ft_assets.chat.rendering import Renderer
from ft_assets.errors import EvaluationError
from ft_assets.evaluation.context import Room, few_shot_lengths
from ft_assets.rows.types import ConversationRow
from ft_assets_tests.factories import conversations, edit, tiny_tokenizer, write_jsonl
from ft_assets_tests.pipeline import checks, failure, materialize

UP_TO_SPLIT = "raw_dataset,raw_preferences,base_model,recipe,chat_dataset,heldout_split"
ROOM = 8  # evaluation.max_new_tokens of the tests' project


def rows(count: int, answer: str = "yes", start: int = 0) -> list[ConversationRow]:
    made: list[Any] = conversations(count, lambda _: answer, start=start)
    return [{**row, "id": f"row {index}"} for index, row in enumerate(made)]


def refused(context: int, examples: Sequence[ConversationRow]) -> EvaluationError | None:
    renderer = Renderer(tiny_tokenizer(), frozenset({tiny_tokenizer().eos_token_id}))
    return Room(context, ROOM).few_shot_error(renderer, rows(3), examples, None)


def test_few_shot_prompt_is_refused_with_the_number_of_examples_that_fit() -> None:
    examples = rows(6, start=900)
    renderer = Renderer(tiny_tokenizer(), frozenset({tiny_tokenizer().eos_token_id}))
    needed = [
        max(few_shot_lengths(renderer, rows(3), examples[:count], None).values()) + ROOM
        for count in range(7)
    ]
    assert refused(needed[6], examples) is None
    error = refused(needed[6] - 1, examples)
    assert error is not None
    assert "keep the first 5 of the 6 examples" in error.fix
    assert f"{needed[6]} with evaluation.max_new_tokens 8" in error.found
    error = refused(needed[2], examples)
    assert error is not None
    assert "keep the first 2 of the 6 examples" in error.fix
    error = refused(needed[1] - 1, examples)
    assert error is not None
    assert "not one example fits" in error.fix


def test_rows_are_refused_with_the_room_that_is_left() -> None:
    assert Room(100, 20).rows_error({"a": 80, "b": 3}) is None
    assert Room(None, 20).rows_error({"a": 10**6}) is None
    error = Room(100, 20).rows_error({"a": 3, "b": 81, "c": 90})
    assert error is not None
    assert str(error).startswith(
        "held-out row c: the prompt has 90 tokens, 110 with evaluation.max_new_tokens 20; "
        "2 of 3 rows are too long"
    )
    assert "lower evaluation.max_new_tokens to 10" in error.fix
    full = Room(100, 20).rows_error({"a": 100})
    assert full is not None
    assert full.fix.startswith("leave out or shorten the row")


def test_blocking_check_refuses_before_training(project: Path) -> None:
    write_jsonl(
        project / "data/few_shot.jsonl", conversations(40, lambda _: "yes yes yes", start=3000)
    )
    result = materialize(project, f"{UP_TO_SPLIT},lora_adapter")
    assert not result.success
    check = checks(result)["prompts_fit_the_context"]
    assert not check.passed
    assert "of the 40 examples, which fit" in str(check.description)
    assert "lora_adapter" not in failure(result)
    made = {
        event.asset_key.to_user_string()
        for event in result.get_asset_materialization_events()
        if event.asset_key
    }
    assert "lora_adapter" not in made
    edit(project, data={"few_shot": []}, evaluation={"max_new_tokens": 250})
    check = checks(materialize(project, UP_TO_SPLIT))["prompts_fit_the_context"]
    assert not check.passed
    assert "lower evaluation.max_new_tokens to" in str(check.description)
