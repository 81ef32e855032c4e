#!/usr/bin/env bash
# Sees to it that the dashboard's tests have a browser: the distribution's own Chromium, or any that is there already.
set -euo pipefail

for name in chromium chromium-browser google-chrome google-chrome-stable; do
  if command -v "$name" >/dev/null; then
    printf '%s is there: %s\n' "$name" "$(command -v "$name")"
    exit 0
  fi
done
if [ "$(id -u)" != 0 ] || ! command -v apt-get >/dev/null; then
  printf 'There is no Chromium here, and only root on a Debian can install it: apt-get install chromium\n' >&2
  exit 0 # the tests that need it say so themselves
fi
export DEBIAN_FRONTEND=noninteractive
apt-get update --quiet --quiet
apt-get install --yes --quiet --quiet --no-install-recommends chromium
