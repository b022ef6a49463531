"""One job of a cluster: it runs one cell, as `worker` does.

Light to import, so that variables are set before torch reads them.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from submitit.helpers import DelayedSubmission


@dataclass(frozen=True, kw_only=True)
class Job:
    """A cell as a job of submitit, which pickles it and calls it on a node.

    Attributes:
        request: what to run: see `running.request`.
        environment: variables to set first.
    """

    request: Mapping[str, Any]
    environment: Mapping[str, str] = field(default_factory=dict)

    def __call__(self) -> None:
        """Run the cell; leave with its exit code where it failed, so that the cluster counts the job as failed."""
        os.environ.update(self.environment)
        from camex_ft.compare.perform import perform

        code = perform(self.request)
        if code:
            sys.exit(code)

    def checkpoint(self) -> DelayedSubmission:
        """Return what goes on when its time is up or its node is taken away: the same, from its last checkpoint."""
        from submitit.helpers import DelayedSubmission

        return DelayedSubmission(replace(self, request={**self.request, "force": False}))
