"""`liushui explain` in a terminal."""

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from rich.cells import cell_len
from rich.console import Console, Group
from rich.table import Table
from rich.text import Text

from liushui.cli.explain_words import Words, listed, share, visible

if TYPE_CHECKING:
    from liushui.engine.explain import Choice, Explanation, PackedRow, PaddedRow, Step, Token


def show(made: "Explanation", words: Words, console: Console) -> None:
    """Print everything."""
    console.print(Text(words("title", count=len(made.prompts), model=made.model), style="bold"))
    console.print(_prompts(made, words))
    for note in words.notes(made.padded is not None):
        console.print(Text(f"• {note}", style="dim"))
    if made.mistake:
        console.print(Text(f"{words('mistake')}: {words.mistake(made.mistake)}", style="yellow"))
    width = max((console.width - 14) // (2 if made.padded else 1), 24)
    padded_steps = made.padded.steps if made.padded else []
    for number in range(max(len(made.packed.steps), len(padded_steps))):
        packed = made.packed.steps[number] if number < len(made.packed.steps) else None
        padded = padded_steps[number] if number < len(padded_steps) else None
        console.print(_step(number, packed, padded, made, words, width))
    console.print(_answers(made, words))
    for line, style in conclusions(made, words):
        console.print(Text(line, style=style))


def conclusions(made: "Explanation", words: Words) -> list[tuple[str, str]]:
    """(sentence, style) about both ways together."""
    if made.padded is None:
        return []
    rows = listed([row for row, same in enumerate(made.same) if not same])
    if made.mistake:
        found = (words("spoiled", rows=rows), "bold yellow") if rows else (words("unspoiled"), "yellow")
    else:
        found = (words("differ", rows=rows), "bold red") if rows else (words("agree"), "bold green")
    cost = words("cost", packed=made.packed.cells, padded=made.padded.cells, wasted=made.padded.wasted)
    return [found, (cost, "")]


def shapes(step: "Step") -> str:
    """ids [11] → ... → argmax(dim=-1)."""
    parts = [f"{name} {found}" for name, found in step.shapes.items() if name not in ("query_start", "slots")]
    return " → ".join([*parts, f"argmax(dim={step.argmax_dim})"])


def _prompts(made: "Explanation", words: Words) -> Table:
    table = Table(title=words("prompts"), title_justify="left", show_header=False)
    for number, prompt in enumerate(made.prompts):
        tokens = Text(" ")
        for token in prompt.tokens:
            tokens.append(visible(token.text), style="cyan")
            tokens.append(f" {token.id}  ", style="dim")
        table.add_row(str(number), tokens)
    return table


def _step(
    number: int, packed: "Step | None", padded: "Step | None", made: "Explanation", words: Words, width: int
) -> Table:
    table = Table(title=words("step", number=number), title_justify="left", title_style="bold", expand=False)
    table.add_column("#")
    table.add_column(Group(Text(words("packed")), Text(shapes(packed) if packed else "", style="dim")))
    if made.padded:
        name = words("padded" if made.mistake == "right-pad" else "padded-left")
        table.add_column(Group(Text(name), Text(shapes(padded) if padded else "", style="dim")))
    packed_rows = {row.prompt: row for row in packed.rows} if packed else {}
    padded_rows = {row.prompt: row for row in padded.rows} if padded else {}
    for prompt in sorted(packed_rows.keys() | padded_rows.keys()):
        cells = [packed_cell(packed_rows[prompt], words, width) if prompt in packed_rows else Text("")]
        if made.padded:
            cells.append(padded_cell(padded_rows[prompt], words, width) if prompt in padded_rows else Text(""))
        table.add_row(str(prompt), *cells, end_section=True)
    return table


def packed_cell(row: "PackedRow", words: Words, width: int) -> Text:
    lines = grid(
        [("", words("positions"))] + [_column(t, [p]) for t, p in zip(row.tokens, row.positions, strict=True)], width
    )
    cell = Text("\n".join(lines))
    blocks = listed(row.blocks) if len(row.blocks) < 9 else f"{listed(row.blocks[:3])} … {row.blocks[-1]}"
    cell.append("\n" + words("kv", before=row.kv_before, after=row.kv_after, blocks=blocks), style="dim")
    cell.append("\n" + (chosen(row.choice, words) if row.choice else words("more")), style="green")
    return cell


def padded_cell(row: "PaddedRow", words: Words, width: int) -> Text:
    mask = row.mask[-len(row.tokens) :]
    columns: list[tuple[str, ...]] = [("", "mask", "positions")]
    for token, seen, position in zip(row.tokens, mask, row.positions, strict=True):
        columns.append(_column(token, [seen, position]) if seen else ("pad", "0", str(position)))
    cell = Text("\n".join(grid(columns, width)), style="dim" if row.done else "")
    cell.append(
        "\n" + (words("waits") if row.done else chosen(row.choice, words)), style="dim" if row.done else "green"
    )
    return cell


def chosen(choice: "Choice", words: Words) -> str:
    return words(
        "chosen", token=visible(choice.token.text), share=share(choice.probability),
        other=visible(choice.runner_up.text), other_share=share(choice.runner_up_probability),
    )  # fmt: skip


def _column(token: "Token", numbers: Sequence[int]) -> tuple[str, ...]:
    return (visible(token.text), *map(str, numbers))


def grid(columns: Sequence[tuple[str, ...]], width: int) -> list[str]:
    """Columns of short texts as aligned lines; what is too wide loses its middle. The first column names the lines."""
    widths = [max(cell_len(text) for text in column) for column in columns]
    head, kept = columns[0], list(range(1, len(columns)))
    while len(kept) > 2 and sum(widths[i] + 1 for i in kept) + widths[0] + 4 > width:
        del kept[len(kept) // 2]
    gap = next((place for place, i in enumerate(kept) if place + 1 != i), None)
    lines = []
    for line, name in enumerate(head):
        parts = [name + " " * (widths[0] - cell_len(name))]
        for place, i in enumerate(kept):
            if place == gap:
                parts.append("…")
            text = columns[i][line]
            parts.append(text + " " * (widths[i] - cell_len(text)))
        lines.append(" ".join(parts).rstrip())
    return lines


def _answers(made: "Explanation", words: Words) -> Table:
    table = Table(title=words("answers"), title_justify="left", title_style="bold")
    headers: list[Any] = ["#", words("packed")]
    if made.padded:
        headers += [words("padded" if made.mistake == "right-pad" else "padded-left"), words("same")]
    for header in headers:
        table.add_column(header)
    for number, prompt in enumerate(made.prompts):
        texts = [Text(prompt.text, style="dim") + Text(made.packed.texts[number], style="bold")]
        if made.padded:
            style = "bold" if made.same[number] else "bold red"
            names = made.padded.texts[number] or " ".join(token.text for token in made.padded.answers[number])
            texts.append(Text(prompt.text, style="dim") + Text(names, style=style))
            texts.append(Text(words("yes" if made.same[number] else "no"), style="" if made.same[number] else "red"))
        table.add_row(str(number), *texts)
    return table
