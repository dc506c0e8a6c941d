"""What a store refuses. Damaged data raise ``MemoryFileError`` and failed writes ``StorageError`` (ccm.errors)."""

from __future__ import annotations

from ...errors import CCMError


class NotFoundError(CCMError, LookupError):
    """No such session or version of this tenant; another tenant's looks exactly the same."""


class ConflictError(CCMError):
    """Somebody else wrote first; nothing was changed.

    Attributes:
        version: the version that is there now; 0 for a session without one.
    """

    def __init__(self, message: str, version: int):
        super().__init__(message)
        self.version = version


class QuotaError(CCMError):
    """A limit of the tenant is reached; nothing was changed."""
