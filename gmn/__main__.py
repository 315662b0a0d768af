"""`python -m gmn` is the `gmn` command."""

from gmn.cli import main

main()
