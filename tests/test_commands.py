"""Every shell block of README and documentation is run as it is written, in a new folder, or its reason stands here.

``ccm`` is the real program in a process of its own. What takes long is made short by options behind what is written
(:data:`LESS`); what cannot run here is left out for a reason (:data:`LEFT_OUT`), and is read by the real parser in
``tests/test_docs.py``.
"""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
import shims
from documented import ROOT, blocks
from gguf_files import write_gguf
from services import Running, serving, tiny_service
from tiny import scramble, tiny_model, tiny_tokenizer

import ccm
from ccm.core.compressor import Compressor, CompressorConfig

SHORT = ["steps=2", "rows=2", "eval_rows=2", "eval_every=2", "bf16=false"]
#: Command -> words behind it, so that it takes seconds.
LESS = {
    r"^ccm chat": ["--max-tokens", "8"],
    r"^ccm demo": ["--conversations", "1", "--turns", "6", "--methods", "window"],
    r"^ccm eval quick": ["--tasks", "needles", "--limit", "1", "--methods", "none,full,ccm-concat"],
    r"^ccm eval chats": ["--limit", "1", "--methods", "none,full"],
    r"^ccm eval items": ["--limit", "2", "--methods", "none,full"],
    r"^ccm eval ruler": [
        "--tasks",
        "niah_single_1",
        "--lengths",
        "512",
        "--limit",
        "1",
        "--methods",
        "none,full",
    ],
    r"^ccm leaderboard": ["--tasks", "facts", "--limit", "1", "--methods", "snapkv"],
    r"^ccm data pack": ["--tokens", "4000", "tokens_per_batch=1024", "eval_rows=2"],
    r"^ccm serve": ["--port", "0", "--host", "127.0.0.1"],
    r"^ccm train (?!.*(--init|--estimate|--extend))": SHORT,
    r"^ccm train .*--extend": SHORT,
    r"^ccm train recipes/cpu-minutes": ["require.recovered_share=-9"],
    r"^torchrun": SHORT,
}
#: Command -> why it is not run here.
LEFT_OUT = {
    r"^pip ": "tools/package.py installs the wheel in an empty environment",
    r"^make ": "whole suites; test_docs.py looks the targets up",
    r"^git clone": "there is no address to clone from",
    r"--load-in 4bit": "needs the extra quant: tests/models/test_quantized.py",
    r"--device cuda": "needs a GPU",
    r"--llama": "needs the extra llama: tests/llama",
    r"^ccm eval (locomo|longmemeval|msc)": "needs files that others give out: tests/evaluation/test_benchmarks.py",
    r"^ccm bench": "minutes, and llama.cpp: tests/bench",
    r"postgresql://|redis://": "needs a database: tests/serving/test_store.py",
    r"^ccm serve.*--vllm|^\.venv-vllm": "needs vLLM: tests/vllm",
    r"^ray |^serve |^ccm serve --ray": "needs Ray: tests/serving/test_ray.py",
    r"^torchrun --nnodes": "needs two machines: tests/training/test_distributed.py",
    r"^python .*harness": "needs a hub: tests/evaluation/test_harness.py",
}
PROGRAMS = ["ccm", "pip", "make", "git", "torchrun", "ray", "serve", "python"]
#: Pages whose curl talks to a server that runs.
TALKING = {"docs/serving.md", "docs/deployment.md"}
BLOCKS = [block for block in blocks("sh", "console") if block.language == "sh" or "\n$ " in f"\n{block.code}"]


def lines(block) -> str:
    """What is typed of a block."""
    if block.language == "sh":
        return block.code
    return "\n".join(line[2:] for line in block.code.splitlines() if line.startswith("$ "))


def test_every_reason_is_needed() -> None:
    typed = "\n".join(lines(block).replace("\\\n", " ") for block in BLOCKS)
    commands = [re.sub(r"^\s*(\w+=\S+ )*", "", line) for line in typed.splitlines()]
    for pattern in (*LESS, *LEFT_OUT):
        assert any(re.search(pattern, line) for line in commands), pattern


# ---------------------------------------------------------------------- what a reader has by then


def talk(person: int) -> dict[str, object]:
    said = [
        ("user", f"I have {n} cats and a dog.") if n % 2 else ("assistant", "That is nice.")
        for n in range(1, 17)
    ]
    return {"user": f"u{person}", "messages": [{"role": role, "content": text} for role, text in said]}


ITEM = {"context": ["The market is on Monday.", "It rains."], "input": "When is the market?"}


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory, embedded) -> Path:
    """A folder with what the pages take for granted: a model, an adapter, logs, a saved session."""
    home = tmp_path_factory.mktemp("made")
    tokenizer = tiny_tokenizer()
    model = tiny_model(vocab_size=len(tokenizer), max_position_embeddings=4096)
    for name in ("my-model", "HuggingFaceTB/SmolLM2-360M-Instruct"):
        model.save_pretrained(home / name)
        tokenizer.save_pretrained(home / name)
    write_gguf(home / "my-model.gguf", model, tokenizer)
    scramble(Compressor(model, CompressorConfig(slots=2))).save_pretrained(home / "my-adapter")
    (home / "chats.jsonl").write_text("".join(f"{json.dumps(talk(n))}\n" for n in range(60)))
    days = ["Monday", "Thursday", "Friday"]
    items = [{**ITEM, "options": days, "answer": "Sunday" if n == 1 else "Monday"} for n in range(13)]
    (home / "items.jsonl").write_text("".join(f"{json.dumps(item)}\n" for item in items))
    session = ccm.Session.open(*embedded)
    session.append("My cat is called Miso.", role="user")
    session.generate("Hello!", max_new_tokens=4)
    for name in ("talk", "nadia", "chat"):
        session.save(home / f"{name}.ccm")
    (recipe,) = (block.code for block in blocks("yaml") if "chats.jsonl" in block.code)
    (home / "chats.yaml").write_text(recipe)
    (home / "8b").mkdir()
    embedded[0].config.save_pretrained(home / "8b")
    shutil.copy(ROOT / "examples" / "extending" / "low_norm.py", home)
    for name in ("recipes", "examples"):
        (home / name).symlink_to(ROOT / name)
    return home


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Running]:
    with serving(tiny_service(tmp_path_factory.mktemp("store"))) as running:
        yield running


@pytest.mark.slow
@pytest.mark.timeout(3600)
@pytest.mark.parametrize("page", sorted({block.page for block in BLOCKS}))
def test_a_page_is_typed(
    page: str, made: Path, server: Running, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    home = tmp_path / "home"
    shutil.copytree(made, home, symlinks=True)
    monkeypatch.chdir(home)
    shims.install(tmp_path / "bin", PROGRAMS, LESS, LEFT_OUT)
    shims.install(home, [".venv-vllm/bin/python"], LESS, LEFT_OUT)
    (home / "REPOSITORY").mkdir()
    if page == "docs/evaluation.md":  # an adapter of one's own; on the other pages one is trained
        shutil.copytree(ROOT / "src" / "ccm" / "adapters" / "ccm-merge", home / "runs" / "chats" / "adapter")
    path = os.pathsep.join((str(tmp_path / "bin"), str(Path(sys.executable).parent), os.environ["PATH"]))
    state = {
        "PATH": path,
        "XDG_STATE_HOME": str(tmp_path / "state"),
        "COLUMNS": "100",
        "PYTHONPATH": str(ROOT / "src"),
    }
    for block in BLOCKS:
        if block.page != page:
            continue
        typed = lines(block)
        if page in TALKING:
            typed = re.sub(r"http://localhost:8000", server.url, typed)
        if page == "docs/training.md" and "./t5" in typed:
            exec(next(code.code for code in blocks("python") if code.page == page), {"__name__": "page"})
        done = subprocess.run(
            ["bash", "-euo", "pipefail", "-c", typed],
            cwd=home,
            env={**os.environ, **state},
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
            check=False,
        )
        with (tmp_path / "log").open("a") as log:
            print(typed, done.stdout, done.stderr, sep="\n", file=log)
        assert done.returncode == 0, f"{page}\n{typed}\n{done.stdout[-3000:]}\n{done.stderr[-3000:]}"
        assert "Traceback" not in done.stderr, done.stderr[-3000:]
        if "curl" in typed:
            assert not re.search(r'^\{"error"', done.stdout, re.MULTILINE), done.stdout
