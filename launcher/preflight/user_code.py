"""A user's own modules that a config names, and whether they will be there when a job starts."""

from __future__ import annotations

import ast
import sys
from collections.abc import Iterator, Sequence
from importlib.machinery import PathFinder
from pathlib import Path

from gigabatch.data.errors import GigabatchError
from gigabatch.trainer.config import Config, ModuleTower, OtherModuleTower, OtherText

_INSTALLED = ("site-packages", "dist-packages")


def check_user_code(config: Config, shipped: Sequence[Path]) -> None:
    """Whether every `package.mod:name` of the config is in `shipped` or installed. Nothing is
    imported. Raises GigabatchError with the key and what to add."""
    for path in shipped:
        _check_shipped(path)
    names = [path.stem for path in shipped]
    if twice := sorted({name for name in names if names.count(name) > 1}):
        raise GigabatchError(f"--with: two paths are both called {twice[0]}.")
    for key, wanted in named_code(config):
        module, _, name = wanted.partition(":")
        try:
            file = _find(module, shipped)
        except GigabatchError as error:
            raise GigabatchError(f"{key}: {wanted!r}: {error}") from None
        if file.suffix == ".py" and not _defines(file, name):
            raise GigabatchError(f"{key}: {wanted!r}: {file} defines no {name}.")


def named_code(config: Config) -> Iterator[tuple[str, str]]:
    """(key, `package.mod:name`) of all code of the user's that the config names."""
    towers: dict[str, object] = {"image": config.towers.image, "text": config.towers.text}
    for name, other in config.towers.more.items():
        if isinstance(other, OtherText):
            towers[f"more.{name}.tower"] = other.tower
        else:
            towers[f"more.{name}"] = other
    for name, tower in towers.items():
        if isinstance(tower, ModuleTower | OtherModuleTower):
            yield f"towers.{name}.module", tower.module
    for module in config.objective.user_modules():
        yield "objective.module", module
    for stage in config.data.stages:
        yield "data.stages", stage


def _check_shipped(path: Path) -> None:
    if not path.exists():
        raise GigabatchError(f"--with {path}: there is no such file or folder.")
    if not (path.is_dir() or path.suffix == ".py"):
        raise GigabatchError(
            f"--with {path}: neither a .py file nor the folder of a package. Other packages belong "
            "in the image of the cluster's nodes."
        )
    if not path.stem.isidentifier() or (path.is_dir() and path.suffix):
        raise GigabatchError(f"--with {path}: {path.name} is no name that Python can import.")


def _find(module: str, shipped: Sequence[Path]) -> Path:
    """The file of a module, or the folder of a package without one."""
    top, *rest = module.split(".")
    for path in shipped:
        if path.absolute().stem == top:
            return _inside(path.absolute(), rest, module)
    if top in sys.builtin_module_names or top in sys.stdlib_module_names:
        raise GigabatchError(f"{top} is Python's own.")
    spec = PathFinder.find_spec(top)
    if spec is None:
        raise GigabatchError(
            f"there is no module {top}, neither installed here nor shipped. Add --with PATH, the "
            f"path of {top}.py or of the folder {top}."
        )
    folders = list(spec.submodule_search_locations or ())
    found = Path(folders[0] if folders else spec.origin or "")
    if not any(name in found.parts for name in _INSTALLED):
        raise GigabatchError(
            f"{found} is no installed package, so the cluster does not have it. Add --with {found}."
        )
    return _inside(found, rest, module)


def _inside(path: Path, rest: Sequence[str], module: str) -> Path:
    """The file of `module`, whose first part is at `path` and whose others are `rest`."""
    if path.is_file():
        if rest:
            raise GigabatchError(f"{path} is a module, not a package, so it holds no {module}.")
        return path
    inner = path.joinpath(*rest)
    compiled = [*inner.parent.glob(f"{inner.name}.*.so")]
    for file in (inner / "__init__.py", inner.with_name(f"{inner.name}.py"), *compiled):
        if file.is_file() and file != path.with_name(f"{path.name}.py"):
            return file
    if inner.is_dir():
        return inner
    raise GigabatchError(f"{path} holds no module {module}.")


def _defines(file: Path, name: str) -> bool:
    """Whether a module binds a name at its top, as far as its text tells."""
    try:
        tree = ast.parse(file.read_text(encoding="utf-8"), str(file))
    except (SyntaxError, UnicodeDecodeError) as error:
        raise GigabatchError(f"{file} cannot be parsed: {error}.") from error
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
