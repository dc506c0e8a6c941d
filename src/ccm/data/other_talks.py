"""Conversations that tasks of BIG-bench are made of: films, errands with an assistant, and everyday dialogs."""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterator
from functools import lru_cache
from typing import Any

from .carriers import BIGBENCH, ERRANDS, FILM_TALKS, TIME_DIAL
from .conversation import SPLITS, Conversation, Split, alternating, split_of, unit
from .conversational import ConversationSource
from .sources import register_source

#: Examples of one film follow each other: so many of them are in one split, and so many make a scene.
_BLOCK, _SCENE = 200, 20
_PAIR = re.compile(r'were the sentences "(.*)" and "(.*)" *$')
_QUOTED = re.compile(r'(user|response): "(.*?)"\.(?= |$)')


def _films(examples: list[dict[str, Any]]) -> Iterator[tuple[str, Conversation]]:
    """Scenes of films.

    An example is a short exchange, and says of two sentences in it whether one person spoke them. Who speaks the
    others is guessed: after a question somebody else does, and after half of all other sentences.
    """
    for start in range(0, len(examples), _SCENE):
        said: list[str] = []
        for example in examples[start : start + _SCENE]:
            text, _, question = example["input"].partition(" ----- ")
            pair = _PAIR.search(question)
            same = example["target_scores"]["same"] == 1
            sentences = re.split(r"(?<=[.?!]) +(?=[\"'A-Z])", text.strip())
            for k, sentence in enumerate(sentences):
                before = sentences[k - 1] if k else ""
                if pair and k and pair[1].strip().endswith(before) and pair[2].strip().startswith(sentence):
                    goes_on = same
                else:
                    goes_on = bool(k) and before[-1:] != "?" and unit(f"{before} {sentence}") < 0.5
                if goes_on:
                    said[-1] += f" {sentence}"
                elif sentence:
                    said.append(sentence)
        yield f"film {start // _BLOCK}", Conversation(f"scene {start // _SCENE}", (), alternating(said))


def _errands(examples: list[dict[str, Any]]) -> Iterator[tuple[str, Conversation]]:
    """Dialogs with an assistant that books and looks up, each up to one of its answers."""
    for example in examples:
        _, _, talk = example["input"].partition("The conversation so far has been for following:")
        found = _QUOTED.findall(talk)
        wanted = ["response" if k % 2 else "user" for k in range(len(found))]
        if found and [who for who, _ in found] == wanted:
            said = [text.strip() for _, text in found]
            if len(said) % 2:
                said.append(example["target"].strip())
            if all(said):
                yield said[0], Conversation(example["comment"], (), alternating(said))


def _everyday(examples: list[dict[str, Any]]) -> Iterator[tuple[str, Conversation]]:
    """Dialogs that lack one time span each, with the right one in its place; each dialog once."""
    seen = set()
    for example in examples:
        scores: dict[str, float] = example["target_scores"]
        right = max(scores, key=lambda text: scores[text]).strip()
        talk = example["input"].partition("Context:")[2].replace("<MASK>", right)
        said = [" ".join(text.split()) for text in re.split(r"(?m)^\s*[AB]\s*:", talk)]
        said = [text for text in said if text]
        begin = "".join(re.findall(r"[a-z]+", " ".join(said[:2]).lower()))
        if begin not in seen:
            seen.add(begin)
            yield begin, Conversation(f"dialog {len(seen)}", (), alternating(said))


@lru_cache(maxsize=3)
def load_talks(member: str) -> dict[Split, list[Conversation]]:
    """The conversations of one of the tasks, split by film or by text: 8 in 10 train, 1 validation, 1 test.

    Raises:
        DataError, MissingPackageError, StorageError: the package cannot be fetched, or is not as expected.
    """
    splits: dict[Split, list[Conversation]] = {split: [] for split in SPLITS}
    with BIGBENCH.reading() as folder:
        for key, talk in _READERS[member](json.loads((folder / member).read_bytes())["examples"]):
            splits[split_of(key)].append(talk)
    return splits


_READERS: dict[str, Callable[[list[dict[str, Any]]], Iterator[tuple[str, Conversation]]]] = {
    FILM_TALKS: _films,
    ERRANDS: _errands,
    TIME_DIAL: _everyday,
}


class _Talks(ConversationSource):
    """Conversations of one task."""

    archives = (BIGBENCH,)
    origin = str(BIGBENCH)
    member = ""

    def conversations(self, split: Split) -> list[Conversation]:
        return load_talks(self.member)[split]


@register_source
class FilmTalks(_Talks):
    """Scenes of films; who speaks is known of some sentences and guessed of the others.

    Args:
        turns, facts, echoes, limit, formats: see :class:`~ccm.data.conversational.ConversationSource`.
    """

    name, title = "film-dialogs", "Scenes of films (Cornell Movie-Dialogs, from a task about speakers)"
    size = "50,000 exchanges in 2,500 scenes, 12 MB of text"
    licence, member = "upstream, for research", FILM_TALKS


@register_source
class Errands(_Talks):
    """Dialogs with an assistant that books, searches and pays.

    Args:
        turns, facts, echoes, limit, formats: see :class:`~ccm.data.conversational.ConversationSource`.
    """

    name, title = "errands", "Dialogs with an assistant that books and searches (Schema-Guided Dialogue)"
    size = "1,000 dialogs of up to 40 turns"
    licence, member = "upstream, CC BY-SA 4.0", ERRANDS


@register_source
class Everyday(_Talks):
    """Everyday dialogs of two people, each of them about a time span.

    Args:
        turns, facts, echoes, limit, formats: see :class:`~ccm.data.conversational.ConversationSource`.
    """

    name, title = "time-dial", "Everyday dialogs (TimeDial, from DailyDialog)"
    size = "about 1,100 dialogs"
    licence, member = "upstream, CC BY-NC-SA 4.0", TIME_DIAL
