"""Engines: who runs the model for many conversations at a time."""

from ...methods.base import segments_of
from .base import (
    Engine,
    EngineError,
    Event,
    Job,
    Kept,
    OverloadedError,
    Result,
    Sampling,
    StoppingError,
    Ticket,
)
from .padded import PaddedEngine

__all__ = [
    "Engine",
    "EngineError",
    "Event",
    "Job",
    "Kept",
    "OverloadedError",
    "PaddedEngine",
    "Result",
    "Sampling",
    "StoppingError",
    "Ticket",
    "segments_of",
]
