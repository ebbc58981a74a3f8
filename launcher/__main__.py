"""`python -m launcher` and `torchrun -m launcher`."""

import sys

from launcher.distributed.starter import die_with_starter
from launcher.system.garbage_collection import own_this_process, paused_garbage_collection
from launcher.system.standard_streams import ensure_standard_streams

if __name__ == "__main__":
    ensure_standard_streams()  # before any file is opened
    die_with_starter()  # before anything slow is imported
    own_this_process()
    with paused_garbage_collection():
        from launcher.cli.main import main

    sys.exit(main())
