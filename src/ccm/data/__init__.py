"""Conversation data."""

from ccm.data.chitchat import Conversation, Turn, load_chitchat

__all__ = ["Conversation", "Turn", "load_chitchat"]
