"""Models: which one, where it runs, and the packages that bring it."""
