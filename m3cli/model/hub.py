"""What a repository of the Hugging Face hub offers, and its bytes: huggingface_hub, with nothing believed.

HF_ENDPOINT, HF_TOKEN and HF_HUB_OFFLINE hold, as they do for every program on that library. File names,
sizes and digests are the server's word: names that lead out of a directory end the run, and nobody reads
more bytes than a file was said to have.
"""

from __future__ import annotations

import hashlib
import re
import time
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from m3cli.errors import M3Error, MachineError, ModelError, UsageError

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Sequence

    from huggingface_hub.hf_api import ModelInfo, RepoSibling

# As reported: nobody here has run this file.
ALIASES = {"minimax-m3": "bartowski/MiniMaxAI_MiniMax-M3-GGUF"}
ATTEMPTS = 5  # without a new byte between them
SHORT_READ = "the connection ended early"

_TIMEOUT = 30.0  # seconds without a byte
_LONGEST_WAIT = 60.0  # seconds; no server says when for longer than this
_LARGEST_FILE = 1 << 43  # bytes; larger than any model, and ext4 takes a hole of that size
# CDNs serve nothing above 50 GB in one piece; and a signed address does not outlive the largest file.
_PIECE = 8 << 30
_CHUNK = 1 << 16  # bytes; what a connection brings in shorter pieces than this is lost when it breaks

_SPLIT = re.compile(r"(?P<stem>.+)-(?P<number>\d{5})-of-(?P<count>\d{5})", re.DOTALL)
_NO_MODEL = re.compile(r"mmproj|imatrix", re.IGNORECASE)
_QUANT = re.compile(
    r"(?<![A-Za-z0-9])((?:UD-)?(?:I?Q[1-8](?:_[A-Z0-9]+)*|TQ[12]_0|MXFP4(?:_[A-Z0-9]+)*|NVFP4|BF16|F16|F32|FP16))"
    r"(?![A-Za-z0-9])",
    re.IGNORECASE,
)
_COMMIT = re.compile(r"[0-9a-f]{40}")
_SHA256 = re.compile(r"[0-9a-f]{64}")
_UNSAFE = re.compile(r"[\x00-\x1f\x7f-\x9f\\:\u2028-\u202e\u2066-\u2069\ud800-\udfff]")


@dataclass(frozen=True, slots=True)
class RemoteFile:
    """One file: its name in the repository (parts with `/` between), bytes, and the digest it must have.

    `digest` is the SHA-256 of Git LFS in 64 hexadecimal digits, or git's own blob id in 40.
    """

    name: str
    nbytes: int
    digest: str

    def hasher(self) -> Any:
        """A fresh hash object, whose hexdigest after all bytes is `digest` if they are right."""
        if len(self.digest) == 64:
            return hashlib.sha256()
        return hashlib.sha1(b"blob %d\0" % self.nbytes, usedforsecurity=False)


@dataclass(frozen=True, slots=True)
class Quant:
    """One published form of a model: all its files, the first shard first. `problem` if some lack."""

    name: str
    files: tuple[RemoteFile, ...]
    problem: str = ""

    @property
    def nbytes(self) -> int:
        """Bytes of all files."""
        return sum(file.nbytes for file in self.files)


@dataclass(frozen=True, slots=True)
class Repository:
    """A repository at one commit; quants from the largest to the smallest. `license` is its card's."""

    name: str
    revision: str
    commit: str
    license: str | None
    quants: tuple[Quant, ...]
    endpoint: str
    wait: Callable[[float], None] = field(default=time.sleep, compare=False, repr=False)

    def find(self, name: str) -> Quant:
        """The quant of that name, in any case. Raises ModelError, which lists those that there are."""
        for quant in self.quants:
            if quant.name.lower() == name.lower():
                return quant
        raise ModelError(
            f"The repository {self.name} has no quant {name}.",
            f"It has {', '.join(quant.name for quant in self.quants)}.",
        )

    def read(self, file: RemoteFile, start: int, end: int) -> Iterator[bytes]:
        """Yield the bytes `start` to `end` of a file, in chunks; one attempt, of one piece at most.

        A server that knows no ranges is read from the start of the file: the first chunk is empty then.
        Raises TransientError, OtherFileError, and what `translated` makes of HTTP errors.
        """
        library = _library()
        url = library.hf_hub_url(self.name, file.name, revision=self.commit, endpoint=self.endpoint)
        last = min(end, start + _PIECE) - 1
        headers = {
            **library.utils.build_hf_headers(library_name="m3"),
            "Range": f"bytes={start}-{last}",
            "Accept-Encoding": "identity",
        }
        session = library.utils.get_session()
        with (
            translated(self.name, self.endpoint),
            session.stream("GET", url, headers=headers, timeout=_TIMEOUT) as response,
        ):
            library.utils.hf_raise_for_status(response)
            partial = response.status_code == 206
            total = response.headers.get("Content-Range", "").partition("/")[2] if partial else ""
            told = total if partial else response.headers.get("Content-Length", "")
            if told.isdecimal() and int(told[:20]) != file.nbytes:
                raise OtherFileError(
                    f"The server's {file.name} has {int(told[:20]):,} bytes; the repository {self.name} "
                    f"says {file.nbytes:,}.",
                    "Try again later; if it stays so, choose another repository.",
                )
            if not partial:
                start, last = 0, min(end, file.nbytes) - 1
                yield b""
            elif not response.headers.get("Content-Range", "").startswith(f"bytes {start}-"):
                raise TransientError("the server sent another piece of the file than was asked for")
            left = last + 1 - start
            for chunk in response.iter_raw(_CHUNK):
                yield chunk[:left]
                left -= len(chunk)
                if left <= 0:
                    return  # an endless body ends here
            raise TransientError(SHORT_READ)


class OtherFileError(ModelError):
    """The server has another file under this name than the repository describes."""


class TransientError(M3Error):
    """A failure that the next attempt may not meet: a broken connection, a server that is busy.

    `after` is the time in seconds that the server asked for, 0 if none. Callers try again; what is
    left of it after the last attempt is a MachineError.
    """

    def __init__(self, message: str, after: float = 0.0) -> None:
        super().__init__(message)
        self.after = after


def pause(failures: int, error: TransientError) -> float:
    """Seconds to wait after so many failures in a row: 1, 2, 4, …, or what the server asked for."""
    return min(max(2.0 ** (failures - 1), error.after), _LONGEST_WAIT)


def gave_up(what: str, error: TransientError) -> MachineError:
    """The error for `what` after the last attempt."""
    return MachineError(
        f"{what} could not be downloaded: {error.message}.",
        "Check the connection and run the same command again: it goes on from here.",
    )


def open_repository(
    name: str, revision: str | None = None, *, wait: Callable[[float], None] = time.sleep
) -> Repository:
    """Ask the hub what `owner/repo` holds at `revision`, by default its main branch.

    Raises UsageError for a name that no repository can have, MachineError when the hub cannot be reached,
    and ModelError for a repository that is not there, is gated, holds no GGUF model, or cannot be trusted.
    """
    library = _library()
    revision = revision or "main"
    if not _safe(revision):
        raise UsageError(f"{revision!r} is no revision.", "Name a branch, a tag or a commit with --revision.")
    api = library.HfApi(library_name="m3")
    for attempt in range(1, ATTEMPTS + 1):
        try:
            with translated(name, api.endpoint):
                info = api.model_info(name, revision=revision, files_metadata=True, timeout=_TIMEOUT)
                return _repository(name, revision, info, api.endpoint, wait)
        except TransientError as error:
            if attempt == ATTEMPTS:
                raise gave_up(f"The description of {name}", error) from error
            wait(pause(attempt, error))
    raise AssertionError("the last attempt returns or raises")


def _library() -> Any:
    try:
        import huggingface_hub.utils
    except ImportError as error:
        raise MachineError(
            "m3 model pull needs the package huggingface_hub, which is not installed.",
            "Install it: pip install 'm3cli[hub]'.",
        ) from error
    # m3 tells of retries itself; the library would write into the progress bar.
    library: Any = huggingface_hub
    library.logging.set_verbosity_error()
    return library


@contextmanager
def translated(repo: str, endpoint: str) -> Iterator[None]:
    """Turn what the library and its HTTP client raise into M3Errors; TransientError where it may pass."""
    import httpx2
    from huggingface_hub import errors

    try:
        yield
    except errors.GatedRepoError as error:
        raise ModelError(
            f"The repository {repo} is gated: it gives its files only to people who accepted its terms.",
            f"Accept them at {endpoint}/{repo}, and set HF_TOKEN to a token of that account.",
        ) from error
    except errors.RevisionNotFoundError as error:
        raise ModelError(
            f"The repository {repo} has no such revision.", "Check --revision against its branches and tags."
        ) from error
    except errors.RepositoryNotFoundError as error:
        raise ModelError(
            f"There is no repository {repo} at {endpoint}, or it is private.",
            "Check the name; for a private one, set HF_TOKEN.",
        ) from error
    except errors.EntryNotFoundError as error:
        raise ModelError(
            f"A file that the repository {repo} lists is not there.", "Try again, or name another --revision."
        ) from error
    except errors.OfflineModeIsEnabled as error:
        raise MachineError("HF_HUB_OFFLINE forbids downloads.", "Unset it to download a model.") from error
    except errors.HfHubHTTPError as error:
        status = error.response.status_code
        if status in (408, 429) or status >= 500:
            after = error.response.headers.get("Retry-After", "")
            seconds = float(after) if after.isdecimal() and len(after) < 6 else 0.0
            raise TransientError(f"{endpoint} answers with HTTP status {status}", seconds) from error
        raise ModelError(
            f"{endpoint} refuses to give files of {repo}: HTTP status {status}.",
            "Set HF_TOKEN to a token that may read it." if status in (401, 403) else "Try again later.",
        ) from error
    except errors.HFValidationError as error:
        raise UsageError(
            f"{repo!r} is no name of a repository.",
            f"Give OWNER/REPO, OWNER/REPO:QUANT, or one of {', '.join(ALIASES)}.",
        ) from error
    except (httpx2.HTTPError, httpx2.InvalidURL, httpx2.StreamError) as error:
        raise TransientError(f"the connection to {endpoint} failed ({type(error).__name__})") from error
    except (AttributeError, KeyError, TypeError, ValueError, RecursionError) as error:
        raise ModelError(
            f"{endpoint} does not answer as a Hugging Face hub does.", "Check HF_ENDPOINT, if it is set."
        ) from error


def _repository(
    name: str, revision: str, info: ModelInfo, endpoint: str, wait: Callable[[float], None]
) -> Repository:
    commit = info.sha
    if not isinstance(commit, str) or not _COMMIT.fullmatch(commit):
        raise ValueError("no commit")
    siblings = [file for file in info.siblings or () if file.rfilename.lower().endswith(".gguf")]
    quants = quants_of([_checked(name, file) for file in siblings if not _NO_MODEL.search(file.rfilename)])
    if not quants:
        raise ModelError(
            f"The repository {name} holds no GGUF model.",
            "Name one that does; their names often end in GGUF.",
        )
    return Repository(name, revision, commit, _license(info), quants, endpoint, wait)


def _license(info: ModelInfo) -> str | None:
    card: Any = vars(info.card_data) if info.card_data else {}
    tags = [tag[8:] for tag in info.tags or () if isinstance(tag, str) and tag.startswith("license:")]
    short = card.get("license") or (tags[0] if tags else None)
    best = card.get("license_name") if short in (None, "other") and card.get("license_name") else short
    if isinstance(best, list):
        best = ", ".join(map(str, best))
    link = card.get("license_link")
    return " ".join(str(part) for part in (best, link and f"({link})") if part)[:500] or None


def _safe(name: str) -> bool:
    """Whether a file of this name lies in the directory that it is put into, and can be shown."""
    parts = name.split("/")
    return (
        0 < len(name) <= 1000
        and not _UNSAFE.search(name)
        and not any(part in ("", ".", "..") or len(part.encode()) > 240 for part in parts)
    )


def _checked(repo: str, sibling: RepoSibling) -> RemoteFile:
    name = sibling.rfilename
    if not _safe(name):
        raise ModelError(
            f"The repository {repo} lists a file {name[:100]!r}, a name that could be written elsewhere than "
            "into its directory.",
            "Do not use this repository.",
        )
    lfs = sibling.lfs
    sizes = {size for size in (sibling.size, lfs.size if lfs else None) if size is not None}
    digest = lfs.sha256 if lfs else sibling.blob_id
    size = sizes.pop() if len(sizes) == 1 else None
    if type(size) is not int or not 0 < size <= _LARGEST_FILE:
        raise ModelError(
            f"The repository {repo} does not say, or not credibly, how large {name} is.",
            "Choose another repository.",
        )
    if not isinstance(digest, str) or not (_SHA256 if lfs else _COMMIT).fullmatch(digest):
        raise ModelError(
            f"The repository {repo} does not say which checksum {name} has.", "Choose another repository."
        )
    return RemoteFile(name, size, digest)


def quants_of(files: Sequence[RemoteFile]) -> tuple[Quant, ...]:
    """Group files into quants, from the largest to the smallest; the shards of a split model are one.

    A quant is named by what its file name, or else its folder's, says; by the whole name where that says
    nothing or where two would be called the same.
    """
    groups: dict[str, list[tuple[int, int, RemoteFile]]] = {}
    for file in files:
        stem = file.name[: -len(".gguf")]
        split = _SPLIT.fullmatch(stem)
        key, number, count = (
            (split["stem"], int(split["number"]), int(split["count"])) if split else (stem, 1, 1)
        )
        groups.setdefault(key, []).append((number, count, file))
    names = {key: _quant_name(key) for key in groups}
    taken = [name.lower() for name in names.values()]
    quants = []
    for key, shards in groups.items():
        shards.sort(key=lambda shard: shard[:2])
        complete = [shard[:2] for shard in shards] == [(i, len(shards)) for i in range(1, len(shards) + 1)]
        problem = "" if complete else "some of its parts are not in the repository"
        name = names[key] if taken.count(names[key].lower()) == 1 else key
        quants.append(Quant(name, tuple(file for *_, file in shards), problem))
    return tuple(sorted(quants, key=lambda quant: (-quant.nbytes, quant.name)))


def _quant_name(key: str) -> str:
    folder, _, stem = key.rpartition("/")
    for text in (stem, folder):
        if found := _QUANT.findall(text):
            return str(found[-1])
    return key
