"""Rows drawn ahead of time: the file, how it is made, and training from it."""

from __future__ import annotations

import json
import random
import signal
import subprocess
import sys
from collections import Counter
from collections.abc import Callable, Iterator
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import runs
from runs import TOKENIZER, log_of, trainer, weights_of
from tiny import tiny_tokenizer

from ccm import cli
from ccm.data.mixture import Mixture
from ccm.data.rows import ConversationRow
from ccm.errors import CCMError, ConfigError, DataError
from ccm.training import TrainConfig, Trainer, packing
from ccm.training.packed import ArrayRow, PackedFile, Table, encoded, ids_type, tokenizer_identity
from ccm.training.packing import pack
from ccm.training.rows import PackedRows, held_out_rows, open_sources
from ccm.training.targets import Row, marked

TOKENS = 30_000


@pytest.fixture(scope="module")
def logs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return runs.write_logs(tmp_path_factory.mktemp("logs"))


@pytest.fixture(autouse=True)
def small_parts(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(packing, "PART", 4000)


def config(logs: Path, **changes: Any) -> TrainConfig:
    notes = {"notes": {"messages": [4], "weight": 0.5}}
    return TrainConfig(**{"data": runs.data(logs) | notes, "eval_rows": 4, "seed": 5, **changes})


@pytest.fixture(scope="module")
def file(logs: Path, tmp_path_factory: pytest.TempPathFactory) -> PackedFile:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(packing, "PART", 4000)
        return pack(config(logs), TOKENIZER, TOKENS, tmp_path_factory.mktemp("packed") / "a.rows")


def drawn(settings: TrainConfig, count: int) -> list[tuple[str, ConversationRow]]:
    """What a mixture of the run draws, in the order of its pools."""
    sources = open_sources(settings, TOKENIZER)
    weights = [settings.weights[name] for name in sources]
    mixture = Mixture(list(sources.values()), weights, settings.tokens_per_batch, 4, settings.seed)
    rows: list[tuple[str, ConversationRow]] = []
    number = 0
    while len(rows) < count:
        rng, tokens = random.Random(f"{settings.seed}-{number}"), 0
        while tokens < packing.PART:
            place, row = mixture.draw(rng)
            rows.append((list(sources)[place], row))
            tokens += row.tokens
        number += 1
    return rows[:count]


# ---------------------------------------------------------------------- the file


def test_arrays_and_rows_are_the_same_thing() -> None:
    row = Row(((5, 6, 7), (8,), (9, 10)), ((0, 1, 2), (3,), (0, 1)))
    arrays = ArrayRow.from_row(row)
    assert arrays.to_row() == row and arrays.tokens == row.tokens == 6
    assert arrays.stops.tolist() == [3, 4, 6]
    assert (arrays.ids.dtype, arrays.roles.dtype, arrays.stops.dtype) == (np.int32, np.uint8, np.int32)


def test_the_rows_are_those_of_the_mixture(file: PackedFile, logs: Path) -> None:
    expected = drawn(config(logs), len(file))
    assert [file.row(i).to_row() for i in range(len(file))] == [marked(row) for _, row in expected]
    assert [file.sources[file.source(i)] for i in range(len(file))] == [name for name, _ in expected]
    assert file.lengths.tolist() == [row.tokens for _, row in expected]
    assert TOKENS <= file.tokens < TOKENS + expected[-1][1].tokens
    assert set(Counter(name for name, _ in expected)) == {"jsonl", "notes"}
    assert file.sources == ("jsonl", "notes") and file.weights == config(logs).weights
    assert any(2 in row.roles for row in map(file.row, range(len(file)))), "planted facts are marked"


def test_a_pool_begins_with_the_rows_of_its_part(file: PackedFile, logs: Path) -> None:
    """Training that draws and training that reads see the same rows, in batches of their own."""
    settings = config(logs, tokens_per_batch=1000, rows=1)
    sources = open_sources(settings, TOKENIZER)
    weights = [settings.weights[name] for name in sources]
    pool = Mixture(list(sources.values()), weights, 4096, 1, settings.seed).pool(0)
    first = [file.row(i).to_row() for i in range(len(pool))]
    assert sorted(marked(row).segments for (row,) in pool) == sorted(row.segments for row in first)


def test_held_out_rows_are_those_of_the_sources(file: PackedFile, logs: Path) -> None:
    settings = config(logs)
    expected = held_out_rows(settings, open_sources(settings, TOKENIZER))
    assert {name: file.held_out(name) for name in file.sources} == expected
    assert held_out_rows(settings, file) == expected
    fewer = held_out_rows(config(logs, eval_rows=2), file)
    assert fewer == {name: rows[:2] for name, rows in expected.items()}
    with pytest.raises(DataError, match=r"packed with 4 held-out rows.*eval_rows is 9; set eval_rows=4"):
        held_out_rows(config(logs, eval_rows=9), file)


def test_a_token_takes_three_bytes(file: PackedFile) -> None:
    tokens, segments = len(file.table.ids), len(file.table.stops)
    assert file.table.ids.dtype == np.uint16
    assert file.path.stat().st_size < 3 * tokens + 4 * segments + 5 * len(file.table.segments) + 2000


def test_a_large_vocabulary_takes_wider_ids() -> None:
    assert ids_type({"largest": 65_535}) == "<u2" and ids_type({"largest": 65_536}) == "<u4"
    row = ArrayRow.from_row(Row(((200_000, 3),), ((0, 1),)))
    assert Table.of([row], [0], "<u4").ids.tolist() == [200_000, 3]


def test_the_identity_of_a_tokenizer_is_its_vocabulary() -> None:
    assert tokenizer_identity(tiny_tokenizer()) == tokenizer_identity(TOKENIZER)
    other = tiny_tokenizer()
    other.add_tokens(["<new>"])
    assert tokenizer_identity(other)["sha256"] != tokenizer_identity(TOKENIZER)["sha256"]


# ---------------------------------------------------------------------- how it is made


def test_any_number_of_processes_makes_the_same_bytes(file: PackedFile, logs: Path, tmp_path: Path) -> None:
    again = pack(config(logs), TOKENIZER, TOKENS, tmp_path / "b.rows", processes=2)
    assert again.path.read_bytes() == file.path.read_bytes() and again.fingerprint == file.fingerprint
    other = pack(config(logs, seed=6), TOKENIZER, TOKENS, tmp_path / "c.rows")
    assert other.path.read_bytes() != file.path.read_bytes() and other.fingerprint != file.fingerprint
    assert not list(tmp_path.glob("*.part"))


def counting(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """The parts that are drawn from now on."""
    numbers: list[int] = []
    own = packing.Parts.__call__

    def call(self: packing.Parts, number: int) -> bytes:
        numbers.append(number)
        return own(self, number)

    monkeypatch.setattr(packing.Parts, "__call__", call)
    return numbers


def stopping_at(part: int) -> Callable[[int], None]:
    told: list[int] = []

    def on_progress(done: int) -> None:
        told.append(done)
        if len(told) == part:
            raise KeyboardInterrupt

    return on_progress


def test_ctrl_c_keeps_what_was_drawn(
    file: PackedFile, logs: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out = tmp_path / "b.rows"
    with pytest.raises(KeyboardInterrupt):
        pack(config(logs), TOKENIZER, TOKENS, out, on_progress=stopping_at(3))
    assert not out.exists() and len(list((tmp_path / "b.rows.part").iterdir())) == 3
    kept = sum(PackedFile.open(part).tokens for part in (tmp_path / "b.rows.part").iterdir())
    numbers, told = counting(monkeypatch), list[int]()
    made = pack(config(logs), TOKENIZER, TOKENS, out, on_progress=told.append)
    assert made.path.read_bytes() == file.path.read_bytes()
    assert told[0] == kept and len(told) == 1 + len(
        numbers
    )  # what was there counts once: it took no time here
    assert numbers == list(range(3, len(numbers) + 3)) and len(numbers) > 2
    assert not (tmp_path / "b.rows.part").exists()
    numbers.clear()
    assert pack(config(logs), TOKENIZER, TOKENS, out).fingerprint == file.fingerprint and not numbers


def test_a_damaged_part_is_drawn_again(
    file: PackedFile, logs: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with pytest.raises(KeyboardInterrupt):
        pack(config(logs), TOKENIZER, TOKENS, tmp_path / "b.rows", on_progress=stopping_at(3))
    part = tmp_path / "b.rows.part" / "000001"
    part.write_bytes(part.read_bytes()[:-1])
    numbers = counting(monkeypatch)
    again = pack(config(logs), TOKENIZER, TOKENS, tmp_path / "b.rows")
    assert numbers[0] == 1 and again.path.read_bytes() == file.path.read_bytes()


def test_parts_of_other_settings_are_refused(logs: Path, tmp_path: Path) -> None:
    with pytest.raises(KeyboardInterrupt):
        pack(config(logs), TOKENIZER, TOKENS, tmp_path / "b.rows", on_progress=stopping_at(1))
    with pytest.raises(
        ConfigError, match=r"b.rows.part was packed with other .*seed: it has 5, got 7.*delete"
    ):
        pack(config(logs, seed=7), TOKENIZER, TOKENS, tmp_path / "b.rows")
    more = pack(
        config(logs), TOKENIZER, TOKENS + 9000, tmp_path / "b.rows"
    )  # they serve a longer file as well
    assert more.tokens >= TOKENS + 9000


def test_a_finished_file_of_other_settings_is_kept(file: PackedFile, logs: Path) -> None:
    before = file.path.read_bytes()
    with pytest.raises(ConfigError, match=f"asked: it has {TOKENS}, got 99"):
        pack(config(logs), TOKENIZER, 99, file.path)
    with pytest.raises(ConfigError, match=r"other settings \(data\)"):
        pack(config(logs, data=runs.data(logs)), TOKENIZER, TOKENS, file.path)
    assert file.path.read_bytes() == before


def test_something_else_under_the_name_is_kept(logs: Path, tmp_path: Path) -> None:
    path = tmp_path / "notes.txt"
    path.write_text("mine")
    with pytest.raises(ConfigError, match=r"is there already, and not whole; delete it.*not a packed file"):
        pack(config(logs), TOKENIZER, TOKENS, path)
    assert path.read_text() == "mine"


KILLED = """
import os, signal, sys
from pathlib import Path
sys.path.insert(0, {tests!r})
from runs import TOKENIZER
from test_packed import config
from ccm.training import packing

packing.PART, seen = 4000, []

def on_progress(done):
    seen.append(done)
    if len(seen) == 3:
        os.kill(os.getpid(), signal.SIGKILL)

packing.pack(config(Path({logs!r})), TOKENIZER, {tokens}, Path({out!r}), 1, on_progress)
"""


def test_a_killed_command_goes_on(file: PackedFile, logs: Path, tmp_path: Path) -> None:
    out = tmp_path / "b.rows"
    script = tmp_path / "script.py"
    body = KILLED.format(tests=str(Path(__file__).parent), logs=str(logs), tokens=TOKENS, out=str(out))
    script.write_text("if __name__ == '__main__':\n" + "".join(f"    {line}\n" for line in body.splitlines()))
    done = subprocess.run([sys.executable, script], env=runs.environment(), capture_output=True, text=True)
    assert done.returncode == -signal.SIGKILL, done.stderr
    assert not out.exists() and len(list((tmp_path / "b.rows.part").iterdir())) == 3
    assert pack(config(logs), TOKENIZER, TOKENS, out).path.read_bytes() == file.path.read_bytes()


# ---------------------------------------------------------------------- bad input


def broken(file: PackedFile, kind: str) -> bytes:
    raw = file.path.read_bytes()
    tokenizer = file.header["tokenizer"]
    empty = encoded(Table.of([], [], "<u2"), {"tokenizer": tokenizer, "data": {}}, 0, [])
    return {
        "no packed file": b'{"messages": []}\n' * 9,
        "empty": b"",
        "only a beginning": raw[:5],
        "truncated": raw[:-7],
        "truncated header": raw[:100],
        "another byte": raw[:-7] + bytes([raw[-7] ^ 1]) + raw[-6:],
        "a word of the header": raw.replace(b'"vocabulary"', b'"vokabulary"', 1),
        "a number of the header": raw.replace(b'"rows": %d' % len(file), b'"rows": %d' % (len(file) + 1), 1),
        "longer": raw + b"x",
        "version": raw.replace(b"ccm-packed/1", b"ccm-packed/9"),
        "no rows": empty,
    }[kind]


@pytest.mark.parametrize(
    ("kind", "words"),
    [
        ("no packed file", "is not a packed file; expected one of `ccm data pack`"),
        ("empty", "expected a file of `ccm data pack`"),
        ("only a beginning", "is not a packed file"),
        ("truncated", r"truncated or damaged: got [\d,]+ bytes, expected [\d,]+; copy it anew"),
        ("truncated header", "truncated or damaged in its header"),
        ("another byte", "damaged in its section roles"),
        ("a word of the header", "damaged in its header; copy it anew"),
        ("a number of the header", "damaged in its header"),
        ("longer", "truncated or damaged"),
        ("version", "got format 'ccm-packed/9', expected 'ccm-packed/1'; pack it again"),
        ("no rows", "got no training rows, expected at least one"),
    ],
)
def test_files_that_cannot_be_read(file: PackedFile, tmp_path: Path, kind: str, words: str) -> None:
    path = tmp_path / "bad.rows"
    path.write_bytes(broken(file, kind))
    with pytest.raises(DataError, match=words) as caught:
        PackedFile.open(path, TOKENIZER)
    assert "bad.rows" in str(caught.value) and "\n" not in str(caught.value)


def test_another_tokenizer(file: PackedFile) -> None:
    other = tiny_tokenizer()
    other.add_tokens(["<new>"])
    with pytest.raises(DataError, match=r"another tokenizer \(259 tokens.*expected that of the model \(260"):
        PackedFile.open(file.path, other)
    assert len(PackedFile.open(file.path)) == len(file)


def test_no_such_file(tmp_path: Path) -> None:
    with pytest.raises(DataError, match=r"none.rows: No such file"):
        PackedFile.open(tmp_path / "none.rows")
    with pytest.raises(DataError, match="expected a file of"):
        PackedFile.open(tmp_path)


def test_the_command_says_it_in_one_line(
    file: PackedFile, logs: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    recipe = runs.write_recipe(tmp_path, logs)
    bad = tmp_path / "bad.rows"
    bad.write_bytes(broken(file, "truncated"))
    assert cli.main(["train", str(recipe), f"packed={bad}", "--out", str(tmp_path / "run")]) == 2
    error = capsys.readouterr().err.splitlines()[-1]
    assert error.startswith("error: ") and "bad.rows is truncated" in error
    assert cli.main(["data", "pack", str(recipe), "--tokens", "lots", "--out", str(bad)]) == 2
    assert "--tokens: got 'lots', expected a number such as 20M" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("text", "count"), [("20M", 20_000_000), ("500k", 500_000), ("1.5M", 1_500_000), ("20000", 20_000)]
)
def test_numbers_of_tokens(text: str, count: int) -> None:
    from ccm.cli.data import _count

    assert _count(text) == count
    for wrong in ("0", "-5", "M", "1e6", "20 M", "0.1", ""):
        with pytest.raises(CCMError, match="--tokens"):
            _count(wrong)


# ---------------------------------------------------------------------- batches


def stream(file: PackedFile, **changes: Any) -> PackedRows:
    settings: dict[str, Any] = {"tokens_per_batch": 2000, "max_rows": 9, "seed": 3}
    return PackedRows(file, **{**settings, **changes})


def take(rows: PackedRows, count: int) -> list[list[Row]]:
    return [[row.to_row() for row in batch] for batch in islice(rows, count)]


def test_batches_are_full_by_the_sum_of_their_tokens(file: PackedFile) -> None:
    batches = take(stream(file), 60)
    sums = [sum(row.tokens for row in batch) for batch in batches]
    longest = int(file.lengths.max())
    assert max(sums) <= 2000 and max(map(len, batches)) == 9
    for batch, tokens in zip(batches, sums, strict=True):
        assert len(batch) == 9 or tokens > 2000 - longest, "one more row would have fitted"
    padded = [len(batch) * max(row.tokens for row in batch) for batch in batches]
    assert max(padded) > 2000, "the control: padding does not count"


def test_every_epoch_has_every_row_in_another_order(file: PackedFile) -> None:
    rows = stream(file)
    flat: list[Row] = []
    while len(flat) < 3 * len(file):
        flat += take(rows, 1)[0]
    epochs = [flat[k * len(file) : (k + 1) * len(file)] for k in range(3)]
    every = Counter(file.row(i).to_row() for i in range(len(file)))
    assert all(Counter(epoch) == every for epoch in epochs)
    assert epochs[0] != epochs[1] != epochs[2]
    assert take(stream(file, seed=4), 3) != take(stream(file), 3) == take(stream(file), 3)


def test_a_file_smaller_than_a_batch(file: PackedFile) -> None:
    (batch,) = take(stream(file, tokens_per_batch=3 * file.tokens, max_rows=10**6), 1)
    assert 2 * file.tokens < sum(row.tokens for row in batch) <= 3 * file.tokens


@pytest.mark.parametrize("start", [1, 7, 90])
def test_the_stream_goes_on_anywhere(file: PackedFile, start: int) -> None:
    whole = take(stream(file), start + 20)
    again = stream(file)
    again.served = start
    assert take(again, 20) == whole[start:] and again.served == start + 20
    again.served = 0
    assert take(again, 2) == whole[:2], "back, too"


@pytest.mark.parametrize("world", [2, 3])
def test_processes_share_the_stream(file: PackedFile, world: int) -> None:
    single = take(stream(file), 20 * world)
    parts = [take(stream(file, rank=rank, world=world), 20) for rank in range(world)]
    assert [batch for step in zip(*parts, strict=True) for batch in step] == single


def test_rows_that_are_too_long(file: PackedFile, caplog: pytest.LogCaptureFixture) -> None:
    limit = int(np.median(file.lengths))
    batches = take(stream(file, tokens_per_batch=limit), 50)
    assert all(sum(row.tokens for row in batch) <= limit for batch in batches)
    assert f"longer than {limit} tokens and left out" in caplog.text
    with pytest.raises(ConfigError, match=f"set tokens_per_batch to at least {file.lengths.min()}"):
        stream(file, tokens_per_batch=5)


# ---------------------------------------------------------------------- training


class Drawn:
    """The batches of packed rows, with each row as its source drew it."""

    def __init__(self, packed: PackedRows, rows: list[ConversationRow]):
        self.packed, self.rows, self.served = packed, rows, 0

    def __iter__(self) -> Iterator[list[ConversationRow]]:
        known = {marked(row): row for row in self.rows}
        for batch in self.packed:
            self.served += 1
            yield [known[row.to_row()] for row in batch]

    def close(self) -> None:
        pass


def test_a_run_from_the_file_is_the_run_on_its_rows(
    file: PackedFile, logs: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    settings = {"data": config(logs).data, "seed": 5, "tokens_per_batch": 900, "rows": 8}
    drawing = trainer(tmp_path / "drawn", logs, **settings)
    own = PackedRows(file, 900, 8, 5)
    drawing.rows = Drawn(own, [row for _, row in drawn(config(logs), len(file))])
    expected = drawing.run()

    def no_source(*_: Any) -> Any:
        raise AssertionError("a source was opened")

    monkeypatch.setattr("ccm.training.trainer.open_sources", no_source)
    reading = trainer(tmp_path / "read", logs, **settings, packed=str(file.path))
    got = reading.run()
    assert log_of(tmp_path / "drawn") == log_of(tmp_path / "read") and got["step"] == expected["step"] == 6
    assert "recovered_share_notes" in got
    for a, b in zip(weights_of(tmp_path / "drawn"), weights_of(tmp_path / "read"), strict=True):
        assert a.equal(b)


def test_a_packed_run_resumes_wherever_the_file_lies(
    file: PackedFile, logs: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    whole = trainer(tmp_path / "whole", logs, packed=str(file.path), rows=3)
    whole.run()
    assert "packed from other data than the recipe names" in caplog.text
    assert whole.config.data == file.data

    def stop(report: dict[str, Any]) -> None:
        if report["step"] == 5:  # the last checkpoint is of step 4
            raise InterruptedError

    with pytest.raises(InterruptedError):
        trainer(tmp_path / "parts", logs, packed=str(file.path), rows=3).run(stop)
    moved = tmp_path / "moved.rows"
    moved.write_bytes(file.path.read_bytes())
    run = trainer(tmp_path / "parts", logs, packed=str(moved), rows=3)
    assert run.rows.served == run.step == 4
    run.run()
    for a, b in zip(weights_of(tmp_path / "whole"), weights_of(tmp_path / "parts"), strict=True):
        assert a.equal(b)
    assert log_of(tmp_path / "whole") == log_of(tmp_path / "parts")
    other = pack(config(logs, seed=8), TOKENIZER, 5000, tmp_path / "other.rows")
    with pytest.raises(ConfigError, match=f"packed: it has {file.fingerprint}, got {other.fingerprint}"):
        trainer(tmp_path / "parts", logs, packed=str(other.path), rows=3)


def test_rows_taken_early_are_not_lost(
    file: PackedFile, logs: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    settings = {"packed": str(file.path), "rows": 3, "resegment": 0.5, "save_every": 3, "accumulate": 2}
    trainer(tmp_path / "plain", logs, **settings).run()
    monkeypatch.setattr(Trainer, "_looks_ahead", True)

    def stop(report: dict[str, Any]) -> None:
        if report["step"] == 4:  # the last checkpoint is of step 3
            raise InterruptedError

    with pytest.raises(InterruptedError):
        trainer(tmp_path / "early", logs, **settings).run(stop)
    run = trainer(tmp_path / "early", logs, **settings)
    assert run.step == 3 and run.rows.served == 6, "those of the fourth step were taken, and are not counted"
    served = []
    run.run(lambda report: served.append(run.rows.served))
    assert served == [10, 12, 14], "two batches ahead of steps 4, 5 and 6"
    assert log_of(tmp_path / "plain") == log_of(tmp_path / "early")
    for a, b in zip(weights_of(tmp_path / "plain"), weights_of(tmp_path / "early"), strict=True):
        assert a.equal(b)


def test_the_command_packs(logs: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    recipe = runs.write_recipe(tmp_path, logs)
    out = tmp_path / "a.rows"
    command = ["data", "pack", str(recipe), "seed=2", "--tokens", "3k", "--out", str(out), "--processes", "0"]
    assert cli.main([*command, "--json"]) == 0
    shown = json.loads(capsys.readouterr().out)
    file = PackedFile.open(out, TOKENIZER)
    assert file.header["seed"] == 2 and 3000 <= file.tokens < 4000
    assert shown["tokens"] == file.tokens and shown["rows"] == len(file)
    assert shown["held_out"] == {"jsonl": 4} and shown["fingerprint"] == file.fingerprint
    assert cli.main(command) == 0
    assert f"{len(file):,} rows" in capsys.readouterr().out
