#!/usr/bin/env bash
# Makes .venv, installs m3 with its test extra, lints, type-checks, and runs the tests.
# usage: bash scripts/test.sh [pytest arguments]
set -euo pipefail
. "$(dirname -- "${BASH_SOURCE[0]}")/environment.sh"
"$python" -m pip install --quiet --disable-pip-version-check --editable '.[dev]'
bin=$root/.venv/bin
"$bin/ruff" check .
"$bin/ruff" format --check .
"$bin/mypy"
"$bin/lint-imports"
exec "$bin/pytest" --numprocesses auto --dist loadfile --no-loadscope-reorder "$@"
