"""The spec of a pipeline over one table of trips, whose columns and rules a test chooses."""

from typing import Any

from pipelines.spec import Spec


def lines_spec(columns: dict[str, Any], **rules: Any) -> Spec:
    """Trips with these columns (`id`, `at`, `seen` and `late` among them); `rules`: other fields of their source."""
    source = {"key": ["id"], "event_time": "at", "known_at": {"column": "seen"}, "columns": columns, **rules}
    return Spec.model_validate({
        "pipeline": "lines", "title": "Late?", "sources": {"trips": source},
        "rows": {"from": "trips", "key": ["id"]}, "predict_at": {"column": "at", "lead": "10m", "tolerance": "1m"},
        "label": {"from": "trips", "column": "late", "gt": 5}, "label_delay": "1h",
        "split": {"train": "1d", "valid_fit": "1d", "valid_select": "1d", "test": "1d", "purge": "1h"},
    })  # fmt: skip
