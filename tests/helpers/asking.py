"""Requests of OpenAI's client, for tests."""

from __future__ import annotations

from services import MODEL


def user(text):
    return [{"role": "user", "content": text}]


def ask(client, text, session=None, messages=None, **options):
    headers = {"X-Session-Id": session} if session else {}
    options = {"model": MODEL, "temperature": 0, "max_tokens": 10, **options}
    return client.chat.completions.create(messages=messages or user(text), extra_headers=headers, **options)


def respond(client, text, **options):
    return client.responses.create(
        **{"model": MODEL, "input": text, "temperature": 0, "max_output_tokens": 10, **options}
    )
