#!/usr/bin/env bash
# Installs m3 with its demo model into .venv and asks a first question of m3's own source.
# usage: bash scripts/try.sh ["QUESTION"]
set -euo pipefail
. "$(dirname -- "${BASH_SOURCE[0]}")/environment.sh"
"$python" -m pip install --quiet --disable-pip-version-check '.[demo]'
question=${1:-"Which environment variable names the cache directory?"}
printf '$ m3 ask ./m3cli "%s"\n' "$question" >&2
exec "$root/.venv/bin/m3" ask ./m3cli "$question" --ctx 2048 --repeat-penalty 1.1
