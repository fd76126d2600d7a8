"""Write the files of a folder so that nobody ever finds half of them."""

from __future__ import annotations

import contextlib
import os
import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path


@contextlib.contextmanager
def staged(folder: str | Path) -> Iterator[Path]:
    """A fresh folder to write files into, which move into `folder` if the block ends well and vanish if it does not.

    Files of the same name are replaced. Each moves in one step: weights first and config.json or adapter_config.json
    last, since a folder counts as a checkpoint from the moment that it has one.

    Raises:
        OSError: `folder` cannot be made or written to.
    """
    folder = Path(folder)
    is_new = not folder.exists()
    try:
        folder.mkdir(parents=True, exist_ok=True)
        stage = Path(tempfile.mkdtemp(prefix=".partial-", dir=folder))
    except OSError as error:
        reason = f"cannot save there ({error.strerror}): choose a folder that can be written to"
        raise OSError(error.errno, reason, str(folder)) from error
    try:
        yield stage
        for path in sorted(stage.iterdir(), key=_order):
            if path.is_dir():
                shutil.rmtree(folder / path.name, ignore_errors=True)
            os.replace(path, folder / path.name)
    finally:
        shutil.rmtree(stage)
        if is_new:
            with contextlib.suppress(OSError):
                folder.rmdir()  # succeeds only where nothing was written


def _order(path: Path) -> tuple[bool, bool, str]:
    return path.name in ("config.json", "adapter_config.json"), path.suffix != ".safetensors", path.name
