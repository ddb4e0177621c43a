"""`python -m luthier` is `luthier`."""

import sys

from .cli import main

sys.exit(main())
