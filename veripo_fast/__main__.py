"""`python -m veripo_fast`: the console script, for `torchrun -m veripo_fast train ...`."""

import sys

from veripo_fast.cli import main

if __name__ == "__main__":
    sys.exit(main())
