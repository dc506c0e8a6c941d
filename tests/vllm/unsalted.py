"""The connector without its check of the salt, for a test of what happens then."""

from __future__ import annotations

from typing import Any

from ccm.serving.vllm import connector
from ccm.serving.vllm.reference import Reference


class MemoryConnector(connector.MemoryConnector):
    def _checked(self, request: Any) -> Reference | None:
        return Reference.of(request.kv_transfer_params)
