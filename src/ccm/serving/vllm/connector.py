"""The part that runs inside vLLM: memories as the KV of a placeholder prefix.

    vllm serve MODEL --kv-transfer-config '{"kv_connector": "MemoryConnector", "kv_role": "kv_consumer",
        "kv_connector_module_path": "ccm.serving.vllm.connector",
        "kv_connector_extra_config": {"store": "postgresql://host/ccm"}}'

vLLM makes one connector in its scheduler, which says how many tokens of a prompt are already there, and one in every
worker, which loads them. Memories are read by threads while other requests go on, and written into the cache between
two steps. A request that is preempted asks again and gets the same, because versions never change.
"""

from __future__ import annotations

import logging
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import torch

from ...core.memory import KV
from ...errors import CCMError, ConfigError, MissingPackageError, UnsupportedModelError
from ..store import open_store
from .checkpoint import Checkpoint
from .loader import Loader, heads_of
from .reference import Reference, check_version

try:
    import vllm
    from vllm.distributed import get_tensor_model_parallel_rank
    from vllm.distributed.kv_transfer.kv_connector.v1.base import (
        KVConnectorBase_V1,
        KVConnectorMetadata,
        KVConnectorRole,
        KVConnectorTransferResults,
    )
    from vllm.model_executor.models.utils import extract_layer_index
except ImportError as error:
    raise MissingPackageError(
        f"{error}: this module runs inside vLLM, name it in vLLM's own environment (docs/scaling.md)"
    ) from error

if TYPE_CHECKING:
    from vllm.config import VllmConfig
    from vllm.v1.core.kv_cache_manager import KVCacheBlocks
    from vllm.v1.core.sched.output import SchedulerOutput
    from vllm.v1.kv_cache_interface import KVCacheConfig
    from vllm.v1.request import Request

log = logging.getLogger(__name__)

#: Memories that one worker reads at once.
_READERS = 4


@dataclass(frozen=True)
class Load:
    """What a worker has to do for one request.

    Attributes:
        request: its id.
        reference: the memory.
        start: tokens of it that are in the cache already.
        blocks: of the request's prompt, in order.
    """

    request: str
    reference: Reference
    start: int
    blocks: tuple[int, ...]


@dataclass
class Plan(KVConnectorMetadata):
    """What the scheduler tells the workers for one step: loads to begin, and requests to fail."""

    loads: list[Load] = field(default_factory=list)
    refused: set[str] = field(default_factory=set)


class MemoryConnector(KVConnectorBase_V1):
    """Loads memories; it saves nothing.

    Raises:
        ConfigError: a release of vLLM, or a setting, that it cannot work with.
        UnsupportedModelError: the model cannot read memories.
        StorageError, MissingPackageError: the store cannot be opened.
    """

    def __init__(self, vllm_config: VllmConfig, role: KVConnectorRole, kv_cache_config: KVCacheConfig):
        check_version(vllm.__version__)
        super().__init__(vllm_config, role, kv_cache_config)
        settings = self._kv_transfer_config
        if settings.kv_load_failure_policy != "fail":
            raise ConfigError(
                f"kv_load_failure_policy: got {settings.kv_load_failure_policy!r}, expected 'fail': without its "
                "memory a request would be answered from placeholders"
            )
        url = settings.get_from_extra_config("store", None)
        if not url:
            raise ConfigError(
                'kv_connector_extra_config: expected {"store": URL}, the store that ccm writes to'
            )
        self._block = vllm_config.cache_config.block_size
        self._plan = Plan()
        self._wanted: dict[str, Reference] = {}
        if role == KVConnectorRole.WORKER:
            self._loader = self._make_loader(url)
            self._pool = ThreadPoolExecutor(_READERS, thread_name_prefix="ccm-load")
            self._running: list[tuple[Load, Future[KV]]] = []
            self._failed: set[str] = set()

    def _make_loader(self, url: str) -> Loader:
        model, parallel = self._vllm_config.model_config, self._vllm_config.parallel_config
        checkpoint = Checkpoint(model.model, model.hf_text_config)
        heads = heads_of(
            get_tensor_model_parallel_rank(), parallel.tensor_parallel_size, model.get_total_num_kv_heads()
        )
        return Loader(
            open_store(url), checkpoint.rotary(model.dtype), model.dtype, checkpoint.fingerprint(), heads
        )

    # ------------------------------------------------------------------ in the scheduler

    def get_num_new_matched_tokens(
        self, request: Request, num_computed_tokens: int
    ) -> tuple[int | None, bool]:
        """Tokens of the memory that are still to be loaded, and whether a worker loads them meanwhile."""
        try:
            reference = self._checked(request)
        except CCMError as error:
            log.error("request %s is refused: %s", request.request_id, error)
            self._plan.refused.add(request.request_id)
            request.skip_reading_prefix_cache = False
            return 1, True  # it fails as a load does
        if reference is None or reference.length <= num_computed_tokens:
            return 0, False
        request.skip_reading_prefix_cache = False  # else vLLM computes the placeholders themselves
        self._wanted[request.request_id] = reference
        return reference.length - num_computed_tokens, True

    def _checked(self, request: Request) -> Reference | None:
        reference = Reference.of(request.kv_transfer_params)
        if reference is None:
            return None
        if request.cache_salt != reference.salt:
            raise ConfigError(
                "cache_salt: expected the salt of the memory, so that nobody else reads its cache"
            )
        if reference.length >= request.num_prompt_tokens:
            raise ConfigError(
                f"the prompt has {request.num_prompt_tokens} tokens for a memory of {reference.length}: at least one "
                "more is needed"
            )
        if request.sampling_params is None or request.sampling_params.prompt_logprobs is not None:
            raise ConfigError("prompt_logprobs: placeholders have none; ask for logprobs of the answer")
        return reference

    def update_state_after_alloc(
        self, request: Request, blocks: KVCacheBlocks, num_external_tokens: int
    ) -> None:
        """Blocks are there: let the workers load."""
        reference = self._wanted.pop(request.request_id, None)
        if reference is not None and num_external_tokens:
            start = reference.length - num_external_tokens
            ids = tuple(blocks.get_block_ids()[0])
            self._plan.loads.append(Load(request.request_id, reference, start, ids))

    def build_connector_meta(self, scheduler_output: SchedulerOutput) -> Plan:
        plan, self._plan = self._plan, Plan()
        return plan

    # ------------------------------------------------------------------ in a worker

    def register_kv_caches(self, kv_caches: dict[str, torch.Tensor]) -> None:
        """Look at the layers of this worker.

        Raises:
            UnsupportedModelError: some of them forget what is far back, that is, the memory.
        """
        context = self._vllm_config.model_config.max_model_len
        layers = self._vllm_config.compilation_config.static_forward_context
        self._layers = {extract_layer_index(name): layers[name] for name in kv_caches}
        windows = [w for layer in self._layers.values() if (w := getattr(layer, "sliding_window", None))]
        if windows and min(windows) < context:
            raise UnsupportedModelError(
                f"a layer's sliding window of {min(windows)} tokens would lose the memory: start vLLM with "
                f"--max-model-len {min(windows)} or less"
            )

    def start_load_kv(self, forward_context: Any, **kwargs: Any) -> None:
        plan = self._get_connector_metadata()
        assert isinstance(plan, Plan)
        self._failed |= plan.refused
        for load in plan.loads:
            self._running.append((load, self._pool.submit(self._loader.load, load.reference)))

    def get_transfer_results(self, finished_req_ids: set[str]) -> KVConnectorTransferResults:
        """Write what was read, and say which requests can go on and which have failed."""
        failed, self._failed = self._failed, set()
        done = [(load, future) for load, future in self._running if future.done()]
        self._running = [(load, future) for load, future in self._running if not future.done()]
        for load, future in done:
            try:
                self._write(load, future.result())
            except Exception as error:  # whatever it is, no answer may be made without the memory
                log.error("memory %s was not loaded: %s", load.reference, error)
                failed.add(load.request)
        finished = failed | {load.request for load, _ in done}
        return KVConnectorTransferResults(finished_recving=finished, failed_recving=failed)

    def _write(self, load: Load, kv: KV) -> None:
        position = torch.arange(load.start, load.reference.length)
        slots = torch.tensor(load.blocks)[position // self._block] * self._block + position % self._block
        for index, layer in self._layers.items():
            cache = layer.kv_cache
            keys, values = (
                states[index, :, load.start :].transpose(0, 1).contiguous().to(cache.device)  # (T, H, D)
                for states in kv
            )
            layer.impl.do_kv_cache_update(layer, keys, values, cache, slots.to(cache.device))

    def shutdown(self) -> None:
        if self.role == KVConnectorRole.WORKER:
            self._pool.shutdown(cancel_futures=True)
            self._loader.store.close()

    # ------------------------------------------------------------------ nothing is saved

    def wait_for_layer_load(self, layer_name: str) -> None:
        return

    def save_kv_layer(
        self, layer_name: str, kv_layer: torch.Tensor, attn_metadata: Any, **kwargs: Any
    ) -> None:
        return

    def wait_for_save(self) -> None:
        return
