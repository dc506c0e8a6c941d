"""``--llama``: how a command is told to answer in llama.cpp."""

from __future__ import annotations

import importlib.util
from pathlib import Path
from typing import Annotated

import typer

from ...errors import ConfigError, MissingPackageError
from ...models.placement import is_default

LlamaFile = Annotated[
    str | None,
    typer.Option(
        "--llama",
        metavar="FILE",
        help="Answer and fold in llama.cpp, from this GGUF file of the model; default: that of the embedded model.",
    ),
]
LlamaType = Annotated[
    str,
    typer.Option("--llama-type", metavar="TYPE", help="Of keys and values in llama.cpp: f32, f16, q8_0."),
]
LlamaContext = Annotated[
    int | None,
    typer.Option(
        "--llama-context",
        min=1,
        metavar="TOKENS",
        help="Positions of one conversation in llama.cpp: memory, prompt and answer.",
        show_default="the memory's and 1,024",
    ),
]


def check_llama(file: str | None) -> None:
    """What can be told at once of ``--llama FILE``, before a model is loaded.

    Raises:
        ConfigError: no such file.
        MissingPackageError: llama-cpp-python is not installed.
    """
    if file is None:
        return
    if not is_default(file) and not Path(file).is_file():
        raise ConfigError(f"no file {file!r}: expected a GGUF file of the model, or default")
    if importlib.util.find_spec("llama_cpp") is None:
        raise MissingPackageError(
            "llama.cpp is not installed here: pip install 'compressed-context-memory[llama]'"
        )
