"""What several experiments share: pairs of vectors, and the towers that read them."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

from gigabatch.launcher.experiments.shards import Array, unit, write_set
from gigabatch.launcher.experiments.study import Write

Sides = Callable[[Array], tuple[Array, Array]]


def two_sides(random: np.random.Generator, latent: int, size: int, noise: float = 0.1) -> Sides:
    """[n, latent] -> two views [n, size] of it: each through a random layer of its own, with
    noise."""
    maps = random.standard_normal((2, latent, size)) / np.sqrt(latent)

    def see(codes: Array) -> tuple[Array, Array]:
        one, two = (
            np.tanh(codes @ each) + noise * random.standard_normal((len(codes), size))
            for each in maps
        )
        return one, two

    return see


def pairs_of_views(
    members: tuple[str, str], latent: int, size: int, train: int, test: int, noise: float = 0.1
) -> Write:
    """Writes so many pairs of views of standard normal latents into the sets train and test."""

    def write(folder: Path, random: np.random.Generator, variant: str) -> None:
        sides = two_sides(random, latent, size, noise)
        for name, count in (("train", train), ("test", test)):
            views = sides(random.standard_normal((count, latent)))
            write_set(folder / name, dict(zip(members, views, strict=True)))

    return write


def around(random: np.random.Generator, centres: Array, spread: float) -> Array:
    """Unit vectors about unit centres [n, D], their noise of length `spread`."""
    width = centres.shape[1]
    return unit(centres + spread / np.sqrt(width) * random.standard_normal(centres.shape))


def vector_tower(member: str, size: int, width: int = 128, layers: int = 1) -> dict[str, Any]:
    return {"kind": "vector", "member": member, "size": size, "width": width, "layers": layers}


def pair_of_vectors(
    first: str, its: str, second: str, seconds: str, size: int, width: int = 128, layers: int = 1
) -> dict[str, Any]:
    """Towers of two modalities and the members that they read; both of one size."""
    return {
        "towers": {
            "width": 64,
            "more": {
                first: vector_tower(its, size, width, layers),
                second: vector_tower(seconds, size, width, layers),
            },
        }
    }
