"""The contender of ``ccm bench`` that runs vLLM, in its environment."""

from __future__ import annotations

from tiny import tiny_model
from vllm_servers import PYTHON

from ccm.bench.run import working


def test_a_turn_behind_a_prefix_that_is_cached(tmp_path, tokenizer):
    shape = {"vocab_size": len(tokenizer), "max_position_embeddings": 8192, "head_dim": 32}
    tiny_model(**shape).save_pretrained(tmp_path)
    tokenizer.save_pretrained(tmp_path)
    with working(["vllm"], str(PYTHON), model=str(tmp_path), llama="default", threads=1) as (worker,):
        assert worker.about["packages"]["torch"] and len(worker.about["packages"]) == 2
        for tokens, blocks in ((100, 4), (640, 20)):
            found = worker.do("take", tokens=tokens)
            assert found["kv_bytes"] == blocks * 32 * 2 * 3 * 2 * 32 * 2 and found["read"] > 0
            turn = worker.do("turn")
            assert 0 < turn["first"] < turn["total"] and turn["between"] > 0
        assert worker.do("prefill")["prefill"] > 0
        assert worker.do("answer", count=4)["tokens_per_second"] > 0
