"""`python -m raytower.cli`, the command line where no script is installed."""

import sys

from raytower.cli import main

sys.exit(main())
