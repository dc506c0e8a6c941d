"""``ccm methods``: every method by family, in the words of its docstring, a method from elsewhere among them."""

from __future__ import annotations

import inspect
import json
import runpy
from collections.abc import Iterator
from pathlib import Path

import method_cases
import pytest
import test_method_matrix
from method_cases import EXAMPLE, elsewhere

from ccm.cli import main
from ccm.files.adapter_folder import shipped_adapters
from ccm.methods import list_methods
from ccm.methods.base import METHODS
from ccm.methods.catalogue import ASKS, ELSEWHERE, SLOTS, Entry, catalogue, entry

Captured = pytest.CaptureFixture[str]


@pytest.fixture
def low_norm() -> Iterator[str]:
    """A method of somebody else, registered as docs/extending.md shows."""
    with elsewhere() as name:
        yield name


def known() -> dict[str, Entry]:
    entries, broken = catalogue()
    assert not broken
    return {name: each for each in entries for name in each.names}


def test_every_registered_name_is_there_once() -> None:
    entries, _ = catalogue()
    assert sorted(name for each in entries for name in each.names) == list_methods()
    assert len({each.name for each in entries}) == len(entries) >= 33


def test_every_method_of_the_house_says_what_it_is() -> None:
    for each in known().values():
        assert each.family != ELSEWHERE, f"{each.name} stands in a folder that no family names"
        assert each.keeps and not each.keeps.endswith("."), each.name
        assert each.slots in SLOTS and set(each.asks) <= set(ASKS), each.name
        assert each.paper or each.name in ("full", "none", "summary"), f"{each.name} names no paper"
        assert all(option.said for option in each.options), each.name


def test_what_is_said_follows_from_the_method() -> None:
    found = known()
    assert found["ccm-merge"].trained and found["ccm-merge"].asks == ("adapter",)
    assert not found["am"].trained and found["am"].name == "attention-matching"
    assert found["slots-and-words"].asks == found["gisting"].asks == ("adapter", "words")
    assert found["snapkv"].asks == ("queries",) and found["kvzip"].asks == ("words",)
    assert found["summary"].asks == ("writing",) and found["full"].asks == found["keydiff"].asks == ()
    assert found["h2o"].paper == "Zhang et al., NeurIPS 2023, arXiv 2306.14048"
    assert found["h2o"].link == "https://arxiv.org/abs/2306.14048"
    assert found["chunkkv"].paper.startswith("ChunkKV, Liu et al.") and found["none"].link == ""
    assert {found[name].slots for name in ("d2o", "ems")} == {"merged"}, "not chosen: the rest joins them"
    tokens = next(option for option in found["snapkv"].options if option.name == "tokens")
    assert (tokens.default, tokens.said) == (64, "entries that stay beside them.")


def test_a_method_from_elsewhere_is_among_them(low_norm: str, capsys: Captured) -> None:
    assert known()[low_norm].family == ELSEWHERE
    assert main(["methods"]) == 0
    out = capsys.readouterr().out
    assert "Methods from elsewhere" in out and low_norm in out
    assert main(["methods", str(EXAMPLE)]) == 0
    assert "low-norm" in capsys.readouterr().out


def test_an_installed_method_that_cannot_be_imported_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    from ccm.errors import ConfigError
    from ccm.methods import catalogue as module

    def broken(name: str) -> type:
        if name == "h2o":
            raise ConfigError("method h2o of the installed package x cannot be imported")
        return METHODS[name]

    monkeypatch.setattr(module, "method_class", broken)
    entries, why = module.catalogue()
    assert "h2o" not in {each.name for each in entries} and "cannot be imported" in why["h2o"]


def test_the_list_fits_a_terminal(capsys: Captured, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", "80")
    assert main(["methods"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert max(map(len, lines)) <= 80
    for each in catalogue()[0]:  # a line each: the name, and all of the rest beside it
        (line,) = [line for line in lines if line.startswith(f"{each.name} ") and each.keeps in line]
        assert line.rstrip().endswith(", ".join(each.asks)), each.name
    assert all(name in " ".join(lines) for name in shipped_adapters())


def test_a_family_alone_and_as_json(capsys: Captured) -> None:
    assert main(["methods", "--family", "CHOSEN", "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert {each["family"] for each in found} == {"Entries that are chosen"}
    snapkv = next(each for each in found if each["names"] == ["snapkv"])
    assert snapkv["options"]["tokens"]["default"] == 64 and snapkv["asks"] == ["queries"]
    assert main(["methods", "--family", "slots of gold"]) == 2
    assert "Entries that are chosen" in capsys.readouterr().err
    assert main(["methods", "snapkv", "--family", "chosen"]) == 2


def test_one_method_says_its_paper_options_example_and_bytes(capsys: Captured, embedded: object) -> None:
    assert main(["methods", "snapkv"]) == 0
    out = capsys.readouterr().out
    for said in (
        "arxiv.org/abs/2404.14469",
        "tokens",
        "64",
        "--memory snapkv:tokens=128",
        "6.1 MB (132 entr",
    ):
        assert said in out
    assert main(["methods", "ccm-chat", "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["names"] == ["ccm-concat"] and found["memory"] == "ccm-chat"
    assert found["bytes"]["10 exchanges"].startswith("6.5 MB")
    assert main(["methods", "summary"]) == 0
    assert "counts alone do not tell" in capsys.readouterr().out


def test_a_name_that_is_none_is_refused_with_a_guess(capsys: Captured) -> None:
    assert main(["methods", "snapvk"]) == 2
    assert "did you mean snapkv" in capsys.readouterr().err
    assert main(["methods", "default"]) == 2


def test_a_class_without_a_paper_has_none() -> None:
    class Plain(METHODS["none"]):  # type: ignore[misc, name-defined]
        """A thing of 2023."""

    Plain.__module__ = __name__
    assert entry(Plain).paper == "" and entry(Plain).family == ELSEWHERE


def test_a_method_from_elsewhere_joins_the_matrix(low_norm: str) -> None:
    """Its names are those that are registered, and what they must do a registered one does."""
    assert low_norm in runpy.run_path(str(Path(method_cases.__file__)))["NAMES"]
    bound = method_cases.small_method(low_norm, {}).bind(method_cases.model(), method_cases.TOKENIZER)
    tried = 0
    for name, check in vars(test_method_matrix).items():
        if name.startswith("test_") and list(inspect.signature(check).parameters) == ["method"]:
            check(bound)
            tried += 1
    assert tried >= 4
