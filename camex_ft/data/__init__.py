"""Data of a task from the hub, from disk or from the synthetic generators: readers, columns and checks."""
