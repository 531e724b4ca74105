"""compared.json: what a user would have without a search, one entry per target and budget beside generated.json.

"fixed" is the network that the supernet started from, unchanged, at the largest resolution that meets the budget.
"""
from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

from rich import box
from rich.table import Table
from rich.text import Text

from orchestrator.handover.delivered import Delivered
from orchestrator.record.files import read_json, write_json
from orchestrator.record.store import RunStore

FILE, FOLDER, FIXED = "compared.json", "compared", "fixed"
NOTHING_FITS = "no resolution fits"


@dataclass(frozen=True)
class Compared:
    """The fixed network for one budget. Where no resolution meets it `resolution` is None, and the model is not
    feasible."""

    resolution: int | None
    model: Delivered


class Comparison:
    """compared.json of one run. `latencies_ms`: of the network before its training, by target's label and
    resolution."""

    def __init__(self, store: RunStore) -> None:
        self._path = store.path / FILE
        found = read_json(self._path).get(FIXED, {}) if self._path.exists() else {}
        self.latencies_ms: dict[str, dict[int, float]] = {
            label: {int(resolution): float(ms) for resolution, ms in row.items()}
            for label, row in found.get("latencies_ms", {}).items()}
        self.entries = [_entry(entry) for entry in found.get("entries", [])]

    def add_latencies(self, label: str, latencies_ms: Mapping[int, float]) -> None:
        self.latencies_ms[label] = self.latencies_ms.get(label, {}) | dict(latencies_ms)
        self._write()

    def add(self, entry: Compared) -> None:
        """In place of an earlier one for the same target and budget."""
        kept = [known for known in self.entries if _key(known.model) != _key(entry.model)]
        self.entries = [*kept, entry]
        self._write()

    def _write(self) -> None:
        entries = [{"resolution": entry.resolution, **asdict(entry.model)} for entry in self.entries]
        write_json(self._path, {FIXED: {"latencies_ms": self.latencies_ms, "entries": entries}})


def compared_table(models: Sequence[Delivered], entries: Sequence[Compared]) -> Table:
    """Per budget what is handed over beside the fixed network. Fits 80 columns."""
    table = Table(box=box.SIMPLE_HEAD, header_style="bold", padding=(0, 1), pad_edge=False)
    for name in ("budget\nms", "handed over\ntest accuracy", "\nms", "fixed, fine-tuned\ntest accuracy", "\nms",
                 "\npx"):
        table.add_column(name, justify="right", no_wrap=True)
    handed_over = {_key(model): model for model in models}
    several, target = len({entry.model.target for entry in entries}) > 1, ""
    for entry in entries:
        if several and entry.model.target != target:     # one block of rows per target
            target = entry.model.target
            table.add_row(Text(target, style="bold"))
        why = NOTHING_FITS if entry.model.reason.startswith(NOTHING_FITS) else "no model"
        pixels = "" if entry.resolution is None else str(entry.resolution)
        table.add_row(f"{entry.model.budget_ms:g}", *_cells(handed_over.get(_key(entry.model)), "no model"),
                      *_cells(entry.model, why), pixels)
    return table


def _cells(model: Delivered | None, otherwise: str) -> tuple[str | Text, str]:
    if model is None or model.test_accuracy is None or model.latency_ms is None:
        return Text(otherwise, style="yellow"), ""
    return f"{model.test_accuracy:.2%}", f"{model.latency_ms:.3f}"


def _key(model: Delivered) -> tuple[str, float]:
    return model.target, model.budget_ms


def _entry(found: Mapping[str, Any]) -> Compared:
    model = {key: value for key, value in found.items() if key != "resolution"}
    return Compared(found["resolution"], Delivered(**model | {"tokens": tuple(found["tokens"])}))
