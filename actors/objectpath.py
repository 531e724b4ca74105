"""Paths in an object store (Amazon S3 and what speaks its protocol, Google Cloud Storage), used as a pathlib.Path is.

    runs = as_path("s3://bucket/runs?endpoint_override=localhost:9000&scheme=http")
    (runs / "mine" / "state.json").read_text()

`ObjectPath` has those methods of Path that a run's folder needs. What differs: an object is written whole or not at
all, without a temporary name; a folder is there while something is in it, so that `mkdir` does nothing. Any process on
any machine may use one: each opens the store with the credentials of its own environment, never with some that came
with the path.

Errors: FileNotFoundError as of a disk, ObjectStoreError (objectstore.py) for everything else.
"""
from __future__ import annotations

import contextlib
import errno
import re
from collections.abc import Iterator
from dataclasses import dataclass
from fnmatch import fnmatchcase
from pathlib import Path, PurePosixPath
from typing import TYPE_CHECKING, Any
from urllib.parse import parse_qsl, unquote, urlsplit

from actors.objectstore import OPTIONS, ObjectStoreError, opened, reason_of
from searchspaces.errors import StoreError

if TYPE_CHECKING:
    from pyarrow import NativeFile
    from pyarrow.fs import FileInfo, FileSystem

READS = 10              # of an object that others write at the same time
WRITTEN_ONCE = frozenset({".parquet", ".safetensors", ".onnx"})     # never again under the same name


@dataclass(frozen=True)
class Stat:
    st_size: int
    st_mtime: float     # seconds, by the store's clock


@dataclass(frozen=True, order=True)
class ObjectPath:
    """`key` starts with the bucket; `query` are pyarrow's options of the store. str() is for people, without them;
    `address` is what `as_path` reads back."""

    scheme: str
    key: PurePosixPath
    query: str = ""

    # --- names -------------------------------------------------------------------------------------------------------

    def __str__(self) -> str:
        return f"{self.scheme}://{self.key}"

    @property
    def address(self) -> str:
        return f"{self}?{self.query}" if self.query else str(self)

    @property
    def name(self) -> str:
        return self.key.name

    @property
    def stem(self) -> str:
        return self.key.stem

    @property
    def suffix(self) -> str:
        return self.key.suffix

    @property
    def parts(self) -> tuple[str, ...]:
        return self.key.parts

    @property
    def parent(self) -> ObjectPath:
        return self._at(self.key.parent)

    def __truediv__(self, name: str) -> ObjectPath:
        return self._at(self.key / name)

    def with_name(self, name: str) -> ObjectPath:
        return self._at(self.key.with_name(name))

    def with_suffix(self, suffix: str) -> ObjectPath:
        return self._at(self.key.with_suffix(suffix))

    def resolve(self) -> ObjectPath:
        return self

    def _at(self, key: PurePosixPath) -> ObjectPath:
        return ObjectPath(self.scheme, key, self.query)

    # --- what is there -----------------------------------------------------------------------------------------------

    def exists(self) -> bool:
        return self._kind() != "NotFound"

    def is_file(self) -> bool:
        return self._kind() == "File"

    def is_dir(self) -> bool:
        return self._kind() == "Directory"

    def stat(self) -> Stat:
        with self._plain_errors():
            return _stat(self._store.get_file_info(str(self.key)))

    def iterdir(self) -> Iterator[ObjectPath]:
        """[] where nothing is."""
        return iter(list(self.listing()))

    def listing(self) -> dict[ObjectPath, Stat]:
        """What is directly in this folder, by one request."""
        from pyarrow.fs import FileSelector

        with self._plain_errors():
            found = self._store.get_file_info(FileSelector(str(self.key), allow_not_found=True))
        return {self / info.base_name: _stat(info) for info in found}

    def glob(self, pattern: str) -> Iterator[ObjectPath]:
        """Patterns as "part-*.parquet" and "*/config.yaml"; ** is not one."""
        first, _, rest = pattern.partition("/")
        if set(first) & set("*?["):
            found = [path for path in self.iterdir() if fnmatchcase(path.name, first)]
        else:
            found = [self / first] if rest or (self / first).exists() else []
        for path in found:
            yield from path.glob(rest) if rest else [path]

    def _kind(self) -> str:
        with self._plain_errors():
            return str(self._store.get_file_info(str(self.key)).type.name)

    # --- content -----------------------------------------------------------------------------------------------------

    def read_bytes(self) -> bytes:
        """All of one version. S3 is asked for the size first and for so many bytes then, and where the object became
        another one between, Arrow returns a mixture: so it is read again where it was another one before than after."""
        for attempt in range(READS):
            stream, version = self._open()
            try:
                with self._plain_errors(), stream:
                    content = bytes(stream.read())
            except ObjectStoreError:
                if attempt == READS - 1:
                    raise
                continue
            if self.suffix in WRITTEN_ONCE or self._open()[1] == version:
                return content
        raise ObjectStoreError(errno.EIO, f"it was written again during each of {READS} readings", str(self))

    def _open(self) -> tuple[NativeFile, bytes]:
        """(from where to read it, its version; "" where a store reads one version anyway)."""
        with self._plain_errors():
            stream = self._store.open_input_stream(str(self.key))
            return stream, bytes((stream.metadata() or {}).get("ETag", b""))

    def read_text(self, errors: str = "strict") -> str:
        return self.read_bytes().decode(errors=errors)

    def write_bytes(self, content: bytes) -> None:
        """One whole object: large ones are uploaded in parts that count when all of them are there."""
        with self._plain_errors():
            stream = self._store.open_output_stream(str(self.key))
            stream.write(content)
            stream.close()  # not by `with`: closing after an error would make an object of what was uploaded

    def mkdir(self, parents: bool = False, exist_ok: bool = False) -> None:
        """Nothing to do; for code that works on disks too."""

    def unlink(self, missing_ok: bool = False) -> None:
        with contextlib.suppress(*([FileNotFoundError] if missing_ok else [])), self._plain_errors():
            self._store.delete_file(str(self.key))

    def replace(self, target: ObjectPath) -> None:
        """A copy, then the original goes."""
        with self._plain_errors():
            self._store.move(str(self.key), str(target.key))

    def rmtree(self) -> None:
        with self._plain_errors():
            self._store.delete_dir(str(self.key))

    # --- inside ------------------------------------------------------------------------------------------------------

    @property
    def _store(self) -> FileSystem:
        return opened(self.scheme, self.key.parts[0], self.query)

    @contextlib.contextmanager
    def _plain_errors(self) -> Iterator[None]:
        try:
            yield
        except ObjectStoreError as error:   # of opening the store
            raise ObjectStoreError(error.errno, error.strerror, str(self)) from error.__cause__
        except FileNotFoundError as error:
            raise FileNotFoundError(errno.ENOENT, "No such object", str(self)) from error
        except (OSError, ValueError) as error:      # Arrow's own errors are ValueErrors
            raise ObjectStoreError(errno.EIO, reason_of(str(error)), str(self)) from error


AnyPath = Path | ObjectPath


def as_path(address: str | AnyPath) -> AnyPath:
    """A path on a disk ("runs", "file:///data/runs") or in an object store. StoreError where it is neither; nothing is
    looked at yet."""
    if not isinstance(address, str):
        return address
    match = re.fullmatch(r"([A-Za-z][A-Za-z0-9+.-]+)://([^/?]*)(/[^?]*)?(?:\?(.*))?", address)
    if match is None:
        return Path(address)
    scheme, bucket, key, query = match[1].lower(), match[2], match[3] or "", match[4] or ""
    if scheme == "file":
        return _of_a_disk(address)
    scheme = "gs" if scheme == "gcs" else scheme
    if scheme not in OPTIONS:
        raise StoreError(f"'{scheme}://' is no kind of store that runs can be kept in; use a folder, "
                         "s3://BUCKET/FOLDER, gs://BUCKET/FOLDER or file:///FOLDER")
    if "@" in bucket:
        raise StoreError(f"the address {scheme}://...@{bucket.rpartition('@')[2]}{key} has credentials in it, which "
                         "would be printed and recorded; give them in the environment (AWS_ACCESS_KEY_ID and "
                         "AWS_SECRET_ACCESS_KEY), in a profile or by the machine's role")
    if not bucket:
        raise StoreError(f"'{scheme}://{key}' names no bucket; write {scheme}://BUCKET/FOLDER")
    unknown = [name for name, _ in parse_qsl(query, keep_blank_values=True) if name not in OPTIONS[scheme]]
    if unknown:
        raise StoreError(f"'{unknown[0]}' is no option of {scheme}://{bucket}{key}; there are "
                         f"{', '.join(OPTIONS[scheme])}")
    return ObjectPath(scheme, PurePosixPath(bucket + key), query)


def address_of(path: AnyPath) -> str:
    """What `as_path` reads back, from whatever folder and on any machine that shares the path."""
    return path.address if isinstance(path, ObjectPath) else str(path.absolute())


def absolute(path: str | AnyPath) -> AnyPath:
    """For processes with another working folder; ~ is the user's home."""
    path = as_path(path)
    return path.expanduser().absolute() if isinstance(path, Path) else path


def matching(folder: AnyPath, pattern: str) -> list[AnyPath]:
    """`glob`, sorted."""
    found: list[AnyPath] = [*folder.glob(pattern)]
    return sorted(found)


def parquet_source(path: AnyPath) -> Any:
    """What pyarrow.parquet reads a file from."""
    if isinstance(path, Path):
        return path
    import pyarrow as pa

    return pa.BufferReader(path.read_bytes())


def _of_a_disk(address: str) -> Path:
    parts = urlsplit(address)
    if parts.netloc not in ("", "localhost"):
        raise StoreError(f"{address} names the machine '{parts.netloc}'; write file:///FOLDER, with three slashes")
    return Path(unquote(parts.path))


def _stat(info: FileInfo) -> Stat:
    return Stat(info.size or 0, info.mtime.timestamp() if info.mtime else 0.0)
