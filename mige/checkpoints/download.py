"""The official files from the hub: those that a conversion needs and no others, resumed where cut off, each checked.

The hub's library resumes only within one call, and compares no finished file with the hash that the hub keeps of it.
Both are done here, with its own door for a range of bytes.
"""

import hashlib
import os
import re
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path

from huggingface_hub import HfApi, hf_hub_url
from huggingface_hub.errors import HFValidationError, RepositoryNotFoundError, RevisionNotFoundError
from huggingface_hub.file_download import http_get
from huggingface_hub.hf_api import RepoSibling
from huggingface_hub.utils import build_hf_headers

from mige.checkpoints.errors import CheckpointError
from mige.utils.errors import UserError
from mige.utils.files import folder_lock, sync_folder

REPOSITORY = "EurekaTian/MIGE"
"""Where the authors keep their weights."""

_TOKENIZER = r"t5-v1_1-xxl/(config|tokenizer|tokenizer_config|special_tokens_map|added_tokens)\.json"
_T5_WEIGHTS = r"t5-v1_1-xxl/(pytorch_model|model).*\.{}"
_VAE_WEIGHTS = r"sd-vae-ft-ema/diffusion_pytorch_model\.{}"


@dataclass(frozen=True)
class Need:
    """Files of one purpose: the first of the patterns (whole paths) that anything in the repository matches."""

    name: str
    patterns: tuple[str, ...]
    optional: bool = False


_SHARED = (
    Need("the VAE's config", (r"sd-vae-ft-ema/config\.json",)),
    Need("the VAE's weights", tuple(_VAE_WEIGHTS.format(kind) for kind in ("safetensors", "bin"))),
    Need("T5's vocabulary", (r"t5-v1_1-xxl/spiece\.model", r"t5-v1_1-xxl/tokenizer\.json")),
    Need("T5's config", (r"t5-v1_1-xxl/config\.json",)),
    Need("T5's tokenizer settings", (_TOKENIZER,), optional=True),
)
NEEDS = {
    "release": (Need("the trained model", (r"model\.pth",)), *_SHARED),
    "training": (
        Need("PixArt-alpha", (r"PixArt-XL-2-512x512\.pth", r"PixArt-XL-2-512x512/.*\.pth")),
        Need("EVA-ViT-g", (r"eva_vit_g\.pth", r"eva_vit_g/.*\.pth")),
        Need("BLIP-2", (r"blip2_pretrained_flant5xxl\.pth", r"blip2_pretrained_flant5xxl/.*\.pth")),
        Need("T5's weights", tuple(_T5_WEIGHTS.format(kind) for kind in (r"safetensors(\.index\.json)?",
                                                                         r"bin(\.index\.json)?"))),
        *_SHARED,
    ),
}  # fmt: skip
"""By kind of conversion (`tools/convert_checkpoint.py`): what of the repository it reads."""


def choose(listed: Iterable[str], kind: str, place: str) -> dict[str, list[str]]:
    """The files of a repository that a conversion needs.

    Args:
        listed: paths in the repository. kind: "release" or "training". place: the repository's name, for messages.

    Returns the files by what they are needed for. Raises CheckpointError that names everything that is not there.
    """
    listed, chosen, absent = sorted(listed), {}, []
    for need in NEEDS[kind]:
        matching = ([path for path in listed if re.fullmatch(pattern, path)] for pattern in need.patterns)
        found = next(filter(None, matching), [])
        if not found and not need.optional:
            absent.append(f"{need.name} ({' or '.join(need.patterns)})")
        chosen[need.name] = found
    if absent:
        raise CheckpointError(f"{place}: has no file for {'; '.join(absent)}; name another --repository or --revision")
    return chosen


def download(
    folder: Path,
    kind: str,
    *,
    repository: str,
    revision: str | None = None,
    say: Callable[[str], None] = print,
) -> dict[str, list[Path]]:
    """Fetch what a conversion needs into `folder`, laid out as in the repository; what is there and whole is kept.

    Args:
        kind: "release" or "training". revision: a branch, tag or commit of the repository; None for the newest.
        say: called with a line a file.

    Returns the files by what they are needed for (`NEEDS`). The hub's environment variables hold (HF_ENDPOINT,
    HF_TOKEN). Raises CheckpointError where the hub does not answer, has no such repository or file, and for a file of
    another size or hash than the hub names (it is removed then, so that the next call fetches it anew).
    """
    endpoint = os.environ.get("HF_ENDPOINT")  # read now: the library reads it when it is imported
    place = repository if revision is None else f"{repository}@{revision}"
    with _Asking(place):
        info = HfApi(endpoint).model_info(repository, revision=revision, files_metadata=True)
    siblings = {sibling.rfilename: sibling for sibling in info.siblings or []}
    chosen = choose(siblings, kind, place)
    files: dict[str, list[Path]] = {}
    for name, paths in chosen.items():
        files[name] = []
        for path in paths:
            local = folder / path
            if not _is_whole(local, siblings[path]):
                with _Asking(f"{place}: {path}"):
                    _fetch(hf_hub_url(repository, path, revision=info.sha, endpoint=endpoint), local, siblings[path])
            say(f"{path}: {local.stat().st_size / 2**20:,.1f} MiB, as the hub has it")
            files[name].append(local)
    return files


def _fetch(url: str, local: Path, expected: RepoSibling) -> None:
    """Download one file beside its place, from where an earlier try broke off, and rename it when its hash is right."""
    local.parent.mkdir(parents=True, exist_ok=True)
    part = local.with_name(f".{local.name}.{_digest_of(expected)[1][:12]}.part")  # never a part of another version
    with folder_lock(local.parent), part.open("ab") as file:
        if (begun := file.tell()) < expected.size:
            http_get(url, file, resume_size=begun, headers=build_hf_headers(), expected_size=expected.size)
        file.flush()
        os.fsync(file.fileno())
    if problem := _difference(part, expected):
        part.unlink()
        raise CheckpointError(f"{local}: {problem}; what was fetched is removed, run the same command again")
    part.rename(local)
    sync_folder(local.parent)


def _is_whole(path: Path, expected: RepoSibling) -> bool:
    """Whether a file is there already. Raises CheckpointError for one that is not the hub's: it may be the user's."""
    if not path.exists():
        return False
    if problem := _difference(path, expected):
        raise CheckpointError(f"{path}: {problem}; remove it, or name other --files")
    return True


def _difference(path: Path, expected: RepoSibling) -> str:
    """What of a file is not as the hub says, "" if all of it is."""
    (kind, right), size = _digest_of(expected), path.stat().st_size
    digest = hashlib.sha256() if kind == "sha256" else hashlib.sha1(f"blob {size}\0".encode())
    with path.open("rb") as file:
        while chunk := file.read(2**24):
            digest.update(chunk)
    if size == expected.size and digest.hexdigest() == right:
        return ""
    return f"{size} bytes with {kind} {digest.hexdigest()}, but the hub has {expected.size} bytes with {right}"


def _digest_of(expected: RepoSibling) -> tuple[str, str]:
    """What the hub keeps of a file: the SHA-256 of a large one, git's SHA-1 of a small one."""
    return ("sha256", expected.lfs.sha256) if expected.lfs is not None else ("git sha1", expected.blob_id)


class _Asking:
    """What the hub's library raises as CheckpointError, with what was asked for."""

    def __init__(self, what: str):
        self.what = what

    def __enter__(self) -> None:
        pass

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, _: object) -> None:
        if isinstance(error, UserError):
            return
        if isinstance(error, RevisionNotFoundError):
            raise CheckpointError(f"{self.what}: the hub has no such revision") from error
        if isinstance(error, RepositoryNotFoundError | HFValidationError):
            raise CheckpointError(f"{self.what}: the hub has no such repository, or it needs HF_TOKEN") from error
        if isinstance(error, Exception):  # the library's own, or of whichever HTTP library its version uses
            reason = (str(error).strip().splitlines() or [type(error).__name__])[0]
            raise CheckpointError(f"{self.what}: not downloaded: {reason}; the same command resumes") from error
