"""From a reference to keys and values that an engine can put into its cache."""

from __future__ import annotations

import torch

from ...core.memory import KV
from ...core.rotary import Rotary
from ...errors import ConfigError
from ...files.fingerprint import mismatch
from ..store import Store, codec
from .reference import Reference


class Loader:
    """Reads memories of one model from a store; may be used by several threads.

    Args:
        store: where they are.
        rotary: of the model, on the CPU.
        dtype: of the model.
        fingerprint: of the model.
        heads: the KV heads that this worker holds.
    """

    def __init__(self, store: Store, rotary: Rotary, dtype: torch.dtype, fingerprint: str, heads: slice):
        self.store, self.rotary, self.dtype = store, rotary, dtype
        self.fingerprint, self.heads = fingerprint, heads

    def load(self, reference: Reference) -> KV:
        """Keys, at positions 0..m-1, and values, both (L, H of this worker, m, D), on the CPU.

        Raises:
            NotFoundError: no such session or version.
            MismatchError: it was made by another model.
            ConfigError: it is longer or shorter than the reference says.
            StorageError, MemoryFileError: the store is not reachable, or the memory is damaged.
        """
        snapshot = self.store.get(reference.tenant, reference.session, reference.version)
        memory, _ = codec.decode(snapshot.payload)
        if memory.fingerprint.partition("-")[0] != self.fingerprint:
            raise mismatch(memory.fingerprint, self.fingerprint)
        if len(memory) != 1 or memory.length != reference.length:
            raise ConfigError(
                f"the memory takes {memory.length} positions, the request has {reference.length} placeholders for it"
            )
        placed = memory.rows[0].placed(self.rotary, self.dtype)
        return KV(placed.keys[:, self.heads], placed.values[:, self.heads])


def heads_of(rank: int, workers: int, heads: int) -> slice:
    """The KV heads of one tensor-parallel worker: an equal share, or, with fewer heads than workers, one of them."""
    if workers <= heads:
        share = heads // workers
        return slice(rank * share, (rank + 1) * share)
    head = rank * heads // workers
    return slice(head, head + 1)
