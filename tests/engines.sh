#!/usr/bin/env bash
# Installs the engines that run on a processor beside castlora, and runs the tests that load adapters into them.
# Takes about ten minutes on two cores, nearly all of it for building llama.cpp.
#
#   PYTHON   the interpreter (default: python3)
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."
scratch=$(mktemp -d)
trap 'rm -rf "$scratch"' EXIT

"${PYTHON:-python3}" -m venv "$scratch/venv"
source "$scratch/venv/bin/activate"
pip install --quiet -c constraints.txt -e '.[dev,engines]'

# The source package carries the converters of the version that it builds.
pip download --quiet --no-binary :all: --no-deps -c constraints.txt llama-cpp-python -d "$scratch/sources"
pip install --quiet "$scratch"/sources/llama_cpp_python-*.tar.gz
tar -xf "$scratch"/sources/llama_cpp_python-*.tar.gz -C "$scratch/sources"
export CASTLORA_LLAMA_CPP=$(echo "$scratch"/sources/llama_cpp_python-*/vendor/llama.cpp)

pytest -m engine -rs "$@"
