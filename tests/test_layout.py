"""The layout that the docs promise: import directions, folder sizes, uses of objective classes."""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator
from pathlib import Path

from gigabatch.trainer.objectives import OBJECTIVES

ROOT = Path(__file__).parent.parent
PACKAGES = ("launcher", "trainer", "data", "kernels")
MODULES = [path for package in PACKAGES for path in sorted((ROOT / package).rglob("*.py"))]
ALLOWED = {
    "launcher": {"launcher", "trainer", "data", "kernels", "configs"},
    "trainer": {"trainer", "data", "kernels"},
    "data": {"data"},
    "kernels": {"kernels"},
}
REGISTRIES = {
    "trainer/objectives",
    "trainer/towers",
    "trainer/evaluation/tasks",
    "launcher/experiments/studies",
}
MAX_MODULES = 20
INSIDE_LAUNCHER = {
    # folder -> folders of launcher that it must not import
    "cluster": {"preflight", "cli", "experiments", "bench"},
    "preflight": {"cluster", "cli", "experiments", "bench"},
    "templates": {"cli", "experiments", "bench"},
    "bench": {"cli", "experiments"},
    "experiments": {"cli"},
}


def imports(path: Path) -> Iterator[str]:
    """Yield the modules of gigabatch that a file imports, without the prefix."""
    for node in ast.walk(ast.parse(path.read_text())):
        names = []
        if isinstance(node, ast.ImportFrom) and node.module:
            names = [node.module, *(f"{node.module}.{alias.name}" for alias in node.names)]
        elif isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        yield from (n.removeprefix("gigabatch.") for n in names if n.startswith("gigabatch."))


def test_imports_run_one_way() -> None:
    violations = []
    for path in MODULES:
        folder = path.relative_to(ROOT)
        for name in imports(path):
            package, _, inner = name.partition(".")
            forbidden = set()
            if folder.parts[0] == package == "launcher":
                forbidden = INSIDE_LAUNCHER.get(folder.parts[1], set())
            if package not in ALLOWED[folder.parts[0]] or inner.partition(".")[0] in forbidden:
                violations.append(f"{folder} imports gigabatch.{name}")
    assert not violations


def test_folders_except_registries_hold_at_most_20_modules() -> None:
    sizes = {
        str(folder.relative_to(ROOT)): len([*folder.glob("*.py")])
        for package in PACKAGES
        for folder in {path.parent for path in (ROOT / package).rglob("*.py")}
    }
    large = {name: n for name, n in sizes.items() if n > MAX_MODULES and name not in REGISTRIES}
    assert not large


def test_only_the_objectives_folder_uses_objective_classes() -> None:
    classes = [kind.__name__ for kind in OBJECTIVES.values()]
    classes += [kind.Settings.__name__ for kind in OBJECTIVES.values()]
    pattern = re.compile(rf"\b(import|isinstance)\b.*\b({'|'.join(classes)})\b")
    for path in MODULES:
        if path.parent.name == "objectives" and path.parent.parent.name == "trainer":
            continue
        for line in path.read_text().splitlines():
            assert not pattern.search(line), f"{path.relative_to(ROOT)}: {line.strip()}"
