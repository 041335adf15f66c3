"""Small changes of a source file that its tests should notice: a statement less, a condition the
other way round. No tests here."""

import ast
from collections.abc import Iterator
from dataclasses import dataclass

SWAPPED = {ast.Lt: "<=", ast.LtE: "<", ast.Gt: ">=", ast.GtE: ">", ast.Eq: "!=", ast.NotEq: "==", ast.Is: "is not", ast.IsNot: "is",
           ast.In: "not in", ast.NotIn: "in"}
CALCULATED = {ast.Add: "-", ast.Sub: "+", ast.Mult: "+", ast.FloorDiv: "*"}
WITHOUT_EFFECT = ("jitter.", "warnings.warn(", "_log.", "logger.")
"""Calls that a result does not depend on: delays for tests, and what is said to the user."""


@dataclass(frozen=True, kw_only=True)
class Mutant:
    """One piece of a file in other words."""

    line: int
    kind: str
    before: str
    after: str
    begin: int
    end: int
    """Bytes of the file, which `after` takes the place of."""

    def applied(self, source: bytes) -> bytes:
        return source[:self.begin] + self.after.encode() + source[self.end:]


def mutants(source: bytes) -> list[Mutant]:
    """In the order of the file, each of which compiles and is another program."""
    maker = _Maker(source)
    found = sorted(maker.of_all(ast.parse(source)), key=lambda mutant: (mutant.begin, mutant.kind))
    return [mutant for mutant in found if _is_another(source, mutant)]


def _is_another(source: bytes, mutant: Mutant) -> bool:
    try:
        return ast.dump(ast.parse(mutant.applied(source))) != ast.dump(ast.parse(source))
    except SyntaxError:
        return False


class _Maker:
    def __init__(self, source: bytes) -> None:
        self._source, self._starts, self._is_beginning = source, [0], False
        for line in source.splitlines(keepends=True):
            self._starts.append(self._starts[-1] + len(line))

    def of_all(self, tree: ast.Module) -> Iterator[Mutant]:
        for function in ast.walk(tree):
            if isinstance(function, (ast.FunctionDef, ast.AsyncFunctionDef)):
                self._is_beginning = function.name == "__init__"
                for statement in function.body:
                    yield from self._of(statement)

    def _of(self, node: ast.AST) -> Iterator[Mutant]:
        """What stands in a function, without functions in it (which are met by themselves), types
        and texts."""
        if isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef, ast.ClassDef)) or self._says_nothing(node):
            return
        yield from self._of_this(node)
        for name, child in ast.iter_fields(node):
            if name not in ("annotation", "returns"):
                for part in child if isinstance(child, list) else [child]:
                    if isinstance(part, ast.AST):
                        yield from self._of(part)

    def _is_remembered(self, node: ast.AST) -> bool:
        """A name that is missing, or an attribute from the start, is noticed by whoever comes
        by."""
        return isinstance(node, ast.Assign) and not self._is_beginning and not all(isinstance(t, ast.Name) for t in node.targets)

    def _says_nothing(self, node: ast.AST) -> bool:
        return isinstance(node, ast.Expr) and (isinstance(node.value, ast.Constant) or self._text(node).startswith(WITHOUT_EFFECT))

    def _of_this(self, node: ast.AST) -> Iterator[Mutant]:
        if isinstance(node, (ast.Expr, ast.AugAssign, ast.Raise, ast.Delete)) or self._is_remembered(node):
            yield self._instead(node, "statement dropped", "pass")
        elif isinstance(node, (ast.If, ast.While, ast.IfExp)):
            yield self._instead(node.test, "condition negated", f"(not ({self._text(node.test)}))")
        elif isinstance(node, ast.With) and not any(item.optional_vars for item in node.items):
            head = (self._at(node.items[0].context_expr)[0], self._at(node.items[-1].context_expr)[1])
            yield self._between(node, "with dropped", (self._at(node)[0], head[1]), "if True")
        elif isinstance(node, ast.Compare) and len(node.ops) == 1:
            between = (self._at(node.left)[1], self._at(node.comparators[0])[0])
            yield self._between(node, "comparison swapped", between, f" {SWAPPED[type(node.ops[0])]} ")
        elif isinstance(node, ast.BinOp) and type(node.op) in CALCULATED:
            between = (self._at(node.left)[1], self._at(node.right)[0])
            yield self._between(node, "operator swapped", between, f" {CALCULATED[type(node.op)]} ")
        elif isinstance(node, ast.BoolOp):
            words = " or " if isinstance(node.op, ast.And) else " and "
            between = (self._at(node.values[0])[1], self._at(node.values[1])[0])
            yield self._between(node, "and, or swapped", between, words)
        elif isinstance(node, ast.Constant) and type(node.value) is int:
            yield self._instead(node, "off by one", str(node.value + 1))
        elif isinstance(node, ast.Constant) and type(node.value) is bool:
            yield self._instead(node, "constant negated", str(not node.value))

    def _at(self, node: ast.AST) -> tuple[int, int]:
        return self._starts[node.lineno - 1] + node.col_offset, self._starts[node.end_lineno - 1] + node.end_col_offset

    def _text(self, node: ast.AST) -> str:
        begin, end = self._at(node)
        return self._source[begin:end].decode()

    def _instead(self, node: ast.AST, kind: str, after: str) -> Mutant:
        return self._between(node, kind, self._at(node), after)

    def _between(self, node: ast.AST, kind: str, at: tuple[int, int], after: str) -> Mutant:
        return Mutant(line=node.lineno, kind=kind, before=self._source[at[0]:at[1]].decode(), after=after, begin=at[0], end=at[1])
