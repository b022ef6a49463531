"""What a finished run has learned, in pictures and numbers: ``camex-ft inspect RUN``."""

from camex_ft.inspection.gather import inspect

__all__ = ["inspect"]
