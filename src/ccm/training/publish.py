"""An adapter folder on the model hub, with a card that says how to use it."""

from __future__ import annotations

import json
import logging
from pathlib import Path

from .. import hub
from ..errors import CCMError
from ..files.atomic import write_atomically

log = logging.getLogger(__name__)


def push_to_hub(adapter: Path, repository: str) -> None:
    """Upload an adapter folder; the repository is made if it is not there.

    Raises:
        CCMError: the hub did not take it; the folder is as it was.
    """
    import huggingface_hub

    write_atomically(adapter / "README.md", card(adapter, repository).encode())
    if reason := hub.silent():
        raise CCMError(
            f"cannot upload to {repository}: {reason}; the adapter is in {adapter}, the same command tries again"
        )
    try:
        huggingface_hub.create_repo(repository, exist_ok=True)
        huggingface_hub.upload_folder(repo_id=repository, folder_path=str(adapter))
    except Exception as error:  # the hub client raises many kinds
        raise CCMError(
            f"cannot upload to {repository} ({str(error).splitlines()[0] if str(error) else type(error).__name__}); "
            f"the adapter is in {adapter}: log in with `hf auth login` and run the same command again"
        ) from error
    log.info("uploaded %s to %s", adapter, repository)


def card(adapter: Path, repository: str) -> str:
    """The model card of an adapter, from the record beside it."""
    record = json.loads((adapter / "training.json").read_text())
    figures = {k: v for k, v in record["report"].items() if isinstance(v, int | float)}
    table = "\n".join(f"| {name.replace('_', ' ')} | {value} |" for name, value in figures.items())
    kind = record["config"]["compressor"].get("kind", "ccm")
    if record["config"]["stage"] != "memory":
        use = f'compressor = ccm.Compressor(model, base_adapter="{repository}")'
    elif kind == "ccm":
        use = f'compressor = ccm.Compressor.from_pretrained(model, "{repository}")'
    else:
        use = f'run = ccm.get_method("{kind}", adapter="{repository}").open(model, tokenizer)'
    load = f'load_model("{record["base_model"]}")' if record["config"]["model"] else "load_default_model()"
    return f"""---
base_model: {record["base_model"]}
library_name: peft
tags: [compressed-context-memory, context-compression]
---

# {repository}

An adapter for [{record["base_model"]}] made with compressed-context-memory. `training.json` holds every setting.

```python
import ccm

model, tokenizer = ccm.{load}
{use}
```

| figure, held-out rows | |
|---|---|
{table}
"""
