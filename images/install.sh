#!/bin/sh
# Installs the project into the virtual environment /opt/rlhf-ppo, beside what the base image has.
#   install.sh CONSTRAINTS EXTRAS [PACKAGE...]
# PACKAGES are what kfp needs besides, each without its own dependencies.
# A torch that the base image has is the vendor's, and stays: any other one breaks it.
set -eu
constraints=$1
extras=$2
shift 2
prefix=/opt/rlhf-ppo
install="python3 -m pip --python $prefix/bin/python install --no-cache-dir --disable-pip-version-check"

python3 -m venv --system-site-packages --without-pip "$prefix"
vendor=$(python3 -c 'from importlib.metadata import version; print(version("torch"))' 2>/dev/null || true)
grep -v '^torch==' "$constraints" > /tmp/constraints.txt
if [ -n "$vendor" ]; then
    echo "torch==$vendor" >> /tmp/constraints.txt
else
    grep '^torch==' "$constraints" >> /tmp/constraints.txt
fi
$install -c /tmp/constraints.txt ".[$extras]"
# KFP's executor needs kfp's own modules and no more: its pinned requests and urllib3 stay out.
$install --no-deps -c /tmp/constraints.txt kfp kfp-pipeline-spec "$@"

"$prefix/bin/python" - "$vendor" "$prefix" <<'CHECK'
import importlib.util, json, sys
from importlib.metadata import version
from pathlib import Path

vendor, prefix = sys.argv[1:]
place = Path(importlib.util.find_spec("torch").origin)
if vendor and (version("torch") != vendor or place.is_relative_to(prefix)):
    sys.exit(f"torch {version('torch')} at {place} replaced the base image's {vendor}: a package asks for another one")
note = {"torch": version("torch"), "vendor": bool(vendor)}
Path(prefix, "image.json").write_text(json.dumps(note))
CHECK
