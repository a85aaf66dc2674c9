#!/bin/sh
# Makes the image NAME (localhost/base:bookworm) from Debian's own packages, for machines that reach Debian and the Python
# package index but no registry: Python 3.11 as python:3.11-slim-bookworm has it. Needs mmdebstrap, and podman or docker.
#   images/make_base.sh [NAME]
set -eu
name=${1:-localhost/base:bookworm}
engine=${ENGINE:-$(command -v podman || command -v docker)}
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
# What this machine trusts the image trusts, so that pip works behind the same proxies.
mmdebstrap --quiet --variant=apt --include=python3,python3-venv,python3-pip,ca-certificates --customize-hook='
  rm -f "$1"/usr/lib/python3*/EXTERNALLY-MANAGED
  cp /etc/ssl/certs/ca-certificates.crt "$1"/etc/ssl/certs/ca-certificates.crt' bookworm "$work/base.tar"
"$engine" import --change 'ENV PIP_CERT=/etc/ssl/certs/ca-certificates.crt' --change 'CMD ["python3"]' \
    "$work/base.tar" "$name"
