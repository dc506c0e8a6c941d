"""Shared set-up: offline hub, a fixed number of threads, and the embedded model loaded once."""

from __future__ import annotations

import os
from collections.abc import Iterator

os.environ.setdefault("HF_HUB_OFFLINE", "1")  # read when huggingface_hub is imported

import pytest
import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from ccm.models.load import load_default_model

pytest_plugins = ("stores",)  # the fixtures of every store

if threads := os.environ.get("OMP_NUM_THREADS"):
    torch.set_num_threads(int(threads))


@pytest.fixture(scope="session")
def embedded() -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """The embedded model (float32, CPU, frozen) and its tokenizer; tests must not change them."""
    return load_default_model()


@pytest.fixture
def one_thread() -> Iterator[None]:
    """Sums of floats depend on how many threads share them."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)
