"""Fixtures of the examples that each task has."""

from tests.helpers.task_examples import examples, folder, rows  # noqa: F401
