"""`python -m launcher` and `torchrun -m launcher`."""

import sys

from launcher.system.processes import die_with_starter

if __name__ == "__main__":
    die_with_starter()  # before anything slow is imported
    from launcher.cli.main import main

    sys.exit(main())
