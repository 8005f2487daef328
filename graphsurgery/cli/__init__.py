"""Command line: `graphsurgery optimize | verify | inspect | passes`. Only this part of the package prints."""
