"""Command line: `graphsurgery optimize | verify | inspect | passes`. Only this part of the package prints."""

from graphsurgery.cli.app import main

__all__ = ["main"]
