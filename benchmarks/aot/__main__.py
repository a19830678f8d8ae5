"""`python -m benchmarks.aot`; see `benchmarks.aot.run`."""

import sys

from benchmarks.aot.run import main

if __name__ == "__main__":
    sys.exit(main())
