"""What the clients say: turns of real conversations of people whom no adapter has seen."""

from __future__ import annotations

import random

from ccm.data import load_chitchat

#: Facts that twins differ in, and what both are asked.
FACTS = (
    ("My cat is called {}, and she sleeps all day.", "What is my cat called?", ("Miso", "Pumpkin")),
    ("I work as a {} in a small town near the sea.", "What is my job?", ("nurse", "carpenter")),
    ("My favourite food is {}, I have it each Sunday.", "What do I like to eat?", ("pasta", "fried rice")),
    ("I was born in {} and still have family there.", "Where was I born?", ("Norway", "Brazil")),
    ("On weekends I go {} with two old friends.", "What do I do on weekends?", ("climbing", "dancing")),
    ("My brother plays the {} in a band.", "What does my brother play?", ("drums", "violin")),
    ("I am learning {} because of my new job.", "Which language do I learn?", ("Japanese", "Spanish")),
    ("My car is {} and breaks down every month.", "What colour is my car?", ("green", "yellow")),
)


def conversations(count: int, turns: int) -> list[list[dict[str, str]]]:
    """So many conversations of that many turns as messages, user first."""
    talks = [talk for talk in load_chitchat("test", cap_per_user=None) if len(talk.turns) >= turns]
    chosen = talks[:count]
    return [[{"role": turn.role, "content": turn.text} for turn in talk.turns[:turns]] for talk in chosen]


def long_histories(count: int, turns: int, seed: int) -> list[list[dict[str, str]]]:
    """Histories of so many turns (what a user says and the answer), of several conversations played on end."""
    talks = load_chitchat("test", cap_per_user=None)
    rng, histories = random.Random(seed), []
    for _ in range(count):
        rng.shuffle(talks)
        messages = [
            {"role": turn.role, "content": turn.text}
            for talk in talks
            for turn in talk.turns[: len(talk.turns) // 2 * 2]
        ]
        histories.append(messages[: 2 * turns])
    return histories


def user_turns(seed: int, longest: int = 200) -> list[str]:
    """All turns of users of at most that many characters, shuffled."""
    talks = load_chitchat("test", cap_per_user=None)
    texts = sorted({t.text for talk in talks for t in talk.turns if t.role == "user" and t.text.strip()})
    texts = [text for text in texts if len(text) <= longest]
    random.Random(seed).shuffle(texts)
    return texts


def twins(count: int) -> list[tuple[list[str], str]]:
    """Pairs of facts, and the question that both are asked."""
    chosen = [FACTS[i % len(FACTS)] for i in range(count)]
    return [([fact.format(word) for word in words], question) for fact, question, words in chosen]
