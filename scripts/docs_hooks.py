"""What mkdocs cannot know when it builds the guide: what the commands say, how long the files are, and that a reader's
browser fetches nothing from elsewhere."""

import re
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
HELP = re.compile(r"<!-- help: (\w+(?: \w+)*) -->")
SOURCE = re.compile(r"^\| *`((?:src|tests|examples|scripts)/[^`]+)`", re.MULTILINE)
WIDTH = 88
HAN = "[\u3000-\u303f\u4e00-\u9fff\uff00-\uffef\u201c\u201d]"
WRAPPED = re.compile(rf"(?<={HAN})\n *(?={HAN})")
FENCED = re.compile(r"(^```.*?^```$)", re.MULTILINE | re.DOTALL)


def on_page_markdown(markdown: str, page: Any, **_: Any) -> str:
    """Called by mkdocs for every page before it is rendered."""
    name = page.file.src_uri.removesuffix(".md")
    zh = name.endswith(".zh")
    if zh:
        markdown = unwrapped(markdown)
    match name.removesuffix(".zh"):
        case "commands":
            return with_help(markdown)
        case "reading":
            return with_lengths(markdown, "行" if zh else " lines")
    return markdown


def on_post_build(config: Any, **_: Any) -> None:
    """Called by mkdocs when the site is written."""
    found = [f"{path}: {link}" for path in Path(config["site_dir"]).rglob("*.html") for link in fetched(path)]
    if found:
        from mkdocs.exceptions import PluginError

        raise PluginError("pages fetch from other sites:\n" + "\n".join(found[:10]))


def unwrapped(markdown: str) -> str:
    """Chinese has no space between words, so a line's end inside a paragraph must not become one."""
    parts = FENCED.split(markdown)
    return "".join(part if part.startswith("```") else WRAPPED.sub("", part) for part in parts)


def with_help(markdown: str) -> str:
    """`--help` of a command in the place of each `<!-- help: NAME -->`; commands without a place come at the end."""
    texts = help_texts()
    left = [name for name in texts if name not in HELP.findall(markdown)]
    markdown += "".join(f"\n## liushui {name}\n\n<!-- help: {name} -->\n" for name in left)
    return HELP.sub(lambda found: f"```text\n{texts[found[1]]}\n```", markdown)


def help_texts() -> dict[str, str]:
    """command -> what it prints for `--help`; a command of a group is named with it, as in "bench serve"."""
    import typer

    from liushui.cli.main import app

    group: Any = typer.main.get_command(app)
    with group.make_context("liushui", [], resilient_parsing=True) as context:
        context.terminal_width = context.max_content_width = WIDTH
        return commands_of(context)


def commands_of(parent: Any, group: str = "") -> dict[str, str]:
    """Those of the group whose context is `parent`, and of the groups in it."""
    texts: dict[str, str] = {}
    for name, command in parent.command.commands.items():
        with command.make_context(name, [], parent=parent, resilient_parsing=True) as context:
            if hasattr(command, "commands"):
                texts |= commands_of(context, f"{group}{name} ")
            else:
                texts[group + name] = command.get_help(context)
    return texts


def with_lengths(markdown: str, unit: str) -> str:
    """The number of lines after the file that begins a table's row."""

    def counted(found: re.Match[str]) -> str:
        path = ROOT / found[1]
        files = sorted(path.glob("*.py")) if path.is_dir() else [path]
        lines = sum(file.read_text(encoding="utf-8").count("\n") for file in files)
        return f"{found[0]} <small>{lines:,}{unit}</small>"

    return SOURCE.sub(counted, markdown)


class Fetches(HTMLParser):
    """Addresses that a browser loads without being asked."""

    def __init__(self) -> None:
        super().__init__()
        self.links: list[str] = []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        given = dict(attrs)
        loads = tag in ("script", "img", "iframe", "source", "video", "audio", "embed", "object")
        loads = loads or (tag == "link" and given.get("rel") not in ("canonical", "alternate", "prev", "next"))
        for name in ("src", "href", "data"):
            if loads and re.match(r"(https?:)?//", given.get(name) or ""):
                self.links.append(str(given[name]))


def fetched(path: Path) -> list[str]:
    """What the page at `path` loads from other sites."""
    parser = Fetches()
    parser.feed(path.read_text(encoding="utf-8"))
    return parser.links
