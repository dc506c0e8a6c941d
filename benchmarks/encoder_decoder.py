"""An encoder-decoder from nothing, and its memory: T5 on in-context learning, as in the paper.

There is no small T5 in a package registry, so one is made here: 0.6 million parameters, trained on the training tasks
of ``icl`` with arbitrary words as labels, which only the demonstrations tell. Then adapters for it are trained by
``ccm.training`` (concat and mean, two slots a demonstration), and all are measured on tasks that nobody trained on.

    full           the demonstrations and the question as one input of the encoder (the base model as it is)
    none           the question alone
    concat, mean   the memory

Bytes are of the keys and values that the decoder and later segments read: of full context those of the decoder's
cross-attention alone (its encoder keeps none), of a slot those of all layers of both.

    python benchmarks/encoder_decoder.py           goes on where it was stopped
    python benchmarks/encoder_decoder.py --small   minutes: shows that it runs
"""

from __future__ import annotations

import json
import math
import random
import time
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import tokenizers
import torch
from common import parser, store
from torch import Tensor
from transformers import PreTrainedTokenizerFast, T5Config, T5ForConditionalGeneration

import ccm
from ccm.core.compressor import Compressor, CompressorConfig
from ccm.data.rows import ConversationRow, answers
from ccm.data.sources import HeldOut, Source, register_source
from ccm.data.tasks import TEST_TASKS, TRAIN_TASKS, load_task
from ccm.files.atomic import write_atomically
from ccm.training import TrainConfig, Trainer
from ccm.training.packed import ArrayRow
from ccm.training.targets import marked, scored_from
from ccm.training.written import Written

RUNS = Path(__file__).parent.parent / "runs" / "encoder_decoder"
WORDS = 2048  # of the tokenizer
LABELS = 16  # words that stand for labels, one token each
TEXT = 14  # tokens of a text
DEMONSTRATIONS, SHOWN = 6, 2  # of a row, and how many before the first question
ROWS, DRAWS = 160, 1000  # of the evaluation, and of its intervals


@dataclass(frozen=True)
class Schedule:
    """How long each part is trained."""

    base: int = 340
    adapter: int = 300
    batch: int = 48


def make_tokenizer(folder: Path) -> PreTrainedTokenizerFast:
    """Byte pairs of the training tasks' texts."""
    if not (folder / "tokenizer.json").is_file():
        words = tokenizers.Tokenizer(tokenizers.models.BPE())
        words.pre_tokenizer = tokenizers.pre_tokenizers.ByteLevel(add_prefix_space=False)
        words.decoder = tokenizers.decoders.ByteLevel()
        trainer = tokenizers.trainers.BpeTrainer(
            vocab_size=WORDS,
            special_tokens=["<pad>", "</s>"],
            initial_alphabet=sorted(tokenizers.pre_tokenizers.ByteLevel.alphabet()),
        )
        texts = (item.text for name in TRAIN_TASKS for item in load_task(name, "train").items)
        words.train_from_iterator(texts, trainer)
        PreTrainedTokenizerFast(tokenizer_object=words, pad_token="<pad>", eos_token="</s>").save_pretrained(
            folder
        )
    return PreTrainedTokenizerFast.from_pretrained(folder)


@register_source
class RelabelledTasks(Source):
    """Demonstrations of classification tasks with arbitrary words as labels, and short texts."""

    name, title = "relabelled", "In-context learning with arbitrary words as labels"
    licence, size, origin = "as of icl", "16 tasks", "as of icl"

    def __init__(self, tokenizer: Any):
        super().__init__(tokenizer)
        pieces = tokenizer.convert_ids_to_tokens(list(range(len(tokenizer))))
        plain = [piece[1:] for piece in pieces if piece[:1] == "Ġ" and piece[1:].isalpha() and len(piece) > 3]
        self.labels = sorted(word for word in plain if word.islower())[:: max(1, len(plain) // LABELS)][
            :LABELS
        ]

    def row(self, task: str, split: Any, rng: random.Random) -> ConversationRow:
        found = load_task(task, split)
        names = dict(zip(found.options, rng.sample(self.labels, len(found.options)), strict=True))
        segments, content, used = [], [], set()
        shown: list[str] = []
        while len(segments) <= DEMONSTRATIONS:
            # behind the first ones any that was shown is as likely: what is asked for can be known
            label = rng.choice(found.options if len(shown) < SHOWN else sorted(set(shown)))
            texts = found.texts[label]
            text = rng.choice(texts)
            if text in used and not used.issuperset(texts):
                continue
            used.add(text)
            shown.append(label)
            head = (*self._encoded(text)[:TEXT], *self._encoded("\nLabel:"))
            answer = self._encoded(f" {names[label]}")
            segments.append((*head, *answer, *self._encoded("\n")))
            content.append((len(head), len(head) + len(answer)))
        return ConversationRow(task, tuple(segments), tuple(content), answers(content))

    @cache  # noqa: B019
    def _encoded(self, text: str) -> tuple[int, ...]:
        return tuple(self.tokenizer.encode(text[:80], add_special_tokens=False))

    def draw(self, rng: random.Random) -> ConversationRow:
        return self.row(rng.choice(TRAIN_TASKS), "train", rng)

    def held_out(self, split: HeldOut, limit: int) -> list[ConversationRow]:
        names = TEST_TASKS if split == "test" else TRAIN_TASKS
        return [self.row(names[k % len(names)], split, random.Random(f"{split} {k}")) for k in range(limit)]


# ---------------------------------------------------------------------- the model


def new_model() -> T5ForConditionalGeneration:
    torch.manual_seed(0)
    config = T5Config(
        vocab_size=WORDS,
        d_model=96,
        d_kv=24,
        d_ff=192,
        num_layers=2,
        num_decoder_layers=2,
        num_heads=4,
        dropout_rate=0.0,
        feed_forward_proj="gated-gelu",
        pad_token_id=0,
        eos_token_id=1,
        decoder_start_token_id=0,
    )
    return T5ForConditionalGeneration(config)


def batch_of(rows: list[ConversationRow], rng: random.Random, most: int) -> dict[str, Tensor]:
    """Rows cut behind a question that comes after ``most`` demonstrations or fewer, and the label."""
    read, words = [], []
    j = rng.randrange(SHOWN, most + 1)  # the same for all, so that nothing is padded
    for row in rows:
        start, stop = row.content[j]
        read.append([*sum(row.segments[:j], ()), *row.segments[j][:start]])
        words.append([*row.segments[j][start:stop]])
    return {
        "input_ids": padded(read, 0),
        "attention_mask": padded([[1] * len(ids) for ids in read], 0),
        "labels": padded(words, -100),
    }


def padded(rows: list[list[int]], fill: int) -> Tensor:
    width = max(map(len, rows))
    return torch.tensor([row + [fill] * (width - len(row)) for row in rows])


def train_base(folder: Path, tokenizer: Any, schedule: Schedule) -> dict[str, float]:
    """The model from nothing, its log in ``base.json``; resumes from ``state.pt``."""
    done = folder / "base.json"
    if done.is_file():
        return json.loads(done.read_text())
    model, source = new_model(), RelabelledTasks(tokenizer)
    inner = [p for name, p in model.named_parameters() if name != "shared.weight"]
    # T5's words are ten times as large as its matrices, and learn as much faster
    groups = [{"params": [model.shared.weight], "rate": 1e-2}, {"params": inner, "rate": 3e-3}]
    optimizer = torch.optim.AdamW(groups, betas=(0.9, 0.98), weight_decay=0.01)
    step, seconds, losses, state = 0, 0.0, [], folder / "state.pt"
    if state.is_file():
        saved = torch.load(state)
        model.load_state_dict(saved["model"])
        optimizer.load_state_dict(saved["optimizer"])
        step, seconds, losses = saved["step"], saved["seconds"], saved["losses"]
    while step < schedule.base:
        began, rng = time.monotonic(), random.Random(step)
        most = 3 if step < 0.7 * schedule.base else DEMONSTRATIONS  # short ones first
        batch = batch_of([source.draw(rng) for _ in range(schedule.batch)], rng, most)
        for group in optimizer.param_groups:
            warm, progress = min(1.0, (step + 1) / 50), step / schedule.base
            group["lr"] = group["rate"] * warm * (0.05 + 0.95 * 0.5 * (1 + math.cos(math.pi * progress)))
        loss = model(**batch).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        step, seconds = step + 1, seconds + time.monotonic() - began
        losses.append(loss.item())
        if step % 25 == 0:
            print(f"base {step} loss {sum(losses[-25:]) / 25:.3f} {seconds:.0f} s", flush=True)
            torch.save(
                {
                    "model": model.state_dict(),
                    "optimizer": optimizer.state_dict(),
                    "step": step,
                    "seconds": seconds,
                    "losses": losses,
                },
                state,
            )
    model.save_pretrained(folder / "base")
    tokenizer.save_pretrained(folder / "base")
    log = {
        "steps": step,
        "seconds": round(seconds),
        "parameters": sum(p.numel() for p in model.parameters()),
        "loss": round(sum(losses[-50:]) / min(50, len(losses)), 4),
    }
    write_atomically(done, json.dumps(log).encode())
    return log


# ---------------------------------------------------------------------- the memory

#: Rules, and how long their adapters are trained.
RULES = {"concat": 300, "mean": 160}


def adapter_of(rule: str, folder: Path, schedule: Schedule) -> Path:
    """An adapter for the model, trained by the library's own trainer; resumes where it was stopped."""
    model, tokenizer = ccm.load_model(str(folder / "base"))
    config = TrainConfig(
        model=str(folder / "base"),
        compressor=CompressorConfig(slots=2, rule=rule, sink=0, rank=16, alpha=32, target_modules="all"),
        data={"relabelled": {}},
        objective="distill",
        recall_from="teacher",
        steps=min(RULES[rule], schedule.adapter),
        rows=10,
        tokens_per_batch=10 * 256,
        lr=3e-3,
        eval_every=150,
        eval_rows=32,
        bf16=False,
    )
    trainer = Trainer(model, tokenizer, config, folder / rule)
    trainer.run(lambda report: print(rule, report, flush=True) if report["step"] % 5 == 0 else None)
    trainer.close()
    return trainer.adapter


@torch.no_grad()
def measured(
    rows: list[ConversationRow], engine: Written, full: bool = False, alone: bool = False
) -> list[dict[str, Any]]:
    """Per row NLL (nats) and right answers, of the labels behind the fourth."""
    reader, found = engine.compressor, []
    for row in rows:
        scored = scored_from(marked(row), 4)
        parts = [scored.part(j, j + 1) for j in range(4, len(row.segments))] if alone else [scored]
        arrays = [ArrayRow.from_row(part.flat() if full else part) for part in parts]
        got = engine.run(engine.prepare(arrays))
        logits = reader.head(got.student).float()
        found.append(
            {
                "task": row.conversation,
                "nll": float(torch.nn.functional.cross_entropy(logits, got.ids, reduction="sum")),
                "right": int((logits.argmax(-1) == got.ids).sum()),
                "labels": len(got.ids),
            }
        )
    return found


def interval(
    own: list[dict[str, Any]], none: list[dict[str, Any]], full: list[dict[str, Any]]
) -> dict[str, Any]:
    """Means, and 95 % intervals of what lies between the method and full context, by resampling rows."""
    picks = torch.randint(len(own), (DRAWS, len(own)), generator=torch.Generator().manual_seed(0))

    def column(rows: list[dict[str, Any]], name: str) -> Tensor:
        return torch.tensor([row[name] for row in rows], dtype=torch.float64)

    def between(values: Tensor) -> list[float]:
        low, high = values.quantile(torch.tensor([0.025, 0.975], dtype=torch.float64)).tolist()
        return [round(low, 4), round(high, 4)]

    labels = column(own, "labels")[picks].sum(1)
    nll = {name: column(rows, "nll") for name, rows in (("own", own), ("none", none), ("full", full))}
    right = column(own, "right") - column(full, "right")
    n, f, o = (nll[name][picks].sum(1) for name in ("none", "full", "own"))
    total = sum(row["labels"] for row in own)
    return {
        "nll": round(float(nll["own"].sum()) / total, 4),
        "accuracy": round(sum(row["right"] for row in own) / total, 4),
        "recovered_share": round(
            float((nll["none"] - nll["own"]).sum() / (nll["none"] - nll["full"]).sum()), 4
        ),
        "recovered_share_interval": between((n - o) / (n - f)),
        "accuracy_less_full_interval": between(right[picks].sum(1) / labels),
    }


def evaluate(folder: Path, rows: int, rules: list[str]) -> dict[str, Any]:
    tokenizer = make_tokenizer(folder)
    found = RelabelledTasks(tokenizer).held_out("test", rows)
    result: dict[str, Any] = {}
    references: dict[str, list[dict[str, Any]]] = {}
    for rule in rules:
        model, _ = ccm.load_model(str(folder / "base"))
        compressor = Compressor.from_pretrained(model, folder / rule / "adapter")
        engine = Written(compressor)
        if not references:
            references = {
                "none": measured(found, engine, alone=True),
                "full": measured(found, engine, full=True),
            }
            for name, own in references.items():
                result[name] = interval(own, references["none"], references["full"])
        result[rule] = interval(measured(found, engine), references["none"], references["full"])
        memory = None
        for segment in found[0].segments[:-1]:
            memory = compressor.compress([segment], memory)
        tokens = sum(map(len, found[0].segments[:-1]))
        whole = tokens * compressor.kv_bytes_per_token()
        result[rule] |= {
            "kv_bytes": memory.nbytes,
            "full_kv_bytes": whole,
            "less": round(whole / memory.nbytes, 2),
        }
    return result


def main() -> None:
    arguments = parser(__doc__.partition("\n")[0])
    arguments.add_argument("--small", action="store_true", help="a few steps of everything")
    given = arguments.parse_args()
    torch.set_num_threads(given.threads)
    schedule = Schedule(base=50, adapter=20) if given.small else Schedule()
    folder = RUNS / ("small" if given.small else "whole")
    folder.mkdir(parents=True, exist_ok=True)
    base = train_base(folder, make_tokenizer(folder), schedule)
    logs: dict[str, Any] = {}
    rows = given.limit or (16 if given.small else ROWS)
    for rule in RULES:
        adapter_of(rule, folder, schedule)
        logs[rule] = json.loads((folder / rule / "adapter" / "training.json").read_text())["report"]
        result = {"base": base, "training": logs, "rows": rows, "methods": evaluate(folder, rows, list(logs))}
        if given.small:
            print(json.dumps(result, indent=1))
        else:
            store("encoder_decoder", result)


if __name__ == "__main__":
    main()
