"""`python -m itda`."""

import sys

from itda.cli.main import main

if __name__ == "__main__":
    sys.exit(main())
