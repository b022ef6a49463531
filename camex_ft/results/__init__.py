"""Results of a run: folder, record, statistics of its routing, closing summary. Imports no torch."""

from camex_ft.results.provenance import command_line, environment, host_kind, strip_paths
from camex_ft.results.record import Record, load_record, print_summary, summary_rows
from camex_ft.results.run_folder import RunFolder, find_done, run_name

__all__ = [
    "Record",
    "RunFolder",
    "command_line",
    "environment",
    "find_done",
    "host_kind",
    "load_record",
    "print_summary",
    "run_name",
    "strip_paths",
    "summary_rows",
]
