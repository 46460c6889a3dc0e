"""A repository of the Hugging Face hub: listed by its API, read from its cache on disk or by HTTP.

Where the hub cannot be reached, a complete snapshot in the hub cache serves alone. Endpoint, token,
cache folder and offline mode are those of the huggingface_hub library, HF_ENDPOINT and HF_HOME
included. A revision is resolved to a commit first, so content cannot change under a url.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

import httpx2 as httpx

from ...engine.errors import SourceError
from ..manifest import INDEX_NAME, SINGLE_NAME
from .http import HEALING, HttpReader
from .local import described, read_file, snapshot_of
from .retries import Retries, Transient
from .selection import CONFIG_NAME, shard_names
from .source import Listing, SourceFile

if TYPE_CHECKING:
    from huggingface_hub.hf_api import ModelInfo, RepoSibling

API_TIMEOUT_S = 30.0


class HubSource:
    """`org/name` at a branch, a tag or a commit."""

    def __init__(
        self,
        repo_id: str,
        revision: str = "main",
        *,
        endpoint: str | None = None,
        cache_folder: Path | None = None,
        retries: Retries | None = None,
    ) -> None:
        self.repo_id = repo_id
        self.revision = revision
        self._endpoint = endpoint
        self._cache_folder = cache_folder
        self._retries = retries or Retries()
        self._commit = ""
        self._reader: HttpReader | None = None

    @property
    def text(self) -> str:
        return f"hf://{self.repo_id}" + (f"@{self.revision}" if self.revision != "main" else "")

    @property
    def short_name(self) -> str:
        return self.repo_id.rpartition("/")[2]

    def local_folder(self) -> Path | None:
        """The complete snapshot of the commit that the hub names now, or named when last asked."""
        try:
            self._commit = self._commit or self._info().sha or ""
        except SourceError:
            self._commit = ""
        return self._cached()

    def _cached(self) -> Path | None:
        snapshot = snapshot_of(self._repo_folder(), self._commit or self.revision)
        return snapshot if snapshot and is_complete(snapshot) else None

    def list_files(self) -> Listing:
        try:
            info = self._info()
        except SourceError:
            snapshot = self._cached()
            if snapshot is None:
                raise
            return self._listed_offline(snapshot)
        self._commit = info.sha or ""
        files = [_file(sibling, self._commit) for sibling in info.siblings or ()]
        return Listing(tuple(file for file in files if file), self._commit)

    def _listed_offline(self, snapshot: Path) -> Listing:
        self._commit = snapshot.name
        files = [described(path) for path in sorted(snapshot.iterdir()) if path.is_file()]
        return Listing(tuple(_at_commit(file, self._commit) for file in files), self._commit)

    def read(self, file: SourceFile, start: int = 0) -> Iterator[bytes]:
        snapshot = snapshot_of(self._repo_folder(), file.version)
        cached = snapshot and snapshot / file.name
        if cached and cached.is_file() and cached.stat().st_size == file.num_bytes:
            return read_file(cached, SourceFile(file.name, file.num_bytes), start)
        return self._http().read(self._url(file), file, start, is_pinned=True)

    def close(self) -> None:
        if self._reader is not None:
            self._reader.close()

    def _url(self, file: SourceFile) -> str:
        from huggingface_hub import hf_hub_url

        revision = file.version or self.revision
        return hf_hub_url(self.repo_id, file.name, revision=revision, endpoint=self._endpoint)

    def _http(self) -> HttpReader:
        if self._reader is None:
            from huggingface_hub import get_token

            token = get_token()
            headers = {"authorization": f"Bearer {token}"} if token else {}
            self._reader = HttpReader(self._retries, headers)
        return self._reader

    def _repo_folder(self) -> Path:
        from huggingface_hub import constants

        root = self._cache_folder or Path(constants.HF_HUB_CACHE)
        return root / f"models--{self.repo_id.replace('/', '--')}"

    def _info(self) -> ModelInfo:
        """Asks once where the cache could answer instead, else with patience."""
        retries = replace(self._retries, max_failures=0) if self._cached() else self._retries
        return retries.call(self.text, self._info_once)

    def _info_once(self) -> ModelInfo:
        from huggingface_hub import HfApi
        from huggingface_hub.errors import HfHubHTTPError, HFValidationError, OfflineModeIsEnabled

        try:
            return HfApi(endpoint=self._endpoint).model_info(
                self.repo_id, revision=self.revision, files_metadata=True, timeout=API_TIMEOUT_S
            )
        except HfHubHTTPError as error:
            if error.response.status_code in HEALING:
                raise Transient(f"the hub answered HTTP {error.response.status_code}") from error
            raise SourceError(f"{self.text}: {_one_line(error)}", _way_out(error)) from error
        except HFValidationError as error:
            raise SourceError(f"{self.text}: {_one_line(error)}") from error
        except OfflineModeIsEnabled as error:
            raise SourceError(
                f"{self.text}: HF_HUB_OFFLINE is set and the hub's cache {self._repo_folder()} "
                f"holds no complete snapshot of {self.revision}"
            ) from error
        except httpx.TransportError as error:
            raise Transient(f"the hub cannot be reached ({_one_line(error)})") from error


def _file(sibling: RepoSibling, commit: str) -> SourceFile | None:
    """Files of the top folder, with git's or LFS's digest."""
    if "/" in sibling.rfilename or sibling.size is None:
        return None
    digest = f"git-sha1:{sibling.blob_id}" if sibling.blob_id else ""
    if sibling.lfs is not None:
        digest = f"sha256:{sibling.lfs.sha256}"
    return SourceFile(sibling.rfilename, sibling.size, digest, commit)


def _at_commit(file: SourceFile, commit: str) -> SourceFile:
    return SourceFile(file.name, file.num_bytes, file.digest, commit)


def is_complete(snapshot: Path) -> bool:
    """Whether a snapshot has a configuration and all the weights that it promises."""
    if not (snapshot / CONFIG_NAME).is_file():
        return False
    index = snapshot / INDEX_NAME
    if not index.is_file():
        return (snapshot / SINGLE_NAME).is_file()
    try:
        names = shard_names(index.read_bytes(), str(index))
    except (SourceError, OSError):
        return False
    return all((snapshot / name).is_file() for name in names)


def _one_line(error: Exception) -> str:
    return " ".join(str(error).split()) or type(error).__name__


def _way_out(error: Exception) -> str:
    name = type(error).__name__
    if name == "GatedRepoError":
        return "accept its terms on its page, then give a token with `hf auth login`"
    if name == "RepositoryNotFoundError":
        return "check the name; a private one needs a token: `hf auth login`"
    return ""
