"""`python -m featkd`, which torchrun needs."""

import sys

from featkd.cli import main

sys.exit(main())
