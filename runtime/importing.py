"""A script that is imported only to read its run must not train: `main.main` refuses to, torch-free."""

import contextlib
from collections.abc import Iterator
from contextvars import ContextVar
from pathlib import Path

from runtime.errors import SettingError

_script: ContextVar[Path | None] = ContextVar('script', default=None)


@contextlib.contextmanager
def only_importing(script: Path) -> Iterator[None]:
    """Within, `refuse_to_train` raises an error that names this script."""
    token = _script.set(script)
    try:
        yield
    finally:
        _script.reset(token)


def refuse_to_train() -> None:
    """Raise SettingError if a script is being imported only to read its run."""
    script = _script.get()
    if script is not None:
        raise SettingError(f"{script} trains when it is imported: put its main(...) under if __name__ == '__main__'")
