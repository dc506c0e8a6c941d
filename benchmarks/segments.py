"""How long a segment may be: 32, 64 and 128 tokens, at equal bytes and at equal reach.

Held-out small talk, its turns joined to messages of the length that people and assistants write: a short one by the
user, then 150 to 300 tokens by the assistant, some 3,300 tokens a conversation. Some of the user's messages hold a
planted fact. Every memory has room for the same 256 slots beside 4 sink and 64 recent tokens, as in ``ccm chat``;
what differs is how many tokens share the slots of a segment. Two figures:

* recovered share of the user's messages from the third exchange on (those without a fact);
* accuracy and evidence for each fact, as in ``reach.py``, by its distance in tokens.

The model runs in bfloat16; bytes are those of a memory in fp32.

    python benchmarks/segments.py
"""

from __future__ import annotations

import random
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from common import parser, store
from reach import answers, interval
from rich.progress import track

import ccm
from ccm.chat.turns import RenderedTurn, render
from ccm.core.memory import Memory
from ccm.data import load_chitchat
from ccm.data.facts import Fact, draw_facts
from ccm.evaluation.share import Nll, bootstrap_share, recovered_share, turn_nll
from ccm.methods import Method, Run, as_method
from ccm.methods.compressed import shared_compressor
from ccm.methods.default import CHAT

TOKENS = 3200
DISTANCES = (200, 500, 900, 1300, 2000, 2700)
#: Room for 256 slots each: tokens of a segment, its slots, blocks kept apart.
MEMORIES = {
    "32 tokens, 4 slots": (32, 4, 64),
    "64 tokens, 4 slots": (64, 4, 64),
    "32 tokens, 2 slots": (32, 2, 128),
    "128 tokens, 4 slots": (128, 4, 64),
    "64 tokens, 2 slots": (64, 2, 128),
    "32 tokens, 1 slot": (32, 1, 256),
}
FIRST = 4  # message from which on the user's are targets


@dataclass
class Talk:
    """One conversation.

    Attributes:
        messages: rendered, the user's and the assistant's in turn.
        facts: by distance.
        told: messages that hold a fact.
        away: tokens behind the message that holds it, by distance.
    """

    messages: list[RenderedTurn]
    facts: dict[int, Fact] = field(default_factory=dict)
    told: set[int] = field(default_factory=set)
    away: dict[int, int] = field(default_factory=dict)

    def targets(self) -> list[int]:
        return [i for i in range(FIRST, len(self.messages), 2) if i not in self.told]


def joined(texts: list[str], tokenizer: Any, least: int) -> list[str]:
    """The next turns, taken off the list, that together have at least so many tokens."""
    taken: list[str] = []
    while texts and len(tokenizer.encode("\n".join(taken), add_special_tokens=False)) < least:
        taken.append(texts.pop(0))
    return taken


def talk_of(texts: list[str], tokenizer: Any, number: int) -> Talk:
    """A conversation out of the next turns, with a fact at each distance."""
    rng = random.Random(number)
    parts: list[list[str]] = []
    lengths: list[int] = []
    while sum(lengths) < TOKENS:
        for role, least in (("user", 40), ("assistant", rng.randint(150, 250))):
            parts.append(joined(texts, tokenizer, least))
            lengths.append(len(render(tokenizer, role, "\n".join(parts[-1])).ids))
    facts = dict(zip(DISTANCES, draw_facts(rng, "test", len(DISTANCES)), strict=True))
    talk = Talk([], facts)
    place = len(parts)
    for distance, fact in facts.items():
        place = max(i for i in range(0, place, 2) if sum(lengths[i + 1 :]) >= distance)
        talk.told.add(place)
        talk.away[distance] = sum(lengths[place + 1 :])
        parts[place].insert(1, fact.statement)
    talk.messages = [
        render(tokenizer, ("user", "assistant")[i % 2], "\n".join(part)) for i, part in enumerate(parts)
    ]
    return talk


def batch(rows: Sequence[Sequence[int]]) -> tuple[torch.Tensor, torch.Tensor]:
    """Ids and mask, padded at the right."""
    width = max(map(len, rows))
    ids = torch.tensor([[*row, *[0] * (width - len(row))] for row in rows])
    mask = torch.tensor([[1] * len(row) + [0] * (width - len(row)) for row in rows])
    return ids, mask


def live(method: Method, talks: list[Talk], name: str) -> tuple[list[list[float]], Memory]:
    """All conversations message by message: the NLL of each one's targets, and the memories at the end."""
    memories = [method.empty() for _ in talks]
    nll: list[list[float]] = [[] for _ in talks]
    for i in track(range(max(len(talk.messages) for talk in talks)), name):
        scored = [k for k, talk in enumerate(talks) if i in talk.targets()]
        if scored:
            turns = [talks[k].messages[i] for k in scored]
            ids, mask = batch([turn.ids for turn in turns])
            logits = method.reader.logits(ids, Memory.stack([memories[k] for k in scored]), mask)
            for k, turn, row in zip(scored, turns, logits, strict=True):
                nll[k].append(turn_nll(row[: len(turn.ids)], turn.ids, turn.content)[0])
        for start in range(0, 400, method.longest):
            rows = [k for k, talk in enumerate(talks) if i < len(talk.messages)]
            rows = [k for k in rows if start < len(talks[k].messages[i].ids)]
            if not rows:
                break
            ids, mask = batch([talks[k].messages[i].ids[start : start + method.longest] for k in rows])
            new = method.fold(Memory.stack([memories[k] for k in rows]), ids, mask)
            for place, k in enumerate(rows):
                memories[k] = new[place]
    return nll, Memory.stack(memories)


def full_nll(reader: ccm.Compressor, talk: Talk) -> float:
    """Of the targets, behind all that was said before them, in one pass."""
    ids = torch.tensor([sum((turn.ids for turn in talk.messages), ())])
    hidden, total = reader.model.base_model(ids, use_cache=False).last_hidden_state[0], 0.0
    for i in talk.targets():
        start, turn = sum(len(t.ids) for t in talk.messages[:i]), talk.messages[i]
        logits = reader.head(hidden[start : start + len(turn.ids)])
        total += turn_nll(logits, turn.ids, turn.content)[0]
    return total


@torch.inference_mode()
def main() -> None:
    options = parser(__doc__.splitlines()[0])
    arguments = options.parse_args()
    torch.set_num_threads(arguments.threads)
    model, tokenizer = ccm.load_default_model(dtype=torch.bfloat16)
    texts = [
        turn.text
        for split in ("test", "validation")
        for talk in load_chitchat(split, cap_per_user=None)
        if len(talk.turns) >= 40
        for turn in talk.turns
        if len(tokenizer.encode(turn.text)) <= 100
    ]
    talks = [talk_of(texts, tokenizer, number) for number in range(arguments.limit or 8)]
    right: dict[tuple[str, int], list[float]] = defaultdict(list)
    evidence: dict[tuple[str, int], list[float]] = defaultdict(list)
    nll: dict[str, Nll] = {}
    held: dict[str, dict[str, Any]] = {}
    counts = tuple(
        sum(t.messages[i].content[1] - t.messages[i].content[0] for i in t.targets()) for t in talks
    )
    reader = shared_compressor(model, "ccm-chat")
    bytes_per_token = 2 * reader.kv_bytes_per_token()  # in fp32
    alone = []
    for talk in talks:
        turns = [talk.messages[i] for i in talk.targets()]
        ids, mask = batch([turn.ids for turn in turns])
        out = reader.logits(ids, None, mask)
        alone.append(
            sum(turn_nll(row[: len(t.ids)], t.ids, t.content)[0] for t, row in zip(turns, out, strict=True))
        )
    nll["none"] = Nll(tuple(alone), counts)
    nothing = ccm.get_method("full").open(model, tokenizer)  # the question is then its only context
    without = [{d: answers(nothing, tokenizer, f) for d, f in talk.facts.items()} for talk in talks]

    def ask(name: str, run: Any, k: int) -> None:
        for distance, fact in talks[k].facts.items():
            gain = answers(run, tokenizer, fact) - without[k][distance]
            true = fact.candidates.index(fact.value)
            others = torch.cat([gain[:true], gain[true + 1 :]])
            right[name, distance].append(float(int(gain.argmax()) == true))
            evidence[name, distance].append(float(gain[true] - others.mean()))

    nll["full"] = Nll(tuple(full_nll(reader, talk) for talk in track(talks, "full context")), counts)
    for name, (segment, slots, blocks) in MEMORIES.items():
        compressor = shared_compressor(model, "ccm-chat", rule_options={"blocks": blocks})
        method = as_method(compressor, slots=slots, segment=segment, **CHAT)
        scored, memory = live(method, talks, name)
        nll[name] = Nll(tuple(map(sum, scored)), counts)
        for k in range(len(talks)):
            run = Run(method)
            run.held = memory[k]
            ask(name, run, k)
        held[name] = {
            "segment": segment,
            "slots_a_segment": slots,
            "blocks": blocks,
            "segments_folded": round(sum(row.steps for row in memory.rows) / len(talks), 1),
            "kv_bytes": round(sum(row.length for row in memory.rows) / len(talks)) * bytes_per_token,
        }
        store("segments", report(talks, nll, held, right, evidence), "bfloat16")


def report(
    talks: list[Talk],
    nll: dict[str, Nll],
    held: dict[str, dict[str, Any]],
    right: dict[tuple[str, int], list[float]],
    evidence: dict[tuple[str, int], list[float]],
) -> dict[str, Any]:
    none, full, now = nll["none"], nll["full"], nll[next(iter(MEMORIES))]
    methods = {
        name: {
            **held.get(name, {}),
            "nll": round(score.mean, 4),
            "recovered_share": round(recovered_share(none.mean, full.mean, score.mean), 4),
            "share_ci": [round(x, 4) for x in bootstrap_share(none, full, score)],
            "nll_above_the_first_memory": _paired(score, now),
        }
        for name, score in nll.items()
    }
    rows = [
        {
            "method": name,
            "distance": distance,
            "accuracy": round(sum(right[name, distance]) / len(talks), 3),
            "evidence": round(sum(evidence[name, distance]) / len(talks), 3),
            "evidence_ci": interval(evidence[name, distance]),
            "n": len(talks),
        }
        for name in nll
        if name in held
        for distance in DISTANCES
    ]
    return {
        "task": "planted facts and user's turns in conversations of long messages (joined small talk)",
        "conversations": len(talks),
        "tokens": round(sum(len(m.ids) for t in talks for m in t.messages) / len(talks)),
        "target_tokens": sum(none.tokens),
        "mean_tokens_behind_the_fact": {
            d: round(sum(talk.away[d] for talk in talks) / len(talks)) for d in DISTANCES
        },
        "methods": methods,
        "rows": rows,
    }


def _paired(score: Nll, other: Nll) -> dict[str, Any]:
    """By how many nats a token a memory is worse than another one on the same conversations."""
    each = [(a - b) / n for a, b, n in zip(score.total, other.total, score.tokens, strict=True)]
    return {"mean": round(sum(each) / len(each), 4), "ci": interval(each)}


if __name__ == "__main__":
    main()
