"""How the tokens of an answer are drawn: as asked for, and in all else as the model's own settings say."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields, replace
from typing import Any

from transformers import PreTrainedModel

from .load import DEFAULT_MODEL


@dataclass(frozen=True)
class Drawing:
    """How one token is drawn from the logits (V,) that the model gives it.

    Attributes:
        temperature: logits are divided by it; 0 takes the likeliest token every time (greedy).
        top_p: the smallest set of tokens with this probability is drawn from; 1 is all.
        top_k: the likeliest so many are drawn from; 0 is all.
        min_p: tokens of at least this share of the likeliest one's probability are drawn from; 0 is all.
        repetition_penalty: positive logits of tokens that have occurred are divided by it, negative ones multiplied.
    """

    temperature: float = 0.0
    top_p: float = 1.0
    top_k: int = 0
    min_p: float = 0.0
    repetition_penalty: float = 1.0

    def generate_kwargs(self) -> dict[str, Any]:
        """The same for transformers' ``generate``."""
        if self.temperature:
            return {"do_sample": True, **asdict(self)}
        return {"do_sample": False, "repetition_penalty": self.repetition_penalty}


#: Names of the settings.
NAMES = tuple(field.name for field in fields(Drawing))
#: Of the embedded model, whose files have none: those of its makers' page, and a penalty against loops, into which a
#: model of 135 M parameters falls without one.
EMBEDDED = Drawing(temperature=0.2, top_p=0.9, repetition_penalty=1.1)


def own_drawing(model: PreTrainedModel) -> Drawing:
    """A model's own settings, from the ``generation_config`` that its files bring; without any it is greedy."""
    if model.name_or_path == DEFAULT_MODEL:
        return EMBEDDED
    config = model.generation_config
    given = {name: value for name in NAMES if (value := getattr(config, name, None)) is not None}
    if not config.do_sample:
        given["temperature"] = 0.0
    return drawing(Drawing(), {"do_sample": config.do_sample, **given})


def drawing(own: Drawing, given: Mapping[str, Any]) -> Drawing:
    """What was asked for, and in all else the model's own settings.

    Args:
        own: of the model.
        given: some settings by name, also transformers' ``do_sample``; None is not given. ``temperature=0`` and
            ``do_sample=False`` are greedy. A greedy model draws at temperature 1 once ``do_sample=True``, ``top_p``,
            ``top_k`` or ``min_p`` asks for it.
    """
    chosen = {name: value for name in NAMES if (value := given.get(name)) is not None}
    draws = given.get("do_sample")
    if draws is False:
        chosen["temperature"] = 0.0
    elif not own.temperature and (draws or chosen.keys() & {"top_p", "top_k", "min_p"}):
        chosen.setdefault("temperature", 1.0)
    return replace(own, **chosen)
