"""What is said where another library's exception comes as far as the command line: one sentence for each family.

Whoever knows what it was doing says so closer to the cause. This is the net below: disks, databases, Ray, Arrow and
safetensors fail in more ways than anybody foresees. What is not of these families is a fault of ours, and shows its
traceback.
"""

import errno


def explain(error: Exception) -> str | None:
    """One sentence for an exception of a library's own or of the system's; None for one that is neither.

    A family is known by the module of the exception's classes, so that none of the libraries is imported for it.
    """
    families = {kind.__module__.partition(".")[0] for kind in type(error).__mro__}
    if isinstance(error, OSError):
        return _of_system(error)
    if families & {"sqlalchemy", "sqlite3", "psycopg"}:
        from hypernas.store.patience import reason  # brings SQLAlchemy, which is here already

        return f"the store's database failed: {reason(error)}"
    if "ray" in families:
        return f"Ray failed: {_first_line(error)} (its logs are under /tmp/ray); what is stored stays, --resume goes on"
    if "pyarrow" in families:
        return f"a file of data cannot be read: {_first_line(error)}"
    if type(error).__name__ == "SafetensorError":  # its module is Rust's
        return f"a file of weights cannot be read: {_first_line(error)}; export or train the trial again"
    return None


def _of_system(error: OSError) -> str:
    what = error.strerror or _first_line(error)
    full = error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)
    where = error.filename if error.filename is not None else "writing" if full else ""
    return f"{where}: {what}".removeprefix(": ") + ("; make room there and try again" if full else "")


def _first_line(error: object) -> str:
    lines = str(error).strip().splitlines()
    return lines[0] if lines else type(error).__name__
