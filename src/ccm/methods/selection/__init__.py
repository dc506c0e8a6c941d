"""Selection: entries stay as they were computed, and the best scored ones stay."""
