"""``python -m ratel``."""

import sys

from ratel.cli import main

sys.exit(main())
