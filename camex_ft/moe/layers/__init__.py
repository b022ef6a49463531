"""Layers with experts that stand in for a dense feed-forward layer."""
