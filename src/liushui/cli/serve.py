"""`liushui serve`: the model behind OpenAI's endpoints."""

import json
from typing import Annotated, Any

import typer

from liushui.cli.common import note
from liushui.cli.options import Group, engine_group, with_flags
from liushui.config import EngineConfig, ServingConfig
from liushui.server.settings import ServerConfig

SERVER = Group(ServerConfig, {}, {})
SERVING = Group(ServingConfig, {}, {"served_names": "served_model_name"})


@with_flags(engine_group(frozenset({"model"})), SERVING, SERVER)
def serve(
    config: EngineConfig,
    serving: ServingConfig,
    server: ServerConfig,
    model: Annotated[str, typer.Argument(help="Alias, Hugging Face name, local folder, or GGUF file.")] = "smollm2",
) -> None:
    """Answer over HTTP as OpenAI's API does. Listens on this machine only, unless there are API keys."""
    from dataclasses import replace

    from liushui.cli.progress import Download
    from liushui.loading.hub import resolve
    from liushui.server.run import main

    config = replace(config, model=model).validate()
    with Download() as bar:
        resolve(model, progress=bar)
    holder: dict[str, Any] = {}

    def make_engine() -> Any:
        holder["engine"] = engine_for(config, serving)
        return holder["engine"]

    def started(address: str) -> None:
        info = holder["engine"].info
        for line in info.report:
            note(line)
        note(f"listening on {address} as {', '.join(info.served_names)}; Ctrl-C stops (twice: at once)")
        note(f"try: {curl_line(address, info.served_names[0], info.chat_template_hash is not None, server.keyed)}")

    main(make_engine, server, started)


def engine_for(config: EngineConfig, serving: ServingConfig) -> Any:
    """The engine behind the server."""
    from liushui.engine.process import ProcessEngine

    return ProcessEngine(config, serving)


def curl_line(address: str, model: str, chat: bool, keyed: bool) -> str:
    """A command that shows that it works."""
    key = ' -H "Authorization: Bearer $KEY"' if keyed else ""
    path = "chat/completions" if chat else "completions"
    body: dict[str, Any] = {"model": model, "max_tokens": 64}
    body |= {"messages": [{"role": "user", "content": "Hello!"}]} if chat else {"prompt": "Hello"}
    return f"curl {address}/v1/{path}{key} -H 'Content-Type: application/json' -d '{json.dumps(body)}'"
