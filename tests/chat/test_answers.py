"""Answers taken apart: thoughts, what is said, calls of tools."""

from __future__ import annotations

import pytest
from test_template import CHATML, THINKING, tokenizer_with

from ccm.chat.answers import Answer, AnswerReader, read_answer
from ccm.chat.messages import Thought, ToolCall
from ccm.chat.template import template_of

THINKS, PLAIN = template_of(tokenizer_with(THINKING)), template_of(tokenizer_with(CHATML))
PARIS = ToolCall("weather", '{"city": "Paris"}')


def pieces(text: str, size: int, tools: bool = False, head: tuple[int, ...] = ()) -> list[str]:
    reader = AnswerReader(THINKS, head, tools)
    found = []
    for at in range(0, len(text), size):
        found += reader.feed(text[at : at + size])
    return [*found, *reader.end()]


@pytest.mark.parametrize("size", [1, 2, 5, 100])
def test_thoughts_stand_apart_however_they_come_in(size):
    text = "<think>\nTwo and two.\n</think>\n\nFour."
    found = pieces(text, size)
    assert "".join(p for p in found if isinstance(p, Thought)).strip() == "Two and two."
    assert "".join(p for p in found if not isinstance(p, Thought)) == "Four."
    assert read_answer(THINKS, (), text) == Answer("Four.", "Two and two.")


def test_a_head_may_have_opened_the_thoughts():
    head = tuple(THINKS.encode("<|im_start|>assistant\n<think>\n"))
    assert read_answer(THINKS, head, "Hm.\n</think>\n\nYes.") == Answer("Yes.", "Hm.")
    closed = tuple(THINKS.encode("<|im_start|>assistant\n<think>\n\n</think>\n\n"))
    assert read_answer(THINKS, closed, "Yes.") == Answer("Yes.", "")


def test_thoughts_that_were_cut_are_no_answer():
    assert read_answer(THINKS, (), "<think>\nOn and on") == Answer("", "On and on")


def test_a_template_without_thoughts_leaves_the_marks_alone():
    assert read_answer(PLAIN, (), "<think> is a tag").content == "<think> is a tag"


@pytest.mark.parametrize(
    "text",
    [
        '<tool_call>\n{"name": "weather", "arguments": {"city": "Paris"}}\n</tool_call>',
        "<tool_call>\n<function=weather>\n<parameter=city>\nParis\n</parameter>\n</function>\n</tool_call>",
        "<tool_call>weather\n<arg_key>city</arg_key>\n<arg_value>Paris</arg_value>\n</tool_call>",
        '[TOOL_CALLS][{"name": "weather", "arguments": {"city": "Paris"}}]',
        '[TOOL_CALLS]weather[ARGS]{"city": "Paris"}',
        '{"name": "weather", "parameters": {"city": "Paris"}}',
        '<|python_tag|>{"name": "weather", "parameters": {"city": "Paris"}}',
    ],
)
def test_calls_are_read_in_the_forms_of_known_models(text):
    assert read_answer(PLAIN, (), text, tools=True) == Answer("", "", (PARIS,))
    assert read_answer(PLAIN, (), text).tool_calls == ()  # nobody offered tools


def test_arguments_can_be_sent_whatever_a_model_spells():
    text = '<tool_call>{"name": "weather", "arguments": {"city": "\\ud800"}}</tool_call>'
    (call,) = read_answer(PLAIN, (), text, tools=True).tool_calls
    assert call.arguments == '{"city": "?"}'


def test_text_before_a_call_and_several_calls():
    one = '<tool_call>{"name": "weather", "arguments": {"city": "Paris"}}</tool_call>'
    answer = read_answer(PLAIN, (), f"Let me see.\n{one}\n{one}", tools=True)
    assert answer == Answer("Let me see.", "", (PARIS, PARIS))


@pytest.mark.parametrize("text", ["<tool_call>{broken</tool_call>", '{"answer": 42}', "[TOOL_CALLS]", "{"])
def test_what_is_no_call_stays_text(text):
    assert read_answer(PLAIN, (), text, tools=True) == Answer(text)


@pytest.mark.parametrize("size", [1, 3, 100])
def test_a_call_is_not_streamed_as_text(size):
    text = 'Let me see.\n<tool_call>{"name": "weather", "arguments": {"city": "Paris"}}</tool_call>'
    assert "".join(pieces(text, size, tools=True)).strip() == "Let me see."
    for plain in ("a < b, so it is", '{"answer": 42} is JSON', "<tool_call> is a tag"):
        assert "".join(pieces(plain, size, tools=True)) == plain
