"""Folders of edits on the Hugging Face hub, by the conventions of :mod:`huggingface_hub`."""

from __future__ import annotations

import re
from contextlib import nullcontext
from pathlib import Path

from comeba_ext.errors import StorageError
from comeba_ext.storage import CARD, MANIFEST, alone, file_patterns, files_of, read_manifest

_NAME = re.compile(r"[A-Za-z0-9][\w.-]*/[\w.-]+")


def is_hub_name(name: str | Path) -> bool:
    """Whether something is written as a repository's name is (``"user/name"``), and no file or folder has that name."""
    return re.fullmatch(_NAME, str(name)) is not None and not Path(name).exists()  # as it was given: "./user/name" is a path


def where_to_load(name: str) -> str:
    """A model's name on the hub; or, where the hub cannot be reached, the folder of the copy that an earlier call left in the cache.
    The hub is asked once; Transformers asks it six times for each file.

    Raises:
        StorageError: it cannot be reached, and there is no copy.
    """
    from huggingface_hub import get_hf_file_metadata, hf_hub_url, try_to_load_from_cache
    from huggingface_hub.errors import HfHubHTTPError, HFValidationError

    try:
        get_hf_file_metadata(hf_hub_url(name, "config.json"), timeout=10)
    except (HfHubHTTPError, HFValidationError):  # an answer: of the hub, or that it cannot be a name there
        return name
    except Exception as error:  # of the network, of whatever library is used for it
        if isinstance(kept := try_to_load_from_cache(name, "config.json"), str):
            return str(Path(kept).parent)
        raise StorageError(f"there is no such folder, no copy of a model of that name, and no way to the hub ({_first(error)})") from None
    return name


def local_folder(folder: str | Path, *kinds: str, revision: str | None = None, token: str | bool | None = None) -> str | Path:
    """The folder itself; or, where there is none and the name is that of a repository (``"user/name"``), its copy in the hub's cache.

    Args:
        kinds: of files that are needed (:func:`~comeba_ext.storage.read_folder`); the manifest always is.
        revision: branch, tag or commit; token: as in :func:`huggingface_hub.snapshot_download`.

    Raises:
        StorageError: there is neither, or the hub cannot be reached and has not been asked for it before.
    """
    if not is_hub_name(folder):
        return folder
    from huggingface_hub import snapshot_download

    name = str(folder)
    try:
        return snapshot_download(name, revision=revision, token=token, allow_patterns=[MANIFEST, *file_patterns(*kinds)])
    except Exception as error:  # of the network, of the hub, of the name: each library on the way has kinds of its own
        raise StorageError(f"there is no folder {name}, and no edits of that name could be had from the hub: {_first(error)}") from None


def push_to_hub(
    folder: str | Path,
    repo_id: str,
    *,
    commit_message: str = "Push edits using comeba_ext.",
    private: bool | None = None,
    token: str | bool | None = None,
    branch: str | None = None,
    create_pr: bool | None = None,
) -> str:
    """Push a folder of edits, as :meth:`Editor.save_pretrained` wrote it, with its card, in place of what an earlier push left
    there. Other files in the folder are not pushed.

    Args:
        folder: of edits. Saved with ``inference_only=True`` it holds what is needed to use them and no more; otherwise also the
            requests, the log and the key memory.
        repo_id: ``"user/name"``; made where it is not there.
        private, token, branch, create_pr, commit_message: as in :meth:`huggingface_hub.ModelHubMixin.push_to_hub`.

    Returns:
        Address of the commit.

    Raises:
        StorageError: there are no edits in the folder, it is being written to, or the hub refuses or cannot be reached.
    """
    from huggingface_hub import HfApi

    with alone(Path(folder)) if Path(folder).is_dir() else nullcontext():
        manifest = read_manifest(folder)
        names = [name for name in (MANIFEST, CARD, *sorted(files_of(manifest))) if name == MANIFEST or (Path(folder) / name).exists()]
        missing = sorted(files_of(manifest) - set(names))
        if missing:
            raise StorageError(f"{folder} is incomplete: {missing[0]} is missing; nothing was pushed")
        api = HfApi(token=token, library_name="comeba_ext")
        try:
            repo_id = api.create_repo(repo_id, private=private, exist_ok=True).repo_id
            if branch is not None:
                api.create_branch(repo_id, branch=branch, exist_ok=True)
            done = api.upload_folder(
                repo_id=repo_id,
                folder_path=folder,
                commit_message=commit_message,
                revision=branch,
                create_pr=create_pr,
                allow_patterns=names,
                delete_patterns=["comeba_*"],
            )
        except Exception as error:
            raise StorageError(f"the hub did not take {folder} as {repo_id}: {_first(error)}") from None
    return done.pr_url if create_pr and done.pr_url else done.commit_url


def _first(error: Exception) -> str:
    return (str(error).strip() or type(error).__name__).splitlines()[0]
