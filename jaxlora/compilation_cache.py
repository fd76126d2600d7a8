"""Compiled programs that outlive their process: JAX's persistent compilation cache, with all of a run in it."""

from __future__ import annotations

from pathlib import Path

import jax

DEFAULT = "~/.cache/jaxlora/compiled"
_MOST_BYTES = 4 * 2**30


def keep_compiled(compilation_cache: str | None = DEFAULT) -> None:
    """Keep compiled programs in a folder, from which a later process takes them: it compiles nothing that has been.

    A program is found again if its operations, shapes and device, the versions of JAX and the flags of XLA are the
    same. The folder keeps to 4 GiB by forgetting what was not used for longest. It is of the whole process, and counts
    from the next compilation on: call this before a model is loaded. JAX by itself keeps nothing, and with
    JAX_COMPILATION_CACHE_DIR what takes a second and more to compile; a run has a hundred smaller programs.

    Args:
        compilation_cache: folder for compiled programs, which makes the next run of like shapes start without
            compiling; "none" for none. One that JAX has been told of, as by JAX_COMPILATION_CACHE_DIR, is kept to
            unless another is given.

    Raises:
        OSError: the folder cannot be made.
    """
    if compilation_cache is None:
        return
    told = jax.config.jax_compilation_cache_dir  # pyright: ignore[reportAttributeAccessIssue]
    if compilation_cache == DEFAULT and told is not None:
        return
    folder = Path(compilation_cache).expanduser()
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        reason = f"no folder for compiled programs can be made there ({error.strerror}): name another, or none"
        raise OSError(error.errno, reason, str(folder)) from error
    jax.config.update("jax_compilation_cache_dir", str(folder))
    jax.config.update("jax_compilation_cache_max_size", _MOST_BYTES)
    jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.0)
