"""`python -m jclt.cli`."""

import sys

from jclt.cli.main import main

sys.exit(main())
