"""Capacity planning: what a number of users needs, from the model's shape and from costs measured on this machine."""
