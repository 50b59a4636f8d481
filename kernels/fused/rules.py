"""Rules in Triton: each clause class of `kernels/rules.py` has an equivalent Triton function.

For the compiler, a rule is a flat list of steps. `use` tells how a step's mask is combined: "and"
closes the current mask, "or" combines it with the next step's mask, "only" restricts the next
log-weight to the mask. For a log-weight, `use` is "weigh".
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import torch
import triton
import triton.language as tl
from torch import Tensor

from gigabatch.kernels import rules as R
from gigabatch.kernels.fused.blocks import count, entry, field, per_key, per_row, product
from gigabatch.kernels.sources import KeyBlock


@dataclass(frozen=True)
class Step:
    """One clause. `rows`, `keys` and `extra` are indices into the kernel's tensor arguments;
    `width` is the row length of the vectors or table."""

    kind: str
    use: str
    rows: int
    keys: int = 0
    extra: int = 0
    width: int = 1


def steps(
    rule: R.Rule, rows: slice, block: KeyBlock, add_argument: Callable[[Tensor], int]
) -> tuple[Step, ...]:
    """Translate a rule on some rows and a block's keys into steps.

    `add_argument` adds a tensor to the kernel's arguments and returns its index.
    """
    program: list[Step] = []

    def add(clause: R.Clause, use: str) -> None:
        if isinstance(clause, R.Either):
            add(clause.one, "or")
            add(clause.other, use)
        elif isinstance(clause, R.AtLeast):
            program.append(Step("at least", use, add_argument(clause.rows[rows])))
        else:
            assert isinstance(clause, R.Eq | R.Table | R.AbsDiff | R.SecondScore), clause
            if isinstance(clause, R.Table) and clause.only is not None:
                add(clause.only, "only")
            row_values, key_values = clause.rows[rows], block.metadata[clause.keys]
            both = add_argument(row_values), add_argument(key_values)
            if isinstance(clause, R.Eq):
                program.append(Step("ne" if isinstance(clause, R.Ne) else "eq", use, *both))
            elif isinstance(clause, R.Table):
                table, width = add_argument(clause.table), clause.table.shape[1]
                program.append(Step("table", "weigh", *both, table, width))
            elif isinstance(clause, R.AbsDiff):
                factor = torch.ones_like(clause.rows) if clause.factor is None else clause.factor
                program.append(Step("distance", "weigh", *both, add_argument(factor[rows])))
            else:
                value = clause.scale if clause.at_most is None else clause.at_most
                kind, use = ("soft", "weigh") if clause.at_most is None else ("at most", use)
                scalar = add_argument(torch.full((), value, device=block.keys.device))
                program.append(Step(kind, use, *both, scalar, clause.rows.shape[1]))

    for clause in rule:
        add(clause, "and")
    return tuple(program)


@triton.constexpr_function
def needs_mask(group, full):
    """Return whether a block needs a mask: a clause masks pairs, or the block is partial."""
    return not full or any(step.use == "and" for step in group.rule)


@triton.constexpr_function
def has_weights(group):
    return any(step.use == "weigh" for step in group.rule)


@triton.jit
def may_count(args, i, j, m, n, GROUP: tl.constexpr):
    """Return False only if no pair of the block can count, for a rule that begins with an equality.

    No pair can be equal if all row values are below or above all key values. Reading one row and
    one column of values thus skips most blocks off the diagonal.
    """
    rows = tl.load(args[field(entry(GROUP, "rule", 0), "rows")] + tl.minimum(i, m - 1))
    keys = tl.load(args[field(entry(GROUP, "rule", 0), "keys")] + tl.minimum(j, n - 1))
    return (tl.min(rows) <= tl.max(keys)) & (tl.min(keys) <= tl.max(rows))


@triton.jit
def distance(rows, keys, factor, i, j, m, n):
    """Return log(1 + factor_i |y_i - y_j|)."""
    apart = tl.abs(per_row(rows, i, m) - per_key(keys, j, n)).to(tl.float32)
    return tl.log(1.0 + per_row(factor, i, m).to(tl.float32) * apart)


@triton.jit
def clause(scores, args, i, j, m, n, STEP: tl.constexpr, BD: tl.constexpr):
    """Return the mask or log-weights [BM, BN] of one step."""
    KIND: tl.constexpr = field(STEP, "kind")
    WIDTH: tl.constexpr = field(STEP, "width")
    rows = args[field(STEP, "rows")]
    keys = args[field(STEP, "keys")]
    extra = args[field(STEP, "extra")]
    if KIND == "eq":
        return per_row(rows, i, m) == per_key(keys, j, n)
    elif KIND == "ne":
        return per_row(rows, i, m) != per_key(keys, j, n)
    elif KIND == "at least":
        return scores >= per_row(rows, i, m)
    elif KIND == "at most":
        return product(rows, keys, i, j, m, n, WIDTH, BD, True, False) <= tl.load(extra)
    elif KIND == "soft":
        return product(rows, keys, i, j, m, n, WIDTH, BD, True, False) * tl.load(extra)
    elif KIND == "table":
        return tl.load(extra + per_row(rows, i, m) * WIDTH + per_key(keys, j, n))
    else:
        return distance(rows, keys, extra, i, j, m, n)


@triton.jit
def evaluate_rule(scores, valid, args, i, j, m, n, GROUP: tl.constexpr, BD: tl.constexpr):
    """Return the mask and log-weights [BM, BN] of a group's rule; `valid` marks existing pairs."""
    always = valid | (valid == 0)
    never = valid & (valid == 0)
    mask, joined, limit, weights = valid, never, always, tl.zeros_like(scores)
    for s in tl.static_range(count(GROUP, "rule")):
        values = clause(scores, args, i, j, m, n, entry(GROUP, "rule", s), BD)
        if field(entry(GROUP, "rule", s), "use") == "weigh":
            weights += tl.where(limit, values, 0.0).to(tl.float32)
            limit = always
        else:
            joined = joined | values
            if field(entry(GROUP, "rule", s), "use") == "only":
                limit = joined
            if field(entry(GROUP, "rule", s), "use") == "and":
                mask = mask & joined
            if field(entry(GROUP, "rule", s), "use") != "or":
                joined = never
    return mask, weights
