"""The files behind a user's module: what it imports from its own folder, by reading the imports.

The modules are parsed, not imported: a plan reads this each minute, in a process that lives on.
"""

import ast
import importlib.metadata
import importlib.util
import sys
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

from ft_assets.artifacts import file_sha256


@dataclass
class UserModules:
    """The modules that `module` reaches, followed recursively.

    files: {path below the folder: hash} of modules, and of files that they name as a literal.
    packages: {distribution: version} of what they import from outside the folder.
    """

    root: Path
    files: dict[str, str] = field(default_factory=dict)
    packages: dict[str, str] = field(default_factory=dict)

    @classmethod
    def of(cls, module: str, root: Path) -> "UserModules | None":
        """Follow a module of the folder, else take an installed one. None if there is neither.

        An installed one is its file and the version of its package. Raises SyntaxError if a module
        cannot be parsed.
        """
        found = cls(root.resolve())
        if found._locate(module) is not None:
            found.packages = _versions(found._follow(module))
            return found
        try:
            spec = importlib.util.find_spec(module)
        except (ImportError, ValueError):
            return None
        if spec is None or spec.origin is None:
            return None
        origin = Path(spec.origin)
        files = {origin.name: file_sha256(origin)} if origin.is_file() else {}
        return cls(root, files, _versions({module.partition(".")[0]}))

    def _locate(self, module: str) -> Path | None:
        """Return the file of a module of the folder. A package is its __init__.py."""
        path = self.root / module.replace(".", "/")
        places = (path / "__init__.py", path.with_suffix(".py"))
        return next((place for place in places if place.is_file()), None)

    def _follow(self, module: str) -> set[str]:
        """Note the files of a module and of all that it reaches; return the names outside."""
        outside, queue, followed = set[str](), [module], set[str]()
        while queue:
            name = queue.pop()
            if name in followed:
                continue
            followed.add(name)
            top, path = name.partition(".")[0], self._locate(name)
            if path is None:  # a name inside a module, or a module of elsewhere
                local = self._locate(top) or (self.root / top).is_dir()
                outside |= set() if local else {top}
                continue
            self._note(path)
            tree = ast.parse(path.read_bytes(), str(path))
            package = name if path.name == "__init__.py" else name.rpartition(".")[0]
            for imported in [name, *_imports(tree, package)]:
                # Importing a.b imports a first.
                parts = imported.split(".")
                queue += [".".join(parts[:end]) for end in range(1, len(parts) + 1)]
            self._note_data(tree, path)
        return outside

    def _note(self, path: Path) -> None:
        self.files[path.relative_to(self.root).as_posix()] = file_sha256(path)

    def _note_data(self, tree: ast.AST, path: Path) -> None:
        """Note the files of the folder that a module names as a literal, e.g. a word list."""
        for node in ast.walk(tree):
            text = node.value if isinstance(node, ast.Constant) else None
            if not isinstance(text, str) or not 0 < len(text) < 200 or "\0" in text:
                continue
            for place in (self.root / text, path.parent / text):
                if place.is_file() and place.resolve().is_relative_to(self.root.resolve()):
                    self._note(place.resolve())


def _imports(tree: ast.AST, package: str) -> Iterator[str]:
    """Yield the absolute names that a module of `package` may import, and their parts."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            above = package.split(".")[: len(package.split(".")) - node.level + 1]
            base = ".".join([*(above if node.level else []), *filter(None, [node.module])])
            if base:
                yield base
            yield from (f"{base}.{alias.name}".strip(".") for alias in node.names)
        elif isinstance(node, ast.Call) and node.args and _is_import(node.func):
            argument = node.args[0]
            if isinstance(argument, ast.Constant) and isinstance(argument.value, str):
                yield argument.value.lstrip(".")


def _is_import(function: ast.expr) -> bool:
    """Return True for import_module, importlib.import_module and __import__."""
    name = function.attr if isinstance(function, ast.Attribute) else getattr(function, "id", "")
    return name in ("import_module", "__import__")


def _versions(names: set[str]) -> dict[str, str]:
    """Return the versions of the installed distributions that provide these modules."""
    foreign = {name for name in names if name not in sys.stdlib_module_names}
    if not foreign:
        return {}
    providers = importlib.metadata.packages_distributions()
    found = {one for name in foreign for one in providers.get(name, [])}
    return {name: importlib.metadata.version(name) for name in sorted(found)}
