# Sourced by try.sh and test.sh: makes .venv at the top of the repository and sets $python to its interpreter.
# Needs Python 3.10 or newer with venv, and a C++ compiler for llama-cpp-python, which pip builds from source.
root=$(cd -- "$(dirname -- "${BASH_SOURCE[0]}")/.." && pwd)
cd -- "$root"

need() { printf '%s\n%s\n' "error: $1" "$2" >&2; exit 3; }

base=""
for candidate in "${PYTHON:-}" python3 python; do
  if [ -n "$candidate" ] && command -v "$candidate" >/dev/null 2>&1 &&
    "$candidate" -c 'import sys, venv; sys.exit(sys.version_info < (3, 10))' 2>/dev/null; then
    base=$candidate
    break
  fi
done
[ -n "$base" ] || need "No Python 3.10 or newer with the venv module was found." \
  "Install one (Debian: apt-get install python3 python3-venv python3-dev), or name it: PYTHON=python3.12 bash $0"

python=$root/.venv/bin/python
"$python" -c 'import pip' 2>/dev/null || "$base" -m venv --clear "$root/.venv" ||
  need "The virtual environment $root/.venv could not be made." "Debian keeps that module apart: apt-get install python3-venv"

if ! "$python" -c 'import llama_cpp' 2>/dev/null; then
  compiler=""
  for candidate in "${CXX:-}" c++ g++ clang++; do
    [ -n "$candidate" ] && command -v "${candidate%% *}" >/dev/null 2>&1 && compiler=$candidate && break
  done
  [ -n "$compiler" ] || need "No C++ compiler was found, and llama.cpp has to be built once." \
    "Install one (Debian: apt-get install g++; macOS: xcode-select --install) and run this again."
  echo "Installing; the first time this builds llama.cpp, which takes a few minutes." >&2
fi
