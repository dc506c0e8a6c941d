"""The core: a memory of slots, its positions, what tokens see, and the model that reads and makes it."""
