"""A model's server behind the guard: `ft serve`.

    python -m ft_assets.ui.model_server <module of the engine> <port> <its arguments>

vLLM's server allows requests of every web page, and both servers answer to every name of this
machine. Any page in a browser here could then talk to the model, or load another one.
"""

import runpy
import sys
from typing import Any

import uvicorn

from ft_assets.ui.guard import App, Guard


def main() -> None:
    """Run the engine's module. Both engines build their server by `uvicorn.Config`."""
    module, port, *arguments = sys.argv[1:]
    config: Any = uvicorn.Config

    def guarded(app: App, *args: Any, **kwargs: Any) -> Any:
        return config(Guard(app, int(port), is_api=lambda path: True), *args, **kwargs)

    uvicorn.Config = guarded  # type: ignore[assignment, misc]
    sys.argv = [module, *arguments]
    runpy.run_module(module, run_name="__main__", alter_sys=True)


if __name__ == "__main__":
    main()
