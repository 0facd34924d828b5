"""The versions of the libraries that decide a result: a part of an artifact's fingerprint."""

import importlib.metadata
import importlib.util

LIBRARIES = {
    "text": ("transformers", "tokenizers"),
    "train": ("torch", "transformers", "peft", "trl", "bitsandbytes", "accelerate"),
    "infer": ("torch", "transformers", "peft"),
    "score": ("numpy", "scipy"),
}


def library_versions(kind: str | None) -> dict[str, str]:
    """Return the versions of the installed libraries that decide a result of this kind."""
    installed = {name for name in LIBRARIES.get(kind or "", ()) if importlib.util.find_spec(name)}
    return {name: importlib.metadata.version(name) for name in sorted(installed)}
