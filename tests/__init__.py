"""Tests of camex_ft; they mirror the package."""
