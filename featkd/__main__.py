"""`python -m featkd`, which torchrun needs."""

import sys

from featkd.cli.main import main

sys.exit(main())
