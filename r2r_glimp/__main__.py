"""`python -m r2r_glimp`: the same as the console script `r2r-glimp`."""

import sys

from r2r_glimp.cli.main import main

if __name__ == "__main__":
    sys.exit(main())
