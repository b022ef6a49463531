"""Pictures and numbers of a finished run's model: ``camex-ft inspect RUN``."""

from camex_ft.analysis.inspection import inspect

__all__ = ["inspect"]
