"""Names that have to do with parsers, and which functions of a script mention them."""

import ast

DATACLASS_PARSERS = frozenset({"HfArgumentParser", "TrlParser"})
STRICT_PARSES = frozenset(
    {"parse_args", "parse_intermixed_args", "parse_args_into_dataclasses", "parse_args_and_config"}
)
LENIENT_PARSES = frozenset({"parse_known_args", "parse_known_intermixed_args"})
PARSES = STRICT_PARSES | LENIENT_PARSES
BUILDS = frozenset(
    {
        "add_argument",
        "add_arguments",
        "add_argument_group",
        "add_mutually_exclusive_group",
        "add_subparsers",
        "set_defaults",
    }
)


def relevant_names(tree: ast.Module) -> frozenset[str]:
    """Return the names of the functions and classes that have to do with parsers, directly or through others."""
    definitions = [n for n in ast.walk(tree) if isinstance(n, (ast.FunctionDef, ast.AsyncFunctionDef, ast.ClassDef))]
    aliases = {
        alias.asname or alias.name
        for node in ast.walk(tree)
        if isinstance(node, (ast.Import, ast.ImportFrom))
        for alias in node.names
        if "arser" in alias.name or alias.name in ("argparse", "tyro", "simple_parsing")
    }
    mentioned_in: dict[str, list[str]] = {}
    for node in definitions:
        for word in mentioned(node):
            mentioned_in.setdefault(word, []).append(node.name)
    relevant: set[str] = set()
    reached = [*PARSES, *BUILDS, *DATACLASS_PARSERS, *aliases, "ArgumentParser"]
    while reached:
        found = set(mentioned_in.pop(reached.pop(), ())) - relevant
        relevant |= found
        reached += found
    return frozenset(relevant)


def mentioned(node: ast.AST) -> set[str]:
    """Return all names and attributes in a piece of code."""
    names = {part.id for part in ast.walk(node) if isinstance(part, ast.Name)}
    return names | {part.attr for part in ast.walk(node) if isinstance(part, ast.Attribute)}
