"""The Hugging Face Hub, through its own client: what a repository holds already, and one commit of everything.

`upload_folder` would split a large folder over several commits, between which others would load half of it; so the
files go up by `create_commit`, which shows them all at once or not at all.
"""

import json
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING, Any

from topwork.common.errors import RequestError, RunError, shortened

if TYPE_CHECKING:
    from huggingface_hub import HfApi

LOGIN = "log in with `hf auth login`, or set HF_TOKEN"
_MESSAGE = 400


@dataclass(frozen=True)
class Standing:
    """A repository as it is: its newest commit, whether it is private, its files, and the base that its adapter names
    (None where it has no adapter)."""

    commit: str
    private: bool
    files: tuple[str, ...]
    base: str | None


def check_repo(repo: str) -> None:
    """Raises RequestError for what is no owner/name."""
    from huggingface_hub.errors import HFValidationError
    from huggingface_hub.utils import validate_repo_id  # type: ignore[attr-defined]

    hint = "expected OWNER/NAME, say ada/support-tickets"
    if "://" in repo or repo.count("/") != 1:
        inside = repo.partition("://")[2].split("/")[1:3]
        hint += f"; did you mean {'/'.join(inside)!r}?" if len(inside) == 2 else ""
        raise RequestError(f"REPO {repo}: {hint}")
    try:
        validate_repo_id(repo)
    except HFValidationError as error:
        raise RequestError(f"REPO {repo}: {hint} ({shortened(str(error), _MESSAGE)})") from None


def open_hub() -> "HfApi":
    """The client, with the user's token. Raises RequestError where there is none."""
    import huggingface_hub

    import topwork

    token = huggingface_hub.get_token()
    if not token:
        raise RequestError(f"there is no token for the Hugging Face Hub; {LOGIN}")
    return huggingface_hub.HfApi(token=token, library_name="topwork", library_version=topwork.__version__)


def standing(api: "HfApi", repo: str, revision: str | None) -> Standing | None:
    """What is there already, on the branch where there is one; None for no repository. Raises RequestError or RunError
    where nobody can tell."""
    from huggingface_hub.errors import RepositoryNotFoundError, RevisionNotFoundError

    with _explained(api, repo):
        try:
            info = api.model_info(repo, revision=revision)
        except RevisionNotFoundError:
            info = api.model_info(repo)  # a branch begins as the main one is
        except RepositoryNotFoundError:
            return None
        files = tuple(sorted(file.rfilename for file in info.siblings or ()))
        base = _adapter_base(api, repo, str(info.sha)) if "adapter_config.json" in files else None
        return Standing(str(info.sha), bool(info.private), files, base)


def _adapter_base(api: "HfApi", repo: str, commit: str) -> str:
    with TemporaryDirectory() as place:
        path = api.hf_hub_download(repo, "adapter_config.json", revision=commit, cache_dir=place)
        try:
            return str(json.loads(Path(path).read_text("utf-8"))["base_model_name_or_path"])
        except (ValueError, KeyError, TypeError):
            return ""


def commit(
    api: "HfApi",
    repo: str,
    files: Mapping[str, Path | bytes],
    removed: tuple[str, ...],
    before: Standing | None,
    private: bool,
    revision: str | None,
    message: str,
) -> str:
    """Make the repository and the branch where they are not there, and put everything into one commit. Returns the
    commit's address. Raises RequestError and RunError."""
    from huggingface_hub import CommitOperationAdd, CommitOperationDelete

    with _explained(api, repo):
        if before is None:
            api.create_repo(repo, private=private or None, exist_ok=True)
        if revision is not None:
            api.create_branch(repo, branch=revision, exist_ok=True)
        operations: list[Any] = [
            CommitOperationAdd(name, str(content) if isinstance(content, Path) else content)
            for name, content in sorted(files.items())
        ]
        operations += [CommitOperationDelete(name) for name in removed]
        done = api.create_commit(
            repo, operations, commit_message=message, revision=revision, parent_commit=before.commit if before else None
        )
        return str(done.commit_url)


@contextmanager
def _explained(api: "HfApi", repo: str) -> Iterator[None]:
    """The client's errors in words of our own; what is none of them goes on as it is."""
    from huggingface_hub.errors import HfHubHTTPError, OfflineModeIsEnabled

    try:
        yield
    except OfflineModeIsEnabled:
        raise RequestError("HF_HUB_OFFLINE is set, so that nothing is sent; unset it to push") from None
    except HfHubHTTPError as error:
        raise _refused(error, repo, api.endpoint) from error
    except ValueError as error:  # the card's front matter, or an upload that was answered in a way it does not know
        raise RunError(f"{api.endpoint} refuses the upload: {shortened(str(error), _MESSAGE)}") from error
    except Exception as error:
        if not isinstance(error, OSError) and not type(error).__module__.startswith("httpx"):
            raise
        told = shortened(str(error) or type(error).__name__, _MESSAGE)
        raise RunError(
            f"{api.endpoint} cannot be reached ({told}); look to the network (or HF_ENDPOINT), and push again: nothing "
            "is visible before everything has arrived"
        ) from error


def _refused(error: Any, repo: str, endpoint: str) -> Exception:
    status = getattr(error.response, "status_code", 0)
    said = shortened(str(getattr(error, "server_message", None) or error).strip(), _MESSAGE)
    owner = repo.partition("/")[0]
    if status == 401:
        return RequestError(f"{endpoint} does not accept the token ({said}); {LOGIN}")
    if status == 403:
        return RequestError(f"the token may not write to {repo} ({said}); take one with the role `write` for {owner}")
    if status == 404:
        return RequestError(f"{endpoint} knows no {owner}, or nothing of it that the token may see ({said})")
    if status in (409, 412):
        return RunError(f"{repo} was changed while it was pushed to ({said}); push again")
    if 400 <= status < 500 and status != 429:
        return RequestError(f"{endpoint} refuses the upload to {repo}: {said}")
    return RunError(f"{endpoint} answered {status or 'nothing that can be read'} ({said}); push again later")
