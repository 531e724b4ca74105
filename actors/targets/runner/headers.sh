#!/usr/bin/env bash
# Puts ONNX Runtime's headers into FOLDER/usr/include/onnxruntime, from Debian's package libonnxruntime-dev (85 kB).
# Debian has it from version 13 on; this asks the machine's own mirror for it and leaves the system as it is.
#
#     ORT_INCLUDE_DIR=$(actors/targets/runner/headers.sh FOLDER)
set -euo pipefail
suite=trixie
folder=$(mkdir -p "$1" && cd "$1" && pwd)
headers=$folder/usr/include/onnxruntime
if [ ! -e "$headers/onnxruntime_cxx_api.h" ]; then
    mirror=$(apt-get indextargets --format '$(REPO_URI)' 'Created-By: Packages' | head -n 1)
    mkdir -p "$folder"/apt/{lists,archives}/partial
    echo "deb [signed-by=/usr/share/keyrings/debian-archive-keyring.gpg] $mirror $suite main" > "$folder/apt/sources.list"
    options=(-qq -o "Dir::Etc::sourcelist=$folder/apt/sources.list" -o Dir::Etc::sourceparts=/dev/null
             -o "Dir::State::lists=$folder/apt/lists" -o "Dir::Cache=$folder/apt" -o APT::Sandbox::User=root)
    apt-get "${options[@]}" update >&2
    (cd "$folder" && apt-get "${options[@]}" download libonnxruntime-dev >&2 && dpkg-deb -x libonnxruntime-dev_*.deb .)
    rm -rf "$folder/apt"
fi
echo "$headers"
