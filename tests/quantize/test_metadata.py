"""What a GGUF file says of its model: the shape that llama.cpp reads, the licence that people must know."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import TYPE_CHECKING, Any

import gguf
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from m3cli.errors import ModelError
from quantize.hparams import HParams
from quantize.metadata import add_hparams, add_metadata

if TYPE_CHECKING:
    from collections.abc import Callable

ARCHITECTURE = "minimax-m3"
UNREADABLE = Path("/proc/self/mem")  # a regular file that not even root can read from its beginning

# No two numbers are the same, so that none can be taken for another.
HPARAMS = HParams(
    layers=60,
    dense_layers=3,
    hidden=6144,
    vocab_size=200_064,
    context_length=1_048_576,
    rms_eps=1e-6,
    heads=64,
    kv_heads=5,
    head_dim=130,
    rotary_dim=66,
    rope_theta=5e6,
    dense_ff=12_288,
    experts=129,
    experts_used=6,
    expert_ff=3072,
    shared_experts=1,
    expert_scale=2.5,
    index_heads=4,
    index_dim=128,
    index_top_k=16,
    index_block=256,
    index_local=7,
)

UINT, FLOAT, BOOL = gguf.GGUFValueType.UINT32, gguf.GGUFValueType.FLOAT32, gguf.GGUFValueType.BOOL
# As llama-arch.cpp spells them; llama.cpp refuses a key whose type is not the one that it expects.
KEYS = {
    # llama-model.cpp, of every model
    "vocab_size": (UINT, 200_064),
    "context_length": (UINT, 1_048_576),
    "embedding_length": (UINT, 6144),
    "block_count": (UINT, 60),
    "feed_forward_length": (UINT, 12_288),
    "attention.head_count": (UINT, 64),
    "attention.head_count_kv": (UINT, 5),
    "attention.key_length": (UINT, 130),
    "attention.value_length": (UINT, 130),
    "rope.dimension_count": (UINT, 66),
    "rope.freq_base": (FLOAT, 5e6),
    "expert_count": (UINT, 129),
    "expert_used_count": (UINT, 6),
    # models/minimax-m3.cpp
    "attention.layer_norm_rms_epsilon": (FLOAT, 1e-6),
    "leading_dense_block_count": (UINT, 3),
    "expert_feed_forward_length": (UINT, 3072),
    "expert_shared_count": (UINT, 1),
    "expert_weights_scale": (FLOAT, 2.5),
    "expert_weights_norm": (BOOL, True),
    "expert_gating_func": (UINT, 2),  # LLAMA_EXPERT_GATING_FUNC_TYPE_SIGMOID
    "attention.indexer.head_count": (UINT, 4),
    "attention.indexer.key_length": (UINT, 128),
    "attention.indexer.top_k": (UINT, 16),
    "attention.indexer.block_size": (UINT, 256),
    "attention.indexer.local_blocks": (UINT, 7),
}

# What stands in every file, whatever a checkpoint says.
OWN_KEYS = {"general.architecture", "general.type"}


def fields(directory: Path, fill: Callable[[gguf.GGUFWriter], object]) -> dict[str, gguf.ReaderField]:
    """The keys of a GGUF file with what `fill` adds, as the gguf package reads them."""
    path = directory / "made.gguf"
    writer = gguf.GGUFWriter(path, ARCHITECTURE)
    fill(writer)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.close()
    read = gguf.GGUFReader(path).fields
    return {key: field for key, field in read.items() if not key.startswith("GGUF.")}


def described(source: Path) -> tuple[dict[str, Any], str | None, list[str]]:
    """The keys that are written of a checkpoint, without those of every file; the licence; the notes."""
    result: list[Any] = []
    made = fields(source, lambda writer: result.extend(add_metadata(writer, source)))
    assert made["general.type"].contents() == "model"
    keys = {key: field.contents() for key, field in made.items() if key not in OWN_KEYS}
    return keys, result[0], result[1]


def card(directory: Path, front: str, rest: str = "# A model\n") -> Path:
    """A checkpoint with a model card of this front matter."""
    source = directory / "Tiny-M3"
    source.mkdir(exist_ok=True)
    (source / "README.md").write_text(f"---\n{front}\n---\n{rest}", encoding="utf-8")
    return source


def licence_keys(keys: dict[str, Any]) -> dict[str, Any]:
    start = "general.license"
    return {key.removeprefix(start): value for key, value in keys.items() if key.startswith(start)}


def refusal(source: Path) -> str:
    with pytest.raises(ModelError) as caught:
        add_metadata(gguf.GGUFWriter(None, ARCHITECTURE), source)
    assert caught.value.hint
    return caught.value.message


def test_the_keys_that_llama_cpp_reads(tmp_path: Path) -> None:
    """Each hyperparameter stands under llama.cpp's key for it, in the type that llama.cpp expects."""
    made = fields(tmp_path, lambda writer: add_hparams(writer, HPARAMS))
    found = {key: (field.types[0], field.contents()) for key, field in made.items()}
    assert found.pop("general.architecture") == (gguf.GGUFValueType.STRING, ARCHITECTURE)
    exact = {
        f"{ARCHITECTURE}.{key}": (kind, float(np.float32(value)) if kind == FLOAT else value)
        for key, (kind, value) in KEYS.items()
    }
    assert found == exact


def test_metadata_leaves_other_keys_alone(tmp_path: Path) -> None:
    """What was added to the header before is still in it, whichever comes first."""
    source = card(tmp_path, "license: mit")

    def both(writer: gguf.GGUFWriter) -> None:
        add_hparams(writer, HPARAMS)
        add_metadata(writer, source)

    made = fields(tmp_path, both)
    assert {f"{ARCHITECTURE}.{key}" for key in KEYS} < made.keys()
    assert made["general.license"].contents() == "mit"


@pytest.mark.parametrize(
    ("front", "written", "told"),
    [
        ("license: mit", {"": "mit"}, "mit"),
        (
            "license: other\nlicense_name: minimax-community\nlicense_link: https://example.org/LICENSE",
            {"": "other", ".name": "minimax-community", ".link": "https://example.org/LICENSE"},
            "minimax-community",
        ),
        ("license: other\nlicense_link: LICENSE", {"": "other", ".link": "LICENSE"}, "other"),
        ("license: [mit, apache-2.0]", {"": "mit,apache-2.0"}, "mit,apache-2.0"),
        ("license_name: minimax-community", {".name": "minimax-community"}, "minimax-community"),
        ("license: 'Lizenz für alle'", {"": "Lizenz für alle"}, "Lizenz für alle"),
        ("license: other\nlicense_name: 1.0", {"": "other", ".name": "1.0"}, "1.0"),
    ],
)
def test_the_card_s_licence(tmp_path: Path, front: str, written: dict[str, str], told: str) -> None:
    """The licence of the model card is stated in the file, with name and link; the user is told its name."""
    source = card(tmp_path, front)
    keys, licence, notes = described(source)
    assert licence_keys(keys) == written
    assert licence == told
    assert notes == []


def test_the_card_s_licence_goes_first(tmp_path: Path) -> None:
    """A LICENSE file beside it, whose name would be guessed, changes nothing."""
    source = card(tmp_path, "license: apache-2.0")
    (source / "LICENSE").write_text("MIT License\n", "utf-8")
    keys, licence, _ = described(source)
    assert licence_keys(keys) == {"": "apache-2.0"}
    assert licence == "apache-2.0"


@pytest.mark.parametrize(
    "front", ["tags: [moe]", "license: null", "license: ''", "license: []", "license: no", "- a list", ""]
)
@pytest.mark.parametrize(
    ("text", "name"),
    [
        (b"\n\n   MiniMax Community License  \nCopyright (c) 2026\n", "MiniMax Community License"),
        ("Lizenz f\u00fcr alle".encode(), "Lizenz f\u00fcr alle"),
        (b"Caf\xe9 License\r\n", "Caf\ufffd License"),
        (b"", "LICENSE"),
        (b" \n\t\n", "LICENSE"),
    ],
)
def test_a_licence_file(tmp_path: Path, front: str, text: bytes, name: str) -> None:
    """Where the card states no licence, the first line of LICENSE is its name."""
    source = card(tmp_path, front)
    (source / "LICENSE").write_bytes(text)
    keys, licence, notes = described(source)
    assert licence_keys(keys) == {"": "other", ".name": name}
    assert licence == name
    assert notes == []


def test_a_licence_file_that_the_card_names(tmp_path: Path) -> None:
    """A name in the card counts more than the first line of the file that it belongs to."""
    source = card(tmp_path, "license_name: minimax-community")
    (source / "LICENSE").write_text("THE LICENSE\n", "utf-8")
    keys, licence, _ = described(source)
    assert licence_keys(keys) == {"": "other", ".name": "minimax-community"}
    assert licence == "minimax-community"


@pytest.mark.parametrize("readme", [None, b"", b"# MiniMax-M3\n", b"---\ntags: [moe]\n---\n", b"---\n---\n"])
def test_no_licence_is_a_note(tmp_path: Path, readme: bytes | None) -> None:
    """A checkpoint without any licence is converted, and the user is told what that means."""
    source = tmp_path / "Tiny-M3"
    source.mkdir()
    if readme is not None:
        (source / "README.md").write_bytes(readme)
    keys, licence, notes = described(source)
    assert licence_keys(keys) == {}
    assert licence is None
    (note,) = notes
    assert note.startswith(f"{source} holds no licence")
    assert "commercial conditions" in note


def test_name_and_origin(tmp_path: Path) -> None:
    """Name, author, tags, languages and the model that it was made from come from the card."""
    front = (
        "license: mit\nmodel_name: Tiny M3\nmodel_creator: Somebody\nversion: 1.5\ntags: [moe, 2026, msa]\n"
        "language: [en, no]\nbase_model: MiniMaxAI/MiniMax-M3\ndatasets: [a/b]\ndescription: 2026-06-01"
    )
    keys, *_ = described(card(tmp_path, front))
    assert keys == {
        "general.license": "mit",
        "general.name": "Tiny M3",
        "general.author": "Somebody",
        "general.version": "1.5",
        "general.description": "2026-06-01",
        "general.tags": ["moe", "2026", "msa"],
        "general.languages": ["en"],  # YAML's `no` is false
        "general.base_model.count": 1,
        "general.base_model.0.name": "MiniMax M3",
        "general.base_model.0.organization": "MiniMaxAI",
        "general.base_model.0.repo_url": "https://huggingface.co/MiniMaxAI/MiniMax-M3",
        "general.dataset.count": 1,
        "general.dataset.0.name": "B",
        "general.dataset.0.organization": "A",
        "general.dataset.0.repo_url": "https://huggingface.co/a/b",
    }


def test_the_name_of_the_model(tmp_path: Path) -> None:
    """The card's, or that of the repository in a hub cache, or M3's; never a directory's or a commit's."""
    source = card(tmp_path, "license: mit")
    assert described(source)[0]["general.name"] == "MiniMax M3"
    snapshot = tmp_path / "models--MiniMaxAI--MiniMax-M3.5" / "snapshots" / ("0123456789abcdef" * 2)
    snapshot.parent.mkdir(parents=True)
    source.rename(snapshot)
    (tmp_path / "link").symlink_to(snapshot)
    for path in (snapshot, tmp_path / "link"):
        keys = described(path)[0]
        assert keys["general.name"] == "MiniMax M3.5"
        assert not [key for key, value in keys.items() if "0123456789abcdef" in str(value)]
    (snapshot / "README.md").write_text("---\nlicense: mit\nname: My M3\n---\n", "utf-8")
    assert described(snapshot)[0]["general.name"] == "My M3"


def test_recommended_sampling(tmp_path: Path) -> None:
    """The sampling settings of generation_config.json are kept, except what GGUF's types cannot hold."""
    source = card(tmp_path, "license: mit")
    config = {"temperature": 1, "top_p": 0.95, "top_k": 40, "min_p": "0.1", "penalty_last_n": 2.5}
    config |= {"mirostat": 1 << 40, "mirostat_tau": 1e300, "mirostat_eta": math.nan, "penalty_repeat": True}
    (source / "generation_config.json").write_text(json.dumps(config), "utf-8")
    keys, *_ = described(source)
    start = "general.sampling."
    sampling = {key.removeprefix(start): value for key, value in keys.items() if key.startswith(start)}
    assert sampling == {"temp": 1.0, "top_p": float(np.float32(0.95)), "top_k": 40}


@pytest.mark.parametrize(
    "front",
    [
        "license: {mit: true}",
        "license: yes",
        "license: [mit, 2]",
        "license: !!binary bWl0",
        "license: mit\nlicense_link: [LICENSE]",
        "license: other\nlicense_name: {a: b}",
    ],
)
def test_a_licence_that_is_no_text(tmp_path: Path, front: str) -> None:
    """A licence is never dropped in silence: what cannot be stated stops the conversion."""
    source = card(tmp_path, front)
    (source / "LICENSE").write_text("MIT License\n", "utf-8")
    assert f"Name and licence of {source} cannot be read: " in refusal(source)


@pytest.mark.parametrize(
    "readme",
    [
        b"---\nlicense: mit: other\n---\n",
        b"---\nlicense: [mit\n---\n",
        b"---\nlicense: 'mit\n---\n",
        b"---\nlicense: !!python/object:os.system x\n---\n",
        b"---\nlicense: *unknown\n---\n",
        b"---\n? [a, b]\n: {? {a: b} : c}\n---\n",
        b"---\nlicense: mit\xff\n---\n",
        b"---\nlicense: mit\x00\n---\n",
        b"---\ntags: " + b"[" * 5000 + b"\n---\n",
        b"---\nversion: 0x" + b"f" * 5000 + b"\n---\n",
        b"---\nversion: " + b"9" * 5000 + b"\n---\n",
    ],
)
def test_a_broken_card(tmp_path: Path, readme: bytes) -> None:
    """Front matter that is no YAML or no UTF-8 is refused with the checkpoint's name."""
    (tmp_path / "README.md").write_bytes(readme)
    assert f"Name and licence of {tmp_path} cannot be read: " in refusal(tmp_path)


@pytest.mark.skipif(not UNREADABLE.exists(), reason="needs Linux's /proc")
@pytest.mark.parametrize("name", ["README.md", "LICENSE"])
def test_a_file_that_cannot_be_read(tmp_path: Path, name: str) -> None:
    """Where the system refuses to read the card or the licence, none is guessed."""
    (tmp_path / name).symlink_to(UNREADABLE)
    assert f"Name and licence of {tmp_path} cannot be read: " in refusal(tmp_path)


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("config.json", {"_name_or_path": 5}),
        ("config.json", [1]),
        ("generation_config.json", [1]),
        ("generation_config.json", "text"),
    ],
)
def test_other_files_of_a_wrong_type(tmp_path: Path, name: str, content: object) -> None:
    """The other files that name the model are read with the same care."""
    (tmp_path / name).write_text(json.dumps(content), "utf-8")
    assert f"Name and licence of {tmp_path} cannot be read: " in refusal(tmp_path)


CARD_KEYS = [
    *("name", "author", "version", "organization", "description", "finetune", "basename", "size_label"),
    *("url", "doi", "model_name", "model_creator", "model_type", "license", "license_name", "license_link"),
    *("tags", "pipeline_tag", "language", "languages", "base_model", "base_models", "datasets", "dataset"),
]
CONFIG_KEYS = [
    "sequence",
    "top_k",
    "top_p",
    "min_p",
    "temperature",
    "penalty_last_n",
    "mirostat",
    "mirostat_tau",
]
SCALARS = (
    st.none()
    | st.booleans()
    | st.integers()
    | st.integers(-(2**40), 2**40)
    | st.floats()
    | st.text(max_size=5)
    | st.sampled_from(["\ud800", "a/b", "https://huggingface.co/a/b", "mit", "x-7b1", "- -", "/"])
)
VALUES = st.recursive(
    SCALARS,
    lambda inner: (
        st.lists(inner, max_size=3)
        | st.dictionaries(st.sampled_from(["name", "author", "repo_url", "version", "a"]), inner, max_size=3)
    ),
    max_leaves=5,
)
YAML_ONLY = st.sampled_from(
    [
        "2026-06-01",
        "2026-06-01 10:00:00",
        "!!binary gICA",
        "!!set {a, b}",
        "&a [*a]",
        "0x1F",
        "1e3",
        ".nan",
        "~",
    ]
)


@settings(max_examples=300)
@given(
    st.dictionaries(st.sampled_from(CARD_KEYS), VALUES.map(json.dumps) | YAML_ONLY, max_size=4),
    st.dictionaries(st.sampled_from(CONFIG_KEYS), VALUES, max_size=2),
)
def test_no_value_ends_in_another_error(
    tmp_path_factory: pytest.TempPathFactory, front: dict[str, str], config: dict[str, Any]
) -> None:
    """Whatever type a value has, a readable header is written, or a ModelError names the checkpoint."""
    lines = "\n".join(f"{key}: {value}" for key, value in front.items())
    source = card(tmp_path_factory.getbasetemp(), lines)
    (source / "generation_config.json").write_text(json.dumps(config), "utf-8")
    said = str(source)
    try:
        keys, licence, notes = described(source)
    except ModelError as error:
        said = error.message
    else:
        stated = licence_keys(keys)
        assert licence == stated.get(".name", stated.get(""))
        assert bool(notes) == (licence is None)
        assert all(math.isfinite(value) for value in keys.values() if isinstance(value, float))
    assert str(source) in said


@given(st.text(st.sampled_from("ab:-[]{}&*!|>'\"#%@`, \t\n0.~?\u0085\ufeff\x00"), max_size=25))
def test_no_text_ends_in_another_error(tmp_path_factory: pytest.TempPathFactory, front: str) -> None:
    """Whatever stands between the card's dashes, it is read, ignored, or refused by the checkpoint's name."""
    source = card(tmp_path_factory.getbasetemp(), f"license: mit\n{front}")
    (source / "generation_config.json").unlink(missing_ok=True)
    said = str(source)
    try:
        assert described(source)[1] is not None
    except ModelError as error:
        said = error.message
    assert str(source) in said
