"""The `triton` back end: one kernel makes a block of scores and, in its epilogue, everything that a
panel's terms want of it; the gradient's two products are the BLAS's.

No score is stored, unless a `ScoreCache` has room. In the backward pass the gradient G of a panel
is written after everything has been taken off it: in bf16 for bf16 inputs, else in float32 (an
fp16 G would underflow). float64, and scores that have no kernel here, go to `tiled`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import astuple, dataclass, fields, replace
from typing import Any

import torch
import triton
from torch import Tensor
from triton.runtime.errors import OutOfResources

from gigabatch.kernels import tiled
from gigabatch.kernels.cache import ScoreCache
from gigabatch.kernels.fused import kernels
from gigabatch.kernels.fused.blocks import LOG2E
from gigabatch.kernels.fused.kernels import At, Group, Setup, Term
from gigabatch.kernels.fused.maxsim import FusedMaxSim
from gigabatch.kernels.fused.rules import multiplies, steps
from gigabatch.kernels.maxsim import MaxSim
from gigabatch.kernels.rules import AbsDiff, Rule, Table
from gigabatch.kernels.scores import Dot, GatedCosine, Score
from gigabatch.kernels.sources import Panel
from gigabatch.kernels.tiled import Part

PANEL = (8192, 32768)  # rows and keys of a launch: half a GiB of G in bf16
MOST = 16  # of a row's best keys that are searched here
INTERPRETED = bool(triton.knobs.runtime.interpret)


@dataclass(frozen=True)
class Config:
    """Rows, keys and width of a block; warps; stages of its pipeline; rows of blocks together."""

    bm: int
    bn: int
    bd: int
    warps: int
    stages: int
    group: int = 8


# The first that fits the GPU's shared memory is taken, so that two runs agree; `tune` may choose
# another. By whether any product is in float32.
CONFIGS = {
    False: [Config(128, 128, 64, 8, 3), Config(128, 256, 64, 8, 3), Config(128, 128, 64, 4, 3),
            Config(128, 64, 64, 4, 4), Config(64, 128, 32, 4, 4)],
    True: [Config(64, 128, 32, 8, 2), Config(128, 128, 32, 8, 2), Config(64, 64, 32, 4, 2)],
}  # fmt: skip
_CHOSEN: dict[tuple[Any, ...], Config] = {}


def sweep(
    score: Score, panel: Panel, parts: Sequence[Part], drows: Sequence[Tensor] = (),
    dk: Tensor | None = None, cache: ScoreCache | None = None,
) -> None:  # fmt: skip
    """See `tiled.sweep`."""
    if not _has_kernel(score, panel):
        tiled.sweep(fit(score, panel), panel, parts, drows, dk, cache)
        return
    learns, kept = dk is not None, None
    if cache is not None:
        kept = cache.rows(score, panel, torch.float32, PANEL[0], learns)
    for rows, columns in _panels(score, panel):
        block = _Block(score, panel, rows, columns)
        grads = block.run(parts, learns, None if kept is None else kept.at(rows, columns))
        if dk is not None:
            block.pull(grads, drows, dk)


def top(score: Score, panel: Panel, rule: Rule, values: Tensor, index: Tensor) -> None:
    """See `tiled.top`."""
    k = values.shape[1]
    if not _has_kernel(score, panel) or k > MOST:
        tiled.top(fit(score, panel), panel, rule, values, index)
        return
    for rows, columns in _panels(score, panel):
        found, number = _Block(score, panel, rows, columns).best(rule, k)
        together = torch.cat([values[rows], found], 1)
        values[rows], at = together.topk(k, 1)
        index[rows] = torch.cat([index[rows], number], 1).gather(1, at)


def fit(score: Score, panel: Panel) -> Score:
    """See `tiled.fit`."""
    if isinstance(score, MaxSim) and score.operands[0].dtype != torch.float64:
        return FusedMaxSim(score) if FusedMaxSim.fits(panel.keys) else score
    return score


def tune(d: int, dtype: torch.dtype, rows: int = 16384) -> dict[str, Config]:
    """Time the short list on this GPU and use the fastest for width `d` from now on, in this
    process. Another block sums in another order: runs that must agree to the last bit must make
    the same choice. Returns it, "forward" and "backward"."""
    q, k = (torch.randn(rows, d, dtype=dtype, device="cuda") / d**0.5 for _ in range(2))
    scale, z = q.new_ones((), dtype=torch.float32), q.new_zeros(rows, dtype=torch.float32)
    chosen = {}
    for learns in (False, True):
        given = {"z": z, "g": z + 1, "dscale": torch.zeros_like(scale)} if learns else {"out": z}
        parts = [Part(on_rows, "lse", (), scale, **given) for on_rows in (True, False)]
        outputs = ([torch.zeros_like(q)], torch.zeros_like(k)) if learns else ()
        times: dict[Config, float] = {}
        for config in CONFIGS[dtype == torch.float32]:
            _CHOSEN[q.device, dtype == torch.float32, d, learns] = config
            try:
                work = lambda: sweep(Dot(q), Panel(k, {}, 0), parts, *outputs)  # noqa: B023, E731
                times[config] = triton.testing.do_bench(work, return_mode="median")
            except OutOfResources:
                continue
        best = min(times, key=lambda config: times[config])
        _CHOSEN[q.device, dtype == torch.float32, d, learns] = best
        chosen["backward" if learns else "forward"] = best
    return chosen


def _has_kernel(score: Score, panel: Panel) -> bool:
    kinds = {panel.keys.dtype, *(operand.dtype for operand in score.operands)}
    return isinstance(score, Dot | GatedCosine) and torch.float64 not in kinds


def _panels(score: Score, panel: Panel) -> Iterator[tuple[slice, slice]]:
    first, stop, _ = panel.rows.indices(len(score.operands[0]))
    for start in range(first, stop, PANEL[0]):
        for left in range(0, len(panel.keys), PANEL[1]):
            yield (slice(start, min(start + PANEL[0], stop)),
                   slice(left, min(left + PANEL[1], len(panel.keys))))  # fmt: skip


class _Block:
    """Some rows and some keys: what one launch works on."""

    def __init__(self, score: Score, panel: Panel, rows: slice, columns: slice) -> None:
        self.rows, self.columns, self.keys = rows, columns, panel.cut(columns)
        self.operands = [operand.detach()[rows].contiguous() for operand in score.operands]
        self.gated, self.k = isinstance(score, GatedCosine), self.keys.keys.contiguous()
        kinds = {t.dtype for t in (self.k, *self.operands)}
        self.wide, self.narrow = len(kinds) > 1 or torch.float32 in kinds, kinds == {torch.bfloat16}
        self.args: list[Tensor] = []

    def run(
        self, parts: Sequence[Part], learns: bool, store: Tensor | None
    ) -> tuple[Tensor, Tensor | None] | None:
        """Adds results to the parts; with `learns`, returns the gradients of the products. `store`:
        where scores are kept, or with `learns` taken from."""

        def launch(config: Config) -> Any:
            self.args, merges = [], list[Callable[[], None]]()
            groups, common = self._groups(parts, config, merges)
            m, n = len(self.operands[0]), len(self.k)
            kind = torch.bfloat16 if self.narrow else torch.float32
            grads = [self.k.new_empty(m, n, dtype=kind) for _ in range(learns * (1 + self.gated))]
            first, second, *_ = *grads, self.k, self.k  # what is not used must be something
            how = None if store is None else "loaded" if learns else "stored"
            self._launch(
                kernels.sweep, config, self.k if store is None else store,
                first, second, tuple(self.args), m, n,
                n if store is None else store.stride(0), groups, common, how, learns,
            )  # fmt: skip
            return merges, grads

        merges, grads = self._with_config(launch, learns, [part.rule for part in parts])
        for merge in merges:
            merge()
        return grads

    def best(self, rule: Rule, k: int) -> tuple[Tensor, Tensor]:
        """[rows, blocks x k]: the best scores of each block that the rule allows, their keys."""

        def launch(config: Config) -> tuple[Tensor, Tensor]:
            m, n = len(self.operands[0]), len(self.k)
            shape = (triton.cdiv(n, config.bn), k, m)
            values = self.k.new_empty(shape, dtype=torch.float32)
            index, self.args = self.k.new_empty(shape, dtype=torch.int64), [self.k]
            # Log-weights do not count here.
            masks = [clause for clause in rule if not isinstance(clause, Table | AbsDiff)]
            program = tuple(
                step for step in steps((*masks, *self.keys.only), self.rows, self.keys, self._place)
                if step.use != "weigh"
            )  # fmt: skip
            self._launch(
                kernels.best, config, values, index, tuple(self.args), m, n,
                self.keys.offset, Group(program), k,
            )  # fmt: skip
            return values.flatten(0, 1).T, index.flatten(0, 1).T

        return self._with_config(launch, False, [rule])

    def pull(self, grads: Any, drows: Sequence[Tensor], dk: Tensor) -> None:
        """Take the gradients of the products to the operands and the keys."""
        dk, k = dk[self.columns], self.k
        _add_product(drows[0][self.rows], grads[0], k)
        _add_product(dk, grads[0].T, self.operands[0])
        if self.gated:
            k = k.float()
            _add_product(drows[1][self.rows], grads[1], k.square())
            dk.addcmul_(k, grads[1].T @ self.operands[1].float(), value=2)

    def _launch(self, kernel: Any, config: Config, *arguments: Any) -> None:
        m, n, d = len(self.operands[0]), len(self.k), self.k.shape[1]
        bm, bn, bd, warps, stages, group = astuple(config)
        full = m % bm == 0 and n % bn == 0
        setup = Setup(bm, bn, bd, group, d, self.gated, self.wide or INTERPRETED, full)
        with torch.cuda.device_of(self.k):  # a launch goes to the current device
            kernel[(triton.cdiv(m, bm) * triton.cdiv(n, bn),)](
                self.operands[0], self.operands[-1], self.k, *arguments, setup, num_warps=warps,
                num_stages=stages,
            )  # fmt: skip

    def _with_config(
        self, launch: Callable[[Config], Any], learns: bool, rules: Sequence[Rule]
    ) -> Any:
        """Launch with what `tune` chose for this kind of work, or else the first that fits."""
        wide = self.wide or any(multiplies(rule) for rule in rules)
        key = (self.k.device, wide, self.k.shape[1], learns)
        chosen = [_CHOSEN[key]] if key in _CHOSEN else []
        for config in chosen + CONFIGS[wide]:
            try:
                return launch(config)
            except OutOfResources:
                continue
        raise RuntimeError(f"no block of {CONFIGS[wide]} fits this GPU's shared memory; use "
                           "backend='tiled'")  # fmt: skip

    def _place(self, value: Tensor) -> int:
        kind = torch.int8 if value.dtype == torch.bool else value.dtype
        self.args.append(value.to(self.k.device, kind).contiguous())
        return len(self.args) - 1

    def _groups(
        self, parts: Sequence[Part], config: Config, merges: list[Callable[[], None]]
    ) -> tuple[tuple[Group, ...], Term | None]:
        """The parts for the compiler, those of a rule together, and their common scale."""
        learning = [part for part in parts if part.g is not None]
        scales = {(p.scale.data_ptr(), p.scale.ndim, p.dscale is None) for p in learning}
        common = None
        if len(scales) == 1 and learning[0].scale.ndim == 0:
            one = replace(learning[0], out=None, dshift=None, dbias=None)
            common = self._term(one, config, merges)
            parts = [replace(part, dscale=None) for part in parts]
        rules: dict[int, list[Part]] = {}
        for part in parts:
            rules.setdefault(id(part.rule), []).append(part)
        groups = []
        for members in rules.values():
            rule = (*members[0].rule, *self.keys.only)
            terms = tuple(self._term(part, config, merges) for part in members)
            program = steps(rule, self.rows, self.keys, self._place)
            equal = bool(program) and (program[0].kind, program[0].use) == ("eq", "and")
            groups.append(Group(program, terms, equal and all(p.phi != "lse" for p in members)))
        return tuple(groups), common

    def _term(self, part: Part, config: Config, merges: list[Callable[[], None]]) -> Term:
        names = [field.name for field in fields(Term)[2:]]
        places: Any = [self._field(part, name, config, merges) for name in names]
        return Term(part.phi, part.on_rows, *places)

    def _field(
        self, part: Part, name: str, config: Config, merges: list[Callable[[], None]]
    ) -> At | None:
        """Place something of a part; for a result, partial ones, which `merges` then adds to it."""
        value = getattr(part, name)
        if value is None:
            return None
        on_rows = part.on_rows != name.endswith("bias") or value.ndim == 0
        span = self.rows if on_rows else self.columns
        side = "one" if value.ndim == 0 else "rows" if on_rows else "keys"
        if name != "out" and not name.startswith("d"):
            return At(self._place(value[span] if value.ndim else value), side)
        across = (len(self.k), config.bn) if on_rows else (len(self.operands[0]), config.bm)
        is_lse = name == "out" and part.phi == "lse"
        shape = (1 + is_lse, triton.cdiv(*across), span.stop - span.start)
        partial = self.k.new_zeros(shape, dtype=torch.float32)

        def merge() -> None:
            if is_lse:
                most = partial[0].amax(0)
                most.masked_fill_(most == -torch.inf, 0)  # nothing at all: the sum is 0
                total = partial[1].mul_(partial[0].sub_(most).exp2_()).sum(0)
                z = (total.log2_() + most) / LOG2E.value
                value[span] = torch.logaddexp(value[span], z)
            elif value.ndim == 0:
                value.add_(partial.sum().to(value.device))
            else:
                value[span] += partial[0].sum(0)

        merges.append(merge)
        return At(self._place(partial), side)


def _add_product(total: Tensor, a: Tensor, b: Tensor) -> None:
    """total += a b, in float32 whatever the inputs."""
    if a.is_cuda and a.dtype == b.dtype != torch.float32:
        torch.addmm(total, a, b, out_dtype=torch.float32, out=total)
    else:
        total.addmm_(a.float(), b.float())
