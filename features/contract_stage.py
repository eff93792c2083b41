"""The contract as a stage: what it leaves for the report and for the Prefect UI."""

from pathlib import Path

from features.contract import check_contract
from features.contract_page import render
from features.ingest import Snapshot
from pipelines.home import Home
from pipelines.manifest import Note, write_atomic, write_page
from pipelines.spec import Spec


def contract_into(spec: Spec, home: Home, snapshot: Snapshot, previous: Snapshot | None, out: Path) -> Note:
    """Checks the snapshot; writes `contract.json` and `page.md`. Raises Refused when an expectation fails."""
    result = check_contract(spec, home, snapshot, previous, folder=out)
    rows = [("table", "rows", "duplicates", "set aside")]
    rows += [(name, f"{count:,}", f"{snapshot.duplicates.get(name, 0):,}", f"{snapshot.set_aside.get(name, 0):,}")
             for name, count in result.rows.items()]  # fmt: skip
    checks = [("table", "expectation", "verdict")] + [(c.table, c.words, c.verdict) for c in result.checks]
    write_page(out / "page.md", f"{spec.pipeline}: contract", [("Arrived", rows), ("Expectations", checks)])
    aside = sum(snapshot.set_aside.values())
    if result.aside:  # with rows in quarantine, the page is of use though all expectations hold
        write_atomic(out / "contract.html", render(result))
    note = f"{result.expectations} expectations hold on {sum(result.rows.values()):,} rows"
    return Note(note + (f", {aside:,} rows set aside" if aside else ""))
