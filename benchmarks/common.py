"""What every benchmark shares: arguments, the environment's record, one JSON file in ``results/``."""

from __future__ import annotations

import argparse
import json
import os
import platform
from pathlib import Path
from typing import Any

import torch
import transformers

import ccm

RESULTS = Path(__file__).parent.parent / "results"


def parser(description: str) -> argparse.ArgumentParser:
    arguments = argparse.ArgumentParser(description=description)
    arguments.add_argument("--threads", type=int, default=os.cpu_count(), help="CPU threads")
    arguments.add_argument("--limit", type=int, default=None, help="fewer items, for a quick look")
    return arguments


def environment(dtype: str = "float32") -> dict[str, Any]:
    return {
        "ccm": ccm.__version__,
        "torch": torch.__version__,
        "transformers": transformers.__version__,
        "python": platform.python_version(),
        "threads": torch.get_num_threads(),
        "dtype": dtype,
    }


def store(name: str, result: dict[str, Any], dtype: str = "float32") -> None:
    """Print a result and keep it as ``results/NAME.json``."""
    RESULTS.mkdir(exist_ok=True)
    text = json.dumps({**result, "environment": environment(dtype)}, indent=1)
    (RESULTS / f"{name}.json").write_text(text + "\n")
    print(text)
