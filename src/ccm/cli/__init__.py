"""The command line: a file a command."""

from __future__ import annotations

from .commands import app, chat, main

__all__ = ["app", "chat", "main"]
