"""The command line: a file a command."""

from __future__ import annotations

from .commands import app, main

__all__ = ["app", "main"]
