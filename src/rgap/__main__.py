"""``python -m rgap``, where the command is not on the path."""

import sys

from rgap.cli import main

sys.argv[0] = "rgap"
main()
