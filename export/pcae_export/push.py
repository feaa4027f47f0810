"""`pcae-export push`: upload a bundle with its card to a repository on the Hugging Face hub."""

import glob
from collections.abc import Mapping
from pathlib import Path
from types import ModuleType
from typing import Annotated, Any

from pydantic import BaseModel, Field
from pydantic_settings import CliPositionalArg

from pcae_serve.bounded_file import read_regular
from pcae_serve.bounded_json import CONFIG_BYTES, parse_json
from pcae_serve.bundle.manifest import MANIFEST
from pcae_serve.bundle.reader import Bundle, load_bundle
from pcae_serve.errors import PcaeError
from pcae_serve.flags import Metavar
from pcae_serve.sources.hub import explain, open_library
from pcae_serve.sources.names import HUB, FetchError, HubName, parse_hub_name

#: Files of a repository in which nothing else has been put yet.
NEW = frozenset((".gitattributes", "README.md", "LICENSE"))


class Push(BaseModel):
    """Upload a bundle with its model card to the Hugging Face hub.

    The repository is created if it does not exist. Files of a bundle that is there and not in the
    new one are deleted; others stay. HF_TOKEN holds a token that may write.
    """

    bundle: CliPositionalArg[Annotated[Path, Metavar("BUNDLE")]] = Field(
        description="bundle folder"
    )
    name: CliPositionalArg[Annotated[str, Metavar("OWNER/NAME")]] = Field(
        description="repository; OWNER/NAME@BRANCH uploads to a branch that exists"
    )
    private: bool = Field(False, description="create the repository as a private one")
    message: str | None = Field(
        None, min_length=1, description="commit message (default: the bundle's name and digest)"
    )
    force: bool = Field(False, description="add the bundle to a repository of other files")

    def cli_cmd(self) -> None:
        name = parse_hub_name(self.name if self.name.startswith(HUB) else f"{HUB}{self.name}")
        if name.path:
            raise PcaeError(f"a bundle is uploaded to a whole repository, not to {name}")
        bundle = load_bundle(self.bundle)
        commit = self._upload(bundle, name)
        pinned = HubName(name.repository, commit)
        print(f"uploaded {self.bundle} to {name}, commit {commit}")
        print(f"serve it with: pcae-serve --bundle {pinned}")

    def _upload(self, bundle: Bundle, name: HubName) -> str:
        """Upload the files that the manifest lists, in one commit, and return its id."""
        hub = open_library(name)
        if hub.get_token() is None:
            raise FetchError(f"{name}: uploading needs a token; set HF_TOKEN to one that may write")
        files = {MANIFEST, *bundle.manifest.files}
        message = self.message or f"Bundle {bundle.manifest.name}, digest {bundle.digest[:12]}"
        try:
            api = hub.HfApi()
            api.create_repo(name.repository, private=self.private or None, exist_ok=True)
            stale = _stale(hub, api, name, files, self.force)
            done = api.upload_folder(
                repo_id=name.repository,
                folder_path=bundle.root,
                revision=name.revision,
                commit_message=message,
                allow_patterns=[glob.escape(file) for file in sorted(files)],
                delete_patterns=[glob.escape(file) for file in sorted(stale)] or None,
            )
        except PcaeError:
            raise
        except Exception as error:  # the library raises a dozen types of its own
            raise explain(hub, name, error, f"upload {self.bundle}") from None
        return str(done.oid)


def _stale(hub: ModuleType, api: Any, name: HubName, files: set[str], force: bool) -> set[str]:
    """Return the files of the bundle in the repository that are not in the new one.

    Raise FetchError if the repository holds something else, unless `force` is set.
    """
    there = set(api.list_repo_files(name.repository, revision=name.revision))
    if MANIFEST not in there:
        if not force and (others := sorted(there - NEW)):
            raise FetchError(
                f"{name} has other files, such as {others[0]}, and no {MANIFEST}; choose another"
                " repository, or add the bundle to it with --force"
            )
        return set()
    file = hub.hf_hub_download(name.repository, MANIFEST, revision=name.revision)
    try:
        content = parse_json(read_regular(Path(file), CONFIG_BYTES))
    except ValueError:
        return set()  # not a bundle's: nothing is known of the other files
    listed = content.get("files") if isinstance(content, Mapping) else None
    return (set(listed) & there) - files if isinstance(listed, Mapping) else set()
