"""Host side of back end `triton`.

One kernel computes a block of scores and, in its epilogue, all reductions over it. The BLAS
computes the gradient's two products. No score is stored, unless a `ScoreCache` has room. In the
backward pass the gradient G is rounded only after everything has been subtracted: to bf16 for bf16
inputs, else it stays float32 (an fp16 G would underflow). float64, and scores without a kernel
here, use `tiled`.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import fields, replace
from typing import Any, TypeVar

import torch
import triton
from torch import Tensor
from triton.runtime.errors import OutOfResources

from gigabatch.kernels import tiled
from gigabatch.kernels.cache import ScoreCache, cached_tile
from gigabatch.kernels.fused import kernels
from gigabatch.kernels.fused.kernels import At, Common, Config, Group, Setup, Term
from gigabatch.kernels.fused.maxsim import INTERPRETED, FusedMaxSim
from gigabatch.kernels.fused.rules import Step, steps
from gigabatch.kernels.maxsim import MaxSim
from gigabatch.kernels.rules import AbsDiff, Rule, Table
from gigabatch.kernels.scores import Dot, GatedCosine, Score
from gigabatch.kernels.sources import KeyBlock
from gigabatch.kernels.tiled import Reduction

LAUNCH_SHAPE = (4096, 32768)  # rows and keys of a launch: a quarter of a GiB of G in bf16
MAX_TOP_K = 8  # keys per row that the kernel finds; more are left to `tiled`
# By whether any product is in float32. The first one that fits the GPU's shared memory is used, so
# that two runs agree; `tune` may choose another.
CONFIGS = {
    False: [Config(128, 128, 64, 8, 3), Config(128, 256, 64, 8, 3), Config(128, 128, 64, 4, 3),
            Config(128, 64, 64, 4, 4), Config(64, 128, 32, 4, 4)],
    True: [Config(64, 128, 32, 8, 2), Config(128, 128, 32, 8, 2), Config(64, 64, 32, 4, 2)],
}  # fmt: skip
_CHOSEN: dict[tuple[Any, ...], Config] = {}
T = TypeVar("T")


def sweep(
    score: Score, block: KeyBlock, reductions: Sequence[Reduction], drows: Sequence[Tensor] = (),
    dk: Tensor | None = None, cache: ScoreCache | None = None,
) -> None:  # fmt: skip
    """Accumulate all reductions over one key block; see `tiled.sweep`."""
    if not _has_kernel(score, block):
        tiled.sweep(specialize(score, block), block, reductions, drows, dk, cache)
        return
    backward, cached, first = bool(drows), None, block.rows.indices(len(score.operands[0]))[0]
    if cache is not None:
        cached = cache.first_rows(score, block, torch.float32, LAUNCH_SHAPE[0], backward)
    for rows, columns in _launch_ranges(score, block):
        launch = _Launch(score, block, rows, columns)
        grads = launch.run(reductions, backward, cached_tile(cached, first, rows, columns))
        if backward:
            launch.pull(grads, drows, dk)


def update_top_k(
    score: Score, block: KeyBlock, rule: Rule, top_scores: Tensor, top_indices: Tensor
) -> None:
    """Merge one block of keys into each query's top k; see `tiled.update_top_k`."""
    k = top_scores.shape[1]
    if not _has_kernel(score, block) or k > MAX_TOP_K:
        tiled.update_top_k(specialize(score, block), block, rule, top_scores, top_indices)
        return
    for rows, columns in _launch_ranges(score, block):
        candidates = _Launch(score, block, rows, columns).best(rule, k)
        tiled.merge_top_k(top_scores[rows], top_indices[rows], *candidates)


def specialize(score: Score, block: KeyBlock) -> Score:
    """Return `FusedMaxSim` for a `MaxSim` whose items fit, else the score unchanged."""
    if isinstance(score, MaxSim) and FusedMaxSim.fits(score, block.keys):
        return FusedMaxSim(score)
    return score


def tune(d: int, dtype: torch.dtype, rows: int = 4096) -> dict[str, Config]:
    """Time the blocks of `CONFIGS` on this GPU and use the fastest for width `d` in this process.

    Another block sums in another order: runs that must agree to the bit must use the same block.
    Compiling each takes seconds.

    Args:
        d: Width of the vectors.
        dtype: Their dtype.
        rows: Rows and keys of the timed problem.

    Returns:
        The chosen blocks, "forward" and "backward".
    """
    q, k = (torch.randn(rows, d, dtype=dtype, device="cuda") / d**0.5 for _ in range(2))
    scale, z = q.new_ones((), dtype=torch.float32), q.new_zeros(rows, dtype=torch.float32)
    launch = _Launch(Dot(q), KeyBlock(k, {}, 0), slice(0, rows), slice(0, rows))
    chosen = {}
    for backward in (False, True):
        learned = {"z": z, "g": z + 1, "dscale": torch.zeros_like(scale)}
        tensors = learned if backward else {"out": z}
        reductions = [Reduction(on_rows, "lse", (), scale, **tensors) for on_rows in (True, False)]
        times: dict[Config, float] = {}
        for config in CONFIGS[launch.wide]:
            try:
                work = lambda: launch.run(reductions, backward, None, [config])  # noqa: B023, E731
                times[config] = triton.testing.do_bench(work, return_mode="median")
            except NoBlockFits:
                continue
        best = min(times, key=lambda config: times[config])
        chosen["backward" if backward else "forward"] = best
    for name, config in chosen.items():
        _CHOSEN[q.device, launch.wide, d, name == "backward"] = config
    return chosen


class NoBlockFits(RuntimeError):
    """No block of `CONFIGS` fits this GPU's shared memory."""


def _has_kernel(score: Score, block: KeyBlock) -> bool:
    dtypes = {block.keys.dtype, *(operand.dtype for operand in score.operands)}
    return isinstance(score, Dot | GatedCosine) and torch.float64 not in dtypes


def _launch_ranges(score: Score, block: KeyBlock) -> Iterator[tuple[slice, slice]]:
    """Yield the ranges of rows and keys of each launch."""
    first, stop, _ = block.rows.indices(len(score.operands[0]))
    height, width = LAUNCH_SHAPE
    for start in range(first, stop, height):
        for left in range(0, len(block.keys), width):
            yield (slice(start, min(start + height, stop)),
                   slice(left, min(left + width, len(block.keys))))  # fmt: skip


class _Launch:
    """Some rows and some keys of a block, which one kernel launch processes.

    `wide`: products are float32. `narrow`: all inputs are bf16, and G is, too.
    """

    def __init__(self, score: Score, block: KeyBlock, rows: slice, columns: slice) -> None:
        self.rows, self.columns, self.keys = rows, columns, block.slice(columns)
        self.operands = [operand.detach()[rows].contiguous() for operand in score.operands]
        self.gated, self.k = isinstance(score, GatedCosine), self.keys.keys.contiguous()
        dtypes = {t.dtype for t in (self.k, *self.operands)}
        self.wide = len(dtypes) > 1 or torch.float32 in dtypes
        self.narrow = dtypes == {torch.bfloat16}
        self.m, self.n, self.args = len(self.operands[0]), len(self.k), list[Tensor]()

    def run(
        self, reductions: Sequence[Reduction], backward: bool, cached: Tensor | None,
        configs: Sequence[Config] = (),
    ) -> Sequence[Tensor]:  # fmt: skip
        """Add results to the reductions; with `backward`, return the gradients of the products.

        Scores are written to `cached`, or with `backward` read from it. `configs`: blocks to try.
        """
        rules = {id(reduction.rule): self._steps(reduction.rule) for reduction in reductions}
        placed = len(self.args)
        dtype = torch.bfloat16 if self.narrow else torch.float32

        def launch(config: Config) -> tuple[list[Callable[[], None]], list[Tensor]]:
            del self.args[placed:]
            merges: list[Callable[[], None]] = []
            groups, common = self._groups(reductions, rules, config, merges)
            count, unused = backward * (1 + self.gated), self.k  # an argument must be a tensor
            grads = [self.k.new_empty(self.m, self.n, dtype=dtype) for _ in range(count)]
            kept = None if cached is None else "loaded" if backward else "stored"
            self._start(
                kernels.sweep, config, unused if cached is None else cached,
                *[*grads, unused, unused][:2], tuple(self.args), self.m, self.n,
                self.n if cached is None else cached.stride(0), groups, common, kept, backward,
            )  # fmt: skip
            return merges, grads

        merges, grads = self._with_config(launch, backward, rules.values(), configs)
        for merge in merges:
            merge()
        return grads

    def best(self, rule: Rule, k: int) -> tuple[Tensor, Tensor]:
        """Return each block's k best scores that the rule allows, [rows, blocks x k], and the
        keys' global indices."""
        # Log-weights are ignored here, and so is what limits them.
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
        """Add the gradients of the operands and, unless `dk` is None, of the keys."""
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
        with torch.cuda.device_of(self.k):  # a kernel runs on the current device
            kernel[(blocks,)](
                self.operands[0], self.operands[-1], self.k, *arguments, setup,
                num_warps=config.warps, num_stages=config.stages,
            )  # fmt: skip

    def _with_config(
        self, launch: Callable[[Config], T], backward: bool, rules: Iterable[tuple[Step, ...]],
        configs: Sequence[Config] = (),
    ) -> T:  # fmt: skip
        """Launch with the first block that fits, beginning with the one that `tune` chose."""
        # A product in a rule is float32, too.
        products = any(step.kind in ("soft", "at most") for rule in rules for step in rule)
        key = (self.k.device, self.wide or products, self.k.shape[1], backward)
        chosen = [_CHOSEN[key]] if key in _CHOSEN else []
        for config in configs or (*chosen, *CONFIGS[self.wide or products]):
            try:
                return launch(config)
            except OutOfResources:
                continue
        raise NoBlockFits("no block of kernels/fused/launch.py fits this GPU's shared memory; use "
                          "backend='tiled'")  # fmt: skip

    def _place(self, value: Tensor) -> int:
        """Add a tensor to the kernel's arguments; return its place."""
        half = value.dtype in (torch.bfloat16, torch.float16)
        dtype = torch.float32 if half else torch.int8 if value.dtype == torch.bool else value.dtype
        self.args.append(value.to(self.k.device, dtype).contiguous())
        return len(self.args) - 1

    def _steps(self, rule: Rule) -> tuple[Step, ...]:
        return steps((*rule, *self.keys.clauses), self.rows, self.keys, self._place)

    def _groups(
        self, reductions: Sequence[Reduction], rules: dict[int, tuple[Step, ...]], config: Config,
        merges: list[Callable[[], None]],
    ) -> tuple[tuple[Group, ...], Common | None]:  # fmt: skip
        """Return the reductions as compile-time constants, grouped by rule, and the scale that all
        share, if they do."""
        differentiated = [reduction for reduction in reductions if reduction.g is not None]
        common = None
        one_scale = len({(id(r.scale), r.dscale is None) for r in differentiated}) == 1
        if one_scale and differentiated[0].scale.ndim == 0:
            one = differentiated[0]
            places: Any = [self._field(one, name, config, merges) for name in ("scale", "dscale")]
            common = Common(*places)
            reductions = [replace(reduction, dscale=None) for reduction in reductions]
        names, groups = [field.name for field in fields(Term)[2:]], []
        for key, rule in rules.items():
            members = [reduction for reduction in reductions if id(reduction.rule) == key]
            terms = []
            for r in members:
                places = [self._field(r, name, config, merges) for name in names]
                terms.append(Term(r.phi, r.on_rows, *places))
            equal = bool(rule) and (rule[0].kind, rule[0].use) == ("eq", "and")
            groups.append(Group(rule, tuple(terms), equal and all(r.phi != "lse" for r in members)))
        return tuple(groups), common

    def _field(
        self, reduction: Reduction, name: str, config: Config, merges: list[Callable[[], None]]
    ) -> At | None:
        """Place an attribute of a reduction. For a result, place partial results, and append to
        `merges` a function that adds them to it."""
        value = getattr(reduction, name)
        if value is None:
            return None
        on_rows = reduction.on_rows != name.endswith("bias") or value.ndim == 0
        span = self.rows if on_rows else self.columns
        side = "one" if value.ndim == 0 else "rows" if on_rows else "keys"
        if name != "out" and not name.startswith("d"):
            return At(self._place(value[span] if value.ndim else value), side)
        blocks = triton.cdiv(self.n, config.bn) if on_rows else triton.cdiv(self.m, config.bm)
        is_lse = name == "out" and reduction.phi == "lse"
        shape = (blocks, 1 + is_lse, span.stop - span.start)
        partial = self.k.new_zeros(shape, dtype=torch.float32)

        def merge() -> None:
            if is_lse:
                maximum = partial[:, 0].amax(0)
                maximum.masked_fill_(maximum == -torch.inf, 0)  # avoid -inf - -inf = NaN
                total = partial[:, 0].sub(maximum).exp_().mul_(partial[:, 1]).sum(0)
                value[span] = torch.logaddexp(value[span], total.log_() + maximum)
            elif value.ndim == 0:
                value.add_(partial.sum().to(value.device))
            else:
                value[span] += partial[:, 0].sum(0)

        merges.append(merge)
        return At(self._place(partial), side)


def _add_product(total: Tensor, a: Tensor, b: Tensor) -> None:
    """Compute total += a b in float32, for inputs of any dtype."""
    if a.is_cuda and a.dtype == b.dtype != torch.float32:
        torch.addmm(total, a, b, out_dtype=torch.float32, out=total)
    else:
        total.addmm_(a.float(), b.float())
