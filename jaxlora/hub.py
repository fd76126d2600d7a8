"""Names -> files: a path as it is, or what a model is read from out of a repository on the Hugging Face hub.

Few repositories hold one copy of a model. What is fetched is what is read: config.json, the tokenizer's files, and the
safetensors files that the index names, or model.safetensors, or an adapter's. So no pickle and no second copy in
another layout ("original/", consolidated.safetensors) takes time or disk.

Cache, resumption, tokens and proxies are huggingface_hub's, and so are its environment variables (HF_HUB_OFFLINE,
HF_ENDPOINT, HF_TOKEN, ...).
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from huggingface_hub import HfApi, constants, snapshot_download
from huggingface_hub.errors import (
    GatedRepoError,
    HfHubHTTPError,
    HFValidationError,
    HTTPError,  # pyright: ignore[reportPrivateImportUsage]  # httpx's, which has another home in huggingface_hub 2
    LocalEntryNotFoundError,
    RepositoryNotFoundError,
    RevisionNotFoundError,
)

_ADAPTER_CONFIG, _ADAPTER_WEIGHTS = "adapter_config.json", "adapter_model.safetensors"
_INDEX = "model.safetensors.index.json"
_SMALL_FILES = [
    "config.json", "generation_config.json", _ADAPTER_CONFIG, _INDEX,
    "tokenizer*", "special_tokens_map.json", "added_tokens.json", "vocab*", "merges.txt", "spiece.model",
    "sentencepiece.bpe.model", "tekken.json", "chat_template*", "additional_chat_templates/*",
]  # fmt: skip


def resolve_path(
    name: str | Path,
    *,
    token: str | bool | None = None,
    revision: str | None = None,
    cache_dir: str | Path | None = None,
    local_files_only: bool = False,
) -> Path:
    """The folder or .gguf file of a name: itself if it is there, else the cached snapshot of a repository of the hub.

    Args:
        token: sent to the hub; None is the stored one, if any, and False is none.
        revision: branch, tag or commit; None is the main branch.
        cache_dir: where snapshots lie, None is huggingface_hub's place.
        local_files_only: take what the cache has, and ask nobody.

    Raises:
        FileNotFoundError: neither a path that exists nor a repository or revision that can be seen, or one that is not
            in the cache and may not be asked for; the message says which.
        ValueError: the repository holds no weights that are read: pickles only, GGUF files only, or none.
        PermissionError: the repository is gated, or the token was refused.
        ConnectionError: the hub cannot be reached, or a download broke off and did not go on.
        OSError: the hub answered with another error.
    """
    path = Path(name).expanduser()
    if path.exists():
        return path
    repo = str(name)
    if repo.startswith((".", "/", "~")) or repo.count("/") > 1 or path.suffix == ".gguf":
        raise FileNotFoundError(f"{name}: no such file or folder")
    options: dict[str, Any] = dict(token=token, cache_dir=cache_dir, local_files_only=local_files_only)
    try:
        folder = Path(str(snapshot_download(repo, revision=revision, allow_patterns=_SMALL_FILES, **options)))
        weights = _weight_files(folder)
        # By its commit, so that a push between the two calls cannot mix two models.
        snapshot_download(repo, revision=folder.name, allow_patterns=weights, **options)
        if not any((folder / file).exists() for file in weights):
            raise _without_weights(repo, folder.name, token, local_files_only)
    except HFValidationError as error:
        raise FileNotFoundError(f"{name}: no such folder, and no Hugging Face id either ({error})") from error
    except (HTTPError, LocalEntryNotFoundError) as error:
        raise _explained(error, repo, revision, local_files_only) from error
    return folder


def _weight_files(folder: Path) -> list[str]:
    """The files of tensors that the small files speak of."""
    if (folder / _ADAPTER_CONFIG).exists():
        return [_ADAPTER_WEIGHTS]
    try:
        return sorted(set(json.loads((folder / _INDEX).read_text())["weight_map"].values()))
    except FileNotFoundError:
        return ["model.safetensors"]
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise OSError(f"{folder / _INDEX}: no JSON with a weight_map ({error!r}): delete it, and load again") from error


def _without_weights(repo: str, commit: str, token: str | bool | None, local_files_only: bool) -> Exception:
    """Why none of the weight files is there."""
    if local_files_only or constants.HF_HUB_OFFLINE:
        return FileNotFoundError(f"{repo}: the cache has no weights of it: load it once with the network")
    files = HfApi(token=token).list_repo_files(repo, revision=commit)
    if pickles := [file for file in files if file.endswith((".bin", ".pt", ".pth"))]:
        return ValueError(
            f"{repo} holds pickle weights only ({', '.join(pickles[:3])}), which can run code when read, and are "
            "refused: take a revision that has safetensors (on the hub, the pull request of the safetensors bot: "
            'revision="refs/pr/N"), or convert them yourself'
        )
    if ggufs := [file for file in files if file.endswith(".gguf")]:
        return ValueError(
            f"{repo} holds GGUF files only ({', '.join(ggufs[:3])}): fetch one with `hf download {repo} {ggufs[0]}`, "
            "and give its path"
        )
    found = ", ".join(files[:8])
    return ValueError(
        f"{repo} holds neither model.safetensors nor an index of its parts nor an adapter; it has {found}"
    )


def _explained(error: Exception, repo: str, revision: str | None, local_files_only: bool) -> OSError:
    """An error of huggingface_hub in one sentence, with the mend."""
    host = constants.ENDPOINT
    status = error.response.status_code if isinstance(error, HfHubHTTPError) else None
    if isinstance(error, GatedRepoError):
        return PermissionError(
            f"{repo} is gated: accept its licence at {host}/{repo}, and then log in with `hf auth login`, or pass the "
            "token of the account that did as token=..."
        )
    if isinstance(error, RepositoryNotFoundError):
        return FileNotFoundError(
            f"{repo}: no such folder, and no repository of that name on {host}, or a private one: check the spelling; "
            "for a private one, log in with `hf auth login` or pass token=..."
        )
    if isinstance(error, RevisionNotFoundError):
        return FileNotFoundError(f"{repo} has no revision {revision!r}: see the branches and tags at {host}/{repo}")
    if status in (401, 403):
        return PermissionError(f"{repo}: the hub refused the token (status {status}): log in anew with `hf auth login`")
    if status is not None:
        return OSError(f"{repo}: {host} answered with status {status}: {_first_line(error)}")
    if isinstance(error, LocalEntryNotFoundError):
        if local_files_only or constants.HF_HUB_OFFLINE:
            switch = "local_files_only=True" if local_files_only else "HF_HUB_OFFLINE"
            what = f"{repo} at revision {revision!r}" if revision else repo
            return FileNotFoundError(
                f"{what}: no such folder, and not, or not wholly, in Hugging Face's cache, while {switch} forbids to "
                "ask for it: check the spelling, or load it once with the network"
            )
        return ConnectionError(f"{repo}: no such folder, not in the cache, and {host} cannot be reached")
    return ConnectionError(
        f"{repo}: the download broke off ({_first_line(error)}): try again; files that are complete are kept"
    )


def _first_line(error: Any) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0]
