"""Check for a config's user modules, made before a job is submitted."""

from __future__ import annotations

import ast
import sys
from collections.abc import Iterator, Sequence
from importlib.machinery import PathFinder
from pathlib import Path

from gigabatch.data.errors import GigabatchError
from gigabatch.trainer.config import Config

_INSTALLED = ("site-packages", "dist-packages")


def check_user_code(config: Config, sent: Sequence[Path]) -> None:
    """Check that the cluster will find every `package.mod:name` of a config; imports nothing.

    Args:
        config: Config of the run.
        sent: Files and folders of user modules that are sent with the job.

    Raises:
        GigabatchError: if a module is neither sent nor installed, or does not define the name; the
            message names the key and the fix.
    """
    for path in sent:
        _check_path(path)
    names = [path.stem for path in sent]
    if repeated := sorted({name for name in names if names.count(name) > 1}):
        raise GigabatchError(f"--with: two paths have the same name {repeated[0]}. Rename one.")
    for key, reference in named_code(config):
        module, _, name = reference.partition(":")
        try:
            file = _find(module, sent)
        except GigabatchError as error:
            raise GigabatchError(f"{key}: {reference!r}: {error}") from None
        if file.suffix == ".py" and not _defines(file, name):
            raise GigabatchError(f"{key}: {reference!r}: {file} does not define {name}.")


def named_code(config: Config) -> Iterator[tuple[str, str]]:
    """Yield (key, `package.mod:name`) for all user code that a config names."""
    for key, tower in config.towers.kinds().items():
        for module in tower.user_modules():
            yield f"{key}.module", module
    for module in config.objective.user_modules():
        yield "objective.module", module
    for stage in config.data.stages:
        yield "data.stages", stage


def _check_path(path: Path) -> None:
    if not path.exists():
        raise GigabatchError(f"--with {path}: there is no such file or folder. Check the path.")
    if not (path.is_dir() or path.suffix == ".py"):
        raise GigabatchError(
            f"--with {path}: neither a .py file nor the folder of a package. Install other "
            "packages in the image of the cluster's nodes."
        )
    if not path.stem.isidentifier() or (path.is_dir() and path.suffix):
        raise GigabatchError(
            f"--with {path}: {path.name} is not an importable module name. Rename it."
        )


def _find(module: str, sent: Sequence[Path]) -> Path:
    """Return the file of a module, or the folder of a namespace package."""
    top, *rest = module.split(".")
    for path in sent:
        if path.absolute().stem == top:
            return _inside(path.absolute(), rest, module)
    if top in sys.builtin_module_names or top in sys.stdlib_module_names:
        raise GigabatchError(f"{top} is a module of Python; name your own module.")
    spec = PathFinder.find_spec(top)
    if spec is None:
        raise GigabatchError(
            f"module {top} is neither installed nor sent. Add --with PATH, where PATH is {top}.py "
            f"or the folder {top}."
        )
    folders = list(spec.submodule_search_locations or ())
    path = Path(folders[0] if folders else spec.origin or "")
    if not any(name in path.parts for name in _INSTALLED):
        raise GigabatchError(
            f"{path} is not an installed package, so the cluster lacks it. Add --with {path}."
        )
    return _inside(path, rest, module)


def _inside(path: Path, rest: Sequence[str], module: str) -> Path:
    """Return the file of `module`; `path` is that of its first part, `rest` are the other parts."""
    if path.is_file():
        if rest:
            raise GigabatchError(f"{path} is a module, not a package, so {module} cannot be in it.")
        return path
    inner = path.joinpath(*rest)
    compiled = [*inner.parent.glob(f"{inner.name}.*.so")]
    for file in (inner / "__init__.py", inner.with_name(f"{inner.name}.py"), *compiled):
        if file.is_file() and file != path.with_name(f"{path.name}.py"):
            return file
    if inner.is_dir():
        return inner
    raise GigabatchError(f"there is no module {module} in {path}.")


def _defines(file: Path, name: str) -> bool:
    """Return whether a module's source may bind a name; in doubt, return True."""
    try:
        tree = ast.parse(file.read_text(encoding="utf-8"), str(file))
    except (SyntaxError, UnicodeDecodeError) as error:
        raise GigabatchError(f"{file}: cannot parse this file: {error}.") from error
    bound: set[str] = set()
    for node in ast.walk(tree):
        match node:
            case ast.ClassDef() | ast.FunctionDef() | ast.AsyncFunctionDef():
                bound.add(node.name)
            case ast.Import() | ast.ImportFrom():
                bound.update(alias.asname or alias.name for alias in node.names)
            case ast.Name(ctx=ast.Store()):
                bound.add(node.id)
    return name in bound or "*" in bound or "__getattr__" in bound
