"""The average of SuperGLUE over the tasks of a suite."""

import statistics
from collections.abc import Mapping
from typing import Any

from electra_ds.finetuning.superglue_tasks import PREFIX, SUPERGLUE

# Titles of the published table. The value of CB, MultiRC and ReCoRD is the mean of two metrics.
TITLES = {
    "boolq": "BoolQ acc",
    "cb": "CB acc, macro-F1",
    "copa": "COPA acc",
    "multirc": "MultiRC F1a, EM",
    "record": "ReCoRD F1, EM",
    "rte": "RTE acc",
    "wic": "WiC acc",
    "wsc": "WSC acc",
}
AVERAGE = "average of 8"


def superglue_average(tasks: Mapping[str, Any]) -> dict[str, float | None]:
    """Return {column: median of the main metric on dev, x 100} and the mean of all eight columns.

    tasks: those of report.json. A column without a score is None, and then the mean is None. {} if
    no task is one of SuperGLUE.
    """
    if not any(name in SUPERGLUE for name in tasks):
        return {}
    row: dict[str, float | None] = {}
    for short, title in TITLES.items():
        metrics = tasks.get(f"{PREFIX}{short}", {}).get("scores", {}).get("valid", {})
        main: Mapping[str, Any] = next(iter(metrics.values()), {})
        row[title] = main.get("median")
    known = [value for value in row.values() if value is not None]
    row[AVERAGE] = statistics.fmean(known) if len(known) == len(TITLES) else None
    return row
