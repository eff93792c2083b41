#!/usr/bin/env bash
# install_torch.sh PYTHON: the locked torch; the CPU build unless there is an NVIDIA GPU (3 GB of libraries less).
set -eu
"$1" -c 'import importlib.metadata as m; assert m.version("torch").startswith("2.13.0")' 2>/dev/null && exit 0
index=()
command -v nvidia-smi >/dev/null || index=(--extra-index-url https://download.pytorch.org/whl/cpu)
"$1" -m pip install -q --disable-pip-version-check --retries 0 --timeout 20 "${index[@]}" torch==2.13.0 2>/dev/null ||
  "$1" -m pip install -q --disable-pip-version-check torch==2.13.0
