"""The server's HTTP face: OpenAI's endpoints over conversations that remember, and our own for their memories."""

from .app import create_app
from .guard import HttpLimits

__all__ = ["HttpLimits", "create_app"]
