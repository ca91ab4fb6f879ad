#!/usr/bin/env bash
# Installs scripts/requirements.txt into .venv, where mirage looks for NVRTC. Does nothing if it is up to date.
# Needs Python 3.9 or newer. Where Python comes without venv or pip (Debian, Docker images), the packages are
# put into the folder .venv as they are, by a pip that is fetched and checked first.
set -euo pipefail
cd "$(dirname "${BASH_SOURCE[0]}")/.."

requirements=scripts/requirements.txt
installed=.venv/.requirements.txt
cmp -s "$requirements" "$installed" && exit 0

# The last resort: pip's own wheel, which runs without being installed.
fetch_pip() {
  python3 - .venv/pip.whl <<'PYTHON'
import hashlib, sys, urllib.request
url = ("https://files.pythonhosted.org/packages/44/3c/d717024885424591d5376220b5e836c2d5293ce2011523c9de23ff7bf068/"
       "pip-25.3-py3-none-any.whl")
wheel = urllib.request.urlopen(url, timeout=60).read()
if hashlib.sha256(wheel).hexdigest() != "9655943313a94722b7774661c21049070f6bbb0a1516bf02f7c8d5d9201514cd":
    sys.exit(f"{url}: the content is not what it was")
open(sys.argv[1], "wb").write(wheel)
PYTHON
}

if ! command -v python3 >/dev/null; then
  echo "scripts/setup.sh: python3 is missing; install it, or set MIRAGE_NVRTC to a libnvrtc.so.13 of yours" >&2
  exit 1
fi
echo "Installing $(grep -v '^#' "$requirements" | paste -sd ' ') into .venv" >&2
if [[ ! -e .venv ]] && python3 -c 'import ensurepip, venv' 2>/dev/null; then
  python3 -m venv .venv
fi
mkdir -p .venv
export PIP_ROOT_USER_ACTION=ignore # it is a folder of ours
install=(install --quiet --disable-pip-version-check --requirement "$requirements")
if [[ -x .venv/bin/python ]] && .venv/bin/python -m pip --version >/dev/null 2>&1; then
  .venv/bin/python -m pip "${install[@]}"
elif python3 -m pip --version >/dev/null 2>&1; then
  python3 -m pip "${install[@]}" --upgrade --target .venv
else
  fetch_pip
  python3 .venv/pip.whl/pip "${install[@]}" --upgrade --target .venv
fi
cp "$requirements" "$installed"
