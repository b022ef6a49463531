"""Merging: the merged linear map, its exact forms and their backward passes."""
