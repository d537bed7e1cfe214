#!/bin/bash
# Makes benchmarks/.venv-trl, the environment of the `trl` table: TRL wants a newer transformers than NeMo allows.
# torch is pinned to the version of which plain pip finds a CPU wheel; others would bring CUDA wheels.
set -euo pipefail
cd "$(dirname "$0")"
"${PYTHON:-python3.11}" -m venv --clear .venv-trl
.venv-trl/bin/python -m pip install --quiet --disable-pip-version-check -c constraints-trl.txt trl accelerate
