"""Names of models and adapters: a folder here, or something on the model hub; and whether that can be reached.

Nothing heavy is imported, so that a wrong name is refused at once.
"""

from __future__ import annotations

import logging
import math
import os
import re
import ssl
import threading
import time
import urllib.error
import urllib.request
from pathlib import Path

from .errors import ConfigError, nearest

log = logging.getLogger(__name__)

#: Seconds in which the hub must answer, the look-up of its address included.
SECONDS = 5.0
_ID = re.compile(r"[\w.-]+(/[\w.-]+)?")


def is_folder(name: str, what: str, needed: str) -> bool:
    """Whether a name is that of a folder here; if not, it is one of the hub.

    Args:
        name: as it was given.
        what: "model" or "adapter", for the message.
        needed: a file that such a folder holds.

    Raises:
        ConfigError: it is written as a path and there is no such folder, it lacks the file, or it cannot be a name
            of the hub either.
    """
    path = Path(name).expanduser()
    if path.is_dir():
        if not (path / needed).is_file():
            raise ConfigError(
                f"no {what} {name!r}: the folder has no {needed}; expected that of a saved {what}"
            )
        return True
    if path.is_file():
        raise ConfigError(f"no {what} {name!r}: it is a file; expected the folder of a saved {what}")
    if _is_path(name):
        raise ConfigError(f"no {what} {name!r}: there is no such folder{_guess(path)}")
    if not _ID.fullmatch(name):
        raise ConfigError(
            f"no {what} {name!r}: neither a folder here nor a name as the hub has them, ORGANISATION/NAME"
        )
    return False


def _is_path(name: str) -> bool:
    """Whether it is written as a path, and cannot be meant for the hub."""
    return name.startswith((".", "~", os.sep)) or name.endswith(("/", os.sep)) or len(Path(name).parts) > 2


def _guess(path: Path) -> str:
    try:
        near = nearest(path.name, [other.name for other in path.parent.iterdir() if other.is_dir()])
    except OSError:
        return ""
    return f" (did you mean {path.with_name(near)}?)" if near else ""


def is_online(name: str, what: str, needed: str) -> bool:
    """Whether the hub is asked for a name; False where what was downloaded earlier has to do.

    Args:
        name: on the hub.
        what: "model" or "adapter", for the message.
        needed: a file of it, which is in the cache if it was downloaded.

    Raises:
        ConfigError: it was never downloaded, and the hub is switched off or does not answer within :data:`SECONDS`.
    """
    reason = "the model hub is switched off (HF_HUB_OFFLINE)" if _is_off() else silent()
    if not reason:
        return True
    from huggingface_hub import try_to_load_from_cache

    if isinstance(try_to_load_from_cache(name, needed), str):
        log.info("%s: %s is read as it was downloaded", reason, name)
        return False
    raise ConfigError(
        f"no {what} {name!r}: there is no such folder, and {reason}; name a folder, or mend the network"
    )


def silent() -> str:
    """That the hub does not answer, in words; empty if it does, or is switched off. It is tried once."""
    from huggingface_hub import constants

    answered = _is_off() or _answered(constants.ENDPOINT)
    return "" if answered else f"the model hub ({constants.ENDPOINT}) cannot be reached"


def _is_off() -> bool:
    from huggingface_hub import constants

    return bool(constants.HF_HUB_OFFLINE)


def _answered(endpoint: str) -> bool:
    answered, until = _TRIED.get(endpoint, (False, 0.0))
    if time.monotonic() < until:
        return answered
    found: list[bool] = []
    # an address is looked up for as long as the system likes: not in the thread that waits
    thread = threading.Thread(target=lambda: found.append(_ask(endpoint)), daemon=True)
    thread.start()
    thread.join(SECONDS)
    answered = any(found)
    _TRIED[endpoint] = answered, time.monotonic() + (math.inf if answered else _AGAIN)
    return answered


#: Seconds after which a hub that did not answer is tried once more.
_AGAIN = 60.0
#: Hub -> whether it answered, and until when that counts.
_TRIED: dict[str, tuple[bool, float]] = {}


def _ask(endpoint: str) -> bool:
    """Whether anybody answers there, in whatever way."""
    request = urllib.request.Request(endpoint, method="HEAD")
    try:
        urllib.request.urlopen(request, timeout=SECONDS).close()
    except urllib.error.HTTPError:
        return True
    except urllib.error.URLError as error:
        return isinstance(error.reason, ssl.SSLError)  # the hub's own client has other certificates
    except (OSError, ValueError):
        return False
    return True
