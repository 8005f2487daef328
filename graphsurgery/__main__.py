"""`python -m graphsurgery` is the command `graphsurgery`."""

from graphsurgery.cli.app import main

main()
