"""How much a memory is worth: the same target tokens scored under each method."""
