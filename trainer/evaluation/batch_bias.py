"""Is a batch large enough? How far the gradient of small batches is, on average, from that of all
data (SogCLR, Yuan et al. 2022; iSogCLR, number 14), on embeddings as they are.

The loss of N pairs is the objective `sogclr`'s with all of them as its batch,

    mean_i tau log mean_{j != i} exp((s_ij - s_ii) / tau), both ways.

A batch of B sees B - 1 negatives of a sample. The logarithm of their mean is on average below that
of all negatives' mean, and its gradient leans to the negatives that happen to be there: the more,
the smaller B and the lower tau. This is a bias: it does not go away over many batches, as noise
does. A running estimate u in place of the batch's own mean takes it away, the more the smaller
gamma is.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from gigabatch.data.errors import GigabatchError
from gigabatch.data.rng import key, permute
from gigabatch.kernels import gather_rows
from gigabatch.trainer.evaluation.embedding import NAMED_BY_NUMBER, Reading
from gigabatch.trainer.evaluation.settings import BatchBias
from gigabatch.trainer.evaluation.task import Measured, Subject
from gigabatch.trainer.inference import load_objective
from gigabatch.trainer.objectives import Context, Objective, build_objective, parse_settings

REST = 0.01
"""Of the variance of u, the share that is still missing when averaging begins."""
STEADY = 1e-9
"""A gamma at which u stays as it is."""


@dataclass(frozen=True)
class Pairs:
    """`q`, `k`: float32 [N, D], row i of one belonging to row i of the other. `ids`: int64 [N];
    pairs that share one are no negatives of each other."""

    q: Tensor
    k: Tensor
    ids: Tensor

    def take(self, rows: Tensor) -> Pairs:
        return Pairs(self.q[rows], self.k[rows], self.ids[rows])


def batch_bias(
    pairs: Pairs, batch: int, temperature: float, gamma: float, rounds: int, seed: int
) -> dict[str, float]:
    """The gradient G of batches of `batch` pairs, averaged over batches, against that of all, F;
    both [2, N, D], with respect to the embeddings, within the sphere (what is along a unit vector
    never reaches a tower).

    `relative_error`: |E G - F| / |F|. `relative_noise`: |G - E G| / |F|, what so few rounds leave
    to chance; it is taken out of the error. `cosine`: of E G and F. `gamma` 1 is the plain loss of
    each batch. N must be a multiple of `batch`. Each of `rounds`, two or more, goes through all
    pairs once, in a new order: O(rounds N batch D).

    Two things keep chance out. Noise of one half of the rounds is not that of the other, so
    products of one with the other hold none of it. And H, the gradient of the same batches with u
    as it is for all pairs, whose expectation is F, has much of G's noise: G - c (H - F) has less,
    c by least squares (a control variate).
    """
    unit = Pairs(F.normalize(pairs.q, dim=-1), F.normalize(pairs.k, dim=-1), pairs.ids)
    whole, known = _gradient(_objective(temperature, 1.0), unit, _fresh(unit))
    found, steady = _averages(unit, known, batch, _objective(temperature, gamma), rounds, seed)
    apart, beside = found[0] - found[1], steady[0] - steady[1]
    shared = float((apart * beside).sum()) / max(float(beside.square().sum()), 1e-300)
    one, two = found - shared * (steady - whole)
    size, length = float(whole.norm()), math.sqrt(max(0.0, float((one * two).sum())))
    along = float(((one + two) / 2 * whole).sum())
    return {
        "relative_error": math.sqrt(max(0.0, float(((one - whole) * (two - whole)).sum()))) / size,
        "relative_noise": float((one - two).norm()) / 2 / size,
        "cosine": min(1.0, along / (length * size)) if length else 0.0,
    }


def _averages(
    pairs: Pairs, known: Tensor, batch: int, objective: Objective[Any], rounds: int, seed: int
) -> Tensor:
    """float64 [2, 2, 2, N, D]: the mean gradient over the first and the second half of the rounds;
    then the same with u as it is for all pairs.

    `known`: the table as a batch of all pairs leaves it: each u at the mean about which it moves.
    Rounds without gradient bring it to where it moves.
    """
    state, fixed = known.clone(), _objective(objective.settings.temperature, STEADY)
    halves = pairs.q.new_zeros(2, 2, 2, *pairs.q.shape, dtype=torch.float64)
    first = rounds // 2
    for number in range(-_settling(objective.settings.gamma), rounds):
        order = order_of_round(len(pairs.q), seed, number).to(pairs.q.device)
        half = halves[:, int(number >= first)]
        for rows in order.view(-1, batch):
            some = pairs.take(rows)
            if number < 0:
                state[rows] = _settled(objective, some, state[rows])
                continue
            found, state[rows] = _gradient(objective, some, state[rows])
            half[0][:, rows] += found
            half[1][:, rows] += _gradient(fixed, some, known[rows])[0]
    # A batch's gradient is that of the mean over its own pairs, N / batch times that of all.
    share = batch / len(pairs.q)
    counts = halves.new_tensor([first, rounds - first]).view(2, 1, 1, 1)
    return halves * share / counts


def _objective(temperature: float, gamma: float) -> Objective[Any]:
    settings = {
        "name": "sogclr", "taps": ("image", "text"), "positives": "id", "gamma": gamma,
        "temperature": temperature, "temperature_min": temperature, "temperature_max": temperature,
    }  # fmt: skip
    return build_objective(parse_settings(settings))


def _fresh(pairs: Pairs) -> Tensor:
    """The table's rows of samples that have not come yet."""
    row = _objective(1.0, 1.0).needs.tables["state"]
    return torch.tensor(row, device=pairs.q.device).repeat(len(pairs.q), 1)


def _gradient(objective: Objective[Any], pairs: Pairs, state: Tensor) -> tuple[Tensor, Tensor]:
    """(float64 [2, n, D], with respect to both sides; the new rows of the table)."""
    sides = [side.clone().requires_grad_() for side in (pairs.q, pairs.k)]
    with torch.enable_grad():
        loss = objective(dict(zip(("image", "text"), sides, strict=True)), _meta(pairs, state), CTX)
        loss.value.backward()
    return torch.stack([_within(side) for side in sides]), loss.updates()["state"]


@torch.no_grad()
def _settled(objective: Objective[Any], pairs: Pairs, state: Tensor) -> Tensor:
    """The new rows of the table."""
    loss = objective({"image": pairs.q, "text": pairs.k}, _meta(pairs, state), CTX)
    return loss.updates()["state"]


CTX = Context(None, 1)


def _meta(pairs: Pairs, state: Tensor) -> dict[str, Tensor]:
    return {"sample": pairs.ids, "id": pairs.ids, "state": state}


def _within(side: Tensor) -> Tensor:
    assert side.grad is not None
    z, grad = side.detach().double(), side.grad.double()
    return grad - (grad * z).sum(1, keepdim=True) * z


def _settling(gamma: float) -> int:
    """Rounds t until (1 - gamma)^(2 t) is REST: so u's variance nears its last value."""
    return math.ceil(math.log(REST) / math.log(1 - gamma) / 2) if gamma < 1 else 0


def order_of_round(size: int, seed: int, number: int) -> Tensor:
    """int64 [size]: the pairs, batch after batch; negative rounds are those before averaging."""
    stream = key(seed, "batch bias", number)
    return torch.from_numpy(permute(np.arange(size), size, stream))


def measure_batch_bias(subject: Subject, wanted: BatchBias) -> Measured:
    config, world = subject.config, subject.world
    between = wanted.between or config.modalities[:2]
    if len(set(between)) < 2:
        raise GigabatchError(f"batch-bias takes two modalities, and got {', '.join(between)}.")
    batch, total = wanted.batch or config.batch.global_size, len(subject.index)
    samples = min(wanted.samples, total) // batch * batch
    if samples < 2 * batch:
        raise GigabatchError(
            f"batch-bias: a batch of {batch} is compared with {min(wanted.samples, total)} samples "
            f"of {total} in {subject.on}; two batches or more are needed. Set samples= or batch=."
        )
    temperature = wanted.temperature or run_temperature(subject)
    positives = subject.positives(wanted.positives)
    found = subject.embed(Reading(between, [positives] if positives else []))
    ids = found.columns[positives or NAMED_BY_NUMBER]
    q, k, ids = (
        gather_rows(rows, world.group) for rows in (*(found.taps[m] for m in between), ids)
    )
    if q.shape[1] != k.shape[1]:
        raise GigabatchError(f"batch-bias: {' and '.join(between)} have no width in common.")
    seed = config.run.seed
    chosen = permute(np.arange(samples), total, key(seed, "batch bias"))
    pairs = Pairs(q, k, ids).take(torch.from_numpy(chosen).to(q.device))
    told = batch_bias(pairs, batch, temperature, wanted.gamma, wanted.rounds, seed)
    told |= {"batch": batch, "samples": samples, "temperature": temperature}
    return Measured(subject.name, told=told)


@torch.no_grad()
def run_temperature(subject: Subject) -> float:
    """Of the run's objective, as it is now; a mean where each sample has its own. Raises
    GigabatchError for an objective that has none, or several."""
    objective, tables = load_objective(subject.run, subject.step)
    temperature = objective.mean_temperature(tables)
    if temperature is not None:
        return temperature
    raise GigabatchError(
        "batch-bias: the run's objective has no temperature of its own. Set temperature=."
    )
