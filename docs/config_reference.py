"""Config reference: Markdown for every key of a run's config, from the settings models."""

from __future__ import annotations

import types
from collections.abc import Iterator
from typing import Annotated, Any, Literal, Union, get_args, get_origin

import yaml
from annotated_types import Ge, Gt, Le, Lt
from pydantic import BaseModel
from pydantic.fields import FieldInfo
from pydantic_core import PydanticUndefined, to_jsonable_python

from gigabatch.trainer.config import Config

SCALARS = {"int": "integer", "float": "number", "str": "text", "bool": "true or false",
           "Path": "path", "Any": "any value", "NoneType": "null"}  # fmt: skip
BOUNDS = {Ge: ("ge", "≥"), Gt: ("gt", ">"), Le: ("le", "≤"), Lt: ("lt", "<")}
KINDS = ("kind", "name")
"""Fields whose value tells the members of a union of models apart."""

Models = list[type[BaseModel]]


def config_reference() -> str:
    """Return the reference as Markdown: a section per config section and kind."""
    lines = [
        "# Config reference",
        "",
        "Every key of a run's YAML file, with its type, default and meaning. This page is",
        "generated from the settings. Set any key on the command line, as in `train.steps=2000`;",
        "`gigabatch config CONFIG` prints a config with all its values.",
    ]
    documented: dict[type[BaseModel], str] = {}
    for name, field in Config.model_fields.items():
        lines += ["", f"## {name}", *_sections(name, _models(field.annotation), documented)]
    return "\n".join(lines) + "\n"


def _sections(path: str, models: Models, documented: dict[type[BaseModel], str]) -> Iterator[str]:
    """Yield the keys of the models that a path may hold, then those of the models inside.

    A model is documented once, at its first path.
    """
    if all(model in documented for model in models):
        first = documented[models[0]]
        if first != path:
            yield from ("", f"`{path}` has the same keys as `{first}`.")
        return
    documented.update(dict.fromkeys(models, path))
    for model in models:
        kind = next((name for name in KINDS if name in model.model_fields), None)
        if len(models) > 1 and kind:
            values = get_args(model.model_fields[kind].annotation)
            yield from ("", f"### {path}, {kind}: {' or '.join(map(str, values))}")
        elif "." in path:
            yield from ("", f"### {path}")
        nested: list[tuple[str, Models]] = []
        for name, field in model.model_fields.items():
            inner = _models(field.annotation)
            key = f"{path}.{name}"
            if not inner or _is_collection(field.annotation):
                yield from _entry(key, field)
            if inner:
                nested.append((_item_path(key, field.annotation), inner))
        for key, inner in nested:
            yield from _sections(key, inner, documented)


def _entry(path: str, field: FieldInfo) -> Iterator[str]:
    default = field.get_default(call_default_factory=True)
    text = "required" if default is PydanticUndefined else f"default `{_yaml(default)}`"
    kind = _type(field.annotation, field.metadata)
    yield from ("", f"`{path}` ({kind}; {text})")
    yield f":   {_escape(' '.join((field.description or '').split())) or '&nbsp;'}"


def _escape(text: str) -> str:
    """Escape Markdown's special characters outside of code."""
    parts = text.split("`")
    parts[::2] = [part.replace("*", r"\*").replace("<", "&lt;") for part in parts[::2]]
    return "`".join(parts)


def _yaml(value: Any) -> str:
    text = yaml.safe_dump(to_jsonable_python(value), default_flow_style=True, width=1000)
    return text.removesuffix("...\n").strip()


def _models(annotation: Any) -> Models:
    """Return the settings models inside an annotation, outermost only."""
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        return [annotation]
    if get_origin(annotation) is Annotated:
        return _models(get_args(annotation)[0])
    return [model for part in get_args(annotation) for model in _models(part)]


def _is_collection(annotation: Any) -> bool:
    if get_origin(annotation) is Annotated:
        return _is_collection(get_args(annotation)[0])
    return get_origin(annotation) in (tuple, list, dict)


def _item_path(path: str, annotation: Any) -> str:
    if get_origin(annotation) is Annotated:
        return _item_path(path, get_args(annotation)[0])
    if get_origin(annotation) is dict:
        return f"{path}.NAME"
    return f"{path}[i]" if get_origin(annotation) in (tuple, list) else path


def _type(annotation: Any, metadata: Any = ()) -> str:
    """Describe a type in words, with its bounds."""
    origin, arguments = get_origin(annotation), get_args(annotation)
    if origin is Annotated:
        return _type(arguments[0], [*arguments[1:], *metadata])
    if origin is Literal:
        return " or ".join(f"`{_yaml(value)}`" for value in arguments)
    if origin in (Union, types.UnionType):
        texts = dict.fromkeys(_type(part) for part in arguments)
        return " or ".join(texts) + _bounds(metadata)
    if origin in (tuple, list):
        items = [part for part in arguments if part is not Ellipsis]
        if Ellipsis in arguments or origin is list:
            return f"list of {_type(items[0])}"
        return f"[{', '.join(_type(item) for item in items)}]"
    if origin is dict:
        return f"mapping of names to {_type(arguments[1])}"
    if _models(annotation):
        return "mapping"
    name = getattr(annotation, "__name__", str(annotation))
    return SCALARS.get(name, name) + _bounds(metadata)


def _bounds(metadata: Any) -> str:
    texts = []
    for item in metadata:
        for bound in item.metadata if isinstance(item, FieldInfo) else [item]:
            for kind, (attribute, sign) in BOUNDS.items():
                if isinstance(bound, kind):
                    texts.append(f" {sign} {getattr(bound, attribute)}")
    return ",".join(texts)


if __name__ == "__main__":
    print(config_reference(), end="")
