"""Routing: which tokens share routing weights, how they are computed, and the losses that balance them."""
