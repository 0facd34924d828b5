"""Templates in the styles of real models: the trained tokens, the refusals, and baked settings."""

from datetime import date
from typing import Any

import pytest

from ft_assets.chat.rendering import ProofFailed, Renderer, fold_system, prints_date
from ft_assets.config import ChatSettings
from ft_assets.errors import TemplateError
from ft_assets.models.chat_template import DATE_KEY, bake, broken_markers, date_of, end_of_turn
from ft_assets.models.snapshot import settle_template
from ft_assets_tests.factories import CHATML, tiny_tokenizer

LLAMA = (
    "{{ bos_token }}{% for m in messages %}"
    "{{ '<|start_header_id|>' + m.role + '<|end_header_id|>\n\n' + m.content | trim + '<|eot_id|>"
    "' }}"
    "{% endfor %}{% if add_generation_prompt %}"
    "{{ '<|start_header_id|>assistant<|end_header_id|>\n\n' }}{% endif %}"
)
MISTRAL = (
    "{{ bos_token }}{% for m in messages %}{% if m.role == 'user' %}"
    "{{ '[INST] ' + m.content + ' [/INST]' }}"
    "{% elif m.role == 'assistant' %}{{ ' ' + m.content + eos_token }}{% else %}"
    "{{ raise_exception('Only user and assistant') }}{% endif %}{% endfor %}"
)
NEMO = (
    "{% if messages[0].role == 'system' %}{% set first = messages[0].content %}"
    "{% set messages = messages[1:] %}{% endif %}"
    "{{ bos_token }}{% for m in messages %}{% if m.role == 'user' %}"
    "{{ '[INST]' + (first + '\n\n' if loop.last and first else '') + m.content + '[/INST]' }}"
    "{% else %}{{ m.content + eos_token }}{% endif %}{% endfor %}"
)
GEMMA = (
    "{{ bos_token }}{% if messages[0].role == 'system' %}"
    "{{ raise_exception('System role not supported') }}{% endif %}{% for m in messages %}"
    "{{ '<start_of_turn>' + ('model' if m.role == 'assistant' else m.role) + '\n' + m.content | "
    "trim + '<end_of_turn>\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<start_of_turn>model\n' }}{% endif %}"
)
QWEN3 = (
    "{% for m in messages %}{{ '<|im_start|>' + m.role + '\n' }}"
    "{% if m.role == 'assistant' and loop.last %}{{ '<think>\n\n</think>\n\n' }}"
    "{% endif %}{{ m.content + '<|im_end|>\n' }}{% endfor %}{% if add_generation_prompt %}"
    "{{ '<|im_start|>assistant\n' }}"
    "{% if enable_thinking is defined and not enable_thinking %}{{ '<think>\n\n</think>\n\n' }}"
    "{% endif %}{% endif %}"
)
DATED = "{{ '<|im_start|>system\nToday is ' + strftime_now('%d %B %Y') + '<|im_end|>\n' }}" + CHATML
TOOLS = (
    "{% if tools %}{{ '<|im_start|>system\n' }}{% for t in tools %}{{ t | tojson }}{% endfor %}"
    "{{ '<|im_end|>\n' }}{% endif %}"
    "{% for m in messages %}{{ '<|im_start|>' + m.role + '\n' + m.content }}"
    "{% for c in m.tool_calls or [] %}"
    '{{ \'<tool_call>{"name": "\' + c.function.name + \'", "arguments": \' + ARGUMENTS + '
    "'}</tool_call>' }}{% endfor %}{{ '<|im_end|>\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
AS_OBJECT, AS_TEXT = (
    TOOLS.replace("ARGUMENTS", "(c.function.arguments | tojson)"),
    TOOLS.replace("ARGUMENTS", "c.function.arguments"),
)
AS_REPR = TOOLS.replace(
    "ARGUMENTS",
    "(c.function.arguments if c.function.arguments is string else c.function.arguments | string)",
)

CHAT = [
    {"role": "user", "content": "red apple"},
    {"role": "assistant", "content": "yes"},
    {"role": "user", "content": "green river"},
    {"role": "assistant", "content": "no no"},
]
SYSTEM = {"role": "system", "content": "what is the colour"}
TOOL = {
    "type": "function",
    "function": {
        "name": "colour_of",
        "description": "the colour of a thing",
        "parameters": {
            "type": "object",
            "properties": {"thing": {"type": "string"}, "deep": {"type": "boolean"}},
        },
    },
}
CALL = {
    "type": "function",
    "function": {"name": "colour_of", "arguments": {"thing": 'the "red" apple', "deep": True}},
}
CALLED: list[dict[str, Any]] = [
    {"role": "user", "content": "what colour"},
    {"role": "assistant", "content": "", "tool_calls": [CALL]},
    {"role": "tool", "content": "green", "name": "colour_of"},
    {"role": "assistant", "content": "yes"},
]


def tokenizer_of(template: str, end: str = "<|im_end|>", bos: str | None = "<s>") -> Any:
    tokenizer = tiny_tokenizer()
    markers = [
        "<|start_header_id|>",
        "<|end_header_id|>",
        "<|eot_id|>",
        "[INST]",
        "[/INST]",
        "<start_of_turn>",
        "<end_of_turn>",
        "<s>",
        "</s>",
    ]
    tokenizer.add_tokens(markers, special_tokens=True)
    tokenizer.eos_token, tokenizer.chat_template = end, template
    if bos:
        tokenizer.bos_token = bos
    return tokenizer


def renderer(template: str, end: str = "<|im_end|>", bos: str | None = "<s>") -> Renderer:
    tokenizer = tokenizer_of(template, end, bos)
    return Renderer(tokenizer, frozenset([tokenizer.eos_token_id]))


def learnt(which: Renderer, messages: list[dict[str, Any]], **row: Any) -> list[str]:
    """Return the supervised text of each sequence. Raises what the proof raises."""
    done = which.train([{"messages": messages, **row}])[0]
    if isinstance(done, ProofFailed):
        raise done
    return [
        which.facts.decode(
            [token for token, flag in zip(one.input_ids, one.supervised, strict=True) if flag]
        )
        for one in done
    ]


@pytest.mark.parametrize(
    ("template", "end", "system", "sequences"),
    [
        (CHATML, "<|im_end|>", True, ["yes<|im_end|>no no<|im_end|>"]),
        (LLAMA, "<|eot_id|>", True, ["yes<|eot_id|>no no<|eot_id|>"]),
        (MISTRAL, "</s>", False, [" yes</s> no no</s>"]),
        (NEMO, "</s>", False, ["yes</s>no no</s>"]),
        (GEMMA, "<end_of_turn>", False, ["yes<end_of_turn>no no<end_of_turn>"]),
        (
            QWEN3,
            "<|im_end|>",
            True,
            ["<think>\n\n</think>\n\nyes<|im_end|>", "<think>\n\n</think>\n\nno no<|im_end|>"],
        ),
        (DATED, "<|im_end|>", True, ["yes<|im_end|>no no<|im_end|>"]),
    ],
)
def test_answers_and_their_ends_are_learnt_in_each_style(
    template: str, end: str, system: bool, sequences: list[str]
) -> None:
    which = renderer(template, end)
    assert "".join(learnt(which, CHAT)) == "".join(sequences)
    if system:
        assert "".join(learnt(which, [SYSTEM, *CHAT])) == "".join(sequences)
    assert end_of_turn(which.tokenizer) == which.tokenizer.eos_token_id
    assert end_of_turn(which.tokenizer, which.stop_ids) is None  # it is known already


@pytest.mark.parametrize(
    ("template", "end", "reason"),
    [
        (GEMMA, "<end_of_turn>", "System role not supported"),
        (
            NEMO,
            "</s>",
            r"messages\[0\] \(system\): the template writes this turn at generation and drops it "
            r"once messages\[2\]",
        ),
        (
            NEMO.replace("(first + '\n\n' if loop.last and first else '') + ", ""),
            "</s>",
            r"messages\[0\] \(system\): the template drops this turn",
        ),
    ],
)
def test_refused_and_dropped_system_turns_name_the_setting_that_helps(
    template: str, end: str, reason: str
) -> None:
    with pytest.raises(ProofFailed, match=reason + ".*system_turn: user"):
        learnt(renderer(template, end), [SYSTEM, *CHAT])
    folding = renderer(bake(template, {}, "user"), end)
    assert "".join(learnt(folding, [SYSTEM, *CHAT])) == f"yes{end}no no{end}"
    for messages in ([SYSTEM, *CHAT], CHAT, [SYSTEM, *CHAT[1:]]):
        assert folding.text(messages) == renderer(template, end).text(fold_system(messages))


def test_greeting_of_the_assistant_is_context_where_the_template_allows_it() -> None:
    opened: list[Any] = [{"role": "assistant", "content": "Good day", "train": False}, *CHAT]
    assert learnt(renderer(DATED), opened) == learnt(renderer(DATED), CHAT)
    strict = GEMMA.replace(
        "{% for m in messages %}",
        "{% for m in messages %}{% if (m.role == 'user') != (loop.index0 % 2 == 0) %}"
        "{{ raise_exception('roles must alternate') }}{% endif %}",
    )
    with pytest.raises(ProofFailed, match=r"alternate: .*remove its first turn from the row"):
        learnt(renderer(strict, "<end_of_turn>"), opened)


def test_template_kwargs_are_baked_in_and_leave_the_rest_as_it_was() -> None:
    baked = renderer(bake(QWEN3, {"enable_thinking": False}, "template"))
    assert (
        baked.text(CHAT[:1], generation_prompt=True)
        == renderer(QWEN3).text(CHAT[:1], generation_prompt=True) + "<think>\n\n</think>\n\n"
    )
    assert learnt(baked, CHAT) == ["yes<|im_end|>", "no no<|im_end|>"]
    values = {"a": True, "b": None, "c": 'x "y" \\ é\n', "d": [1, 2.5, {"k": False}]}
    shown = bake("\n  {{ [a, b, c, d] | tojson }}", values, "template")
    assert (
        renderer(shown).text(CHAT)
        == '\n  [true, null, "x \\"y\\" \\\\ é\\n", [1, 2.5, {"k": false}]]'
    )


def test_date_is_frozen_and_the_saved_template_still_prints_today() -> None:
    which = renderer(DATED)
    assert prints_date(which.tokenizer) and not prints_date(tiny_tokenizer())
    assert "Today is 01 January 2025<|im_end|>" in which.text(CHAT)
    assert "Today is 29 February 2024<|im_end|>" in Renderer(
        which.tokenizer, which.stop_ids, date(2024, 2, 29)
    ).text(CHAT)
    which.tokenizer.init_kwargs[DATE_KEY] = "2023-12-31"
    assert date_of(which.tokenizer) == date(2023, 12, 31)
    assert "Today is 31 December 2023<|im_end|>" in Renderer(which.tokenizer, which.stop_ids).text(
        CHAT
    )
    assert f"Today is {date.today():%d %B %Y}" in which.tokenizer.apply_chat_template(
        CHAT, tokenize=False
    )


@pytest.mark.parametrize("template", [AS_OBJECT, AS_TEXT, AS_REPR])
def test_calls_are_given_in_the_form_that_the_template_writes_as_json(template: str) -> None:
    which = renderer(template, bos=None)
    (text,) = learnt(which, CALLED, tools=[TOOL])
    assert text.startswith(
        '<tool_call>{"name": "colour_of", "arguments": {"thing": "the \\"red\\" apple", "deep": '
        "true}}</tool_call><|im_end|>"
    )
    assert text.endswith("</tool_call><|im_end|>yes<|im_end|>")


def test_ids_are_made_for_templates_that_insist_on_them() -> None:
    strict = AS_OBJECT.replace(
        "{{ '<tool_call>",
        "{% if c.id | length != 9 %}{{ raise_exception('ids of length 9') }}{% endif %}"
        "{{ '<tool_call>",
    )
    which = renderer(
        strict.replace("m.role + '\n'", "m.role + (m.tool_call_id or '') + '\n'"), bos=None
    )
    learnt(which, CALLED, tools=[TOOL])
    assert "<|im_start|>toolcall00100\ngreen" in which.text(CALLED, [TOOL])


@pytest.mark.parametrize(
    ("template", "reason"),
    [
        (CHATML, "tool call colour_of is missing"),
        (
            TOOLS.replace("ARGUMENTS", "'{}'"),
            "argument thing of colour_of .* is missing or changed",
        ),
        (
            TOOLS.replace("ARGUMENTS", "(c.function.arguments | string | replace('\\\\', ''))"),
            "Python repr",
        ),
        (
            AS_REPR.replace("(c.function.arguments if", "(raise_exception('no text') if"),
            "Python repr",
        ),
        (AS_OBJECT.replace("{{ t | tojson }}", "some"), "the template drops the tools"),
        (
            AS_OBJECT.replace("for m in messages", "for m in messages if m.role != 'tool'"),
            r"messages\[2\] \(tool\): the template drops this turn",
        ),
        (
            AS_OBJECT.replace(
                "in m.tool_calls or []", "in (m.tool_calls or []) + (m.tool_calls or [])"
            ),
            "2 calls are written for 1",
        ),
        (
            AS_OBJECT.replace("in m.tool_calls or []", "in (m.tool_calls or [])[1:]"),
            "tool call colour_of is missing",
        ),
        (
            AS_OBJECT.replace(
                "{% for c in m.tool_calls or [] %}", "<|im_end|>{% for c in m.tool_calls or [] %}"
            ),
            "writes the tool call behind",
        ),
        (
            AS_OBJECT.replace(
                "m.content }}{% for", "(m.content if not m.tool_calls else '') }}{% for"
            ),
            "drops the text beside the tool call",
        ),
    ],
)
def test_templates_that_lose_calls_results_or_tools_are_refused(template: str, reason: str) -> None:
    said = (
        [CALLED[0], {**CALLED[1], "content": "red"}, *CALLED[2:]] if "beside" in reason else CALLED
    )
    with pytest.raises(ProofFailed, match=reason):
        learnt(renderer(template, bos=None), said, tools=[TOOL])


def test_thinking_of_earlier_turns_may_go_and_that_of_the_answer_is_learnt() -> None:
    template = QWEN3.replace(
        "{% if m.role == 'assistant' and loop.last %}{{ '<think>\n\n</think>\n\n' }}{% endif %}"
        "{{ m.content",
        "{{ (m.content if loop.last else m.content.split('</think>')[-1].lstrip())",
    )
    thought = [
        CHAT[0],
        {"role": "assistant", "content": "<think>\nred is\n</think>\n\nyes"},
        *CHAT[2:],
    ]
    assert learnt(renderer(template), thought) == [
        "<think>\nred is\n</think>\n\nyes<|im_end|>",
        "no no<|im_end|>",
    ]


# What a snapshot gets.


def test_settled_template_has_the_settings_baked_in_and_does_not_count_as_replaced() -> None:
    tokenizer = tokenizer_of(QWEN3)
    chat = ChatSettings(
        template_kwargs={"enable_thinking": False}, system_turn="user", date=date(2024, 5, 6)
    )
    assert settle_template("m", tokenizer, None, chat) is None
    assert tokenizer.chat_template == bake(QWEN3, {"enable_thinking": False}, "user")
    assert date_of(tokenizer) == date(2024, 5, 6)
    assert settle_template(
        "m", tokenizer_of(QWEN3), CHATML, ChatSettings(system_turn="user")
    ) == bake(QWEN3, {}, "user")


def test_one_of_several_templates_is_chosen_by_name() -> None:
    tokenizer = tiny_tokenizer()
    tokenizer.chat_template = {"default": CHATML, "tool_use": AS_OBJECT}
    with pytest.raises(
        TemplateError, match=r"2 chat templates \(default, tool_use\)[^$]*template_name"
    ):
        settle_template("m", tokenizer, None, ChatSettings())
    with pytest.raises(TemplateError, match="none named rag"):
        settle_template("m", tokenizer, None, ChatSettings(template_name="rag"))
    assert settle_template("m", tokenizer, None, ChatSettings(template_name="tool_use")) is None
    assert tokenizer.chat_template == AS_OBJECT
    with pytest.raises(TemplateError, match="nothing to choose from"):
        settle_template("m", tiny_tokenizer(), None, ChatSettings(template_name="default"))


def test_template_for_a_base_without_one_needs_markers_of_its_vocabulary() -> None:
    bare = tiny_tokenizer()
    bare.chat_template = None
    with pytest.raises(TemplateError, match="no chat template"):
        settle_template("m", bare, None, ChatSettings())
    with pytest.raises(
        TemplateError,
        match=r"its marker <\|end_header_id\|> is \d+ tokens(.|\n)*LoRA does not train(.|\n)*"
        r"<\|im_start\|>",
    ):
        settle_template("m", bare, LLAMA, ChatSettings())
    assert set(broken_markers(LLAMA, bare)) == {
        "<|start_header_id|>",
        "<|end_header_id|>",
        "<|eot_id|>",
    }
    bare.chat_template = None
    assert settle_template("m", bare, CHATML, ChatSettings()) is None
    assert bare.chat_template == CHATML


def test_variable_that_the_template_does_not_read_is_refused() -> None:
    with pytest.raises(
        TemplateError,
        match=r"template_kwargs\.enable_thinking: the template does not read this variable",
    ):
        settle_template(
            "m", tiny_tokenizer(), None, ChatSettings(template_kwargs={"enable_thinking": False})
        )
    with pytest.raises(ValueError, match="'messages' is not a variable"):
        ChatSettings(template_kwargs={"messages": []})


def test_end_of_turn_is_not_a_marker_that_also_opens_the_answer() -> None:
    tokenizer = tokenizer_of(
        "{% for m in messages %}{{ '[INST]' + m.role + '[/INST]' + m.content + '[/INST]</s>' }}"
        "{% endfor %}"
    )
    assert tokenizer.decode([end_of_turn(tokenizer)]) == "</s>"
    tokenizer.chat_template = (
        "{% for m in messages %}{{ m.role + ': ' + m.content + '\n\n' }}{% endfor %}"
    )
    assert end_of_turn(tokenizer) is None


ASKED = (
    "{% for m in messages %}{{ '<|im_start|>' + m.role + '\n' + m.content + '<|im_end|>\n' }}"
    "{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' + GIVEN }}{% endif %}"
)
ENDED_BY_NEXT = (
    "{% for m in messages %}{% if m.role == 'user' %}{{ '<|im_end|>' }}{% endif %}"
    "{{ '<|im_start|>' + m.role + '\n' + m.content }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)


@pytest.mark.parametrize("given", ["<think>\n\n</think>\n\n", "[THINK][/THINK]"])
def test_empty_thinking_of_the_prompt_is_context_as_at_generation(given: str) -> None:
    tokenizer = tiny_tokenizer()
    tokenizer.chat_template = ASKED.replace("GIVEN", repr(given))
    renderer = Renderer(tokenizer, frozenset([tokenizer.eos_token_id]))
    turns: Any = [
        {"role": "user", "content": "red"},
        {"role": "assistant", "content": "green"},
        {"role": "user", "content": "blue"},
        {"role": "assistant", "content": "lamp"},
    ]
    done = renderer.train([{"messages": turns}])[0]
    assert not isinstance(done, ProofFailed), done
    assert len(done) == 2  # no sequence has the thinking of an earlier turn
    for sequence, count in zip(done, (1, 3), strict=True):
        asked = renderer.prompts([{"messages": turns[:count]}])[0]
        prompt, answer = sequence.prompt_and_answer()
        assert prompt == asked
        assert tokenizer.decode(prompt).rstrip().endswith(given.strip())
        assert tokenizer.decode(answer[:-1]).strip() == turns[count]["content"]


@pytest.mark.parametrize("given", ["<think>\n", "Here are my steps:\n"])
def test_answer_that_would_be_trained_as_thinking_is_refused(given: str) -> None:
    tokenizer = tiny_tokenizer()
    tokenizer.chat_template = ASKED.replace("GIVEN", repr(given))
    turns: Any = [{"role": "user", "content": "red"}, {"role": "assistant", "content": "green"}]
    done = Renderer(tokenizer, frozenset([tokenizer.eos_token_id])).train([{"messages": turns}])[0]
    assert isinstance(done, ProofFailed)
    assert "differs from that given at generation" in str(done)


def test_answer_that_the_next_turn_ends_is_learnt_with_that_end() -> None:
    tokenizer = tiny_tokenizer()
    tokenizer.chat_template = ENDED_BY_NEXT
    stop = tokenizer.eos_token_id
    turns: Any = [{"role": "user", "content": "red"}, {"role": "assistant", "content": "green"}]
    done = Renderer(tokenizer, frozenset([stop])).train([{"messages": turns}])[0]
    assert not isinstance(done, ProofFailed), done
    assert done[0].prompt_and_answer()[1][-1] == stop


HEADED = "{% for m in messages %}{{ '<|im_start|>' + m.role + '\n' }}"
ASKS = "{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
ENDED = "{{ m.content + '<|im_end|>\n' }}" + ASKS
THINKS = {
    "in the content": (CHATML + "{# </think> #}", "<think>red</think>green<|im_end|>"),
    "by a key": (
        HEADED
        + "{% if m.reasoning_content %}{{ '[INST]' + m.reasoning_content + '[/INST]' }}{% endif %}"
        + ENDED,
        "[INST]red[/INST]green<|im_end|>",
    ),
    "begun by the prompt": (
        HEADED + ENDED.replace("assistant\n' }}", "assistant\n<think>\n' }}") + "{# </think> #}",
        "red</think>green<|im_end|>",
    ),
    "gone once a turn follows": (
        HEADED
        + "{% if loop.last and m.thought %}{{ '[INST]' + m.thought + '[/INST]' }}{% endif %}"
        + ENDED,
        "[INST]red[/INST]green<|im_end|>",
    ),
    "with a marker behind the answer": (
        HEADED
        + "{{ '[INST]' + (m.reasoning_content or '') + '[/INST]' + m.content + '</s><|im_end|>' }}"
        + ASKS.replace("assistant\n' }}", "assistant\n[INST]' }}"),
        "red[/INST]green</s><|im_end|>",
    ),
}
THOUGHT = {"role": "assistant", "content": "<think>\nred\n</think>\n\ngreen", "reasoned": True}


@pytest.mark.parametrize("way", THINKS)
def test_reasoning_is_learnt_behind_what_the_model_is_given(way: str) -> None:
    template, expected = THINKS[way]
    which = renderer(template, bos=None)
    rows = [{"messages": [CHAT[0], THOUGHT]}, {"messages": [CHAT[0], THOUGHT, CHAT[2], THOUGHT]}]
    for row in rows:
        for answer in "".join(learnt(which, row["messages"])).split("<|im_end|>")[:-1]:
            assert "".join(answer.split()) + "<|im_end|>" == expected
        prompt, _ = which.answers([row])[0]
        asked = which.prompts([{"messages": row["messages"][:-1]}])[0]
        assert prompt == asked


@pytest.mark.parametrize(
    ("template", "reason"),
    [
        (CHATML, "writes none before such an answer: remove the reasoning"),
        (
            ASKED.replace("GIVEN", "('<think>' if enable_thinking else '<think></think>')")
            + "{# </think> #}",
            "set chat.template_kwargs: {enable_thinking: true}",
        ),
        (
            HEADED + "{{ m.content.split('</think>')[-1] + '<|im_end|>\n' }}" + ASKS,
            "drops the reasoning of the answer: remove it",
        ),
        (
            THINKS["by a key"][0].replace("'[/INST]'", "'[/INST]<|im_end|>'"),
            "writes the answer behind its reasoning and '<|im_end|>', at which generation stops",
        ),
    ],
)
def test_reasoning_that_a_template_cannot_write_is_refused_with_what_helps(
    template: str, reason: str
) -> None:
    which = renderer(template, bos=None)
    for problem in (
        which.train([{"messages": [CHAT[0], THOUGHT]}])[0],
        which.answers([{"messages": [CHAT[0], THOUGHT]}])[0],
    ):
        assert isinstance(problem, ProofFailed)
        assert reason in str(problem)


def test_switch_that_closes_thinking_is_named_for_an_answer_without() -> None:
    given = "('' if enable_thinking is defined and not enable_thinking else '<think>')"
    problem = renderer(ASKED.replace("GIVEN", given), bos=None).train([{"messages": CHAT[:2]}])[0]
    assert "set chat.template_kwargs: {enable_thinking: false}" in str(problem)


def test_bos_that_a_template_writes_only_with_tools_is_expected_with_tools() -> None:
    which = renderer("{% for t in tools %}{{ bos_token }}{% endfor %}" + AS_OBJECT)
    assert len(learnt(which, CALLED, tools=[TOOL])) == 1
    refusing = renderer("{% if not tools %}{{ 1 / 0 }}{% endif %}{{ bos_token }}" + AS_OBJECT)
    assert len(learnt(refusing, CALLED, tools=[TOOL])) == 1
    twice = renderer("{% if tools %}{{ bos_token + bos_token }}{% endif %}" + AS_OBJECT)
    with pytest.raises(ProofFailed, match="BOS"):
        learnt(twice, CALLED, tools=[TOOL])


@pytest.mark.parametrize(
    "template",
    [
        # Command R7B asks for the next answer behind each answer, and closes its thinking first.
        CHATML.partition("{% if add")[0] + "{{ '<|im_start|>assistant\n[INST][/INST]' }}",
        # Apertus writes results into the assistant's turn, and asks for another one.
        AS_OBJECT.replace(
            "{{ '<|im_start|>' + m.role + '\n' + m.content }}",
            "{% set inside = m.role == 'tool' or (loop.previtem or m).role == 'tool' %}"
            "{{ ('' if inside else '<|im_start|>' + m.role + '\n') + m.content }}",
        ),
    ],
)
def test_answer_stands_behind_what_the_model_is_given(template: str) -> None:
    which = renderer(template, bos=None)
    row: Any = {"messages": CALLED, "tools": [TOOL]} if "tool_call" in template else None
    row = row or {"messages": CHAT}
    done = which.train([row])[0]
    assert not isinstance(done, ProofFailed), done
    asked = which.prompts([{**row, "messages": row["messages"][:-1]}])[0]
    assert done[-1].input_ids[: len(asked)] == asked
    assert which.facts.decode(asked).rstrip().endswith(("assistant", "[INST][/INST]"))
