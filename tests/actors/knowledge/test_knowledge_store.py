"""The folder of the knowledge pool: many processes read, write and die in it, disks are full, files are damaged."""
from __future__ import annotations

import errno
import logging
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest

from actors.knowledge import store as knowledgestore
from actors.knowledge.pool import KnowledgePool
from actors.knowledge.store import ABANDONED_S
from tests.actors.knowledge.knowledgeprocess import BASE, EPOCHS, QUERIES, SPACE, Row, check_marks, insert, other, rows


@pytest.fixture
def row() -> Row:
    return BASE.copy()


@pytest.fixture
def pool(tmp_path: Path) -> KnowledgePool:
    return KnowledgePool(tmp_path / "pool", SPACE, EPOCHS)


def files(pool_folder: Path, pattern: str = "*.safetensors") -> list[Path]:
    return sorted((pool_folder / f"epochs-{EPOCHS}" / "entries").glob(pattern))


# --- entries ---------------------------------------------------------------------------------------------------------


def test_the_same_key_is_overwritten(pool: KnowledgePool, tmp_path: Path, row: Row) -> None:
    insert(pool, row, 1)
    insert(pool, row, 2)
    assert pool.start(row, active=True).lineage == (2,) * 10
    assert pool.statistics()["entries"] == 10 == len(files(tmp_path / "pool"))


def test_a_clock_behind_the_others_does_not_hide_what_is_new(pool: KnowledgePool, row: Row,
                                                             monkeypatch: pytest.MonkeyPatch) -> None:
    insert(pool, row, 1)
    monkeypatch.setattr(time, "time_ns", lambda: 1)
    insert(pool, row, 2)
    assert pool.statistics()["lineage_smallest"] == 2
    assert pool.start(row, active=True).lineage == (2,) * 10


def test_the_oldest_entries_make_room(tmp_path: Path) -> None:
    pool = KnowledgePool(tmp_path / "pool", SPACE, EPOCHS, maximum_mb=1.5)
    tokens = rows(8, seed=1)
    for mark, each in enumerate(tokens):
        insert(pool, each, mark)
        assert sum(path.stat().st_size for path in files(tmp_path / "pool")) <= 1.5e6
    statistics = pool.statistics()
    assert statistics["megabytes"] <= 1.5 and statistics["lineage_smallest"] > 0
    assert check_marks(pool.start(tokens[-1], active=True)) == 10
    assert pool.start(tokens[0], active=True).hits < QUERIES


def test_the_limit_is_that_of_the_whole_folder(tmp_path: Path) -> None:
    """Networks of another number of epochs count, and the older ones go first; the pool in use keeps its newest."""
    folder, tokens = tmp_path / "pool", rows(6, seed=1)
    before = KnowledgePool(folder, SPACE, EPOCHS)
    for mark, each in enumerate(tokens[:3], start=1):
        insert(before, each, mark)
    size_mb = before.statistics()["megabytes"]
    now = KnowledgePool(folder, SPACE, EPOCHS + 1, maximum_mb=size_mb)
    assert before.start(tokens[2], active=True).lineage == (3,) * 10, "there is room for what is there"
    for mark, each in enumerate(tokens[3:], start=4):
        insert(now, each, mark)
        assert sum(path.stat().st_size for path in folder.rglob("*.safetensors")) <= size_mb * 1e6
        assert now.start(each, active=True).lineage == (mark,) * 10
    assert before.start(tokens[0], active=True).hits < QUERIES
    assert before.statistics()["megabytes"] + now.statistics()["megabytes"] <= size_mb
    smaller = KnowledgePool(folder, SPACE, EPOCHS + 1, maximum_mb=0.8 * size_mb)
    assert sum(path.stat().st_size for path in folder.rglob("*.safetensors")) <= 0.8 * size_mb * 1e6
    assert check_marks(smaller.start(tokens[-1], active=True)) > 0


def test_another_process_sees_all_after_compactions(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(knowledgestore, "MAXIMUM_PARTS", 4)
    pool = KnowledgePool(tmp_path / "pool", SPACE, EPOCHS)
    reader = KnowledgePool(tmp_path / "pool", SPACE, EPOCHS)
    tokens = rows(12, seed=2)
    for mark, each in enumerate(tokens):
        insert(pool, each, mark)
        assert reader.start(each, active=True).lineage == (mark,) * 10
    parts = list((tmp_path / "pool" / f"epochs-{EPOCHS}" / "index").glob("part-*.parquet"))
    assert len(parts) <= 4
    for each in tokens:
        assert check_marks(reader.start(each, active=True)) == 10


# --- damage ----------------------------------------------------------------------------------------------------------


def test_a_damaged_entry_is_dropped_and_the_rest_serves(tmp_path: Path, row: Row,
                                                        caplog: pytest.LogCaptureFixture) -> None:
    pool = KnowledgePool(tmp_path / "pool", SPACE, EPOCHS)
    insert(pool, other(row, (2, 1)), 1)
    insert(pool, row, 2)
    exact = next(path for path in files(tmp_path / "pool") if path.name.startswith("2-2.0."))
    content = bytearray(exact.read_bytes())
    content[-7] ^= 1                                    # one bit
    exact.write_bytes(bytes(content))
    with caplog.at_level(logging.WARNING):
        start = pool.start(row, active=True)
    assert "damaged" in caplog.text and pool.statistics()["damaged"] == 1
    assert start.lineage == (2, 2, 2, 1, 2, 2, 2, 2, 2, 2) and start.hits == QUERIES    # the next best instead
    assert exact.with_name(exact.name + ".damaged").exists() and not exact.exists()
    insert(pool, row, 3)
    assert check_marks(KnowledgePool(tmp_path / "pool", SPACE, EPOCHS).start(row, active=True)) == 10


def test_a_damaged_index_is_made_again_from_the_entries(tmp_path: Path, pool: KnowledgePool, row: Row,
                                                        caplog: pytest.LogCaptureFixture) -> None:
    insert(pool, row, 1)
    insert(pool, other(row, (1, 2)), 2)
    for part in (tmp_path / "pool" / f"epochs-{EPOCHS}" / "index").glob("part-*.parquet"):
        content = bytearray(part.read_bytes())
        content[40] ^= 255
        part.write_bytes(bytes(content))
    with caplog.at_level(logging.WARNING):
        fresh = KnowledgePool(tmp_path / "pool", SPACE, EPOCHS)
        assert fresh.start(row, active=True).lineage == (2, 2, 1, *[2] * 7)
    assert "damaged" in caplog.text and fresh.statistics()["entries"] == 11


def test_files_of_a_dead_writer_are_adopted_or_cleared_away(tmp_path: Path, row: Row) -> None:
    pool = KnowledgePool(tmp_path / "pool", SPACE, EPOCHS)
    insert(pool, row, 1)
    for part in (tmp_path / "pool" / f"epochs-{EPOCHS}" / "index").glob("part-*.parquet"):
        part.unlink()                                   # killed between the entries and their rows
    entries = files(tmp_path / "pool")[0].parent
    for name, age_s in ((".young.safetensors.1", 0.0), (".old.safetensors.1", 2 * ABANDONED_S)):
        (entries / name).write_bytes(b"half")
        os.utime(entries / name, (time.time() - age_s,) * 2)
    (entries / "5-half.safetensors").write_bytes(b"\x10\0\0\0\0\0\0\0{")
    stem = next(path for path in files(tmp_path / "pool") if "stem" in path.name)
    stem.write_bytes(stem.read_bytes()[:-1] + b"!")
    fresh = KnowledgePool(tmp_path / "pool", SPACE, EPOCHS)
    assert check_marks(fresh.start(row, active=True)) == 9 and fresh.statistics()["damaged"] == 2
    assert [path.name for path in entries.glob(".*")] == [".young.safetensors.1"]


# --- processes -------------------------------------------------------------------------------------------------------


def process(mode: str, folder: Path, seed: int, count: int) -> subprocess.Popen[str]:
    return subprocess.Popen([sys.executable, "-m", "tests.actors.knowledge.knowledgeprocess", mode, str(folder),
                             str(seed), str(count)], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
                            cwd=Path(__file__).parents[3])


def test_a_full_disk_skips_the_network_and_leaves_no_half_file(tmp_path: Path, row: Row) -> None:
    folder = tmp_path / "pool"
    insert(KnowledgePool(folder, SPACE, EPOCHS), row, 7)
    before = files(folder, "*")
    worker = process("full", folder, 1, 3)
    out, err = worker.communicate(timeout=60)
    assert worker.returncode == 0, err
    assert out.split()[:3] == ["skipped"] * 3 and "skipped=3" in out and "entries=10" in out
    assert files(folder, "*") + files(folder, ".*") == before
    assert check_marks(KnowledgePool(folder, SPACE, EPOCHS).start(row, active=True)) == 10


def test_a_disk_that_fills_up_before_the_index_is_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch,
                                                          caplog: pytest.LogCaptureFixture) -> None:
    def full(path: Path, found: object) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    pool = KnowledgePool(tmp_path / "pool", SPACE, EPOCHS)
    insert(pool, BASE, 1)
    insert(pool, other(BASE, (1, 1)), 2)
    before = files(tmp_path / "pool", "*")
    monkeypatch.setattr(knowledgestore, "write_index", full)
    assert not insert(pool, other(BASE, (2, 1)), 3)
    assert files(tmp_path / "pool", "*") == before and "No space left" in caplog.text
    reader = KnowledgePool(tmp_path / "pool", SPACE, EPOCHS)        # cannot compact, and says so
    assert "cannot be compacted" in caplog.text
    assert check_marks(reader.start(BASE, active=True)) == 10 == len(before) - 1


def test_writers_and_readers_in_several_processes_agree(tmp_path: Path) -> None:
    """Three processes insert, read, evict and compact in one folder of 0.6 MB, about one network."""
    folder = tmp_path / "pool"
    workers = [process("crowd", folder, seed, 15) for seed in range(1, 4)]
    for worker in workers:
        out, err = worker.communicate(timeout=120)
        assert worker.returncode == 0, err
        assert out.count("stored") == 15 and "damaged=0" in out and "found=0" not in out, out + err
        assert "Traceback" not in err and "damaged" not in err, err
    pool = KnowledgePool(folder, SPACE, EPOCHS, maximum_mb=0.6)
    statistics = pool.statistics()
    assert 0 < statistics["megabytes"] <= 0.6
    assert {path.name for path in files(folder)} == {e.file for e in pool._store.entries().values()}


def test_a_killed_writer_leaves_a_pool_that_serves(tmp_path: Path) -> None:
    folder = tmp_path / "pool"
    stored: list[int] = []
    for seed in (1, 2):
        worker = process("write", folder, seed, 400)
        assert worker.stdout is not None
        done = 0
        while done < 4 + seed:
            assert worker.stdout.readline().strip() == "stored"
            done += 1
        time.sleep(0.017 * seed)                        # somewhere in the middle of the next one
        worker.send_signal(signal.SIGKILL)
        worker.wait(timeout=30)
        stored.append(done)
    pool = KnowledgePool(folder, SPACE, EPOCHS)
    for seed, done in zip((1, 2), stored, strict=True):
        for tokens in SPACE.sample_uniform(np.random.default_rng(seed), 400)[:done]:
            start = pool.start(tokens, active=True)
            assert check_marks(start) == 10 and start.hits == QUERIES
    assert pool.statistics()["damaged"] == 0
