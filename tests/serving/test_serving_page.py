"""docs/serving.md: its Python code is run as it stands against a real server with a tiny model."""

from __future__ import annotations

import contextlib
import io
import re
from pathlib import Path

import pytest
from services import serving, tiny_service
from typer.main import get_command

from ccm import cli
from ccm.serving.api import create_app

PAGE = (Path(__file__).parents[2] / "docs" / "serving.md").read_text()
CHAT, RESPONSES, TOOLS, LANGCHAIN = re.findall(r"```python\n(.*?)```", PAGE, re.DOTALL)


@pytest.fixture(scope="module")
def server(tmp_path_factory):
    with serving(tiny_service(tmp_path_factory.mktemp("store"))) as running:
        yield running


def run(server, *blocks: str) -> tuple[dict, str]:
    """Names that the code leaves behind, and what it printed."""
    names: dict = {}
    with contextlib.redirect_stdout(io.StringIO()) as out:
        for block in blocks:
            code = block.replace("http://localhost:8000", server.url)
            exec(compile(code, "docs/serving.md", "exec"), names)
    return names, out.getvalue()


def test_openai(server):
    names, printed = run(server, CHAT, RESPONSES)
    assert names["answer"].memory["turns"] == 2 and "tokens_folded" in printed
    assert names["again"].memory["session"] != names["other"].memory["session"]
    assert names["response"].memory["turns"] == 4
    turns = names["client"].conversations.items.list("nadia-1", order="asc")
    assert [turn.content[0].text for turn in turns][2] == "Where do I live?"


def test_tools(server):
    names, _ = run(server, CHAT, TOOLS)
    assert names["message"].role == "assistant"


def test_langchain(server):
    pytest.importorskip("langchain_openai", reason="not among our packages; pip install langchain-openai")
    names, _ = run(server, LANGCHAIN)
    history = names["ServerHistory"]("langchain-tom")
    assert [message.type for message in history.messages] == ["human", "ai", "human", "ai"]
    history.clear()
    assert history.messages == []


def test_what_is_named_is_there(server):
    options = {name for command in ("serve", "chat", "key") for name in options_of(command)}
    others = {"--system", "--data-binary", "--frameworks"}  # of useradd, curl and a benchmark
    named = set(re.findall(r"(?<!-)--[a-z][a-z-]*", PAGE)) - others
    assert named <= options, named - options
    metrics = server.service.metrics.text().decode()
    for name in re.findall(r"`(ccm_[a-z_]+)`", PAGE):
        assert f"\n{name}" in metrics or f"# TYPE {name.removesuffix('_total')}" in metrics, name
    paths = {*create_app(server.service).openapi()["paths"], "/openapi.json"}
    for path in re.findall(r"`(?:GET|POST|DELETE) (/[a-zA-Z0-9/_.]*)", PAGE):
        assert path.replace("ID", "{session}") in paths, path


def options_of(command: str) -> list[str]:
    parameters = get_command(cli.app).commands[command].params  # type: ignore[attr-defined]
    return [option for p in parameters for option in (*p.opts, *p.secondary_opts)]
