"""Training runs on a tiny model and made-up chat logs, in this process or in others."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import torch
import yaml
from tiny import tiny_model, tiny_tokenizer
from transformers import PreTrainedModel

from ccm.core.config import CompressorConfig
from ccm.training import TrainConfig, Trainer

TOKENIZER = tiny_tokenizer()

SETTINGS: dict[str, Any] = {
    "compressor": {"slots": 2, "rule": "mean"},
    "steps": 6,
    "rows": 2,
    "window_choices": [0, 40],
    "slot_choices": [1, 2],
    "eval_every": 3,
    "eval_rows": 4,
    "save_every": 2,
    "bf16": False,
}


def model() -> PreTrainedModel:
    return tiny_model(vocab_size=len(TOKENIZER), max_position_embeddings=2048)


def write_logs(folder: Path) -> Path:
    """Chat logs of eighty users; some are in each split."""
    path = folder / "logs.jsonl"
    with path.open("w") as file:
        for n in range(80):
            messages = [
                {"role": "assistant" if i % 2 else "user", "content": f"{n} says {i * n}"} for i in range(14)
            ]
            file.write(json.dumps({"user": f"user {n}", "messages": messages}) + "\n")
    return path


def data(logs: Path, **options: Any) -> dict[str, dict[str, Any]]:
    return {"jsonl": {"path": str(logs), "turns": [6, 9], "facts": 0.3, **options}}


def trainer(folder: Path, logs: Path, extend: bool = False, **changes: Any) -> Trainer:
    torch.manual_seed(0)
    settings = {**SETTINGS, "data": data(logs), **changes}
    settings["compressor"] = CompressorConfig(**settings["compressor"])
    for name in ("window_choices", "slot_choices"):
        settings[name] = tuple(settings[name])
    return Trainer(model(), TOKENIZER, TrainConfig(**settings), folder, extend)


def write_recipe(folder: Path, logs: Path, **changes: Any) -> Path:
    """A recipe for the command line, with its model in a folder beside it."""
    home = folder / "model"
    if not home.exists():
        model().save_pretrained(home)
        TOKENIZER.save_pretrained(home)
    path = folder / "recipe.yaml"
    path.write_text(yaml.safe_dump({**SETTINGS, "model": str(home), "data": data(logs), **changes}))
    return path


def command(recipe: Path, out: Path, *more: str, processes: int = 1) -> list[str]:
    """``ccm train`` in a process of its own, or in several under torchrun."""
    start = [sys.executable, "-m"]
    if processes > 1:
        start += ["torch.distributed.run", "--nproc_per_node", str(processes), "--standalone", "-m"]
    return [*start, "ccm", "train", str(recipe), "--out", str(out), *more]


def environment() -> dict[str, str]:
    source = str(Path(__file__).parents[2] / "src")
    return {
        **os.environ,
        "PYTHONPATH": f"{source}:{Path(__file__).parent}",
        "OMP_NUM_THREADS": "1",
        "HF_HUB_OFFLINE": "1",
    }


def start(recipe: Path, out: Path, *more: str, processes: int = 1) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        command(recipe, out, *more, processes=processes), env=environment(), capture_output=True, text=True
    )


def log_of(folder: Path) -> list[dict[str, Any]]:
    """The log without what a clock says."""
    lines = [json.loads(line) for line in (folder / "log.jsonl").read_text().splitlines()]
    return [{k: v for k, v in line.items() if k not in ("seconds", "tokens_per_second")} for line in lines]


def weights_of(folder: Path) -> list[torch.Tensor]:
    return torch.load(folder / "checkpoint.pt", weights_only=True)["parameters"]
