"""Conditions on a sample's indexed fields, from text: `lang == "en" and score > 0.3`.

The text is Python's syntax, read by Python's parser and never run: names are columns of the index,
and only comparisons, `and`, `or`, `not`, `in`, `is None`, numbers, strings, + - * / and a few
functions are known. It becomes a pyarrow expression.
"""

from __future__ import annotations

import ast
import operator
from collections.abc import Callable, Collection, Sequence
from functools import reduce
from itertools import pairwise
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc

from gigabatch.data.errors import GigabatchError
from gigabatch.data.shards.json_columns import json_text

_COMPARE: dict[type[ast.cmpop], Callable[[Any, Any], Any]] = {
    ast.Eq: lambda a, b: a == b,
    ast.NotEq: lambda a, b: a != b,
    ast.Lt: lambda a, b: a < b,
    ast.LtE: lambda a, b: a <= b,
    ast.Gt: lambda a, b: a > b,
    ast.GtE: lambda a, b: a >= b,
    ast.In: lambda a, b: a.isin(b),
    ast.NotIn: lambda a, b: ~a.isin(b),
}
_ARITHMETIC: dict[type[ast.operator], Callable[[Any, Any], Any]] = {
    ast.Add: lambda a, b: a + b,
    ast.Sub: lambda a, b: a - b,
    ast.Mult: lambda a, b: a * b,
    ast.Div: lambda a, b: a / b,
}
_FUNCTIONS: dict[str, Callable[..., Any]] = {
    "length": pc.utf8_length,
    "lower": pc.utf8_lower,
    "contains": pc.match_substring,
    "starts_with": pc.starts_with,
    "matches": pc.match_substring_regex,
}
LONGEST, TERMS = 1 << 16, 1000
"""Letters of a condition, and comparisons or columns in it; a list of values may be long. Arrow's
time grows with the square of the terms, and at some thousands its stack ends."""
HELP = (
    "Columns, numbers and strings, with == != < <= > >= + - * /, and, or, not, in [...], is None, "
    f"and {', '.join(f'{name}()' for name in _FUNCTIONS)}"
)


def parse_where(
    text: str, columns: Sequence[str], json_columns: Collection[str] = ()
) -> pc.Expression:
    """A condition over `columns`. A member's size in bytes is `size("png")`. Values that
    `json_columns`, which hold JSON text, are compared with become such text too.

    Raises GigabatchError for anything else, with what is known.
    """
    if len(text) > LONGEST:
        raise GigabatchError(
            f"{text[:60]!r}...: the condition has {len(text):,} letters, and may have {LONGEST:,}. "
            "Filter in several steps: a view of a view is a view."
        )
    try:
        tree = ast.parse(text.strip(), mode="eval").body
        _refuse_many(tree)
        found = _Parser(columns, json_columns).visit(tree)
    except SyntaxError as error:
        raise GigabatchError(f"{text!r}: not a condition: {error.msg}. {HELP}.") from None
    except (RecursionError, MemoryError):  # the latter is the parser's own limit
        raise GigabatchError(f"{text[:60]!r}...: the condition is nested too deeply.") from None
    except (pa.ArrowException, TypeError, ValueError, AttributeError, ArithmeticError) as error:
        raise GigabatchError(f"{text!r}: not a condition: {error}. {HELP}.") from None
    if not isinstance(found, pc.Expression):
        raise GigabatchError(f"{text!r}: a condition must name a column; there are: {columns}.")
    return found


def _refuse_many(tree: ast.AST) -> None:
    nodes = list(ast.walk(tree))
    for kind in (ast.Name, ast.cmpop):
        if sum(isinstance(node, kind) for node in nodes) > TERMS:
            raise SyntaxError(f"more than {TERMS:,} terms; for many values, write `in [...]`")


class _Parser(ast.NodeVisitor):
    def __init__(self, columns: Sequence[str], json_columns: Collection[str]) -> None:
        self.columns, self.json_columns = columns, json_columns

    def generic_visit(self, node: ast.AST) -> Any:
        raise SyntaxError(f"{type(node).__name__.lower()} is not allowed")

    def visit_Name(self, node: ast.Name) -> pc.Expression:
        if node.id not in self.columns:
            known = ", ".join(name for name in self.columns if name.isidentifier())
            raise SyntaxError(f"there is no column {node.id!r} (there are: {known})")
        return pc.field(node.id)

    def visit_Constant(self, node: ast.Constant) -> Any:
        if not isinstance(node.value, str | int | float | bool | None):
            raise SyntaxError(f"{node.value!r} is not allowed")
        return node.value

    def visit_List(self, node: ast.List) -> list[Any]:
        return [self.visit(each) for each in node.elts]

    visit_Tuple = visit_List  # type: ignore[assignment]

    def visit_BoolOp(self, node: ast.BoolOp) -> Any:
        act = operator.and_ if isinstance(node.op, ast.And) else operator.or_
        return reduce(act, [self.visit(value) for value in node.values])

    def visit_UnaryOp(self, node: ast.UnaryOp) -> Any:
        value = self.visit(node.operand)
        if isinstance(node.op, ast.Not):
            return ~value
        if isinstance(node.op, ast.USub):
            return -value if not isinstance(value, pc.Expression) else pc.negate(value)
        return self.generic_visit(node.op)

    def visit_BinOp(self, node: ast.BinOp) -> Any:
        act = _ARITHMETIC.get(type(node.op))
        if act is None:
            return self.generic_visit(node.op)
        sides = self.visit(node.left), self.visit(node.right)
        if not any(isinstance(side, pc.Expression) for side in sides):
            raise SyntaxError("arithmetic goes with a column, not with constants alone")
        return act(*sides)

    def visit_Compare(self, node: ast.Compare) -> Any:
        nodes = [node.left, *node.comparators]
        parts = []
        for each, (left, right) in zip(node.ops, pairwise(nodes), strict=True):
            values = [self.visit(left), self.visit(right)]
            if any(isinstance(n, ast.Name) and n.id in self.json_columns for n in (left, right)):
                values = [_as_json(value) for value in values]
            parts.append(self._compare(each, *values))
        return reduce(operator.and_, parts)

    def _compare(self, how: ast.cmpop, left: Any, right: Any) -> Any:
        if isinstance(how, ast.Is | ast.IsNot):
            if right is not None:
                raise SyntaxError("`is` goes with None alone")
            return left.is_null() if isinstance(how, ast.Is) else left.is_valid()
        return _COMPARE[type(how)](left, right)

    def visit_Call(self, node: ast.Call) -> Any:
        name = node.func.id if isinstance(node.func, ast.Name) else ""
        values = [self.visit(each) for each in node.args]
        if name == "size" and len(values) == 1 and f"{values[0]}.size" in self.columns:
            return pc.field(f"{values[0]}.size")
        if name not in _FUNCTIONS or node.keywords:
            raise SyntaxError(f"there is no function {name!r} like this")
        return _FUNCTIONS[name](*values)


def _as_json(value: Any) -> Any:
    """A constant, or each of a list of them, as JSON text; a column and None as they are."""
    if isinstance(value, list):
        return [_as_json(each) for each in value]
    return value if value is None or isinstance(value, pc.Expression) else json_text(value)
