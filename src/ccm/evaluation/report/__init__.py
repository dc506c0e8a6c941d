"""Stored results as a summary and a page for every suite; nothing in them is typed by hand."""

from __future__ import annotations

from .load import Results, Row, load, read

__all__ = ["Results", "Row", "load", "read"]
