"""`python -m graphsurgery` is the command `graphsurgery`."""

from graphsurgery.cli import main

main()
