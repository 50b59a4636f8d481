"""Parse filter conditions on indexed fields: `lang == "en" and score > 0.3`.

The text has Python's syntax and is parsed by Python's parser, but never executed. Names are columns
of the index. Comparisons, `and`, `or`, `not`, `in`, `is None`, numbers, strings, + - * / and a few
functions are allowed. The result is a pyarrow expression.
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
from gigabatch.data.shards.json_columns import canonical_json

_COMPARISONS: dict[type[ast.cmpop], Callable[[Any, Any], Any]] = {
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
_EMPTY_JSON = ['""', "[]", "{}", "NaN", "Infinity", "-Infinity"]
"""JSON text of values that hold nothing; a nested one, such as `[null]`, is not recognized."""
MAX_LENGTH = 1 << 16
"""Maximum number of characters in a condition; a list of values may be long."""
MAX_TERMS = 1000
"""Maximum number of comparisons, and of columns, in a condition. Arrow's time grows with the square
of the number of terms, and a few thousand overflow its stack."""
HELP = (
    "A condition may contain columns, numbers and strings, == != < <= > >= + - * /, and, or, not, "
    f"in [...], is None, and the functions {', '.join(f'{name}()' for name in _FUNCTIONS)}"
)


def parse_filter(
    text: str,
    columns: Sequence[str],
    json_columns: Collection[str] = (),
    float_columns: Collection[str] = (),
    text_columns: Collection[str] = (),
) -> pc.Expression:
    """Parse a condition. `size("png")` in it is the size of that member in bytes.

    `is None` holds for every missing value (see `ids.is_missing`), not only for nulls. NaN compares
    as null.

    Args:
        text: The condition.
        columns: Names of the index's columns.
        json_columns: Columns of JSON text; values compared with them become JSON text too.
        float_columns: Columns of floating-point numbers.
        text_columns: Columns of other text.

    Returns:
        A pyarrow expression that is true for the samples that meet the condition.

    Raises:
        GigabatchError: if `text` is not a condition; the message says what is allowed.
    """
    if len(text) > MAX_LENGTH:
        raise GigabatchError(
            f"{text[:60]!r}...: the condition has {len(text):,} characters; the limit is "
            f"{MAX_LENGTH:,}. Filter in several steps: a view can be filtered again."
        )
    try:
        tree = ast.parse(text.strip(), mode="eval").body
        _check_term_count(tree)
        parser = _Parser(columns, json_columns, float_columns, text_columns)
        expression = parser.visit(tree)
    except SyntaxError as error:
        raise GigabatchError(f"{text!r}: not a condition: {error.msg}. {HELP}.") from None
    except (RecursionError, MemoryError):  # Python's parser raises MemoryError for deep nesting
        raise GigabatchError(
            f"{text[:60]!r}...: the condition is nested too deeply. Write `in [...]` for many "
            "values, or filter in several steps."
        ) from None
    except (pa.ArrowException, TypeError, ValueError, AttributeError, ArithmeticError) as error:
        raise GigabatchError(f"{text!r}: not a condition: {error}. {HELP}.") from None
    if not isinstance(expression, pc.Expression):
        raise GigabatchError(
            f"{text!r}: not a condition: it does not reference a column. The columns are: "
            f"{', '.join(columns)}."
        )
    return expression


def _check_term_count(tree: ast.AST) -> None:
    nodes = list(ast.walk(tree))
    for kind in (ast.Name, ast.cmpop):
        if sum(isinstance(node, kind) for node in nodes) > MAX_TERMS:
            raise SyntaxError(f"more than {MAX_TERMS:,} terms; for many values, write `in [...]`")


class _Parser(ast.NodeVisitor):
    """Converts a syntax tree to a pyarrow expression; raises SyntaxError for unknown syntax."""

    def __init__(
        self,
        columns: Sequence[str],
        json_columns: Collection[str],
        float_columns: Collection[str],
        text_columns: Collection[str],
    ) -> None:
        self.columns, self.json_columns = columns, json_columns
        self.float_columns, self.text_columns = float_columns, text_columns

    def generic_visit(self, node: ast.AST) -> Any:
        raise SyntaxError(f"{type(node).__name__.lower()} is not allowed")

    def visit_Name(self, node: ast.Name) -> pc.Expression:
        if node.id not in self.columns:
            known = ", ".join(name for name in self.columns if name.isidentifier())
            raise SyntaxError(f"there is no column {node.id!r} (the columns are: {known})")
        column = pc.field(node.id)
        if node.id in self.float_columns:
            return pc.if_else(pc.is_nan(column), pa.scalar(None, pa.float64()), column)
        return column

    def visit_Constant(self, node: ast.Constant) -> Any:
        if not isinstance(node.value, str | int | float | bool | None):
            raise SyntaxError(f"{node.value!r} is not allowed")
        return node.value

    def visit_List(self, node: ast.List) -> list[Any]:
        return [self.visit(element) for element in node.elts]

    visit_Tuple = visit_List  # type: ignore[assignment]

    def visit_BoolOp(self, node: ast.BoolOp) -> Any:
        combine = operator.and_ if isinstance(node.op, ast.And) else operator.or_
        return reduce(combine, [self.visit(value) for value in node.values])

    def visit_UnaryOp(self, node: ast.UnaryOp) -> Any:
        value = self.visit(node.operand)
        if isinstance(node.op, ast.Not):
            return ~value
        if isinstance(node.op, ast.USub):
            return -value if not isinstance(value, pc.Expression) else pc.negate(value)
        return self.generic_visit(node.op)

    def visit_BinOp(self, node: ast.BinOp) -> Any:
        operation = _ARITHMETIC.get(type(node.op))
        if operation is None:
            return self.generic_visit(node.op)
        sides = self.visit(node.left), self.visit(node.right)
        if not any(isinstance(side, pc.Expression) for side in sides):
            raise SyntaxError("arithmetic needs a column; compute constants beforehand")
        return operation(*sides)

    def visit_Compare(self, node: ast.Compare) -> Any:
        operands = [node.left, *node.comparators]
        parts = []
        for op, (left, right) in zip(node.ops, pairwise(operands), strict=True):
            values = [self.visit(left), self.visit(right)]
            if isinstance(op, ast.Is | ast.IsNot):
                parts.append(self._compare_with_none(op, left, *values))
                continue
            if any(isinstance(n, ast.Name) and n.id in self.json_columns for n in (left, right)):
                values = [_to_json(value) for value in values]
            parts.append(_COMPARISONS[type(op)](*values))
        return reduce(operator.and_, parts)

    def _compare_with_none(self, op: ast.cmpop, node: ast.expr, left: Any, right: Any) -> Any:
        """Return whether a value is missing, or whether it is not."""
        if right is not None:
            raise SyntaxError("`is` requires None, as in `lang is None`")
        name = node.id if isinstance(node, ast.Name) else ""
        empty = None
        if name in self.float_columns:
            empty = ~pc.is_finite(left)
        elif name in self.json_columns:
            empty = left.isin(_EMPTY_JSON)
        elif name in self.text_columns:
            empty = pc.utf8_trim_whitespace(left) == ""
        is_null = left.is_null()
        missing = is_null if empty is None else pc.if_else(is_null, True, empty)
        return missing if isinstance(op, ast.Is) else ~missing

    def visit_Call(self, node: ast.Call) -> Any:
        name = node.func.id if isinstance(node.func, ast.Name) else ""
        values = [self.visit(argument) for argument in node.args]
        if name == "size" and len(values) == 1 and f"{values[0]}.size" in self.columns:
            return pc.field(f"{values[0]}.size")
        if name not in _FUNCTIONS or node.keywords:
            raise SyntaxError(f"there is no function {name!r} with these arguments")
        return _FUNCTIONS[name](*values)


def _to_json(value: Any) -> Any:
    """Convert a constant, or the constants in a list, to JSON text; not columns and None."""
    if isinstance(value, list):
        return [_to_json(element) for element in value]
    return value if value is None or isinstance(value, pc.Expression) else canonical_json(value)
