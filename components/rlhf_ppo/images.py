"""The container images that the steps run in.

The tag is this package's version: KFP's cache key holds the image, so a new release never gets an old one's results.
"""

from __future__ import annotations

from rlhf_ppo import __version__

CPU_IMAGE = f"rlhf-ppo/cpu:{__version__}"
