#!/usr/bin/env python3
"""A runner that obeys the contract without a runtime: a network of n bytes takes n / 50,000 ms, the phone's reference
too. The files of its folder say more: `drift` holds the reference's drift in each of the next calls, `slow` how many
seconds the next call takes, and its process goes to `pid`."""
import json
import os
import sys
import time
from pathlib import Path

words = sys.argv[1:]
options = {words[i].lstrip("-"): words[i + 1] for i in range(0, len(words), 2) if words[i].startswith("--")}
models = words[2 * len(options):]
rounds, runs = int(options["rounds"]), int(options["runs"])
script = Path("drift")
drifts = [float(word) for word in script.read_text().split()] if script.exists() else []
drift = drifts[0] if drifts else 0.0
if drifts:
    script.write_text(" ".join(map(str, drifts[1:])))
slow = Path("slow")
if slow.exists():
    pause_s = float(slow.read_text())
    slow.rename("pid").write_text(str(os.getpid()))
    time.sleep(pause_s)
for model in models:
    if b"Unheard" in Path(model).read_bytes():
        print(json.dumps({"model": model, "error": f"cannot run {model}: no such operator"}), flush=True)
        continue
    candidate, reference = (os.path.getsize(path) / 5e4 for path in (model, options["ref"]))
    print(json.dumps({
        "model": model, "candidate_ms": [[candidate] * runs] * rounds, "clock": "thread_cpu", "affinity": [0],
        "reference_ms": [[reference * (1.0 + drift * (i % 2))] * runs for i in range(rounds)],
        "temperature_c": {"skin": 31.5}, "runtime": "onnxruntime 1.0.quick"}), flush=True)
print(json.dumps({"done": len(models)}), flush=True)
