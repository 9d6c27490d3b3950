"""Models of a Hugging Face hub by their names, in its cache: no code, and no file that is already there."""

import os
import re
from collections.abc import Iterator
from functools import cache
from pathlib import Path
from typing import Any, NamedTuple

from xlstm_ray.errors import CheckpointError, DownloadError, UsageError, one_line

# The files that are read. Pickled weights and code are never downloaded.
SMALL = "config.json", "generation_config.json", "tokenizer.json", "tokenizer_config.json", "chat_template.jinja"
WEIGHTS = "model.safetensors", "model-*.safetensors", "model.safetensors.index.json"
_NAME = re.compile(r"[\w.-]+/[\w.-]+(@[\w./-]+)?")


def is_name(model: Path, folder: Path = Path()) -> bool:
    """Whether it is "owner/name" or "owner/name@revision" of a hub. What is in a directory that is there is a path.

    folder: the directory that a path would be relative to.
    """
    return _NAME.fullmatch(str(model)) is not None and not os.path.isdir((folder / model).parent)


def split(name: str) -> tuple[str, str | None]:
    """The repository and the revision of "owner/name" or "owner/name@revision"."""
    repo, at, revision = name.partition("@")
    if at and not revision:
        raise UsageError(f"{name!r} names no revision after the @; give a branch, tag or commit, or leave the @ out")
    return repo, revision or None


def directory_of(model: Path) -> Path:
    """The directory of a model. A directory that is there wins over a hub's name; of a hub's model, all but the weights
    is downloaded: `require_weights` is for those.
    """
    try:
        if model.is_dir():
            return model
    except OSError as err:
        raise CheckpointError(f"{model}: cannot be read ({err.strerror})") from None
    if is_name(model):
        return _small(str(model))
    raise CheckpointError(
        f"{model}: is not a directory; `model` takes one with config.json, tokenizer.json and safetensors weights, or "
        "the name of a model of the Hugging Face hub, owner/name"
    )


@cache  # a process uses one revision of a model
def _small(name: str) -> Path:
    repo, revision = split(name)
    try:
        return download(repo, revision=revision, weights=False)
    except DownloadError as err:
        raise DownloadError(f"{name}: is not a directory here, and on the hub: {err}") from None


def require_weights(model: Path, *, bars: bool = False) -> None:
    """Download a model's weights if it is a hub's, of the revision that `directory_of` has. bars: as in `download`."""
    if not os.path.isdir(model):
        commit = directory_of(model).name
        download(split(str(model))[0], revision=commit, bars=bars)


def name_of(model: Path) -> str:
    """What people call a model: its directory's name, or its name on the hub."""
    return model.resolve().name if os.path.isdir(model) else split(str(model))[0]


def fetched_by(directory: Path) -> str | None:
    """The command that fetches a directory of the hub's cache on another machine; None for other directories."""
    found = re.fullmatch(r"models--([^/]+?)--([^/]+)/snapshots/([0-9a-f]+)", "/".join(directory.parts[-3:]))
    return found and "xlstm-ray download {}/{}@{}".format(*found.groups())


def download(
    repo: str,
    *,
    revision: str | None = None,
    cache: Path | None = None,
    offline: bool = False,
    weights: bool = True,
    bars: bool = False,
) -> Path:
    """Download what is missing of a model repository ("owner/name"); returns its local directory, whose name is the
    commit.

    revision: a branch, tag or commit. cache: a directory in place of the hub's own (HF_HOME). offline: use
    only what is there. weights: False for all that is small. bars: show the progress on standard error. A broken
    connection is resumed at the byte where it broke. If that fails, DownloadError is raised, and the next call fetches
    the incomplete files.
    """
    from huggingface_hub import errors, snapshot_download
    from huggingface_hub.utils import tqdm

    class NoBar(tqdm):
        def __init__(self, *args: Any, **kwargs: Any):
            super().__init__(*args, **{**kwargs, "disable": True})

    try:
        path = snapshot_download(
            repo,
            revision=revision,
            cache_dir=cache,
            local_files_only=offline,
            allow_patterns=[*SMALL, *(WEIGHTS if weights else ())],
            tqdm_class=None if bars else NoBar,
        )
    except errors.HFValidationError as err:
        raise DownloadError(f"{repo!r} is not the name of a repository: {one_line(err)}") from None
    except errors.RevisionNotFoundError:
        raise DownloadError(f"{repo} has no revision {revision!r}; give a branch, tag or commit of it") from None
    except errors.GatedRepoError:
        raise DownloadError(f"{repo} asks for consent: accept its terms on the hub, then `hf auth login`") from None
    except errors.RepositoryNotFoundError:
        raise DownloadError(f"{repo} is not there, or not for all: check the name, or `hf auth login`") from None
    except errors.LocalEntryNotFoundError as err:  # the hub does not answer, or offline was asked for
        why = "it was to be taken from there"
        if isinstance(err.__cause__, errors.OfflineModeIsEnabled):
            why = "HF_HUB_OFFLINE is set"
        elif not offline:
            why = f"the hub does not answer: {one_line(err.__cause__ or err)}"
        raise DownloadError(f"{repo} is not whole in the cache, and {why}; run it once with the network") from None
    except (errors.HTTPError, OSError) as err:
        raise DownloadError(f"{repo} could not be fetched: {one_line(err)}; run it again for the rest") from None
    return Path(path)


class Cached(NamedTuple):
    """A revision of a model in the cache."""

    name: str  # "owner/name", with "@revision" unless that is main
    commit: str
    directory: Path
    bytes: int


def cached(cache: Path | None = None) -> Iterator[Cached]:
    """Every model of the cache, by name. cache: as in `download`."""
    from huggingface_hub import scan_cache_dir
    from huggingface_hub.errors import CacheNotFound

    try:
        repos = scan_cache_dir(cache).repos
    except CacheNotFound:
        return
    except ValueError:  # the hub's own word for a file
        raise UsageError(f"{cache}: is not a directory") from None
    for repo in sorted((repo for repo in repos if repo.repo_type == "model"), key=lambda repo: repo.repo_id):
        for revision in sorted(repo.revisions, key=lambda revision: revision.commit_hash):
            for ref in sorted(revision.refs) or [revision.commit_hash]:
                name = repo.repo_id if ref == "main" else f"{repo.repo_id}@{ref}"
                yield Cached(name, revision.commit_hash, revision.snapshot_path, revision.size_on_disk)


def is_whole(model: Cached, cache: Path | None = None) -> bool:
    """Whether all its files are there: a download may have been broken off."""
    try:
        download(split(model.name)[0], revision=model.commit, cache=cache, offline=True)
    except DownloadError:
        return False
    return any(model.directory.glob("*.safetensors"))
