"""Serving: conversations of many users, each with its own compressed memory that survives restarts."""
