"""Draw the guide's figures from the engine's own tensors and event log: `make figures`.

    python scripts/figures.py [--out docs/img] [--model smollm2]

Everything is measured in tokens and steps, never in seconds, and computed in float32 on one thread: the same files come
out on every machine. Each figure is drawn in English (argmax.svg) and in Chinese (argmax-zh.svg).
"""

import argparse
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cache
from importlib import import_module
from pathlib import Path
from typing import Any

import torch
from svg import ALARM, EDGE, EMPTY, FAINT, INK, PALETTE, Picture, n, shade

from liushui import LLM, SamplingParams
from liushui.engine.verify import Way, engine_for
from liushui.models.padded import MaskedOps, PaddedModel, next_positions, pad, prompt_positions

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT / "examples"))
REQUESTS = import_module("ladder").REQUESTS
"""(prompt, tokens wanted) of the ladder."""
PROMPTS = ("The capital of France is", "1, 2, 3, 4, 5,", "Once upon a time, there was a little")
COLUMNS = (" Paris", " the", " ", " and", " girl", " town")
"""Vocabulary entries shown of the 49,152: the two most likely of each prompt."""
STORY, HEAD = PROMPTS[2], (16, 0)
"""Layer 16, head 0 of SmolLM2 looks at the token before: a head that needs positions, and shows it."""
SEATS = 4


@dataclass(eq=False)
class House:
    """The model, both ways."""

    llm: Any
    padded: PaddedModel

    def ids(self, text: str) -> list[int]:
        return self.llm.tokenizer.encode(text)

    def name(self, token: int) -> str:
        return self.llm.tokenizer.id_to_text(token).replace(" ", "␣").replace("\n", "⏎")


def load(model: str) -> LLM:
    return LLM(model, dtype="float32", weights="float32", device="cpu", threads=1, max_num_seqs=SEATS, kv_cache_gib=0.1)


# -- 1. argmax along the two axes


@cache
def logits_table(house: House) -> torch.Tensor:
    """[3, vocab]: what follows each prompt."""
    ids, mask = pad([house.ids(text) for text in PROMPTS], 0)
    hidden = house.padded.forward(ids, mask, prompt_positions(mask), house.padded.new_kv(*ids.shape))
    return house.padded.logits(hidden[:, -1])


def argmax_figure(house: House, zh: bool) -> Picture:
    logits = logits_table(house)
    columns = [house.ids(text)[0] for text in COLUMNS]
    title = "logits [3, 49152]：argmax 沿哪个轴" if zh else "logits [3, 49152]: argmax along which axis?"
    picture = Picture(900, 484, title)
    picture.text(24, 30, title, size=17, bold=True)
    good = (
        "dim=-1：每行（每条提示词）在词表里选一个" if zh else "dim=-1: each row (each prompt) picks from the vocabulary"
    )
    bad = "dim=0：每列（每个词）在提示词里选一条" if zh else "dim=0: each column (each token) picks one of the prompts"
    _table(picture, house, logits, columns, 60, good, along=-1, zh=zh)
    _table(picture, house, logits, columns, 268, bad, along=0, zh=zh)
    return picture


def _table(
    picture: Picture,
    house: House,
    logits: torch.Tensor,
    columns: list[int],
    top: float,
    words: str,
    along: int,
    zh: bool,
) -> None:
    left, width, height = 246, 66, 28
    picture.text(24, top + 8, words, size=14, bold=True, fill=INK if along == -1 else ALARM)
    for place, token in enumerate(columns):
        x = left + place * width + width / 2
        picture.text(x, top + 30, house.name(token), mono=True, size=12.5, anchor="middle")
        picture.text(x, top + 44, str(token), size=10, fill=FAINT, anchor="middle")
    picture.text(left + len(columns) * width + 8, top + 30, "… 49,152", size=12, fill=FAINT)
    chosen = logits.argmax(dim=along)
    for row, text in enumerate(PROMPTS):
        y = top + 54 + row * height
        short = text if len(text) < 26 else "…" + text[-24:]
        picture.text(left - 10, y + height / 2, short, mono=True, size=11.5, anchor="end")
        for place, token in enumerate(columns):
            value = logits[row, token].item()
            wins = chosen[row].item() == token if along == -1 else chosen[token].item() == row
            x = left + place * width
            picture.rect(x, y, width, height, shade((value + 4) / 32), edge="#fff")
            if wins:
                edge = "#e8590c" if along == -1 else ALARM
                picture.rect(x + 2, y + 2, width - 4, height - 4, "none", edge=edge, line=2.4, round=3)
            picture.text(x + width / 2, y + height / 2, f"{value:.2f}", size=12.5, anchor="middle", bold=wins)
        if along == -1:
            right = left + len(columns) * width
            picture.arrow(right + 8, y + height / 2, right + 58, y + height / 2)
            token = int(chosen[row])
            picture.text(right + 68, y + height / 2, f"{house.name(token)}", mono=True, bold=True)
            picture.text(right + 140, y + height / 2, f"{token}", size=12, fill=FAINT)
    bottom = top + 54 + 3 * height
    if along == -1:
        picture.text(left + len(columns) * width + 68, bottom + 14, "→ [3]", mono=True, size=12, fill=FAINT)
        return
    for place, token in enumerate(columns):
        x = left + place * width + width / 2
        picture.arrow(x, bottom + 4, x, bottom + 26, ALARM)
        picture.text(x, bottom + 38, str(chosen[token].item()), mono=True, bold=True, anchor="middle", fill=ALARM)
    right = left + len(columns) * width + 8
    names = ", ".join(f"{i} = {house.name(i)}" for i in range(3))
    picture.text(right, bottom + 38, "… → [49152]", mono=True, size=12, fill=FAINT)
    said = f"这些是行号。当作词元编号，就成了 {names}" if zh else f"These are row numbers. Taken for token ids: {names}"
    picture.text(left, bottom + 60, said, size=12, fill=FAINT)


# -- 2. attention with and without positions


class Watching(PaddedModel):
    """The padded way, with one head's attention weights written down."""

    def __init__(self, model: Any) -> None:
        super().__init__(model)
        self.seen: list[list[float]] = []
        """A row for each token fed: its weights on all tokens so far."""

    @contextmanager
    def _masked(self, mask: torch.Tensor) -> Iterator[None]:
        with super()._masked(mask):
            attention = self.attentions[HEAD[0]]
            attention.ops = SeenOps(attention.ops, self.seen)
            yield


class SeenOps:
    """Operations of a layer whose attention is looked at."""

    def __init__(self, ops: MaskedOps, seen: list[list[float]]) -> None:
        self._ops, self._seen = ops, seen

    def __getattr__(self, name: str) -> Any:
        return getattr(self._ops, name)

    def attention(self, qkv: torch.Tensor, heads: int, kv_heads: int, dim: int, keys: torch.Tensor, *rest: Any) -> Any:
        filled, head = self._ops._mask.shape[1], HEAD[1]
        query = qkv.view(-1, heads + 2 * kv_heads, dim)[:, head]
        known, scale = keys[0, head // (heads // kv_heads), :filled], rest[4]
        visible = self._ops.visible(len(query), None)[0]
        self._seen += (query @ known.T * scale).masked_fill(~visible, -1e30).softmax(dim=-1).tolist()
        return self._ops.attention(qkv, heads, kv_heads, dim, keys, *rest)


@cache
def attention_map(house: House, right: bool, tokens: int) -> tuple[list[list[float]], list[str]]:
    """Greedy decoding of the story with a cache; each new token at its true position, or at 0 -> (weights [fed, seen],
    names of the tokens fed and of the one chosen last)."""
    ids, mask = pad([house.ids(STORY)], 0)
    model = Watching(house.llm.engine.executor.model)
    kv, positions = model.new_kv(1, ids.shape[1] + tokens), prompt_positions(mask)
    names = [house.name(token) for token in ids[0].tolist()]
    for _ in range(tokens):
        chosen = model.logits(model.forward(ids, mask, positions, kv)[:, -1]).argmax(dim=-1)
        names.append(house.name(int(chosen)))
        ids, mask = chosen[:, None], torch.cat([mask, mask.new_ones(1, 1)], dim=1)
        positions = next_positions(positions) if right else torch.zeros_like(ids)
    return model.seen, names


def positions_figure(house: House, zh: bool) -> Picture:
    title = "同一个注意力头，同一份 KV 缓存，只有新词元的位置编号不同" if zh else (
        "One attention head, one KV cache: only the new tokens' positions differ"
    )  # fmt: skip
    picture = Picture(900, 470, title)
    picture.text(24, 30, title, size=17, bold=True)
    note = f"SmolLM2 第 {HEAD[0]} 层第 {HEAD[1]} 头：它找前一个词元。横：被看的词元；竖：送入的词元" if zh else (
        f"SmolLM2, layer {HEAD[0]}, head {HEAD[1]}: it looks for the token before. Across: seen; down: fed"
    )  # fmt: skip
    picture.text(24, 52, note, size=12.5, fill=FAINT)
    words = ("新词元的位置 = 上一个 + 1", "新词元的位置 = 0（没有给）") if zh else (
        "new token's position = last + 1", "new token's position = 0 (not given)"
    )  # fmt: skip
    for place, right in enumerate((True, False)):
        weights, names = attention_map(house, right, 5)
        _heat(picture, weights, names, 128 + place * 430, right, words[place], zh)
    return picture


def _heat(
    picture: Picture, weights: list[list[float]], names: list[str], left: float, right: bool, words: str, zh: bool
) -> None:
    cell, top, prompt = 22, 150, len(names) - 5
    colour = INK if right else ALARM
    picture.text(left - 100, 82, words, size=14, bold=True, fill=colour)
    for row, line in enumerate(weights):
        y = top + row * cell
        new = row >= prompt
        picture.text(
            left - 8, y + cell / 2, names[row], mono=True, size=11, anchor="end", bold=new, fill=colour if new else INK
        )
        picture.text(left + row * cell + 4, top - 8, names[row], mono=True, size=11, turn=-55, bold=new)
        for column, weight in enumerate(line[: row + 1]):
            picture.rect(
                left + column * cell, y, cell - 1, cell - 1, shade(weight, "#0b7285" if right or not new else ALARM)
            )
    y = top + prompt * cell
    picture.line(left - 100, y - 0.5, left + len(weights) * cell, y - 0.5, FAINT, 1)
    last = "选出：" if zh else "chosen: "
    bottom = top + len(weights) * cell + 18
    picture.text(left - 100, bottom, last + " ".join(names[prompt:]), mono=True, size=12, bold=True, fill=colour)


# -- 3. a rectangle against a packed row


def padding_figure(house: House, zh: bool) -> Picture:
    requests = [(house.ids(text), wanted) for text, wanted in REQUESTS]
    columns, longest = max(len(ids) for ids, _ in requests), max(wanted for _, wanted in requests)
    width, cell = columns + longest - 1, 19
    cells = len(requests) * width
    needed = sum(len(ids) + wanted - 1 for ids, wanted in requests)
    title = f"8 条请求：矩形要算 {cells} 行，需要的只有 {needed} 行" if zh else (
        f"8 requests: the rectangle computes {cells} rows, {needed} are needed"
    )  # fmt: skip
    picture = Picture(900, 560, title)
    picture.text(24, 30, title, size=17, bold=True)
    _legend(picture, zh)
    left, top = 250, 100
    for row, (ids, wanted) in enumerate(requests):
        y, text = top + row * cell, REQUESTS[row][0]
        picture.text(
            left - 8, y + cell / 2, text if len(text) < 34 else text[:31] + "…", mono=True, size=10.5, anchor="end"
        )
        for column in range(width):
            kind = "pad" if column < columns - len(ids) else "prompt" if column < columns else "answer"
            if column - columns + 1 >= wanted:
                kind = "wait"
            _cell(picture, left + column * cell, y, cell, kind, PALETTE[row])
    y = top + len(requests) * cell
    picture.line(left + columns * cell, top - 6, left + columns * cell, y + 6, INK, 1.2)
    words = ("一次：提示词", "之后每步一列") if zh else ("one pass: the prompts", "then one column a step")
    picture.text(left + columns * cell - 8, y + 15, words[0], size=12, fill=FAINT, anchor="end")
    picture.text(left + columns * cell + 8, y + 15, words[1], size=12, fill=FAINT)
    said = "紧排：每步一行，首尾相接" if zh else "Packed: one row a step, back to back"
    _packed(picture, requests, 300, said, zh)
    return picture


def _packed(picture: Picture, requests: list[tuple[list[int], int]], top: float, words: str, zh: bool) -> None:
    left, cell = 92, 10
    picture.text(24, top, words, size=14, bold=True)
    for step in range(max(wanted for _, wanted in requests)):
        y, x = top + 18 + step * (cell + 5), float(left)
        picture.text(
            left - 10,
            y + cell / 2,
            f"{'第' if zh else 'step'} {step}{' 步' if zh else ''}",
            size=10.5,
            fill=FAINT,
            anchor="end",
        )
        fed = 0
        for row, (ids, wanted) in enumerate(requests):
            count = len(ids) if step == 0 else int(step < wanted)
            for _ in range(count):
                _cell(picture, x, y, cell, "prompt" if step == 0 else "answer", PALETTE[row])
                x += cell
            fed += count
        picture.text(x + 8, y + cell / 2, f"ids [{fed}]", mono=True, size=10.5, fill=FAINT)


def _cell(picture: Picture, x: float, y: float, size: float, kind: str, colour: str) -> None:
    fill = {"pad": "#fff", "wait": EMPTY, "prompt": colour, "answer": shade(0.5, colour)}[kind]
    picture.rect(x, y, size - 1, size - 1, fill, edge=EDGE if kind == "pad" else "none")
    if kind == "pad":
        picture.line(x + 2, y + size - 3, x + size - 3, y + 2, EDGE, 1)


def _legend(picture: Picture, zh: bool) -> None:
    words = ("提示词", "答案", "填充：算了，再被遮住", "已经答完：替空气计算") if zh else (
        "prompt", "answer", "padding: computed, then masked", "done: computed for nobody"
    )  # fmt: skip
    x = 24.0
    for kind, said in zip(("prompt", "answer", "pad", "wait"), words, strict=True):
        _cell(picture, x, 52, 15, kind, PALETTE[1])
        picture.text(x + 20, 59, said, size=12.5, fill=FAINT)
        x += 40 + len(said) * (13 if zh else 6.6)


# -- 4. static against continuous


def run_log(llm: LLM, policy: str) -> Any:
    """The event log of the ladder's requests, all there from the start."""
    engine = engine_for(llm, Way(name=policy, policy=policy, seats=SEATS))
    for index, (text, wanted) in enumerate(REQUESTS):
        params = SamplingParams(temperature=0, max_tokens=wanted, ignore_eos=True)
        engine.add_request(text, params, index=index, request_id=f"{policy}-{index}")
    while engine.has_unfinished:
        engine.step()
    return engine.log


def static_figure(logs: dict[str, Any], zh: bool) -> Picture:
    steps = {policy: len(log.steps) for policy, log in logs.items()}
    title = f"8 条请求、{SEATS} 个座位：{steps['static']} 步，还是 {steps['continuous']} 步" if zh else (
        f"8 requests, {SEATS} seats: {steps['static']} steps, or {steps['continuous']}"
    )  # fmt: skip
    picture = Picture(900, 470, title)
    picture.text(24, 30, title, size=17, bold=True)
    names = {
        "static": ("静态：凑齐一桌，一起进，一起出", "Static: gather, enter together, leave together"),
        "continuous": ("连续：每一步都可以进出", "Continuous: enter and leave at every step"),
    }
    for place, policy in enumerate(("static", "continuous")):
        _timeline(picture, logs[policy], 60 + place * 205, names[policy][0 if zh else 1], zh)
    return picture


def _timeline(picture: Picture, log: Any, top: float, words: str, zh: bool) -> None:
    left, cell, height = 92, 30, 30
    picture.text(24, top + 8, words, size=14, bold=True)
    for seat in range(SEATS):
        y = top + 26 + seat * height
        picture.text(
            left - 10, y + height / 2, f"座位 {seat}" if zh else f"seat {seat}", size=12, fill=FAINT, anchor="end"
        )
        picture.rect(left, y, len(log.steps) * cell - 2, height - 2, EMPTY)
    first: dict[int, int] = {}
    used: set[tuple[int, int]] = set()
    for number, step in enumerate(log.steps):
        for item in step.items:
            request = int(item.seq_id.rpartition("-")[2])
            used.add((item.slot, number))
            x, y = left + number * cell, top + 26 + item.slot * height
            colour = PALETTE[request] if item.num_tokens > 1 else shade(0.5, PALETTE[request])
            picture.rect(x, y, cell - 2, height - 2, colour)
            if request not in first:
                picture.text(
                    x + cell / 2 - 1, y + height / 2, str(request), size=13, bold=True, fill="#fff", anchor="middle"
                )
            first.setdefault(request, number)
    for seat, start, count in idle_stretches(used, len(log.steps)):
        words = f"空 {count} 步" if zh else f"idle for {count}"
        if count > 2:
            x, y = left + (start + count / 2) * cell, top + 26 + (seat + 0.5) * height - 1
            picture.text(x, y, words, size=12, fill=FAINT, anchor="middle")
    y = top + 26 + SEATS * height + 14
    for number in range(0, len(log.steps), 5):
        picture.text(left + number * cell + cell / 2, y, str(number), size=11, fill=FAINT, anchor="middle")
    waits = ", ".join(str(first[request]) for request in sorted(first))
    total = len(log.steps) * SEATS
    idle = total - len(used)
    said = (
        f"第一个词元在第几步（请求 0 到 7）：{waits}　空着的座位：{idle} / {total}"
        if zh
        else f"first token at step (requests 0 to 7): {waits}      idle seats: {idle} of {total}"
    )
    picture.text(left, y + 20, said, size=12.5)


def idle_stretches(used: set[tuple[int, int]], steps: int) -> Iterator[tuple[int, int, int]]:
    """(seat, first step, steps) of every stretch in which a seat feeds nothing. `used`: (seat, step)."""
    for seat in range(SEATS):
        start = None
        for step in range(steps + 1):
            empty = step < steps and (seat, step) not in used
            if empty and start is None:
                start = step
            elif not empty and start is not None:
                yield seat, start, step - start
                start = None


def draw(model: str, out: Path) -> list[Path]:
    """All figures, in both languages. Returns the files."""
    llm = load(model)
    house = House(llm, PaddedModel(llm.engine.executor.model))  # type: ignore[attr-defined]
    logs = {policy: run_log(llm, policy) for policy in ("static", "continuous")}
    made = []
    for zh in (False, True):
        pictures = {
            "argmax": argmax_figure(house, zh),
            "positions": positions_figure(house, zh),
            "padding": padding_figure(house, zh),
            "static": static_figure(logs, zh),
        }
        for name, picture in pictures.items():
            path = out / f"{name}{'-zh' if zh else ''}.svg"
            picture.save(path)
            made.append(path)
    return made


def main() -> None:
    parser = argparse.ArgumentParser(description="Draw the guide's figures.")
    parser.add_argument("--model", default="smollm2")
    parser.add_argument("--out", type=Path, default=ROOT / "docs" / "img")
    args = parser.parse_args()
    for path in draw(args.model, args.out):
        print(f"{path} {n(path.stat().st_size / 1024)} KB")


if __name__ == "__main__":
    main()
