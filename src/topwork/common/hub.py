"""Whether the Hugging Face Hub has what a name may mean, before anything is downloaded: one brief question, so that a
mistyped folder or a machine without a network is told in seconds and not after the client's five retries."""

import os
import re
from collections.abc import Callable
from functools import cache
from pathlib import Path
from queue import Empty, Queue
from threading import Thread
from typing import Literal

from topwork.common.errors import AdapterError, DataError, ModelError, RequestError, shortened

HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*")
LONGEST_ID = 96
SECONDS = 4.0
"""How long the answer may take, with looking up the host; HF_HUB_ETAG_TIMEOUT sets another."""
Kind = Literal["model", "dataset", "adapter"]
_ERRORS: dict[Kind, type[RequestError]] = {"model": ModelError, "dataset": DataError, "adapter": AdapterError}
_CALLED: dict[Kind, str] = {"model": "model", "dataset": "data set", "adapter": "adapter"}
_ASKED: dict[Kind, str] = {"model": "config.json", "dataset": "README.md", "adapter": "adapter_config.json"}
"""The file that is asked for; one that a repository lacks tells that there is a repository."""
_ADAPTER_FILES = (
    "adapter_config.json", "adapter_model.safetensors", "topwork.json", "chat_template.jinja", "tokenizer*",
    "special_tokens_map.json", "added_tokens.json",
)  # fmt: skip
"""What is fetched of an adapter: no weights of a whole model beside it, no optimizer."""


def is_hub_id(name: str) -> bool:
    """Whether the Hub takes this as `owner/name`."""
    last = name[-1:]
    return (
        HUB_ID.fullmatch(name) is not None
        and not ("--" in name or ".." in name or name.endswith(".git") or last in "-.")
        and len(name) <= LONGEST_ID
    )


def ask_hub(hub_id: str, revision: str | None, kind: Kind, near: str = "") -> Path | None:
    """The copy in the Hub's cache that is to be taken because the Hub cannot be reached; None where it answers, or
    where HF_HUB_OFFLINE keeps its client to the cache by itself.

    Raises ModelError, DataError or AdapterError, with `near` names of what is here, where the Hub has nothing of this
    name, and where it cannot be asked and the cache has none.
    """
    from huggingface_hub import constants

    copy = _cached(hub_id, revision, kind)
    if constants.HF_HUB_OFFLINE:
        if copy is None:
            raise _refusal(hub_id, kind, "HF_HUB_OFFLINE is set and the Hub's cache here has no copy", near)
        return None
    ended = _answer(hub_id, revision, kind, constants.ENDPOINT)
    if ended is None or copy is not None:
        return copy if ended is not None else None
    raise _refusal(hub_id, kind, ended, near)


def fetched_adapter(hub_id: str, near: str = "") -> Path:
    """The folder with an adapter of the Hub, fetched where its cache has none. Raises AdapterError."""
    copy = ask_hub(hub_id, None, "adapter", near)
    if copy is not None:
        return copy
    from huggingface_hub import snapshot_download

    try:
        folder = Path(snapshot_download(hub_id, allow_patterns=list(_ADAPTER_FILES)))
    except Exception as error:  # the client raises whatever its network and cache do
        raise AdapterError(f"the adapter {hub_id!r} cannot be fetched from the Hub ({error}); try again") from error
    if not (folder / _ASKED["adapter"]).is_file():
        raise AdapterError(
            f"the Hub has {hub_id!r}, and it holds no adapter (no {_ASKED['adapter']}); give one that PEFT wrote, or "
            "give a whole model as the model"
        )
    return folder


def _refusal(hub_id: str, kind: Kind, ended: str, near: str) -> RequestError:
    return _ERRORS[kind](
        f"there is no {_CALLED[kind]} {hub_id!r}: nothing of that name is in the current folder ({Path.cwd()}), and it "
        f"was tried as a Hub id: {ended}{near}"
    )


def _answer(hub_id: str, revision: str | None, kind: Kind, endpoint: str) -> str | None:
    """How asking ended, for people; None where the Hub has it, or refuses in a way that is for its client to tell."""
    try:
        return _asked(hub_id, revision, kind, endpoint)
    except TimeoutError:
        return f"{endpoint} did not answer within {_seconds():g} s; look to the network, or set HF_HUB_ETAG_TIMEOUT"
    except ConnectionError as error:
        return f"{endpoint} cannot be reached ({error}); look to the network, or to HF_ENDPOINT"


@cache
def _asked(hub_id: str, revision: str | None, kind: Kind, endpoint: str) -> str | None:
    """One request. Raises TimeoutError and ConnectionError, which are not remembered as answers are."""
    from huggingface_hub import errors, get_hf_file_metadata, get_token, hf_hub_url

    repo_type = "dataset" if kind == "dataset" else "model"
    url = hf_hub_url(hub_id, _ASKED[kind], repo_type=repo_type, revision=revision, endpoint=endpoint)
    try:
        _in_time(lambda: get_hf_file_metadata(url, token=get_token(), timeout=_seconds(), endpoint=endpoint))
    except errors.GatedRepoError:
        return "the Hub has it for those alone who were let in; ask for it on its page, and log in (`hf auth login`)"
    except errors.RepositoryNotFoundError:
        return "the Hub has none, or a private one that is shown to nobody without its token (`hf auth login`)"
    except errors.RevisionNotFoundError:
        return f"the Hub has it without a revision {revision!r}"
    except errors.HfHubHTTPError as error:
        if error.response.status_code >= 500:  # its client would try again for half a minute
            raise ConnectionError(f"it answers {error.response.status_code}; try again later") from error
        plain = (
            kind != "dataset" and error.response.status_code == 404 and not isinstance(error, errors.EntryNotFoundError)
        )
        return f"{endpoint} has no such page" if plain else None
    except errors.EntryNotFoundError:
        return None
    except TimeoutError:
        raise
    except Exception as error:
        if not isinstance(error, OSError) and not type(error).__module__.startswith("httpx"):
            raise
        if "timeout" in type(error).__name__.lower():
            raise TimeoutError from error
        raise ConnectionError(shortened(str(error) or type(error).__name__, 200)) from error
    return None


def _in_time(ask: Callable[[], object]) -> None:
    """Raises what `ask` raises, and TimeoutError where it takes longer: looking up a host has no limit of its own, and
    each of its addresses is tried for the whole time."""
    done: Queue[BaseException | None] = Queue()

    def run() -> None:
        try:
            ask()
            done.put(None)
        except BaseException as error:
            done.put(error)

    Thread(target=run, daemon=True).start()
    try:
        error = done.get(timeout=_seconds())
    except Empty:
        raise TimeoutError from None
    if error is not None:
        raise error


def _seconds() -> float:
    try:
        return float(os.environ["HF_HUB_ETAG_TIMEOUT"])
    except (KeyError, ValueError):
        return SECONDS


def _cached(hub_id: str, revision: str | None, kind: Kind) -> Path | None:
    """The folder that the Hub's cache has of it; of a data set its repository's, or what `datasets` made of it."""
    from huggingface_hub import constants, try_to_load_from_cache

    if kind != "dataset":
        found = try_to_load_from_cache(hub_id, _ASKED[kind], revision=revision)
        return Path(found).parent if isinstance(found, str) else None
    made = os.environ.get("HF_DATASETS_CACHE") or os.path.join(constants.HF_HOME, "datasets")
    places = [Path(constants.HF_HUB_CACHE) / f"datasets--{hub_id.replace('/', '--')}"]
    places.append(Path(made) / hub_id.replace("/", "___"))
    return next((place for place in places if place.is_dir()), None)
