"""What `liushui explain` says, in English and Chinese."""

import locale
import os
from typing import Literal

Lang = Literal["en", "zh"]

WORDS: dict[str, tuple[str, str]] = {
    "title": ("What happens to {count} prompts in {model}", "{model} 里,{count} 条提示词经历了什么"),
    "prompts": ("Prompts as tokens (text, id)", "提示词切成的词元(文本,编号)"),
    "prompt": ("prompt", "提示词"),
    "tokens": ("tokens", "词元"),
    "step": ("Step {number}", "第 {number} 步"),
    "packed": ("packed (this engine)", "紧排(本引擎)"),
    "padded": ("padded (a rectangle)", "填充(排成矩形)"),
    "padded-left": ("left-padded (a rectangle)", "左填充(排成矩形)"),
    "kv": ("KV {before} → {after}, blocks {blocks}", "KV {before} → {after},块 {blocks}"),
    "chosen": ("→ {token} {share} (then {other} {other_share})", "→ {token} {share}(其次 {other} {other_share})"),
    "more": ("the prompt goes on in the next step", "提示词下一步继续"),
    "waits": ("has ended; waits for the others", "已结束,陪着等别人"),
    "positions": ("positions", "positions"),
    "answers": ("Answers", "回答"),
    "answer": ("answer", "回答"),
    "same": ("same tokens", "词元相同"),
    "agree": (
        "Check: both ways chose the same tokens for every prompt.",
        "检验:两种做法为每条提示词选出的词元都相同。",
    ),
    "differ": (
        "Check FAILED: the two ways chose different tokens for prompt {rows}.",
        "检验失败:提示词 {rows} 两种做法选出的词元不同。",
    ),
    "spoiled": (
        "What the mistake did: other tokens for prompt {rows}.",
        "这个错误的后果:提示词 {rows} 的词元变了。",
    ),
    "unspoiled": (
        "This time the mistake changed no token. It is a mistake all the same.",
        "这一次,错误恰好没有改变词元。但它仍是错误。",
    ),
    "cost": (
        "Token rows computed: packed {packed}, padded {padded}, of which {wasted} were padding or waited for others.",
        "算过的词元行:紧排 {packed};填充 {padded},其中 {wasted} 行是填充或在等别人。",
    ),
    "mistake": ("The mistake", "这个错误"),
    "yes": ("yes", "是"),
    "no": ("no", "否"),
}

NOTES: tuple[tuple[str, str], ...] = (
    (
        "ids are all prompts back to back in one row: nothing is padded, nothing is truncated to fit a rectangle.",
        "ids 把所有提示词首尾相接排成一行:没有填充,也不必为凑成矩形而截断。",
    ),
    (
        "positions say where each token stands in its own text. Once there is a KV cache only the newest token is fed, "
        "and its place can no longer be seen from the input: it equals the KV length before the step.",
        "positions 说明每个词元在自己那段文本里的位置。有了 KV 缓存以后只送入最新的词元,"
        "从输入本身已看不出它在第几位:它等于这一步之前的 KV 长度。",
    ),
    (
        "logits have one row per prompt and one column per word of the vocabulary: [rows, vocab]. Each prompt chooses "
        "within its own row, along the last axis: argmax(dim=-1).",
        "logits 每条提示词一行,词表里每个词一列:[行数, 词表大小]。每条提示词在自己那一行里、沿最后一个轴挑选:"
        "argmax(dim=-1)。",
    ),
)

PADDED_NOTES: tuple[tuple[str, str], ...] = (
    (
        "The rectangle needs equal lengths: short prompts are filled up on the left, so that the last column holds "
        "everybody's last token. attention_mask hides the filling; position_ids = mask.cumsum(-1) - 1 (filling set "
        "to 0) count only real tokens; after that each step uses the last position + 1.",
        "矩形要求等长:短的提示词在左边填充,使最后一列都是各自的最后一个词元。attention_mask 遮住填充;"
        "position_ids = mask.cumsum(-1) - 1(填充处置 0)只数真实词元;之后每步取上一位置 + 1。",
    ),
)

MISTAKES: dict[str, tuple[str, str]] = {
    "without-positions": (
        "No position_ids are given, so every call numbers its own columns from 0: padding shifts the short prompts "
        "(with learned positions that alone spoils them), and after the prompt each new token claims to stand at "
        "position 0, though the cache holds all that came before it.",
        "没有给 position_ids,于是每次调用都从 0 数自己的列:填充把短提示词往后推(对学习式位置编码,单这一点就错了);"
        "提示词之后,每个新词元都自称在第 0 位,尽管缓存里已有它之前的全部内容。",
    ),
    "right-pad": (
        "The short prompts are filled up on the right. logits[:, -1] then reads the last column, which for them is "
        "padding: the next token is predicted from a filling token instead of the prompt's last one. Only the longest "
        "prompt is right.",
        "短提示词填充在了右边。logits[:, -1] 读的是最后一列,对它们来说那是填充:下一个词元是从填充处、"
        "而不是从提示词最后一个词元预测出来的。只有最长的提示词是对的。",
    ),
    "argmax-dim-0": (
        "argmax(dim=0) asks each word of the vocabulary which prompt likes it best. The answer has the shape [vocab] "
        "instead of [rows], and holds row numbers, all below the batch size: taken for tokens they are the first few "
        "entries of the vocabulary. For a single prompt it is always token 0.",
        "argmax(dim=0) 是在问词表里的每个词:哪条提示词最喜欢你?结果的形状是 [词表大小] 而不是 [行数],"
        "里面是行号,都小于批大小:当作词元,就成了词表最前面的几个。只有一条提示词时,永远是 0 号词元。",
    ),
}


def pick_lang(wanted: str | None) -> Lang:
    """The language asked for, else that of the locale: by its name, for it need not be installed (POSIX, 8.2)."""
    if wanted in ("en", "zh"):
        return "zh" if wanted == "zh" else "en"
    named = (os.environ.get(name) for name in ("LC_ALL", "LC_MESSAGES", "LANG"))
    found = next(filter(None, named), None) or locale.getlocale()[0] or ""
    return "zh" if found.lower().startswith(("zh", "chinese")) else "en"


class Words:
    """The texts in one language."""

    def __init__(self, lang: Lang) -> None:
        self.lang: Lang = lang
        self._column = 1 if lang == "zh" else 0

    def __call__(self, key: str, **values: object) -> str:
        return WORDS[key][self._column].format(**values)

    def notes(self, padded: bool) -> list[str]:
        return [note[self._column] for note in (*NOTES, *(PADDED_NOTES if padded else ()))]

    def mistake(self, name: str) -> str:
        return MISTAKES[name][self._column]


def visible(text: str) -> str:
    """A token's text with its spaces to be seen."""
    return text.replace(" ", "␣").replace("\n", "⏎").replace("\t", "⇥").replace("\r", "␍") or "∅"


def share(probability: float) -> str:
    return f"{probability:.1%}" if probability >= 0.0005 else f"{probability:.0e}"


def listed(numbers: list[int]) -> str:
    """1, 2, 3."""
    return ", ".join(str(number) for number in numbers)
