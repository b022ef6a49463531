"""Split files of a task, written and loaded again, for the tests of data from disk."""

import csv
import json
import re
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from camex_ft.data import sources
from camex_ft.utils import registry
from camex_ft.utils.errors import UserError

SST2 = registry.TASKS.get("glue/sst2")
ROWS = [
    {"sentence": 'a "quoted, word', "label": 1, "idx": 0},
    {"sentence": "dull ", "label": 0, "idx": 1},
    {"sentence": "Zoë's naïve\nstory", "label": 1, "idx": 2},
]


def write(path: Path, rows, columns=None):
    """Write `rows` in the format that the suffix names."""
    columns = columns or list(rows[0])
    path.parent.mkdir(parents=True, exist_ok=True)
    if path.suffix == ".parquet":
        pq.write_table(pa.Table.from_pylist(rows), path)
    elif path.suffix == ".jsonl":
        path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    elif path.suffix == ".json":
        path.write_text(json.dumps(rows, ensure_ascii=False), encoding="utf-8")
    elif path.suffix == ".csv":
        with path.open("w", newline="", encoding="utf-8") as stream:
            writer = csv.DictWriter(stream, columns)
            writer.writeheader()
            writer.writerows(
                {k: json.dumps(v) if isinstance(v, (list, dict)) else v for k, v in row.items()}
                for row in rows
            )
    else:
        lines = [
            "\t".join(columns),
            *("\t".join(str(row[c]).replace("\n", " ") for c in columns) for row in rows),
        ]
        path.write_text("\n".join(lines) + "\n", encoding="utf-8")


def load(dir, task=SST2, **options):
    return sources.load(task, source="disk", dir=dir, **options)


def complaint(dir, task=SST2, **options) -> str:
    """Return the message, on one line, of the `UserError` that loading raises."""
    with pytest.raises(UserError) as caught:
        load(dir, task, **options)
    return re.sub(r"\s+", " ", str(caught.value))
