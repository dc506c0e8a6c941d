"""A random tiny model and adapter in folders that ``ccm serve --model --adapter`` takes: it starts and runs fast."""

from __future__ import annotations

import sys
from pathlib import Path

import torch
from harness import ROOT

sys.path.append(str(ROOT / "tests" / "helpers"))
from tiny import scramble, tiny_model, tiny_tokenizer

from ccm import Compressor, CompressorConfig


def tiny_options(folder: Path) -> list[str]:
    """Write both below ``folder``; returns the options that serve them."""
    tokenizer = tiny_tokenizer()
    model = tiny_model(vocab_size=len(tokenizer), max_position_embeddings=512)
    model.save_pretrained(folder / "model")
    tokenizer.save_pretrained(folder / "model")
    compressor = scramble(Compressor(model, CompressorConfig(slots=2, sink=0)))
    compressor.save_pretrained(folder / "adapter", torch.float32)
    return ["--model", str(folder / "model"), "--adapter", str(folder / "adapter"), "--window", "16"]
