"""``python -m comeba_ext.cli``, for launchers of several processes."""

from comeba_ext.cli import main

main()
