from __future__ import annotations

from collections import Counter

import pytest

from ccm.data import Conversation, Turn, load_chitchat
from ccm.data.chitchat import SPLITS, _conversation, assign_users
from ccm.errors import ConfigError, DataError, MissingPackageError, StorageError, UnknownNameError


@pytest.fixture(scope="module")
def splits() -> dict[str, list[Conversation]]:
    try:
        return {split: load_chitchat(split) for split in SPLITS}
    except (DataError, MissingPackageError, StorageError) as error:
        pytest.skip(f"the conversation data cannot be fetched here: {error}")


def people(talks: list[Conversation]) -> set[str]:
    return {user for talk in talks for user in talk.users}


def test_no_user_in_two_splits(splits):
    for cap in (8, None):
        train, validation, test = (people(load_chitchat(split, cap_per_user=cap)) for split in SPLITS)
        assert not train & validation and not train & test and not validation & test


def test_sizes(splits):
    assert {split: len(talks) for split, talks in splits.items()} == {
        "train": 570,
        "validation": 50,
        "test": 94,
    }
    assert sum(len(talk.turns) >= 10 for talk in splits["test"]) >= 80
    assert sum(len(talk.turns) >= 10 for talk in splits["validation"]) >= 40


def test_roles_alternate_and_texts_are_not_empty(splits):
    for talk in (talk for talks in splits.values() for talk in talks):
        assert len(talk.turns) >= 8 and talk.users[0] != talk.users[1]
        assert [turn.role for turn in talk.turns] == (["user", "assistant"] * len(talk.turns))[
            : len(talk.turns)
        ]
        assert all(turn.text and turn.text == turn.text.strip() for turn in talk.turns)


def test_order_is_the_same_everywhere(splits):
    assert splits["test"][0].id == "ecc84f1b-8d36-483a-9018-54186a9390ec"
    assert load_chitchat("test") == splits["test"]
    shorter = [talk.id for talk in load_chitchat("test", cap_per_user=None)]
    assert [talk.id for talk in splits["test"]] == [i for i in shorter if i in {t.id for t in splits["test"]}]


def test_cap_is_respected(splits):
    for split in SPLITS:
        for cap in (1, 8):
            count = Counter(user for talk in load_chitchat(split, cap_per_user=cap) for user in talk.users)
            assert max(count.values()) == cap


def test_messages_are_merged():
    def message(sender: str, text: str) -> dict[str, str]:
        return {"sender": sender, "text": text, "timestamp": ""}

    record = {
        "messages": [
            [message("a", " hi "), message("a", "")],
            [message("a", "there")],
            [message("b", "   ")],
            [message("a", "?"), message("b", "hello")],
        ]
    }
    assert _conversation("x", record) == Conversation(
        "x", ("a", "b"), (Turn("user", "hi\nthere\n?"), Turn("assistant", "hello"))
    )
    assert _conversation("x", {"messages": [[message("a", "hi")], [message("b", " ")]]}) is None


def test_light_users_follow_their_partners():
    talks = [Conversation(f"{i}", ("regular", f"light {i}"), ()) for i in range(6)]
    home = assign_users(talks)
    assert set(home) == people(talks) and len(set(home.values())) == 1


def test_wrong_arguments():
    with pytest.raises(
        UnknownNameError, match="unknown split 'dev': expected one of test, train, validation"
    ):
        load_chitchat("dev")
    with pytest.raises(ConfigError, match="cap_per_user is 0: expected at least 1"):
        load_chitchat("train", cap_per_user=0)
