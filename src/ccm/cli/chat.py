"""``ccm chat``. Heavy imports wait until it runs, so that help is quick."""

from __future__ import annotations

import threading
from collections.abc import Callable
from concurrent.futures import Future
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from ..errors import ConfigError
from ..models.known import written
from ..models.memory_option import Adapter, MemoryName, Sink, Slots, Window, memory_name
from ..models.options import DecodeIn, Device, DeviceMap, Dtype, LoadIn, Loading, ModelName
from ..models.placement import AUTO
from ..serving.llama.options import LlamaContext, LlamaFile, LlamaType, check_llama
from .options import memory_file, new_console
from .prompt import is_interactive, is_typed

if TYPE_CHECKING:
    from ..methods import Method
    from ..session import Session
    from .repl import Opened

EPILOG = "Example: ccm chat --model ./my-model --memory streaming-llm:window=512"


def chat(
    model: ModelName = None,
    memory: MemoryName = None,
    device: Device = AUTO,
    dtype: Dtype = AUTO,
    load_in: LoadIn = None,
    device_map: DeviceMap = None,
    decode_in: DecodeIn = AUTO,
    load: Annotated[
        Path | None, typer.Option(metavar="FILE", callback=memory_file, help="Continue a saved session.")
    ] = None,
    system: Annotated[str | None, typer.Option(metavar="TEXT", help="System message at the start.")] = None,
    temperature: Annotated[
        float | None,
        typer.Option(min=0, help="0: always the likeliest word.", show_default="the model's own"),
    ] = None,
    max_tokens: Annotated[int | None, typer.Option(min=1, help="Longest answer.", show_default="128")] = None,
    seed: Annotated[
        int | None, typer.Option(min=0, help="The same one, the same answers.", show_default="none")
    ] = None,
    compare: Annotated[
        bool, typer.Option("--compare", help="Every answer beside those from full context and from nothing.")
    ] = False,
    llama: LlamaFile = None,
    llama_type: LlamaType = "f16",
    llama_context: LlamaContext = None,
    adapter: Adapter = None,
    slots: Slots = None,
    sink: Sink = None,
    window: Window = None,
) -> None:
    """Talk with a model whose memory does not grow with the conversation; /help inside lists the commands."""
    named = memory_name(memory, adapter, slots=slots, sink=sink, window=window)
    loading = Loading(model or llama, device, dtype, load_in, device_map, decode_in)
    if load:
        _check_loaded(load, named, system, compare)
    loading.check_names()
    check_llama(llama)
    console, typed = new_console(), is_interactive()
    if is_typed():
        from .screen import banner

        console.print(banner(loading.model, named), highlight=False)
    from .repl import Repl

    opening: Future[Opened] = Future()

    def moved(method: Method) -> Method:
        from ..serving.llama.reader import in_llama

        return in_llama(method, str(llama), positions=llama_context, kind=llama_type)

    def work() -> None:
        try:
            opening.set_result(_open(loading, named, load, system, None if llama is None else moved))
        except BaseException as error:
            opening.set_exception(error)

    if typed and (loading.model is not None or _is_ready()):
        threading.Thread(target=work, name="ccm-loading", daemon=True).start()
    else:  # the embedded model has a download to show, the first time
        work()
    chosen = {"temperature": temperature, "max_tokens": max_tokens, "seed": seed}
    given = {name: value for name, value in chosen.items() if value is not None}
    Repl(opening, console, given, compare, typed).run()


def _check_loaded(load: Path, named: str | None, system: str | None, compare: bool) -> None:
    """Raises ConfigError if a saved session cannot be gone on with as it was asked for."""
    if compare:
        raise ConfigError(
            f"--compare: {load} keeps the beginning of each turn only, so there is no full context to compare with; "
            "leave --compare or --load out"
        )
    if system or (named and written(named)[1]):
        raise ConfigError(
            f"--load {load} brings its own past and sizes: leave --system out, and the options of the memory"
        )


def _is_ready() -> bool:
    """Whether the embedded model is here and need not be fetched, without looking closely."""
    from ..models.packages import cache_dir

    return any((cache_dir() / "models").glob("SmolLM2*/model.safetensors"))


def _open(
    loading: Loading,
    named: str | None,
    load: Path | None,
    system: str | None,
    moved: Callable[[Method], Method] | None,
) -> Opened:
    """The model and the session, as they were asked for; ``moved`` brings the method elsewhere."""
    loading.check()
    from ..files.kind import digest_of
    from ..methods.default import checked, for_talking, open_method, saved_memory
    from ..session import Session
    from .repl import Opened

    spec = saved_memory(load) if load and named is None else checked(named)
    if moved is None:
        language_model, tokenizer = loading.load(spinner=not is_interactive())
        method = open_method(for_talking(spec, language_model), language_model, tokenizer)
    else:  # another reader cannot say which slots a question attends to
        from ..serving.llama import hollow

        language_model, tokenizer = hollow.load(loading, spinner=not is_interactive())
        method = moved(open_method(spec, language_model, tokenizer))

    def begin() -> Session:
        session = Session(method, tokenizer)
        if system:
            session.append(system, role="system")
        return session

    if load is None:
        return Opened(method, begin, begin(), {})
    files = {load.resolve(): digest_of(load)}
    return Opened(method, begin, Session.load(load, method, tokenizer), files)
