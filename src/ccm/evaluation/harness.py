"""lm-evaluation-harness through a context memory: demonstrations are folded one by one, the question stays raw.

    python -m ccm.evaluation.harness --model ccm --model_args method=ccm-concat --tasks arc_easy --num_fewshot 8

is ``lm_eval`` with a model named ``ccm``. From Python, after ``import ccm.evaluation.harness``::

    lm_eval.simple_evaluate(model="ccm", model_args={"method": "ccm-concat"}, tasks=["arc_easy"], num_fewshot=8)

Where one demonstration ends and the next begins, the harness does not tell its models. It is known exactly with
``--apply_chat_template --fewshot_as_multiturn``, from the roles of the messages. Otherwise the text is cut behind
every ``delimiter`` (the harness's own default, an empty line), and the rest is the question. So a demonstration with
an empty line inside arrives as two segments, and of a question with one only what follows it stays raw; a warning
says when the requests of a task have different numbers of segments, which is how this shows.
"""

from __future__ import annotations

import itertools
import logging
import sys
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from ..errors import CCMError, ConfigError, MissingPackageError
from ..methods import Run
from ..methods.default import DEFAULT, named
from ..methods.spec import parse
from ..models.options import Loading
from ..models.placement import AUTO
from .protocol import SAME

try:
    from lm_eval.api.instance import Instance
    from lm_eval.api.registry import register_model
    from lm_eval.models.huggingface import HFLM
    from lm_eval.models.utils import (
        handle_stop_sequences,
        normalize_gen_kwargs,
        postprocess_generated_text,
    )
    from lm_eval.models.utils_hf import stop_sequences_criteria
except ImportError as error:
    needed = f"the harness needs lm-eval ({error}): pip install 'compressed-context-memory[eval]'"
    if __name__ == "__main__":
        print(f"error: {needed}", file=sys.stderr)
        sys.exit(2)
    raise MissingPackageError(needed) from error

log = logging.getLogger(__name__)

Ids = tuple[int, ...]


@register_model("ccm")
class ContextMemoryLM(HFLM):
    """A model of the harness whose few-shot demonstrations go through a context memory.

    Requests are run one at a time. Those with the same demonstrations one after another fold them once.

    Args:
        pretrained: folder or hub id of a causal language model, or the model itself; None is the embedded one.
        tokenizer: of a model that is given itself.
        memory: as it is written everywhere (``ccm.methods.spec``), such as snapkv:tokens=64; ``method`` is the same.
            Without either it is ``adapter``, or the best for the model.
        delimiter: text that ends a demonstration; ``\\n`` may be written as backslash and n.
        segment: tokens of a segment when a whole text is scored (``loglikelihood_rolling``).
        device: where a model is loaded to; what there is if it is a CUDA device and there is none.
        dtype, load_in, device_map: as for ``load_model``.
        batch_size, max_batch_size: taken for the harness's sake; there is one request at a time.
        **options: of the method, such as ``adapter``, ``slots`` or ``window``.

    Raises:
        UnknownNameError: no such method.
        ConfigError: an option that it does not have, or a delimiter or segment that cannot be used.
    """

    def __init__(
        self,
        pretrained: Any = None,
        tokenizer: Any = None,
        memory: str | None = None,
        method: str | None = None,
        delimiter: str = "\n\n",
        segment: int = 64,
        device: str | None = None,
        dtype: str = AUTO,
        load_in: str | None = None,
        device_map: str | None = None,
        batch_size: int | str | None = None,
        max_batch_size: int | None = None,
        **options: Any,
    ) -> None:
        spec = parse(memory or method or options.pop("adapter", DEFAULT))
        spec = replace(spec, options={**spec.options, **options})
        if spec.name != DEFAULT:
            spec.method()  # what is wrong shows before anything is loaded
        self.delimiter = delimiter.replace("\\n", "\n")
        self.segment = segment
        if not self.delimiter or segment < 1:
            raise ConfigError(
                f"delimiter is {delimiter!r} and segment {segment}, expected a text and at least 1"
            )
        if pretrained is None or isinstance(pretrained, str):
            # the harness asks for cuda:0 unless it is told otherwise, and its own class takes what there is
            absent = str(device).startswith("cuda") and not torch.cuda.is_available()
            where = AUTO if absent or device is None or device_map else str(device)
            pretrained, tokenizer = Loading(pretrained, where, dtype, load_in, device_map).load()
        super().__init__(pretrained=pretrained, tokenizer=tokenizer, backend="causal", batch_size=1)
        self.spec = named(spec, self.model)
        self.context_method = self.spec.method()
        self.folded = 0
        self._ends: dict[str, list[int]] = {}  # of demonstrations, in contexts made by the chat template
        self._held: tuple[tuple[Ids, ...], Run] | None = None

    # ------------------------------------------------------------------ what the harness calls

    def apply_chat_template(
        self, chat_history: list[dict[str, str]], add_generation_prompt: bool = True
    ) -> str:
        """As ever; where demonstrations are turns of their own, their ends are kept in mind."""
        text = super().apply_chat_template(chat_history, add_generation_prompt)
        ends = []
        last = max(i for i, message in enumerate(chat_history) if message["role"] == "user")
        for k, message in enumerate(chat_history[:last], 1):
            if message["role"] == "assistant":
                before = self.tokenizer.apply_chat_template(chat_history[:k], tokenize=False)
                if text.startswith(before):
                    ends.append(len(before))
        if ends:
            self._ends[text] = ends
        return str(text)

    def loglikelihood(self, requests: list[Instance], disable_tqdm: bool = False) -> list[tuple[float, bool]]:
        """See ``lm_eval.api.model.LM``. Raises ConfigError unless the memory is used."""
        self._check(requests)
        return super().loglikelihood(requests, disable_tqdm=disable_tqdm)

    def _loglikelihood_tokens(
        self, requests: list[tuple[tuple[str, str], list[int], list[int]]], *args: Any, **kwargs: Any
    ) -> list[tuple[float, bool]]:
        results = []
        for (context, continuation), ids, targets in requests:
            run, live = self._read(context, ids)
            logits = run.logits([*live, *targets[:-1]], len(live))[-len(targets) :]
            results.append(_score(logits, targets))
            self.cache_hook.add_partial("loglikelihood", (context, continuation), results[-1])
        return results

    def generate_until(self, requests: list[Instance], disable_tqdm: bool = False) -> list[str]:
        """See ``lm_eval.api.model.LM``. Raises ConfigError unless the memory is used."""
        self._check(requests)
        end = self.tok_decode(self.eot_token_id, skip_special_tokens=False)
        results = []
        for request in requests:
            context, settings = request.args
            options: dict[str, Any] = dict(normalize_gen_kwargs(settings, self.max_gen_toks))
            until = handle_stop_sequences(options.pop("until", None), eos=end)
            if not options.get("do_sample"):
                options.pop("temperature", None)
            run, live = self._read(context, self.tok_encode(context))
            ids = run.reader.generate(
                [live],
                run.recall([live]),
                max_new_tokens=options.pop("max_gen_toks"),
                stopping_criteria=stop_sequences_criteria(self.tokenizer, until, len(live), 1),
                pad_token_id=self.tokenizer.pad_token_id,
                **options,
            )
            text = self.tok_decode(ids[0, len(live) :].tolist())
            results.append(postprocess_generated_text(text, until, None))
            self.cache_hook.add_partial("generate_until", request.args, results[-1])
        return results

    def loglikelihood_rolling(self, requests: list[Instance], disable_tqdm: bool = False) -> list[float]:
        """A text as a stream: each segment is scored, then folded; its last token stays raw for the next one.

        Raises:
            ConfigError: no text is longer than a segment, so nothing would be folded.
        """
        texts = [self.tok_encode(request.args[0]) for request in requests]
        if max(map(len, texts)) <= self.segment and not self._is_bare():
            raise ConfigError(
                f"no text is longer than one segment of {self.segment} tokens, so the memory would not be used; "
                "give a smaller segment or longer texts"
            )
        results = []
        for request, ids in zip(requests, texts, strict=True):
            run, live, total = self._open(), [self.prefix_token_id], 0.0
            for k in range(0, len(ids), self.segment):
                part = ids[k : k + self.segment]
                logits = run.logits([*live, *part[:-1]], len(live))[-len(part) :]
                total += _score(logits, part)[0]
                if k + self.segment < len(ids):
                    run.append([*live, *part[:-1]])
                    self.folded += 1
                    live = part[-1:]
            results.append(total)
            self.cache_hook.add_partial("loglikelihood_rolling", request.args, total)
        return results

    def get_model_info(self) -> dict[str, Any]:
        """What the harness stores beside its results; the number of folded segments is among it."""
        about = {"method": self.spec.text, **self.spec.options, "segments_folded": self.folded}
        return {**super().get_model_info(), "context_memory": about}

    # ------------------------------------------------------------------ the memory

    def _open(self) -> Run:
        return self.context_method.open(self.model, self.tokenizer)

    def _is_bare(self) -> bool:
        return self.spec.name == "none"

    def _read(self, context: str, ids: Sequence[int]) -> tuple[Run, list[int]]:
        """What the demonstrations of a context became, and the question's tokens."""
        segments, live = self._split(context, ids)
        if self._held is None or self._held[0] != segments:
            run = self._open()
            for segment in segments:
                run.append(segment)
            self.folded += 0 if self._is_bare() else len(segments)
            self._held = segments, run
        return self._held[1].fork(), list(live)

    def _split(self, context: str, ids: Sequence[int]) -> tuple[tuple[Ids, ...], Ids]:
        """Cut the tokens of a context; one that reaches over the end of a demonstration goes to what follows.

        Returns:
            the segments to be folded, and what stays raw: at least one token.
        """
        cuts = []
        for end in self._ends.get(context) or _ends(context, self.delimiter):
            head = self.tok_encode(context[:end])
            same = next((i for i, (a, b) in enumerate(zip(head, ids, strict=False)) if a != b), len(head))
            cuts.append(min(same, len(ids) - 1))
        bounds = sorted({0, *cuts})
        segments = tuple(tuple(ids[a:b]) for a, b in itertools.pairwise(bounds))
        return segments, tuple(ids[bounds[-1] :])

    def _check(self, requests: Sequence[Instance]) -> None:
        """Refuse a task on whose requests the memory has no part.

        Raises:
            ConfigError: nothing is folded, or what is folded changes nothing.
        """
        if self._is_bare():
            return
        tasks: dict[str, list[str]] = {}
        for request in requests:
            tasks.setdefault(str(request.task_name), []).append(request.args[0])
        for task, contexts in tasks.items():
            split = [
                self._split(context, self.tok_encode(context))
                for context in dict.fromkeys(contexts)
                if context
            ]
            folded = [(segments, live) for segments, live in split if segments]
            if not folded:
                raise ConfigError(
                    f"task {task}: no request has a demonstration that ends with {self.delimiter!r}, so nothing "
                    "would be folded. If it is zero-shot, give --num_fewshot; if its demonstrations end otherwise, "
                    "give delimiter=... in --model_args, or --apply_chat_template --fewshot_as_multiturn"
                )
            counts = sorted({len(segments) for segments, _ in folded})
            if len(counts) > 1 or len(folded) < len(split):
                log.warning(
                    "task %s: requests have %s to %s segments: %r stands inside demonstrations or questions too",
                    task, counts[0] if len(folded) == len(split) else 0, counts[-1], self.delimiter,
                )  # fmt: skip
            segments, live = folded[0]
            run = self._open()
            for segment in segments:
                run.append(segment)
            own, other = (held.logits(live, len(live))[-1] for held in (run, self._open()))
            changed = float((own - other).abs().max())
            if changed <= SAME:
                raise ConfigError(
                    f"task {task}: {self.spec.text} folded {len(segments)} segments, but the model's answer is the "
                    f"same as without them (logits differ by {changed:.1e}); is the adapter trained?"
                )


def _ends(text: str, delimiter: str) -> list[int]:
    """Where each delimiter ends, but for one at the very end."""
    ends = []
    start = text.find(delimiter)
    while start >= 0:
        ends.append(start + len(delimiter))
        start = text.find(delimiter, ends[-1])
    return [end for end in ends if text[end:].strip()]


def _score(logits: Tensor, targets: Sequence[int]) -> tuple[float, bool]:
    """Log-likelihood of target tokens under logits (T, V), and whether each is the likeliest."""
    ids = torch.as_tensor(targets, device=logits.device)
    total = -torch.nn.functional.cross_entropy(logits.float(), ids, reduction="sum")
    return float(total), bool((logits.argmax(-1) == ids).all())


def main() -> int:
    """The harness's own command line, with ``--model ccm``. Returns 0, or 2 on bad input to this model."""
    from lm_eval.__main__ import cli_evaluate

    try:
        cli_evaluate()
    except CCMError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
