"""Pictures of results: from numbers to Matplotlib figures.

Figures use Matplotlib's object interface and Agg, never `pyplot`: no window opens and no state is shared. Every
distinction made by colour is also made by line, marker or place.
"""

from camex_ft.results.plots.choice import Choice, choose, of_inspection, of_run, source
from camex_ft.results.plots.figures import is_stale, png, save

__all__ = ["Choice", "choose", "is_stale", "of_inspection", "of_run", "png", "save", "source"]
