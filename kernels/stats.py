"""The engine's sums, each of one score pass: `lse_stats` and `pair_sum`. See docs/engine.md.

The backward pass forms, a tile at a time, the gradient G of all terms in the scores, and from it
dQ = G K and dK = G^T Q: four matrix passes in all (S; S again; dQ; dK), or three for the total of
a `pair_sum`, whose gradient is known up to one factor while the scores are at hand.
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
from gigabatch.kernels.sources import KeySource, Merge, Panel, full_precision, wide
from gigabatch.kernels.tiled import Part

BACKENDS = {"reference": "reference", "tiled": "tiled", "triton": "fused"}  # and their modules
Axis = Literal["rows", "columns"]


@dataclass(frozen=True)
class Lse:
    """Z_i = log sum_j w_ij exp(scale_i s_ij + bias_j), for each row i, or each column.

    `scale`: 0-dimensional, or one for each result ([M] rows or this rank's [n] keys); may be
    negative. `bias`: one for each entry across the axis ([n] this rank's keys for "rows", [M] for
    "columns"). Both differentiable. `rule`: the weights w; without it all pairs count alike.
    """

    axis: Axis
    scale: Tensor
    bias: Tensor | None = None
    rule: Rule = ()


@dataclass(frozen=True)
class Stats:
    """For each `Lse` its `z`, and along its axis positive_i = sum_j P_ij (scale_i s_ij + bias_j)
    and weight_i = sum_j P_ij, without gradient (both empty where no positives are asked for).

    Each is [M] or, for columns, [n]: this rank's keys; at least float32. Over no pair z is -inf.
    """

    z: tuple[Tensor, ...]
    positive: tuple[Tensor, ...]
    weight: tuple[Tensor, ...]


def lse_stats(
    score: Score | Tensor, keys: KeySource, lses: Sequence[Lse],
    positives: Rule | Clause | None = None, backend: str | None = None, cache_bytes: int = 0,
) -> Stats:  # fmt: skip
    """Log-sum-exps and positive sums of the scores of this rank's queries against all keys.

    `score`: a score, or queries [M, D] for the dot product. `positives`: their rule, one clause or
    several; log-weights weigh them. A few pairs of a lone `Eq` cost nothing a tile. `backend`:
    "tiled" (plain torch, the default), "triton" (asked for by name until it has run on a GPU), or
    "reference" (dense, float64; the oracle). `cache_bytes`: memory for scores that the backward
    pass then need not make again: up to three matrix passes for four, the same bits. Differentiable
    once, in the score's operands, the source's tensors, scales and biases. Memory O(M + N) beside
    the keys. Under a process group the *sum over ranks* of a function of the results is what is
    differentiated. Raises ValueError for an unknown back end or sizes that do not fit.
    """
    rules = [] if positives is None else [positives]
    return lse_sums(score, keys, lses, rules, backend, cache_bytes)[0]


def lse_sums(
    score: Score | Tensor, keys: KeySource, lses: Sequence[Lse],
    positives: Sequence[Rule | Clause], backend: str | None, cache_bytes: int = 0,
) -> list[Stats]:  # fmt: skip
    """`lse_stats` for several rules of positives at once, in the same four passes."""
    rules: list[Rule] = [p if isinstance(p, Sequence) else (p,) for p in positives]
    terms, stride = [], 1 + 2 * len(rules)
    for lse in lses:
        if lse.axis not in ("rows", "columns"):
            raise ValueError(f"axis is {lse.axis!r}; choose rows or columns")
        on_rows, constant = lse.axis == "rows", lse.scale.detach()
        terms.append(Part(on_rows, "lse", lse.rule, lse.scale, None, lse.bias))
        for rule in rules:
            terms.append(Part(on_rows, "linear", rule, lse.scale, None, lse.bias))
            terms.append(Part(on_rows, "one", rule, constant))
    out = _run(score, keys, terms, backend, cache_bytes=cache_bytes)
    each = [out[i::stride] for i in range(stride)]
    pairs = [(each[1 + 2 * i], each[2 + 2 * i]) for i in range(len(rules))]
    return [Stats(each[0], *pair) for pair in pairs or [((), ())]]


def pair_sum(
    score: Score | Tensor, keys: KeySource, phi: Literal["softplus", "relu", "step"],
    scale: Tensor, shift: Tensor, bias: Tensor | None = None, rule: Rule = (), *,
    total: bool = False, backend: str | None = None,
) -> Tensor:  # fmt: skip
    """sum_j w_ij phi(scale_i s_ij + shift_i + bias_j): [M], or with `total` their sum, 0-dim; at
    least float32.

    `phi`: "softplus" log(1 + e^x), "relu", or "step" (0 where x < 0, else 1; no gradient). `scale`,
    `shift`: 0-dimensional or [M]; `bias`: None or this rank's [n] keys; all differentiable, as are
    the score's operands and the source's tensors, once (a total's gradient must be the same number
    on every rank, as it is in any loss). `rule`: which pairs count, and how much.
    `backend`, errors, process groups: as `lse_stats`; ValueError too for an unknown `phi`.
    """
    if phi not in ("softplus", "relu", "step"):
        raise ValueError(f"phi is {phi!r}; choose one of softplus, relu, step")
    return _run(score, keys, [Part(True, phi, rule, scale, shift, bias)], backend, total)[0]


def engine_of(backend: str | None, like: Tensor) -> Any:
    """The module of a back end, by default tiled. ValueError for one that does not exist or cannot
    run on the device of `like`."""
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
    score: Score
    keys: KeySource
    terms: Sequence[Part]
    engine: Any
    total: bool  # one term, whose sum is asked for
    early: bool  # its gradient is made in the forward pass, up to one factor
    cache: ScoreCache | None

    @property
    def kind(self) -> torch.dtype:
        """The dtype of results: at least float32."""
        dtypes = [tensor.dtype for tensor in (*self.score.operands, *self.keys.tensors)]
        return wide(reduce(torch.promote_types, dtypes))

    @property
    def inner(self) -> torch.dtype:
        """The dtype of logits, sums, and sums of gradients."""
        return getattr(self.engine, "KIND", self.kind)


def _run(
    score: Score | Tensor, keys: KeySource, terms: Sequence[Part], backend: str | None,
    total: bool = False, cache_bytes: int = 0,
) -> tuple[Tensor, ...]:  # fmt: skip
    score = Dot(score) if isinstance(score, Tensor) else score
    for term in terms:
        check_rule(term.rule, len(score.operands[0]))
        _check(term, len(score.operands[0]), keys.held)
    tensors: list[Tensor | None] = [*score.operands, *keys.tensors]
    tensors += [value for term in terms for value in (term.scale, term.shift, term.bias)]
    learns = any(t is not None and t.requires_grad for t in tensors) and torch.is_grad_enabled()
    early = total and learns and terms[0].phi != "step"
    cache = ScoreCache(cache_bytes) if cache_bytes and learns and not early else None
    spec = _Spec(score, keys, terms, engine_of(backend, keys.tensors[0]), total, early, cache)
    return _Sweep.apply(spec, *tensors)


def _check(term: Part, m: int, n: int) -> None:
    along, across = (m, n) if term.on_rows else (n, m)
    of = "rows" if term.on_rows else "columns"
    vector: list[tuple[int, ...]] = [(), (along,)]
    for name, shapes in (("scale", vector), ("shift", vector), ("bias", [(across,)])):
        value = getattr(term, name)
        if value is not None and value.shape not in shapes:
            wanted = " or ".join(str(shape) for shape in shapes)
            raise ValueError(f"{name} of {of} must be {wanted}; got {tuple(value.shape)}")


class _Sweep(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, spec: _Spec, *tensors: Tensor | None) -> tuple[Tensor, ...]:
        like = spec.keys.tensors[0]
        g = [like.new_ones((), dtype=spec.inner)] if spec.early else None
        out, grads = _sweep(spec, tensors, ctx.needs_input_grad[1:], None, g)
        ctx.spec = None if spec.early else spec
        ctx.kinds = [None if t is None else t.dtype for t in tensors]
        ctx.save_for_backward(*(grads if spec.early else (*tensors, *out)))
        results = [r.to(spec.kind) for r in ([out[0].sum()] if spec.total else out)]
        constant = [r for r, t in zip(results, spec.terms, strict=True) if t.phi in ("one", "step")]
        ctx.mark_non_differentiable(*constant)
        return tuple(results)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *g: Tensor) -> tuple[Any, ...]:
        spec, saved = ctx.spec, ctx.saved_tensors
        if spec is None:
            grads = [None if grad is None else grad * g[0] for grad in saved]
        else:
            n = len(spec.terms)
            grads = _sweep(spec, saved[:-n], ctx.needs_input_grad[1:], saved[-n:], g)[1]
        each = zip(grads, ctx.kinds, strict=False)
        return (None, *(None if grad is None else grad.to(kind) for grad, kind in each))


def _sweep(
    spec: _Spec, tensors: Sequence[Tensor | None], needs: Sequence[bool],
    z: Sequence[Tensor] | None, g: Sequence[Tensor] | None,
) -> tuple[list[Tensor], list[Tensor | None]]:  # fmt: skip
    """All panels once: the terms' results, unless they are given as `z`; and with `g`, their
    gradients, those of all `tensors`, not yet rounded to their dtypes."""
    score, keys, terms = spec.score, spec.keys, spec.terms
    like, learns, kind = keys.tensors[0], g is not None, spec.inner
    pulls = learns and keys.learns
    first = len(tensors) - 3 * len(terms)
    fields: list[dict[str, Tensor]] = []  # of each term's `Part`
    same: dict[int, Tensor] = {}  # a tensor that several terms share stays one
    for i, term in enumerate(terms):
        own = {name: getattr(term, name) for name in ("scale", "shift", "bias")}
        found = {
            name: same.setdefault(id(value), value.detach().to(kind))
            for name, value in own.items() if value is not None
        }  # fmt: skip
        if z is None:
            size = len(score.operands[0]) if term.on_rows else keys.held
            found["out"] = like.new_full((size,), _empty(term, "out"), dtype=kind)
        elif term.phi == "lse":
            found["z"] = z[i]
        if g is not None and term.phi != "one":
            found["g"] = g[i]
            for (name, value), need in zip(own.items(), needs[first + 3 * i :], strict=False):
                if value is not None and need:
                    found[f"d{name}"] = torch.zeros_like(value, dtype=kind)
        fields.append(found)
    # What belongs to a key travels: on the keys' axis all but the bias, on the rows' that alone.
    travel = [
        (i, name) for i, found in enumerate(fields) for name, value in found.items()
        if value.ndim and terms[i].on_rows == name.endswith("bias")
    ]  # fmt: skip
    back = [at for at in travel if at[1] in ("out", "dscale", "dshift", "dbias")]
    forth = [at for at in travel if at not in back]
    drows = [torch.zeros(o.shape, dtype=kind, device=o.device) for o in score.operands if learns]

    def work(panel: Panel, columns: list[Tensor]) -> list[Tensor]:
        here = [dict(found) for found in fields]
        for (i, name), column in zip(forth, columns, strict=True):
            here[i][name] = column
        for i, name in back:
            here[i][name] = like.new_full((len(panel.keys),), _empty(terms[i], name), dtype=kind)
        parts = [replace(t, **found) for t, found in zip(terms, here, strict=True)]  # type: ignore[arg-type]
        dk = [like.new_zeros(panel.keys.shape, dtype=kind)] if pulls else []
        spec.engine.sweep(score, panel, parts, drows, dk[0] if dk else None, spec.cache)
        return [*dk, *(here[i][name] for i, name in back)]

    merges: list[Merge] = ["lse" if _empty(terms[i], name) else "sum" for i, name in back]
    columns = [fields[i][name] for i, name in forth]
    with full_precision(like):
        merged = keys.fold(work, columns, ["grad", *merges] if pulls else merges)
    dkeys: Sequence[Tensor | None] = [None] * len(keys.tensors)
    if pulls:
        dkeys = merged.pop(0).split([len(t) for t in keys.tensors])
    for (i, name), value in zip(back, merged, strict=True):
        fields[i][name] = value
    grads = [*drows, *dkeys]
    grads += [found.get(name) for found in fields for name in ("dscale", "dshift", "dbias")]
    return [found["out"] for found in fields if "out" in found], grads


def _empty(term: Part, name: str) -> float:
    """The result of a term over no pair."""
    return -torch.inf if name == "out" and term.phi == "lse" else 0.0
