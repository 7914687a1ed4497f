"""The command line: ``comeba demo | edit | edits | eval | ability | covariance | tune | train | generate | ui | serve | export |
experiment | report | doctor``.

Every command takes ``--json`` and then prints exactly one JSON object on stdout. Exit codes: 0 done; 1 the input was
unusable (one clear message, or ``{"error": ...}``); 2 wrong usage; 3 ``doctor`` found something missing; 130 interrupted.

``covariance``, ``edit`` and ``train`` share their work when ``torchrun`` or ``accelerate launch`` starts several processes; the first
one prints and saves.
"""

from comeba_ext.cli import editing, exporting, keeping, measuring, preparing, serving, training, ui  # noqa: F401  (in the order of --help)
from comeba_ext.cli.app import app

__all__ = ["app", "main"]


def main() -> None:
    app()
