"""`paretoray measure`: a latency table of one device for one search space, as a Parquet file that others can use.

One row per architecture (failed ones have `error` and no numbers):

    arch_id, tokens, architecture   16 hex digits, canonical tokens, the space's short text form
    madds, params                   multiply-adds and trainable numbers
    target_id                       the device and its settings; rows of one table all have the same
    latency_ms, stderr_ms           ratio * reference_ms, and its standard error
    ratio, reference_ms             candidate / reference, and the quiet value of the reference on this device
    rounds, drift, load             rounds of the visit, max / min - 1 of the reference, CPU share used by others
    candidate_rounds_ms, reference_rounds_ms    every kept timing, one list per round
    started_at, duration_s          seconds since 1970, seconds
    details, source, error          JSON of what the target adds, "measured", why there is no number

The file's key "paretoray" holds JSON: `space_id`, `target` (every field of the identity), `reference_ms`, `version`.
The first two rows are the architectures expected to be the fastest and the slowest, the others are spread between.

The table is written anew after every few results under another name and renamed, so it is always whole; measuring again
with the same space and target adds what is missing, and refuses a table of another space or target.
"""
from __future__ import annotations

import json
import logging
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
from rich.console import Console
from rich.progress import Progress

from actors.latency.pool import LatencyPool, LatencyPoolSettings, LatencyRequest, LatencyResult
from orchestrator.cluster.joining import connected
from orchestrator.cluster.ownmodules import own_modules
from orchestrator.config import Config
from orchestrator.interrupt import Interrupted, StopFlag
from orchestrator.record.files import write_atomically
from orchestrator.record.records import latency_row
from orchestrator.record.store import LATENCY_SCHEMA, RUNS
from orchestrator.resources.devices import local_devices
from orchestrator.resources.waiting import devices_when_there
from orchestrator.run.stages.measure import spread_sample
from orchestrator.services.context import data_and_space
from orchestrator.services.elite import with_ranges
from orchestrator.services.pretrained import timed_image_size
from searchspaces.errors import ConfigError, StoreError
from searchspaces.space import SearchSpace, Tokens

log = logging.getLogger(__name__)
KEY, VERSION = b"paretoray", 1
HEAD = ("space_id", "target", "reference_ms")
SCHEMA = pa.schema([*(column for column in LATENCY_SCHEMA if column.name != "predicted_ms"),
                    pa.field("architecture", pa.string()), pa.field("madds", pa.int64()),
                    pa.field("params", pa.int64())])
SAVE_EVERY = 10
POLL_S = 0.5
OnResult = Callable[[LatencyResult], None]


@dataclass
class LatencyTable:
    """A table on disk: `head` is the JSON of the file's key, `rows` what was measured, in order."""

    path: Path
    head: dict[str, Any]
    rows: list[dict[str, Any]]

    @classmethod
    def read(cls, path: Path) -> LatencyTable | None:
        """None where there is no file; StoreError where it is damaged or no latency table."""
        if not path.exists():
            return None
        try:
            table = pq.read_table(path, page_checksum_verification=True)
            head = json.loads((table.schema.metadata or {})[KEY])
            if not (set(HEAD) <= set(head) and set(SCHEMA.names) <= set(table.column_names)):
                raise ValueError("something is missing")
        except (OSError, pa.ArrowException, KeyError, TypeError, ValueError) as error:
            raise StoreError(f"{path} is damaged or not a latency table ({type(error).__name__}); choose another --out "
                             "or remove it") from error
        return cls(path, head, table.to_pylist())

    def write(self) -> None:
        schema = SCHEMA.with_metadata({KEY: json.dumps(self.head).encode()})
        with write_atomically(self.path) as temporary:
            pq.write_table(pa.Table.from_pylist(self.rows, schema=schema), temporary, compression="zstd",
                           write_page_checksum=True)

    def check(self, space: SearchSpace, target: dict[str, Any]) -> None:
        """StoreError unless the table is of this space and target."""
        for name, ours, theirs in (("search space", space.space_id, self.head["space_id"]),
                                   ("target", json.dumps(target), json.dumps(self.head["target"]))):
            if ours != theirs:
                raise StoreError(f"{self.path} was measured with another {name} ({theirs}, now {ours}); latencies of "
                                 "two are never mixed: choose another --out")


def measure_random(pool: LatencyPool, space: SearchSpace, count: int, path: Path, *, seed: int = 0,
                   on_result: OnResult = lambda result: None, stop: StopFlag | None = None) -> LatencyTable:
    """Brings the table at `path` to `count` architectures. Stopping or failing keeps what was measured."""
    target: dict[str, Any] = json.loads(json.dumps(asdict(pool.identity())))
    table = LatencyTable.read(path) or LatencyTable(path, {
        "space_id": space.space_id, "target": target, "reference_ms": pool.reference_ms(), "version": VERSION}, [])
    table.check(space, target)
    table.rows = [row for row in table.rows if not row["error"]]
    known = {row["arch_id"] for row in table.rows}
    missing = [row for row in spread_sample(space, count, seed) if space.arch_id(row) not in known]
    pool.submit([LatencyRequest(row) for row in missing[:max(0, count - len(known))]])
    saved = len(table.rows)
    try:
        while pool.outstanding:
            if stop is not None:
                stop.check()
            for result in pool.collect(POLL_S):
                table.rows.append(table_row(space, result))
                on_result(result)
            if len(table.rows) >= saved + SAVE_EVERY:
                table.write()
                saved = len(table.rows)
    finally:
        table.write()
    return table


def table_row(space: SearchSpace, result: LatencyResult) -> dict[str, Any]:
    tokens_1T: Tokens = result.tokens_T[None]
    madds_1, params_1 = space.cost(tokens_1T)
    row = latency_row(result, None)
    del row["predicted_ms"]
    return row | {"architecture": space.text(result.tokens_T), "madds": int(madds_1[0]), "params": int(params_1[0])}


def measure_table(config: Config, count: int, out: Path | None, address: str | None,
                  console: Console | None = None) -> Path:
    """The command: its own Ray, a progress bar, and one line at the end. Of a configuration with one target."""
    console = console or Console()
    if len(config.targets) > 1:
        raise ConfigError(f"a latency table is of one device but the configuration has {', '.join(config.labels)}; "
                          "choose with --target LABEL")
    config = with_ranges(config, RUNS)
    splits, space = data_and_space(config)
    existing = LatencyTable.read(out) if out is not None else None
    stop = StopFlag()
    with connected(config.cluster, address, resources=local_devices(config, address), own=own_modules(config)):
        target = config.targets[0]
        devices = devices_when_there(target.name, target.options, config.cluster, log.warning)
        pool = LatencyPool(space, target.name, target.options, devices=devices,
                           settings=LatencyPoolSettings(time_out_s=config.latency.time_out_s),
                           reference_ms=existing.head["reference_ms"] if existing is not None else None,
                           image_size=timed_image_size(config, splits), search="measure", check=stop.check)
        try:
            path = out or Path(f"latency-{pool.identity().target_id}.parquet")
            with stop.installed(), Progress(console=console) as progress:
                bar = progress.add_task("networks measured", total=count)
                table = measure_random(pool, space, count, path, seed=config.seed, stop=stop,
                                       on_result=lambda result: progress.advance(bar))
        except Interrupted:
            console.print(f"stopped; {path} keeps what was measured, the same command goes on", highlight=False)
            raise
        finally:
            pool.close()
    failed = sum(bool(row["error"]) for row in table.rows)
    console.print(f"{path}: {len(table.rows) - failed} networks" + (f", {failed} failed" if failed else ""),
                  highlight=False, soft_wrap=True)
    return path


def with_target(config: Config, label: str | None) -> Config:
    """The configuration with the target of that label alone; unchanged without one. ConfigError for an unknown one."""
    if label is None:
        return config
    chosen = [target for target in config.targets if target.label == label]
    if not chosen:
        raise ConfigError(f"--target {label} is not in the configuration; choose one of {', '.join(config.labels)}")
    return config.model_copy(update={"targets": chosen})
