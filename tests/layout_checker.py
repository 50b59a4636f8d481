"""What a module imports, and which names of classes it uses, read from its source."""

from __future__ import annotations

import ast
from collections.abc import Collection, Iterator

IMPORT_CALLS = {"import_module", "__import__"}


def imports(source: str, package: str) -> Iterator[str]:
    """Yield the modules and names of gigabatch that a source imports, without the prefix.

    Args:
        source: Python source.
        package: Package of the module, such as `gigabatch.trainer`; relative imports start there.
    """
    for node in ast.walk(ast.parse(source)):
        names = []
        if isinstance(node, ast.ImportFrom):
            module = absolute(node.module or "", node.level, package)
            names = [module, *(f"{module}.{alias.name}" for alias in node.names)]
        elif isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.Call):
            names = imported_by_call(node, package)
        yield from (n.removeprefix("gigabatch.") for n in names if n.startswith("gigabatch."))


def absolute(name: str, level: int, package: str) -> str:
    """Return the absolute name of a module that is imported with `level` leading dots."""
    if not level:
        return name
    parts = package.split(".")
    return ".".join([*parts[: len(parts) - level + 1], *filter(None, [name])])


def imported_by_call(call: ast.Call, package: str) -> list[str]:
    """Return the module that `import_module("...")` or `__import__("...")` imports, if constant."""
    function = call.func
    called = function.attr if isinstance(function, ast.Attribute) else getattr(function, "id", "")
    arguments = [*call.args, *(keyword.value for keyword in call.keywords)]
    if called not in IMPORT_CALLS or not arguments or not isinstance(arguments[0], ast.Constant):
        return []
    name = str(arguments[0].value)
    level = len(name) - len(name.lstrip("."))
    return [absolute(name.lstrip("."), level, package)]


def uses(source: str, package: str, classes: Collection[str]) -> set[str]:
    """Return those of some classes of gigabatch that a source imports or names.

    Args:
        source: Python source.
        package: Package of the module; relative imports start there.
        classes: Names of classes.
    """
    tree = ast.parse(source)
    modules: dict[str, str] = {}  # local name -> what it was imported from
    found, star = set(), False
    for node in ast.walk(tree):
        if isinstance(node, ast.ImportFrom):
            origin = absolute(node.module or "", node.level, package)
            for alias in node.names:
                modules[alias.asname or alias.name] = f"{origin}.{alias.name}"
                if is_ours(origin):
                    found |= {alias.name} & set(classes)
                    star |= alias.name == "*"
        elif isinstance(node, ast.Import):
            for alias in node.names:
                local = alias.asname or alias.name.partition(".")[0]
                modules[local] = alias.name if alias.asname else local
    for node in ast.walk(tree):
        if isinstance(node, ast.Attribute) and node.attr in classes:
            root, *_ = ast.unparse(node.value).split(".")
            if is_ours(modules.get(root, "")):
                found.add(node.attr)
        elif isinstance(node, ast.Name) and star:
            found |= {node.id} & set(classes)
    return found


def is_ours(name: str) -> bool:
    """Return whether a dotted name is gigabatch or inside it."""
    return name.partition(".")[0] == "gigabatch"
