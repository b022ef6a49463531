"""What several test modules share, imported from here by name."""
