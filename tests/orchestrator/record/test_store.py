"""The run folder survives crashes, damage and a full disk."""
from __future__ import annotations

import json
import os
import resource
import signal
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from actors.objectpath import AnyPath, as_path, matching
from actors.wholefile import write_whole
from orchestrator.record import events, parts
from orchestrator.record.files import check_writable, read_json, write_text
from orchestrator.record.partfolder import read_parts
from orchestrator.record.store import TRIAL_SCHEMA, RunStore, Trial, resume_command
from orchestrator.report.data import read_run
from searchspaces.errors import StoreError
from tests.objectstore import BUCKET, Server

TRIAL = Trial(0, "abc", (0, 1, 2), "space", "random", 0.5, "supernet", 3, 1.5, "predicted", "cpu-1", 10, 20, None, None,
              7, 1.0, 0.1, "node", "")


def make_store(root: AnyPath, name: str = "run") -> RunStore:
    return RunStore.create(root, name, "seed: 0\n", {"python": "3"})


def trials(first: int, count: int) -> list[Trial]:
    return [replace(TRIAL, sequence=first + i, accuracy=None if i == 1 else i / 10) for i in range(count)]


def test_trials_survive_in_order(tmp_path: Path) -> None:
    store = make_store(tmp_path)
    store.append_trials(trials(0, 3))
    store.append_trials([])
    store.append_trials(trials(3, 2))
    reopened = RunStore.open(tmp_path, "run")
    assert reopened.read_trials() == trials(0, 3) + trials(3, 2)
    assert reopened.trials.rows == 5
    assert len(list((store.path / "trials").iterdir())) == 2


@pytest.mark.parametrize("position", [4, -200, 0.5])
def test_damaged_part_is_set_aside_and_the_rest_kept(tmp_path: Path, position: float,
                                                     caplog: pytest.LogCaptureFixture) -> None:
    store = make_store(tmp_path)
    for start in (0, 3, 6):
        store.append_trials(trials(start, 3))
    part = store.path / "trials" / "part-000000003.parquet"
    data = bytearray(part.read_bytes())
    at = int(len(data) * position) if isinstance(position, float) else position
    data[at:at + 40] = os.urandom(40)
    part.write_bytes(data)
    reopened = RunStore.open(tmp_path, "run")
    assert [t.sequence for t in reopened.read_trials()] == [0, 1, 2, 6, 7, 8]
    assert reopened.trials.damaged == ["part-000000003.parquet"]
    assert "is damaged" in caplog.text
    assert (part.parent / "part-000000003.parquet.damaged").exists()
    reopened.append_trials(trials(9, 1))
    assert [t.sequence for t in RunStore.open(tmp_path, "run").read_trials()][-1] == 9


def test_trials_of_an_earlier_version_lack_what_was_added_since(tmp_path: Path) -> None:
    store = RunStore.create(tmp_path, "run", "", {})
    store.append_trials([replace(TRIAL, details="{}")])
    part = store.path / "trials" / "part-000000000.parquet"
    pq.write_table(pq.read_table(part).drop_columns(["details"]), part)
    assert RunStore(store.path).read_trials() == [TRIAL]
    pq.write_table(pq.read_table(part).drop_columns(["reward"]), part)
    assert RunStore(store.path).trials.damaged == [part.name]


def test_only_the_driver_removes_what_a_killed_writer_began(tmp_path: Path) -> None:
    store = RunStore.create(tmp_path, "run", "", {})
    begun = store.path / "trials" / ".part-000000000.parquet.1.part"
    begun.write_bytes(b"half")
    reader = RunStore(store.path)
    assert begun.exists() and reader.read_trials() == []
    reader.lock()
    assert not begun.exists()


def test_damaged_last_part_is_not_overwritten(tmp_path: Path) -> None:
    store = make_store(tmp_path)
    store.append_trials(trials(0, 2))
    part = store.path / "trials" / "part-000000000.parquet"
    part.write_bytes(b"PAR1 nonsense")
    reopened = RunStore.open(tmp_path, "run")
    reopened.append_trials(trials(5, 1))
    assert sorted(p.name for p in part.parent.iterdir()) == ["part-000000000.parquet.damaged", "part-000000001.parquet"]


@pytest.mark.parametrize("name", ["..", "../x", "a/b", "a..b", "", ".hidden", "x" * 101])
def test_hostile_run_names_are_refused(tmp_path: Path, name: str) -> None:
    with pytest.raises(StoreError, match="not a usable run name"):
        make_store(tmp_path, name)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(("root", "command"), [
    (Path("runs"), "paretoray resume a"), (Path("runs").resolve(), "paretoray resume a"),
    (Path("/data/runs"), "paretoray resume a --runs /data/runs"),
    (Path("my runs"), "paretoray resume a --runs 'my runs'")])
def test_how_to_go_on_can_be_typed_as_it_is(root: Path, command: str) -> None:
    assert resume_command(root, "a") == command     # without a store, which would make the folders


def test_existing_name_is_refused_and_untouched(tmp_path: Path) -> None:
    make_store(tmp_path).append_trials(trials(0, 1))
    with pytest.raises(StoreError, match="exists already.*paretoray resume run"):
        make_store(tmp_path)
    assert RunStore.open(tmp_path, "run").trials.rows == 1


def test_unknown_run_lists_the_known_ones(tmp_path: Path) -> None:
    make_store(tmp_path, "one")
    with pytest.raises(StoreError, match="known runs: one"):
        RunStore.open(tmp_path, "two")


FULL = """
import resource, sys
from pathlib import Path
from tests.orchestrator.record.test_store import StoreError, make_store, trials
store = make_store(Path(sys.argv[1]))
store.append_trials(trials(0, 3))
resource.setrlimit(resource.RLIMIT_FSIZE, (9000, 9000))  # SIGXFSZ is ignored by Python: writing fails with EFBIG
for write in (lambda: store.append_trials(trials(3, 3000)), lambda: store.update_state(note="x" * 9001),
              lambda: store.event("note", text="x" * 9001)):
    try:
        write()
    except StoreError as error:
        print(error)
store.append_trials(trials(3, 1))
"""


def test_full_disk_keeps_what_was_recorded(tmp_path: Path) -> None:
    done = subprocess.run([sys.executable, "-c", FULL, str(tmp_path)], cwd=Path(__file__).parents[3], timeout=120,
                          capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    messages = done.stdout.splitlines()
    assert len(messages) == 3 and all("free some space" in message for message in messages), done.stdout
    assert "the disk is full while writing" in messages[0] and "part-000000003.parquet" in messages[0]
    store = RunStore.open(tmp_path, "run")
    assert store.read_trials() == trials(0, 3) + trials(3, 1), "and what fits again is taken again"
    assert store.state() == {} and not list((store.path / "trials").glob(".*"))


def test_kill_while_appending_loses_nothing_written(tmp_path: Path) -> None:
    """A writer that merges parts all the time, killed with SIGKILL at a random moment: a prefix of its trials is there,
    whole and in order, for whoever looks meanwhile too."""
    script = f"""
import sys; sys.path.insert(0, {str(Path(__file__).parents[3])!r})
from pathlib import Path
from orchestrator.record import parts
from tests.orchestrator.record.test_store import make_store, trials
parts.MOST_SMALL, parts.FULL_ROWS = 3, 12
store = make_store(Path({str(tmp_path)!r}))
for i in range(100000):
    store.append_trials(trials(i, 1))
    print(i, flush=True)
"""
    process = subprocess.Popen([sys.executable, "-c", script], stdout=subprocess.PIPE, text=True)
    assert process.stdout is not None
    acknowledged = [int(process.stdout.readline()) for _ in range(20)]
    for _ in range(5):
        seen = read_parts(tmp_path / "run" / "trials", TRIAL_SCHEMA).column("sequence").to_pylist()
        assert seen == list(range(len(seen))) and len(seen) >= len(acknowledged)
    process.send_signal(signal.SIGKILL)
    acknowledged += [int(line) for line in process.stdout.read().split()]
    process.wait()
    kept = [t.sequence for t in RunStore.open(tmp_path, "run").read_trials()]
    assert kept == list(range(len(kept)))
    assert len(kept) >= len(acknowledged)
    assert len(list((tmp_path / "run" / "trials").glob("part-*"))) < 5 + len(kept) / 12


class Killed(BaseException):
    """No handler of errors stops it."""


@pytest.mark.parametrize("step", range(1, 8))
def test_killed_at_any_step_of_merging_no_row_is_lost_or_doubled(tmp_path: Path, step: int,
                                                                 monkeypatch: pytest.MonkeyPatch) -> None:
    """Steps: the new part is renamed and its temporary name cleared, then the merged one, then three others go."""
    store = make_store(tmp_path)
    monkeypatch.setattr(parts, "MOST_SMALL", 3)
    for i in range(3):
        store.append_trials(trials(2 * i, 2))
    left = [step]

    def dying(act: Callable[..., object]) -> Callable[..., object]:
        def step_or_die(*arguments: object, **options: object) -> object:
            left[0] -= 1
            if not left[0]:
                raise Killed
            return act(*arguments, **options)

        return step_or_die

    monkeypatch.setattr(os, "replace", dying(os.replace))
    monkeypatch.setattr(Path, "unlink", dying(Path.unlink))
    with pytest.raises(Killed):
        store.append_trials(trials(6, 2))
    monkeypatch.undo()
    monkeypatch.setattr(parts, "MOST_SMALL", 3)
    for run in (read_parts(store.path / "trials", TRIAL_SCHEMA), read_run(store.path).trials):
        assert run.column("sequence").to_pylist()[:6] == list(range(6)) and run.num_rows in (6, 8)
    reopened = RunStore(store.path)
    recorded = reopened.trials.rows
    assert recorded == len(reopened.read_trials()) in (6, 8)
    reopened.lock()
    for i in range(recorded, recorded + 8, 2):
        reopened.append_trials(trials(i, 2))
    assert [t.sequence for t in RunStore(store.path).read_trials()] == list(range(recorded + 8))


def test_parts_are_merged_but_not_across_a_gap_and_not_again_when_full(tmp_path: Path,
                                                                       monkeypatch: pytest.MonkeyPatch) -> None:
    """The lost rows of a damaged part leave a gap, behind which the next part begins."""
    monkeypatch.setattr(parts, "MOST_SMALL", 3)
    monkeypatch.setattr(parts, "FULL_ROWS", 5)
    store = make_store(tmp_path)
    for i in range(3):
        store.append_trials(trials(2 * i, 2))
    (store.path / "trials" / "part-000000002.parquet").write_bytes(b"PAR1 nonsense")
    reopened = RunStore(store.path)
    for i in range(6, 14, 2):
        reopened.append_trials(trials(i, 2))
    names = sorted(p.name for p in (store.path / "trials").glob("part-*.parquet"))
    assert names == [f"part-{first:09d}.parquet" for first in (0, 4, 10, 12)]
    assert [t.sequence for t in RunStore(store.path).read_trials()] == [0, 1, *range(4, 14)]


def test_a_run_with_thousands_of_small_parts_is_merged_when_it_is_driven_again(tmp_path: Path) -> None:
    """Also rows of a version without the newest columns."""
    store = make_store(tmp_path)
    store.append_trials(trials(0, 1))
    first = store.path / "trials" / "part-000000000.parquet"
    table = pq.read_table(first).drop_columns(["details"])
    for i in range(parts.MOST_SMALL + 2):
        pq.write_table(table.set_column(0, "sequence", pa.array([i])), first.with_name(f"part-{i:09d}.parquet"))
    driven = RunStore(store.path)
    before = driven.read_trials()
    driven.lock()
    assert [path.name for path in first.parent.iterdir()] == [first.name]
    assert RunStore(store.path).read_trials() == before and len(before) == parts.MOST_SMALL + 2


def test_whoever_drives_a_run_next_has_seen_what_was_written_before(tmp_path: Path) -> None:
    """Opened before another driver's last trials, locked after them."""
    first = make_store(tmp_path)
    second = RunStore(first.path)
    first.append_trials(trials(0, 2))
    second.lock()
    second.append_trials(trials(2, 1))
    assert [t.sequence for t in RunStore(first.path).read_trials()] == [0, 1, 2]


def test_two_drivers_are_refused(tmp_path: Path) -> None:
    store = make_store(tmp_path)
    store.lock()
    script = f"""
import sys; sys.path.insert(0, {str(Path(__file__).parents[3])!r})
from pathlib import Path
from orchestrator.record.store import RunStore
RunStore.open(Path({str(tmp_path)!r}), "run").lock()
"""
    second = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True)
    assert second.returncode != 0
    assert "being driven by another process" in second.stderr


def test_whoever_holds_the_lock_reads_the_state_once_per_change(tmp_path: Path,
                                                                monkeypatch: pytest.MonkeyPatch) -> None:
    store = make_store(tmp_path)
    reads: list[Path] = []
    store.update_state(stage="measure")
    monkeypatch.setattr("orchestrator.record.store.read_json", lambda path: (reads.append(path), read_json(path))[1])
    assert [store.state(), store.state()] == 2 * [{"stage": "measure"}] and len(reads) == 2     # others may write it
    store.lock()
    store.state()["stage"] = "mine"
    assert [store.state(), store.state()] == 2 * [{"stage": "measure"}] and len(reads) == 3
    store.update_state(budgets_ms=(1.0, 2.0))
    assert store.state() == store.state() == {"stage": "measure", "budgets_ms": [1.0, 2.0]} and len(reads) == 4


def test_state_and_events(tmp_path: Path) -> None:
    store = make_store(tmp_path)
    store.update_state(stage="measure")
    store.update_state(budgets_ms=[1.0])
    assert RunStore.open(tmp_path, "run").state() == {"stage": "measure", "budgets_ms": [1.0]}
    write_text(store.path / "state.json", "{")
    with pytest.raises(StoreError, match="damaged"):
        store.state()


# --- in an object store -----------------------------------------------------------------------------------------------


def test_a_run_in_an_object_store(s3: Server, caplog: pytest.LogCaptureFixture,
                                  monkeypatch: pytest.MonkeyPatch) -> None:
    root = as_path(s3.address("store/runs"))
    store = make_store(root)
    assert str(store.path) == f"s3://{BUCKET}/store/runs/run" and not store.recorded
    assert store.resume_command == f"paretoray resume run --runs '{s3.address('store/runs')}'"
    for first in (0, 3, 6):
        store.append_trials(trials(first, 3))
    store.update_state(stage="search")
    store.update_state(weights_version=2)
    monkeypatch.setattr(events, "FULL_BYTES", 1000)
    for number in range(30):
        store.event("controller", trials=number, text=100 * "x")
    with pytest.raises(StoreError, match="run 'run' exists already in s3://lab-runs/store/runs; go on with"):
        make_store(root)

    write_whole(store.path / "trials" / "part-000000003.parquet", b"rubbish")
    reader = RunStore.open(root, "run")
    assert [trial.sequence for trial in reader.read_trials()] == [0, 1, 2, 6, 7, 8] and reader.trials.rows == 9
    assert "is damaged" in caplog.text and reader.state() == {"stage": "search", "weights_version": 2}
    assert RunStore.open(as_path("elsewhere"), f"{root.address}".replace("/runs?", "/runs/run?")).trials.rows == 9
    reader.event("later")       # by another process, as after a crash
    found = [json.loads(line) for line in events.read_lines(store.path)]
    assert [event.get("trials") for event in found] == [*range(30), None] and found[-1]["kind"] == "later"
    assert 4 <= len(matching(store.path, "events-*.jsonl")) < 10
    with pytest.raises(StoreError, match="there is no run 'walk' in s3://lab-runs/store/runs; known runs: run"):
        RunStore.open(root, "walk")

    fresh = make_store(root, "fresh")
    fresh.lock()
    fresh.discard()
    assert not (root / "fresh").exists()
    assert len(matching(store.path / "lease", "*")) == 1
    del store       # as a notebook does between a search and `generate_models`
    reader.lock()
    reader.lock()
    assert len(matching(reader.path / "lease", "*")) == 1


def test_who_drives_a_run_is_checked_before_its_record_is_written(s3: Server) -> None:
    store = make_store(as_path(s3.address("store/taken")))
    store._lock._held._lost = "'run' was taken over"
    for write in (lambda: store.append_trials(trials(0, 1)), lambda: store.update_state(stage="x"),
                  lambda: store.event("x"), lambda: store.latency.append([{"arch_id": "a"}])):
        with pytest.raises(StoreError, match="was taken over"):
            write()
    assert RunStore(store.path).trials.rows == 0


# --- before anything starts -------------------------------------------------------------------------------------------


def test_a_folder_that_cannot_be_written_is_told_before_anything_starts(tmp_path: Path, s3: Server) -> None:
    check_writable(tmp_path / "not" / "yet" / "there")
    assert not list(tmp_path.iterdir())
    (tmp_path / "file").write_text("")
    for folder in (tmp_path / "file", tmp_path / "file" / "runs"):
        with pytest.raises(StoreError, match=r"cannot write while writing .*correct the folder's permissions"):
            check_writable(folder)
    root = as_path(s3.address("store/empty"))
    check_writable(root)
    with s3.checks_keys(), pytest.raises(StoreError, match=r"store/empty/probe-\w+ cannot be used: access is denied"):
        check_writable(root)


def test_a_full_disk_is_told_before_anything_starts(tmp_path: Path) -> None:
    limits = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (9000, limits[1]))    # writing fails with EFBIG
    try:
        with pytest.raises(StoreError, match=f"the disk is full while writing {tmp_path}"):
            check_writable(tmp_path)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, limits)
    assert not list(tmp_path.iterdir())
