"""Registry of the tasks of `gigabatch eval`, and parsing of their settings.

A task is a class in a separate module of `trainer/evaluation/tasks`, decorated with `register`.
Its command line, settings and dispatch come from that class; no other file changes.
"""

from __future__ import annotations

import difflib
import importlib
import pkgutil
from collections.abc import Sequence
from typing import Any, TypeVar

import yaml
from pydantic import ValidationError

from gigabatch.data.errors import GigabatchError
from gigabatch.data.imports import import_object
from gigabatch.trainer.evaluation import tasks
from gigabatch.trainer.evaluation.task import EvalTask, RunTask, SetTask

TASKS: dict[str, type[EvalTask]] = {}
"""Registered tasks by name and alias. Read it through `all_tasks`, which fills it."""

TaskClass = TypeVar("TaskClass", bound=type[EvalTask])


def register(task: TaskClass) -> TaskClass:
    """Register a task class under its name and aliases; a class decorator.

    Raises:
        ValueError: if a different module registered one of these names.
    """
    for name in (task.name, *task.aliases):
        other = TASKS.setdefault(name, task)
        if other.__module__ != task.__module__:
            raise ValueError(
                f"{task.__module__}: the evaluation task name {name!r} is taken by "
                f"{other.__module__}; choose a different name."
            )
        TASKS[name] = task
    return task


def all_tasks() -> dict[str, type[EvalTask]]:
    """Import every module of `trainer/evaluation/tasks`; return its tasks by name, sorted."""
    # Modules are listed at every call, to find those of a folder added to the package's path.
    for module in pkgutil.iter_modules(tasks.__path__):
        importlib.import_module(f"{tasks.__name__}.{module.name}")
    return {name: TASKS[name] for name in sorted(TASKS) if TASKS[name].name == name}


def find_task(name: str) -> type[EvalTask]:
    """Return the task with this name or alias, or the class at `package.mod:Class`.

    Raises:
        GigabatchError: if there is no such task, or the class is not a task.
    """
    if ":" in name:
        return _user_task(name)
    names = list(all_tasks())
    if name not in TASKS:
        close = difflib.get_close_matches(name, names, 1, 0.6)
        hint = f" Did you mean {close[0]}?" if close else ""
        raise GigabatchError(
            f"--task {name}: unknown task.{hint} Tasks: {', '.join(names)}, or package.mod:Class."
        )
    return TASKS[name]


def _user_task(path: str) -> type[EvalTask]:
    """Import a user's task from `package.mod:Class`."""
    task = import_object(path, "--task")
    if not (isinstance(task, type) and issubclass(task, SetTask | RunTask)):
        raise GigabatchError(
            f"--task {path}: not a task. Derive the class from SetTask or RunTask of "
            "gigabatch.trainer.evaluation.task."
        )
    if missing := [key for key in ("name", "summary") if not hasattr(task, key)]:
        raise GigabatchError(f"--task {path}: the class needs a class attribute {missing[0]!r}.")
    return task


def parse_task(name: str, assignments: Sequence[str]) -> EvalTask:
    """Build a task from its name and `key=value` texts.

    Raises:
        GigabatchError: if the task, a key or a value is invalid; the message explains the key.
    """
    task, values = find_task(name), dict[str, Any]()
    known = list(task.model_fields)
    for text in assignments:
        key, equals, value = text.partition("=")
        if not equals:
            raise GigabatchError(f"{text!r}: write key=value. Keys of {name}: {_keys(task)}.")
        if key not in known:
            close = difflib.get_close_matches(key, known, 1, 0.6)
            hint = f"did you mean {close[0]}?" if close else f"its keys: {_keys(task)}."
            raise GigabatchError(f"{key}: unknown key of {name}; {hint}")
        if task.model_fields[key].annotation is str:  # YAML would read `query: ` as a mapping
            values[key] = value
            continue
        try:
            values[key] = yaml.safe_load(value)
        except yaml.YAMLError:
            values[key] = value
    try:
        return task.model_validate(values)
    except ValidationError as error:
        explained = (_explain(name, task, item) for item in error.errors())
        raise GigabatchError("\n".join(explained)) from error


def _keys(task: type[EvalTask]) -> str:
    return ", ".join(task.model_fields) or "none"


def _explain(name: str, task: type[EvalTask], item: Any) -> str:
    """Turn one pydantic error into a message that ends with the key's help text."""
    if not item["loc"]:  # a validator of several keys, whose message names them
        return f"{name}: {item['msg'].removeprefix('Value error, ')}."
    key = str(item["loc"][0])
    help_text = task.model_fields[key].description if key in task.model_fields else None
    problem = "required" if item["type"] == "missing" else item["msg"]
    explanation = f" {' '.join(help_text.split())}" if help_text else ""
    return f"{name}: {key}: {problem}.{explanation}"
