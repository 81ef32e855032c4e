"""`python -m demo`, which `make demo` runs."""

import signal
import sys

# Imports take more than a second. Ctrl-C meanwhile ends the demo without a traceback; nothing runs yet.
signal.signal(signal.SIGINT, signal.SIG_DFL)

from demo.run import main  # noqa: E402 - after the above

sys.exit(main())
