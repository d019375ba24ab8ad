"""Choosing a quant, and its bytes over a real connection that does everything wrong."""

from __future__ import annotations

import hashlib
import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

import huggingface_hub
import numpy as np
import pytest
from huggingface_hub.utils import close_session

from m3cli.errors import M3Error, MachineError, ModelError, UsageError
from m3cli.model.header import read_header
from m3cli.model.hub import RemoteFile, Repository, open_repository, quants_of
from m3cli.model.pull import Target, Transferred, Trouble, check_space, checked_header, download, remote_facts
from tests.gguf_files import LLAMA_KEYS, write_gguf, write_model
from tests.hub_server import HubServer

if TYPE_CHECKING:
    from collections.abc import Iterator

NAME = "tiny-Q8_0.gguf"


def use_endpoint(monkeypatch: pytest.MonkeyPatch, endpoint: str) -> None:
    """As HF_ENDPOINT does, which the library reads when it is imported."""
    constants = huggingface_hub.constants
    monkeypatch.setattr(constants, "ENDPOINT", endpoint)
    template = endpoint + "/{repo_id}/resolve/{revision}/{filename}"
    monkeypatch.setattr(constants, "HUGGINGFACE_CO_URL_TEMPLATE", template)


@pytest.fixture
def hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[HubServer]:
    """A hub that has one model of 3 MB, and the library's cache in an empty directory."""
    weights = np.random.default_rng(0).standard_normal(750_000).astype(np.float32)
    path = write_gguf(tmp_path / "source.gguf", LLAMA_KEYS, {"token_embd.weight": weights})
    with HubServer() as server:
        server.add(NAME, path)
        use_endpoint(monkeypatch, server.endpoint)
        monkeypatch.setattr(huggingface_hub.constants, "AGENT_HARNESSES_PATH", str(tmp_path / "harnesses"))
        monkeypatch.setattr(huggingface_hub.constants, "HF_HUB_CACHE", str(tmp_path / "hub"))
        monkeypatch.setenv("HF_TOKEN", "hf_secret")
        yield server
    close_session()


class Clock:
    """Waits for nothing, and remembers for how long it should have."""

    def __init__(self) -> None:
        self.waited: list[float] = []

    def __call__(self, seconds: float) -> None:
        self.waited.append(seconds)


@pytest.fixture
def clock() -> Clock:
    return Clock()


def opened(hub: HubServer, clock: Clock) -> Repository:
    return open_repository(hub.repo, wait=clock)


def pulled(repository: Repository, target: Target) -> list[Any]:
    return list(download(repository, repository.quants[0], target))


def files_under(directory: Path) -> list[str]:
    return sorted(str(path.relative_to(directory)) for path in directory.rglob("*") if not path.is_dir())


def named(*names: str) -> list[RemoteFile]:
    return [RemoteFile(name, 1000 - i, "0" * 64) for i, name in enumerate(names)]


@pytest.mark.parametrize(
    ("name", "quant"),
    [
        ("MiniMax-M3-Q4_K_M.gguf", "Q4_K_M"),
        ("model.Q2_K.gguf", "Q2_K"),
        ("M3-UD-IQ2_XXS.gguf", "UD-IQ2_XXS"),
        ("UD-Q2_K_XL/M3-UD-Q2_K_XL-00001-of-00001.gguf", "UD-Q2_K_XL"),
        ("BF16/m3.gguf", "BF16"),
        ("m3-bf16.gguf", "bf16"),
        ("gpt-MXFP4_MOE.gguf", "MXFP4_MOE"),
        ("Q5_K_S-imported/thing-TQ1_0.gguf", "TQ1_0"),
        ("plain.gguf", "plain"),
    ],
)
def test_a_quant_is_named_by_its_file_or_folder(name: str, quant: str) -> None:
    """The published naming habits of bartowski, unsloth, ggml-org and others are understood."""
    assert [found.name for found in quants_of(named(name))] == [quant]


def test_shards_are_one_quant_in_order_and_a_gap_is_told() -> None:
    """A split model counts as one, whatever order the hub lists it in; a set that lacks a part is broken."""
    whole = [f"Q4_K_M/m-Q4_K_M-0000{i}-of-00003.gguf" for i in (3, 1, 2)]
    gap = ["m-Q2_K-00001-of-00002.gguf"]
    quants = {quant.name: quant for quant in quants_of(named(*whole, *gap))}
    assert [file.name for file in quants["Q4_K_M"].files] == sorted(whole)
    assert not quants["Q4_K_M"].problem
    assert quants["Q4_K_M"].nbytes == 1000 + 999 + 998
    assert "not in the repository" in quants["Q2_K"].problem


def test_two_models_of_one_quant_keep_different_names() -> None:
    """A repository with two models does not offer the same name twice."""
    assert {q.name for q in quants_of(named("a-Q4_0.gguf", "b-Q4_0.gguf"))} == {"a-Q4_0", "b-Q4_0"}


def test_a_download_lands_in_the_hubs_cache_where_its_own_library_finds_it(
    hub: HubServer, clock: Clock
) -> None:
    """The layout is huggingface_hub's: it gives the path without asking for a byte."""
    repository = opened(hub, clock)
    target = Target(repository)
    pulled(repository, target)
    path = target.path(repository.quants[0].files[0])
    assert path.read_bytes() == hub.files[NAME]
    before = hub.sent
    assert Path(huggingface_hub.hf_hub_download(hub.repo, NAME)) == path
    assert Path(huggingface_hub.hf_hub_download(hub.repo, NAME, local_files_only=True)) == path
    assert hub.sent == before
    assert checked_header(target, repository.quants[0])[1].layers == 2


def test_the_token_goes_to_the_hub_and_never_to_the_host_it_redirects_to(
    hub: HubServer, clock: Clock
) -> None:
    """A CDN's address is signed; the user's token is none of its business."""
    repository = opened(hub, clock)
    pulled(repository, Target(repository))
    assert {token for *_, token, port in hub.requests if port == hub.cdn_port} == {False}
    assert any(token for *_, token, port in hub.requests if port == hub.port)


def test_broken_connections_are_resumed_where_they_broke(hub: HubServer, clock: Clock) -> None:
    """Each byte is asked for once, and the waits do not grow while there is progress."""
    hub.faults.break_after, hub.faults.breaks = 1 << 20, 2
    repository = opened(hub, clock)
    target = Target(repository)
    events = pulled(repository, target)
    size = len(hub.files[NAME])
    assert [ranged for _, ranged in hub.downloads()] == [
        f"bytes={start}-{size - 1}" for start in (0, 1 << 20, 2 << 20)
    ]
    assert hub.sent == size
    assert clock.waited == [1.0, 1.0]
    assert sum(isinstance(event, Trouble) for event in events) == 2
    assert target.path(repository.quants[0].files[0]).read_bytes() == hub.files[NAME]


def test_a_server_without_ranges_starts_over_and_still_ends_right(hub: HubServer, clock: Clock) -> None:
    """What was there is not appended to."""
    hub.faults.break_after, hub.faults.breaks, hub.faults.no_ranges = 1 << 20, 1, True
    repository = opened(hub, clock)
    target = Target(repository)
    events = pulled(repository, target)
    assert any(isinstance(e, Trouble) and "starts over" in e.sentence for e in events)
    assert target.path(repository.quants[0].files[0]).read_bytes() == hub.files[NAME]


def test_a_connection_that_brings_nothing_new_is_given_up(hub: HubServer, clock: Clock) -> None:
    """Five failures in a row, waits that double, an error that says what to do, and the part kept."""
    hub.faults.break_after, hub.faults.breaks, hub.faults.no_ranges = 1 << 20, 99, True
    repository = opened(hub, clock)
    target = Target(repository)
    with pytest.raises(MachineError, match=f"{NAME} could not be downloaded") as caught:
        pulled(repository, target)
    assert "goes on from here" in caught.value.hint
    assert clock.waited == [1.0, 2.0, 4.0, 8.0]
    part = target.part(repository.quants[0].files[0])
    assert part.read_bytes() == hub.files[NAME][: 1 << 20]
    hub.faults.breaks = 0
    hub.faults.no_ranges = False
    received = [e.received for e in pulled(repository, target) if isinstance(e, Transferred)]
    assert received[-1] == len(hub.files[NAME]) - (1 << 20)


@pytest.mark.parametrize("status", [429, 503])
def test_a_busy_server_is_waited_for_as_long_as_it_asks(hub: HubServer, clock: Clock, status: int) -> None:
    """Both for the description and for the file; nobody is waited for longer than a minute."""
    hub.faults.busy, hub.faults.busy_status, hub.faults.retry_after = 2, status, "7"
    repository = opened(hub, clock)
    assert clock.waited == [7.0, 7.0]
    hub.faults.busy, hub.faults.retry_after = 1, "86400"
    pulled(repository, Target(repository))
    assert clock.waited == [7.0, 7.0, 60.0]


def test_a_server_that_stays_busy_is_given_up(hub: HubServer, clock: Clock) -> None:
    """The error names the status."""
    hub.faults.busy = 99
    with pytest.raises(MachineError, match="HTTP status 503"):
        opened(hub, clock)


def test_wrong_content_is_fetched_again_once(hub: HubServer, clock: Clock) -> None:
    """A checksum that is wrong once costs a second download."""
    hub.faults.wrong = 1
    repository = opened(hub, clock)
    target = Target(repository)
    events = pulled(repository, target)
    assert any(isinstance(e, Trouble) and "wrong checksum" in e.sentence for e in events)
    assert target.path(repository.quants[0].files[0]).read_bytes() == hub.files[NAME]
    assert hub.sent == 2 * len(hub.files[NAME])


def test_wrong_content_twice_is_an_error_that_names_the_file(hub: HubServer, clock: Clock) -> None:
    """Nothing of it can be found by anybody, and the bytes are gone."""
    hub.faults.wrong = 2
    repository = opened(hub, clock)
    target = Target(repository)
    with pytest.raises(ModelError, match=rf"{NAME} .* wrong checksum"):
        pulled(repository, target)
    file = repository.quants[0].files[0]
    assert target.finished(file) is None
    assert not target.part(file).exists()


def test_a_part_that_was_damaged_on_the_disk_is_found_out(hub: HubServer, clock: Clock) -> None:
    """An earlier run's bytes are hashed too."""
    repository = opened(hub, clock)
    target = Target(repository)
    part = target.part(repository.quants[0].files[0])
    part.parent.mkdir(parents=True)
    part.write_bytes(b"GGUF" + bytes(1 << 20))
    pulled(repository, target)
    assert target.path(repository.quants[0].files[0]).read_bytes() == hub.files[NAME]


def test_a_finished_file_is_verified_and_replaced_when_it_is_wrong(
    hub: HubServer, clock: Clock, tmp_path: Path
) -> None:
    """Right files cost no download; one of the right size and another content does."""
    repository = opened(hub, clock)
    target = Target(repository, tmp_path / "models")
    pulled(repository, target)
    sent = hub.sent
    pulled(repository, target)
    assert hub.sent == sent
    path = target.path(repository.quants[0].files[0])
    path.write_bytes(bytes(path.stat().st_size))
    pulled(repository, target)
    assert path.read_bytes() == hub.files[NAME]
    assert files_under(tmp_path / "models") == [NAME]


def test_an_endless_body_ends_with_the_file(hub: HubServer, clock: Clock) -> None:
    """No byte more than the file was said to have is written."""
    hub.faults.endless = True
    repository = opened(hub, clock)
    target = Target(repository)
    pulled(repository, target)
    assert target.path(repository.quants[0].files[0]).read_bytes() == hub.files[NAME]


def test_a_web_page_instead_of_a_model_is_called_one(hub: HubServer, clock: Clock) -> None:
    """As the sign-in pages of networks answer; without a length, so that the size tells nothing."""
    hub.faults.html = hub.faults.lengthless = True
    repository = opened(hub, clock)
    with pytest.raises(ModelError, match="looks like a web page"):
        pulled(repository, Target(repository))
    assert "not a GGUF file" in remote_facts(repository, repository.quants[0]).problem


@pytest.mark.parametrize("lie", [1, -1, 1 << 40])
def test_sizes_that_contradict_each_other_are_refused(hub: HubServer, clock: Clock, lie: int) -> None:
    """The server's size of the file is not the repository's."""
    hub.faults.lie_about_size = lie
    repository = opened(hub, clock)
    with pytest.raises(ModelError, match=f"the repository {hub.repo} says"):
        pulled(repository, Target(repository))


@pytest.mark.parametrize(
    "name",
    [
        "../evil.gguf",
        "/etc/evil.gguf",
        "a/../../evil.gguf",
        "a//b.gguf",
        "a\nb.gguf",
        "\x1b[2J.gguf",
        "..\\x.gguf",
        "C:x.gguf",
        "./x.gguf",
        "a\u202eb.gguf",
        "x" * 300 + ".gguf",
    ],
)
def test_names_that_leave_their_directory_end_the_run(
    hub: HubServer, clock: Clock, name: str, tmp_path: Path
) -> None:
    """Nothing is written anywhere, and the message cannot drive a terminal."""
    hub.renamed[NAME] = name
    before = files_under(tmp_path)
    with pytest.raises(ModelError, match="a name that could be written elsewhere") as caught:
        opened(hub, clock)
    assert "\x1b" not in caught.value.message
    assert files_under(tmp_path) == before


@pytest.mark.parametrize(
    "said",
    [
        {"size": None, "lfs": None},
        {"size": 12},
        {"size": -5, "lfs": None},
        {"size": "many", "lfs": None},
        {"lfs": {"sha256": "../../x", "size": 3_000_000, "pointerSize": 1}, "size": None},
        {"lfs": {"sha256": "0" * 64, "size": 1 << 60, "pointerSize": 1}, "size": None},
        {"lfs": None, "blobId": None},
        {"rfilename": 7},
        {"rfilename": None},
        {"lfs": "yes"},
    ],
)
def test_descriptions_that_make_no_sense_are_refused(
    hub: HubServer, clock: Clock, said: dict[str, Any], tmp_path: Path
) -> None:
    """Whatever a server says of a file, it ends in a sentence."""
    hub.overrides[NAME] = said
    before = files_under(tmp_path)
    with pytest.raises(ModelError):
        opened(hub, clock)
    assert files_under(tmp_path) == before


def test_a_commit_that_is_no_commit_is_refused(hub: HubServer, clock: Clock) -> None:
    """It would become a directory's name."""
    hub.commit = "../../../elsewhere"
    with pytest.raises(ModelError, match="does not answer as a Hugging Face hub"):
        opened(hub, clock)


def test_what_a_hub_refuses_is_told_apart(hub: HubServer, clock: Clock) -> None:
    """Gated, absent, no hub at all, no such revision, no such repository, no name of one."""
    repository = opened(hub, clock)
    hub.faults.gated = True
    with pytest.raises(ModelError, match="is gated") as caught:
        pulled(repository, Target(repository))
    assert "HF_TOKEN" in caught.value.hint
    hub.faults.gated, hub.faults.absent = False, True
    with pytest.raises(ModelError, match="is not there"):
        pulled(repository, Target(repository))
    hub.faults.absent, hub.faults.api_html = False, True
    with pytest.raises(ModelError, match="does not answer as a Hugging Face hub"):
        opened(hub, clock)
    hub.faults.api_html = False
    with pytest.raises(ModelError, match="no such revision"):
        open_repository(hub.repo, "v9", wait=clock)
    with pytest.raises(UsageError, match="no revision"):
        open_repository(hub.repo, "../x", wait=clock)
    with pytest.raises(ModelError, match="no repository owner/other"):
        open_repository("owner/other", wait=clock)
    with pytest.raises(UsageError, match="no name of a repository"):
        open_repository("owner/..--x", wait=clock)
    hub.files.clear()
    with pytest.raises(ModelError, match="holds no GGUF model"):
        opened(hub, clock)


def test_an_unreachable_hub_is_tried_five_times(
    hub: HubServer, clock: Clock, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A port where nobody listens."""
    use_endpoint(monkeypatch, "http://127.0.0.1:9")
    with pytest.raises(MachineError, match="could not be downloaded: the connection to"):
        opened(hub, clock)
    assert clock.waited == [1.0, 2.0, 4.0, 8.0]


def test_without_the_library_the_error_says_how_to_get_it(monkeypatch: pytest.MonkeyPatch) -> None:
    """It is an extra."""
    monkeypatch.setitem(sys.modules, "huggingface_hub", None)
    with pytest.raises(MachineError, match="is not installed") as caught:
        open_repository("owner/repo")
    assert "m3cli[hub]" in caught.value.hint


def test_the_license_is_the_cards(hub: HubServer, clock: Clock) -> None:
    """An `other` licence goes by its name, with its link."""
    assert opened(hub, clock).license == "apache-2.0"
    hub.card = {"license": "other", "license_name": "minimax-model", "license_link": "LICENSE"}
    assert opened(hub, clock).license == "minimax-model (LICENSE)"
    hub.card = {}
    assert opened(hub, clock).license == "other"  # from the tags


def test_projectors_and_importance_matrices_are_no_quants(hub: HubServer, clock: Clock) -> None:
    """They end in .gguf, and cannot be run."""
    hub.add("mmproj-F16.gguf", b"GGUF")
    hub.add("x-imatrix.gguf", b"GGUF")
    assert [quant.name for quant in opened(hub, clock).quants] == ["Q8_0"]


def test_a_header_is_read_from_the_front_alone(hub: HubServer, clock: Clock) -> None:
    """Of a model of 3 MB, the first megabyte; the licence that the header names is found."""
    repository = opened(hub, clock)
    facts = remote_facts(repository, repository.quants[0])
    assert not facts.problem
    assert hub.sent == 1 << 20


def test_a_header_longer_than_the_first_request_is_read_on(
    hub: HubServer, clock: Clock, tmp_path: Path
) -> None:
    """A vocabulary of 200,000 tokens takes more than a megabyte; a hole is never taken for a header."""
    words = {"tokenizer.ggml.tokens": [f"token{i}" for i in range(200_000)], "general.license": "mit"}
    path = write_model(tmp_path / "long.gguf", **words)
    hub.files.clear()
    hub.add(NAME, path)
    repository = opened(hub, clock)
    facts = remote_facts(repository, repository.quants[0])
    assert facts.license == "mit"
    assert not facts.problem
    assert hub.sent == min(4 << 20, path.stat().st_size)


def test_a_header_that_never_ends_is_a_problem_not_a_crash(hub: HubServer, clock: Clock) -> None:
    """A broken header is read to the file's end, and described by the file's own name."""
    hub.files[NAME] = hub.files[NAME][:200] + bytes(range(256)) * 20_000
    repository = opened(hub, clock)
    facts = remote_facts(repository, repository.quants[0])
    assert facts.problem.startswith(f"{NAME} is a broken GGUF file")


def test_the_headers_of_shards_are_read_together(hub: HubServer, clock: Clock, tmp_path: Path) -> None:
    """What the shards' tensor tables say counts, and of their weights nothing is read."""
    hub.files.clear()
    weights = np.zeros(400_000, np.float32)
    for i in range(3):
        split = {"split.no": i, "split.count": 3, "split.tensors.count": 3}
        name = f"m-Q8_0-0000{i + 1}-of-00003.gguf"
        fields = {**LLAMA_KEYS, **split} if i == 0 else split
        hub.add(f"sub/{name}", write_gguf(tmp_path / name, fields, {f"t{i}.weight": weights}))
    repository = opened(hub, clock)
    assert not remote_facts(repository, repository.quants[0]).problem
    assert hub.sent == (1 << 20) + 2 * (1 << 16)
    target = Target(repository)
    pulled(repository, target)
    assert len(read_header(target.path(repository.quants[0].files[0])).tensors) == 3


def test_a_disk_without_room_is_told_before_a_byte_is_downloaded(
    hub: HubServer, clock: Clock, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What is there already is not counted twice."""
    repository = opened(hub, clock)
    target, quant = Target(repository), repository.quants[0]
    room = len(hub.files[NAME]) + (1 << 24)
    monkeypatch.setattr(shutil, "disk_usage", lambda _: shutil._ntuple_diskusage(room, 0, room))
    with pytest.raises(MachineError, match="GB more"):
        check_space(target, quant)
    part = target.part(quant.files[0])
    part.parent.mkdir(parents=True)
    part.write_bytes(hub.files[NAME][:1_000_000])
    check_space(target, quant)
    assert target.missing(quant) == len(hub.files[NAME]) - 1_000_000


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A file system of 2 MB."""
    place = tmp_path / "disk"
    place.mkdir()
    mounted = shutil.which("mount") and os.geteuid() == 0
    mount = ["mount", "-t", "tmpfs", "-o", "size=2m", "tmpfs", str(place)]
    if not mounted or subprocess.run(mount, capture_output=True, check=False).returncode:
        pytest.skip("needs the right to mount a tmpfs")
    yield place
    subprocess.run(["umount", str(place)], check=True)


def test_a_disk_that_fills_up_keeps_the_part(hub: HubServer, clock: Clock, small_disk: Path) -> None:
    """As when something else took the room after it was checked."""
    repository = opened(hub, clock)
    target = Target(repository, small_disk)
    with pytest.raises(MachineError, match="No space left on device") as caught:
        pulled(repository, target)
    assert "goes on from here" in caught.value.hint
    part = target.part(repository.quants[0].files[0])
    assert part.read_bytes() == hub.files[NAME][: part.stat().st_size]
    assert part.stat().st_size > 1 << 20


def test_two_processes_do_not_write_one_part(hub: HubServer, clock: Clock) -> None:
    """The second is refused, and the first ends right."""
    repository = opened(hub, clock)
    target = Target(repository)
    first = download(repository, repository.quants[0], target)
    next(first)
    with pytest.raises(MachineError, match="Another process"):
        pulled(repository, target)
    assert list(first)
    assert target.path(repository.quants[0].files[0]).read_bytes() == hub.files[NAME]


def test_a_file_outside_git_lfs_is_verified_by_gits_own_checksum(hub: HubServer, clock: Clock) -> None:
    """Small files have no SHA-256 on the hub."""
    hub.overrides[NAME] = {"lfs": None}
    repository = opened(hub, clock)
    file = repository.quants[0].files[0]
    data = hub.files[NAME]
    assert file.digest == hashlib.sha1(b"blob %d\0" % len(data) + data).hexdigest()
    pulled(repository, Target(repository))
    hub.faults.wrong = 2
    with pytest.raises(M3Error, match="wrong checksum"):
        pulled(repository, Target(repository, Path(huggingface_hub.constants.HF_HUB_CACHE) / "other"))


def test_a_disk_without_links_holds_the_file_itself(
    hub: HubServer, clock: Clock, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As exFAT on a removable disk; a second run finds it there."""

    def refuse(*_: object, **__: object) -> None:
        raise OSError(95, "Operation not supported")

    monkeypatch.setattr(Path, "symlink_to", refuse)
    repository = opened(hub, clock)
    target = Target(repository)
    pulled(repository, target)
    path = target.path(repository.quants[0].files[0])
    assert not path.is_symlink()
    assert path.read_bytes() == hub.files[NAME]
    sent = hub.sent
    pulled(repository, target)
    assert hub.sent == sent
