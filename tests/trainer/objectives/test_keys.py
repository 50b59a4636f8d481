"""Every key of every objective has an effect in one of the objective's examples.

Another value changes the loss, a gradient, the state, the work or the collectives.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache
from typing import Any, Literal, get_args, get_origin

import pytest
import torch
import torch.distributed as dist
from harness import Example, Result, build, examples, one_step, selected
from pydantic.fields import FieldInfo

from gigabatch.kernels import Dot, Ring
from gigabatch.kernels.maxsim import MaxSim
from gigabatch.trainer.distributed import World
from gigabatch.trainer.objectives import OBJECTIVES, parse_settings

# Keys of the run, not of `forward`; test_objective_runs.py and test_new_objective.py use them.
RUN_KEYS = {"momentum", "module", "args"}
KEYS = [
    (name, key)
    for name, kind in selected().items()
    for key in kind.Settings.model_fields
    if key not in {"name", *RUN_KEYS}
]


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Iterator[World]:
    """A process group of one rank, which exchanges keys as the gather mode says."""
    store = dist.FileStore(str(tmp_path_factory.mktemp("group") / "store"), 1)
    dist.init_process_group("gloo", store=store, rank=0, world_size=1)
    yield World(0, 1, torch.device("cpu"), dist.group.WORLD)
    dist.destroy_process_group()


@pytest.mark.xdist_group("objective keys")
@pytest.mark.parametrize(("name", "key"), KEYS)
def test_key_has_an_effect(name: str, key: str, world: World) -> None:
    fields = OBJECTIVES[name].Settings.model_fields
    for label, (_, example) in examples().items():
        if not label.startswith(f"{name}: "):
            continue
        for value in alternatives(key, fields, example):
            settings = {**copy.deepcopy(dict(example.settings)), key: value}
            changed = Example(settings, example.missing, example.captions)
            try:
                if differs(baseline(label, world), observe(name, changed, world)):
                    return
            except ValueError:  # a value that does not fit the example
                continue
    pytest.fail(f"no example of {name} shows an effect of {key}")


@cache
def baseline(label: str, world: World) -> list[Result]:
    """Observe an example with its own settings."""
    return list(observe(label.partition(": ")[0], examples()[label][1], world))


def alternatives(key: str, fields: dict[str, FieldInfo], example: Example) -> Iterator[Any]:
    """Yield other values of a key, by its type."""
    field = fields[key]
    current = example.settings.get(key, field.default)
    if key == "backend":  # its effect on a CPU is an error
        yield "triton"
    elif key == "widths":
        yield from ([2, 6], [1, 2, 3, 6])
    elif key == "taps":
        yield from (["text", "image"], ["image@1", "image"], ["text", "image@1", "image"])
        yield from (["text", "image@1"], ["image.tokens", "text.tokens"])
    elif key == "scale_max":  # below the perturbed scale
        yield example.settings.get("init_logit_scale", fields["init_logit_scale"].default)
    elif key == "temperature_max":
        yield example.settings.get("temperature", fields["temperature"].default)
    elif key == "teacher":
        yield {"member": "npy", "size": 3, "threshold": -0.5}
    elif key in {"terms", "weights"}:
        yield {"terms": [{"name": "infonce"}, {"name": "siglip"}], "weights": [1.0, 2.0]}[key]
    elif get_origin(field.annotation) is Literal:
        yield from (choice for choice in get_args(field.annotation) if choice != current)
    elif isinstance(current, bool):
        yield not current
    elif isinstance(current, int | float):
        step = 1 if isinstance(current, int) else 0.1
        yield from (current * 2, current * 3, current + step, current / 2, current - step, 1, 3)
    else:  # the name of a json field, or None
        yield from (name for name in ("concept", "lang", "age", None) if name != current)


def observe(name: str, example: Example, world: World) -> Iterator[Result]:
    """Yield the trainable parameters, then the results of each step with its tiles and rings."""
    settings = parse_settings({"name": name, **example.settings})
    if getattr(settings, "backend", "tiled") == "triton":
        yield {}  # this machine may have no Triton
        return
    objective, state = build(settings, world)
    yield {n: torch.tensor(p.requires_grad) for n, p in objective.named_parameters()}
    with torch.no_grad():
        for parameter in objective.parameters():
            parameter += 0.1  # above `scale_max` if it equals the initial scale
    for step in range(1, example.steps + 1):
        with counting() as counts:
            result = one_step(example, objective, state, world, step)
        yield result | {name: torch.tensor(count) for name, count in counts.items()}


@contextmanager
def counting() -> Iterator[dict[str, int]]:
    """Count tiles of scores and ring exchanges."""
    counts = {"tiles": 0, "rings": 0}
    ring = Ring.__init__

    def counted(tile: Any) -> Any:
        def count_tile(*args: Any) -> Any:
            counts["tiles"] += 1
            return tile(*args)

        return count_tile

    def count_ring(*args: Any, **options: Any) -> None:
        counts["rings"] += 1
        ring(*args, **options)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Dot, "tile", counted(Dot.tile))
        patch.setattr(MaxSim, "tile", counted(MaxSim.tile))
        patch.setattr(Ring, "__init__", count_ring)
        yield counts


def differs(before: list[Result], after: Iterator[Result]) -> bool:
    """Compare bit for bit up to the first difference; tables hold NaN for unseen samples."""
    return any(
        one.keys() != other.keys()
        or any(
            value.shape != other[name].shape
            or not torch.equal(value.nan_to_num(-7.0), other[name].nan_to_num(-7.0))
            for name, value in one.items()
        )
        for one, other in zip(before, after, strict=False)
    )
