"""The guide says what the commands print, what the scheduler does, and what is in the house."""

import re
import sys
from collections.abc import Iterator
from importlib import import_module
from pathlib import Path
from typing import Any

import pytest

from liushui.core.blocks import BlockPool
from liushui.core.plan import FinishedEvent
from liushui.core.request import Request, SamplingParams
from liushui.core.scheduler import Scheduler
from liushui.core.sequence import Sequence

pytest.importorskip("typer")
ROOT = Path(__file__).parents[2]
DOCS = ROOT / "docs"
ENGLISH = sorted(path for path in DOCS.rglob("*.md") if not path.name.endswith(".zh.md"))
sys.path.insert(0, str(ROOT / "scripts"))
docs_hooks, guide = import_module("docs_hooks"), import_module("guide")
sys.path.remove(str(ROOT / "scripts"))
GUIDE = [page for page in ENGLISH if page.with_suffix(".zh.md").exists()]
RUN = [block for page in ENGLISH for block in guide.blocks(page)]


def chinese(page: Path) -> Path:
    return page.with_suffix(".zh.md")


# -- the two languages


@pytest.mark.parametrize("page", GUIDE, ids=lambda page: page.stem)
def test_both_languages_show_the_same(page: Path) -> None:
    """The same code, output, figures, tables of numbers and headings, in the same order."""
    one, two = page.read_text(encoding="utf-8"), chinese(page).read_text(encoding="utf-8")
    fences = re.compile(r"^```\w+\n(.*?)^```", re.MULTILINE | re.DOTALL)
    assert [plain(code) for code in fences.findall(one)] == [plain(code) for code in fences.findall(two)]
    assert re.findall(r"<!-- .* -->", one) == re.findall(r"<!-- .* -->", two)
    images = re.compile(r"!\[.*?\]\((.*?)\)")
    assert [name.replace(".svg", "-zh.svg") for name in images.findall(one)] == images.findall(two)
    one, two = fences.sub("", one), fences.sub("", two)
    assert re.findall(r"^#+ ", one, re.MULTILINE) == re.findall(r"^#+ ", two, re.MULTILINE)
    assert len(re.findall(r"^\|", one, re.MULTILINE)) == len(re.findall(r"^\|", two, re.MULTILINE))
    assert one.count("](") == two.count("](")


def plain(code: str) -> str:
    """Code without its comments, and without the language it is asked in."""
    return re.sub(r"\s*#.*|--lang \w+|^\s+", "", code, flags=re.MULTILINE)


def test_every_page_is_in_both_languages() -> None:
    here = {"index", "argmax", "positions", "padding", "static", "architecture", "scheduler", "numerics", "reading"}
    assert here | {"commands", "serving"} == {page.stem for page in ENGLISH} == {page.stem for page in GUIDE}


def test_a_wrapped_line_of_chinese_has_no_space_in_it() -> None:
    page = "没有人等\n一桌坐满，\n  也没有人\n等 it\nends。\n\n- 一\n- 二\n\n```text\n一\n二\n```\n"
    made = docs_hooks.unwrapped(page)
    assert made == "没有人等一桌坐满，也没有人等 it\nends。\n\n- 一\n- 二\n\n```text\n一\n二\n```\n"


# -- what runs


@pytest.mark.real_model
@pytest.mark.parametrize("block", RUN, ids=str)
def test_what_is_shown_is_what_runs(block: Any, smollm2: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    if "transformers" in block.code:
        pytest.importorskip("transformers")
    assert not guide.differences(block)


def test_differences_are_found() -> None:
    block = guide.Block(DOCS / "index.md", 1, "python", "print(1)\nprint(2)\n", "1\n3\n")
    assert "page:\n1\n3" in guide.differences(block)
    assert guide.differences(guide.Block(DOCS / "index.md", 1, "python", "print(1)\n", "1\n")) == ""
    assert guide.first_missing("a … b\n…\nc", "x\na  1 2 b\ny\nc") == ""
    assert guide.first_missing("c\na", "a\nc") == "a"


def test_blocks_that_cannot_run_are_not_lost() -> None:
    """A mark that no block follows would silently test nothing."""
    for page in ENGLISH:
        assert page.read_text(encoding="utf-8").count("<!-- run -->") == len(guide.blocks(page)), page


@pytest.mark.parametrize("page", ENGLISH, ids=lambda page: page.stem)
def test_excerpts_are_in_their_files(page: Path) -> None:
    for name, code in re.findall(r"<!-- source: (\S+) -->\n```python\n(.*?)```", page.read_text(), re.DOTALL):
        assert code in (ROOT / name).read_text(encoding="utf-8"), f"{name} has changed"


# -- the scheduler, by hand


def worked(page: Path) -> Iterator[tuple[dict[str, str], list[list[str]]]]:
    """(settings, rows) of each table that was worked by hand."""
    table = re.compile(r"<!-- schedule: (.*) -->\n\n\|.*\n\|.*\n((?:\|.*\n)+)")
    for settings, rows in table.findall(page.read_text(encoding="utf-8")):
        cells = [[cell.strip() for cell in row.strip()[1:-1].split("|")] for row in rows.splitlines()]
        yield dict(pair.split("=") for pair in settings.split()), cells


def scheduled(settings: dict[str, str]) -> list[list[str]]:
    """The same table from the real scheduler."""
    names = [name for name in settings if name.isupper()]
    pool = BlockPool(int(settings["blocks"]), 4)
    limits = {"max_num_seqs": int(settings["seats"]), "max_num_batched_tokens": int(settings["budget"])}
    scheduler = Scheduler(pool, max_model_len=100, **limits)
    for name in names:
        prompt, answer = map(int, settings[name].split("+"))
        ids = tuple(1000 * ord(name) + i for i in range(prompt))
        scheduler.add(Sequence(Request(name, ids, SamplingParams(max_tokens=answer), seed=0, max_tokens=answer)))
    rows = []
    while plan := scheduler.schedule():
        fed = dict.fromkeys(names, "")
        for item in plan.items:
            last = item.start + item.num_tokens - 1
            span = f"{item.start}-{last}" if last > item.start else str(last)
            fed[item.seq_id] = span + "*" * item.samples
        events = scheduler.update(plan, {item.seq_id: [7] for item in plan.items if item.samples})
        ends = sorted(event.seq_id for event in events if isinstance(event, FinishedEvent))
        rows.append([str(plan.step_id), *fed.values(), str(plan.num_tokens), str(pool.num_free), " ".join(ends)])
    return rows


@pytest.mark.parametrize("name", ["scheduler.md", "scheduler.zh.md"])
def test_the_tables_worked_by_hand_are_what_the_scheduler_does(name: str) -> None:
    tables = list(worked(DOCS / name))
    assert len(tables) == 2
    for settings, rows in tables:
        assert rows == scheduled(settings)


# -- the house


def test_files_named_in_the_guide_exist() -> None:
    """Paths in backquotes, from the repository's root or from the package's."""
    folders = "src|tests|examples|scripts|benchmarks|core|engine|runner|layers|kernels|models|loading|cli|server"
    path = re.compile(rf"`((?:{folders})/[\w./-]*)`")
    missing = [
        f"{page.name}: {name}"
        for page in DOCS.rglob("*.md")
        for name in path.findall(page.read_text(encoding="utf-8"))
        if not any((folder / name).exists() for folder in (ROOT, ROOT / "src" / "liushui"))
    ]
    assert not missing


def test_reading_order_adds_up() -> None:
    text = (DOCS / "reading.md").read_text(encoding="utf-8")
    total = 0
    for section in re.split(r"^## ", text, flags=re.MULTILINE)[1:]:
        minutes = sum(map(int, re.findall(r"^\| `[^`]+` \| (\d+) \|", section, re.MULTILINE)))
        if said := re.search(r"\((\d+) minutes\)", section.splitlines()[0]):
            assert int(said[1]) == minutes, section.splitlines()[0]
        total += minutes
    assert total == 240  # "four hours"
    counted = docs_hooks.with_lengths(text, " lines")
    lines = (ROOT / "src/liushui/core/plan.py").read_text(encoding="utf-8").count("\n")
    assert f"| `src/liushui/core/plan.py` <small>{lines} lines</small> |" in counted
    assert counted.count("<small>") == len(re.findall(r"^\| `", text, re.MULTILINE))


# -- the commands


def test_commands_are_those_of_the_program() -> None:
    helps = docs_hooks.help_texts()
    page = docs_hooks.with_help((DOCS / "commands.md").read_text(encoding="utf-8"))
    for name, text in helps.items():
        assert f"## liushui {name}\n" in page
        assert text in page
    assert set(re.findall(r"^## liushui (.+)", page, re.MULTILINE)) == set(helps)


@pytest.mark.parametrize("page", [*GUIDE, *map(chinese, GUIDE), *ROOT.glob("README*.md")], ids=lambda page: page.name)
def test_shown_commands_have_the_flags_they_are_given(page: Path) -> None:
    helps = docs_hooks.help_texts()
    for name, rest in re.findall(r"^(?:\$ )?liushui (\w+)([^#\n]*)", page.read_text(encoding="utf-8"), re.MULTILINE):
        if name not in helps:  # a group: its command is the next word
            name = " ".join([name, *rest.split()[:1]])
        assert name in helps, f"{page.name}: liushui {name}"
        for flag in re.findall(r"(?<!\S)--?[a-z][\w-]*", rest):
            assert re.search(rf"(?<![\w-]){re.escape(flag)}(?![\w-])", helps[name]), f"{page.name}: {name} {flag}"


# -- the site and its figures


def test_a_page_that_fetches_from_elsewhere_is_found(tmp_path: Path) -> None:
    page = tmp_path / "page.html"
    page.write_text('<a href="https://a.org">a</a><img src="x.svg"><script src="//cdn.org/x.js"></script>')
    assert docs_hooks.fetched(page) == ["//cdn.org/x.js"]


def test_figures_are_small_and_alone() -> None:
    figures = sorted((DOCS / "img").glob("*.svg"))
    assert len(figures) == 9
    for figure in figures:
        text = figure.read_text(encoding="utf-8")
        assert len(text) < 150_000
        assert "http" not in text.replace("http://www.w3.org/2000/svg", "")


@pytest.mark.real_model
def test_figures_are_what_the_engine_does(smollm2: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(str(ROOT / "scripts"))
    import figures

    for made in figures.draw("smollm2", tmp_path):
        assert made.read_text(encoding="utf-8") == (DOCS / "img" / made.name).read_text(encoding="utf-8"), made.name
