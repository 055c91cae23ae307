"""The rules of the house that ruff, mypy and import-linter cannot say. Exit code 1 and one line per breach.

- no file over 500 lines (C++ and CUDA too), no function over 60, no class over 20 fields;
- no HTTP client in the server and the engine: nothing that a request says is fetched;
- no pickle, no torch.load, no eval or exec, no trust_remote_code: nothing that runs a model's code.
"""

import ast
import sys
from collections.abc import Iterator
from pathlib import Path

FILE_LINES, FUNCTION_LINES, CLASS_FIELDS = 500, 60, 20
FOLDERS = ["src", "tests", "benchmarks", "scripts"]
NATIVE = (".h", ".cpp", ".cu", ".cuh")
FORBIDDEN_MODULES = {"pickle", "cloudpickle", "dill", "joblib", "marshal", "shelve"}
CLIENTS = {"urllib.request", "http.client", "httpx", "requests", "aiohttp", "urllib3", "websockets", "ftplib"}
OFFLINE = ("server", "engine", "core", "runner", "models", "layers", "kernels")
FORBIDDEN_CALLS = {"eval", "exec", "compile", "torch.load", "torch.hub.load", "numpy.load", "np.load"}
IMPORTERS = {"__import__", "importlib.import_module"}


def breaches(path: Path, text: str) -> Iterator[tuple[int, str]]:
    """(line, what is wrong) for one source file."""
    lines = text.count("\n")
    if lines > FILE_LINES:
        yield 1, f"{lines} lines in a file (limit {FILE_LINES})"
    if path.suffix in NATIVE:
        return
    tree = ast.parse(text, str(path))
    names = imported(tree)
    for node in ast.walk(tree):
        match node:
            case ast.FunctionDef() | ast.AsyncFunctionDef():
                length = (node.end_lineno or node.lineno) - node.lineno + 1
                if length > FUNCTION_LINES:
                    yield node.lineno, f"{length} lines in {node.name}() (limit {FUNCTION_LINES})"
            case ast.ClassDef():
                fields = sum(isinstance(item, ast.AnnAssign) for item in node.body)
                if fields > CLASS_FIELDS:
                    yield node.lineno, f"{fields} fields in class {node.name} (limit {CLASS_FIELDS})"
            case ast.Import():
                for alias in node.names:
                    if forbidden(alias.name, path):
                        yield node.lineno, f"imports {alias.name}"
            case ast.ImportFrom(module=str(module)):
                if forbidden(module, path):
                    yield node.lineno, f"imports {module}"
            case ast.Call():
                first, *rest = ast.unparse(node.func).split(".")
                name = ".".join([names.get(first, first), *rest]).removeprefix("builtins.")
                if name in FORBIDDEN_CALLS:
                    yield node.lineno, f"calls {name}()"
                if name in IMPORTERS and any(forbidden(word, path) for word in words(node)):
                    yield node.lineno, f"imports by {name}()"
                if any(keyword.arg == "trust_remote_code" for keyword in node.keywords):
                    yield node.lineno, "passes trust_remote_code"


def imported(tree: ast.AST) -> dict[str, str]:
    """What a file calls things by -> their whole names."""
    found = {}
    for node in ast.walk(tree):
        if isinstance(node, ast.Import | ast.ImportFrom):
            module = f"{node.module}." if isinstance(node, ast.ImportFrom) else ""
            found |= {alias.asname: module + alias.name for alias in node.names if alias.asname}
            found |= {alias.name: module + alias.name for alias in node.names if module and not alias.asname}
    return found


def words(call: ast.Call) -> list[str]:
    """The arguments of a call that are texts."""
    return [item.value for item in call.args if isinstance(item, ast.Constant) and isinstance(item.value, str)]


def forbidden(module: str, path: Path) -> bool:
    """Whether this file may not import this module."""
    root = module.split(".")[0]
    if root in FORBIDDEN_MODULES:
        return True
    return bool({root, module} & CLIENTS) and "tests" not in path.parts and bool(set(OFFLINE) & set(path.parts))


def main(folders: list[str]) -> int:
    count = 0
    for folder in folders:
        for path in sorted(p for p in Path(folder).rglob("*") if p.suffix in (".py", *NATIVE)):
            for line, what in breaches(path, path.read_text(encoding="utf-8")):
                print(f"{path}:{line}: {what}")
                count += 1
    print(f"check_source: {count} breaches" if count else "check_source: ok")
    return int(count > 0)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:] or FOLDERS))
