"""Files: memories, adapters, and writing so that a crash leaves nothing half-done."""
