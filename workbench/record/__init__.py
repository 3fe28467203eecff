"""The run folder: what a run was, what it told and its checkpoints; readable while it is written and after any kill.

`checkpoint` is imported by its own name, since it needs torch.
"""

from workbench.record.controls import Control, Controls
from workbench.record.history import History
from workbench.record.names import fresh_folder, validate_name
from workbench.record.queries import Loads, loads_between, query
from workbench.record.runs import RunInfo, delete, rename, runs
from workbench.record.snapshot import ENDED_STATES, LIVE_STATES, ORPHANED, Series, Snapshot, Source
from workbench.record.tail import Tail, open_source
from workbench.record.writer import RunWriter

__all__ = [
    "ENDED_STATES",
    "LIVE_STATES",
    "ORPHANED",
    "Control",
    "Controls",
    "History",
    "Loads",
    "RunInfo",
    "RunWriter",
    "Series",
    "Snapshot",
    "Source",
    "Tail",
    "delete",
    "fresh_folder",
    "loads_between",
    "open_source",
    "query",
    "rename",
    "runs",
    "validate_name",
]
