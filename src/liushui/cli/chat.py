"""`liushui chat`: a conversation in the terminal, streamed."""

import importlib
import sys
from contextlib import closing, suppress
from typing import Annotated, Any

import typer

from liushui.cli.common import load_llm, note
from liushui.cli.options import engine_group, sampling_group, with_flags
from liushui.config import EngineConfig
from liushui.core.request import FinishReason, SamplingParams
from liushui.errors import LiushuiError

HELP = """\
/reset         forget the conversation (the system message stays)
/system TEXT   set the system message and forget the conversation; without TEXT: none
/help          this list
/exit          leave (so does Ctrl-D)
Ctrl-C stops an answer; what was said of it stays in the conversation."""

Message = dict[str, str]
CHAT_SKIPS = frozenset({"n", "logprobs", "prompt_logprobs"})
"""Parameters that a terminal cannot show."""


@with_flags(engine_group(max_num_seqs=1), sampling_group(CHAT_SKIPS, temperature=0.7, top_p=0.95, max_tokens=512))
def chat(
    config: EngineConfig,
    params: SamplingParams,
    system: Annotated[str | None, typer.Option(help="System message.")] = None,
) -> None:
    """Talk with a model. /help lists what can be typed; input may also come from a pipe, a message a line."""
    llm = load_llm(config)
    if llm.tokenizer.template_hash is None:
        raise LiushuiError(
            f"{config.model} has no chat template, so it cannot chat. Use an instruct model, give one with "
            "--chat-template FILE, or continue text with liushui generate"
        )
    for line in llm.startup_report():
        note(line)
    filled = llm.engine.inputs.filled(params)
    chosen = f"temperature {filled.temperature}, top_p {filled.top_p}, max_tokens {filled.max_tokens}"
    note(f"parameters: {chosen}. /help lists commands")
    Conversation(llm, params, system).run()


class Conversation:
    """The messages so far, and the loop that adds to them."""

    def __init__(self, llm: Any, params: SamplingParams, system: str | None) -> None:
        self.llm = llm
        self.params = params
        self.messages: list[Message] = []
        self.reset(system)

    def reset(self, system: str | None) -> None:
        self.system = system
        self.messages = [{"role": "system", "content": system}] if system else []

    def run(self) -> None:
        """Until /exit or the end of the input."""
        prompt = ""
        if sys.stdin.isatty():
            prompt = "> "
            with suppress(ImportError):
                importlib.import_module("readline")  # gives input() history and editing
        while True:
            try:
                text = input(prompt).strip()
            except EOFError:
                return
            except KeyboardInterrupt:
                note("\n/exit or Ctrl-D leaves")
                continue
            except UnicodeDecodeError as error:
                raise LiushuiError(f"the input is not UTF-8: byte 0x{error.object[error.start]:02x}") from None
            if text == "/exit":
                return
            if text.startswith("/"):
                self.command(text)
            elif text:
                self.answer(text)

    def command(self, text: str) -> None:
        name, _, rest = text.partition(" ")
        match name:
            case "/reset":
                self.reset(self.system)
                note("the conversation is forgotten")
            case "/system":
                self.reset(rest.strip() or None)
                note("the system message is set; the conversation is forgotten" if self.system else "no system message")
            case "/help":
                note(HELP)
            case _:
                note(f"there is no command {name}. Those there are:\n{HELP}")

    def answer(self, text: str) -> None:
        """Stream one answer. A question that cannot be asked is taken back out of the conversation."""
        self.messages.append({"role": "user", "content": text})
        said: list[str] = []
        ending = "error"
        try:
            with closing(self.llm.chat_stream(self.messages, self.params)) as deltas:
                for delta in deltas:
                    said.append(delta.text)
                    print(delta.text, end="", flush=True)
                    if delta.error is not None:
                        raise LiushuiError(delta.error)
                    ending = delta.finish_reason or ending
        except KeyboardInterrupt:
            ending = "interrupted"
        except LiushuiError as error:
            self.messages.pop()
            note(f"\nerror: {error}\n/reset forgets the conversation, and so makes room")
            return
        print(flush=True)
        self.messages.append({"role": "assistant", "content": "".join(said)})
        if ending == FinishReason.LENGTH:
            note("[cut off at the limit of tokens; see --max-tokens]")
        elif ending == "interrupted":
            note("[interrupted]")
