"""Where in the source a claim was asked for its truth, and whether a gate may stand there.

A claim under ``or``, ``not`` or ``if`` would turn "undecided" into a silent yes or no, so only ``assert`` (and
``and`` inside it) may ask.
"""

from __future__ import annotations

import ast
import dis
import linecache
from functools import cache
from types import CodeType, FrameType
from typing import NamedTuple

ADVICE = (
    "write `assert claim` as a statement of its own; for alternatives `assert any_of(a, b)`, for what must hold "
    "beforehand `requires(claim, text)`, for a reservation `caveat(claim, text)`"
)


class Place(NamedTuple):
    """A statement: its file, its first and last line, and the text of the claim."""

    file: str
    line: int
    last_line: int
    text: str


def place_of_call(frame: FrameType) -> Place:
    """The statement that `frame` is executing, with the first argument of its call as text."""
    statement = _statement(frame)
    if statement is None:
        return Place(frame.f_code.co_filename, frame.f_lineno, frame.f_lineno, "")
    call = statement.value if isinstance(statement, ast.Expr) else None
    first = call.args[0] if isinstance(call, ast.Call) and call.args else None
    return _place(frame, statement, first)


def place_of_assert(frame: FrameType) -> Place:
    """The assert statement that asks for a claim's truth in `frame`; TypeError when something else asks."""
    statement = _statement(frame)
    where = f"{frame.f_code.co_filename}:{frame.f_lineno}"
    if not isinstance(statement, ast.Assert):
        raise TypeError(f"{where}: a gate has a truth only in an assert statement: {ADVICE}")
    operands = _conjuncts(statement.test)
    hidden = any(_hides_undecided(node) for node in operands) or _asked_inside(frame, statement)
    if hidden or not _asked_by_jump(frame):
        raise TypeError(f"{where}: a gate must not stand under `or`, `not`, `if`, `any` or `all`: {ADVICE}")
    alone = len(operands) == 1 and not (isinstance(statement.test, ast.Compare) and len(statement.test.ops) > 1)
    return _place(frame, statement, statement.test if alone else None)


def _place(frame: FrameType, statement: ast.stmt, expression: ast.expr | None) -> Place:
    file = frame.f_code.co_filename
    text = ""
    if expression is not None:
        text = ast.get_source_segment("".join(linecache.getlines(file)), expression) or ""
    return Place(file, statement.lineno, statement.end_lineno or statement.lineno, " ".join(text.split()))


def _conjuncts(test: ast.expr) -> list[ast.expr]:
    if isinstance(test, ast.BoolOp) and isinstance(test.op, ast.And):
        return [leaf for value in test.values for leaf in _conjuncts(value)]
    return [test]


def _hides_undecided(node: ast.AST) -> bool:
    if isinstance(node, ast.BoolOp):
        return isinstance(node.op, ast.Or)
    if isinstance(node, ast.UnaryOp):
        return isinstance(node.op, ast.Not)
    return isinstance(node, ast.IfExp | ast.ListComp | ast.SetComp | ast.DictComp | ast.GeneratorExp | ast.Lambda)


def _asked_inside(frame: FrameType, statement: ast.Assert) -> bool:
    """Whether the asking instruction lies within a part of the assert that would lose an undecided answer."""
    positions = list(frame.f_code.co_positions())
    line, last_line, column, last_column = positions[frame.f_lasti // 2]
    if line is None or last_line is None or column is None or last_column is None:
        return False
    for node in ast.walk(statement):
        if node is statement.msg or (isinstance(node, ast.expr) and _hides_undecided(node)):
            start = (node.lineno, node.col_offset)
            end = (node.end_lineno or node.lineno, node.end_col_offset or node.col_offset)
            if start <= (line, column) and (last_line, last_column) <= end:
                return True
    return False


def _asked_by_jump(frame: FrameType) -> bool:
    """Whether a conditional jump asks (an assert's own), not a call such as ``all()`` nor ``not``."""
    index_at, names = _instructions(frame.f_code)
    index = index_at.get(frame.f_lasti)
    if index is None:
        return True
    # 3.13 converts in an instruction of its own, or in the comparison, right before the jump.
    asking = names[index + 1] if names[index] in ("TO_BOOL", "COMPARE_OP") else names[index]
    return "JUMP" in asking


@cache
def _instructions(code: CodeType) -> tuple[dict[int, int], list[str]]:
    """Index by offset, and names, of the instructions; a far jump's EXTENDED_ARG prefix asks nothing."""
    found = [i for i in dis.get_instructions(code) if i.opname != "EXTENDED_ARG"]
    return {instruction.offset: i for i, instruction in enumerate(found)}, [i.opname for i in found]


def _statement(frame: FrameType) -> ast.stmt | None:
    """The innermost statement around the line that `frame` executes."""
    statements = _statements(frame.f_code.co_filename, "".join(linecache.getlines(frame.f_code.co_filename)))
    around = [s for s in statements if s.lineno <= frame.f_lineno <= (s.end_lineno or s.lineno)]
    column = _column(frame)
    if column is not None and len(around) > 1:
        exact = [s for s in around if s.lineno < frame.f_lineno or s.col_offset <= column]
        around = exact or around
    return max(around, key=lambda s: (s.lineno, s.col_offset), default=None)


def _column(frame: FrameType) -> int | None:
    positions = list(frame.f_code.co_positions())
    index = frame.f_lasti // 2
    return positions[index][2] if index < len(positions) else None


@cache
def _statements(file: str, source: str) -> list[ast.stmt]:
    if not source:
        raise TypeError(f"{file}: a gate needs its source beside it to be recorded; run it from a file")
    return [node for node in ast.walk(ast.parse(source)) if isinstance(node, ast.stmt)]
