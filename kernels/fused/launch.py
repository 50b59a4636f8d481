"""Host side of back end `triton`.

One kernel computes a block of scores and, in its epilogue, all reductions over it. The BLAS
computes the gradient's two products. No score is stored, unless a `ScoreCache` has room. In the
backward pass the gradient G is rounded only after all terms have been subtracted: to bf16 for bf16
inputs; otherwise it stays float32, because an fp16 G would underflow. float64 inputs, and scores
without a kernel here, use `tiled`.
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
from gigabatch.kernels.fused.kernels import (
    Argument,
    BlockConfig,
    Group,
    KernelOptions,
    SharedScale,
    Term,
)
from gigabatch.kernels.fused.maxsim import INTERPRETED, FusedMaxSim
from gigabatch.kernels.fused.rules import Step, steps
from gigabatch.kernels.maxsim import MaxSim
from gigabatch.kernels.rules import AbsDiff, Rule, Table
from gigabatch.kernels.scores import Dot, GatedCosine, Score
from gigabatch.kernels.sources import KeyBlock
from gigabatch.kernels.tiled import Reduction

LAUNCH_SHAPE = (4096, 32768)  # rows and keys of a launch: a quarter of a GiB of G in bf16
MAX_TOP_K = 8  # most keys per row that the kernel finds; `tiled` finds more
# Block shapes, by whether any product is in float32. The first one that fits the GPU's shared
# memory is used, so that two runs give the same bits; `tune` may choose a different one.
CONFIGS = {
    False: [
        BlockConfig(128, 128, 64, 8, 3),
        BlockConfig(128, 256, 64, 8, 3),
        BlockConfig(128, 128, 64, 4, 3),
        BlockConfig(128, 64, 64, 4, 4),
        BlockConfig(64, 128, 32, 4, 4),
    ],
    True: [
        BlockConfig(64, 128, 32, 8, 2),
        BlockConfig(128, 128, 32, 8, 2),
        BlockConfig(64, 64, 32, 4, 2),
    ],
}
_CHOSEN: dict[tuple[Any, ...], BlockConfig] = {}
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


def tune(d: int, dtype: torch.dtype, rows: int = 4096) -> dict[str, BlockConfig]:
    """Time the block shapes of `CONFIGS` on this GPU; this process then uses the fastest for `d`.

    A different block shape sums in a different order: runs that must agree bit for bit must use the
    same shape. Compiling each takes seconds.

    Args:
        d: Width of the vectors.
        dtype: Dtype of the vectors.
        rows: Number of rows and of keys of the timed problem.

    Returns:
        The chosen block shapes, "forward" and "backward".
    """
    q, k = (torch.randn(rows, d, dtype=dtype, device="cuda") / d**0.5 for _ in range(2))
    scale, z = q.new_ones((), dtype=torch.float32), q.new_zeros(rows, dtype=torch.float32)
    launch = _Launch(Dot(q), KeyBlock(k, {}, 0), slice(0, rows), slice(0, rows))
    chosen = {}
    for backward in (False, True):
        learned = {"z": z, "g": z + 1, "dscale": torch.zeros_like(scale)}
        tensors = learned if backward else {"out": z}
        reductions = [Reduction(on_rows, "lse", (), scale, **tensors) for on_rows in (True, False)]
        times: dict[BlockConfig, float] = {}
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
    """No block shape of `CONFIGS` fits this GPU's shared memory."""


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
    """The rows and keys of a block that one kernel launch processes.

    `wide`: products are float32. `narrow`: all inputs are bf16, and so is G.
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
        configs: Sequence[BlockConfig] = (),
    ) -> Sequence[Tensor]:  # fmt: skip
        """Add results to the reductions; with `backward`, return the gradients of the products.

        Scores are written to `cached`, or with `backward` read from it. `configs` are the block
        shapes to try.
        """
        rules = {id(reduction.rule): self._steps(reduction.rule) for reduction in reductions}
        rule_arguments = len(self.args)
        dtype = torch.bfloat16 if self.narrow else torch.float32

        def launch(config: BlockConfig) -> tuple[list[Callable[[], None]], list[Tensor]]:
            del self.args[rule_arguments:]
            merges: list[Callable[[], None]] = []
            groups, shared = self._groups(reductions, rules, config, merges)
            unused = self.k  # placeholder: Triton needs a tensor for every pointer argument
            count = backward * (1 + self.gated)
            grads = [self.k.new_empty(self.m, self.n, dtype=dtype) for _ in range(count)]
            cache_use = None if cached is None else "loaded" if backward else "stored"
            self._start(
                kernels.sweep, config, unused if cached is None else cached,
                *[*grads, unused, unused][:2], tuple(self.args), self.m, self.n,
                self.n if cached is None else cached.stride(0), groups, shared, cache_use, backward,
            )  # fmt: skip
            return merges, grads

        merges, grads = self._with_config(launch, backward, rules.values(), configs)
        for merge in merges:
            merge()
        return grads

    def best(self, rule: Rule, k: int) -> tuple[Tensor, Tensor]:
        """Return each block's k best scores that the rule allows, [rows, blocks x k], and the
        global indices of their keys."""
        # Ignore log-weights and the masks (`only`) that restrict them.
        masks = [clause for clause in rule if not isinstance(clause, Table | AbsDiff)]
        program = tuple(step for step in self._steps(masks) if step.use != "weigh")

        def launch(config: BlockConfig) -> tuple[Tensor, Tensor]:
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

    def _start(self, kernel: Any, config: BlockConfig, *arguments: Any) -> None:
        full = self.m % config.bm == 0 and self.n % config.bn == 0
        options = KernelOptions(
            **vars(config), d=self.k.shape[1], gated=self.gated, wide=self.wide or INTERPRETED,
            full=full,
        )  # fmt: skip
        blocks = triton.cdiv(self.m, config.bm) * triton.cdiv(self.n, config.bn)
        with torch.cuda.device_of(self.k):  # a kernel runs on the current device
            kernel[(blocks,)](
                self.operands[0], self.operands[-1], self.k, *arguments, options,
                num_warps=config.warps, num_stages=config.stages,
            )  # fmt: skip

    def _with_config(
        self, launch: Callable[[BlockConfig], T], backward: bool, rules: Iterable[tuple[Step, ...]],
        configs: Sequence[BlockConfig] = (),
    ) -> T:  # fmt: skip
        """Launch with the first block shape that fits, starting with the one that `tune` chose."""
        # Products in a rule are also float32.
        products = any(step.kind in ("soft", "at most") for rule in rules for step in rule)
        key = (self.k.device, self.wide or products, self.k.shape[1], backward)
        chosen = [_CHOSEN[key]] if key in _CHOSEN else []
        for config in configs or (*chosen, *CONFIGS[self.wide or products]):
            try:
                return launch(config)
            except OutOfResources:
                continue
        raise NoBlockFits("no block shape of kernels/fused/launch.py fits this GPU's shared memory;"
                          " use backend='tiled'")  # fmt: skip

    def _add_argument(self, value: Tensor) -> int:
        """Add a tensor to the kernel's arguments; return its index."""
        half = value.dtype in (torch.bfloat16, torch.float16)
        dtype = torch.float32 if half else torch.int8 if value.dtype == torch.bool else value.dtype
        self.args.append(value.to(self.k.device, dtype).contiguous())
        return len(self.args) - 1

    def _steps(self, rule: Rule) -> tuple[Step, ...]:
        return steps((*rule, *self.keys.clauses), self.rows, self.keys, self._add_argument)

    def _groups(
        self, reductions: Sequence[Reduction], rules: dict[int, tuple[Step, ...]],
        config: BlockConfig, merges: list[Callable[[], None]],
    ) -> tuple[tuple[Group, ...], SharedScale | None]:  # fmt: skip
        """Return the reductions as compile-time constants, grouped by rule; and the scale that all
        of them share, or None."""
        differentiated = [reduction for reduction in reductions if reduction.g is not None]
        shared = None
        one_scale = len({(id(r.scale), r.dscale is None) for r in differentiated}) == 1
        if one_scale and differentiated[0].scale.ndim == 0:
            one = differentiated[0]
            arguments: Any = [
                self._argument(one, name, config, merges) for name in ("scale", "dscale")
            ]
            shared = SharedScale(*arguments)
            reductions = [replace(reduction, dscale=None) for reduction in reductions]
        names, groups = [field.name for field in fields(Term)[2:]], []
        for key, rule in rules.items():
            members = [reduction for reduction in reductions if id(reduction.rule) == key]
            terms = []
            for r in members:
                arguments = [self._argument(r, name, config, merges) for name in names]
                terms.append(Term(r.phi, r.on_rows, *arguments))
            equal = bool(rule) and (rule[0].kind, rule[0].use) == ("eq", "and")
            groups.append(Group(rule, tuple(terms), equal and all(r.phi != "lse" for r in members)))
        return tuple(groups), shared

    def _argument(
        self, reduction: Reduction, name: str, config: BlockConfig, merges: list[Callable[[], None]]
    ) -> Argument | None:
        """Add an attribute of a reduction to the kernel's arguments. For an output, add a buffer of
        partial results and append to `merges` a function that merges them."""
        value = getattr(reduction, name)
        if value is None:
            return None
        on_rows = reduction.on_rows != name.endswith("bias") or value.ndim == 0
        span = self.rows if on_rows else self.columns
        side = "one" if value.ndim == 0 else "rows" if on_rows else "keys"
        if name != "out" and not name.startswith("d"):
            return Argument(self._add_argument(value[span] if value.ndim else value), side)
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
        return Argument(self._add_argument(partial), side)


def _add_product(total: Tensor, a: Tensor, b: Tensor) -> None:
    """Compute total += a b in float32, for inputs of any dtype."""
    if a.is_cuda and a.dtype == b.dtype != torch.float32:
        torch.addmm(total, a, b, out_dtype=torch.float32, out=total)
    else:
        total.addmm_(a.float(), b.float())
