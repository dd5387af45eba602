"""What a reviewer of a script should look at, found without running it.

Names are followed through imports and aliases, no further: a script that wants to hide what it does can. What is found
is a help for a person who reads the code, never a verdict.
"""

import ast
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Final, Literal

from app.argspec.report import printable

Kind = Literal[
    "network",
    "process",
    "evaluates",
    "encoded",
    "unpickles",
    "native",
    "writes",
    "secret_variable",
    "all_variables",
    "search_path",
    "computed_import",
    "hidden_characters",
]

MAX_RISKS: Final = 200
_QUOTED: Final = 200
_NETWORK: Final = frozenset(
    (
        *(
            "socket",
            "ssl",
            "socketserver",
            "http",
            "urllib.request",
            "urllib3",
            "requests",
            "httpx",
            "aiohttp",
            "pycurl",
        ),
        *("ftplib", "smtplib", "telnetlib", "imaplib", "poplib", "nntplib", "xmlrpc", "paramiko", "fabric", "asyncssh"),
        *("websocket", "websockets", "grpc", "zmq", "boto3", "botocore", "pymongo", "psycopg", "psycopg2", "asyncpg"),
    )
)
_NETWORK_CALLS: Final = frozenset({"asyncio.open_connection", "asyncio.start_server", "urllib.urlopen"})
_PROCESS: Final = re.compile(
    r"os\.(system|popen|fork\w*|exec\w+|spawn\w+|posix_spawnp?|startfile)|subprocess\..+|pty\.(spawn|fork)|"
    r"commands\..+|asyncio\.create_subprocess_\w+"
)
_EVALUATES: Final = re.compile(
    r"(builtins\.)?(eval|exec|compile)|runpy\.\w+|code\.(InteractiveInterpreter|interact|compile_command)|"
    r"types\.(FunctionType|CodeType)|importlib\.(util|machinery)\.\w+|imp\.load_\w+"
)
_DECODES: Final = re.compile(
    r"base64\.\w*decode\w*|binascii\.\w+|codecs\.decode|zlib\.decompress|bz2\.decompress|lzma\.decompress|"
    r"gzip\.decompress|(bytes|bytearray)\.fromhex|marshal\.loads?"
)
_UNPICKLES: Final = re.compile(
    r"(pickle|_pickle|cPickle|cloudpickle|dill)\.(loads?|Unpickler)|joblib\.load|marshal\.loads?|shelve\.open|"
    r"pandas\.read_pickle|(torch|numpy)\.load|yaml\.(load|load_all|unsafe_load|full_load|unsafe_load_all)"
)
_NATIVE: Final = frozenset({"ctypes", "cffi", "_ctypes"})
_SECRET: Final = re.compile(r"TOKEN|SECRET|PASSW|API_?KEY|ACCESS_?KEY|CREDENTIAL|PRIVATE|AUTH", re.IGNORECASE)
_WRITES: Final = re.compile(
    r"shutil\.(copy\w*|move|rmtree)|"
    r"os\.(remove|unlink|rename|renames|replace|rmdir|removedirs|mkdir|makedirs|chmod|chown|symlink|link|truncate)"
)
_PATH_WRITES: Final = frozenset(
    (
        *("write_text", "write_bytes", "unlink", "rename", "replace", "rmdir"),
        *("mkdir", "chmod", "touch", "symlink_to", "hardlink_to"),
    )
)
_PATHS: Final = frozenset(f"pathlib.{name}" for name in ("Path", "PosixPath", "PurePath"))
_SEARCH_PATH: Final = frozenset({"sys.path", "sys.meta_path", "sys.path_hooks", "sys.modules", "site.addsitedir"})
# what reverses, joins or hides text on a screen: no script needs it in its source
_HIDDEN: Final = re.compile("[\u200b-\u200f\u202a-\u202e\u2060-\u2064\u2066-\u2069\ufeff\u00ad]")


@dataclass(frozen=True)
class Risk:
    """Something to look at: what it is, the line, the name that says so, and the code that stands there."""

    kind: Kind
    line: int
    name: str
    quoted: str


@dataclass(frozen=True)
class Risks:
    """What was found, by line; `more` counts what is not listed."""

    found: Sequence[Risk] = ()
    more: int = 0


def read_risks(tree: ast.Module, source: bytes) -> Risks:
    """Return what a reviewer of the script should look at."""
    lines = re.split(r"\r\n|\r|\n", source.decode("utf-8", "replace"))
    nodes = list(ast.walk(tree))
    names = _Names(nodes)
    decoded = _decoded_names(nodes, names)
    found: dict[tuple[int, str, str], tuple[int, Kind]] = {}
    for node in nodes:
        for kind, name in _risks_of(node, names, decoded):
            assert isinstance(node, ast.stmt | ast.expr)
            found.setdefault((node.lineno, kind, name), (node.col_offset, kind))
    risks = [
        Risk(kind, line, printable(name, limit=_QUOTED), _quoted(lines, line, column))
        for (line, _, name), (column, kind) in found.items()
    ]
    for number, line in enumerate(lines, start=1):
        text = line.removeprefix("\ufeff") if number == 1 else line
        if hidden := _HIDDEN.search(text):
            name = f"U+{ord(hidden[0]):04X}"
            risks.append(Risk("hidden_characters", number, name, printable(text[hidden.start() :], limit=_QUOTED)))
    risks.sort(key=lambda risk: (risk.line, risk.kind, risk.name))
    return Risks(tuple(risks[:MAX_RISKS]), max(0, len(risks) - MAX_RISKS))


class _Names:
    """What names stand for: `sp.run` for `subprocess.run` after `import subprocess as sp`."""

    def __init__(self, nodes: Sequence[ast.AST]) -> None:
        self._known: dict[str, str] = {}
        for node in nodes:
            match node:
                case ast.Import(names=aliases):
                    for alias in aliases:
                        whole = alias.name if alias.asname else alias.name.partition(".")[0]
                        self._known[alias.asname or whole] = whole
                case ast.ImportFrom(module=str(module), names=aliases, level=0):
                    self._known |= {alias.asname or alias.name: f"{module}.{alias.name}" for alias in aliases}
        if "np" not in self._known:
            self._known["np"] = "numpy"

    def of(self, node: ast.AST) -> str:
        """Return the dotted name of an expression, empty if it has none."""
        parts: list[str] = []
        while True:
            match node:
                case ast.Attribute(value=value, attr=attr):
                    parts.append(attr)
                    node = value
                case ast.Call(func=ast.Name(id="getattr"), args=[value, ast.Constant(value=str(attr)), *_]):
                    parts.append(attr)
                    node = value
                case ast.Call(args=[ast.Constant(value=str(module)), *_]) if _imports(node):
                    return ".".join([module, *reversed(parts)])
                case ast.Name(id=name):
                    return ".".join([self._known.get(name, name), *reversed(parts)])
                case _:
                    return ""


def _risks_of(node: ast.AST, names: _Names, decoded: frozenset[str]) -> Iterator[tuple[Kind, str]]:
    match node:
        case ast.Import(names=aliases):
            for alias in aliases:
                yield from _module_risks(alias.name)
        case ast.ImportFrom(module=str(module), names=aliases, level=0):
            yield from _module_risks(module)
            for alias in aliases:
                whole = f"{module}.{alias.name}"
                yield from _module_risks(whole)
                if whole in _SEARCH_PATH:
                    yield "search_path", whole
        case ast.Call():
            yield from _call_risks(node, names, decoded)
        case ast.Attribute() if (name := names.of(node)) in _SEARCH_PATH:
            yield "search_path", name
        case ast.Subscript(value=value, slice=ast.Constant(value=str(variable))):
            if names.of(value) in ("os.environ", "os.environb") and _SECRET.search(variable):
                yield "secret_variable", variable


def _module_risks(module: str) -> Iterator[tuple[Kind, str]]:
    top = module.partition(".")[0]
    if top in _NETWORK or module in _NETWORK:
        yield "network", module
    elif top in _NATIVE:
        yield "native", module
    elif top in ("subprocess", "pty") or _PROCESS.fullmatch(module):
        yield "process", module
    elif _EVALUATES.fullmatch(module):
        yield "evaluates", module


def _call_risks(call: ast.Call, names: _Names, decoded: frozenset[str]) -> Iterator[tuple[Kind, str]]:
    name = names.of(call.func)
    if _imports(call):
        match call.args:
            case [ast.Constant(value=str(module)), *_]:
                yield from _module_risks(module)
            case _:
                yield "computed_import", name or "import_module"
    elif name == "getattr" and len(call.args) > 1 and not isinstance(call.args[1], ast.Constant):
        of = names.of(call.args[0]).partition(".")[0]
        if of in ("os", "subprocess", "builtins", "__builtins__", "sys", "socket", "importlib"):
            yield "evaluates", f"getattr({of}, …)"
    if name in _NETWORK_CALLS:
        yield "network", name
    if _PROCESS.fullmatch(name):
        yield "process", name
    if _EVALUATES.fullmatch(name):
        hidden = any(_is_decoded(argument, names, decoded) for argument in call.args)
        yield ("encoded" if hidden else "evaluates"), name
    if _UNPICKLES.fullmatch(name) and not _is_safe_load(name, call):
        yield "unpickles", name
    yield from _variable_risks(call, name)
    if (target := _written(call, name, names)) is not None:
        yield "writes", target


def _variable_risks(call: ast.Call, name: str) -> Iterator[tuple[Kind, str]]:
    match call.args:
        case [ast.Constant(value=str(variable)), *_] if name in ("os.getenv", "os.environ.get", "os.environ.pop"):
            if _SECRET.search(variable):
                yield "secret_variable", variable
    if name in ("os.environ.copy", "os.environ.items", "os.environ.values"):
        yield "all_variables", name
    for argument in call.args:
        match argument:
            case ast.Attribute(value=ast.Name(id="os"), attr="environ"):
                yield "all_variables", "os.environ"


def _written(call: ast.Call, name: str, names: _Names) -> str | None:
    """Return the literal path that a call writes to or removes; the output folder is never one."""
    if name in ("open", "io.open", "builtins.open", "codecs.open"):
        mode = _argument(call, 1, "mode")
        writes = isinstance(mode, ast.Constant) and isinstance(mode.value, str) and set(mode.value) & set("wax+")
        return _literal(_argument(call, 0, "file")) if writes else None
    if _WRITES.fullmatch(name):
        return next((text for one in reversed(call.args) if (text := _literal(one)) is not None), None)
    match call.func:
        case ast.Attribute(value=ast.Call(func=func, args=[path, *_]), attr=attr):
            if attr in _PATH_WRITES and names.of(func) in _PATHS:
                return _literal(path)
    return None


def _argument(call: ast.Call, position: int, name: str) -> ast.expr | None:
    if position < len(call.args):
        return call.args[position]
    return next((keyword.value for keyword in call.keywords if keyword.arg == name), None)


def _literal(node: ast.expr | None) -> str | None:
    """Return a text as far as the source says it; None if it does not begin with a constant."""
    match node:
        case ast.Constant(value=str(text)):
            return text
        case ast.JoinedStr(values=[ast.Constant(value=str(text)), *_]):
            return f"{text}…"
        case _:
            return None


def _is_safe_load(name: str, call: ast.Call) -> bool:
    given: Mapping[str | None, ast.expr] = {keyword.arg: keyword.value for keyword in call.keywords}

    def says(keyword: str, value: object) -> bool:
        node = given.get(keyword)
        return isinstance(node, ast.Constant) and node.value is value

    match name:
        case "torch.load":
            return says("weights_only", True)
        case "numpy.load":
            return "allow_pickle" not in given or says("allow_pickle", False)
        case "yaml.load" | "yaml.load_all":
            loader = _argument(call, 1, "Loader")
            return isinstance(loader, ast.Attribute | ast.Name) and "Safe" in ast.unparse(loader)
        case _:
            return False


def _decoded_names(nodes: Sequence[ast.AST], names: _Names) -> frozenset[str]:
    """Return the variables that are given something decoded."""
    found = set()
    for node in nodes:
        match node:
            case ast.Assign(targets=targets, value=value) if _is_decoded(value, names, frozenset()):
                found |= {target.id for target in targets if isinstance(target, ast.Name)}
    return frozenset(found)


def _is_decoded(node: ast.expr, names: _Names, decoded: frozenset[str]) -> bool:
    return any(
        (isinstance(part, ast.Call) and _DECODES.fullmatch(names.of(part.func)) is not None)
        or (isinstance(part, ast.Name) and part.id in decoded)
        for part in ast.walk(node)
    )


def _imports(call: ast.Call) -> bool:
    match call.func:
        case ast.Name(id="__import__" | "import_module") | ast.Attribute(attr="import_module" | "__import__"):
            return True
        case _:
            return False


def _quoted(lines: Sequence[str], line: int, column: int) -> str:
    """Return the code from where it begins: what stands far to the right of its line is seen, too."""
    text = lines[line - 1] if line <= len(lines) else ""
    return printable(text.encode()[column:].decode("utf-8", "replace").strip(), limit=_QUOTED)
