"""`liushui explain --html`: one page without scripts that needs nothing else."""

from collections.abc import Sequence
from html import escape
from typing import TYPE_CHECKING

from liushui.cli.explain_tables import conclusions, shapes
from liushui.cli.explain_words import Words, listed, share, visible

if TYPE_CHECKING:
    from liushui.engine.explain import Choice, Explanation, PackedRow, PaddedRow, Step, Token

STYLE = """
:root { --ink: #22303c; --faint: #6b7885; --line: #dfe4e8; --mark: #e07a5f; --cool: #3d85c6; --good: #3b7d5c; }
* { box-sizing: border-box; }
body { margin: 2rem auto; padding: 0 1.2rem; max-width: 1320px; color: var(--ink); background: #fff;
  font: 15px/1.5 system-ui, "Noto Sans", "Noto Sans CJK SC", "PingFang SC", "Microsoft YaHei", sans-serif; }
h1 { font-size: 1.5rem; margin: 0 0 .3rem; } h2 { font-size: 1.1rem; margin: 1.8rem 0 .5rem; }
code, .tok { font-family: ui-monospace, "Noto Sans Mono", "Noto Sans Mono CJK SC", Menlo, monospace; }
.faint { color: var(--faint); } .notes { padding-left: 1.2rem; color: var(--faint); }
.ways { display: grid; grid-template-columns: repeat(var(--ways), minmax(0, 1fr)); gap: 1rem; }
.way { border: 1px solid var(--line); border-radius: 10px; padding: .7rem .9rem; overflow-x: auto; }
.way > h3 { margin: 0; font-size: .95rem; } .shapes { font-size: .78rem; color: var(--faint); margin: .1rem 0 .6rem; }
.row { padding: .5rem 0; border-top: 1px solid var(--line); display: flex; gap: .7rem; align-items: flex-start; }
.number { flex: none; width: 1.5rem; height: 1.5rem; border-radius: 50%; color: #fff; text-align: center;
  font-size: .85rem; }
table.cells { border-collapse: separate; border-spacing: 3px 0; font-size: .78rem; }
table.cells td { padding: 0 .35rem; text-align: center; white-space: pre; }
table.cells th { font-weight: normal; color: var(--faint); text-align: right; padding-right: .4rem; white-space: pre; }
td.tok { border-radius: 5px; color: #fff; font-size: .85rem; }
td.pad { background: repeating-linear-gradient(45deg, #eceff1 0 5px, #fff 5px 10px); color: var(--faint); }
.pick { margin-top: .25rem; } .pick b { color: var(--good); }
.row.done { opacity: .45; }
.bad { color: #b3382c; font-weight: 600; } .good { color: var(--good); font-weight: 600; }
.box { border-left: 4px solid var(--mark); background: #fdf4f1; padding: .6rem 1rem; margin: 1rem 0; }
table.answers { border-collapse: collapse; } table.answers td, table.answers th { text-align: left;
  padding: .25rem .9rem .25rem 0; border-bottom: 1px solid var(--line); vertical-align: top; }
"""
COLOURS = ("#3d85c6", "#e07a5f", "#5f9c7f", "#8d6bb8", "#c98f2a", "#3f9c9c", "#c9628a", "#7d9433")


def page(made: "Explanation", words: Words) -> str:
    """The whole document."""
    title = words("title", count=len(made.prompts), model=made.model)
    ways = 2 if made.padded else 1
    parts = [
        f'<!doctype html><html lang="{words.lang}"><head><meta charset="utf-8">',
        '<meta name="viewport" content="width=device-width, initial-scale=1">',
        f"<title>{escape(title)}</title><style>{STYLE}</style></head>",
        f'<body style="--ways:{ways}"><h1>{escape(title)}</h1>',
        f'<p class="faint">{"<br>".join(escape(line) for line in made.startup[:3])}</p>',
        f"<h2>{escape(words('prompts'))}</h2>",
        *(_row(i, _cells([("id", [t.id for t in p.tokens])], p.tokens, i)) for i, p in enumerate(made.prompts)),
        f'<ul class="notes">{"".join(f"<li>{escape(note)}</li>" for note in words.notes(ways == 2))}</ul>',
    ]
    if made.mistake:
        parts.append(f'<div class="box"><b>{escape(words("mistake"))}.</b> {escape(words.mistake(made.mistake))}</div>')
    padded_steps = made.padded.steps if made.padded else []
    for number in range(max(len(made.packed.steps), len(padded_steps))):
        parts.append(f"<h2>{escape(words('step', number=number))}</h2><div class=ways>")
        if number < len(made.packed.steps):
            parts.append(_packed(made.packed.steps[number], words))
        elif made.padded:
            parts.append("<div></div>")
        if number < len(padded_steps):
            parts.append(_padded(padded_steps[number], words, made))
        parts.append("</div>")
    parts += [_answers(made, words), *(f"<p>{escape(line)}</p>" for line, _ in conclusions(made, words))]
    return "\n".join([*parts, "</body></html>\n"])


def _packed(step: "Step", words: Words) -> str:
    rows = [_row(row.prompt, _packed_row(row, words)) for row in step.rows]
    return _way(words("packed"), step, rows)


def _packed_row(row: "PackedRow", words: Words) -> str:
    cells = _cells([(words("positions"), row.positions)], row.tokens, row.prompt)
    kv = words("kv", before=row.kv_before, after=row.kv_after, blocks=listed(row.blocks))
    pick = _pick(row.choice, words) if row.choice else escape(words("more"))
    return f'{cells}<div class="faint">{escape(kv)}</div><div class="pick">{pick}</div>'


def _padded(step: "Step", words: Words, made: "Explanation") -> str:
    rows = [_row(row.prompt, _padded_row(row, words), done=row.done) for row in step.rows]
    return _way(words("padded" if made.mistake == "right-pad" else "padded-left"), step, rows)


def _padded_row(row: "PaddedRow", words: Words) -> str:
    mask = row.mask[-len(row.tokens) :]
    cells = _cells([("mask", mask), (words("positions"), row.positions)], row.tokens, row.prompt, mask)
    pick = escape(words("waits")) if row.done else _pick(row.choice, words)
    return f'{cells}<div class="pick">{pick}</div>'


def _way(name: str, step: "Step", rows: Sequence[str]) -> str:
    head = f'<h3>{escape(name)}</h3><div class="shapes"><code>{escape(shapes(step))}</code></div>'
    return f'<div class="way">{head}{"".join(rows)}</div>'


def _row(prompt: int, inside: str, done: bool = False) -> str:
    number = f'<div class="number" style="background:{_colour(prompt)}">{prompt}</div>'
    return f'<div class="row{" done" if done else ""}">{number}<div>{inside}</div></div>'


def _cells(
    lines: Sequence[tuple[str, Sequence[int]]], tokens: "Sequence[Token]", prompt: int, mask: Sequence[int] = ()
) -> str:
    """Tokens as coloured boxes, with lines of numbers below."""
    boxes = []
    for place, token in enumerate(tokens):
        if mask and not mask[place]:
            boxes.append('<td class="tok pad">pad</td>')
        else:
            style = f'style="background:{_colour(prompt)}" title="id {token.id}"'
            boxes.append(f'<td class="tok" {style}>{escape(visible(token.text))}</td>')
    numbers = [
        f"<tr><th>{escape(name)}</th>{''.join(f'<td>{value}</td>' for value in values)}</tr>" for name, values in lines
    ]
    return f'<table class="cells"><tr><th></th>{"".join(boxes)}</tr>{"".join(numbers)}</table>'


def _pick(choice: "Choice", words: Words) -> str:
    token = f"\0{visible(choice.token.text)}\1"
    text = words(
        "chosen", token=token, share=share(choice.probability),
        other=visible(choice.runner_up.text), other_share=share(choice.runner_up_probability),
    )  # fmt: skip
    return escape(text).replace("\0", "<b>").replace("\1", "</b>")


def _answers(made: "Explanation", words: Words) -> str:
    heads = ["#", words("packed")]
    if made.padded:
        heads += [words("padded" if made.mistake == "right-pad" else "padded-left"), words("same")]
    rows = []
    for number, prompt in enumerate(made.prompts):
        start = f'<span class="faint">{escape(prompt.text)}</span>'
        cells = [str(number), f"{start}<b>{escape(made.packed.texts[number])}</b>"]
        if made.padded:
            text = made.padded.texts[number] or " ".join(token.text for token in made.padded.answers[number])
            style, said = ("good", words("yes")) if made.same[number] else ("bad", words("no"))
            cells += [f"{start}<b>{escape(text)}</b>", f'<span class="{style}">{escape(said)}</span>']
        rows.append(f"<tr>{''.join(f'<td>{cell}</td>' for cell in cells)}</tr>")
    head = "".join(f"<th>{escape(text)}</th>" for text in heads)
    return f'<h2>{escape(words("answers"))}</h2><table class="answers"><tr>{head}</tr>{"".join(rows)}</table>'


def _colour(prompt: int) -> str:
    return COLOURS[prompt % len(COLOURS)]
