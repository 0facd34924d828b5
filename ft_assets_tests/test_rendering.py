"""The proofs of a rendered sequence: each kind of wrong mask or template fails with its reason."""

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from ft_assets.chat.calls import missing_calls
from ft_assets.chat.rendering import ProofFailed, Rendered, Renderer
from ft_assets.chat.row_proofs import Facts, prove
from ft_assets_tests.factories import CHATML, tiny_tokenizer

TURNS = [
    {"role": "system", "content": "what is the colour"},
    {"role": "user", "content": "red apple"},
    {"role": "assistant", "content": "yes"},
    {"role": "user", "content": "green river"},
    {"role": "assistant", "content": "no no"},
]
REWRITING = (
    "{% for m in messages %}{{ '<|im_start|>' + m.role + '\n' }}"
    "{% if m.role == 'assistant' and loop.last %}{{ '<think>\n\n</think>\n\n' }}{% endif %}"
    "{{ m.content.split('</think>')[-1].lstrip() if m.role == 'assistant' and not loop.last else "
    "m.content }}{{ '<|im_end|>\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)


def renderer(template: str = CHATML, bos: str | None = None) -> Renderer:
    tokenizer = tiny_tokenizer()
    tokenizer.chat_template = template
    if bos:
        tokenizer.bos_token = bos
    return Renderer(tokenizer, frozenset([tokenizer.eos_token_id]))


def trained(which: Renderer, messages: list[dict[str, Any]], **row: Any) -> list[Rendered]:
    done = which.train([{"messages": messages, **row}])[0]
    if isinstance(done, ProofFailed):
        raise done
    return done


def learnt(which: Renderer, rendered: Rendered) -> str:
    """Return the text of the supervised tokens."""
    return which.facts.decode(
        [token for token, flag in zip(rendered.input_ids, rendered.supervised, strict=True) if flag]
    )


def test_ids_are_those_of_apply_chat_template() -> None:
    which = renderer()
    whole = which.tokenizer.apply_chat_template(TURNS, tokenize=True, return_dict=False)
    context = which.tokenizer.apply_chat_template(
        TURNS[:-1], tokenize=True, return_dict=False, add_generation_prompt=True
    )
    assert trained(which, TURNS)[0].input_ids == whole
    assert which.prompts([{"messages": TURNS[:-1]}]) == [context]
    assert which.answers([{"messages": TURNS}]) == [
        (context, whole[len(context) : whole.index(which.tokenizer.eos_token_id, len(context)) + 1])
    ]


def test_a_batch_is_what_its_rows_are_alone() -> None:
    which = renderer()
    rows = [
        {"messages": TURNS},
        {"messages": TURNS[1:2]},
        {"messages": TURNS[1:3]},
        {"messages": [{"role": "text", "content": "red apple"}]},
    ]
    together = which.train(rows)
    assert isinstance(together[1], ProofFailed) and "no turn to learn from" in str(together[1])
    assert [together[0], together[2], together[3]] == [
        which.train([rows[index]])[0] for index in (0, 2, 3)
    ]


def test_turns_that_are_not_to_be_learnt_are_not_supervised_and_the_tail_is_cut() -> None:
    which = renderer()
    done = trained(
        which, [*TURNS[:4], {**TURNS[4], "train": False}, {"role": "user", "content": "yes"}]
    )
    assert [(learnt(which, one), one.turns) for one in done] == [("yes<|im_end|>", 3)]


def test_rewriting_template_makes_one_sequence_per_turn_and_names_its_block() -> None:
    which = renderer(REWRITING)
    done = trained(which, TURNS)
    assert [one.turns for one in done] == [3, 5]
    assert [learnt(which, one) for one in done] == [
        "<think>\n\n</think>\n\nyes<|im_end|>",
        "<think>\n\n</think>\n\nno no<|im_end|>",
    ]
    assert all(one.added == ("<think>\n\n</think>",) for one in done)
    for one in done:
        prompt = which.prompts([{"messages": TURNS[: one.turns - 1]}])[0]
        assert isinstance(prompt, list) and one.input_ids[: one.supervised.index(True)] == prompt


def test_a_block_that_depends_on_the_answer_is_no_block() -> None:
    template = REWRITING.replace("'<think>\n\n</think>\n\n'", "'<' + m.content + '>'")
    with pytest.raises(ProofFailed, match="not to the answer 'yes'"):
        trained(renderer(template), TURNS)


def test_tokens_that_reach_over_the_border_make_the_answer_tokenized_apart() -> None:
    opened = CHATML.replace("'<|im_start|>assistant\n'", "'<|im_start|>assistant\nye'").replace(
        "message['role'] + '\n' +",
        "message['role'] + '\n' + ('ye' if message['role'] == 'assistant' else '') +",
    )
    which = renderer(opened)
    assert len(which.encode(["yes"])[0]) == 1
    messages = [TURNS[1], {"role": "assistant", "content": "s"}]
    (one,) = trained(which, messages)
    assert one.apart and learnt(which, one) == "s<|im_end|>"
    assert [one.input_ids[: one.supervised.index(True)]] == which.prompts(
        [{"messages": messages[:1]}]
    )


def test_plain_text_is_supervised_from_the_first_token_to_eos() -> None:
    which = renderer()
    (one,) = trained(which, [{"role": "text", "content": "red apple\n\nyes"}])
    assert which.facts.decode(one.input_ids) == "red apple\n\nyes<|im_end|>"
    assert all(one.supervised) and one.turns == 1
    with pytest.raises(ProofFailed, match="at which generation stops"):
        trained(which, [{"role": "text", "content": "red<|im_end|>apple"}])


def test_plain_text_gets_bos_if_the_tokenizer_puts_one() -> None:
    from tokenizers.processors import TemplateProcessing

    tokenizer = tiny_tokenizer()
    tokenizer.bos_token = "<|endoftext|>"
    tokenizer.backend_tokenizer.post_processor = TemplateProcessing(
        single="<|endoftext|> $A", special_tokens=[("<|endoftext|>", 0)]
    )
    which = Renderer(tokenizer, frozenset([tokenizer.eos_token_id]))
    (one,) = trained(which, [{"role": "text", "content": "red apple"}])
    assert which.facts.decode(one.input_ids) == "<|endoftext|>red apple<|im_end|>"
    with pytest.raises(
        ProofFailed, match="BOS occurs 0 times; expected once"
    ):  # the template does not write it
        trained(which, TURNS)


# Negative controls: the proof itself, handed something wrong.


@pytest.fixture(name="right")
def _right() -> tuple[Facts, Rendered, dict[int, list[int]]]:
    which = renderer()
    contexts = {index: which.prompts([{"messages": TURNS[:index]}])[0] for index in (2, 4)}
    rendered = trained(which, TURNS)[0]
    prove(which.facts, rendered, TURNS, contexts)  # type: ignore[arg-type]
    return which.facts, rendered, contexts  # type: ignore[return-value]


def flipped(rendered: Rendered, *places: int) -> Rendered:
    return replace(
        rendered,
        supervised=[flag != (place in places) for place, flag in enumerate(rendered.supervised)],
    )


def last(rendered: Rendered) -> int:
    return len(rendered.supervised) - 1 - rendered.supervised[::-1].index(True)


def test_mask_that_misses_the_end_of_turn_fails(right: tuple) -> None:
    facts, rendered, contexts = right
    with pytest.raises(
        ProofFailed,
        match=r"messages\[4\].*which is not a token at which generation stops.*not learn to stop",
    ):
        prove(facts, flipped(rendered, last(rendered)), TURNS, contexts)


def test_mask_that_covers_the_user_fails(right: tuple) -> None:
    facts, rendered, contexts = right
    start = len(facts.tokenizer.encode(facts.decode(contexts[4]).rpartition("green river")[0]))
    length = len(facts.tokenizer.encode("green river"))
    assert facts.decode(rendered.input_ids[start : start + length]) == "green river"
    with pytest.raises(ProofFailed, match=r"messages\[3\] \(user\): is supervised and must not be"):
        prove(facts, flipped(rendered, *range(start, start + length)), TURNS, contexts)


def test_mask_that_covers_everything_fails(right: tuple) -> None:
    facts, rendered, contexts = right
    with pytest.raises(ProofFailed, match="supervised and must not be"):
        prove(
            facts, replace(rendered, supervised=[True] * len(rendered.supervised)), TURNS, contexts
        )


def test_mask_that_starts_late_or_misses_a_turn_fails(right: tuple) -> None:
    facts, rendered, contexts = right
    with pytest.raises(ProofFailed, match="begin where no answer begins"):
        prove(facts, flipped(rendered, len(contexts[4])), TURNS, contexts)
    first = range(len(contexts[2]), rendered.supervised.index(False, len(contexts[2])))
    with pytest.raises(ProofFailed, match=r"messages\[2\].*its first token is not supervised"):
        prove(facts, flipped(rendered, *first), TURNS, contexts)


def test_mask_that_runs_past_the_end_of_turn_fails(right: tuple) -> None:
    facts, rendered, contexts = right
    with pytest.raises(ProofFailed, match=r"messages\[4\].*ends? with"):
        prove(facts, flipped(rendered, last(rendered) + 1), TURNS, contexts)


def test_turn_that_says_train_false_may_not_be_supervised(right: tuple) -> None:
    facts, rendered, contexts = right
    with pytest.raises(
        ProofFailed, match=r"messages\[2\] \(assistant\): is supervised and must not be"
    ):
        prove(facts, rendered, TURNS, {4: contexts[4]})


def test_another_context_than_that_of_generation_fails(right: tuple) -> None:
    facts, rendered, contexts = right
    changed = {**contexts, 4: [*contexts[4][:-2], *contexts[4][-1:]]}
    with pytest.raises(ProofFailed, match=r"messages\[4\].*differ from those given at generation"):
        prove(facts, rendered, TURNS, changed)


def test_another_answer_fails(right: tuple) -> None:
    facts, rendered, contexts = right
    with pytest.raises(ProofFailed, match="decode to 'no no', not to the answer 'no'"):
        prove(facts, rendered, [*TURNS[:4], {"role": "assistant", "content": "no"}], contexts)


def test_an_unlisted_block_before_the_answer_fails() -> None:
    which = renderer(REWRITING)
    (_, rendered) = trained(which, TURNS)
    context = {4: rendered.input_ids[: rendered.supervised.index(True)]}
    prove(which.facts, rendered, TURNS, context, {4: ("<think>\n\n</think>", "")})
    with pytest.raises(ProofFailed, match="not to the answer"):
        prove(which.facts, rendered, TURNS, context)


@pytest.mark.parametrize(("bos", "count"), [("{{ bos_token }}", 1), ("", 0)])
def test_one_bos_or_none_passes(bos: str, count: int) -> None:
    which = renderer(bos + CHATML, "<|endoftext|>")
    (one,) = trained(which, TURNS)
    assert one.input_ids.count(which.tokenizer.bos_token_id) == count
    second = replace(
        one,
        input_ids=[which.tokenizer.bos_token_id, *one.input_ids],
        supervised=[False, *one.supervised],
    )
    contexts = {
        2: second.input_ids[: second.supervised.index(True)],
        4: second.input_ids[: last(second) - len(which.encode(["no no"])[0])],
    }
    with pytest.raises(ProofFailed, match=f"BOS occurs {count + 1} times"):
        prove(which.facts, second, TURNS, contexts)


def test_bos_twice_in_a_template_is_refused_and_bos_that_opens_turns_is_not() -> None:
    with pytest.raises(ProofFailed, match="BOS occurs 2 times"):
        trained(renderer("{{ bos_token }}{{ bos_token }}" + CHATML, "<|endoftext|>"), TURNS)
    which = renderer(CHATML, "<|im_start|>")
    assert learnt(which, trained(which, TURNS)[0]) == "yes<|im_end|>no no<|im_end|>"


@pytest.mark.parametrize(
    ("dropped", "reason"),
    [
        (
            "message.role == 'system'",
            r"messages\[0\] \(system\): the template drops this turn: set chat.system_turn: user",
        ),
        ("message.role == 'user'", r"messages\[1\] \(user\): the template drops this turn"),
        (
            "message.content == 'red apple'",
            r"messages\[1\] \(user\): the template drops this turn, 'red apple'",
        ),
    ],
)
def test_dropped_turns_are_refused(dropped: str, reason: str) -> None:
    with pytest.raises(ProofFailed, match=reason):
        trained(renderer(CHATML.replace("in messages", f"in messages if not ({dropped})")), TURNS)


def test_a_turn_whose_words_stand_elsewhere_is_still_found_missing() -> None:
    template = CHATML.replace(
        "for message in messages", "for message in messages if message.role != 'system'"
    )
    said_again = [
        {"role": "system", "content": "red"},
        *TURNS[1:],
    ]  # "red" stands in "red apple" too
    with pytest.raises(
        ProofFailed, match=r"messages\[0\] \(system\): the template drops this turn"
    ):
        trained(renderer(template), said_again)


def test_inner_white_space_that_a_template_changes_is_refused() -> None:
    template = CHATML.replace("message['content']", "(message['content'] | replace('\n', ' '))")
    changed = [{"role": "user", "content": "red\napple"}, {"role": "assistant", "content": "yes"}]
    with pytest.raises(ProofFailed, match=r"messages\[0\] \(user\): the template changes its text"):
        trained(renderer(template), changed)
    assert trained(renderer(), changed)


def test_template_swapped_after_tokenization_is_found() -> None:
    from ft_assets.evaluation.candidate_proofs import template_mismatches

    which = renderer()
    rows = [
        {"id": "chat", "messages": TURNS, **_columns(trained(which, TURNS)[0])},
        {"id": "short", "messages": TURNS[:3], **_columns(trained(which, TURNS[:3])[0])},
        {
            "id": "text",
            "messages": (text := [{"role": "text", "content": "red apple"}]),
            **_columns(trained(which, text)[0]),
        },
    ]
    assert template_mismatches(which, rows) == []
    swapped = renderer(CHATML.replace("'<|im_end|>' + '\n'", "'<|im_end|>'"))
    assert template_mismatches(swapped, rows) == ["chat", "short"]  # a plain text has no template


def _columns(rendered: Rendered) -> dict[str, Any]:
    return {"input_ids": rendered.input_ids, "supervised": rendered.supervised}


# Random conversations.

PLAIN = st.text(
    st.characters(codec="utf-8", exclude_categories=("Cs", "Cc")), min_size=1, max_size=30
).filter(lambda text: text.strip())


@settings(max_examples=150, deadline=None, suppress_health_check=list(HealthCheck))
@given(st.lists(st.tuples(PLAIN, PLAIN, st.booleans()), min_size=1, max_size=4), st.booleans())
def test_supervised_tokens_decode_to_exactly_the_answers(
    turns: list[tuple[str, str, bool]], system: bool
) -> None:
    which = RANDOM
    messages: list[dict[str, Any]] = [{"role": "system", "content": "what"}] if system else []
    for question, answer, train in turns:
        messages += [
            {"role": "user", "content": question},
            {"role": "assistant", "content": answer, **({} if train else {"train": False})},
        ]
    done = which.train([{"messages": messages}])[0]
    wanted = "".join(answer + "<|im_end|>" for _, answer, train in turns if train)
    if not wanted:
        assert isinstance(done, ProofFailed)
        return
    assert not isinstance(done, ProofFailed), done
    assert "".join(learnt(which, one) for one in done) == wanted


RANDOM = renderer()

# Tool calls, as text.

CALL = {
    "type": "function",
    "function": {
        "name": "find",
        "arguments": {"city": 'Bonn "am" Rhein', "n": 3, "open": True, "tags": ["a", "b"]},
    },
}
ARGUMENTS = CALL["function"]["arguments"]


@pytest.mark.parametrize(
    "text",
    [
        json.dumps({"name": "find", "arguments": ARGUMENTS}),
        json.dumps({"name": "find", "parameters": json.dumps(ARGUMENTS)}),
        json.dumps([{"arguments": ARGUMENTS, "tool_name": "find"}]),
        "find[ARGS]" + json.dumps(ARGUMENTS),
        f"[find({', '.join(f'{key}={value!r}' for key, value in ARGUMENTS.items())})]",
        '<call=find><city>Bonn "am" Rhein</city><n>3</n><open>true</open><tags>["a", "b"]</tags>',
        "<call=find><city>Bonn \"am\" Rhein</city><n>3</n><open>True</open><tags>['a', 'b']</tags>",
        '<call=find><city>Bonn "am" '
        "Rhein</city><n>3</n><open>true</open><tags><item>a</item><item>b</item></tags>",
    ],
)
def test_calls_are_found_in_json_in_python_and_in_tags(text: str) -> None:
    assert missing_calls(text, [CALL]) is None
    assert missing_calls(text.replace("Rhein", "Main"), [CALL])
    assert missing_calls(text.replace("3", "33"), [CALL])
    assert missing_calls(text.replace("find", "seek"), [CALL])
    assert missing_calls(text, [CALL, CALL])


def test_python_repr_and_lost_arguments_are_named() -> None:
    assert "Python repr" in str(missing_calls(f"find {ARGUMENTS}", [CALL]))
    assert "argument open" in str(
        missing_calls('<call=find><city>Bonn "am" Rhein</city><n>3</n>', [CALL])
    )
    tagged = """<city>Bonn "am" Rhein</city><n>3</n><open>true</open><tags>['b']</tags>"""
    other = f"<call=find>{tagged}<more>{ARGUMENTS['tags']}</more>"  # the value of another argument
    assert "argument tags" in str(missing_calls(other, [CALL]))
    lined = {**CALL, "function": {"name": "find", "arguments": {"city": "Bonn\nRhein"}}}
    assert "argument city of find has a line break within quotes" in str(
        missing_calls("[find(city='Bonn\nRhein')]", [lined])
    )
    broken = json.dumps({"name": "find", "arguments": ARGUMENTS}).replace(
        "\\", ""
    )  # quotes within quotes
    assert "argument city" in str(missing_calls(broken, [CALL]))
    twice = json.dumps({"name": "find", "arguments": ARGUMENTS}) * 2
    assert missing_calls(twice, [CALL]) == "2 calls are written for 1"
    assert missing_calls(twice, [CALL, CALL]) is None


def test_training_mask_is_that_of_trl() -> None:
    from trl.chat_template_utils import (
        get_training_chat_template,
        qwen2_5_chat_template,
        qwen3_chat_template,
    )

    tokenizer = tiny_tokenizer()
    for template, several in ((qwen2_5_chat_template, True), (qwen3_chat_template, False)):
        tokenizer.chat_template = template
        which = Renderer(tokenizer, frozenset([tokenizer.eos_token_id]))
        marked = get_training_chat_template(tokenizer)
        assert marked is not None and "generation" in marked
        turns = TURNS if several else TURNS[:3]
        theirs = tokenizer.apply_chat_template(
            turns, chat_template=marked, return_assistant_tokens_mask=True, return_dict=True
        )
        (ours,) = trained(which, turns)
        assert ours.input_ids == theirs["input_ids"]
        mask = [bool(flag) for flag in theirs["assistant_masks"]]
        assert all(there for here, there in zip(ours.supervised, mask, strict=True) if here)
        # TRL also trains the newline after the end of turn, which is never generated, and with
        # Qwen2.5 the newline of the prompt
        more = [
            place
            for place, (here, there) in enumerate(zip(ours.supervised, mask, strict=True))
            if there and not here
        ]
        assert {tokenizer.decode([ours.input_ids[place]]) for place in more} == {"\n"}
        assert all(ours.supervised[place - 1] or ours.supervised[place + 1] for place in more)


def test_a_template_file_of_a_snapshot_is_read_back(tmp_path: Path) -> None:
    from transformers import AutoTokenizer

    which = renderer(REWRITING)
    which.tokenizer.save_pretrained(tmp_path)
    again = AutoTokenizer.from_pretrained(tmp_path)
    assert trained(Renderer(again, which.stop_ids), TURNS) == trained(which, TURNS)
