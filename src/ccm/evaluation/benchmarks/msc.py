"""Multi-session chat: the next turn of two people who meet again (Xu et al., ACL 2022).

Paper: https://arxiv.org/abs/2107.07567. Data: of ParlAI (https://github.com/facebookresearch/ParlAI, MIT),
http://parl.ai/downloads/msc/msc_v0.1.tar.gz. The archive has ``msc/msc_dialogue/session_2`` to ``session_5``, each
with ``train.txt`` (to session 4), ``valid.txt`` and ``test.txt``. A line is::

    {"personas": [["…", …], ["…", …]],
     "dialog": [{"id": "Speaker 1", "text": "…"}, {"id": "Speaker 2", "text": "…"}, …],
     "metadata": {"initial_data_id": "…", "session_id": 4},
     "previous_dialogs": [{"dialog": [{"text": "…"}, …], "time_num": 7, "time_unit": "days", …}, …],
     "init_personas": […]}

The paper's automatic measure is the perplexity of the turns of a session, behind all sessions before it. The words
of every model are its own, so perplexities compare methods on one model, not models.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

from ...chat.turns import RenderedTurn, render_dialogue
from ..items import Ids, Item, Likelihood
from .base import Benchmark, register_benchmark
from .layout import Record, find, records
from .pieces import even

#: The speakers of a dialogue in turn, as a chat template has them.
_ROLES = ("user", "assistant")


@register_benchmark("msc")
@dataclass(frozen=True, kw_only=True)
class MultiSessionChat(Benchmark):
    """Each line is an item: earlier sessions are folded turn by turn, then every turn of the last one is foreseen."""

    title = "The next turn of people who meet again (multi-session chat)"
    metrics: ClassVar[tuple[str, ...]] = ("nll",)
    paper = "Xu et al., ACL 2022, https://arxiv.org/abs/2107.07567"
    licence, origin = "upstream, ParlAI", "parl.ai/downloads/msc"
    file = "session_2/test.txt to session_5/test.txt"
    source = "and unpack http://parl.ai/downloads/msc/msc_v0.1.tar.gz"

    @classmethod
    def files(cls, data: Path) -> dict[str, list[Path]]:
        if data.is_file():
            return {cls.key: [data]}
        return {cls.key: find(data, ["session_[2-5]/test.txt", "session_[2-5]/valid.txt"], cls.source)}

    @property
    def scored(self) -> str:
        return "perplexity of the turns of a session, as in the paper, in tokens of the model at hand"

    def items(self, tokenizer: Any, limit: int) -> Iterator[Item]:
        files = [list(records(path)) for path in self.paths()]
        longest = max(map(len, files))
        some = [file[k] for k in range(longest) for file in files if k < len(file)]  # a line of each in turn
        for record in some[:limit]:
            yield _item(record, tokenizer)


def _item(record: Record, tokenizer: Any) -> Item:
    earlier = record.objects("previous_dialogs")
    if not earlier:
        raise record.wrong("previous_dialogs", "at least one dialogue")
    about = record.object("metadata")
    session = len(earlier) + 1
    said = [turn for dialogue in _sessions([*earlier, record]) for turn in dialogue]
    rendered = render_dialogue(tokenizer, said)
    last = len(record.many("dialog"))
    segments: list[Ids] = []
    queries: dict[int, tuple[Likelihood, ...]] = {}
    for k, turn in enumerate(rendered):
        if k >= len(rendered) - last:
            queries[len(segments)] = (_query(turn, f"session {session}"),)
        segments += even(turn)
    kept = tuple(segments[: max(queries)])
    return Item(f"session {session} {about.text('initial_data_id')}", kept, queries, once=True)


def _query(turn: RenderedTurn, tag: str) -> Likelihood:
    return Likelihood(turn.ids, turn.content, tag)


def _sessions(dialogues: list[Record]) -> Iterator[list[tuple[str, str]]]:
    """Turns (role, text) of every session; the first of a later one begins with the time since the last."""
    gap = ""
    for dialogue in dialogues:
        turns = []
        for k, turn in enumerate(dialogue.objects("dialog")):
            turns.append((_ROLES[k % 2], f"{gap}{turn.text('text')}"))
            gap = ""
        if not turns:
            raise dialogue.wrong("dialog", "at least one turn")
        yield turns
        if "time_num" in dialogue:
            gap = f"[{dialogue.text('time_num')} {dialogue.text('time_unit')} later] "
