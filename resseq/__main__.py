"""``python -m resseq``: the command line."""

import sys

from resseq.cli import main

sys.exit(main())
