"""``python -m fewstep``: the command line, where the script ``fewstep`` is not on the path."""

from .cli import main

main()
