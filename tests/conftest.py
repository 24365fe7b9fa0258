"""Makes the helpers beside the tests importable, and sets how examples are drawn."""

import os
import sys
from pathlib import Path

from hypothesis import settings

sys.path.insert(0, str(Path(__file__).parent))

# A shared check must not depend on the luck of the draw; at a developer's desk every run draws others.
settings.register_profile("ci", derandomize=True)
if os.environ.get("CI"):
    settings.load_profile("ci")
