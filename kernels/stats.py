"""Sums of the engine, each in one pass over the scores: `lse_stats` and `pair_sum`.

The backward pass forms, tile by tile, the gradient G of all sums with respect to the scores, and
from it dQ = G K and dK = G^T Q. That is four matrix passes (S; S again; dQ; dK), or three for the
total of a `pair_sum`, whose gradient is known up to a scalar factor in the forward pass. See
docs/engine.md.
"""

from __future__ import annotations

import importlib
import importlib.util
import os
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import reduce
from typing import Any, Literal

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from gigabatch.kernels.cache import ScoreCache
from gigabatch.kernels.rules import Clause, Rule, check_rule
from gigabatch.kernels.scores import Dot, Score
from gigabatch.kernels.sources import KeyBlock, KeySource, Merge, accumulator_dtype, no_autocast
from gigabatch.kernels.tiled import Reduction

BACKENDS = {"reference": "reference", "tiled": "tiled", "triton": "fused"}  # name -> module
Axis = Literal["rows", "columns"]


@dataclass(frozen=True)
class Lse:
    """Log-sum-exp Z_i = log sum_j w_ij exp(scale_i s_ij + bias_j) of each row, or each column.

    Args:
        axis: "rows": i is a row and j a key; "columns": i is a key and j a row.
        scale: 0-dim, or one entry for each result ([M] rows or this rank's [n] keys); may be
            negative. Differentiable.
        bias: None, or one entry for each j (this rank's [n] keys for "rows", [M] for "columns").
            Differentiable.
        rule: The weights w; an empty rule counts all pairs alike.
    """

    axis: Axis
    scale: Tensor
    bias: Tensor | None = None
    rule: Rule = ()


@dataclass(frozen=True)
class Stats:
    """Results of `lse_stats`, one tensor for each `Lse`.

    A tensor is [M] or, for columns, [n] (this rank's keys); at least float32.

    Attributes:
        z: Log-sum-exps; -inf where no pair counts.
        positive: sum_j P_ij (scale_i s_ij + bias_j) for a rule P of positives, else empty.
        weight: sum_j P_ij, without gradient, for a rule P of positives, else empty.
    """

    z: tuple[Tensor, ...]
    positive: tuple[Tensor, ...]
    weight: tuple[Tensor, ...]


def lse_stats(
    score: Score | Tensor, keys: KeySource, lses: Sequence[Lse],
    positives: Rule | Clause | None = None, backend: str | None = None, cache_bytes: int = 0,
) -> Stats:  # fmt: skip
    """Compute log-sum-exps and positive sums of this rank's queries against all keys.

    Differentiable once, with respect to the score's operands, the source's tensors, scales and
    biases. Memory O(M + N), apart from the keys. Under a process group, gradients are those of the
    *sum over ranks* of a function of the results.

    Args:
        score: A score, or queries [M, D] for the dot product.
        keys: Source of N keys.
        lses: Log-sum-exps to compute, in the same passes.
        positives: Rule of the positives, one or several clauses; their log-weights weigh the
            positives. A single `Eq` with few pairs costs nothing per tile.
        backend: "tiled" (plain PyTorch, the default), "triton" (must be requested until it has
            run on a GPU) or "reference" (dense, float64).
        cache_bytes: Memory for scores that the backward pass reuses, saving up to one matrix pass
            in four. Results are bit-identical.

    Returns:
        One result for each entry of `lses`.

    Raises:
        ValueError: if the back end is unknown or cannot run here, or if sizes do not match.
    """
    rules = [] if positives is None else [positives]
    return lse_stats_of_rules(score, keys, lses, rules, backend, cache_bytes)[0]


def lse_stats_of_rules(
    score: Score | Tensor, keys: KeySource, lses: Sequence[Lse],
    positives: Sequence[Rule | Clause], backend: str | None, cache_bytes: int = 0,
) -> list[Stats]:  # fmt: skip
    """Compute `lse_stats` for several rules of positives, in the same four matrix passes."""
    rules: list[Rule] = [p if isinstance(p, Sequence) else (p,) for p in positives]
    reductions, stride = [], 1 + 2 * len(rules)
    for lse in lses:
        if lse.axis not in ("rows", "columns"):
            raise ValueError(f"axis is {lse.axis!r}; choose rows or columns")
        on_rows, constant = lse.axis == "rows", lse.scale.detach()
        reductions.append(Reduction(on_rows, "lse", lse.rule, lse.scale, None, lse.bias))
        for rule in rules:
            reductions.append(Reduction(on_rows, "linear", rule, lse.scale, None, lse.bias))
            reductions.append(Reduction(on_rows, "one", rule, constant))
    out = _run(score, keys, reductions, backend, cache_bytes=cache_bytes)
    columns = [out[i::stride] for i in range(stride)]
    sums = [(columns[1 + 2 * i], columns[2 + 2 * i]) for i in range(len(rules))]
    return [Stats(columns[0], *pair) for pair in sums or [((), ())]]


def pair_sum(
    score: Score | Tensor, keys: KeySource, phi: Literal["softplus", "relu", "step"],
    scale: Tensor, shift: Tensor, bias: Tensor | None = None, rule: Rule = (), *,
    total: bool = False, backend: str | None = None,
) -> Tensor:  # fmt: skip
    """Compute sum_j w_ij phi(scale_i s_ij + shift_i + bias_j) for each row, or their sum.

    Differentiable once, as `lse_stats` is. With `total`, the incoming gradient must be the same on
    every rank.

    Args:
        score: A score, or queries [M, D] for the dot product.
        keys: Source of N keys.
        phi: "softplus" log(1 + e^x); "relu"; or "step" (0 where x < 0, else 1; no gradient).
        scale: 0-dim or [M], differentiable.
        shift: 0-dim or [M], differentiable.
        bias: None or this rank's [n] keys, differentiable.
        rule: Which pairs count, and with what weight.
        total: Return the sum over rows, in three matrix passes instead of four.
        backend: As in `lse_stats`.

    Returns:
        [M], or 0-dim with `total`; at least float32.

    Raises:
        ValueError: as `lse_stats`, and if `phi` is unknown.
    """
    if phi not in ("softplus", "relu", "step"):
        raise ValueError(f"phi is {phi!r}; choose one of softplus, relu, step")
    return _run(score, keys, [Reduction(True, phi, rule, scale, shift, bias)], backend, total)[0]


def load_backend(backend: str | None, like: Tensor) -> Any:
    """Import the module of a back end, by default `tiled`.

    Raises:
        ValueError: if it does not exist or cannot run on the device of `like`.
    """
    name = backend or "tiled"
    if name not in BACKENDS:
        raise ValueError(f"backend is {name!r}; choose one of {', '.join(BACKENDS)}")
    if name == "triton" and importlib.util.find_spec("triton") is None:
        raise ValueError("backend 'triton' needs the package triton: pip install triton")
    if name == "triton" and not like.is_cuda and os.environ.get("TRITON_INTERPRET") != "1":
        raise ValueError("backend 'triton' needs a GPU (to test it: TRITON_INTERPRET=1, slow)")
    return importlib.import_module(f"gigabatch.kernels.{BACKENDS[name]}")


@dataclass(frozen=True)
class _Spec:
    """Arguments of one `_run` call. `grad_in_forward`: the gradient of the single total is computed
    in the forward pass, up to a scalar factor."""

    score: Score
    keys: KeySource
    reductions: Sequence[Reduction]
    engine: Any
    total: bool
    grad_in_forward: bool
    cache: ScoreCache | None

    @property
    def result_dtype(self) -> torch.dtype:
        dtypes = [tensor.dtype for tensor in (*self.score.operands, *self.keys.tensors)]
        return accumulator_dtype(reduce(torch.promote_types, dtypes))

    @property
    def sum_dtype(self) -> torch.dtype:
        """Dtype of logits, sums, and sums of gradients."""
        dtype: torch.dtype = getattr(self.engine, "DTYPE", self.result_dtype)
        return dtype


def _run(
    score: Score | Tensor, keys: KeySource, reductions: Sequence[Reduction], backend: str | None,
    total: bool = False, cache_bytes: int = 0,
) -> tuple[Tensor, ...]:  # fmt: skip
    """Validate the reductions and compute them, differentiably."""
    score = Dot(score) if isinstance(score, Tensor) else score
    for reduction in reductions:
        check_rule(reduction.rule, len(score.operands[0]))
        _check_sizes(reduction, len(score.operands[0]), keys.held)
    tensors: list[Tensor | None] = [*score.operands, *keys.tensors]
    tensors += [value for r in reductions for value in (r.scale, r.shift, r.bias)]
    needs_grad = any(t is not None and t.requires_grad for t in tensors) and torch.is_grad_enabled()
    in_forward = total and needs_grad and reductions[0].phi != "step"
    cache = ScoreCache(cache_bytes) if cache_bytes and needs_grad and not in_forward else None
    engine = load_backend(backend, keys.tensors[0])
    spec = _Spec(score, keys, reductions, engine, total, in_forward, cache)
    results: tuple[Tensor, ...] = _Sweep.apply(spec, *tensors)  # type: ignore[no-untyped-call]
    return results


def _check_sizes(reduction: Reduction, m: int, n: int) -> None:
    along, across = (m, n) if reduction.on_rows else (n, m)
    axis = "rows" if reduction.on_rows else "columns"
    vector: list[tuple[int, ...]] = [(), (along,)]
    for name, shapes in (("scale", vector), ("shift", vector), ("bias", [(across,)])):
        value = getattr(reduction, name)
        if value is not None and value.shape not in shapes:
            expected = " or ".join(str(shape) for shape in shapes)
            raise ValueError(f"{name} of {axis} must be {expected}; got {tuple(value.shape)}")


class _Sweep(torch.autograd.Function):
    """All reductions of a `_Spec`, as one differentiable function of its tensors."""

    @staticmethod
    def forward(ctx: Any, spec: _Spec, *tensors: Tensor | None) -> tuple[Tensor, ...]:
        like = spec.keys.tensors[0]
        g = [like.new_ones((), dtype=spec.sum_dtype)] if spec.grad_in_forward else None
        out, grads = _sweep(spec, tensors, ctx.needs_input_grad[1:], None, g)
        ctx.spec = None if spec.grad_in_forward else spec
        ctx.dtypes = [None if t is None else t.dtype for t in tensors]
        ctx.save_for_backward(*(grads if spec.grad_in_forward else (*tensors, *out)))
        results = [r.to(spec.result_dtype) for r in ([out[0].sum()] if spec.total else out)]
        constant = [
            result
            for result, reduction in zip(results, spec.reductions, strict=True)
            if reduction.phi in ("one", "step")
        ]
        ctx.mark_non_differentiable(*constant)
        return tuple(results)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *g: Tensor) -> tuple[Any, ...]:
        spec, saved = ctx.spec, ctx.saved_tensors
        if spec is None:
            grads = [None if grad is None else grad * g[0] for grad in saved]
        else:
            n = len(spec.reductions)
            grads = _sweep(spec, saved[:-n], ctx.needs_input_grad[1:], saved[-n:], g)[1]
        pairs = zip(grads, ctx.dtypes, strict=False)
        return (None, *(None if grad is None else grad.to(dtype) for grad, dtype in pairs))


Fields = dict[str, Tensor]  # values of a `Reduction`'s attributes, by name


def _sweep(
    spec: _Spec, tensors: Sequence[Tensor | None], needs: Sequence[bool],
    z: Sequence[Tensor] | None, g: Sequence[Tensor] | None,
) -> tuple[list[Tensor], list[Tensor | None]]:  # fmt: skip
    """Visit all key blocks once.

    Returns the results (an empty list if `z` already holds them) and, with `g`, the gradients of
    all `tensors`, not yet rounded to their dtypes.
    """
    score, keys, reductions = spec.score, spec.keys, spec.reductions
    like, dtype = keys.tensors[0], spec.sum_dtype
    needs_dk = g is not None and keys.requires_grad
    fields = _fields(spec, needs[len(tensors) - 3 * len(reductions) :], z, g)
    # Per-key values travel with the keys: those of a column reduction, except its bias, and the
    # bias of a row reduction.
    per_key = [
        (i, name) for i, values in enumerate(fields) for name, value in values.items()
        if value.ndim and reductions[i].on_rows == name.endswith("bias")
    ]  # fmt: skip
    results = [(i, name) for i, name in per_key if name in ("out", "dscale", "dshift", "dbias")]
    inputs = [key for key in per_key if key not in results]
    operands = score.operands if g is not None else ()
    drows = [torch.zeros(o.shape, dtype=dtype, device=o.device) for o in operands]

    def work(block: KeyBlock, columns: list[Tensor]) -> list[Tensor]:
        local = [dict(values) for values in fields]
        for (i, name), column in zip(inputs, columns, strict=True):
            local[i][name] = column
        for i, name in results:
            empty = _empty(reductions[i], name)
            local[i][name] = like.new_full((len(block.keys),), empty, dtype=dtype)
        block_reductions = [
            replace(reduction, **values)  # type: ignore[arg-type]
            for reduction, values in zip(reductions, local, strict=True)
        ]
        dk = [like.new_zeros(block.keys.shape, dtype=dtype)] if needs_dk else []
        spec.engine.sweep(score, block, block_reductions, drows, dk[0] if dk else None, spec.cache)
        return [*dk, *(local[i][name] for i, name in results)]

    merges: list[Merge] = ["lse" if _empty(reductions[i], n) else "sum" for i, n in results]
    columns = [fields[i][name] for i, name in inputs]
    with no_autocast(like):
        merged = keys.fold(work, columns, ["grad", *merges] if needs_dk else merges)
    dkeys: Sequence[Tensor | None] = [None] * len(keys.tensors)
    if needs_dk:
        dkeys = merged.pop(0).split([len(t) for t in keys.tensors])
    for (i, name), value in zip(results, merged, strict=True):
        fields[i][name] = value
    grads = [*drows, *dkeys]
    grads += [values.get(name) for values in fields for name in ("dscale", "dshift", "dbias")]
    return [values["out"] for values in fields if "out" in values], grads


def _fields(
    spec: _Spec, needs: Sequence[bool], z: Sequence[Tensor] | None, g: Sequence[Tensor] | None
) -> list[Fields]:
    """Return each reduction's inputs in `spec.sum_dtype`, and its initial results and gradients."""
    dtype, like = spec.sum_dtype, spec.keys.tensors[0]
    fields: list[Fields] = []
    converted: dict[int, Tensor] = {}  # reductions that share a tensor still share it afterwards
    for i, reduction in enumerate(spec.reductions):
        inputs = {name: getattr(reduction, name) for name in ("scale", "shift", "bias")}
        values = {
            name: converted.setdefault(id(value), value.detach().to(dtype))
            for name, value in inputs.items() if value is not None
        }  # fmt: skip
        if z is None:
            size = len(spec.score.operands[0]) if reduction.on_rows else spec.keys.held
            values["out"] = like.new_full((size,), _empty(reduction, "out"), dtype=dtype)
        elif reduction.phi == "lse":
            values["z"] = z[i]
        if g is not None and reduction.phi != "one":
            values["g"] = g[i]
            for (name, value), need in zip(inputs.items(), needs[3 * i :], strict=False):
                if value is not None and need:
                    values[f"d{name}"] = torch.zeros_like(value, dtype=dtype)
        fields.append(values)
    return fields


def _empty(reduction: Reduction, name: str) -> float:
    """Return the value of a result or gradient to which no pair has been added."""
    return -torch.inf if name == "out" and reduction.phi == "lse" else 0.0
