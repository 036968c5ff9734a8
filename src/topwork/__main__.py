"""`python -m topwork`."""

from topwork.cli.app import main

main()
