"""``ccm plan`` as docs/scaling.md shows it: the embedded model, measured, and an 8B model from a config alone.

python benchmarks/plan.py
"""

from __future__ import annotations

import os
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import torch
from common import parser, store
from transformers import LlamaConfig

sys.path.append(str(Path(__file__).parent.parent / "tests" / "helpers"))
from servers import postgresql_server

#: Shape of an 8B model with grouped queries and a context of 128k, in bfloat16.
LARGE: dict[str, Any] = {
    "hidden_size": 4096,
    "intermediate_size": 14336,
    "num_hidden_layers": 32,
    "num_attention_heads": 32,
    "num_key_value_heads": 8,
    "vocab_size": 128256,
    "max_position_embeddings": 131072,
    "dtype": "bfloat16",
}


def shown(*options: str, threads: int) -> list[str]:
    """What the command prints, by lines."""
    environment = {**os.environ, "COLUMNS": "112", "OMP_NUM_THREADS": str(threads)}
    command = [sys.executable, "-m", "ccm", "plan", *options]
    done = subprocess.run(command, env=environment, capture_output=True, text=True)
    if done.returncode:
        raise RuntimeError(done.stderr)
    return [line.rstrip() for line in done.stdout.splitlines()]


def main() -> None:
    arguments = parser(__doc__.splitlines()[0]).parse_args()
    torch.set_num_threads(arguments.threads)
    load = ["--users", "1000", "--turns", "100"]
    with tempfile.TemporaryDirectory() as folder, postgresql_server() as database:
        LlamaConfig(**LARGE).save_pretrained(folder)
        measured = ["--store", database.url]
        plans = {
            "ccm-merge": shown(
                *load, "--adapter", "ccm-merge", "--gpu-memory", "80", *measured, threads=arguments.threads
            ),
            "ccm-concat": shown(*load, "--adapter", "ccm-concat", *measured, threads=arguments.threads),
            "8b": shown(
                *load,
                "--tokens-per-turn",
                "200",
                "--model",
                folder,
                "--adapter",
                "ccm-concat",
                "--gpu-memory",
                "80",
                "--no-measure",
                threads=arguments.threads,
            ),
        }
    plans["8b"][0] = plans["8b"][0].replace(folder, "8b")
    store("plan", {"task": "ccm plan", "plans": plans})


if __name__ == "__main__":
    main()
