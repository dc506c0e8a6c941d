"""How a service keeps conversations."""

from __future__ import annotations

from dataclasses import dataclass

from ..errors import UnknownNameError
from .store import codec

#: What becomes of a turn whose client goes away.
DISCONNECT = ("drop", "keep", "finish")
#: What may be done with a history that differs from the known one.
RESENDS = ("match", "refuse", "rebuild")


@dataclass(frozen=True)
class Settings:
    """How a service keeps conversations.

    Attributes:
        adapter: name of the adapter, as clients see it.
        texts: keep what was said beside the memory, so that it can be shown, and memories be rebuilt by another
            adapter; otherwise digests alone.
        resend: what to do with a history that differs from the known one: "match" what is known of it, giving up
            what the client has visibly taken back, and refuse the rest; "refuse" whatever would give up anything; or
            "rebuild": as "match", but where nothing matches the memory is made anew.
        precision: how memories are stored: float32, bfloat16 or int8.
        input_tokens: tokens that one request may bring at most.
        disconnect: what becomes of a turn whose client goes away: "drop" it; "keep" what was said by then, and the
            message of the user; "finish" it without the client.
    """

    adapter: str
    texts: bool = True
    resend: str = "match"
    precision: str = "float32"
    input_tokens: int = 1 << 16
    disconnect: str = "drop"

    def __post_init__(self) -> None:
        if self.resend not in RESENDS:
            raise UnknownNameError("resend", self.resend, list(RESENDS))
        if self.precision not in codec.DTYPES:
            raise UnknownNameError("precision", self.precision, list(codec.DTYPES))
        if self.disconnect not in DISCONNECT:
            raise UnknownNameError("disconnect", self.disconnect, list(DISCONNECT))
