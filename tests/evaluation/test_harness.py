"""lm-evaluation-harness through a context memory, on tiny models and a task made here."""

from __future__ import annotations

import importlib
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from runs import environment
from tiny import scramble, tiny_model, tiny_tokenizer
from transformers import PreTrainedModel

from ccm.core.compressor import Compressor, CompressorConfig
from ccm.errors import ConfigError, MissingPackageError, UnknownNameError

lm_eval = pytest.importorskip("lm_eval")
from lm_eval.api.instance import Instance  # noqa: E402
from lm_eval.models.huggingface import HFLM  # noqa: E402
from lm_eval.tasks import TaskManager  # noqa: E402

from ccm.evaluation.harness import ContextMemoryLM, main  # noqa: E402

TOKENIZER = tiny_tokenizer()
LETTERS = "abcdef"


def model() -> PreTrainedModel:
    return tiny_model(vocab_size=len(TOKENIZER), max_position_embeddings=1024)


def memory(method: str = "full", **options: Any) -> ContextMemoryLM:
    return ContextMemoryLM(model(), TOKENIZER, method, **options)


@pytest.fixture(scope="module")
def adapter(tmp_path_factory: pytest.TempPathFactory) -> str:
    folder = tmp_path_factory.mktemp("adapters") / "concat"
    scramble(Compressor(model(), CompressorConfig(slots=2, sink=0, rule="concat"))).save_pretrained(folder)
    return str(folder)


@pytest.fixture(scope="module")
def tasks(tmp_path_factory: pytest.TempPathFactory) -> dict[str, dict[str, Any]]:
    """A choice, a generation and a text to be scored, as the harness's own configurations."""
    folder = tmp_path_factory.mktemp("task")
    for split, count in (("train", 8), ("test", 3)):
        lines = [
            {
                "q": f"after {LETTERS[i % 5]}{split[0]}{i}",
                "a": i % 2,
                "text": "it went on and on " * 5 + str(i),
            }
            for i in range(count)
        ]
        (folder / f"{split}.jsonl").write_text("\n".join(map(json.dumps, lines)))
    common = {
        "dataset_path": "json",
        "dataset_kwargs": {
            "data_files": {split: str(folder / f"{split}.jsonl") for split in ("train", "test")},
            "cache_dir": str(folder / "cache"),
        },
        "training_split": "train",
        "fewshot_split": "train",
        "test_split": "test",
        "doc_to_text": "{{q}}:",
        "num_fewshot": 3,
        "metadata": {"version": 1},
    }
    choice = {
        **common, "task": "toy_choice", "output_type": "multiple_choice", "doc_to_choice": ["yes", "no"],
        "doc_to_target": "a", "metric_list": [{"metric": "acc"}],
    }  # fmt: skip
    generation = {
        **common, "task": "toy_generation", "output_type": "generate_until", "doc_to_target": "{{q}}",
        "generation_kwargs": {"until": ["\n\n", "z"], "max_gen_toks": 6}, "metric_list": [{"metric": "exact_match"}],
    }  # fmt: skip
    rolling = {
        **common, "task": "toy_rolling", "output_type": "loglikelihood_rolling", "doc_to_text": "",
        "doc_to_target": "{{text}}", "num_fewshot": 0, "metric_list": [{"metric": "word_perplexity"}],
    }  # fmt: skip
    return {task["task"]: task for task in (choice, generation, rolling)}


def run(lm: Any, *tasks: dict[str, Any], **options: Any) -> dict[str, Any]:
    """All samples of an evaluation: task -> what the model answered to each request."""
    results = lm_eval.simple_evaluate(
        lm, tasks=[dict(task) for task in tasks], bootstrap_iters=0, task_manager=TaskManager(include_defaults=False),
        **options,
    )  # fmt: skip
    return {
        name: [(sample["arguments"], sample["resps"]) for sample in samples]
        for name, samples in results["samples"].items()
    } | {"config": results["config"]}


def numbers(answers: list[Any]) -> torch.Tensor:
    """Log-likelihoods of all requests."""
    found = [resp[0] for _, resps in answers for resp in resps]
    return torch.tensor([one[0] if isinstance(one, tuple) else one for one in found])


# ---------------------------------------------------------------------- equal to the harness's own class


def test_without_the_harness_the_command_is_one_line_and_code_2() -> None:
    script = "import runpy, sys; sys.modules['lm_eval'] = None; runpy.run_module({!r}, run_name='__main__')"
    command = [sys.executable, "-c", script.format("ccm.evaluation.harness")]
    done = subprocess.run(command, env=environment(), capture_output=True, text=True)
    assert done.returncode == 2 and done.stderr.startswith("error: the harness needs lm-eval"), done.stderr
    assert len(done.stderr.splitlines()) == 1


def test_full_context_equals_the_plain_model(tasks: dict[str, dict[str, Any]]) -> None:
    ours = run(memory(), *tasks.values())
    plain = run(HFLM(pretrained=model(), tokenizer=TOKENIZER, backend="causal"), *tasks.values())
    shortened = run(memory("streaming-llm", sink=1, window=12), *tasks.values())
    for name in tasks:
        assert [asked for asked, _ in ours[name]] == [asked for asked, _ in plain[name]]
    for name in ("toy_choice", "toy_rolling"):
        a, b, c = (numbers(answers[name]) for answers in (ours, plain, shortened))
        assert torch.allclose(a, b, rtol=1e-5)
        assert (a - c).abs().max() > 0.1, "a window that lost the demonstrations must differ"
    assert [r for _, r in ours["toy_generation"]] == [r for _, r in plain["toy_generation"]]
    assert [r for _, r in ours["toy_generation"]] != [r for _, r in shortened["toy_generation"]]


def test_with_a_chat_template_too(tasks: dict[str, dict[str, Any]]) -> None:
    chat = {
        "apply_chat_template": True,
        "fewshot_as_multiturn": True,
        "system_instruction": "Be brief.\n\nVery.",
    }
    ours = memory()
    found = run(ours, tasks["toy_choice"], tasks["toy_generation"], **chat)
    plain = HFLM(pretrained=model(), tokenizer=TOKENIZER, backend="causal")
    expected = run(plain, tasks["toy_choice"], tasks["toy_generation"], **chat)
    a, b = numbers(found["toy_choice"]), numbers(expected["toy_choice"])
    assert torch.allclose(a, b, rtol=1e-5)
    assert [r for _, r in found["toy_generation"]] == [r for _, r in expected["toy_generation"]]


# ---------------------------------------------------------------------- what is folded, what stays raw


def decoded(lm: ContextMemoryLM, context: str) -> tuple[list[str], str]:
    segments, live = lm._split(context, lm.tok_encode(context))
    return [TOKENIZER.decode(list(segment)) for segment in segments], TOKENIZER.decode(list(live))


def test_demonstrations_are_cut_behind_the_delimiter() -> None:
    lm = memory()
    assert decoded(lm, "Do it.\n\na: yes\n\nb: no\n\nc:") == (["Do it.\n\n", "a: yes\n\n", "b: no\n\n"], "c:")
    assert decoded(lm, "c:") == ([], "c:")
    assert decoded(lm, "a: yes\n\n") == ([], "a: yes\n\n")  # something has to stay
    assert decoded(memory(delimiter="\\n###\\n"), "a\n###\nb\n\nc") == (["a\n###\n"], "b\n\nc")


def test_turns_are_cut_exactly_where_demonstrations_end() -> None:
    lm = memory()
    turns = [
        ("system", "S"),
        ("user", "1\n\n1"),
        ("assistant", "A"),
        ("user", "2"),
        ("assistant", "B"),
        ("user", "3\n\n3"),
    ]
    context = lm.apply_chat_template([{"role": role, "content": text} for role, text in turns])
    segments, live = decoded(lm, context)
    assert len(segments) == 2 and "".join([*segments, live]) == context
    assert segments[0].endswith("A<|im_end|>\n") and segments[1].endswith("B<|im_end|>\n")
    assert "3\n\n3" in live


def test_only_the_question_is_raw_and_equal_demonstrations_are_folded_once(
    tasks: dict[str, dict[str, Any]], adapter: str
) -> None:
    lm = memory("ccm-concat", adapter=adapter)
    first_n = {**tasks["toy_choice"], "fewshot_config": {"sampler": "first_n"}}
    result = run(lm, first_n)
    assert lm.folded == 3  # the same three for all ten requests
    info = result["config"]["context_memory"]
    assert info == {"method": "ccm-concat", "adapter": adapter, "segments_folded": 3}
    context = result["toy_choice"][0][0][0][0]
    run_, live = lm._read(context, lm.tok_encode(context))
    assert run_.memory.slots == 6
    assert TOKENIZER.decode(live) == context.split("\n\n")[-1]


def test_a_compressed_memory_answers_by_its_slots(tasks: dict[str, dict[str, Any]], adapter: str) -> None:
    compressed = numbers(run(memory("ccm-concat", adapter=adapter), tasks["toy_choice"])["toy_choice"])
    bare = numbers(run(memory("none"), tasks["toy_choice"])["toy_choice"])
    full = numbers(run(memory("full"), tasks["toy_choice"])["toy_choice"])
    assert (compressed - bare).abs().max() > 1e-2
    assert (compressed - full).abs().max() > 1e-2


def test_a_stream_is_folded_segment_by_segment(tasks: dict[str, dict[str, Any]], adapter: str) -> None:
    lm = memory("ccm-concat", adapter=adapter, segment=20)
    text = "it went on and on " * 5
    lengths = len(lm.tok_encode(text))
    lm.loglikelihood_rolling([Instance("loglikelihood_rolling", {}, (text,), 0)])
    assert lm.folded == (lengths - 1) // 20
    with pytest.raises(ConfigError, match="longer than one segment of 20 tokens"):
        lm.loglikelihood_rolling([Instance("loglikelihood_rolling", {}, ("short",), 0)])


# ---------------------------------------------------------------------- refusals


def test_a_task_without_demonstrations_is_refused(tasks: dict[str, dict[str, Any]]) -> None:
    with pytest.raises(ConfigError, match=r"toy_choice: no request has a demonstration.*zero-shot"):
        run(memory(), {**tasks["toy_choice"], "num_fewshot": 0})
    with pytest.raises(ConfigError, match="ends with '###'"):
        run(memory(delimiter="###"), tasks["toy_generation"])
    run(memory("none"), {**tasks["toy_choice"], "num_fewshot": 0})  # has no memory to be used


def test_a_memory_that_changes_nothing_is_refused(tasks: dict[str, dict[str, Any]]) -> None:
    with pytest.raises(ConfigError, match="folded 3 segments, but the model's answer is the same"):
        run(memory("streaming-llm", sink=0, window=0), tasks["toy_choice"])


def test_questions_with_the_delimiter_inside_are_told(
    tasks: dict[str, dict[str, Any]], caplog: pytest.LogCaptureFixture
) -> None:
    requests = [
        Instance("loglikelihood", {}, (context, " yes"), 0, metadata=("toy", i, 1))
        for i, context in enumerate(("a: no\n\nb:", "a: no\n\nb\n\nb:"))
    ]
    lm = memory()
    lm.loglikelihood(requests[:1], disable_tqdm=True)
    assert "segments" not in caplog.text
    lm.loglikelihood(requests, disable_tqdm=True)
    assert "requests have 1 to 2 segments" in caplog.text


def test_an_adapter_alone_is_a_method(adapter: str) -> None:
    by_folder = ContextMemoryLM(model(), TOKENIZER, adapter=adapter, slots=1)
    assert by_folder.spec.name == adapter and by_folder.spec.options == {"slots": 1}
    assert ContextMemoryLM(model(), TOKENIZER, adapter="ccm-merge").spec.method().name == "ccm-merge"


def test_without_a_name_it_is_the_best_memory_for_the_model() -> None:
    assert ContextMemoryLM(model(), TOKENIZER).spec.text == "attention-matching"
    assert ContextMemoryLM(model(), TOKENIZER, "default:slots=8").spec.text == "attention-matching:slots=8"


def test_wrong_arguments_are_told_before_a_model_is_loaded() -> None:
    with pytest.raises(UnknownNameError, match="unknown method or adapter 'ccm-concatenate'"):
        ContextMemoryLM(method="ccm-concatenate")
    with pytest.raises(ConfigError, match="sluts"):
        ContextMemoryLM(method="ccm-concat", sluts=2)
    with pytest.raises(ConfigError, match="segment 0"):
        ContextMemoryLM(segment=0)


# ---------------------------------------------------------------------- the harness's own command line


@pytest.mark.slow  # the harness reads thousands of task files when it starts
def test_command_line(tmp_path: Path, tasks: dict[str, dict[str, Any]], adapter: str) -> None:
    home = tmp_path / "model"
    model().save_pretrained(home)
    TOKENIZER.save_pretrained(home)
    (tmp_path / "toy.yaml").write_text(json.dumps(tasks["toy_choice"]))  # JSON is YAML
    command = [
        sys.executable, "-m", "ccm.evaluation.harness", "--model", "ccm", "--tasks", "toy_choice", "--limit", "2",
        "--model_args", f"pretrained={home},method=ccm-concat,adapter={adapter},slots=1",
        "--include_path", str(tmp_path), "--output_path", str(tmp_path / "out.json"),
    ]  # fmt: skip
    done = subprocess.run(command, env=environment(), capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    (file,) = tmp_path.glob("out*.json")
    found = json.loads(file.read_text())
    assert found["config"]["context_memory"]["segments_folded"] > 0
    assert "acc,none" in found["results"]["toy_choice"]


def test_bad_input_is_one_line_and_exit_code_2(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("lm_eval.__main__.cli_evaluate", lambda: ContextMemoryLM(method="nothing"))
    assert main() == 2
    assert capsys.readouterr().err.startswith("error: unknown method or adapter 'nothing'")


def test_without_lm_eval_the_command_that_installs_it_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "lm_eval.api.instance", None)
    monkeypatch.delitem(sys.modules, "ccm.evaluation.harness")
    with pytest.raises(MissingPackageError, match=r"pip install 'compressed-context-memory\[eval\]'"):
        importlib.import_module("ccm.evaluation.harness")
