"""Where a fault belongs: its text inside a function, whatever the layout of the code."""

from __future__ import annotations

import ast
import bisect
import io
import itertools
import textwrap
import tokenize
from dataclasses import dataclass, field, replace
from functools import cached_property, lru_cache
from pathlib import Path

from .listing import PACKAGES, Fault, FaultError

MODULE = "<module>"
_LAYOUT = {
    tokenize.NEWLINE, tokenize.NL, tokenize.INDENT, tokenize.DEDENT, tokenize.COMMENT,
    tokenize.ENDMARKER,
}  # fmt: skip
_OPEN, _CLOSED = ("(", "[", "{"), (")", "]", "}")
_FUNCTIONS = (ast.FunctionDef, ast.AsyncFunctionDef, ast.ClassDef)


@dataclass(frozen=True)
class Token:
    """A token, and from where to where it goes in the text."""

    text: str
    start: int
    end: int


@dataclass(frozen=True)
class Source:
    """The text of a Python file, and what is in it."""

    text: str

    @cached_property
    def tree(self) -> ast.Module:
        """The syntax tree."""
        return ast.parse(self.text)

    @cached_property
    def _lines(self) -> list[str]:
        return self.text.splitlines(keepends=True)

    @cached_property
    def _starts(self) -> list[int]:
        starts = [0]
        for line in self._lines:
            starts.append(starts[-1] + len(line))
        return starts

    def offset(self, line: int, column: int) -> int:
        """The place in the text of a line, from 1, and a column of bytes, as `ast` has it."""
        if line > len(self._lines):
            return len(self.text)
        before = self._lines[line - 1].encode()[:column].decode()
        return self._starts[line - 1] + len(before)

    def span(self, node: ast.AST) -> tuple[int, int]:
        """From where to where a node goes, its decorators included."""
        above = min((each.lineno for each in getattr(node, "decorator_list", ())), default=None)
        first = self.offset(node.lineno, node.col_offset)
        if above is not None:
            first = self.offset(above, 0)
        return first, self.offset(node.end_lineno, node.end_col_offset)

    @cached_property
    def raw_tokens(self) -> list[tuple[int, Token]]:
        """All tokens, with their types."""
        made = tokenize.generate_tokens(io.StringIO(self.text).readline)
        starts = self._starts
        return [
            (
                t.type,
                Token(t.string, starts[t.start[0] - 1] + t.start[1],
                      starts[min(t.end[0], len(starts)) - 1] + t.end[1]),
            )
            for t in made
            if t.type != tokenize.ENDMARKER
        ]  # fmt: skip

    @cached_property
    def tokens(self) -> list[Token]:
        """The tokens that mean something."""
        return _plain([token for kind, token in self.raw_tokens if kind not in _LAYOUT])

    @cached_property
    def logical_lines(self) -> list[tuple[int, int]]:
        """From where to where each goes, without indentation and closing comment."""
        lines: list[tuple[int, int]] = []
        first: Token | None = None
        last: Token | None = None
        for kind, token in self.raw_tokens:
            if kind == tokenize.NEWLINE:
                if first is not None and last is not None:
                    lines.append((first.start, last.end))
                first = last = None
            elif kind not in _LAYOUT:
                first, last = first or token, token
        return lines

    def logical_line(self, start: int, end: int) -> tuple[int, int] | None:
        """The logical line that holds a span; None if none holds it whole."""
        i = bisect.bisect_right(self.logical_lines, (start, len(self.text))) - 1
        if i < 0:
            return None
        line = self.logical_lines[i]
        return line if end <= line[1] else None

    @cached_property
    def scopes(self) -> dict[str, list[tuple[int, int]]]:
        """Where functions and classes are, by qualified name."""
        found: dict[str, list[tuple[int, int]]] = {MODULE: [(0, len(self.text))]}

        def look(node: ast.AST, prefix: str) -> None:
            for child in ast.iter_child_nodes(node):
                name = prefix
                if isinstance(child, _FUNCTIONS):
                    found.setdefault(f"{prefix}{child.name}", []).append(self.span(child))
                    name = f"{prefix}{child.name}."
                look(child, name)

        look(self.tree, "")
        return found

    def scope_of(self, start: int, end: int) -> str:
        """The innermost function or class around a span."""
        around = [
            (last - first, name)
            for name, spans in self.scopes.items()
            for first, last in spans
            if first <= start and end <= last
        ]
        return min(around, key=lambda pair: (pair[0], pair[1] == MODULE))[1]

    def matches(self, text: str, spans: list[tuple[int, int]]) -> list[tuple[int, int]]:
        """Where a piece of code stands inside ``spans``."""
        wanted = words(text)
        texts = [token.text for token in self.tokens]
        found = set()
        for i in range(len(texts) - len(wanted) + 1):
            if texts[i] == wanted[0] and texts[i : i + len(wanted)] == wanted:
                place = self.tokens[i].start, self.tokens[i + len(wanted) - 1].end
                if any(first <= place[0] and place[1] <= last for first, last in spans):
                    found.add(place)
        return sorted(found)


def _plain(tokens: list[Token]) -> list[Token]:
    """Without the commas that a formatter adds in front of a closing bracket."""
    return [
        token
        for token, after in zip(tokens, [*tokens[1:], None], strict=True)
        if not (token.text == "," and after is not None and after.text in _CLOSED)
    ]


def words(text: str) -> list[str]:
    """The tokens of a piece of code.

    Raises:
        FaultError: if it cannot be cut into tokens, such as with half of a pair of brackets.
    """
    try:
        made = list(tokenize.generate_tokens(io.StringIO(f"({text}\n)").readline))
    except (tokenize.TokenError, SyntaxError) as error:
        raise FaultError(f"{text!r} is no piece of code with closed brackets: {error}") from None
    inner = [Token(t.string, 0, 0) for t in made if t.type not in _LAYOUT][1:-1]
    if not inner:
        raise FaultError("there is no code in the text to look for")
    depths = itertools.accumulate((t.text in _OPEN) - (t.text in _CLOSED) for t in inner)
    if min(depths) < 0:
        raise FaultError(f"{text!r} closes a bracket that it does not open")
    return [token.text for token in _plain(inner)]


@dataclass(frozen=True)
class Place:
    """Where a fault was found: the span that it replaces; ``moved``: not where the list says."""

    file: str
    function: str
    start: int
    end: int
    source: Source = field(repr=False)
    moved: bool = False


@lru_cache(maxsize=256)
def _source(path: Path, stamp: tuple[int, int]) -> Source:
    return Source(path.read_text(encoding="utf-8"))


def source(path: Path) -> Source:
    """A file's source."""
    stat = path.stat()
    return _source(path, (stat.st_mtime_ns, stat.st_size))


def files(root: Path) -> list[Path]:
    """The Python files that faults are put into."""
    return [path for package in PACKAGES for path in sorted((root / package).rglob("*.py"))]


def locate(root: Path, fault: Fault) -> Place:
    """Where a fault's text is: in its function, or in the only other place that has it.

    Raises:
        FaultError: if it is nowhere, or in several places.
    """
    path = root / fault.file
    try:
        if path.is_file():
            own = source(path)
            found = own.matches(fault.old, own.scopes.get(fault.function, []))
            if len(found) == 1:
                return Place(fault.file, fault.function, *found[0], own)
            if found:
                where = f"{len(found)} times in {fault.file}, {fault.function}"
                raise FaultError(f"is found {where}: take more of the lines around it")
        return _elsewhere(root, fault)
    except FaultError as error:
        raise FaultError(
            f"fault {fault.id} ({fault.file}, {fault.function}): its text {fault.old!r} {error}. "
            "Correct file, function, old and new of this entry in tests/faults/list.yml, then run "
            "python -m tests.faults check"
        ) from None


def _elsewhere(root: Path, fault: Fault) -> Place:
    places = []
    for path in files(root):
        there = source(path)
        for start, end in there.matches(fault.old, there.scopes[MODULE]):
            name = str(path.relative_to(root))
            places.append(Place(name, there.scope_of(start, end), start, end, there, moved=True))
    if len(places) == 1:
        return places[0]
    if not places:
        raise FaultError("is found nowhere")
    told = ", ".join(sorted({f"{place.file}:{place.function}" for place in places})[:4])
    raise FaultError(f"is not in its function any more, and {len(places)} times elsewhere ({told})")


def applied(place: Place, new: str) -> str:
    """The file's text with ``new`` in place of what was found, indented as that was."""
    text = place.source.text
    start, end = place.start, place.end
    line = text[text.rfind("\n", 0, start) + 1 : start]
    indent = line if line.isspace() else ""
    lines = textwrap.dedent(new).strip("\n").split("\n")
    body = "\n".join([lines[0], *(indent + part if part else part for part in lines[1:])])
    return text[:start] + body + text[end:]


def broken(root: Path, fault: Fault) -> tuple[Place, str]:
    """Where a fault is, and the file's text with it.

    Raises:
        FaultError: if the fault cannot be found, is no Python, or changes nothing.
    """
    place = locate(root, fault)
    text = applied(place, fault.new)
    try:
        tree = ast.parse(text)
    except SyntaxError as error:
        raise FaultError(f"fault {fault.id}: with it {place.file} is no Python: {error}") from None
    if _same(place, tree):
        raise FaultError(f"fault {fault.id}: it changes nothing in {place.file}")
    return place, text


def _same(place: Place, tree: ast.Module) -> bool:
    """Whether a file's tree is as it was; only what stands where the fault is can differ."""
    before = place.source.tree.body
    return len(before) == len(tree.body) and all(
        ast.dump(old) == ast.dump(new)
        for old, new in zip(before, tree.body, strict=True)
        if (span := place.source.span(old)) and span[0] < place.end and place.start < span[1]
    )


def reanchored(root: Path, faults: list[Fault]) -> list[Fault]:
    """The faults with the files and functions that they are found in now."""
    places = [locate(root, fault) for fault in faults]
    return [
        replace(fault, file=place.file, function=place.function)
        for fault, place in zip(faults, places, strict=True)
    ]
