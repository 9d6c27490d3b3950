"""Download models from a Hugging Face hub into its cache: no code, and no file that is already there."""

from pathlib import Path

from huggingface_hub import errors, snapshot_download

from xlstm_ray.errors import DownloadError, one_line

# The files that `--model` reads. Pickled weights and code are never downloaded.
FILES = [
    *("config.json", "generation_config.json", "tokenizer.json", "tokenizer_config.json", "chat_template.jinja"),
    *("model.safetensors", "model-*.safetensors", "model.safetensors.index.json"),
]


def download(repo: str, *, revision: str | None = None, cache: Path | None = None, offline: bool = False) -> Path:
    """Download what is missing of a model repository ("owner/name"); returns its local directory.

    revision: a branch, tag or commit. cache: a directory in place of the hub's own (HF_HOME). offline: use
    only what is there. A bar shows the progress on standard error. A broken connection is resumed at the byte where it
    broke. If that fails, DownloadError is raised, and the next call fetches the incomplete files.
    """
    try:
        path = snapshot_download(
            repo, revision=revision, cache_dir=cache, local_files_only=offline, allow_patterns=FILES
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
        if not offline:
            why = f"the hub does not answer: {one_line(err.__cause__ or err)}"
        raise DownloadError(f"{repo} is not whole in the cache, and {why}; run it once with the network") from None
    except (errors.HTTPError, OSError) as err:
        raise DownloadError(f"{repo} could not be fetched: {one_line(err)}; run it again for the rest") from None
    return Path(path)
