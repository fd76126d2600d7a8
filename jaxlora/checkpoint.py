"""Save and restore a whole training state, so that a run that was killed goes on as if it had not been.

    output_dir/checkpoint-40/
        state/            what a step changes, by orbax: adapter, optimizer state, step and random key
        checkpoint.json   names, dtypes and shapes in `state`, and what the run must know, such as its place in the data
        ...               what `write` puts there, such as the adapter as PEFT files

The frozen weights are not in it: they are the base checkpoint's. A checkpoint is written under another name and renamed
when it is whole, so that a folder called checkpoint-N is never half of one.
"""

from __future__ import annotations

import json
import os
import re
import shutil
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp

from jaxlora.train import TrainState

_STATE, _MANIFEST = "state", "checkpoint.json"
_NAME = re.compile(r"checkpoint-(\d+)")
_UNFINISHED, _REMOVED = "unfinished-", "removed-"  # prefixes of a folder that is being written or deleted


def save(
    output_dir: str | Path,
    state: TrainState,
    *,
    extra: Mapping[str, Any],
    write: Callable[[Path], None] | None = None,
    save_total_limit: int | None = None,
) -> Path:
    """Write `output_dir/checkpoint-{state.step}` and return its path. An older one of that name is replaced.

    Args:
        extra: JSON-able; `restore` gives it back.
        write: puts further files into the folder that it is given. `state/` and `checkpoint.json` are taken.
        save_total_limit: how many checkpoints to keep, the last written ones; None is all.
    """
    output_dir = Path(output_dir).absolute()  # orbax takes no relative path
    final = output_dir / f"checkpoint-{int(state.step)}"
    unfinished = output_dir / (_UNFINISHED + final.name)
    for prefix in (_UNFINISHED, _REMOVED):  # of a run that was killed here
        for leftover in output_dir.glob(prefix + "checkpoint-*"):
            shutil.rmtree(leftover)
    unfinished.mkdir(parents=True)

    import orbax.checkpoint as ocp  # a sixth of what importing the library took, and not every run saves

    arrays = _by_name(state)
    with ocp.StandardCheckpointer() as checkpointer:
        checkpointer.save(unfinished / _STATE, {name: _raw(array) for name, array in arrays.items()})
    if write is not None:
        write(unfinished)
    manifest = {
        "step": int(state.step),
        "written": time.time(),
        "arrays": {name: _describe(array) for name, array in arrays.items()},
        "extra": dict(extra),
    }
    (unfinished / _MANIFEST).write_text(json.dumps(manifest, indent=1))
    _flush(unfinished)

    if final.exists():
        _remove(final)
    unfinished.rename(final)
    _flush_path(output_dir)
    if save_total_limit is not None:
        for old in checkpoints(output_dir)[:-save_total_limit]:
            _remove(old)
    return final


def restore(path: str | Path, like: TrainState) -> tuple[TrainState, dict[str, Any]]:
    """The state in a checkpoint and its `extra`. Arrays are placed as in `like`, a state before the first step.

    Raises:
        FileNotFoundError: no such folder.
        ValueError: no checkpoint, or a damaged one, or one of another adapter or optimizer; says what differs.
    """
    path = Path(path).absolute()
    if not path.is_dir():
        raise FileNotFoundError(f"{path}: no such checkpoint folder")
    manifest = _read_manifest(path)
    if manifest is None:
        raise ValueError(
            f"{path} is not a checkpoint to resume from: it has no readable {_MANIFEST}. Name a folder "
            "checkpoint-N that training wrote; adapter files alone are for FastLanguageModel.from_pretrained"
        )
    arrays = _by_name(like)
    _check(path, manifest["arrays"], {name: _describe(array) for name, array in arrays.items()})

    import orbax.checkpoint as ocp

    target = {name: _abstract(_raw(array)) for name, array in arrays.items()}
    try:
        with ocp.StandardCheckpointer() as checkpointer:
            restored = checkpointer.restore(path / _STATE, target)
    except (ValueError, OSError) as error:
        raise ValueError(f"{path} is damaged: {error}. Resume from an earlier checkpoint") from error
    leaves = [
        jax.random.wrap_key_data(restored[name], impl=jax.random.key_impl(array)) if _is_key(array) else restored[name]
        for name, array in arrays.items()
    ]
    return jax.tree.unflatten(jax.tree.structure(like), leaves), manifest["extra"]


def checkpoints(output_dir: str | Path) -> list[Path]:
    """The complete checkpoints of a folder, the last written one last.

    By the time and not by the number, which says nothing when a later run into the same folder starts anew.
    """
    found = []
    for path in Path(output_dir).glob("checkpoint-*"):
        manifest = _read_manifest(path) if _NAME.fullmatch(path.name) else None
        if manifest is not None:
            found.append((manifest["written"], manifest["step"], path))
    return [path for *_, path in sorted(found)]


def latest_checkpoint(output_dir: str | Path) -> Path | None:
    """The complete checkpoint that was written last, or None."""
    return next(reversed(checkpoints(output_dir)), None)


def _read_manifest(path: Path) -> dict[str, Any] | None:
    try:
        return json.loads((path / _MANIFEST).read_text())
    except (OSError, ValueError):
        return None


def _by_name(state: TrainState) -> dict[str, jax.Array]:
    """Every array in the tree's order, under a name such as "trainable.model.layers.0.period.0.mlp.up_proj.lora_A"."""
    leaves = jax.tree_util.tree_leaves_with_path(state)
    return {
        jax.tree_util.keystr(path, simple=True, separator=".").removesuffix(".value"): leaf for path, leaf in leaves
    }


def _is_key(array: jax.Array) -> bool:
    return jnp.issubdtype(array.dtype, jax.dtypes.prng_key)


def _raw(array: jax.Array) -> jax.Array:
    return jax.random.key_data(array) if _is_key(array) else array


def _abstract(array: jax.Array) -> jax.ShapeDtypeStruct:
    return jax.ShapeDtypeStruct(array.shape, array.dtype, sharding=array.sharding)


def _describe(array: jax.Array) -> str:
    return f"{array.dtype}{list(array.shape)}"


def _check(path: Path, saved: Mapping[str, str], here: Mapping[str, str]) -> None:
    """Compare what a checkpoint holds with what this run needs, the adapter first: its optimizer state follows it."""
    parts = (
        ("adapter", "trainable.", "r, target_modules and base model"),
        ("optimizer state", "opt_state.", "optim and max_grad_norm"),
        ("state", "", "JAX random number implementation"),
    )
    for part, prefix, settings in parts:
        then = {name: what for name, what in saved.items() if name.startswith(prefix)}
        now = {name: what for name, what in here.items() if name.startswith(prefix)}
        problems = [
            f"{len(names)} {kind}: {'; '.join(names[:4])}{' …' if len(names) > 4 else ''}"
            for kind, names in (
                ("only in the checkpoint", sorted(then.keys() - now.keys())),
                ("only in this run", sorted(now.keys() - then.keys())),
                ("of another form", [f"{n} is {then[n]}, here {now[n]}" for n in now if then.get(n, now[n]) != now[n]]),
            )
            if names
        ]
        if problems:
            raise ValueError(
                f"{path} does not fit this run: its {part} differs, {' | '.join(problems)}. "
                f"Resume with the same {settings}, or start a new run in another output_dir"
            )


def _remove(path: Path) -> None:
    """Delete a checkpoint. It loses its name first, so that a kill halfway leaves nothing that looks whole."""
    doomed = path.with_name(_REMOVED + path.name)
    path.rename(doomed)
    shutil.rmtree(doomed)


def _flush(folder: Path) -> None:
    """Bring a folder's bytes to the disk: a rename may outlive a power cut that its files do not."""
    for path in (*folder.rglob("*"), folder):
        _flush_path(path)


def _flush_path(path: Path) -> None:
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
