"""The process that answers for the page Chat: questions and answers are lines of JSON.

    python -m ft_assets.views.answering <base model> <seconds without a question until it ends>

A line of stdin is a question, {"message", "system"}. Lines of stdout are {"note"}, then {"who",
"text"} for each model, then {"done"} or {"error"}. It ends with its stdin, too.
"""

import json
import os
import select
import sys
from typing import Any

from ft_assets.config import load_project
from ft_assets.screen import one_screen, screen_of
from ft_assets.views.side_by_side import SideBySide


def main() -> None:
    """Answer until stdin ends or nobody asks."""
    name, idle = sys.argv[1], float(sys.argv[2])
    answers = os.fdopen(os.dup(1), "w", encoding="utf-8")
    os.dup2(2, 1)  # what libraries print is no answer
    questions = os.fdopen(os.dup(0), "rb", buffering=0)

    def tell(**told: str) -> None:
        print(json.dumps(told), file=answers, flush=True)

    models: SideBySide | None = None
    while select.select([questions], [], [], idle)[0]:
        line = questions.readline()
        if not line:
            return
        asked: dict[str, Any] = json.loads(line)
        try:
            if models is None:
                project = load_project()
                models = SideBySide(project, name, None, lambda text: tell(note=text))
            tell(note="answering")
            for who, text in models.answers(asked["message"], asked["system"]):
                tell(who=who, text=text)
            tell(done="")
        except Exception as error:  # a page shows it; the next question may be answered
            tell(error=screen_of(error, "chat")[0])


if __name__ == "__main__":
    with one_screen("chat"):
        main()
