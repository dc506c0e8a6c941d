"""Stored results as tables, figures and the page ``docs/results.md``; nothing in them is typed by hand."""

from __future__ import annotations

from .load import Results, Row, load, read
from .page import build

__all__ = ["Results", "Row", "build", "load", "read"]
