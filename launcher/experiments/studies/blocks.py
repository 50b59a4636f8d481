"""Parts that several studies share: synthetic pairs of vectors, and towers that read them."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

from gigabatch.launcher.experiments.shards import Array, unit, write_set
from gigabatch.launcher.experiments.study import WriteData

ViewPair = Callable[[Array], tuple[Array, Array]]
"""Function from latent vectors [n, latent] to two noisy views [n, size]."""


def random_view_pair(
    random: np.random.Generator, latent: int, size: int, noise: float = 0.1
) -> ViewPair:
    """Draw two random one-layer networks; each computes a noisy view of a latent vector."""
    weights = random.standard_normal((2, latent, size)) / np.sqrt(latent)

    def views(latents: Array) -> tuple[Array, Array]:
        one, two = (
            np.tanh(latents @ layer) + noise * random.standard_normal((len(latents), size))
            for layer in weights
        )
        return one, two

    return views


def pairs_of_views(
    members: tuple[str, str], latent: int, size: int, train: int, test: int, noise: float = 0.1
) -> WriteData:
    """Return a writer of pairs of views of standard normal latents.

    Args:
        members: File extensions of the two views, such as `image.npy`.
        latent: Dimension of the latent vectors.
        size: Dimension of the views.
        train: Number of training pairs.
        test: Number of test pairs.
        noise: Standard deviation of the noise on each view.
    """

    def write(folder: Path, random: np.random.Generator, data_kind: str) -> None:
        view_pair = random_view_pair(random, latent, size, noise)
        for name, count in (("train", train), ("test", test)):
            views = view_pair(random.standard_normal((count, latent)))
            write_set(folder / name, dict(zip(members, views, strict=True)))

    return write


def noisy_units(random: np.random.Generator, centers: Array, noise: float) -> Array:
    """Draw a unit vector near each unit center [n, D]; `noise` is the RMS length of the noise."""
    dim = centers.shape[1]
    return unit(centers + noise / np.sqrt(dim) * random.standard_normal(centers.shape))


def vector_tower(member: str, size: int, width: int = 128, layers: int = 1) -> dict[str, Any]:
    """Return the config of a tower that reads vectors of a given size."""
    return {"kind": "vector", "member": member, "size": size, "width": width, "layers": layers}


def two_vector_towers(
    first: str,
    first_member: str,
    second: str,
    second_member: str,
    size: int,
    width: int = 128,
    layers: int = 1,
) -> dict[str, Any]:
    """Return the config of two towers that read vectors of the same size.

    Args:
        first: Name of the first tower.
        first_member: File extension that it reads.
        second: Name of the second tower.
        second_member: File extension that it reads.
        size: Dimension of the vectors.
        width: Width of the hidden layers.
        layers: Number of hidden layers.
    """
    return {
        "towers": {
            "width": 64,
            "more": {
                first: vector_tower(first_member, size, width, layers),
                second: vector_tower(second_member, size, width, layers),
            },
        }
    }
