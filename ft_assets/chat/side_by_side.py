"""The base, the champion and the challenger, asked the same: what a person tries before she trusts."""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

from ft_assets.artifacts import ArtifactStore, open_store, verify_files
from ft_assets.chat.rendering import ProofFailed, Renderer
from ft_assets.config import Project
from ft_assets.data.tables import read_table
from ft_assets.errors import TemplateError
from ft_assets.evaluation.generation import generate
from ft_assets.models.loading import load_base, load_tokenizer, stop_ids
from ft_assets.release.champion import identity, state_of
from ft_assets.release.former import need_model


def contenders(store: ArtifactStore, name: str) -> list[tuple[str, Path]]:
    """Return (who, folder): the base; the released champion if there is one; the newest merged model where it is another.

    Raises ArtifactError if there is no merged model, or a file of one is not as it was published.
    """
    merged, released = store.need("merged_model", name), store.current("release", name)
    found = [("base", store.need("base_model", name).path)]
    champion = state_of(released).champion if released else None
    models = [("merged", merged)] if champion is None else [("champion", need_model(store, name, champion, f"release[{name}]"))]
    if champion is not None and champion["identity"] != identity(merged):
        models.append(("challenger", merged))
    for _, artifact in models:
        verify_files(artifact)
    return [*found, *((who, artifact.path) for who, artifact in models)]


class SideBySide:
    """The loaded models, which keep no history: each message is answered on its own."""

    def __init__(self, project: Project, name: str, system: str | None) -> None:
        store = open_store(project)
        asked = contenders(store, name)
        self.settings = project.recipe(name).evaluation
        self.system = system if system is not None else _usual_system(store.need("heldout_split", name).path)
        self.models = [(who, load_base(path), Renderer(load_tokenizer(path), stop_ids(path))) for who, path in asked]

    def answers(self, message: str) -> Iterator[tuple[str, str]]:
        """Yield (who, answer) for one user message."""
        messages = [{"role": "system", "content": self.system}] if self.system else []
        messages.append({"role": "user", "content": message})
        for who, model, renderer in self.models:
            prompt = renderer.prompts([{"messages": messages}])[0]
            if isinstance(prompt, ProofFailed):
                raise TemplateError("the message", str(prompt), "a message that the template takes", "ask otherwise")
            yield who, generate(model, renderer.tokenizer, [prompt], renderer.stop_ids, self.settings.max_new_tokens)[0].text.strip()


def _usual_system(split: Any) -> str | None:
    first = read_table(split / "heldout.parquet")[0]["messages"][0]
    return first["content"] if first["role"] == "system" else None
