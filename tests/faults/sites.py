"""Where the code can be changed a little, and how: the operators that faults are drawn from."""

from __future__ import annotations

import ast
import itertools
from collections.abc import Callable, Iterator
from dataclasses import dataclass

from .anchor import Source, Token

_COMPARISONS = {
    "<": "<=", "<=": "<", ">": ">=", ">=": ">", "==": "!=", "!=": "==",
    "is": "is not", "is not": "is", "in": "not in", "not in": "in",
}  # fmt: skip
_ARITHMETIC = {"+": "-", "-": "+", "*": "//", "//": "*", "/": "*"}
_AUGMENTED = {f"{old}=": f"{new}=" for old, new in _ARITHMETIC.items()}
_EXTREMES = {
    "min": "max", "max": "min", "minimum": "maximum", "maximum": "minimum",
    "argmin": "argmax", "argmax": "argmin",
}  # fmt: skip
# With their two arguments swapped these always raise: nothing is learnt from that.
_ORDERED = ("isinstance", "issubclass", "getattr", "hasattr")
_SILENT = ("__repr__", "__str__", "__format__")


@dataclass(frozen=True)
class Site:
    """One possible change: ``new`` in place of a span of the text."""

    operator: str
    start: int
    end: int
    new: str
    what: str


def sites(source: Source) -> list[Site]:
    """All sites of a file, in a fixed order."""
    found = [
        site
        for node in _behaviour(source.tree)
        for name, operator in OPERATORS.items()
        for site in operator(source, node, name)
    ]
    return sorted(found, key=lambda site: (site.start, site.end, site.operator, site.new))


def _behaviour(node: ast.AST) -> Iterator[ast.AST]:
    """The nodes that decide what the code does: no docstrings, types, errors' words, imports."""
    if isinstance(node, (ast.Raise, ast.JoinedStr, ast.Import, ast.ImportFrom)):
        return
    if isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant):
        return
    if isinstance(node, ast.FunctionDef) and node.name in _SILENT:
        return
    if isinstance(node, ast.If) and ast.unparse(node.test).endswith("TYPE_CHECKING"):
        return
    yield node
    skipped = ("annotation", "returns", "decorator_list", "bases", "keywords", "msg")
    if isinstance(node, ast.Call):
        skipped = ()
    for name, value in ast.iter_fields(node):
        if name not in skipped:
            for child in value if isinstance(value, list) else [value]:
                if isinstance(child, ast.AST):
                    if isinstance(node, ast.FunctionDef) and isinstance(child, ast.expr):
                        continue
                    yield from _behaviour(child)


def returns_something(tree: ast.AST) -> set[int]:
    """The ids of return statements in functions that are not annotated to return None."""
    kept: set[int] = set()

    def look(node: ast.AST, counts: bool) -> None:
        if isinstance(node, ast.FunctionDef):
            counts = not (isinstance(node.returns, ast.Constant) and node.returns.value is None)
        if isinstance(node, ast.Return) and counts:
            kept.add(id(node))
        for child in ast.iter_child_nodes(node):
            look(child, counts)

    look(tree, True)
    return kept


def _between(source: Source, left: ast.AST, right: ast.AST) -> list[Token]:
    """The operator's tokens between two operands."""
    first, last = source.span(left)[1], source.span(right)[0]
    inside = [t for t in source.tokens if first <= t.start and t.end <= last]
    return [t for t in inside if t.text not in "()"]


def _swapped(
    source: Source, pairs: dict[str, str], name: str, left: ast.AST, right: ast.AST
) -> Iterator[Site]:
    """The operator between two operands, replaced by its partner."""
    tokens = _between(source, left, right)
    old = " ".join(t.text for t in tokens)
    if old in pairs:
        new = pairs[old]
        yield Site(name, tokens[0].start, tokens[-1].end, new, f"`{old}` has become `{new}`")


def _comparison(source: Source, node: ast.AST, name: str) -> Iterator[Site]:
    if isinstance(node, ast.Compare):
        operands = [node.left, *node.comparators]
        for left, right in itertools.pairwise(operands):
            yield from _swapped(source, _COMPARISONS, name, left, right)


def _arithmetic(source: Source, node: ast.AST, name: str) -> Iterator[Site]:
    if isinstance(node, ast.BinOp) and not (_is_text(node.left) or _is_text(node.right)):
        yield from _swapped(source, _ARITHMETIC, name, node.left, node.right)
    if isinstance(node, ast.AugAssign):
        yield from _swapped(source, _AUGMENTED, name, node.target, node.value)


def _is_text(node: ast.AST) -> bool:
    return isinstance(node, ast.JoinedStr) or (
        isinstance(node, ast.Constant) and isinstance(node.value, str | bytes)
    )


def _integer(source: Source, node: ast.AST, name: str) -> Iterator[Site]:
    if isinstance(node, ast.Constant) and type(node.value) is int:
        for new in (node.value - 1, node.value + 1):
            yield Site(name, *source.span(node), str(new), f"{node.value} has become {new}")


def _conditions(node: ast.AST) -> list[ast.expr]:
    if isinstance(node, (ast.If, ast.While, ast.IfExp)):
        return [node.test]
    return list(node.ifs) if isinstance(node, ast.comprehension) else []


def _negation(source: Source, node: ast.AST, name: str) -> Iterator[Site]:
    for test in _conditions(node):
        start, end = source.span(test)
        text = source.text[start:end]
        if isinstance(test, ast.UnaryOp) and isinstance(test.op, ast.Not):
            yield Site(name, start, end, text[3:].strip(), f"`not` is lost from `{_short(text)}`")
        else:
            yield Site(name, start, end, f"not ({text})", f"`{_short(text)}` is negated")


def _logic(source: Source, node: ast.AST, name: str) -> Iterator[Site]:
    if isinstance(node, ast.BoolOp):
        for left, right in itertools.pairwise(node.values):
            yield from _swapped(source, {"and": "or", "or": "and"}, name, left, right)


def _call_deleted(source: Source, node: ast.AST, name: str) -> Iterator[Site]:
    if isinstance(node, ast.Expr) and isinstance(node.value, ast.Call):
        start, end = source.span(node)
        what = f"`{_short(source.text[start:end])}` is left out"
        yield Site(name, start, end, "pass", what)


def _returns_none(source: Source, node: ast.AST, name: str) -> Iterator[Site]:
    if isinstance(node, ast.Return) and node.value is not None:
        start, end = source.span(node)
        given = source.text[slice(*source.span(node.value))]
        if given != "None" and id(node) in returns_something(source.tree):
            yield Site(name, start, end, "return None", f"None is returned, not `{_short(given)}`")


def _arguments_swapped(source: Source, node: ast.AST, name: str) -> Iterator[Site]:
    if not isinstance(node, ast.Call) or len(node.args) != 2:
        return
    if getattr(node.func, "id", None) in _ORDERED:
        return
    (a, b), (c, d) = map(source.span, node.args)
    first, second = source.text[a:b], source.text[c:d]
    if first != second and not any(isinstance(arg, ast.Starred) for arg in node.args):
        what = f"`{_short(first)}` and `{_short(second)}` are swapped"
        yield Site(name, a, d, second + source.text[b:c] + first, what)


def _keyword_dropped(source: Source, node: ast.AST, name: str) -> Iterator[Site]:
    for keyword in node.keywords if isinstance(node, ast.Call) else []:
        if keyword.arg is None:
            continue
        start, end = source.span(keyword)
        before = source.text[:start].rstrip()
        after = source.text[end:].lstrip()
        what = f"`{_short(source.text[start:end])}` is left out"
        if before.endswith(","):
            start = len(before) - 1
        elif after.startswith(","):
            end = len(source.text) - len(after[1:].lstrip())
        yield Site(name, start, end, "", what)


def _condition_fixed(source: Source, node: ast.AST, name: str) -> Iterator[Site]:
    if isinstance(node, (ast.If, ast.IfExp)):
        start, end = source.span(node.test)
        for value in ("True", "False"):
            what = f"`{_short(source.text[start:end])}` is taken for {value}"
            yield Site(name, start, end, value, what)


def _extreme(source: Source, node: ast.AST, name: str) -> Iterator[Site]:
    if not isinstance(node, ast.Call):
        return
    made = node.func
    called = getattr(made, "id", None) or getattr(made, "attr", None)
    if called in _EXTREMES:
        end = source.span(made)[1]
        new = _EXTREMES[called]
        yield Site(name, end - len(called), end, new, f"`{called}` has become `{new}`")


def _slice_bound(source: Source, node: ast.AST, name: str) -> Iterator[Site]:
    if not isinstance(node, ast.Slice):
        return
    for bound in filter(None, (node.lower, node.upper)):
        start, end = source.span(bound)
        text = source.text[start:end]
        for sign, step in (("-", -1), ("+", 1)):
            try:
                new = str(ast.literal_eval(bound) + step)
            except (ValueError, TypeError):
                new = f"{text} {sign} 1"
            yield Site(name, start, end, new, f"the bound `{_short(text)}` has become `{new}`")


def _short(text: str) -> str:
    """A piece of code on one line."""
    line = " ".join(text.split())
    return line if len(line) <= 60 else f"{line[:57]}…"


OPERATORS: dict[str, Callable[[Source, ast.AST, str], Iterator[Site]]] = {
    "comparison": _comparison,
    "arithmetic": _arithmetic,
    "integer": _integer,
    "negation": _negation,
    "logic": _logic,
    "call-deleted": _call_deleted,
    "returns-none": _returns_none,
    "arguments-swapped": _arguments_swapped,
    "keyword-dropped": _keyword_dropped,
    "condition-fixed": _condition_fixed,
    "extreme": _extreme,
    "slice-bound": _slice_bound,
}
