"""The layout that the docs promise: import directions, folder sizes, uses of objective classes."""

from __future__ import annotations

from pathlib import Path

import pytest
from layout_checker import imports, uses

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
CLASSES = {cls.__name__ for kind in OBJECTIVES.values() for cls in (kind, kind.Settings)}
INSIDE_LAUNCHER = {
    # folder -> folders of launcher that it must not import
    "cluster": {"preflight", "cli", "experiments", "bench"},
    "preflight": {"cluster", "cli", "experiments", "bench"},
    "templates": {"cli", "experiments", "bench"},
    "bench": {"cli", "experiments"},
    "experiments": {"cli"},
}


def package_of(path: Path) -> str:
    """Return the package of a module, from which relative imports start."""
    return ".".join(["gigabatch", *path.parent.relative_to(ROOT).parts])


def test_imports_run_one_way() -> None:
    violations = []
    for path in MODULES:
        folder = path.relative_to(ROOT)
        for name in imports(path.read_text(), package_of(path)):
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
    for path in MODULES:
        if path.parent == ROOT / "trainer" / "objectives":
            continue
        used = uses(path.read_text(), package_of(path), CLASSES)
        assert not used, f"{path.relative_to(ROOT)} names {used}"


@pytest.mark.parametrize(
    ("source", "imported"),
    [
        ("import gigabatch.launcher.start as start", "launcher.start"),
        ("from gigabatch import launcher", "launcher"),
        ("from gigabatch.launcher import (\n    start,\n)", "launcher.start"),
        ("def f():\n    from gigabatch.launcher.start import main", "launcher.start"),
        ("from ..launcher import start", "launcher.start"),
        ("from .. import launcher", "launcher"),
        ("from .step import Step", "trainer.step"),
        ("from . import step", "trainer.step"),
        ("import_module('gigabatch.launcher.start')", "launcher.start"),
        ("importlib.import_module(name='gigabatch.launcher')", "launcher"),
        ("import_module('..launcher', __package__)", "launcher"),
        ("__import__('gigabatch.launcher')", "launcher"),
        ("import_module(f'gigabatch.{name}')", None),
        ("import_module('torch')", None),
        ("import launcher", None),
        ("# from gigabatch import launcher", None),
    ],
)
def test_imports_are_found_in_every_form(source: str, imported: str | None) -> None:
    names = set(imports(source, "gigabatch.trainer"))
    assert (imported in names) if imported else not names


@pytest.mark.parametrize(
    ("source", "used"),
    [
        ("from gigabatch.trainer.objectives.infonce import InfoNCE", True),
        ("from gigabatch.trainer.objectives.infonce import (\n    InfoNCE as Loss,\n)", True),
        ("from .objectives.infonce import InfoNCE", True),
        ("from gigabatch.trainer.objectives.infonce import *\ntype(o) is InfoNCE", True),
        ("from gigabatch.trainer.objectives import infonce\ntype(o) is infonce.InfoNCE", True),
        ("from .objectives import infonce as i\nisinstance(o, i.InfoNCESettings)", True),
        (
            "from .objectives import infonce as i\nmatch o:\n    case i.InfoNCE():\n        ...",
            True,
        ),
        ("import gigabatch.trainer.objectives.queue as q\nq.Queue", True),
        (
            "import gigabatch.trainer.objectives.queue\ngigabatch.trainer.objectives.queue.Queue",
            True,
        ),
        ("from multiprocessing import Queue\nisinstance(q, Queue)", False),
        ("import multiprocessing as m\nm.Queue()", False),
        ("# isinstance(o, InfoNCE) from gigabatch", False),
        ("from gigabatch.trainer.objectives import OBJECTIVES\nOBJECTIVES['infonce']", False),
    ],
)
def test_uses_of_objective_classes_are_found_in_every_form(source: str, used: bool) -> None:
    assert bool(uses(source, "gigabatch.trainer", CLASSES)) == used
