"""``python -m pytest_gpulab``: the `gpulab` command."""

import sys

from pytest_gpulab.cli import main

sys.exit(main())
