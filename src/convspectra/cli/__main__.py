"""``python -m convspectra.cli``, for launchers such as torchrun."""

import sys

from convspectra.cli import main

sys.exit(main())
