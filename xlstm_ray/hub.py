"""Models from a Hugging Face hub into its cache: nothing executable, and nothing that is there already."""

from pathlib import Path

from huggingface_hub import errors, snapshot_download

from xlstm_ray.errors import DownloadError, one_line

# What `--model` takes. Weights that are pickled, or code, are never fetched.
FILES = [
    *("config.json", "generation_config.json", "tokenizer.json"),
    *("model.safetensors", "model-*.safetensors", "model.safetensors.index.json"),
]


def download(repo: str, *, revision: str | None = None, cache: Path | None = None, offline: bool = False) -> Path:
    """The local directory of a model repository ("owner/name"), fetched as far as it is not there yet.

    revision: a branch, tag or commit. cache: instead of the hub's own (HF_HOME). offline: take what is there, ask
    nobody. A bar shows the progress on standard error. A connection that breaks is taken up at the byte where it broke;
    where that fails, DownloadError is raised, and the next call fetches the files that have not arrived whole.
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
    except errors.LocalEntryNotFoundError as err:  # nobody answers, or nobody was to be asked
        why = "it was to be taken from there"
        if not offline:
            why = f"the hub does not answer: {one_line(err.__cause__ or err)}"
        raise DownloadError(f"{repo} is not whole in the cache, and {why}; run it once with the network") from None
    except (errors.HTTPError, OSError) as err:
        raise DownloadError(f"{repo} could not be fetched: {one_line(err)}; run it again for the rest") from None
    return Path(path)
