"""An export on the Hugging Face hub: checked before a training that takes days, pushed after it.

The token is that of the environment (HF_TOKEN), never a file's; it stands in no message.
"""

from __future__ import annotations

import os
import shlex
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from huggingface_hub import CommitOperationAdd, HfApi

from nemo_brain.convert.export import MARK

KEY = "model.push_to"


def check_push(repo: str) -> None:
    """Makes the repository, private, where there is none, and asks whether it can be written to. For one rank.

    Raises:
        ValueError: it cannot; names the key and the remedy.
    """
    with _refusals(f"{KEY}={repo}: it cannot be pushed to", f"see that HF_TOKEN may write there, or set {KEY}=null"):
        api = _api()
        api.create_repo(repo, private=True, exist_ok=True)
        # What every upload begins with: which files go where. Of this one nothing is sent.
        api.preupload_lfs_files(repo, [CommitOperationAdd("README.md", b"# A model\n")])


def push(repo: str, directory: Path, card: str) -> None:
    """Uploads an export with ``card`` as its README.md, in one commit. For one rank.

    Raises:
        ValueError: it failed; the export is there as it was, and the message has the command that pushes it.
    """
    again = f"HF_TOKEN=... hf upload {repo} {shlex.quote(str(directory))} . --exclude {MARK} --private"
    with _refusals(f"{KEY}={repo}: the push failed", f"the export is in {directory}; push it with: {again}"):
        (directory / "README.md").write_text(card, encoding="utf-8")
        _api().upload_folder(
            repo_id=repo, folder_path=directory, ignore_patterns=[MARK], commit_message="Model trained by nemo_brain"
        )


def _api() -> HfApi:
    token = os.environ.get("HF_TOKEN", "").strip()
    if not token:
        raise ValueError("HF_TOKEN is not set")
    return HfApi(token=token)


@contextmanager
def _refusals(what: str, remedy: str) -> Iterator[None]:
    try:
        yield
    except Exception as error:  # requests', the hub's, the file system's
        problem = " ".join(f"{type(error).__name__}: {error}".split())
        if token := os.environ.get("HF_TOKEN", "").strip():
            problem = problem.replace(token, "HF_TOKEN")
        raise ValueError(f"{what} ({problem}): {remedy}") from None
