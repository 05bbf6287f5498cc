#!/usr/bin/env bash
# Installs Debian's chromium, with which tests (tests/browser.py) look at pages. Safe to run again.
set -euo pipefail

if command -v chromium >/dev/null; then
    echo "chromium is installed: $(command -v chromium)"
    exit 0
fi
if ! command -v apt-get >/dev/null; then
    echo "error: no apt-get here. Install chromium with this system's package manager; without it the test is skipped." >&2
    exit 1
fi
if [ "$(id -u)" -ne 0 ]; then
    echo "error: installing needs root: run 'sudo $0'" >&2
    exit 1
fi
export DEBIAN_FRONTEND=noninteractive
apt-get update -qq
if ! apt-get install -y -qq --no-install-recommends chromium fonts-dejavu-core >/dev/null; then
    echo "error: apt-get cannot install the package 'chromium' (on Ubuntu it is a snap: snap install chromium)" >&2
    exit 1
fi
echo "installed $(command -v chromium)"
