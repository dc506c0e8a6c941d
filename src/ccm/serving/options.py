"""What a server takes: every option once, with its help, its default and its field."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Sequence
from dataclasses import dataclass, fields
from functools import wraps
from typing import TYPE_CHECKING, Annotated, Any, get_type_hints

import typer

from ..errors import ConfigError, UnknownNameError
from ..models.memory_option import Adapter, MemoryName, Sink, Slots, Window, memory_name
from ..models.options import DecodeIn, Device, DeviceMap, Dtype, LoadIn, Loading, ModelName
from ..models.placement import AUTO
from .llama.options import LlamaContext, LlamaFile, LlamaType, check_llama
from .logs import check_format
from .settings import DISCONNECT, PRECISIONS, RESENDS, Settings

if TYPE_CHECKING:
    from .store import Limits

DAY = 86400


def check_store(url: str | None) -> str | None:
    """The URL of a store, if its kind is known; raises as ``store.check_url``."""
    if url:
        from .store import check_url

        check_url(url)
    return url


def _one_of(kind: str, known: Sequence[str]) -> Callable[[str], str]:
    def check(value: str) -> str:
        if value not in known:
            raise UnknownNameError(kind, value, list(known))
        return value

    return check


@dataclass(frozen=True)
class Options:
    """What ``ccm serve`` takes beside its address and who may come in: plain values, which travel to where it runs.

    A field is an option of the command line (see :func:`takes_options`), and its help says what it means.
    """

    store: Annotated[
        str,
        typer.Option(
            metavar="URL",
            callback=check_store,
            help="sqlite:///FILE, dir:///FOLDER, redis://… or postgresql://…",
            show_default="a file in your state folder",
        ),
    ] = ""
    model: ModelName = None
    memory: MemoryName = None
    device: Device = AUTO
    dtype: Dtype = AUTO
    load_in: LoadIn = None
    device_map: DeviceMap = None
    decode_in: DecodeIn = AUTO
    threads: Annotated[
        int | None, typer.Option(min=1, help="CPU threads.", show_default="torch's choice")
    ] = None
    resend: Annotated[
        str,
        typer.Option(
            callback=_one_of("resend", RESENDS),
            help="A history that differs: match what is known of it, refuse it, or rebuild the memory.",
        ),
    ] = "match"
    texts: Annotated[bool, typer.Option(help="Keep what was said beside the memories.")] = True
    precision: Annotated[
        str,
        typer.Option(
            callback=_one_of("precision", PRECISIONS),
            help="Of stored memories: float32, float16, bfloat16, int8.",
        ),
    ] = "float16"
    ttl: Annotated[
        float | None,
        typer.Option(min=0, metavar="DAYS", help="Forget conversations so long after their end."),
    ] = None
    keep: Annotated[int, typer.Option(min=1, help="Newest versions kept of each conversation.")] = 4
    sessions: Annotated[
        int | None, typer.Option(min=1, help="Conversations per tenant.", show_default="any number")
    ] = None
    quota: Annotated[
        float | None,
        typer.Option(min=0, metavar="MB", help="Megabytes stored per tenant.", show_default="any number"),
    ] = None
    input_tokens: Annotated[int, typer.Option(min=1, help="Tokens that one request may bring.")] = 1 << 16
    disconnect: Annotated[
        str,
        typer.Option(
            "--on-disconnect",
            callback=_one_of("disconnect", DISCONNECT),
            help="A turn whose client goes away: drop, keep what was said, or finish it.",
        ),
    ] = "drop"
    batch: Annotated[int, typer.Option(min=1, help="Turns that run at once.")] = 16
    queue: Annotated[int, typer.Option(min=0, help="Turns that may wait; more are told to come back.")] = 64
    vllm: Annotated[
        str | None,
        typer.Option(metavar="URL", help="A vLLM with our connector that writes the answers."),
    ] = None
    vllm_store: Annotated[
        str | None,
        typer.Option(
            metavar="URL",
            callback=check_store,
            help="The store that its connector reads.",
            show_default="--store",
        ),
    ] = None
    log_format: Annotated[
        str,
        typer.Option(
            callback=check_format, help="auto (text on a terminal, JSON elsewhere), text or json, on stderr."
        ),
    ] = "auto"
    llama: LlamaFile = None
    llama_type: LlamaType = "f16"
    llama_context: LlamaContext = None
    adapter: Adapter = None
    slots: Slots = None
    sink: Sink = None
    window: Window = None

    def check(self) -> None:
        """What can be told at once, before torch is imported.

        Raises:
            ConfigError: options that exclude each other, or names of what is not here.
            MissingPackageError: a package that they need is not installed.
        """
        if self.llama is not None and self.vllm is not None:
            raise ConfigError("--llama and --vllm: one of them writes the answers, give one")
        _ = self.memory_name
        self.loading.check_names()
        check_llama(self.llama)

    @property
    def loading(self) -> Loading:
        """The model and where it goes."""
        return Loading(
            self.model or self.llama, self.device, self.dtype, self.load_in, self.device_map, self.decode_in
        )

    @property
    def memory_name(self) -> str | None:
        """The memory as it is written. Raises ConfigError if it is asked for in two ways."""
        return memory_name(self.memory, self.adapter, slots=self.slots, sink=self.sink, window=self.window)

    @property
    def limits(self) -> Limits:
        """Of the store. Nearly as many older versions stay as newest ones, ever further apart."""
        from .store import Limits

        return Limits(
            keep=self.keep,
            marks=self.keep - 1,
            ttl=None if self.ttl is None else self.ttl * DAY,
            sessions=self.sessions,
            nbytes=None if self.quota is None else int(self.quota * 1e6),
        )

    def settings(self, memory: str) -> Settings:
        """Of the service, whose memory has this name."""
        return Settings(
            memory,
            texts=self.texts,
            resend=self.resend,
            precision=self.precision,
            input_tokens=self.input_tokens,
            disconnect=self.disconnect,
        )


def takes_options(command: Callable[..., None]) -> Callable[..., None]:
    """A command with one option for every field of :class:`Options`, in place of its parameter ``options``."""
    hints = get_type_hints(Options, include_extras=True)
    kind = inspect.Parameter.KEYWORD_ONLY
    spread = [
        inspect.Parameter(field.name, kind, default=field.default, annotation=hints[field.name])
        for field in fields(Options)
    ]
    parameters: list[inspect.Parameter] = []
    for name, parameter in inspect.signature(command, eval_str=True).parameters.items():
        parameters += spread if name == "options" else [parameter.replace(kind=kind)]

    @wraps(command)
    def spreading(**values: Any) -> None:
        options = Options(**{parameter.name: values.pop(parameter.name) for parameter in spread})
        command(options=options, **values)

    spreading.__signature__ = inspect.Signature(parameters)  # type: ignore[attr-defined]
    spreading.__annotations__ = {parameter.name: parameter.annotation for parameter in parameters}
    return spreading
