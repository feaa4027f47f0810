"""The version, and the command that installs an optional feature."""

__version__ = "0.1.0"


def install_command(extra: str) -> str:
    """Return the command that installs an extra, to be run in a clone: there is no release yet."""
    return f"pip install '.[{extra}]'"
