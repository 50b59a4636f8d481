"""Import of a user's objects, named `package.mod:name` in configs and on the command line."""

from __future__ import annotations

from importlib import import_module
from typing import Any

from gigabatch.data.errors import GigabatchError
from gigabatch.data.failures import name_of

OBJECT_PATH = r"^\w+(\.\w+)*:\w+$"
"""Pattern of `package.mod:name`; a relative import has no package to start from."""


def import_object(path: str, where: str = "") -> Any:
    """Import the object at `package.mod:name`.

    Args:
        path: Module and name.
        where: Key or option that holds the path, which begins the message.

    Raises:
        GigabatchError: if the module or the name cannot be imported, for any reason.
    """
    module, _, name = path.partition(":")
    try:
        return getattr(import_module(module), name)
    except KeyboardInterrupt:
        raise
    except BaseException as error:  # the module is user code, which may even call sys.exit
        is_clear = isinstance(error, ImportError | AttributeError)
        reason = " ".join((str(error) if is_clear else name_of(error)).split()).rstrip(".")
        fix = (
            "Name it as package.mod:name, and install it or add its folder to PYTHONPATH, on every "
            "node."
            if is_clear
            else "Fix the module."
        )
        prefix = f"{where}: " if where else ""
        raise GigabatchError(f"{prefix}{path!r} cannot be imported: {reason}. {fix}") from error
