"""Callbacks of the Trainer: what is measured while a run trains, and where it is written."""
