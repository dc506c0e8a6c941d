"""Turns in a service, for tests."""

from __future__ import annotations

from ccm.chat.messages import Message
from ccm.serving.engine import Sampling

GREEDY = Sampling(max_tokens=10, temperature=0)
WORDS = ["red", "green", "blue", "seven", "eight", "nine", "cats", "dogs", "birds", "sun", "moon", "rain"]


def user(text):
    return [Message("user", text)]


async def say(service, session, text, tenant="t", sampling=GREEDY, **options):
    turn = await service.answer(tenant, session, user(text), sampling, **{"create": True, **options})
    return await turn.finish()
