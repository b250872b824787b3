"""``python -m apex_fast``: the command ``apex-fast``, where it is not on the path."""

import sys

from apex_fast.cli import main

if __name__ == "__main__":
    sys.exit(main())
