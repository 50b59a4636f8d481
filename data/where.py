"""Conditions on a sample's indexed fields, from text: `lang == "en" and score > 0.3`.

The text is Python's syntax, read by Python's parser and never run: names are columns of the index,
and only comparisons, `and`, `or`, `not`, `in`, `is None`, numbers, strings, + - * / and a few
functions are known. It becomes a pyarrow expression.
"""

from __future__ import annotations

import ast
from collections.abc import Callable, Sequence
from typing import Any

import pyarrow as pa
import pyarrow.compute as pc

from gigabatch.data.errors import GigabatchError

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
HELP = (
    "Columns, numbers and strings, with == != < <= > >= + - * /, and, or, not, in [...], is None, "
    f"and {', '.join(f'{name}()' for name in _FUNCTIONS)}"
)


def parse_where(text: str, columns: Sequence[str]) -> pc.Expression:
    """A condition over `columns`. A member's size in bytes is `size("png")`.

    Raises GigabatchError for anything else, with what is known.
    """
    try:
        tree = ast.parse(text.strip(), mode="eval").body
        found = _Parser(columns).visit(tree)
    except SyntaxError as error:
        raise GigabatchError(f"{text!r}: not a condition: {error.msg}. {HELP}.") from None
    except RecursionError:
        raise GigabatchError(f"{text[:60]!r}...: the condition is nested too deeply.") from None
    except (pa.ArrowException, TypeError, ValueError, AttributeError, ArithmeticError) as error:
        raise GigabatchError(f"{text!r}: not a condition: {error}. {HELP}.") from None
    if not isinstance(found, pc.Expression):
        raise GigabatchError(f"{text!r}: a condition must name a column; there are: {columns}.")
    return found


class _Parser(ast.NodeVisitor):
    def __init__(self, columns: Sequence[str]) -> None:
        self.columns = columns

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
        parts = [self.visit(value) for value in node.values]
        whole = parts[0]
        for part in parts[1:]:
            whole = whole & part if isinstance(node.op, ast.And) else whole | part
        return whole

    def visit_UnaryOp(self, node: ast.UnaryOp) -> Any:
        value = self.visit(node.operand)
        if isinstance(node.op, ast.Not):
            return ~value
        if isinstance(node.op, ast.USub):
            return -value if not isinstance(value, pc.Expression) else pc.negate(value)
        return self.generic_visit(node.op)

    def visit_BinOp(self, node: ast.BinOp) -> Any:
        act = _ARITHMETIC.get(type(node.op))
        return act(self.visit(node.left), self.visit(node.right)) if act else self.generic_visit(
            node.op
        )  # fmt: skip

    def visit_Compare(self, node: ast.Compare) -> Any:
        whole, left = None, self.visit(node.left)
        for operator, right_node in zip(node.ops, node.comparators, strict=True):
            right = self.visit(right_node)
            part = self._compare(operator, left, right)
            whole, left = part if whole is None else whole & part, right
        return whole

    def _compare(self, operator: ast.cmpop, left: Any, right: Any) -> Any:
        if isinstance(operator, ast.Is | ast.IsNot):
            if right is not None:
                raise SyntaxError("`is` goes with None alone")
            return left.is_null() if isinstance(operator, ast.Is) else left.is_valid()
        return _COMPARE[type(operator)](left, right)

    def visit_Call(self, node: ast.Call) -> Any:
        name = node.func.id if isinstance(node.func, ast.Name) else ""
        values = [self.visit(each) for each in node.args]
        if name == "size" and len(values) == 1 and f"{values[0]}.size" in self.columns:
            return pc.field(f"{values[0]}.size")
        if name not in _FUNCTIONS or node.keywords:
            raise SyntaxError(f"there is no function {name!r} like this")
        return _FUNCTIONS[name](*values)
