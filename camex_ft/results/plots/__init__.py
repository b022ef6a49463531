"""Pictures of results: functions from numbers to a Matplotlib figure, and `pictures`, which chooses what applies.

Figures are made with Matplotlib's object interface, never with `pyplot`, and drawn by Agg: nothing opens a window and
no state is shared. Every distinction that is made by colour is made a second time, by line, marker or place.
"""

from camex_ft.results.plots.choice import Choice, choose, of_run, pictures, source
from camex_ft.results.plots.files import is_stale, png, save
from camex_ft.results.plots.inspected import of_inspection

__all__ = ["Choice", "choose", "is_stale", "of_inspection", "of_run", "pictures", "png", "save", "source"]
