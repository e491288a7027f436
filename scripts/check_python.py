"""Stop set-up early, with words, on a Python that promptfed does not run on."""

import sys

if not (3, 11) <= sys.version_info[:2] <= (3, 13):
    got = ".".join(map(str, sys.version_info[:2]))
    sys.exit(f"promptfed needs Python 3.11 to 3.13; {sys.executable} is {got}. Try: make PYTHON=python3.12")
