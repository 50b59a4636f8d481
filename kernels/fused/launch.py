"""The `triton` back end from the host: one kernel makes a block of scores and, in its epilogue,
everything that a panel's terms want of it; the gradient's two products are the BLAS's.

No score is stored, unless a `ScoreCache` has room. In the backward pass the gradient G of a panel
is written after everything has been taken off it: in bf16 for bf16 inputs, else in float32 (an
fp16 G would underflow). float64, and scores that have no kernel here, go to `tiled`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import fields, replace
from typing import Any

import torch
import triton
from torch import Tensor
from triton.runtime.errors import OutOfResources

from gigabatch.kernels import tiled
from gigabatch.kernels.cache import ScoreCache, block_of
from gigabatch.kernels.fused import kernels
from gigabatch.kernels.fused.kernels import At, Common, Config, Group, Setup, Term
from gigabatch.kernels.fused.maxsim import INTERPRETED, FusedMaxSim
from gigabatch.kernels.fused.rules import Step, steps
from gigabatch.kernels.maxsim import MaxSim
from gigabatch.kernels.rules import AbsDiff, Rule, Table
from gigabatch.kernels.scores import Dot, GatedCosine, Score
from gigabatch.kernels.sources import Panel
from gigabatch.kernels.tiled import Part

PANEL = (4096, 32768)  # rows and keys of a launch: a quarter of a GiB of G in bf16
MOST = 8  # of a row's best keys that are searched here
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
    learns, kept, first = bool(drows), None, panel.rows.indices(len(score.operands[0]))[0]
    if cache is not None:
        kept = cache.rows(score, panel, torch.float32, PANEL[0], learns)
    for rows, columns in _cuts(score, panel):
        part = _Part(score, panel, rows, columns)
        grads = part.run(parts, learns, block_of(kept, first, rows, columns))
        if learns:
            part.pull(grads, drows, dk)


def top(score: Score, panel: Panel, rule: Rule, values: Tensor, index: Tensor) -> None:
    """See `tiled.top`."""
    k = values.shape[1]
    if not _has_kernel(score, panel) or k > MOST:
        tiled.top(fit(score, panel), panel, rule, values, index)
        return
    for rows, columns in _cuts(score, panel):
        found = _Part(score, panel, rows, columns).best(rule, k)
        tiled.merge_top(values[rows], index[rows], *found)


def fit(score: Score, panel: Panel) -> Score:
    """See `tiled.fit`."""
    fits = isinstance(score, MaxSim) and FusedMaxSim.fits(score, panel.keys)
    return FusedMaxSim(score) if fits else score  # type: ignore[arg-type]


def tune(d: int, dtype: torch.dtype, rows: int = 4096) -> dict[str, Config]:
    """Time the short list on this GPU and use the fastest for width `d` from now on, in this
    process. Another block sums in another order: runs that must agree to the last bit must make
    the same choice. Returns it, "forward" and "backward". Compiles each, for seconds."""
    q, k = (torch.randn(rows, d, dtype=dtype, device="cuda") / d**0.5 for _ in range(2))
    scale, z = q.new_ones((), dtype=torch.float32), q.new_zeros(rows, dtype=torch.float32)
    part = _Part(Dot(q), Panel(k, {}, 0), slice(0, rows), slice(0, rows))
    chosen = {}
    for learns in (False, True):
        given = {"z": z, "g": z + 1, "dscale": torch.zeros_like(scale)} if learns else {"out": z}
        parts = [Part(on_rows, "lse", (), scale, **given) for on_rows in (True, False)]
        times: dict[Config, float] = {}
        for config in CONFIGS[part.wide]:
            try:
                work = lambda: part.run(parts, learns, None, [config])  # noqa: B023, E731
                times[config] = triton.testing.do_bench(work, return_mode="median")
            except NoBlockFits:
                continue
        best = min(times, key=lambda config: times[config])
        chosen["backward" if learns else "forward"] = best
    for name, config in chosen.items():
        _CHOSEN[q.device, part.wide, d, name == "backward"] = config
    return chosen


class NoBlockFits(RuntimeError):
    pass


def _has_kernel(score: Score, panel: Panel) -> bool:
    kinds = {panel.keys.dtype, *(operand.dtype for operand in score.operands)}
    return isinstance(score, Dot | GatedCosine) and torch.float64 not in kinds


def _cuts(score: Score, panel: Panel) -> Iterator[tuple[slice, slice]]:
    first, stop, _ = panel.rows.indices(len(score.operands[0]))
    for start in range(first, stop, PANEL[0]):
        for left in range(0, len(panel.keys), PANEL[1]):
            yield (slice(start, min(start + PANEL[0], stop)),
                   slice(left, min(left + PANEL[1], len(panel.keys))))  # fmt: skip


class _Part:
    """Some rows and some keys of a panel: what one launch works on."""

    def __init__(self, score: Score, panel: Panel, rows: slice, columns: slice) -> None:
        self.rows, self.columns, self.keys = rows, columns, panel.cut(columns)
        self.operands = [operand.detach()[rows].contiguous() for operand in score.operands]
        self.gated, self.k = isinstance(score, GatedCosine), self.keys.keys.contiguous()
        kinds = {t.dtype for t in (self.k, *self.operands)}
        self.wide, self.narrow = len(kinds) > 1 or torch.float32 in kinds, kinds == {torch.bfloat16}
        self.m, self.n, self.args = len(self.operands[0]), len(self.k), list[Tensor]()

    def run(
        self, parts: Sequence[Part], learns: bool, store: Tensor | None,
        configs: Sequence[Config] = (),
    ) -> Sequence[Tensor]:  # fmt: skip
        """Adds results to the parts; with `learns`, returns the gradients of the products. `store`:
        where scores are kept, or with `learns` taken from. `configs`: to choose from."""
        rules = {id(part.rule): self._steps(part.rule) for part in parts}
        placed = len(self.args)
        kind = torch.bfloat16 if self.narrow else torch.float32

        def launch(config: Config) -> Any:
            del self.args[placed:]
            merges: list[Callable[[], None]] = []
            groups, common = self._groups(parts, rules, config, merges)
            count, none = learns * (1 + self.gated), self.k  # what is not used must be something
            grads = [self.k.new_empty(self.m, self.n, dtype=kind) for _ in range(count)]
            kept = None if store is None else "loaded" if learns else "stored"
            self._start(
                kernels.sweep, config, none if store is None else store,
                *[*grads, none, none][:2], tuple(self.args), self.m, self.n,
                self.n if store is None else store.stride(0), groups, common, kept, learns,
            )  # fmt: skip
            return merges, grads

        merges, grads = self._with_config(launch, learns, rules.values(), configs)
        for merge in merges:
            merge()
        return grads

    def best(self, rule: Rule, k: int) -> tuple[Tensor, Tensor]:
        """[rows, blocks x k]: the best scores of each block that the rule allows, their keys."""
        # Log-weights do not count here, nor what limits them.
        masks = [clause for clause in rule if not isinstance(clause, Table | AbsDiff)]
        program = tuple(step for step in self._steps(masks) if step.use != "weigh")

        def launch(config: Config) -> tuple[Tensor, Tensor]:
            shape = (triton.cdiv(self.n, config.bn), k, self.m)
            values = self.k.new_empty(shape, dtype=torch.float32)
            index = self.k.new_empty(shape, dtype=torch.int64)
            self._start(
                kernels.best, config, values, index, (*self.args, self.k), self.m, self.n,
                self.keys.offset, Group(program), k,
            )  # fmt: skip
            return values.flatten(0, 1).T, index.flatten(0, 1).T

        return self._with_config(launch, False, [program])

    def pull(self, grads: Sequence[Tensor], drows: Sequence[Tensor], dk: Tensor | None) -> None:
        """Take the gradients of the products to the operands and, where they learn, the keys."""
        k = self.k.float() if self.gated else self.k
        _add_product(drows[0][self.rows], grads[0], self.k)
        if self.gated:
            _add_product(drows[1][self.rows], grads[1], k.square())
        if dk is not None:
            dk = dk[self.columns]
            _add_product(dk, grads[0].T, self.operands[0])
            if self.gated:
                dk.addcmul_(k, grads[1].T @ self.operands[1].float(), value=2)

    def _start(self, kernel: Any, config: Config, *arguments: Any) -> None:
        full = self.m % config.bm == 0 and self.n % config.bn == 0
        setup = Setup(
            **vars(config), d=self.k.shape[1], gated=self.gated, wide=self.wide or INTERPRETED,
            full=full,
        )  # fmt: skip
        blocks = triton.cdiv(self.m, config.bm) * triton.cdiv(self.n, config.bn)
        with torch.cuda.device_of(self.k):  # a launch goes to the current device
            kernel[(blocks,)](
                self.operands[0], self.operands[-1], self.k, *arguments, setup,
                num_warps=config.warps, num_stages=config.stages,
            )  # fmt: skip

    def _with_config(
        self, launch: Callable[[Config], Any], learns: bool, rules: Iterable[tuple[Step, ...]],
        configs: Sequence[Config] = (),
    ) -> Any:  # fmt: skip
        """Launch with the first that fits: what `tune` chose for this kind of work comes first. A
        product in a rule is in float32, too."""
        products = any(step.kind in ("soft", "at most") for rule in rules for step in rule)
        key = (self.k.device, self.wide or products, self.k.shape[1], learns)
        chosen = [_CHOSEN[key]] if key in _CHOSEN else []
        for config in configs or (*chosen, *CONFIGS[self.wide or products]):
            try:
                return launch(config)
            except OutOfResources:
                continue
        raise NoBlockFits("no block of kernels/fused/launch.py fits this GPU's shared memory; use "
                          "backend='tiled'")  # fmt: skip

    def _place(self, value: Tensor) -> int:
        half = value.dtype in (torch.bfloat16, torch.float16)
        kind = torch.float32 if half else torch.int8 if value.dtype == torch.bool else value.dtype
        self.args.append(value.to(self.k.device, kind).contiguous())
        return len(self.args) - 1

    def _steps(self, rule: Rule) -> tuple[Step, ...]:
        return steps((*rule, *self.keys.only), self.rows, self.keys, self._place)

    def _groups(
        self, parts: Sequence[Part], rules: dict[int, tuple[Step, ...]], config: Config,
        merges: list[Callable[[], None]],
    ) -> tuple[tuple[Group, ...], Common | None]:  # fmt: skip
        """The parts for the compiler, those of a rule together, and their common scale."""
        learning = [part for part in parts if part.g is not None]
        common = None
        alike = len({(id(p.scale), p.dscale is None) for p in learning}) == 1
        if alike and learning[0].scale.ndim == 0:
            one = learning[0]
            places: Any = [self._field(one, name, config, merges) for name in ("scale", "dscale")]
            common, parts = Common(*places), [replace(part, dscale=None) for part in parts]
        names, groups = [field.name for field in fields(Term)[2:]], []
        for key, rule in rules.items():
            members = [part for part in parts if id(part.rule) == key]
            terms = []
            for p in members:
                places = [self._field(p, name, config, merges) for name in names]
                terms.append(Term(p.phi, p.on_rows, *places))
            equal = bool(rule) and (rule[0].kind, rule[0].use) == ("eq", "and")
            groups.append(Group(rule, tuple(terms), equal and all(p.phi != "lse" for p in members)))
        return tuple(groups), common

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
        blocks = triton.cdiv(self.n, config.bn) if on_rows else triton.cdiv(self.m, config.bm)
        is_lse = name == "out" and part.phi == "lse"
        shape = (blocks, 1 + is_lse, span.stop - span.start)
        partial = self.k.new_zeros(shape, dtype=torch.float32)

        def merge() -> None:
            if is_lse:
                most = partial[:, 0].amax(0)
                most.masked_fill_(most == -torch.inf, 0)  # nothing at all: the sum is 0
                total = partial[:, 0].sub(most).exp_().mul_(partial[:, 1]).sum(0)
                value[span] = torch.logaddexp(value[span], total.log_() + most)
            elif value.ndim == 0:
                value.add_(partial.sum().to(value.device))
            else:
                value[span] += partial[:, 0].sum(0)

        merges.append(merge)
        return At(self._place(partial), side)


def _add_product(total: Tensor, a: Tensor, b: Tensor) -> None:
    """total += a b, in float32 whatever the inputs."""
    if a.is_cuda and a.dtype == b.dtype != torch.float32:
        torch.addmm(total, a, b, out_dtype=torch.float32, out=total)
    else:
        total.addmm_(a.float(), b.float())
