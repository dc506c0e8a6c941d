"""``ccm chat``. Heavy imports wait until it runs, so that help is quick."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from ..errors import ConfigError
from ..models.loading import Device, DeviceMap, Dtype, LoadIn, Loading, ModelName
from ..models.memory_option import Adapter, MemoryName, Sink, Slots, Window, memory_name
from ..models.placement import AUTO
from ..serving.llama.options import LlamaContext, LlamaFile, LlamaType
from .options import new_console

if TYPE_CHECKING:
    from ..session import Session

EPILOG = "Example: ccm chat --model ./my-model --memory streaming-llm:window=512"


def chat(
    model: ModelName = None,
    memory: MemoryName = None,
    device: Device = AUTO,
    dtype: Dtype = AUTO,
    load_in: LoadIn = None,
    device_map: DeviceMap = None,
    load: Annotated[Path | None, typer.Option(metavar="FILE", help="Continue a saved session.")] = None,
    system: Annotated[str | None, typer.Option(metavar="TEXT", help="System message at the start.")] = None,
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
    loading = Loading(model or llama, device, dtype, load_in, device_map)
    loading.check()
    from ..methods.default import checked, open_method, saved_memory
    from ..session import Session
    from .repl import Repl

    spec = checked(named)
    if load and (system or spec.options):
        raise ConfigError(
            f"--load {load} brings its own past and sizes: leave --system out, and the options of the memory"
        )
    if load and named is None:
        spec = saved_memory(load)
    console = new_console()
    language_model, tokenizer = loading.load()
    method = open_method(spec, language_model, tokenizer)
    if llama is not None:
        from ..serving.llama.reader import in_llama

        method = in_llama(method, llama, positions=llama_context, kind=llama_type)

    def begin() -> Session:
        session = Session(method, tokenizer)
        if system:
            session.append(system, role="system")
        return session

    session = Session.load(load, method, tokenizer) if load else begin()
    Repl(session, begin, console).run()
