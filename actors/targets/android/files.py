"""What lies on a phone: our folder, the runner with its libraries, models by checksum; and how a runner is started.

    FOLDER/CHECKSUM/runner, FOLDER/CHECKSUM/*.so      one folder per runner, kept
    FOLDER/models/CHECKSUM.onnx                       pushed when needed, removed by `close`, or after a day
    FOLDER/pid                                        of the runner that was started last
"""
from __future__ import annotations

import hashlib
import shlex
from collections.abc import Mapping, Sequence
from pathlib import Path

import onnx

from searchspaces.errors import ConfigError, TargetError
from searchspaces.onnxpixels import timed_size

FOLDER = "/data/local/tmp/paretoray"
MODELS = f"{FOLDER}/models"


def bounded(command: str, limit_s: float) -> str:
    """Ends what an earlier call left running, then runs the command for at most `limit_s`, whatever the link does.

    Only a process of this folder is ended: a phone reuses process numbers.
    """
    pid = f"{FOLDER}/pid"
    only_one = "exec " if "\n" not in command else ""
    return (f"p=$(cat {pid} 2>/dev/null) && grep -q {FOLDER} /proc/$p/cmdline 2>/dev/null && "
            f"{{ pkill -9 -P $p; kill -9 $p; }}; "
            f"timeout -s KILL {limit_s:.0f} sh -c {shlex.quote(f'echo $$ > {pid}; {only_one}{command}')}")


def program(runner: str, libraries: Sequence[str]) -> dict[str, bytes]:
    """File name on the phone -> content."""
    files = {}
    for name, path in [("runner", Path(runner)), *((Path(library).name, Path(library)) for library in libraries)]:
        if not path.is_file():
            raise ConfigError(f"target android: {path} is not a file; runner and libraries are files of this machine, "
                              "built for the phone's processor (docs/android.md)")
        files[name] = path.read_bytes()
    return files


def program_folder(files: Mapping[str, bytes]) -> str:
    return f"{FOLDER}/{digest(b''.join(name.encode() + content for name, content in sorted(files.items())))}"


def digest(content: bytes) -> str:
    return hashlib.sha256(content).hexdigest()[:16]


def with_sizes(content: bytes, batch: int) -> bytes:
    """The file with its free dimensions fixed: the first to the batch, others to what the file's metadata says that it
    is timed with. TargetError where it is no ONNX file or made for another batch."""
    try:
        model = onnx.load_model_from_string(content)
    except Exception as error:      # protobuf's own family
        raise TargetError("the network is not an ONNX file") from error
    sizes = timed_size({entry.key: entry.value for entry in model.metadata_props})
    for value in model.graph.input:
        dimensions = value.type.tensor_type.shape.dim
        for dimension in dimensions[1:]:
            if dimension.dim_param in sizes:
                dimension.dim_value = sizes[dimension.dim_param]
        first = dimensions[0] if dimensions else None
        if first is not None and not first.HasField("dim_value"):
            first.dim_value = batch
        elif first is not None and first.dim_value != batch:
            raise TargetError(f"the network is made for batch {first.dim_value}, this target measures batch {batch}")
    return bytes(model.SerializeToString()) if model.graph.input else content
