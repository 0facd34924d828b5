"""The usual names of the columns that hold the prompt and the answer, in several languages."""

import re
from collections.abc import Mapping
from types import MappingProxyType

from ft_assets.errors import DataError
from ft_assets.rows.types import RawFields

_PROMPTS = """
prompt instruction instructions question questions query input text user human q ask problem
request message user_message user_prompt user_input source customer utterance sentence document
article post title frage pregunta pergunta вопрос 質問 问题 問題 คำถาม سؤال السؤال שאלה
"""
_ANSWERS = """
completion output outputs response responses answer answers target assistant bot gpt model a reply
solution label category intent class summary translation agent chatbot expected expected_output
ground_truth gold assistant_message assistant_response model_response ai result antwort respuesta
resposta réponse ответ 回答 答案 答え คำตอบ جواب الجواب إجابة الإجابة תשובה
"""
PROMPTS, ANSWERS = frozenset(_PROMPTS.split()), frozenset(_ANSWERS.split())


def guessed(raw: RawFields, given: Mapping[str, str] = MappingProxyType({})) -> dict[str, str]:
    """Return data.columns for a row whose columns have usual names of another spelling.

    `given` has the user's own prompt or completion. Returns {} if the names say nothing. Raises
    DataError if several columns can be one part.
    """
    texts = [name for name, value in raw.items() if isinstance(value, str) and value.strip()]
    free = [name for name in texts if name not in given.values()]
    prompts, answers = (
        [given[part]] if part in given else [name for name in free if _plain(name) in names]
        for part, names in (("prompt", PROMPTS), ("completion", ANSWERS))
    )
    if not prompts and not answers:
        return {}
    others = [name for name in texts if name not in prompts and name not in answers]
    if len(others) == 1:  # the other one of two columns
        prompts, answers = prompts or others, answers or others
    own = "".join(f"--{part} {_quoted(name)} " for part, name in given.items())
    for part, names in (("prompt", prompts), ("completion", answers)):
        if len(names) > 1:
            flags = [f"{own}--{part} {_quoted(name)}" for name in names]
            more = ""
            if not answers and len(names) == 2:  # the answer is one of the two
                flags = [
                    f"{own}{one} --completion {_quoted(other)}"
                    for one, other in zip(flags, names[::-1], strict=True)
                ]
                more = "; documents without an answer belong under data.text, beside conversations"
            raise DataError(
                where=f"the columns {', '.join(raw)}",
                found=f"{' and '.join(names)} can each be the {part}",
                expected="one column for each part of a row",
                fix="choose: " + ", or ".join(flags) + more,
            )
    return {"prompt": prompts[0], "completion": answers[0]} if prompts and answers else {}


def _plain(name: str) -> str:
    """Return a name in lower case, with single underscores between its words."""
    return re.sub(r"[\s_.:/-]+", "_", name.strip().casefold()).strip("_")


def _quoted(name: str) -> str:
    return f'"{name}"' if re.search(r"\W", name) else name
