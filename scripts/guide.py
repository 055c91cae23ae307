"""Run what the guide shows, and compare it with what the guide says: `python scripts/guide.py docs/numerics.md ...`

A block after the line `<!-- run -->` is run. Of a python block the whole output must be that of the text block behind
it. In a console block a line `$ liushui ...` or `$ python examples/...` is a command, and what follows it must be found
in its output, in order: `…` stands for anything. `--update` writes the python blocks' output into the page.
"""

import argparse
import io
import re
import runpy
import shlex
import sys
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager, redirect_stdout
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
LINES = r"(?P<{}>(?:(?!```).*\n)*)```"
BLOCK = re.compile(
    rf"<!-- run -->\n+```(?P<kind>python|console)\n{LINES.format('code')}(?:\n+```text\n{LINES.format('output')})?"
)
PLAIN = ["--dtype", "float32", "--weights", "float32", "--threads", "1"]
"""The same numbers on every processor."""


@dataclass(frozen=True)
class Block:
    """Something to run."""

    page: Path
    line: int
    kind: str
    code: str
    output: str | None

    def __str__(self) -> str:
        return f"{self.page.name}:{self.line}"


def blocks(page: Path) -> list[Block]:
    """The blocks of a page that say they can be run."""
    text = page.read_text(encoding="utf-8")
    return [
        Block(page, text.count("\n", 0, found.start()) + 1, found["kind"], found["code"], found["output"])
        for found in BLOCK.finditer(text)
    ]


def commands(block: Block) -> Iterator[tuple[list[str], str]]:
    """(words of a command, what the page shows of its output) of a console block."""
    for part in re.split(r"^\$ ", block.code, flags=re.MULTILINE)[1:]:
        command, _, shown = part.partition("\n")
        yield shlex.split(command), shown


def differences(block: Block) -> str:
    """Run the block. What is not as the page says; empty if all is."""
    if block.kind == "python":
        made = run_python(block.code)
        return (
            ""
            if block.output is None or made == block.output.rstrip()
            else f"printed:\n{made}\n\npage:\n{block.output}"
        )
    for words, shown in commands(block):
        made = run_command(words)
        if missing := first_missing(shown, made):
            return f"{' '.join(words)}\nno line {missing!r} in:\n{made}"
    return ""


def first_missing(shown: str, made: str) -> str:
    """The first line of `shown` that does not follow in `made`; `…` stands for anything, spaces are all alike."""
    lines = iter(" ".join(line.split()) for line in made.splitlines())
    for wanted in filter(None, (" ".join(line.split()) for line in shown.splitlines())):
        pattern = re.compile(".*".join(map(re.escape, wanted.split("…"))))
        if wanted != "…" and not any(pattern.fullmatch(line) for line in lines):
            return wanted
    return ""


def run_python(code: str) -> str:
    """What a program prints."""
    with tempfile.TemporaryDirectory() as folder, redirect_stdout(io.StringIO()) as out:
        path = Path(folder) / "snippet.py"
        path.write_text(code, encoding="utf-8")
        runpy.run_path(str(path), run_name="__main__")
    return out.getvalue().rstrip("\n")


def run_command(words: list[str]) -> str:
    """What `liushui ...` or `python FILE` prints on standard output, run in this process."""
    with redirect_stdout(io.StringIO()) as out, as_called(words):
        if words[0] == "python":
            runpy.run_path(str(ROOT / words[1]), run_name="__main__")
        else:
            import typer

            from liushui.cli.main import app

            typer.main.get_command(app).main([*words[1:], *PLAIN], prog_name="liushui", standalone_mode=False)
    return out.getvalue()


@contextmanager
def as_called(words: list[str]) -> Iterator[None]:
    """`sys.argv` and `sys.path` as the program called by `words` would see them."""
    argv, path = sys.argv, sys.path
    sys.argv, sys.path = words[1:], [str((ROOT / words[-1]).parent), *path]
    try:
        yield
    finally:
        sys.argv, sys.path = argv, path


def update(page: Path) -> None:
    """Write what the page's python blocks print into the text blocks behind them."""

    def ran(found: re.Match[str]) -> str:
        if found["kind"] != "python" or found["output"] is None:
            return found[0]
        return f"<!-- run -->\n```python\n{found['code']}```\n\n```text\n{run_python(found['code'])}\n```"

    page.write_text(BLOCK.sub(ran, page.read_text(encoding="utf-8")), encoding="utf-8")


def main() -> int:
    parser = argparse.ArgumentParser(description="Run what the guide shows.")
    parser.add_argument("pages", type=Path, nargs="*", default=sorted((ROOT / "docs").rglob("*.md")))
    parser.add_argument("--update", action="store_true", help="write the output of python blocks into the pages")
    args = parser.parse_args()
    wrong = 0
    for page in args.pages:
        if args.update:
            update(page)
        for block in blocks(page):
            found = differences(block)
            wrong += bool(found)
            print(f"{block}: {'DIFFERENT' if found else 'ok'}\n{found}".rstrip())
    return int(wrong > 0)


if __name__ == "__main__":
    sys.exit(main())
