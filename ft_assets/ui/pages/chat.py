"""The page of the chat: base, champion and challenger answer a question side by side."""

from dataclasses import dataclass

from pydantic import BaseModel, ConfigDict, Field
from starlette.requests import Request
from starlette.responses import JSONResponse, Response
from starlette.routing import Route

from ft_assets.errors import ArtifactError
from ft_assets.ui.pages.page import Page, change, opened, render
from ft_assets.views.model_process import IDLE_SECONDS, ModelProcess, models_key
from ft_assets.views.runs_now import gpu_is_busy, run_in_progress
from ft_assets.views.side_by_side import usual_system

LONGEST = 100_000  # characters of a question
MODELS = ModelProcess(busy=gpu_is_busy)


@dataclass(frozen=True)
class ChatView:
    """The form of a question. why_not: why nothing can be asked. warning: what slows answers."""

    base_model: str
    base_models: list[str]
    system: str
    idle_minutes: int
    running: bool
    why_not: str | None = None
    warning: str | None = None


class Question(BaseModel):
    """A question to all models of a base model; each is answered on its own."""

    model_config = ConfigDict(extra="forbid")

    base_model: str
    message: str = Field(min_length=1, max_length=LONGEST)
    system: str = Field(default="", max_length=LONGEST)


class Stop(BaseModel):
    """End the models' process."""

    model_config = ConfigDict(extra="forbid")


class Answer(BaseModel):
    """What one model answers."""

    who: str
    text: str


class State(BaseModel):
    """A question with its answers so far."""

    number: int
    note: str
    error: str | None
    done: bool
    answers: list[Answer]


def show(request: Request) -> Response:
    """Show the form of a question."""
    project = opened(request)
    names = list(project.project.base_models)
    name = request.query_params.get("base_model") or names[0]
    project.project.base_model(name)  # raises ConfigError
    system, why_not = "", None
    try:
        models_key(project.store, name)
        system = usual_system(project.store, name) or ""
    except ArtifactError as error:
        why_not = str(error)
    minutes = round(IDLE_SECONDS / 60)
    busy = run_in_progress()
    view = ChatView(name, names, system, minutes, MODELS.running, why_not, busy)
    return render(request, "chat.html.j2", view=view)


def ask(request: Request, given: Question) -> State:
    """Send a question to the models."""
    project = opened(request)
    project.project.base_model(given.base_model)  # raises ConfigError
    key = models_key(project.store, given.base_model)
    log = project.project.root / ".ft" / "logs" / "chat.log"
    MODELS.ask(key, given.message, given.system, log)
    return _state()


def stop(request: Request, given: Stop) -> State:
    """End the models' process and a question that is being answered."""
    MODELS.stop()
    return _state()


def answers(request: Request) -> Response:
    """Return the last question's answers so far, as JSON."""
    return JSONResponse(_state().model_dump(), headers={"cache-control": "no-store"})


def _state() -> State:
    asked = MODELS.state()
    told = [Answer(who=who, text=text) for who, text in asked.answers]
    return State(
        number=asked.number, note=asked.note, error=asked.error, done=asked.done, answers=told
    )


PAGE = Page(
    title="Chat",
    path="/chat",
    order=40,
    routes=[
        Route("/chat", show, name="chat"),
        Route("/chat/answers", answers),
        Route("/chat/ask", change(Question, ask), methods=["POST"]),
        Route("/chat/stop", change(Stop, stop), methods=["POST"]),
    ],
)
