"""The command that serves a released model for a try: an OpenAI-compatible endpoint, bound to this machine.

vLLM where it is installed, else transformers' own server. Not here: a production deployment.
"""

import importlib.util
import sys
from pathlib import Path
from typing import Literal

from ft_assets.errors import ReleaseError

LOOPBACK = "127.0.0.1"
Engine = Literal["vllm", "transformers"]
ENGINES: tuple[Engine, ...] = ("vllm", "transformers")
NEEDED = {"vllm": ("vllm",), "transformers": ("fastapi", "uvicorn", "openai")}


def choose_engine(wanted: str | None) -> Engine:
    """Return the engine asked for, else vLLM if it is installed, else transformers. Raises ReleaseError if it is not there."""
    names: list[Engine] = [name for name in ENGINES if wanted is None or name == wanted]
    if not names:
        raise ReleaseError(
            where=f"--engine {wanted}",
            found="is not known",
            expected=" or ".join(ENGINES),
            fix="leave it out: the one that is installed is taken",
        )
    for name in names:
        if all(importlib.util.find_spec(module) for module in NEEDED[name]):
            return name
    missing = [
        module
        for module in NEEDED["vllm" if wanted == "vllm" else "transformers"]
        if not importlib.util.find_spec(module)
    ]
    install = "pip install vllm" if wanted == "vllm" else 'pip install "ft_assets[serve]"'
    raise ReleaseError(
        where="ft serve",
        found=f"{', '.join(missing)} is not installed",
        expected="a server",
        fix=install,
    )


def serve_command(engine: Engine, model: Path, port: int) -> list[str]:
    """Return the command line. Only this machine reaches it: the endpoint has no login."""
    if engine == "vllm":
        return [
            sys.executable,
            "-m",
            "vllm.entrypoints.cli.main",
            "serve",
            str(model),
            "--host",
            LOOPBACK,
            "--port",
            str(port),
        ]
    transformers = str(Path(sys.executable).parent / "transformers")
    return [transformers, "serve", str(model), "--host", LOOPBACK, "--port", str(port)]
