"""The answers of the base, the champion and the challenger side by side: `ft chat`."""

import hashlib
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

from ft_assets.artifacts import ArtifactStore, open_store
from ft_assets.chat.rendering import ProofFailed, Renderer
from ft_assets.config import Project
from ft_assets.data.tables import read_table
from ft_assets.errors import TemplateError
from ft_assets.hardware import compute_dtype, free_memory, free_unused
from ft_assets.models.loading import load_base, load_tokenizer, stop_ids
from ft_assets.release.lookup import need_model
from ft_assets.release.register import identity, state_of
from ft_assets.release.signing import proven_release
from ft_assets.rows.types import JudgedRow, Message


def contenders(store: ArtifactStore, name: str) -> list[tuple[str, Path]]:
    """Return (name, folder) of the base, the champion, and the newest merged model if it differs.

    Raises ArtifactError without a merged model, or if a file was changed after publication.
    """
    merged, released = store.need("merged_model", name), store.current("release", name)
    found = [("base", store.verified(store.need("base_model", name)).path)]
    champion = state_of(released).champion if released else None
    models = (
        [("merged", merged)]
        if champion is None
        else [("champion", need_model(store, name, champion, f"release[{name}]"))]
    )
    if champion is not None and champion.identity != identity(merged):
        models.append(("challenger", merged))
    for _, artifact in [*models, *([("release", released)] if released else [])]:
        store.verified(artifact)
    return [*found, *((who, artifact.path) for who, artifact in models)]


class SideBySide:
    """The models, without a history: each message is answered on its own.

    If they do not fit into the free memory together, they are loaded one at a time. `announce` is
    called with what is loaded, before it is.
    """

    def __init__(
        self,
        project: Project,
        name: str,
        system: str | None,
        announce: Callable[[str], None] = lambda text: None,
    ) -> None:
        store = open_store(project)
        self.asked = contenders(store, name)
        if any(who == "champion" for who, _ in self.asked):
            proven = proven_release(project, store, name, "ft chat").champion.path
            self.asked = [(who, proven if who == "champion" else path) for who, path in self.asked]
        self.settings = project.recipe(name).evaluation
        self.system = system if system is not None else usual_system(store, name)
        files = sum(_weight_bytes(path) for _, path in self.asked)
        announce(f"loading {', '.join(who for who, _ in self.asked)} of {name} ({_size(files)})")
        needed, free = sum(_bytes_loaded(path) for _, path in self.asked), free_memory()
        self.renderers = _renderers(self.asked)
        self.loaded: dict[str, Any] = {}
        if needed > free:
            announce(
                f"{len(self.asked)} models take {_size(needed)}, {_size(free)} are free: each is "
                "loaded for each answer"
            )
        else:
            self.loaded = {who: load_base(path) for who, path in self.asked}

    def answers(self, message: str, system: str | None = None) -> Iterator[tuple[str, str]]:
        """Yield (who, answer) for one user message, with another system turn if one is given."""
        messages: list[Message] = []
        if system := self.system if system is None else system:
            messages.append({"role": "system", "content": system})
        messages.append({"role": "user", "content": message})
        for who, path in self.asked:
            prompt = self.renderers[who].prompts([{"messages": messages}])[0]
            if isinstance(prompt, ProofFailed):
                raise TemplateError(
                    where="the message",
                    found=str(prompt),
                    expected="a message that the template takes",
                    fix="rephrase the message",
                )
            yield who, self._answer(who, path, prompt)

    def _answer(self, who: str, path: Path, prompt: list[int]) -> str:
        model, renderer = self.loaded.get(who) or load_base(path), self.renderers[who]
        from ft_assets.inference.generation import generate  # torch

        text = generate(
            model, renderer.tokenizer, [prompt], renderer.stop_ids, self.settings.max_new_tokens
        )[0].text.strip()
        if who not in self.loaded:
            del model
            free_unused()
        return text


def _renderers(asked: Iterable[tuple[str, Path]]) -> dict[str, Renderer]:
    """Return the renderer of each model. Models with equal tokenizer files share one."""
    made: dict[str, Renderer] = {}
    found: dict[str, Renderer] = {}
    for who, path in asked:
        files = [*path.glob("tokenizer*"), *path.glob("*.jinja"), path / "generation_config.json"]
        content = hashlib.sha256()
        for file in sorted(files):
            content.update(file.name.encode() + file.read_bytes())
        key = content.hexdigest()
        if key not in made:
            made[key] = Renderer(load_tokenizer(path), stop_ids(path))
        found[who] = made[key]
    return found


def _weight_bytes(folder: Path) -> int:
    return sum(path.stat().st_size for path in folder.glob("*.safetensors"))


def _bytes_loaded(folder: Path) -> float:
    """Return the bytes of a loaded snapshot in the compute dtype, plus a tenth for activations."""
    return _weight_bytes(folder) * compute_dtype().itemsize / 2 * 1.1


def _size(count: float) -> str:
    return f"{count / 1e9:.1f} GB"


def usual_system(store: ArtifactStore, name: str) -> str | None:
    """Return the system turn that the conversations of the data have, by the first held-out row."""
    split = store.verified(store.need("heldout_split", name)).path
    rows = read_table(split / "heldout.parquet", 1, row=JudgedRow)
    first = rows[0]["messages"][0]
    return first["content"] if first["role"] == "system" else None
