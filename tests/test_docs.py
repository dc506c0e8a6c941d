"""README and documentation: every block of code is run, or read by what it is written for."""

from __future__ import annotations

import configparser
import contextlib
import io
import json
import re
import shlex
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import yaml
from documented import BLOCKS, DOCS, NOT_RUN, PAGES, ROOT, blocks, commands, of_ccm
from services import Running, serving, tiny_service
from tiny import tiny_model, tiny_tokenizer
from typer.main import get_command

import ccm
from ccm.cli import app, main
from ccm.files.adapter_folder import shipped_adapters
from ccm.methods import list_methods
from ccm.methods.default import TALKING, checked
from ccm.serving.api import create_app
from ccm.training import load_recipe

TOKENIZER = tiny_tokenizer()


def test_every_block_says_what_it_is() -> None:
    known = {"python", "sh", "console", "yaml", "json", "toml", "ini", *NOT_RUN}
    assert {(block.page, block.language) for block in BLOCKS if block.language not in known} == set()
    assert len(BLOCKS) > 50
    for block in blocks("text"):
        assert not re.search(
            r"^(\$ |ccm |pip |make |import )", block.code, re.MULTILINE
        ) or block.page.endswith("command-line.md"), f"{block.page}: a command in a block of text"


# ---------------------------------------------------------------------- Python


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Running]:
    with serving(tiny_service(tmp_path_factory.mktemp("store"))) as running:
        yield running


@pytest.fixture
def tiny(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A tiny model wherever a page loads one, and an empty folder to be in."""
    model = tiny_model(vocab_size=len(TOKENIZER), max_position_embeddings=1024)
    for name in ("load_default_model", "load_model"):
        monkeypatch.setattr(ccm, name, lambda *_, **__: (model, TOKENIZER))
    monkeypatch.chdir(tmp_path)


def run(server: Running | None, *code: str, **names: Any) -> tuple[dict[str, Any], str]:
    """Names that the code leaves behind, and what it printed."""
    with contextlib.redirect_stdout(io.StringIO()) as out:
        for block in code:
            there = block if server is None else block.replace("http://localhost:8000", server.url)
            exec(compile(there, "documentation", "exec"), names)
    return names, out.getvalue()


#: Pages whose code needs more than a model, and the test that runs it.
ELSEWHERE = {
    "docs/extending.md": "tests/test_extending.py",
    "docs/clients.md": "test_the_clients",
    "docs/scaling.md": "test_a_memory_asked_of_vllm",
}


@pytest.mark.parametrize("page", sorted({block.page for block in blocks("python")} - ELSEWHERE.keys()))
def test_python_runs(page: str, tiny: None) -> None:
    _, printed = run(None, *(block.code for block in blocks("python") if block.page == page))
    assert printed


def python_of(page: str) -> list[str]:
    return [block.code for block in blocks("python") if block.page == page]


def test_the_clients(server: Running) -> None:
    chat, responses, tools, *frameworks = python_of("docs/clients.md")
    names, printed = run(server, chat, responses, tools)
    assert names["answer"].memory["turns"] == 2 and "tokens_folded" in printed
    assert names["again"].memory["session"] != names["other"].memory["session"]
    assert names["response"].memory["turns"] == 4
    assert names["message"].role == "assistant"
    turns = names["client"].conversations.items.list("nadia-1", order="asc")
    assert [turn.content[0].text for turn in turns][2] == "Where do I live?"
    assert all(re.search(r"^from lang(chain|graph)", code, re.MULTILINE) for code in frameworks)


def test_langchain(server: Running) -> None:
    pytest.importorskip("langchain_openai", reason="not among our packages; pip install langchain-openai")
    (code,) = (code for code in python_of("docs/clients.md") if "BaseChatMessageHistory" in code)
    names, _ = run(server, code)
    history = names["ServerHistory"]("langchain-tom")
    assert [message.type for message in history.messages] == ["human", "ai", "human", "ai"]
    history.clear()
    assert history.messages == []


def test_langgraph(server: Running) -> None:
    pytest.importorskip("langgraph", reason="not among our packages; pip install langgraph langchain-openai")
    (code,) = (code for code in python_of("docs/clients.md") if "StateGraph" in code)
    names, printed = run(server, code)
    assert len(names["said"]["messages"]) == 2 and printed


def test_a_memory_asked_of_vllm() -> None:
    names, _ = run(None, *python_of("docs/scaling.md"), prompt_ids=[5, 6])
    assert len(names["body"]["prompt"]) == names["reference"].length + 2


# ---------------------------------------------------------------------- commands


COMMANDS = of_ccm()
PARSER: Any = get_command(app)


def test_every_command_is_understood(monkeypatch: pytest.MonkeyPatch) -> None:
    """Its options are there, its values have their types, and a memory that is named is one."""
    assert len(COMMANDS) > 40
    here = {*list_methods(), *shipped_adapters()}
    for page, words in COMMANDS:
        command = PARSER
        while hasattr(command, "commands"):
            assert words and words[0] in command.commands, f"{page}: ccm {' '.join(words)}"
            command, words = command.commands[words[0]], words[1:]
        with monkeypatch.context() as patch:  # files that a page names are not here
            patch.setattr("ccm.hub.is_folder", lambda *_: True)
            patch.setattr(Path, "is_file", lambda path: True)
            patch.setattr("ccm.cli.options.format_of", lambda path: "ccm-memory/1")
            context = command.make_context(command.name, list(words))
        memory = context.params.get("memory")
        if memory and memory.partition(":")[0] in here:
            checked(memory)


def test_recipes_take_the_overrides(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for page, words in COMMANDS:
        if words[0] == "train" and words[1].startswith("recipes/"):
            overrides = [word for word in words[2:] if re.fullmatch(r"[\w.]+=\S+", word)]
            assert load_recipe(ROOT / words[1], overrides), page


def test_other_programs_find_what_they_name(server: Running) -> None:
    targets = set(re.findall(r"^([\w-]+):", (ROOT / "Makefile").read_text(), re.MULTILINE))
    project = (ROOT / "pyproject.toml").read_text()
    extras = set(re.findall(r"^(\w+) = \[", project.partition("optional-dependencies]")[2], re.MULTILINE))
    for page, words in commands():
        if words[0] == "make":
            named = {word for word in words[1:] if "=" not in word}
            assert named <= targets, f"{page}: make {' '.join(named - targets)}"
        for word in words:
            if word.startswith(("benchmarks/", "recipes/", "examples/", "tools/")):
                assert (ROOT / word.rstrip(".,")).exists(), f"{page}: {word}"
            for asked in re.findall(r"compressed-context-memory\[([\w,]+)\]", word):
                assert set(asked.split(",")) <= extras, f"{page}: {word}"
    paths = [re.sub(r"\{\w+\}", "[^/]+", path) for path in create_app(server.service).openapi()["paths"]]
    for page, words in commands():
        for url in (word for word in words if words[0] == "curl" and word.startswith("http")):
            path = re.sub(r"^https?://[^/]+|\?.*", "", url)
            assert any(re.fullmatch(known, path) for known in paths), f"{page}: {url}"


def test_what_is_named_is_there(server: Running) -> None:
    """Options, metrics and paths of the server in running text."""
    options = {
        o
        for command in (
            *map(PARSER.commands.get, ("serve", "chat", "key")),
            *PARSER.commands["memory"].commands.values(),
        )
        for p in command.params
        for o in (*p.opts, *p.secondary_opts)
    }
    others = {"--system", "--data-binary", "--frameworks"}  # of useradd, curl and a benchmark
    text = "".join(PAGES[f"docs/{name}.md"] for name in ("serving", "clients", "deployment"))
    named = set(re.findall(r"(?<![-\w])--[a-z][a-z-]*", text)) - others
    assert named <= options, named - options
    metrics = server.service.metrics.text().decode()
    for name in re.findall(r"`(ccm_[a-z_]+)`", text):
        assert f"\n{name}" in metrics or f"# TYPE {name.removesuffix('_total')}" in metrics, name
    paths = {*create_app(server.service).openapi()["paths"], "/openapi.json"}
    for path in re.findall(r"`(?:GET|POST|DELETE) (/[a-zA-Z0-9/_.]*)", text):
        assert path.replace("ID", "{session}") in paths, path


#: Pages whose commands are for the embedded model, so that all of them can be run.
TRIED = ("README.md", "docs/start.md", "docs/choose.md")


@pytest.mark.slow
@pytest.mark.timeout(1800)
@pytest.mark.parametrize("line", sorted({shlex.join(words) for page, words in COMMANDS if page in TRIED}))
def test_what_a_newcomer_types_works(
    line: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    words = shlex.split(line)
    if words[0] == "serve":
        pytest.skip("tests/cli/test_serve.py starts it")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("sys.stdin", io.StringIO("Hello, I am Nadia.\n/quit\n"))
    assert main(words) == 0
    assert capsys.readouterr().out.strip()


@pytest.mark.slow
@pytest.mark.parametrize("page", ["README.md", "docs/start.md"])
def test_the_first_lines_of_python_work(page: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    _, printed = run(None, *python_of(page))
    assert "tokens_folded" in printed


# ---------------------------------------------------------------------- data and settings


def test_data_and_settings_can_be_read() -> None:
    for block in blocks("yaml"):
        assert yaml.safe_load(block.code), block.page
    for block in blocks("json"):
        assert [json.loads(line) for line in block.code.splitlines() if line], block.page
    for block in blocks("ini"):
        unit = configparser.ConfigParser(strict=False)
        unit.optionxform = str  # type: ignore[assignment,method-assign]
        unit.read_string(block.code)
        words = shlex.split(unit["Service"]["ExecStart"])
        assert words[0].endswith("/ccm")
        PARSER.commands[words[1]].make_context(words[1], words[2:])
    for block in blocks("toml"):
        assert re.fullmatch(r"(?:\[[\w.\"-]+\]|[\w-]+ = \"[^\"]+\"|\s)+", block.code), block.page


# ---------------------------------------------------------------------- pages as a whole


def test_the_pages_that_are_made_are_new() -> None:
    sys.path.insert(0, str(ROOT / "tools"))
    try:
        import pages
    finally:
        sys.path.remove(str(ROOT / "tools"))
    for name, text in pages.pages().items():
        assert (DOCS / name).read_text() == text, f"docs/{name} is old: run python tools/pages.py"


def test_every_picture_is_shown_and_every_page_is_in_the_menu() -> None:
    shown = {name for text in PAGES.values() for name in re.findall(r"!\[[^\]]*\]\(([^)]+)\)", text)}
    for path in (DOCS / "figures").iterdir():
        assert any(name.endswith(f"figures/{path.name}") for name in shown), f"{path.name}: nobody shows it"
    menu = (ROOT / "mkdocs.yml").read_text()
    for path in DOCS.rglob("*.md"):
        assert path.relative_to(DOCS).as_posix() in menu, path.name


def test_the_readme_is_short_and_its_links_lead_somewhere() -> None:
    text = PAGES["README.md"]
    assert len(text) <= 5_000
    for link in re.findall(r"\]\(([^)#]+)(?:#[^)]*)?\)", text):
        assert link.startswith("https://") or (ROOT / link).exists(), link


def test_the_figures_of_the_readme_are_those_that_are_stored() -> None:
    quality = json.loads((ROOT / "results" / "quality.json").read_text())["methods"]
    rows = {
        "no context": "none",
        "window of the same bytes": "window of the same bytes as ccm-chat, 4 slots a turn",
        "**memory** (`ccm-chat`, 4 slots a turn)": "ccm-chat, 4 slots a turn",
        "full context": "full",
    }
    for title, name in rows.items():
        found = quality[name]
        held, perplexity = f"{found['kv_bytes'] / 1e6:.2f} MB", f"{found['perplexity']:.1f}"
        (line,) = (line for line in PAGES["README.md"].splitlines() if line.startswith(f"| {title} |"))
        assert f"| {title} | {held} | {perplexity} |" in line
        if name not in ("none", "full"):
            low, high = found["share_ci"]
            said = line.replace("*", "")
            assert f"| {found['recovered_share']:.3f} ({low:.2f} to {high:.2f}) |" in said
    text = " ".join(PAGES["README.md"].split())
    bounded = json.loads((ROOT / "results" / "growth.json").read_text())["rows"][-1]
    assert f"holds {bounded['nbytes_after_all'] / 1e6:.1f} MB" in text
    assert f"full context {bounded['full_context_nbytes'] / 1e6:,.0f} MB" in text
    seconds = json.loads((ROOT / "results" / "serving" / "first_token.json").read_text())["seconds"]
    for name in ("late", "stateless"):
        assert f"{seconds[name]['median']:.2f} s" in text
    opening = json.loads((ROOT / "results" / "opening.json").read_text())["memories"][TALKING]
    assert len(opening["facts"]) == 10
    lines = [f"| facts named, of ten | {' | '.join(opening['right'])} |", "|---|---|---|---|"]
    for way, said in (("none", "nothing"), ("memory", "**`ccm chat`**"), ("full", "the full context")):
        cells = [str(counted[way]) for counted in opening["right"].values()]
        if way != "none":
            bytes_held = [held[way] for held in opening["kv_bytes"].values()]
            cells = [f"{n} in {size / 1e6:.1f} MB" for n, size in zip(cells, bytes_held, strict=True)]
        lines.append(f"| {said} | {' | '.join(cells)} |")
    assert "\n".join(lines) in PAGES["README.md"]
    chat = (DOCS / "chat.md").read_text()
    alone, later, together = opening["right"].values()
    for words in (
        f"names {alone['memory']} of them at once and {later['memory']} after four exchanges",
        f"full context {alone['full']} and {later['full']}.",
        f"{together['memory']} from its memory and {together['full']} from full context",
        f"has {opening['tokens']:,} tokens",
    ):
        assert words in " ".join(chat.split())
