"""One rank of a gloo group: every case of `cases`, this rank's slices; results saved in OUT.

python loss_ranks.py STORE OUT RANK WORLD_SIZE
"""

from __future__ import annotations

import sys
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.distributed as dist
from dense import Case, make_case

from gigabatch.kernels import contrastive_loss
from gigabatch.trainer.distributed import leave


@dataclass(frozen=True)
class RankCase:
    """A whole batch, and how many of its queries and keys each rank holds."""

    whole: Case
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
    even = (6,) * world_size
    uneven = tuple(3 + 4 * rank for rank in range(world_size))
    falling = uneven[::-1]
    first_empty = (0, *(5,) * (world_size - 1)) if world_size > 1 else even
    last_empty = first_empty[::-1]
    made: dict[str, RankCase] = {}
    for name, queries, keys, ids, symmetric, scale in [
        ("even", even, even, None, True, 10.0),
        ("even, one way", even, even, None, False, 10.0),
        ("uneven", uneven, uneven, None, True, 100.0),
        ("uneven, ids", uneven, uneven, 5, True, 10.0),
        ("few positives", uneven, uneven, 80, True, 10.0),
        ("few positives, one way", uneven, uneven, 80, False, 10.0),
        ("keys dealt otherwise", uneven, falling, 9, True, 10.0),
        ("first rank without rows", first_empty, first_empty, None, True, 10.0),
        ("last rank without rows", last_empty, last_empty, 6, True, 1.0),
        ("one rank without queries, another without keys", first_empty, last_empty, 4, True, 10.0),
    ]:
        whole = make_case(sum(queries), sum(keys), 7, scale, ids, len(made), symmetric)
        made[name] = RankCase(whole.to(torch.float32), queries, keys)
    stranger = make_case(sum(even), sum(even), 7).to(torch.float32)
    number = torch.arange(sum(even))
    nothing = Case(stranger.q, stranger.k, stranger.scale, number, number + 1000)
    made["no positive at all"] = RankCase(nothing, even, even)
    made["half precision"] = RankCase(make_case(20 * world_size, 20 * world_size, 7).to(
        torch.bfloat16), (20,) * world_size, (20,) * world_size)  # fmt: skip
    made["reference"] = RankCase(made["uneven, ids"].whole, uneven, uneven, "reference")
    return made


def main(store: str, out: Path, rank: int, world_size: int) -> None:
    torch.set_num_threads(1)
    dist.init_process_group(
        "gloo", store=dist.FileStore(store, world_size), rank=rank, world_size=world_size
    )
    results = {}
    for name, case in cases(world_size).items():
        whole, (mine_q, mine_k) = case.whole, case.slices(rank)
        q, k, scale = (
            t.clone().requires_grad_() for t in (whole.q[mine_q], whole.k[mine_k], whole.scale)
        )
        value = contrastive_loss(
            q, k, scale,
            ids_q=None if whole.ids_q is None else whole.ids_q[mine_q],
            ids_k=None if whole.ids_k is None else whole.ids_k[mine_k],
            symmetric=whole.symmetric, group=dist.group.WORLD, backend=case.backend,
        )  # fmt: skip
        value.backward()
        results[name] = {"value": value.detach(), "dq": q.grad, "dk": k.grad, "dscale": scale.grad}
    torch.save(results, out / f"{rank}.pt")
    dist.barrier()
    dist.destroy_process_group()


if __name__ == "__main__":
    main(sys.argv[1], Path(sys.argv[2]), int(sys.argv[3]), int(sys.argv[4]))
    leave(0)
