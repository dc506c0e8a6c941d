"""How a request names the memory that it reads: ``kv_transfer_params``, and the ``cache_salt`` that goes with it."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any

from ...errors import ConfigError
from ..store.base import digest_of

#: The key in ``kv_transfer_params``.
KEY = "ccm"
#: Releases of vLLM that the connector is tested with; its interface changes from one to the next.
SUPPORTED = "0.32"


@dataclass(frozen=True)
class Reference:
    """One immutable memory in the store that ccm and vLLM share.

    Attributes:
        tenant, session, version: where it is.
        length: of the memory (m), and of the placeholder prefix of the prompt.
    """

    tenant: str
    session: str
    version: int
    length: int

    @property
    def salt(self) -> str:
        """``cache_salt`` of the request.

        vLLM shares the KV of equal prompts, and placeholders are equal whatever they stand for: without a salt of its
        own one memory would be read in place of another.
        """
        return digest_of("ccm", self.tenant, self.session, self.version)

    def params(self) -> dict[str, Any]:
        """``kv_transfer_params`` of the request."""
        return {KEY: asdict(self)}

    @classmethod
    def of(cls, params: Mapping[str, Any] | None) -> Reference | None:
        """What ``kv_transfer_params`` name; None if it is no memory.

        Raises:
            ConfigError: something else than :meth:`params` gives.
        """
        given = (params or {}).get(KEY)
        if given is None:
            return None
        kinds = {"tenant": str, "session": str, "version": int, "length": int}
        if not isinstance(given, dict) or {k: type(v) for k, v in given.items()} != kinds:
            raise ConfigError(f"kv_transfer_params[{KEY!r}]: expected {', '.join(kinds)}")
        reference = cls(**given)
        if reference.version < 1 or reference.length < 1:
            raise ConfigError(f"kv_transfer_params[{KEY!r}]: version and length begin at 1")
        return reference


def check_version(version: str) -> None:
    """Raises ConfigError for a release of vLLM that the connector is not tested with."""
    if version.split(".")[:2] != SUPPORTED.split("."):
        raise ConfigError(f"vLLM {version}: expected {SUPPORTED}.x, which this release of ccm is tested with")
