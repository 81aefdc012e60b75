"""`python -m zmqtasks`: the same as the command `zmqtasks`."""

import sys

from zmqtasks.cli.main import main

if __name__ == "__main__":
    sys.exit(main())
