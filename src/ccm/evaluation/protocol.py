"""The online protocol: segments arrive one by one, the memory takes them in, queries are put in between.

    for t = 1, 2, ...:   Mem(t) = append(Mem(t-1), c(t));   at the asked steps: score the queries of step t

One conversation at a time, as it would be lived; only options of one question are scored together. What is measured
is a record, a plain dictionary that goes into a file as one line of JSON (``ccm.evaluation.records``).
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn
from transformers import StoppingCriteria

from ..chat.template import answer_ends
from ..core.memory import KV, Memory
from ..errors import ConfigError
from ..methods import Run
from .items import Choice, Generation, Ids, Item, Likelihood, Query
from .metrics import exact_match, f1, rouge_l
from .share import turn_nll

#: Queries with this tag are summed over blocks of so many read tokens.
STREAM, BLOCK = "stream", 2048
#: Logits that differ by less are the same.
SAME = 1e-4
#: Tokens that show whether a memory has an effect.
_PROBE = 8
#: Keys that the options scored in one pass may read, all together.
_KEYS_AT_ONCE = 16_384


@dataclass(frozen=True)
class State:
    """An item in hand, between two steps.

    Attributes:
        step: segments taken in.
        run: a copy of the run after them.
        measured: the record so far; never changed afterwards.
    """

    step: int
    run: Run
    measured: Mapping[str, Any]


def run_item(
    run: Run,
    item: Item,
    tokenizer: Any = None,
    *,
    entries: Sequence[int] = (),
    resume: State | None = None,
    on_step: Callable[[State], None] = lambda state: None,
) -> dict[str, Any]:
    """Live through an item and put its queries.

    Args:
        run: a conversation that has just begun; it is not changed.
        item: what arrives and what is asked.
        tokenizer: of the model; only generations need it.
        entries: what the run is resized to before each append, for a window of as many keys as another method.
        resume: a state that ``on_step`` was given earlier, its run on the same model; ``run`` is then only the
            beginning to compare with.
        on_step: called after every step with all that is needed to go on from there.

    Returns:
        the record: "item"; "queries", each with "step", "index", "kind", "tag" and its scores; "steps", with
        "tokens" taken in, "kv_bytes", "kv_entries", "fold_seconds" of the last append and "ttft_seconds" of the
        first query's first forward pass (for a choice, of reading its prompt); "entries", those held after each
        append; "peak_kv_bytes", the largest cache of keys and values while segments were taken in; "seconds";
        "changed": whether tokens of a query get other logits than with nothing taken in (None: nothing was asked);
        "cut", of an item that was cut: tokens left out.

    Raises:
        ConfigError: a query comes after more segments than there are, a run that cannot be resized, a segment that
            does not fit the model, or a generation without tokenizer.
    """
    last = max(item.queries, default=0)
    if last > len(item.segments):
        raise ConfigError(
            f"item {item.name} asks after {last} segments and has {len(item.segments)}; ask earlier"
        )
    if entries and len(entries) < last:
        raise ConfigError(f"item {item.name}: got {len(entries)} sizes of another method, expected {last}")
    bare, run, begin, measured = run, run.fork(), 0, _nothing(item)
    if resume is not None:
        run, begin, measured = resume.run.fork(), resume.step + 1, dict(resume.measured)
    for t in range(begin, last + 1):
        started = _now(run)
        step: dict[str, Any] = {"step": item.at(t), "fold_seconds": 0.0}
        if t:
            if entries:
                run.resize(entries[t - 1])
            with _CacheWatch(run.reader.body) as watch:
                run.append(item.segments[t - 1])
                held = run.kv_bytes
            step["fold_seconds"] = _now(run) - started
            measured["tokens"] += len(item.segments[t - 1])
            measured["entries"] = [*measured["entries"], run.memory.length]
            measured["peak_kv_bytes"] = max(measured["peak_kv_bytes"], watch.peak, held)
        if queries := item.queries.get(t):
            asked = run.fork()
            earlier = len(measured["queries"]) if item.once else 0
            found, step["ttft_seconds"] = _ask(asked, item.at(t), queries, tokenizer, earlier)
            step |= {"kv_bytes": asked.kv_bytes, "kv_entries": asked.memory.length}
            if t and not measured["changed"]:
                measured["changed"] = _differs(asked, bare.fork(), queries[0])
            _add(measured, step, found)
        measured["seconds"] += _now(run) - started
        on_step(State(t, run.fork(), dict(measured)))
    return {k: v for k, v in measured.items() if k != "tokens"}


def _now(run: Run) -> float:
    """Seconds of a clock, when all that was asked of the device is done."""
    if (device := run.reader.model.device).type != "cpu":
        torch.accelerator.synchronize(device)
    return time.perf_counter()


def _nothing(item: Item) -> dict[str, Any]:
    return {
        "item": item.name,
        "queries": [],
        "steps": [],
        "entries": [],
        "tokens": 0,
        "peak_kv_bytes": 0,
        "seconds": 0.0,
        "changed": None,
        **({"cut": item.cut} if item.cut else {}),
    }


def _add(measured: dict[str, Any], step: dict[str, Any], found: list[dict[str, Any]]) -> None:
    """Put a step and its answers into the record; lists and entries are new, as older states keep theirs."""
    tokens = measured["tokens"]
    step["tokens"] = tokens
    if all(query["tag"] == STREAM for query in found):
        block = (tokens // BLOCK + 1) * BLOCK
        step |= {"step": block, "steps": 1}
        nll = sum(query["nll"] for query in found)
        count = sum(query["tokens"] for query in found)
        found = [
            {"step": block, "index": 0, "kind": "likelihood", "tag": STREAM, "nll": nll, "tokens": count}
        ]
        if measured["steps"] and (old := measured["steps"][-1])["step"] == block:
            n = step["steps"] = old["steps"] + 1
            for key in ("fold_seconds", "ttft_seconds"):
                step[key] = old[key] + (step[key] - old[key]) / n
            earlier = measured["queries"][-1]
            found[0] |= {key: earlier[key] + found[0][key] for key in ("nll", "tokens")}
            measured |= {"steps": measured["steps"][:-1], "queries": measured["queries"][:-1]}
    measured |= {"steps": [*measured["steps"], step], "queries": [*measured["queries"], *found]}


class _CacheWatch:
    """The largest cache of keys and values that passes of a decoder run over, measured on its tensors."""

    def __init__(self, body: nn.Module):
        self.body = body
        self.peak = 0
        self.cache: Any = None

    def __enter__(self) -> _CacheWatch:
        self.handle = self.body.register_forward_pre_hook(self._before, with_kwargs=True)
        return self

    def __exit__(self, *error: object) -> None:
        self.handle.remove()
        self._measure()

    def _before(self, module: nn.Module, args: Any, kwargs: dict[str, Any]) -> None:
        self._measure()
        # named "cache" since transformers 5.24
        self.cache = kwargs.get("cache", kwargs.get("past_key_values"))

    def _measure(self) -> None:  # once the pass that fills it is over
        layers = [layer for layer in getattr(self.cache, "layers", ()) if layer.keys is not None]
        self.peak = max(self.peak, sum(layer.keys.nbytes + layer.values.nbytes for layer in layers))
        self.cache = None


# ---------------------------------------------------------------------- queries


def _ask(
    run: Run, t: int, queries: Sequence[Query], tokenizer: Any, earlier: int = 0
) -> tuple[list[dict[str, Any]], float]:
    """Scores of all queries of a step, and the seconds of the first one's first forward pass."""
    worth: dict[tuple[Ids, tuple[Ids, ...]], Tensor] = {}  # of options without content; queries share them
    found, first = [], 0.0
    for index, query in enumerate(queries, earlier):
        about = {"step": t, "index": index, "kind": type(query).__name__.lower(), "tag": query.tag}
        if isinstance(query, Likelihood):
            scores, seconds = _likelihood(run, query)
        elif isinstance(query, Choice):
            scores, seconds = _choice(run, query, worth)
        else:
            scores, seconds = _generation(run, query, tokenizer)
        found.append(about | scores)
        first = first if index > earlier else seconds
    return found, first


def _likelihood(run: Run, query: Likelihood) -> tuple[dict[str, Any], float]:
    started = _now(run)
    logits = run.logits(query.ids, max(1, query.scored[0]))
    seconds = _now(run) - started
    nll, tokens = turn_nll(logits, query.ids, query.scored)
    return {"nll": nll, "tokens": tokens}, seconds


def _choice(
    run: Run, query: Choice, worth: dict[tuple[Ids, tuple[Ids, ...]], Tensor]
) -> tuple[dict[str, Any], float]:
    scores, seconds = option_scores(run, query.prompt, query.options)
    if query.blank:
        key = query.blank, query.options
        if key not in worth:
            worth[key], _ = option_scores(run, query.blank, query.options)
        scores = scores - worth[key]
    chosen = int(scores.argmax())
    result: dict[str, Any] = {"correct": int(chosen == query.answer), "chosen": chosen}
    if query.groups:
        groups = torch.tensor(query.groups)
        share = torch.zeros(max(query.groups) + 1).index_add_(0, groups, scores.softmax(0))
        result["group_correct"] = int(int(share.argmax()) == query.groups[query.answer])
    return result, seconds


def option_scores(run: Run, prompt: Sequence[int], options: Sequence[Sequence[int]]) -> tuple[Tensor, float]:
    """Log-probability of each option after the prompt, summed over its tokens: (len(options),), on the CPU.

    Options of one token are read off one pass. Longer ones read the prompt's keys and values, which are computed
    once, many options at a time.

    Returns:
        the scores, and the seconds of the pass over the prompt.
    """
    started = _now(run)
    if all(len(option) == 1 for option in options):
        logits = run.logits(prompt, len(prompt))[-1]
        seconds = _now(run) - started
        return logits.float().log_softmax(-1)[[option[0] for option in options]].cpu(), seconds
    reader, memory, head = run.reader, run.recall([list(prompt)]), list(prompt)
    if len(head) > 1 and not reader.two_sided:  # an encoder reads a prompt as a whole
        (read,) = reader.read([head[:-1]], memory)
        row = memory.rows[0]
        memory = replace(memory, rows=(replace(row, window=KV.cat((row.window, read))),))
        head = head[-1:]
    seconds = _now(run) - started
    scores = []
    together = max(1, _KEYS_AT_ONCE // max(1, memory.length))
    for k in range(0, len(options), together):
        scores.append(_after(run, memory, head, options[k : k + together]))
    return torch.cat(scores), seconds


def _after(run: Run, memory: Memory, head: Sequence[int], options: Sequence[Sequence[int]]) -> Tensor:
    """Log-probabilities of options behind some tokens, all reading the same memory."""
    first = len(head) - 1
    ids = torch.zeros(len(options), first + max(map(len, options)), dtype=torch.long)
    mask = torch.zeros_like(ids)
    for r, option in enumerate(options):
        ids[r, : first + len(option)] = torch.tensor([*head, *option[:-1]])
        mask[r, : first + len(option)] = 1
    memories = Memory(memory.rows * len(options), memory.fingerprint)
    logits = run.reader.logits(ids, memories, mask, begin=len(head))
    return torch.stack(
        [
            logits[r, first : first + len(option)]
            .float()
            .log_softmax(-1)[range(len(option)), list(option)]
            .sum()
            for r, option in enumerate(options)
        ]
    ).cpu()


def _generation(run: Run, query: Generation, tokenizer: Any) -> tuple[dict[str, Any], float]:
    if tokenizer is None:
        raise ConfigError("a generation is decoded: give run_item the tokenizer of the model")
    ends = set(answer_ends(tokenizer)[0])
    stop = _EndOfAnswer(tokenizer, len(query.prompt), ends, query.lines)
    ids = run.reader.generate(
        [list(query.prompt)],
        run.recall([list(query.prompt)]),
        max_new_tokens=query.max_tokens,
        do_sample=False,
        stopping_criteria=[stop],
        pad_token_id=tokenizer.pad_token_id if tokenizer.pad_token_id is not None else tokenizer.eos_token_id,
    )
    text = stop.answer(ids[0])
    if query.rule:
        return {"text": text, "score": query.rule(text)}, stop.first - stop.started
    scores = {
        "text": text,
        "em": exact_match(text, query.answers),
        "f1": f1(text, query.answers),
        "rouge_l": rouge_l(text, query.answers),
    }
    return scores, stop.first - stop.started


class _EndOfAnswer(StoppingCriteria):
    """Stops at the end of the turn, or of the first line that says something, unless answers may have several lines;
    knows when the first token came."""

    def __init__(self, tokenizer: Any, prompt: int, ends: set[int], lines: bool = False):
        self.tokenizer, self.prompt, self.ends, self.lines = tokenizer, prompt, ends, lines
        self.started = time.perf_counter()
        self.first = 0.0

    def __call__(self, input_ids: Tensor, scores: Any, **kwargs: Any) -> Tensor:
        last = int(input_ids[0, -1])  # waits for the device
        self.first = self.first or time.perf_counter()
        over = last in self.ends or (not self.lines and "\n" in self._text(input_ids[0]).lstrip())
        return torch.full((len(input_ids),), over, device=input_ids.device)

    def answer(self, ids: Tensor) -> str:
        text = self._text(ids).strip()
        return text if self.lines else (text.splitlines() or [""])[0].strip()

    def _text(self, ids: Tensor) -> str:
        new = ids[self.prompt :].tolist()
        end = next((k for k, token in enumerate(new) if token in self.ends), len(new))
        return str(self.tokenizer.decode(new[:end], skip_special_tokens=True))


def _differs(run: Run, bare: Run, query: Query) -> bool:
    """Whether a few tokens read what the run holds otherwise than nothing at all."""
    ids = (query.ids if isinstance(query, Likelihood) else query.prompt)[:_PROBE]
    own, other = (held.logits(ids, len(ids))[-1] for held in (run, bare))
    return float((own - other).abs().max()) > SAME
