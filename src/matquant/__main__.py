"""`python -m matquant`."""

import sys

from matquant.cli import main

sys.exit(main())
