"""A short check of the lean pass on an accelerator, with random weights: right, how fast, where the time goes.

    PYTHONPATH=src python3 benchmarks/gpu/check.py --out $OUT [--tokens 16384 65536] [--seconds 200]

Writes check.json as it goes, and a table of kernels. Needs no model and no data.
"""

from __future__ import annotations

import argparse
import json
import random
import time
import traceback
from pathlib import Path
from typing import Any

import numpy as np
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from ccm.core.compressor import Compressor, CompressorConfig
from ccm.core.rule import get_rule
from ccm.training import objectives
from ccm.training.engines import Lean, Padded
from ccm.training.packed import ArrayRow
from ccm.training.targets import TEXT

STARTED = time.time()
torch._dynamo.config.recompile_limit = 64
SMALL = {"vocab_size": 512, "hidden_size": 256, "intermediate_size": 512, "num_hidden_layers": 3}
#: SmolLM2-135M's.
REAL = {"vocab_size": 49152, "hidden_size": 576, "intermediate_size": 1536, "num_hidden_layers": 30}


def model(shape: dict[str, int], device: str, dtype: torch.dtype) -> LlamaForCausalLM:
    heads = {"num_attention_heads": shape["hidden_size"] // 64, "head_dim": 64}
    heads["num_key_value_heads"] = 3 if heads["num_attention_heads"] == 9 else 2
    torch.manual_seed(0)
    config = LlamaConfig(**shape, **heads, max_position_embeddings=8192, tie_word_embeddings=True)
    built = LlamaForCausalLM(config).to(device, dtype).eval()
    built.requires_grad_(False)
    return built


def compressor(shape: dict[str, int], device: str, dtype: torch.dtype, rank: int) -> Compressor:
    made = Compressor(
        model(shape, device, dtype), CompressorConfig(slots=4, rank=rank, alpha=rank, target_modules="all")
    )
    torch.manual_seed(1)
    for parameter in made.lora_parameters:
        parameter.data.normal_(0, 0.02)
    return made.to(device)


def rows(count: int, words: int, seed: int = 0) -> list[ArrayRow]:
    """Dialogues of 6 to 40 turns of 8 to 42 tokens."""
    rng = random.Random(seed)
    made = []
    for _ in range(count):
        stops = np.cumsum([rng.randrange(8, 43) for _ in range(rng.randrange(6, 41))]).astype(np.int32)
        ids = np.random.default_rng(rng.randrange(2**31)).integers(5, words, stops[-1]).astype(np.int32)
        roles = np.full(len(ids), TEXT, np.uint8)
        roles[[0, *stops[:-1].tolist()]] = 0
        roles[: stops[0]] = 0
        made.append(ArrayRow(ids, roles, stops))
    return made


def filled(tokens: int, words: int, seed: int = 0) -> list[ArrayRow]:
    taken, there = [], 0
    for row in rows(tokens // 100, words, seed):
        if there + row.tokens > tokens:
            break
        taken.append(row)
        there += row.tokens
    return taken


def apart(a: torch.Tensor, b: torch.Tensor) -> float:
    a, b = a.detach().float().cpu(), b.detach().float().cpu()
    return float((a - b).norm() / b.norm())


def right(dtype: torch.dtype) -> dict[str, Any]:
    """Relative differences between lean passes on the device and the model's own layers in fp32 on it."""
    reference = compressor(SMALL, "cuda", torch.float32, 8)
    tested = compressor(SMALL, "cuda", dtype, 8)
    found: dict[str, Any] = {}
    given = rows(12, 512)
    for name, rule, sizes in (
        ("concat", "concat", {"slots": 4, "sink": 4}),
        ("mean", "mean", {"slots": 2, "sink": 0}),
        ("window", "concat", {"slots": 4, "sink": 4, "window": 64}),
    ):
        try:
            results = []
            for engine in (Padded(reference), Lean(tested, 8192, fuse=True)):
                who = engine.compressor
                for parameter in who.trainable_parameters():
                    parameter.grad = None
                scored = engine.run(engine.prepare(given, get_rule(rule), teacher=True, **sizes))
                weight = torch.sin(torch.arange(scored.student.shape[1], device="cuda")).to(
                    scored.student.dtype
                )
                (scored.student * weight).sum().backward()
                results.append((scored, torch.cat([p.grad.flatten() for p in who.trainable_parameters()])))
            (own, slope), (lean, lean_slope) = results
            found |= {
                name: apart(lean.student, own.student),
                f"{name}_teacher": apart(lean.teacher, own.teacher),
                f"{name}_gradient": apart(lean_slope, slope),
            }
        except Exception as error:
            found[name] = f"{type(error).__name__}: {str(error)[:600]}"
    return found


def step(engine: Lean, given: list[ArrayRow], objective: Any, **sizes: int) -> Any:
    prepared = engine.prepare(given, get_rule("concat"), teacher=True, **sizes)
    scored = engine.run(prepared)
    loss = objectives.summed_loss(
        scored.student, scored.teacher, scored.ids, engine.compressor.head, objective
    )
    loss.backward()
    return loss


def speed(tokens: int, fuse: bool, out: Path, profiled: bool) -> dict[str, Any]:
    found: dict[str, Any] = {}
    torch.cuda.empty_cache()
    who = compressor(REAL, "cuda", torch.bfloat16, 32)
    engine = Lean(who, tokens, fuse=fuse)
    objective = torch.compile(objectives.distill, dynamic=True) if fuse else objectives.distill
    batches = [filled(tokens, 49152, seed) for seed in range(3)]
    base = torch.cuda.memory_allocated()
    for name, sizes in (
        ("slots_4", {"slots": 4, "sink": 4}),
        ("slots_1", {"slots": 1, "sink": 4}),
        ("window", {"slots": 4, "sink": 4, "window": 64}),
    ):
        torch.cuda.reset_peak_memory_stats()
        began = time.time()
        step(engine, batches[0], objective, **sizes)
        torch.cuda.synchronize()
        found[name] = {"first_s": round(time.time() - began, 2)}
        step(engine, batches[1], objective, **sizes)
        torch.cuda.synchronize()
        began, seen, host = time.time(), 0, 0.0
        for k in range(6):
            at = time.time()
            step(engine, batches[k % 3], objective, **sizes)
            host += time.time() - at
            seen += sum(row.tokens for row in batches[k % 3])
        torch.cuda.synchronize()
        spent = time.time() - began
        peak = torch.cuda.max_memory_allocated() - base
        found[name] |= {
            "tokens_per_s": round(seen / spent),
            "step_s": round(spent / 6, 4),
            "host_s": round(host / 6, 4),
            "mb_a_token": round(peak / tokens / 2**20, 4),
        }
        print(
            tokens, "fused" if fuse else "plain", name, found[name], round(time.time() - STARTED), flush=True
        )
    at = time.time()
    engine.prepare(batches[0], get_rule("concat"), teacher=True, slots=4, sink=4)
    found["prepare_s"] = round(time.time() - at, 4)
    if profiled:
        with torch.profiler.profile(
            activities=[torch.profiler.ProfilerActivity.CPU, torch.profiler.ProfilerActivity.CUDA]
        ) as profile:
            step(engine, batches[0], objective, slots=4, sink=4)
            torch.cuda.synchronize()
        table = profile.key_averages().table(sort_by="cuda_time_total", row_limit=45)
        (out / f"kernels_{tokens}.txt").write_text(table)
        found["kernels"] = sum(e.count for e in profile.key_averages() if e.device_type.name == "CUDA")
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--tokens", type=int, nargs="*", default=[16384, 65536])
    parser.add_argument("--seconds", type=float, default=200)
    given = parser.parse_args()
    result: dict[str, Any] = {
        "device": torch.cuda.get_device_name(),
        "torch": torch.__version__,
        "begun_s": round(time.time() - STARTED, 1),
    }
    work: list[tuple[str, Any]] = [
        ("right_float32", lambda: right(torch.float32)),
        ("right_bfloat16", lambda: right(torch.bfloat16)),
    ]
    for k, tokens in enumerate(given.tokens):
        work.append(
            (f"fused_{tokens}", lambda t=tokens, k=k: speed(t, True, given.out, k == len(given.tokens) - 1))
        )
    work.append((f"plain_{given.tokens[-1]}", lambda: speed(given.tokens[-1], False, given.out, False)))
    for name, do in work:
        if time.time() - STARTED > given.seconds:
            result[name] = "no time left"
            continue
        try:
            result[name] = do()
        except Exception as error:
            result[name] = f"{type(error).__name__}: {str(error)[:1500]}"
            (given.out / f"{name}.error.txt").write_text(traceback.format_exc())
        print(name, result[name], round(time.time() - STARTED), flush=True)
        (given.out / "check.json").write_text(json.dumps(result, indent=1))


if __name__ == "__main__":
    main()
