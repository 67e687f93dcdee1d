"""`vgrout model download`: the only command that fetches a model."""

from __future__ import annotations

import os
from pathlib import Path

from huggingface_hub import snapshot_download
from huggingface_hub.errors import (
    GatedRepoError,
    HfHubHTTPError,
    HFValidationError,
    LocalEntryNotFoundError,
    RepositoryNotFoundError,
    RevisionNotFoundError,
)

from vgrout.models.load import NEEDED
from vgrout.types import RunFailed, UserError


def download(name: str, out: Path | None = None, revision: str | None = None) -> Path:
    """Fetch what loading a model needs: into the hub's cache, or into `out`. The folder comes back.

    What is there already is not fetched again, and an interrupted download goes on. Raises UserError for a name or
    revision that the hub does not have, or does not give to this user; RunFailed where it cannot be reached.
    """
    if revision is not None and out is None:
        raise UserError("--revision goes with --out FOLDER, and then --model FOLDER: by its name a model is its newest")
    os.environ.setdefault("HF_HUB_DISABLE_TELEMETRY", "1")
    if out is not None and out.exists() and not out.is_dir():
        raise UserError(f"{out} is no folder")
    try:
        folder = Path(snapshot_download(name, revision=revision, local_dir=out, allow_patterns=NEEDED))
    except HFValidationError:
        raise UserError(f"{name!r} is no name of a model: give one as in Qwen/Qwen3-4B") from None
    except GatedRepoError:
        raise UserError(f"{name} asks for an agreement: accept it on the model's page, then `hf auth login`") from None
    except RevisionNotFoundError:
        raise UserError(f"{name} has no revision {revision!r}") from None
    except RepositoryNotFoundError:
        raise UserError(f"the hub has no model {name}, or not for this user: `hf auth login`") from None
    except (LocalEntryNotFoundError, HfHubHTTPError, OSError) as error:
        said = " ".join(str(error).split())[:160]
        raise RunFailed(f"cannot fetch {name}: {said}; the same command goes on where it stopped") from None
    if not (folder / "config.json").is_file():
        raise UserError(f"{name} is no model of transformers: it has no config.json")
    return folder
