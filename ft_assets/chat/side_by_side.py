"""The base and the merged model, asked the same: what a person tries before she trusts."""

from collections.abc import Iterator
from typing import Any

from ft_assets.artifacts import ArtifactStore
from ft_assets.chat.rendering import ProofFailed, Renderer
from ft_assets.config import Project
from ft_assets.data.tables import read_table
from ft_assets.errors import TemplateError
from ft_assets.evaluation.generation import generate
from ft_assets.models.loading import load_base, load_tokenizer, stop_ids


class SideBySide:
    """Two loaded models that keep no history: each message is answered on its own."""

    def __init__(self, project: Project, name: str, system: str | None) -> None:
        store = ArtifactStore(project.store_path)
        merged, split = store.need("merged_model", name), store.need("heldout_split", name)
        self.settings = project.recipe(name).evaluation
        self.system = system if system is not None else _usual_system(split.path)
        self.models: list[tuple[str, Any, Renderer]] = []
        for who, path in (("base", store.need("base_model", name).path), ("merged", merged.path)):
            self.models.append((who, load_base(path), Renderer(load_tokenizer(path), stop_ids(path))))

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
