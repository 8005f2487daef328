"""Passes that other packages register under the entry-point group `graphsurgery.passes`.

```toml
[project.entry-points."graphsurgery.passes"]
my-pass = "my_package.my_module:MyPass"
```
"""

from __future__ import annotations

from importlib.metadata import entry_points

from graphsurgery.errors import PassError
from graphsurgery.rewrite.contracts import Pass

__all__ = ["GROUP", "registered_passes"]

GROUP = "graphsurgery.passes"


def registered_passes() -> dict[str, type[Pass]]:
    """Load all registered passes.

    Returns:
        Pass classes by their own `name`, in order of that name.

    Raises:
        PassError: An entry point cannot be loaded, is no `Pass`, or uses a name twice; the message names its
            package.
    """
    found: dict[str, type[Pass]] = {}
    for entry in sorted(entry_points(group=GROUP), key=lambda entry: entry.name):
        where = f"entry point {entry.name!r} = {entry.value!r} of group {GROUP!r}"
        if entry.dist is not None:
            where += f" (package {entry.dist.name} {entry.dist.version})"
        try:
            loaded = entry.load()
        except Exception as error:
            raise PassError(
                f"{where} cannot be loaded ({type(error).__name__}: {error}); update or uninstall it"
            ) from error
        if not (isinstance(loaded, type) and issubclass(loaded, Pass)):
            raise PassError(f"{where} is {loaded!r}, expected a subclass of graphsurgery.Pass")
        if loaded.name in found:
            raise PassError(f"{where} registers the pass name {loaded.name!r}, which is taken already")
        found[loaded.name] = loaded
    return dict(sorted(found.items()))
