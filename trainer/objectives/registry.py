"""Registry of objectives: the classes that the modules of this folder register."""

from __future__ import annotations

import difflib
import pkgutil
from importlib import import_module
from pathlib import Path
from typing import Any, TypeVar, get_args

from gigabatch.data.errors import GigabatchError
from gigabatch.data.imports import import_object
from gigabatch.trainer.objectives.base import Objective
from gigabatch.trainer.objectives.settings import ObjectiveSettings

OBJECTIVES: dict[str, type[Objective[Any]]] = {}
"""Name -> class; the default first, the others sorted by name."""
_CLASSES: dict[type[ObjectiveSettings], type[Objective[Any]]] = {}
DEFAULT = "infonce"
_IMPORTED_LAST = "sum"

O = TypeVar("O", bound=type[Objective[Any]])  # noqa: E741


def register(cls: O) -> O:
    """Register an objective under the name in its settings; a class decorator.

    Raises:
        ValueError: If the name is taken.
    """
    name = name_of(cls.Settings)
    if name in OBJECTIVES:
        raise ValueError(f"two objectives are called {name!r}: {OBJECTIVES[name]} and {cls}")
    OBJECTIVES[name] = _CLASSES[cls.Settings] = cls
    return cls


def class_of(settings: ObjectiveSettings) -> type[Objective[Any]]:
    """Return the objective class for these settings."""
    return _CLASSES[type(settings.resolved())]


def build(
    settings: ObjectiveSettings, *, group: str | None = None, width: int = 0
) -> Objective[Any]:
    """Create an objective on the CPU. See `Objective.build` for the arguments."""
    return class_of(settings).build(settings.resolved(), group=group, width=width)


def load_class(path: str) -> type[Objective[Any]]:
    """Import a user's objective, `package.mod:Class`.

    Raises:
        ValueError: If the class cannot be imported, is not an objective, or has no settings.
    """
    try:
        cls = import_object(path)
    except GigabatchError as error:
        raise ValueError(str(error).rstrip(".")) from error
    if not (isinstance(cls, type) and issubclass(cls, Objective)):
        raise ValueError(
            f"{path!r} is not a subclass of gigabatch.trainer.objectives.base.Objective"
        )
    settings = getattr(cls, "Settings", None)
    if not (isinstance(settings, type) and issubclass(settings, ObjectiveSettings)):
        raise ValueError(
            f"{path!r} needs a class attribute Settings, a subclass of "
            "gigabatch.trainer.objectives.settings.ObjectiveSettings"
        )
    if len(get_args(settings.model_fields["name"].annotation)) != 1:
        raise ValueError(f'{path!r}: its Settings need a field name: Literal["..."]')
    _CLASSES[cls.Settings] = cls
    return cls


def name_of(settings: type[ObjectiveSettings]) -> str:
    """Return the name that selects an objective in a config, from `name: Literal["..."]`."""
    (name,) = get_args(settings.model_fields["name"].annotation)
    return str(name)


def discover() -> None:
    """Import every module of this folder, which registers its objectives."""
    for module in pkgutil.iter_modules([str(Path(__file__).parent)]):
        if module.name != _IMPORTED_LAST:
            import_module(f"{__package__}.{module.name}")
    import_module(f"{__package__}.{_IMPORTED_LAST}")
    # Some modules import others, so the order of registration is not alphabetical.
    by_name = sorted(OBJECTIVES.items(), key=lambda item: (item[0] != DEFAULT, item[0]))
    OBJECTIVES.clear()
    OBJECTIVES.update(by_name)


def suggest(name: str) -> str | None:
    """Return the objective that `name` probably means: one with this alias, else one with a similar
    name or alias; None if there is none."""
    names = {known: known for known in OBJECTIVES}
    for known, kind in OBJECTIVES.items():
        names |= dict.fromkeys(kind.card.aliases, known)
    wanted = name.lower().replace("-", "_")
    if wanted in names:
        return names[wanted]
    close = difflib.get_close_matches(wanted, names, 1, 0.6)
    return names[close[0]] if close else None
