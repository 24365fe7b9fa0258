"""An audit for people: one HTML file, made from audit.json alone, that loads nothing and runs nothing.

`schema.json` beside this file says what audit.json holds.
"""

from rgap.report.reading import FORMAT, KIND, ReportError
from rgap.report.render import render, write

__all__ = ["FORMAT", "KIND", "ReportError", "render", "write"]
