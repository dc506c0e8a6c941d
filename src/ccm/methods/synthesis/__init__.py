"""Synthesis: entries that stand for several, made without an adapter."""
