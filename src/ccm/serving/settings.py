"""How a service keeps conversations."""

from __future__ import annotations

from dataclasses import dataclass

from ..errors import UnknownNameError

#: What becomes of a turn whose client goes away.
DISCONNECT = ("drop", "keep", "finish")
#: What may be done with a history that differs from the known one.
RESENDS = ("match", "refuse", "rebuild")
#: Types of stored memories; as those of ``files.memory_file``, which needs torch.
PRECISIONS = ("float32", "float16", "bfloat16", "int8")


@dataclass(frozen=True)
class Settings:
    """How a service keeps conversations.

    Attributes:
        adapter: name of the adapter, as clients see it.
        texts: whether the texts are stored beside the memory. They can then be shown, and another adapter can
            rebuild the memory from them. Otherwise their digests alone are stored.
        resend: what to do with a history that differs from the known one. "match" keeps what both share and gives up
            what the client has visibly taken back; a history that shares nothing is refused. "refuse" refuses as soon
            as anything would be given up. "rebuild" matches too, but makes the memory anew where nothing is shared.
        precision: type of stored memories: float32, float16, bfloat16 or int8.
        input_tokens: most tokens that one request may bring.
        disconnect: what becomes of a turn whose client disconnects. "drop" commits nothing. "keep" ends the answer
            and commits what was written by then. "finish" writes the answer to its end and commits it.
    """

    adapter: str
    texts: bool = True
    resend: str = "match"
    precision: str = "float16"
    input_tokens: int = 1 << 16
    disconnect: str = "drop"

    def __post_init__(self) -> None:
        if self.resend not in RESENDS:
            raise UnknownNameError("resend", self.resend, list(RESENDS))
        if self.precision not in PRECISIONS:
            raise UnknownNameError("precision", self.precision, list(PRECISIONS))
        if self.disconnect not in DISCONNECT:
            raise UnknownNameError("disconnect", self.disconnect, list(DISCONNECT))
