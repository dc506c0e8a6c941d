"""The adapters in the package, on the embedded model: they load by name, and they are worth having."""

from __future__ import annotations

import inspect
import json
from pathlib import Path

import pytest
import torch

import ccm
from ccm import cli
from ccm.chat.turns import render
from ccm.cli.plan import plan as plan_command
from ccm.cli.serve import serve
from ccm.data import load_chitchat
from ccm.data.rows import held_out_rows
from ccm.evaluation.share import parallel_nll, recovered_share, reference_nll, turn_nll
from ccm.files import adapter_folder
from ccm.files.adapter_folder import SHIPPED
from ccm.methods.compressed import shared_compressor
from ccm.methods.default import ADAPTER, CHAT, default_memory
from ccm.planning.plan import plan

DEFAULT = ADAPTER
ADAPTERS = ["ccm-chat", "ccm-concat", "ccm-merge"]
#: Fingerprints that memories of the shipped adapters carry.
SHIPPED_PRINTS = json.loads((Path(__file__).parent.parent / "golden" / "fingerprints.json").read_text())


@pytest.mark.parametrize("name", ccm.shipped_adapters())
def test_an_adapter_is_complete_and_small(name: str) -> None:
    folder = SHIPPED / name
    found = {path.name for path in folder.iterdir()}
    if "weights" in json.loads((folder / "ccm_config.json").read_text()):
        assert found == {"ccm_config.json", "README.md"}
        return
    assert found >= {
        "adapter_config.json",
        "adapter_model.safetensors",
        "ccm_config.json",
        "training.json",
        "README.md",
    }
    assert found & {"comp_embeddings.safetensors", "pooling.safetensors"}
    assert sum(path.stat().st_size for path in folder.iterdir()) < 11e6
    record = json.loads((folder / "training.json").read_text())
    assert {"config", "versions", "report"} <= record.keys()


def test_the_chat_adapter_and_the_one_that_keeps_all_are_the_same_weights(embedded) -> None:
    model, _ = embedded
    chat, whole = (adapter_folder.read(name, model, {}) for name in ("ccm-chat", "ccm-concat"))
    assert (chat.config.rule, whole.config.rule) == ("bounded", "concat")
    assert chat.lora.keys() == whole.lora.keys() and chat.slots.keys() == whole.slots.keys()
    for own, other in ((chat.lora, whole.lora), (chat.slots, whole.slots)):
        assert all(torch.equal(own[name], other[name]) for name in own)


@pytest.mark.parametrize("name", [name for name in SHIPPED_PRINTS if name.startswith("ccm-")])
def test_memories_of_earlier_releases_go_on(name: str, embedded) -> None:
    if name == "ccm-tasks":
        pytest.skip("its first stage tunes the model that the others share")
    known = shared_compressor(embedded[0], name).fingerprints()
    assert SHIPPED_PRINTS[name] in known
    assert (known[0] == SHIPPED_PRINTS[name]) == (name != "ccm-merge-short")  # its rule was called "merge"


def test_no_weights_are_shipped_twice() -> None:
    files = [path.read_bytes() for path in SHIPPED.rglob("*.safetensors")]
    assert len(set(files)) == len(files)


@pytest.mark.slow
@pytest.mark.parametrize("name", ADAPTERS)
def test_parallel_equals_recurrent_with_trained_weights(name: str, embedded) -> None:
    model, tokenizer = embedded
    compressor = shared_compressor(model, name)
    (row,) = held_out_rows(load_chitchat("test")[:1], tokenizer)
    for sizes in ({}, {"sink": 4, "window": 64}):
        with torch.no_grad():
            output = compressor([row.segments], **sizes)
        memory = compressor.empty()
        for turn, ids in enumerate(row.segments):
            alone = compressor.logits([list(ids)], memory)[0]
            torch.testing.assert_close(output.segment_logits(0, turn), alone, atol=2e-3, rtol=1e-4)
            memory = compressor.compress([list(ids)], memory, **sizes)


@pytest.mark.slow
def test_memories_recover_most_of_what_the_context_is_worth(embedded) -> None:
    model, tokenizer = embedded
    rows = held_out_rows(load_chitchat("test"), tokenizer)[:16]
    reader = shared_compressor(model, "ccm-concat")
    none, full = (reference_nll(reader, rows, context).mean for context in ("none", "full"))
    for name, sizes, least in (
        ("ccm-concat", {}, 0.75),
        ("ccm-merge", {}, 0.7),
        ("ccm-merge", {"sink": 4, "window": 64}, 0.9),
    ):
        nll = parallel_nll(shared_compressor(model, name), rows, **sizes).mean
        assert recovered_share(none, full, nll) > least, (name, sizes)


@pytest.mark.slow
def test_a_chat_recalls_what_was_folded(embedded) -> None:
    """A turn that left the window long ago changes what the model expects."""
    model, tokenizer = embedded
    session = ccm.Session(shared_compressor(model, "ccm-merge"), tokenizer, sink=4, window=24)
    session.append("My dog is called Biscuit. He is a brown labrador and he loves swimming.")
    session.append("What a lovely dog! I would like to meet him.", role="assistant")
    session.append("You should come by, we go out to the lake every weekend when it is warm.")
    assert session.stats()["tokens_folded"] > 0
    answer = render(tokenizer, "assistant", "Biscuit loves the lake, he is such a good dog.")
    with_memory, n = turn_nll(
        session.method.reader.logits([list(answer.ids)], session.memory)[0], answer.ids, answer.content
    )
    without, _ = turn_nll(session.method.reader.logits([list(answer.ids)])[0], answer.ids, answer.content)
    assert with_memory / n < without / n - 0.3


@pytest.mark.slow
def test_the_default_of_a_chat_knows_what_its_window_has_lost(embedded) -> None:
    """The name of a dog, twenty turns ago. The control is ccm-merge, whose few slots cannot tell."""
    model, tokenizer = embedded
    talk = next(talk for talk in load_chitchat("test", cap_per_user=None) if len(talk.turns) >= 20)
    stem = render(tokenizer, "assistant", "Your dog is called x")
    asked = list(stem.ids[: stem.content[1] - 2])
    names = ("Max", "Bella", "Rocky", "Daisy")
    first = [tokenizer.encode(f" {name}", add_special_tokens=False)[0] for name in names]
    evidence = {}
    for adapter in (DEFAULT, "ccm-merge"):
        compressor = shared_compressor(model, adapter)
        told = []  # a row for each name: log-probabilities of all of them
        for name in names:
            session = ccm.Session(compressor, tokenizer, **CHAT)
            session.append(f"I have a dog, its name is {name}.")
            for turn in talk.turns[:20]:
                session.append(turn.text, role=turn.role)
            assert session.stats()["tokens_folded"] > 100
            session.append("What is the name of my dog?")
            told.append(compressor.logits([asked], session.memory)[0, -1].log_softmax(-1)[first])
        table = torch.stack(told)
        evidence[adapter] = float(table.diag().mean() - (table.sum() - table.trace()) / 12)
    assert evidence[DEFAULT] > 1.0 and abs(evidence["ccm-merge"]) < 0.5, evidence


def test_every_command_has_the_same_default() -> None:
    for command in (cli.chat.chat, serve, plan_command, plan):
        assert inspect.signature(command).parameters["memory"].default is None


@pytest.mark.slow
def test_the_default_of_the_embedded_model_is_its_adapter(embedded) -> None:
    assert default_memory(embedded[0]) == DEFAULT
