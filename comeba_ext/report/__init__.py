"""A page to look at: any number of experiments in one HTML file that needs nothing else.

page = report.build([report.read(folder) for folder in folders])      # or: comeba report FOLDER … --out report.html
"""

from comeba_ext.report.page import build
from comeba_ext.report.results import Results, read

__all__ = ["Results", "build", "read"]
