"""One process at a time in a folder of an object store, by claims that expire.

Object stores have no locks. Whoever wants the folder writes a claim, an object of its own, and lists all claims then:
alone it holds the folder, otherwise it withdraws. Stores list whatever was written before, so of two that claim at the
same moment at least one sees the other: never do both hold, at worst both withdraw.

A holder writes its claim again every HEARTBEAT_S. Ages are told by the store's clock alone, from the times of the
claims, so that clocks of machines do not matter. A claim that is SILENT_S old is of a dead process, and removed; that
of a process of this machine which has ended is removed at once. The successor's claim names it, so that a holder that
had only been suspended or cut off finds out at its next heartbeat, at the latest before it writes (`check`).
"""
from __future__ import annotations

import atexit
import contextlib
import errno
import json
import logging
import os
import platform
import random
import threading
import time
import uuid
from collections.abc import Mapping
from typing import Any

import psutil

from actors.objectpath import ObjectPath, Stat
from actors.objectstore import ObjectStoreError
from searchspaces.errors import StoreError

log = logging.getLogger(__name__)
HEARTBEAT_S = 10.0
SILENT_S = 60.0     # six heartbeats: longer than a store's hiccup, shorter than a person's patience


class HeldError(StoreError):
    """Another process is alive and holds the folder."""


class Lease:
    """`Lease.claim(folder)` to hold it; `check()` before what only the holder may do; `release()` at the end, which a
    process that ends by itself does too."""

    def __init__(self, folder: ObjectPath, heartbeat_s: float, silent_s: float) -> None:
        self._claim = folder / "lease" / f"{uuid.uuid4().hex}.json"
        self._folder, self._heartbeat_s, self._silent_s = folder, heartbeat_s, silent_s
        self._after: list[str] = []     # claims of the dead that this one replaces
        self._renewed_s = 0.0           # by this machine's clock, which goes on while it is suspended
        self._lost = ""
        self._ended, self._turn = threading.Event(), threading.Lock()

    @classmethod
    def claim(cls, folder: ObjectPath, heartbeat_s: float = HEARTBEAT_S, silent_s: float = SILENT_S,
              patience_s: float | None = None) -> Lease:
        """HeldError once another holder has shown that it lives, after at most a heartbeat or two; where the last one
        is dead, waits until its claim has expired. `patience_s`: waits no longer than that."""
        lease = cls(folder, heartbeat_s, silent_s)
        try:
            lease._take(silent_s + 2 * heartbeat_s if patience_s is None else patience_s)
        except BaseException:
            lease.release()
            raise
        atexit.register(lease.release)
        threading.Thread(target=lease._beat, daemon=True, name=f"lease of {folder.name}").start()
        return lease

    def check(self) -> None:
        """StoreError where another process has taken the folder over. Costs nothing while the heart beats."""
        if not self._lost and time.time() - self._renewed_s > self._silent_s / 2:
            self._renew()
        if self._lost:
            raise StoreError(self._lost)

    def release(self) -> None:
        """May be repeated; the store need not answer any more."""
        self._ended.set()
        atexit.unregister(self.release)
        with self._turn, contextlib.suppress(OSError):
            self._claim.unlink(missing_ok=True)

    # --- taking ------------------------------------------------------------------------------------------------------

    def _take(self, patience_s: float) -> None:
        deadline_s, first = time.monotonic() + patience_s, dict[ObjectPath, float]()
        while True:
            self._write()
            others, now = self._others()
            living = {claim: stat for claim, stat in others.items() if not self._bury(claim, stat, now)}
            if not living:
                self._write()       # with the names of the dead
                return
            self._claim.unlink(missing_ok=True)
            claim, stat = max(living.items(), key=lambda item: item[1].st_mtime)
            owner, silent_s = self._owner(claim), now - stat.st_mtime
            if stat.st_mtime > first.get(claim, stat.st_mtime) or time.monotonic() > deadline_s:
                raise HeldError(f"'{self._folder.name}' is being driven by another process ({owner}); wait for it or "
                                "stop it")
            if not first:
                log.warning("'%s' is held by another process (%s), last heard of %.0f s ago; waiting up to %.0f s to "
                            "see whether it lives", self._folder.name, owner, silent_s, patience_s)
            first = {other: seen.st_mtime for other, seen in living.items()} | first
            time.sleep(min(1.0, self._heartbeat_s / 2) * (0.5 + random.random()))  # not in step with another one

    def _bury(self, claim: ObjectPath, stat: Stat, now: float) -> bool:
        """Is the claim of a dead process? It is removed then."""
        facts = _facts(claim)
        if facts is None:
            return True     # withdrawn meanwhile
        silent_s = now - stat.st_mtime
        if silent_s <= self._silent_s and not _ended_here(facts):
            return False
        if silent_s > self._silent_s:
            log.warning("'%s' is taken over from a process that has been silent for %.0f s (%s)", self._folder.name,
                        silent_s, facts.get("owner", "unknown"))
        self._after.append(claim.name)
        claim.unlink(missing_ok=True)
        return True

    def _owner(self, claim: ObjectPath) -> str:
        return str((_facts(claim) or {}).get("owner", "unknown"))

    def _others(self) -> tuple[dict[ObjectPath, Stat], float]:
        """All other claims, and the store's time when this one was written. StoreError where it is not there."""
        claims = (self._folder / "lease").listing()
        own = claims.pop(self._claim, None)
        if own is None:
            why = "it was just written and is not listed; the store must list its objects at once"
            raise ObjectStoreError(errno.EIO, why, str(self._claim))
        return claims, own.st_mtime

    # --- holding -----------------------------------------------------------------------------------------------------

    def _beat(self) -> None:
        while not self._ended.wait(self._heartbeat_s):
            try:
                self._renew()
            except OSError as error:    # it may answer again; whoever writes finds out
                log.debug("no heartbeat of %s (%s)", self._claim, error)

    def _renew(self) -> None:
        with self._turn:
            if self._ended.is_set() or self._lost:
                return
            claims = (self._folder / "lease").listing()
            successors = [claim for claim in claims if claim != self._claim
                          and self._claim.name in (_facts(claim) or {}).get("after", ())]
            if successors or self._claim not in claims:
                who = f" ({self._owner(successors[0])})" if successors else ""
                self._lost = (f"'{self._folder.name}' was taken over by another process{who}, because this one had not "
                              f"been heard of for {self._silent_s:g} s; this one stops, everything recorded is kept")
                return
            self._write()

    def _write(self) -> None:
        started_s = time.time()
        self._claim.write_bytes(json.dumps(_this_process() | {"after": self._after}).encode())
        self._renewed_s = started_s


def _this_process() -> dict[str, Any]:
    process = psutil.Process()
    return {"owner": f"{platform.node()}, process {process.pid}", "pid": process.pid,
            "started": process.create_time(), "pids_of": _pids_of()}


def _pids_of() -> str:
    """Names the numbering of processes: of this boot, and of this container. "" where a system does not tell."""
    try:
        with open("/proc/sys/kernel/random/boot_id") as file:
            return f"{file.read().strip()} {os.readlink('/proc/self/ns/pid')}"
    except OSError:
        return ""


def _ended_here(facts: Mapping[str, Any]) -> bool:
    """Was it a process of this machine, that is no more?"""
    if not _pids_of() or facts.get("pids_of") != _pids_of():
        return False
    try:
        process = psutil.Process(int(facts["pid"]))
        return (process.status() == psutil.STATUS_ZOMBIE
                or abs(process.create_time() - float(facts["started"])) > 1.0)
    except psutil.NoSuchProcess:
        return True
    except (psutil.Error, KeyError, TypeError, ValueError):
        return False


def _facts(claim: ObjectPath) -> dict[str, Any] | None:
    """What a claim says, {} where it says nothing; None where it is gone."""
    try:
        found = json.loads(claim.read_bytes())
    except FileNotFoundError:
        return None
    except ValueError:
        return {}
    return found if isinstance(found, dict) else {}
