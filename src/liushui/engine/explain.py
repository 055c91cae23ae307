"""What happens to prompts, step by step, seen from inside: the tensors are those of the real engine.

An `Observer` stands between the engine and its runner, and a `Watched` model inside the runner: both pass everything on
and write down what went by. The padded way (`models.padded`) then runs the same prompts on the same weights, on wish
with one of the classic mistakes, for comparison.
"""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any, Literal

import torch

from liushui.core.plan import Executor, Pending, PlanItem, StepPlan
from liushui.core.request import SamplingParams
from liushui.engine.llm import LLM
from liushui.engine.outputs import RequestOutput
from liushui.errors import ParameterError
from liushui.models.padded import PaddedModel, next_positions, pad, prompt_positions

Mistake = Literal["without-positions", "right-pad", "argmax-dim-0"]


@dataclass(frozen=True, slots=True)
class Token:
    id: int
    text: str


@dataclass(frozen=True, slots=True)
class Choice:
    """The token chosen from a row of logits."""

    token: Token
    probability: float
    runner_up: Token
    """The most likely of all others."""
    runner_up_probability: float


@dataclass(frozen=True, slots=True)
class PackedRow:
    """One sequence's share of a step."""

    prompt: int
    tokens: list[Token]
    """Fed in this step."""
    positions: list[int]
    kv_before: int
    """Tokens of the sequence whose keys and values are there already."""
    kv_after: int
    blocks: list[int]
    choice: Choice | None
    """None inside a prompt's chunks."""


@dataclass(frozen=True, slots=True)
class PaddedRow:
    """One row of the rectangle."""

    prompt: int
    tokens: list[Token]
    mask: list[int]
    """[L]: of all columns so far, the fed ones last."""
    positions: list[int]
    choice: Choice
    done: bool
    """It had ended before: all it does now is wait for the others."""


@dataclass(frozen=True, slots=True)
class Step:
    """One pass through the model."""

    number: int
    rows: list[Any]
    """PackedRow or PaddedRow."""
    shapes: dict[str, list[int]]
    argmax_dim: int


@dataclass(frozen=True, slots=True)
class Run:
    """All steps, one way."""

    steps: list[Step]
    answers: list[list[Token]]
    texts: list[str]
    cells: int
    """Token rows that went through the model."""
    wasted: int
    """Of these, padding and rows that had ended."""


@dataclass(frozen=True, slots=True)
class PromptView:
    text: str
    tokens: list[Token]


@dataclass(slots=True)
class Explanation:
    """Everything `liushui explain` shows."""

    model: str
    startup: list[str]
    block_size: int
    prompts: list[PromptView]
    packed: Run
    padded: Run | None = None
    mistake: Mistake | None = None
    same: list[bool] = field(default_factory=list)
    """Per prompt: whether both ways chose the same tokens."""


class Watched:
    """A model that remembers its last inputs and outputs."""

    def __init__(self, model: Any) -> None:
        self._model = model
        self.batch: Any = None
        self.shapes: dict[str, list[int]] = {}
        self.logits_rows: torch.Tensor | None = None

    def __getattr__(self, name: str) -> Any:
        return getattr(self._model, name)

    def forward(self, kv: Any, batch: Any) -> torch.Tensor:
        self.batch, self.logits_rows = batch, None
        names = ("ids", "positions", "query_start", "seq_lens", "slots", "block_table")
        self.shapes = {name: list(getattr(batch, name).shape) for name in names}
        hidden: torch.Tensor = self._model.forward(kv, batch)
        self.shapes["hidden"] = list(hidden.shape)
        return hidden

    def logits(self, hidden: torch.Tensor) -> torch.Tensor:
        made: torch.Tensor = self._model.logits(hidden)
        self.shapes["logits"] = list(made.shape)
        self.logits_rows = made.float().clone()  # sampling adjusts in place
        return made


class Observer:
    """An executor that writes down what another one does."""

    def __init__(self, runner: Any, model: Watched, tokens: "Tokens") -> None:
        self.runner, self.model, self.tokens = runner, model, tokens
        self.steps: list[Step] = []

    def execute(self, plan: StepPlan) -> Pending:
        pending: Pending = self.runner.execute(plan)
        result, batch = pending.result(), self.model.batch
        starts = batch.query_start.tolist()
        ids, positions = batch.ids.tolist(), batch.positions.tolist()
        chosen = iter(range(len(plan.items)))
        rows = []
        for item, first, last in zip(plan.items, starts, starts[1:], strict=False):
            choice = None
            if item.samples and self.model.logits_rows is not None:
                line = self.model.logits_rows[next(chosen)]
                choice = self.tokens.choice(line, result.tokens[item.seq_id][0])
            rows.append(self._row(item, ids[first:last], positions[first:last], choice))
        self.steps.append(Step(len(self.steps), rows, dict(self.model.shapes), -1))
        return pending

    def _row(self, item: PlanItem, ids: list[int], positions: list[int], choice: Choice | None) -> PackedRow:
        return PackedRow(
            prompt=int(item.seq_id.rpartition("-")[2]),
            tokens=self.tokens.named(ids),
            positions=positions,
            kv_before=item.start,
            kv_after=item.start + item.num_tokens,
            blocks=list(item.block_table),
            choice=choice,
        )


class Tokens:
    """Names of token ids."""

    def __init__(self, llm: LLM) -> None:
        self._tokenizer = llm.tokenizer

    def named(self, ids: Sequence[int]) -> list[Token]:
        return [Token(token, self._name(token)) for token in ids]

    def _name(self, token: int) -> str:
        """The text; of a part of a character its bytes: <E4><BA>."""
        text = self._tokenizer.id_to_text(token)
        if "\ufffd" not in text:
            return text
        return "".join(f"<{byte:02X}>" for byte in self._tokenizer.token_bytes(token))

    def choice(self, line: torch.Tensor, token: int) -> Choice:
        """From one row of logits [vocab]."""
        probabilities = line.softmax(dim=-1)
        best = probabilities.topk(2).indices.tolist()
        other = best[1] if best[0] == token else best[0]
        chosen, runner_up = self.named([token, other])
        return Choice(chosen, float(probabilities[token]), runner_up, float(probabilities[other]))


def explain(
    llm: LLM, texts: Sequence[str], *, max_tokens: int = 8, padded: bool = False, mistake: Mistake | None = None
) -> Explanation:
    """Answer `texts` together, greedily, and tell how. A `mistake` implies `padded`, and is made there.

    Raises `ParameterError` for what cannot be answered, and for an engine on a GPU, whose steps cannot be watched.
    """
    if not texts:
        raise ParameterError("prompts", "are missing; give at least one text")
    runner: Any = llm.engine.executor
    if getattr(runner, "steps", None) is not None:
        raise ParameterError("device", "must be cpu to explain: the steps of a GPU cannot be watched from outside")
    tokens = Tokens(llm)
    prompts = [PromptView(text, tokens.named(llm.tokenizer.encode(text))) for text in texts]
    ids = [[token.id for token in prompt.tokens] for prompt in prompts]
    made = Explanation(
        llm.config.model, llm.startup_report(), runner.block_size, prompts, packed_run(llm, ids, max_tokens, tokens)
    )
    if padded or mistake:
        made.padded, made.mistake = padded_run(llm, ids, max_tokens, tokens, mistake), mistake
        pairs = zip(made.packed.answers, made.padded.answers, strict=True)
        made.same = [packed == other for packed, other in pairs]
    return made


def packed_run(llm: LLM, prompts: Sequence[list[int]], max_tokens: int, tokens: Tokens) -> Run:
    """The engine's own way, observed."""
    engine = llm.engine
    outputs: dict[int, RequestOutput] = {}
    with _observed(llm, tokens) as observer:
        for index, ids in enumerate(prompts):
            params = SamplingParams(temperature=0, max_tokens=max_tokens).giving(SamplingParams.names())
            engine.add_request(ids, params, index=index, request_id=f"explain-{index}")
        while engine.has_unfinished:
            outputs.update((found.index, found) for found in engine.step() if isinstance(found, RequestOutput))
    answers = [outputs[index].outputs[0].token_ids for index in range(len(prompts))]
    cells = sum(step.shapes["ids"][0] for step in observer.steps)
    return Run(observer.steps, [tokens.named(ids) for ids in answers], _texts(llm, answers), cells, 0)


@contextmanager
def _observed(llm: LLM, tokens: Tokens) -> Iterator[Observer]:
    runner: Any = llm.engine.executor
    model = runner.model
    runner.model = Watched(model)
    observer = Observer(runner, runner.model, tokens)
    watching: Executor = observer
    llm.engine.executor = watching
    try:
        yield observer
    finally:
        llm.engine.executor, runner.model = runner, model


def padded_run(
    llm: LLM, prompts: Sequence[list[int]], max_tokens: int, tokens: Tokens, mistake: Mistake | None = None
) -> Run:
    """The rectangle: everybody waits until the last one is done."""
    runner: Any = llm.engine.executor
    model, ends = PaddedModel(runner.model), set(llm.tokenizer.eos_token_ids)
    ids, mask = pad(prompts, pad_token(llm), right=mistake == "right-pad")
    positions = prompt_positions(mask)
    if mistake == "without-positions":
        positions = torch.arange(ids.shape[1]).expand_as(ids)
    kv = model.new_kv(len(prompts), ids.shape[1] + max_tokens)
    steps: list[Step] = []
    answers: list[list[int]] = [[] for _ in prompts]
    done = [False] * len(prompts)
    cells = wasted = 0
    for number in range(max_tokens):
        logits = model.logits(model.forward(ids, mask, positions, kv)[:, -1])
        chosen = choose(logits, mistake)
        rows = [
            PaddedRow(
                row, tokens.named(ids[row].tolist()), mask[row].tolist(), positions[row].tolist(),
                tokens.choice(logits[row], chosen[row]), done[row],
            )
            for row in range(len(prompts))
        ]  # fmt: skip
        shapes = {"input_ids": ids, "attention_mask": mask, "position_ids": positions, "logits": logits}
        steps.append(Step(number, rows, {n: list(t.shape) for n, t in shapes.items()}, 0 if _flat(mistake) else -1))
        cells += ids.numel()
        wasted += sum(ids.shape[1] if done[r] else rows[r].mask[-ids.shape[1] :].count(0) for r in range(len(rows)))
        for row, token in enumerate(chosen):
            if not done[row]:
                answers[row].append(token)
                done[row] = token in ends
        if all(done):
            break
        ids = torch.tensor(chosen)[:, None]
        mask = torch.cat([mask, mask.new_ones(len(prompts), 1)], dim=1)
        positions = _following(positions, mask, mistake)
    return Run(steps, [tokens.named(answer) for answer in answers], _texts(llm, answers), cells, wasted)


def choose(logits: torch.Tensor, mistake: Mistake | None) -> list[int]:
    """logits [B, vocab] -> a token for each row, along the vocabulary.

    Along dim 0 each entry of the vocabulary picks a row: [vocab] numbers below B, of which B are taken for tokens.
    """
    if _flat(mistake):
        return logits.argmax(dim=0)[: len(logits)].tolist()
    return logits.argmax(dim=-1).tolist()


def pad_token(llm: LLM) -> int:
    """What fills the rectangle: the model's padding token if it has one, else an end token. It is never attended to."""
    found = llm.tokenizer.raw.token_to_id(llm.tokenizer.special_tokens.get("pad_token", ""))
    return found if found is not None else next(iter(llm.tokenizer.eos_token_ids), 0)


def _following(positions: torch.Tensor, mask: torch.Tensor, mistake: Mistake | None) -> torch.Tensor:
    """Positions of the next column, [B, 1]."""
    if mistake == "without-positions":
        return torch.zeros_like(positions[:, :1])  # each call counts its own columns
    if mistake == "right-pad":
        return mask.sum(dim=-1, keepdim=True) - 1  # the last column is padding, and has no position to go on from
    return next_positions(positions)


def _flat(mistake: Mistake | None) -> bool:
    return mistake == "argmax-dim-0"


def _texts(llm: LLM, answers: Sequence[Sequence[int]]) -> list[str]:
    return [llm.tokenizer.decode(answer) for answer in answers]
