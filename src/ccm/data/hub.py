"""Data sets of the model hub, for users who can reach one: the paper's own and a large one of the same kind.

They need the package ``datasets``; their splits are the ones that they come with.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from itertools import islice
from pathlib import Path
from typing import Any, ClassVar

from huggingface_hub import snapshot_download

from .. import hub
from ..errors import DataError, MissingPackageError
from .conversation import Conversation, Split, alternating, check_split
from .conversational import ConversationSource
from .long_text import LongTextSource
from .sources import number, register_source


def load_hub(name: str, split: Split, streaming: bool = False) -> Iterable[dict[str, Any]]:
    """The records of one split of a data set on the hub, in order.

    Raises:
        MissingPackageError: the package ``datasets`` is not installed.
        DataError: the hub cannot be reached, or has no such data set.
    """
    check_split(split)
    try:
        from datasets import load_dataset
    except ImportError as error:
        raise MissingPackageError(f"{name} needs the package datasets: pip install datasets") from error
    if reason := hub.silent():
        raise DataError(
            f"cannot load {name}: {reason}; HF_HUB_OFFLINE=1 reads what was downloaded earlier, and some sources "
            "come in a package (ccm data list)"
        )
    try:
        return load_dataset(name, split=split, streaming=streaming)
    except (OSError, ValueError, RuntimeError) as error:
        said = str(error).strip().splitlines()[:1]
        raise DataError(
            f"cannot load {name} from the hub ({said[0] if said else type(error).__name__}): check the network, "
            "or choose a source that comes in a package (ccm data list)"
        ) from error


def hub_files(name: str, patterns: Sequence[str]) -> Path:
    """The folder that files of a data set on the hub are downloaded to; what is there already is not fetched again.

    Args:
        name: of the data set.
        patterns: of the files that are wanted.

    Raises:
        DataError: the hub cannot be reached, or has no such data set.
    """
    if reason := hub.silent():
        raise DataError(f"cannot load {name}: {reason}; give a folder that holds its files")
    try:
        return Path(snapshot_download(name, repo_type="dataset", allow_patterns=list(patterns)))
    except (OSError, ValueError) as error:
        said = (str(error).strip().splitlines() or [type(error).__name__])[0]
        raise DataError(
            f"cannot load {name} from the hub ({said}): check the network, or give a folder that holds its files"
        ) from error


class HubConversations(ConversationSource):
    """Conversations of the hub, as lists of texts whose speakers alternate.

    Args:
        limit: most conversations read of a split (a million would fill the memory); None reads all.
        turns, facts, echoes: see :class:`~ccm.data.conversational.ConversationSource`.
    """

    hub: ClassVar[str]
    field: ClassVar[str]

    def __init__(self, tokenizer: Any, turns: Any = (8,), limit: int | None = 100_000, **options: Any):
        super().__init__(tokenizer, turns, limit=limit, **options)

    def conversations(self, split: Split) -> Sequence[Conversation]:
        talks = []
        for k, record in enumerate(islice(load_hub(self.hub, split), self.limit)):
            try:
                said = [text.strip() for text in record[self.field]]
            except (KeyError, TypeError, AttributeError) as error:
                raise DataError(
                    f"record {k} of {self.hub} is not as expected ({error!r}): expected texts in {self.field!r}"
                ) from error
            talks.append(Conversation(f"{split} {k}", (), alternating(said)))
        return talks


@register_source
class DailyDialog(HubConversations):
    __doc__ = HubConversations.__doc__
    name, title = "daily-dialog", "Everyday dialogs (DailyDialog, the paper's conversation data)"
    licence, origin = "CC BY-NC-SA 4.0", "model hub"
    hub, field = "roskoN/dailydialog", "utterances"


@register_source
class Soda(HubConversations):
    __doc__ = HubConversations.__doc__
    name, title = "soda", "A million social dialogs written by a model (SODA)"
    licence, origin = "CC BY 4.0", "model hub"
    hub, field = "allenai/soda", "dialogue"


@register_source
class Pg19(LongTextSource):
    """Books of Project Gutenberg from before 1919 (PG-19, the paper's streaming data).

    Args:
        books: most books read of a split.
        segment_tokens, row_tokens: see :class:`~ccm.data.long_text.LongTextSource`.
    """

    name, title = "pg19", "Books from before 1919 (PG-19, the paper's streaming data)"
    licence, origin = "Apache-2.0, public domain texts", "model hub"
    hub = "emozilla/pg19"

    def __init__(self, tokenizer: Any, books: int = 100, **options: Any):
        super().__init__(tokenizer, **options)
        self.books = number("books", books, 1)

    def texts(self, split: Split) -> dict[str, str]:
        records = islice(load_hub(self.hub, split, streaming=True), self.books)
        try:
            return {record["short_book_title"]: record["text"] for record in records}
        except (KeyError, TypeError) as error:
            raise DataError(
                f"{self.hub} is not as expected ({error!r}): expected short_book_title and text"
            ) from error
