"""Whether a file is Python that this interpreter could run. Nothing is executed."""

import ast
import codecs
import warnings

from app.argspec.report import SyntaxProblem, printable


class NotPython(ValueError):
    """The source does not parse."""

    def __init__(self, problem: SyntaxProblem) -> None:
        self.problem = problem
        super().__init__(f"line {problem.line}, column {problem.column}: {problem.message}")


def parse(source: str | bytes) -> ast.Module:
    """Return the tree of `source`; raise `NotPython` with the place. Whatever the compiler refuses counts too.

    Switches the compiler's warnings off for the whole process meanwhile: not for two threads at once.
    """
    if isinstance(source, str):
        source = source.removeprefix("\ufeff")
    nul = source.find("\0") if isinstance(source, str) else source.find(b"\0")
    if nul >= 0:
        raise NotPython(_at(source, nul, "the file contains NUL bytes; it is not UTF-8 text"))
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            tree = ast.parse(source)
            # finds what only the compiler knows, such as a return outside of a function
            compile(tree, "<script>", "exec", dont_inherit=True)
    except SyntaxError as exc:
        raise NotPython(_problem(source, exc)) from exc
    except (RecursionError, MemoryError) as exc:
        raise NotPython(SyntaxProblem(1, 1, "the code is nested too deeply")) from exc
    except ValueError as exc:
        raise NotPython(SyntaxProblem(1, 1, printable(str(exc), limit=200))) from exc
    return tree


def _problem(source: str | bytes, exc: SyntaxError) -> SyntaxProblem:
    if isinstance(source, bytes) and "codec can't decode" in exc.msg:
        try:  # Python does not say where the bytes are no text
            source.removeprefix(codecs.BOM_UTF8).decode()
        except UnicodeDecodeError as undecodable:
            return _at(source, undecodable.start, "the file is not UTF-8 text")
    return SyntaxProblem(max(exc.lineno or 1, 1), max(exc.offset or 1, 1), printable(exc.msg, limit=200))


def _at(source: str | bytes, position: int, message: str) -> SyntaxProblem:
    before = source[:position] if isinstance(source, bytes) else source[:position].encode("utf-8", "replace")
    line_start = before.rfind(b"\n") + 1
    return SyntaxProblem(before.count(b"\n") + 1, len(before[line_start:].decode("utf-8", "replace")) + 1, message)
