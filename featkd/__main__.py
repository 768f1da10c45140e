"""`python -m featkd`: the command line under torchrun."""

import sys

from featkd.cli.main import main

sys.exit(main())
