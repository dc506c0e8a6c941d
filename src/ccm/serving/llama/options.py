"""``--llama``: how a command is told to answer in llama.cpp."""

from __future__ import annotations

from typing import Annotated

import typer

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
