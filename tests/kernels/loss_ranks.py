"""Groups of gloo ranks, one process per rank, that run every job on their slices.

    python loss_ranks.py OUT WORLD_SIZE...

Groups run one after another. Results are saved as OUT/WORLD_SIZE/RANK.pt.
"""

from __future__ import annotations

import multiprocessing as mp
import sys
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Literal

import torch
import torch.distributed as dist
from dense import Case, make_case
from torch import Tensor

from gigabatch.kernels import (
    Concat,
    Eq,
    Local,
    Lse,
    contrastive_loss,
    gather_rows,
    key_source,
    late_interaction_loss,
    lse_stats,
    row_top,
    sigmoid_loss,
    take,
)

GATHER_MODES: tuple[Literal["gather", "ring"], ...] = ("gather", "ring")


@dataclass(frozen=True)
class RankCase:
    """A global batch, and the numbers of its queries and keys on each rank."""

    full: Case
    queries: tuple[int, ...]
    keys: tuple[int, ...]
    backend: str = "tiled"

    def slices(self, rank: int) -> tuple[slice, slice]:
        first_q, first_k = sum(self.queries[:rank]), sum(self.keys[:rank])
        return (
            slice(first_q, first_q + self.queries[rank]),
            slice(first_k, first_k + self.keys[rank]),
        )


def cases(world_size: int) -> dict[str, RankCase]:
    """Return cases for `contrastive_loss`."""
    even = (6,) * world_size
    uneven = tuple(3 + 4 * rank for rank in range(world_size))
    reversed_ = uneven[::-1]
    first_empty = (0, *(5,) * (world_size - 1)) if world_size > 1 else even
    last_empty = first_empty[::-1]
    rank_cases: dict[str, RankCase] = {}
    for name, queries, keys, ids, symmetric, scale in [
        ("even", even, even, None, True, 10.0),
        ("even, one way", even, even, None, False, 10.0),
        ("uneven", uneven, uneven, None, True, 100.0),
        ("uneven, ids", uneven, uneven, 5, True, 10.0),
        ("few positives", uneven, uneven, 80, True, 10.0),
        ("few positives, one way", uneven, uneven, 80, False, 10.0),
        ("keys assigned otherwise", uneven, reversed_, 9, True, 10.0),
        ("first rank without rows", first_empty, first_empty, None, True, 10.0),
        ("last rank without rows", last_empty, last_empty, 6, True, 1.0),
        ("one rank without queries, another without keys", first_empty, last_empty, 4, True, 10.0),
    ]:
        full = make_case(sum(queries), sum(keys), 7, scale, ids, len(rank_cases), symmetric)
        rank_cases[name] = RankCase(full.to(torch.float32), queries, keys)
    batch = make_case(sum(even), sum(even), 7).to(torch.float32)
    index = torch.arange(sum(even))
    unmatched = Case(batch.q, batch.k, batch.scale, index, index + 1000)
    rank_cases["no positives"] = RankCase(unmatched, even, even)
    rank_cases["half precision"] = RankCase(make_case(20 * world_size, 20 * world_size, 7).to(
        torch.bfloat16), (20,) * world_size, (20,) * world_size)  # fmt: skip
    rank_cases["reference"] = RankCase(rank_cases["uneven, ids"].full, uneven, uneven, "reference")
    total = sum(uneven)
    for name, same_id, smoothing, biased, symmetric in [
        ("biased", "positive", 0.0, True, True),
        ("smoothed", "positive", 0.2, True, True),
        ("excluded", "exclude", 0.0, False, True),
        ("excluded, smoothed, biased", "exclude", 0.2, True, True),
        ("excluded, smoothed, biased, one way", "exclude", 0.2, True, False),
    ]:
        full = make_case(total, total, 7, 10.0, 5, 3, symmetric, same_id, smoothing, biased)  # type: ignore[arg-type]
        ids = full.ids_q  # both sides of a sample share its id
        rank_cases[name] = RankCase(replace(full.to(torch.float32), ids_k=ids), uneven, uneven)
    return rank_cases


def sigmoid_case(case: Case) -> Case:
    """Return the same batch for the sigmoid loss, whose bias is one number."""
    return replace(case, ids_q=None, ids_k=None, bias=torch.tensor(-3.0), symmetric=True)


def tokens(world_size: int) -> tuple[dict[str, Tensor], tuple[int, ...]]:
    """Return token vectors and masks of a global batch, and the number of rows of each rank."""
    uneven = tuple(2 + rank for rank in range(world_size))
    g = torch.Generator().manual_seed(0)
    inputs = {
        name: torch.nn.functional.normalize(torch.randn(sum(uneven), t, 5, generator=g), dim=2)
        for name, t in (("q", 4), ("k", 3))
    }
    for name in ("q", "k"):
        mask = torch.rand(inputs[name].shape[:2], generator=g) < 0.7
        mask[:, 0] = True
        inputs[f"mask_{name}"] = mask
    return inputs, uneven


Results = dict[str, dict[str, Tensor]]


def contrast(rank: int, world_size: int, gather_mode: Literal["gather", "ring"]) -> Results:
    results: Results = {}
    for name, case in cases(world_size).items():
        full, (slice_q, slice_k) = case.full, case.slices(rank)
        x = leaves(
            q=full.q[slice_q], k=full.k[slice_k], scale=full.scale,
            bias=None if full.bias is None else full.bias[slice_k],
        )  # fmt: skip
        value = contrastive_loss(
            **x,
            ids_q=None if full.ids_q is None else full.ids_q[slice_q],
            ids_k=None if full.ids_k is None else full.ids_k[slice_k],
            symmetric=full.symmetric, same_id=full.same_id,
            label_smoothing=full.label_smoothing, group=dist.group.WORLD, gather_mode=gather_mode,
            backend=case.backend,
        )  # fmt: skip
        results[name] = differentiate(value, x)
        if case.queries == case.keys and full.q.dtype == torch.float32:
            pair = sigmoid_case(full)
            y = leaves(q=pair.q[slice_q], k=pair.k[slice_k], scale=pair.scale, bias=pair.bias)
            value = sigmoid_loss(**y, group=dist.group.WORLD, gather_mode=gather_mode)
            results[f"sigmoid: {name}"] = differentiate(value, y)
    return results


def late(rank: int, world_size: int, gather_mode: Literal["gather", "ring"]) -> Results:
    full, sizes = tokens(world_size)
    rows = slice(sum(sizes[:rank]), sum(sizes[: rank + 1]))
    x = leaves(q=full["q"][rows], k=full["k"][rows], scale=torch.tensor(9.0))
    masks = {name: full[name][rows] for name in ("mask_q", "mask_k")}
    value = late_interaction_loss(**x, **masks, group=dist.group.WORLD, gather_mode=gather_mode)
    return {"late": differentiate(value, x)}


def sources(rank: int, world_size: int, gather_mode: Literal["gather", "ring"]) -> Results:
    """Use a batch and a queue, a scale per row and key, and keys taken from other ranks."""
    case = cases(world_size)["uneven, ids"]
    full, (slice_q, slice_k) = case.full, case.slices(rank)
    assert full.ids_q is not None
    assert full.ids_k is not None
    g = torch.Generator().manual_seed(9)
    queue = torch.randn(5, 7, generator=g)
    row_scale, key_scale, bias = (
        torch.rand(n, generator=g) for n in (len(full.q), len(full.k), len(full.k))
    )
    x = leaves(q=full.q[slice_q], k=full.k[slice_k], row_scale=row_scale[slice_q],
               key_scale=key_scale[slice_k], bias=bias[slice_k])  # fmt: skip
    batch = key_source(x["k"], {"id": full.ids_k[slice_k]}, dist.group.WORLD, gather_mode)
    keys = Concat(batch, Local(queue, {"id": torch.arange(5)}))
    padded = torch.cat([x["bias"], torch.zeros(5)])
    lses = [Lse("rows", x["row_scale"], padded), Lse("rows", -x["row_scale"])]
    rows = lse_stats(x["q"], keys, lses, Eq(full.ids_q[slice_q], "id"))
    columns = lse_stats(x["q"], batch, [Lse("columns", x["key_scale"])], Eq(full.ids_q[slice_q],
                                                                            "id"))  # fmt: skip
    values, index = row_top(x["q"], keys, 3)
    chosen = (take(keys, index[:, 1]).keys * x["q"]).sum(1)
    all_rows = gather_rows(x["q"], dist.group.WORLD)
    outputs = {
        "z": rows.z[0], "z inverse": rows.z[1], "positive": rows.positive[0],
        "column z": columns.z[0], "column positive": columns.positive[0], "chosen": chosen,
    }  # fmt: skip
    weight = torch.arange(1, len(all_rows) + 1).unsqueeze(1)
    gathered = (rank + 1) * (all_rows.square() * weight).sum()
    total = sum((v.sum() for v in outputs.values()), gathered)
    result = differentiate(total, x)
    return {"sources": {**result, **{n: v.detach() for n, v in outputs.items()}, "top": values}}


def constants(rank: int, world_size: int, gather_mode: Literal["gather", "ring"]) -> Results:
    """Return sums and gradients if the keys of no rank, the first rank or all are constants."""
    case = cases(world_size)["uneven, ids"]
    slice_q, slice_k = case.slices(rank)
    results: Results = {}
    for ranks, constant in (("none", False), ("first", rank == 0), ("all", True)):
        x = leaves(q=case.full.q[slice_q], k=case.full.k[slice_k], scale=case.full.scale)
        k = x.pop("k").detach() if constant else x["k"]
        keys = key_source(k, {}, dist.group.WORLD, gather_mode)
        lses = [Lse("rows", x["scale"]), Lse("columns", x["scale"])]
        stats = lse_stats(x["q"], keys, lses)
        result = differentiate(stats.z[0].sum() + (rank + 1) * stats.z[1].sum(), x)
        requires_grad = torch.tensor(keys.requires_grad)
        results[f"constants: {ranks}"] = {**result, "requires_grad": requires_grad}
    return results


def refusals(rank: int, world_size: int, gather_mode: Literal["gather", "ring"]) -> Results:
    """Run calls that are invalid only on rank 0; every rank must raise, none may wait."""
    q, scale, group = torch.zeros(4, 3, 2), torch.tensor(1.0), dist.group.WORLD
    mask = torch.ones(4, 3, dtype=torch.bool)
    mask[2] = rank != 0
    with_nan = torch.zeros(4, 2)
    with_nan[0, 0] = torch.nan if rank == 0 else 0.0
    mixed = torch.zeros(4, 2, dtype=torch.float64 if rank == 0 else torch.float32)
    calls = {
        "no token": lambda: late_interaction_loss(q, q, scale, mask_q=mask, group=group),
        "not finite": lambda: contrastive_loss(
            with_nan, with_nan, scale, group=group, gather_mode=gather_mode, validate=True
        ),
        "mixed dtypes": lambda: contrastive_loss(
            mixed, mixed, scale, group=group, gather_mode=gather_mode
        ),
        "no positive": lambda: contrastive_loss(
            q[:, 0], q[:, 0], scale, ids_q=torch.arange(4), ids_k=torch.arange(4) + 9 * (rank == 0),
            group=group, gather_mode=gather_mode, validate=True,
        ),
    }  # fmt: skip
    if world_size == 1:
        del calls["mixed dtypes"]
    raised = {}
    for name, call in calls.items():
        try:
            call()
            raised[name] = torch.tensor(False)
        except ValueError:
            raised[name] = torch.tensor(True)
    return {"refusals": raised}


def leaves(**inputs: Tensor | None) -> dict[str, Tensor]:
    return {n: x.detach().clone().requires_grad_() for n, x in inputs.items() if x is not None}


def differentiate(value: Tensor, inputs: dict[str, Tensor]) -> dict[str, Tensor]:
    grads = torch.autograd.grad(value, list(inputs.values()))
    named = {f"d{name}": grad for name, grad in zip(inputs, grads, strict=True)}
    return {"value": value.detach(), **named}


def main(store: str, out: Path, rank: int, world_size: int) -> None:
    torch.set_num_threads(1)
    dist.init_process_group(
        "gloo", store=dist.FileStore(store, world_size), rank=rank, world_size=world_size
    )
    jobs: tuple[Callable[..., Results], ...] = (contrast, late, sources, constants, refusals)
    results: dict[str, Results] = {}
    for gather_mode in GATHER_MODES:
        for repetition in range(2):  # the second run must give the same bits
            key = gather_mode if repetition == 0 else f"{gather_mode} again"
            results[key] = {}
            for job in jobs:
                results[key].update(job(rank, world_size, gather_mode))
    torch.save(results, out / f"{rank}.pt")
    dist.barrier()
    dist.destroy_process_group()


def run_group(out: Path, world_size: int) -> None:
    """Fork the ranks, so that they need not import anything again."""
    out.mkdir()
    fork = mp.get_context("fork").Process
    arguments = (str(out / "store"), out, world_size)
    ranks = [fork(target=run_rank, args=(rank, *arguments)) for rank in range(world_size)]
    for process in ranks:
        process.start()
    for process in ranks:
        process.join()
        if process.exitcode:
            sys.exit(f"a rank of {world_size} ended with exit code {process.exitcode}")


def run_rank(rank: int, store: str, out: Path, world_size: int) -> None:
    main(store, out, rank, world_size)
    exit_now(0)


if __name__ == "__main__":
    # Tests of the engine import this module without the trainer, so import it here.
    from gigabatch.trainer.distributed import exit_now

    for size in map(int, sys.argv[2:]):
        run_group(Path(sys.argv[1], str(size)), size)
