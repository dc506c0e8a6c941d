"""Hybrids: learned slots and old words in one budget of bytes."""
