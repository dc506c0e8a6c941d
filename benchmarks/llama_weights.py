"""What a conversation in llama.cpp takes with the model's weights in torch as well, and without them.

    .venv-llama/bin/python benchmarks/llama_weights.py

The embedded model, and a Llama of 1.07 billion random weights in q8_0 that is written into a temporary folder, each
with a process for either way: open, two turns. Bytes are the most that the process held, pages of the file that it
maps among them; seconds are those of the processor. Stored in ``results/llama_weights.json``.
"""

from __future__ import annotations

import json
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import torch
from common import store

from ccm import Session
from ccm.bench.machine import peak_bytes
from ccm.methods import get_method
from ccm.models.load import gguf_file
from ccm.models.options import Loading
from ccm.serving.llama import hollow
from ccm.serving.llama.reader import in_llama

REPEATS = 3
WIDTH, LAYERS, INNER, HEADS, KV_HEADS, WORDS = 2048, 16, 8192, 32, 8, 49152
KIND = gguf.GGMLQuantizationType.Q8_0


def write(path: Path) -> None:
    """The random model, with the tokenizer of the embedded model's file."""
    writer = gguf.GGUFWriter(path, "llama")
    writer.add_block_count(LAYERS)
    writer.add_context_length(8192)
    writer.add_embedding_length(WIDTH)
    writer.add_feed_forward_length(INNER)
    writer.add_head_count(HEADS)
    writer.add_head_count_kv(KV_HEADS)
    writer.add_layer_norm_rms_eps(1e-5)
    writer.add_rope_dimension_count(WIDTH // HEADS)
    writer.add_vocab_size(WORDS)
    for field in gguf.GGUFReader(gguf_file("default")).fields.values():
        if field.name.startswith("tokenizer."):
            kind, *inner = field.types
            writer.add_key_value(field.name, field.contents(), kind, inner[0] if inner else None)
    random = np.random.default_rng(0)

    def matrix(name: str, rows: int, columns: int) -> None:
        weight = random.standard_normal((rows, columns), dtype=np.float32) * columns**-0.5
        writer.add_tensor(f"{name}.weight", gguf.quants.quantize(weight, KIND), raw_dtype=KIND)

    def norm(name: str) -> None:
        writer.add_tensor(f"{name}.weight", np.ones(WIDTH, np.float32))

    matrix("token_embd", WORDS, WIDTH)
    norm("output_norm")
    size = WIDTH // HEADS
    for layer in range(LAYERS):
        block = f"blk.{layer}"
        for name, rows in (("q", HEADS * size), ("k", KV_HEADS * size), ("v", KV_HEADS * size)):
            matrix(f"{block}.attn_{name}", rows, WIDTH)
        matrix(f"{block}.attn_output", WIDTH, WIDTH)
        matrix(f"{block}.ffn_gate", INNER, WIDTH)
        matrix(f"{block}.ffn_up", INNER, WIDTH)
        matrix(f"{block}.ffn_down", WIDTH, INNER)
        norm(f"{block}.attn_norm")
        norm(f"{block}.ffn_norm")
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def talk(way: str, model: str) -> dict[str, float]:
    """Two turns in this process."""
    torch.set_num_threads(1)
    loading = Loading(model)
    loaded, tokenizer = hollow.load(loading, spinner=False) if way == "without" else loading.load(False)
    method = get_method("streaming-llm", window=200).bind(loaded, tokenizer)
    session = Session(in_llama(method, model, threads=1), tokenizer)
    for text in ("My cat is called Miso.", "What is my cat called?"):
        session.generate(text, max_new_tokens=16, do_sample=False)
    return {"peak_bytes": peak_bytes(), "seconds": time.process_time()}


def measured(model: str) -> dict[str, Any]:
    """Both ways in turns: medians, least and most."""
    found: dict[str, list[dict[str, float]]] = {"with": [], "without": []}
    for _ in range(REPEATS):
        for way, runs in found.items():
            done = subprocess.run(
                [sys.executable, __file__, way, model], stdout=subprocess.PIPE, text=True, check=True
            )
            runs.append(json.loads(done.stdout.splitlines()[-1]))
    result: dict[str, Any] = {"file_bytes": Path(gguf_file(model)).stat().st_size}
    for way, runs in found.items():
        result[way] = {
            key: {
                "median": statistics.median(values),
                "least": min(values),
                "most": max(values),
            }
            for key in runs[0]
            for values in [[run[key] for run in runs]]
        }
    return result


def main() -> None:
    if len(sys.argv) == 3:
        print(json.dumps(talk(sys.argv[1], sys.argv[2])))
        return
    rows = {"embedded": measured("default")}  # first: a process begins with the most that its parent has held
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "random.gguf"
        write(file)
        rows["1.07 billion weights, q8_0"] = measured(str(file))
    store("llama_weights", {"task": "two turns in llama.cpp", "repeats": REPEATS, "rows": rows})


if __name__ == "__main__":
    main()
