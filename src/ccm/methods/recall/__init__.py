"""Recall: more is kept than a prompt reads, and the prompt says what."""
