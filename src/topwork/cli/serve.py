"""`topwork serve`. Imports what it needs when it runs, so that `--help` answers at once."""

from pathlib import Path
from typing import Annotated, Any

import typer

from topwork.cli.naming import base_named_by
from topwork.cli.options import starting

EPILOG = (
    "Example: topwork serve smollm2-135m --adapter support=runs/support\n\ntopwork serve --config serve.yaml\n\n"
    "topwork serve --model models/base --adapter someone/adapter"
)


def serve(
    base: Annotated[
        str | None,
        typer.Argument(metavar="[MODEL]", help="The base (alias, folder, .gguf, Hub id), or a run's folder."),
    ] = None,
    model: Annotated[str | None, typer.Option(help="The base, in MODEL's place.")] = None,
    adapter: Annotated[
        list[str] | None,
        typer.Option(
            metavar="[NAME=]FOLDER|ID", help="An adapter: PEFT's folder, a run's, or an id on the Hub; repeatable."
        ),
    ] = None,
    config: Annotated[Path | None, typer.Option(help="serve.yaml: all options.")] = None,
    host: Annotated[str | None, typer.Option(help="The address to listen at (127.0.0.1).")] = None,
    port: Annotated[int | None, typer.Option(min=0, max=65535, help="0 takes a free one (8000).")] = None,
    served_model_name: Annotated[str | None, typer.Option(help="What requests call the base.")] = None,
    adapters_folder: Annotated[
        str | None, typer.Option(help="Adapters below this folder may be loaded while the server runs.")
    ] = None,
    chat_template: Annotated[str | None, typer.Option(help="chatml, plain, or a Jinja file.")] = None,
    dtype: Annotated[str | None, typer.Option(help="bfloat16, float16, float32 or auto.")] = None,
    engine: Annotated[
        str | None, typer.Option(help="vllm: the same before a vLLM, for more than one machine; left out, ours.")
    ] = None,
    load_in_4bit: Annotated[bool, typer.Option("--load-in-4bit", help="Hold the base in NF4.")] = False,
    force: Annotated[
        bool, typer.Option("--force", help="Load adapters that were trained on another base, with a warning.")
    ] = False,
    state_folder: Annotated[
        str | None, typer.Option(help="Where what was loaded meanwhile is kept for the next start.")
    ] = None,
    overrides: Annotated[
        list[str] | None, typer.Option("--set", metavar="A.B=C", help="Any option of serve.yaml.")
    ] = None,
    json_log: Annotated[bool, typer.Option("--json-log", help="A JSON object a line.")] = False,
    no_access_log: Annotated[bool, typer.Option("--no-access-log", help="No line a request.")] = False,
) -> None:
    """Serve a base and its adapters: OpenAI's API, many adapters in one batch."""
    from topwork.common.errors import RequestError
    from topwork.serving.backends.vllm_config import VllmConfig
    from topwork.serving.extra import check_extra
    from topwork.serving.settings import load_config

    check_extra()
    adapters = _adapters(adapter or [])
    named = _base(base, model, adapters, config is not None)
    given: dict[str, Any] = {
        "host": host, "port": port, "served_model_name": served_model_name, "adapters_folder": adapters_folder,
        "chat_template": chat_template, "state_folder": state_folder, "adapters": adapters,
        "force": force or None,
        "model": {"model_name_or_path": named, "dtype": dtype}, "quantization": {"load_in_4bit": load_in_4bit or None},
    }  # fmt: skip
    if engine not in (None, "topwork", "vllm"):
        raise RequestError(f"--engine {engine}: expected topwork or vllm")
    read = load_config(config, overrides or [], _said(given))
    if engine is not None and (engine == "vllm") != (read.vllm is not None):
        read = read.model_copy(update={"vllm": VllmConfig() if engine == "vllm" else None})
    log = starting(to_errors=False)
    from topwork.serving.console import set_up_log
    from topwork.serving.launch import serve as run

    set_up_log(json_log, not no_access_log)
    log.quiet()
    run(read, lambda text: print(text, flush=True))


def _said(given: dict[str, Any]) -> dict[str, Any]:
    """What the command line said, without what it did not."""
    inner = {key: _said(value) if isinstance(value, dict) else value for key, value in given.items()}
    return {key: value for key, value in inner.items() if value is not None and value != {}}


def _base(given: str | None, model: str | None, adapters: dict[str, str], from_file: bool) -> str | None:
    """The base that the command line names, or else its first adapter. Raises RequestError where it names two."""
    from topwork.common.errors import RequestError

    if given is not None and model is not None:
        raise RequestError(f"--model {model}: {given} is given as the base already; give one of them")
    named = given or model
    if named is None and adapters and not from_file:
        return base_named_by(next(iter(adapters.values())))
    return named


def _adapters(given: list[str]) -> dict[str, str]:
    """By name; one that is given without is called as its folder is, or the run that it lies in."""
    from topwork.common.errors import RequestError

    found: dict[str, str] = {}
    for entry in given:
        name, equals, path = entry.partition("=") if "=" in entry else (_called(entry), "=", entry)
        if not (name and equals and path) or name in found:
            told = f"{name!r} is given twice; give NAME=FOLDER" if name in found else "expected NAME=FOLDER, or FOLDER"
            raise RequestError(f"--adapter {entry}: {told}")
        found[name] = path
    return found


def _called(entry: str) -> str:
    place = Path(entry).absolute()
    return place.parent.name if place.name == "adapter" else place.name
