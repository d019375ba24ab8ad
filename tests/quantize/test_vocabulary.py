"""A checkpoint's tokenizer becomes the GGUF's, or the sentence that says what is wrong with it."""

from __future__ import annotations

import copy
import dataclasses
import json
from typing import TYPE_CHECKING, Any

import gguf
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer

from m3cli.errors import ModelError
from quantize.vocabulary import add_vocabulary
from scripts.make_tiny_m3 import O200K
from tests.gguf_files import CONTROL, NORMAL, UNUSED, USER_DEFINED
from tests.quantize.test_names import SMALL

if TYPE_CHECKING:
    from collections.abc import Callable
    from pathlib import Path

SIZE = 12
HPARAMS = dataclasses.replace(SMALL, vocab_size=SIZE)
TEMPLATE = "{{ messages[0].content }}"


def small() -> dict[str, Any]:
    """A tokenizer of 10 tokens in the published form, for a model with 12 ids."""
    return {
        "version": "1.0",
        "truncation": None,
        "padding": None,
        "added_tokens": [
            added(6, "]~!b[", special=True),
            added(7, "[e~[", special=True),
            added(8, "<tool_call>", special=False),
            added(9, "]!p~[", special=True),
        ],
        "normalizer": None,
        "pre_tokenizer": {
            "type": "Sequence",
            "pretokenizers": [
                {"type": "Split", "pattern": {"Regex": O200K}, "behavior": "Isolated", "invert": False},
                {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": False},
            ],
        },
        "post_processor": None,
        "decoder": {"type": "ByteLevel", "add_prefix_space": True, "trim_offsets": True, "use_regex": True},
        "model": {
            "type": "BPE",
            "dropout": None,
            "unk_token": None,
            "continuing_subword_prefix": None,
            "end_of_word_suffix": None,
            "fuse_unk": False,
            "byte_fallback": False,
            "ignore_merges": False,
            "vocab": {"a": 0, "b": 1, "Ġ": 2, "ab": 3, "Ġab": 4, "Ġa": 5},
            "merges": [["a", "b"], ["Ġ", "ab"], ["Ġ", "a"]],
        },
    }


def added(token_id: int, content: str, *, special: bool) -> dict[str, Any]:
    return {
        "id": token_id,
        "content": content,
        "single_word": False,
        "lstrip": False,
        "rstrip": False,
        "normalized": False,
        "special": special,
    }


CONFIG = {"bos_token": "]~!b[", "eos_token": "[e~["}


def write(
    directory: Path,
    tokenizer: object,
    tokenizer_config: object = CONFIG,
    jinja: str | None = TEMPLATE,
    config: object = None,
    chat_template: object = None,
) -> Path:
    """The files of a checkpoint that concern the tokenizer; what is None is not there."""
    directory.mkdir(exist_ok=True)
    for name, content in (
        ("tokenizer.json", tokenizer),
        ("tokenizer_config.json", tokenizer_config),
        ("config.json", config),
        ("chat_template.json", chat_template),
    ):
        (directory / name).unlink(missing_ok=True)
        if content is not None:
            (directory / name).write_text(json.dumps(content), "utf-8")
    if jinja is not None:
        (directory / "chat_template.jinja").write_text(jinja, "utf-8")
    return directory


def made(directory: Path) -> tuple[dict[str, Any], list[str]]:
    """The keys that a GGUF file of this vocabulary holds, and the notes."""
    path = directory / "vocabulary.gguf"
    writer = gguf.GGUFWriter(path, "minimax-m3")
    notes = add_vocabulary(writer, directory, HPARAMS)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.close()
    fields = gguf.GGUFReader(path).fields
    prefix = "tokenizer."
    keys = {key.removeprefix(prefix): field.contents() for key, field in fields.items() if prefix in key}
    return keys, notes


def refusal(directory: Path) -> str:
    """The message of the refusal, which has to come before anything is written and says what to do."""
    with pytest.raises(ModelError) as caught:
        add_vocabulary(gguf.GGUFWriter(None, "minimax-m3"), directory, HPARAMS)
    assert caught.value.hint
    return caught.value.message


def test_the_tiny_model_s_vocabulary(tiny_m3: Path, tiny_gguf: Path) -> None:
    """Every id has the text and the kind that Hugging Face's tokenizers give it."""
    reference = Tokenizer.from_file(str(tiny_m3 / "tokenizer.json"))
    fields = gguf.GGUFReader(tiny_gguf).fields
    tokens = fields["tokenizer.ggml.tokens"].contents()
    types = fields["tokenizer.ggml.token_type"].contents()
    assert len(tokens) == len(types) == len(set(tokens)) == 1024
    added = reference.get_added_tokens_decoder()
    assert {token.special for token in added.values()} == {True, False}
    for i, (text, kind) in enumerate(zip(tokens, types, strict=True)):
        if i in added:
            assert kind == (CONTROL if added[i].special else USER_DEFINED)
        else:
            assert kind == (UNUSED if reference.id_to_token(i) is None else NORMAL)
        if kind != UNUSED:
            assert text == reference.id_to_token(i)
    assert types.count(UNUSED) == 1024 - reference.get_vocab_size() == 5
    merges = json.loads((tiny_m3 / "tokenizer.json").read_text("utf-8"))["model"]["merges"]
    assert fields["tokenizer.ggml.merges"].contents() == [" ".join(pair) for pair in merges]
    assert fields["tokenizer.ggml.bos_token_id"].contents() == reference.token_to_id("]~!b[")
    assert fields["tokenizer.ggml.eos_token_id"].contents() == reference.token_to_id("[e~[")
    template = (tiny_m3 / "chat_template.jinja").read_text("utf-8")
    assert fields["tokenizer.chat_template"].contents() == template


@pytest.mark.parametrize("merges", [[["a", "b"], ["Ġ", "ab"], ["Ġ", "a"]], ["a b", "Ġ ab", "Ġ a"]])
def test_every_key(tmp_path: Path, merges: list[Any]) -> None:
    """All that llama.cpp reads of a vocabulary, whichever of its two forms the merges have."""
    tokenizer = small()
    tokenizer["model"]["merges"] = merges
    Tokenizer.from_str(json.dumps(tokenizer))  # it is one
    keys, notes = made(write(tmp_path, tokenizer))
    assert keys == {
        "ggml.model": "gpt2",
        "ggml.pre": "minimax-m2",
        "ggml.tokens": [
            *("a", "b", "Ġ", "ab", "Ġab", "Ġa"),
            *("]~!b[", "[e~[", "<tool_call>", "]!p~[", "[PAD10]", "[PAD11]"),
        ],
        "ggml.token_type": [NORMAL] * 6 + [CONTROL] * 2 + [USER_DEFINED, CONTROL] + [UNUSED] * 2,
        "ggml.merges": ["a b", "Ġ ab", "Ġ a"],
        "ggml.bos_token_id": 6,
        "ggml.eos_token_id": 7,
        "ggml.add_bos_token": False,
        "chat_template": TEMPLATE,
    }
    assert notes == []


def test_an_added_token_that_the_vocabulary_also_has(tmp_path: Path) -> None:
    """The same token in both places is one token, of the kind that it was added as."""
    tokenizer = small()
    tokenizer["model"]["vocab"] |= {"[e~[": 7, "<tool_call>": 8}
    keys, _ = made(write(tmp_path, tokenizer))
    assert keys["ggml.tokens"][7:9] == ["[e~[", "<tool_call>"]
    assert keys["ggml.token_type"][7:9] == [CONTROL, USER_DEFINED]


@pytest.mark.parametrize(
    ("config", "model_config", "expected"),
    [
        ({"eos_token": "[e~["}, None, {"eos": 7}),
        ({"eos_token": {"content": "[e~[", "lstrip": False}}, None, {"eos": 7}),
        ({"eos_token": "[e~[", "pad_token": "]!p~[", "unk_token": None}, None, {"eos": 7, "padding": 9}),
        (None, {"bos_token_id": 6, "eos_token_id": 7}, {"bos": 6, "eos": 7}),
        ({}, {"text_config": {"bos_token_id": 6, "eos_token_id": 7}}, {"bos": 6, "eos": 7}),
        ({"eos_token": "[e~["}, {"bos_token_id": 6, "eos_token_id": 9}, {"bos": 6, "eos": 7}),
        ({"eos_token": "[e~[", "bos_token": "absent"}, {"bos_token_id": 99}, {"eos": 7}),
    ],
)
def test_special_ids(tmp_path: Path, config: object, model_config: object, expected: dict[str, int]) -> None:
    """tokenizer_config.json names tokens, config.json ids; where both do, the former counts."""
    keys, _ = made(write(tmp_path, small(), config, config=model_config))
    suffix = "_token_id"
    ids = {key.removeprefix("ggml."): value for key, value in keys.items() if key.endswith(suffix)}
    assert ids == {name + suffix: token_id for name, token_id in expected.items()}


@pytest.mark.parametrize("add_bos", [None, False, True])
def test_bos(tmp_path: Path, add_bos: bool | None) -> None:
    """The template writes BOS, so the tokenizer adds none, unless the checkpoint says that it does."""
    config = CONFIG if add_bos is None else {**CONFIG, "add_bos_token": add_bos}
    keys, _ = made(write(tmp_path, small(), config))
    assert keys["ggml.add_bos_token"] is bool(add_bos)


NAMED = [{"name": "tool_use", "template": "{{ tools }}"}, {"name": "default", "template": "{{ default }}"}]


@pytest.mark.parametrize(
    ("config", "jinja", "expected"),
    [
        (CONFIG, "{{ jinja }}\n{% if x %}\n", "{{ jinja }}\n{% if x %}\n"),
        ({**CONFIG, "chat_template": "{{ config }}"}, None, "{{ config }}"),
        ({**CONFIG, "chat_template": "{{ config }}"}, "{{ jinja }}", "{{ jinja }}"),
        ({**CONFIG, "chat_template": None}, "{{ jinja }}", "{{ jinja }}"),
        ({**CONFIG, "chat_template": NAMED}, None, "{{ default }}"),
        (CONFIG, None, None),
    ],
)
def test_the_chat_template_is_that_of_transformers(
    tmp_path: Path, config: object, jinja: str | None, expected: str | None
) -> None:
    """A template in a file of its own goes first, then tokenizer_config.json's, of several the default."""
    from transformers import PreTrainedTokenizerFast

    directory = write(tmp_path, small(), config, jinja)
    reference = PreTrainedTokenizerFast.from_pretrained(directory)
    if reference.chat_template is not None:
        assert reference.get_chat_template() == expected
    keys, notes = made(directory)
    assert keys.get("chat_template") == expected
    assert not [key for key in keys if key.startswith("chat_template") and key != "chat_template"]
    assert notes == ([] if expected else [NO_TEMPLATE.format(directory)])


NO_TEMPLATE = "{} holds no chat template, so the model will be prompted as plain text."


@pytest.mark.parametrize(
    ("config", "jinja", "template_json"),
    [
        ({**CONFIG, "chat_template": ""}, None, None),
        ({**CONFIG, "chat_template": []}, None, None),
        ({**CONFIG, "chat_template": NAMED[:1]}, None, None),
        ({**CONFIG, "chat_template": [5, {"name": ["default"]}]}, None, None),
        (CONFIG, "", None),
        (CONFIG, None, {"chat_template": None}),
    ],
)
def test_no_template_is_a_note(
    tmp_path: Path, config: object, jinja: str | None, template_json: object
) -> None:
    """Templates that are empty or not the default are as good as none, which the user should know."""
    directory = write(tmp_path, small(), config, jinja, chat_template=template_json)
    keys, notes = made(directory)
    assert "chat_template" not in keys
    assert notes == [NO_TEMPLATE.format(directory)]


def test_a_template_without_tokenizer_config(tmp_path: Path) -> None:
    """The template file counts also where config.json alone names the tokens."""
    directory = write(tmp_path, small(), None, config={"eos_token_id": 7})
    keys, notes = made(directory)
    assert keys["chat_template"] == TEMPLATE
    assert notes == []


def test_a_processor_s_template(tmp_path: Path) -> None:
    """chat_template.json, which older releases of vision models have, is read too."""
    keys, _ = made(write(tmp_path, small(), CONFIG, None, chat_template={"chat_template": "{{ x }}"}))
    assert keys["chat_template"] == "{{ x }}"


@pytest.mark.parametrize("template", [[{"name": "default", "template": 5}], "\ud800", ["default"], {"a": 1}])
def test_a_template_that_is_no_text(tmp_path: Path, template: object) -> None:
    """A template of another type is refused or counts as none; it does not break the writing later."""
    directory = write(tmp_path, small(), {**CONFIG, "chat_template": template}, None)
    if isinstance(template, dict) or template == ["default"]:
        assert made(directory)[1] == [NO_TEMPLATE.format(directory)]
    else:
        assert f"{directory} cannot be read: the chat template is no text." in refusal(directory)


def split(**changes: object) -> list[dict[str, Any]]:
    return [{**small()["pre_tokenizer"]["pretokenizers"][0], **changes}]


def byte_level(**changes: object) -> list[dict[str, Any]]:
    return [{**small()["pre_tokenizer"]["pretokenizers"][1], **changes}]


GPT_2 = r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"
SAMPLE = "HelloWorld's  42000 it's\t\n\n x=[y];//é\r\n  ÀB don't 12345 !?\n"


@pytest.mark.parametrize(
    ("steps", "same"),
    [
        (split() + byte_level(), True),
        (split() + byte_level(trim_offsets=False), True),
        (split(invert=True) + byte_level(), True),
        (split(behavior="Removed", invert=True) + byte_level(), True),
        (split(behavior="Removed") + byte_level(), False),
        (split(behavior="Contiguous") + byte_level(), False),
        (split(pattern={"Regex": GPT_2}) + byte_level(), False),
        (split(pattern={"Regex": O200K.replace("{1,3}", "{1,2}")}) + byte_level(), False),
        (split(pattern={"String": " "}) + byte_level(), False),
        (split() + byte_level(use_regex=True), False),
        (split() + byte_level(add_prefix_space=True), False),
        ([*split(), {"type": "Digits", "individual_digits": True}, *byte_level()], False),
        (split(pattern={"Regex": GPT_2}) + split() + byte_level(), False),
        (split(), False),
        (byte_level(use_regex=True), False),
        (byte_level(), False),
        (byte_level() + split(), False),
        ([], False),
    ],
)
def test_only_one_way_of_splitting(tmp_path: Path, steps: list[dict[str, Any]], same: bool) -> None:
    """What Hugging Face's tokenizers split in the same way is converted; what they split otherwise is not."""
    tokenizer = small()
    expected = Tokenizer.from_str(json.dumps(tokenizer)).pre_tokenizer.pre_tokenize_str(SAMPLE)
    tokenizer["pre_tokenizer"]["pretokenizers"] = steps
    pieces = Tokenizer.from_str(json.dumps(tokenizer)).pre_tokenizer.pre_tokenize_str(SAMPLE)
    assert ([text for text, _ in pieces] == [text for text, _ in expected]) == same
    directory = write(tmp_path, tokenizer)
    if same:
        assert made(directory)[0]["ggml.pre"] == "minimax-m2"
    else:
        message = refusal(directory)
        assert str(directory / "tokenizer.json") in message
        assert "splits text in another way" in message


def word_piece(tokenizer: dict[str, Any]) -> None:
    tokenizer["model"] = {"type": "WordPiece", "vocab": {"a": 0}, "unk_token": "a"}


def unigram(tokenizer: dict[str, Any]) -> None:
    tokenizer["model"] = {"type": "Unigram", "vocab": [["a", -1.0]], "unk_id": 0}


def in_model(**changes: object) -> Callable[[dict[str, Any]], None]:
    return lambda tokenizer: tokenizer["model"].update(changes)


def add(*tokens: object) -> Callable[[dict[str, Any]], None]:
    return lambda tokenizer: tokenizer["added_tokens"].extend(tokens)


def vocab(**tokens: object) -> Callable[[dict[str, Any]], None]:
    return lambda tokenizer: tokenizer["model"]["vocab"].update(tokens)


def top(**changes: object) -> Callable[[dict[str, Any]], None]:
    return lambda tokenizer: tokenizer.update(changes)


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (word_piece, "is of type WordPiece, not byte-level BPE."),
        (unigram, "is of type Unigram, not byte-level BPE."),
        (in_model(byte_fallback=True), "is of type BPE with byte_fallback, not byte-level BPE."),
        (in_model(type=None), "is of type None, not byte-level BPE."),
        (top(model=None), "has no 'model' that is a dict."),
        (in_model(vocab=["a"]), "has no 'vocab' that is a dict."),
        (vocab(x=12), "gives the token 'x' the id 12; the model has 12 ids."),
        (vocab(x=-1), "gives the token 'x' the id -1; the model has 12 ids."),
        (vocab(x="10"), "gives the token 'x' the id '10'"),
        (vocab(x=10.0), "gives the token 'x' the id 10.0"),
        (vocab(x=True), "gives the token 'x' the id True"),
        (vocab(x=3), "gives both 'ab' and 'x' the id 3."),
        (vocab(**{"\ud800": 10}), r"gives the token '\ud800' the id 10"),
        (add(added(12, "x", special=True)), "gives the token 'x' the id 12; the model has 12 ids."),
        (add(added(7, "x", special=True)), "gives both '[e~[' and 'x' the id 7."),
        (add(added(10, "ab", special=True)), "gives the token 'ab' more than one id."),
        (add(added(11, "[PAD10]", special=False)), "gives the token '[PAD10]' more than one id."),
        (add(added(10, "x\udfff", special=True)), r"gives the token 'x\udfff' the id 10"),
        (add({"id": 10}), "gives the token None the id 10"),
        (add("x"), "lists 'x' among added_tokens."),
        (top(added_tokens={}), "has no 'added_tokens' that is a list."),
        (top(pre_tokenizer=None), "has no 'pre_tokenizer' that is a dict."),
        (top(pre_tokenizer=byte_level(use_regex=True)[0]), "splits text in another way"),
        (top(pre_tokenizer={"type": "Sequence", "pretokenizers": None}), "splits text in another way"),
        (top(pre_tokenizer={"type": "Sequence", "pretokenizers": [None, 5]}), "splits text in another way"),
        (
            top(pre_tokenizer={"pretokenizers": split(type="Other") + byte_level()}),
            "splits text in another way",
        ),
        (in_model(merges=[]), "has no merges."),
        (in_model(merges=None), "has no 'merges' that is a list."),
        (in_model(merges={"a": "b"}), "has no 'merges' that is a list."),
        (in_model(merges=["a b", 5]), "merges 5, which is no pair of its tokens."),
        (in_model(merges=["a b", ["a", "b"], ["a", 5]]), "merges ['a', 5], which is no pair of its tokens."),
        (in_model(merges=["ab"]), "merges 'ab', which"),
        (in_model(merges=["a b ab"]), "merges 'a b ab', which"),
        (in_model(merges=[["a", "b", "ab"]]), "merges ['a', 'b', 'ab'], which"),
        (in_model(merges=[["a", "c"]]), "merges ['a', 'c'], which"),
        (in_model(merges=["a c"]), "merges 'a c', which"),
        (in_model(vocab={"a b": 0, "c": 1}, merges=[["a b", "c"]]), "merges ['a b', 'c'], which"),
    ],
)
def test_a_tokenizer_that_is_no_such(
    tmp_path: Path, change: Callable[[dict[str, Any]], None], said: str
) -> None:
    """Another kind of tokenizer, ids that cannot be, and broken merges: the file and the place are named."""
    tokenizer = small()
    change(tokenizer)
    message = refusal(write(tmp_path, tokenizer))
    assert str(tmp_path / "tokenizer.json") in message
    assert said in message


@pytest.mark.parametrize("content", [b"", b'{"model":', b"[]", b"\xff", b"[" * 100_000])
def test_a_broken_tokenizer_json(tmp_path: Path, content: bytes) -> None:
    """A file that is cut short or no JSON object is named."""
    write(tmp_path, small())
    (tmp_path / "tokenizer.json").write_bytes(content)
    assert str(tmp_path / "tokenizer.json") in refusal(tmp_path)


@pytest.mark.parametrize("name", ["tokenizer_config.json", "chat_template.json", "chat_template.jinja"])
@pytest.mark.parametrize("content", [b'{"eos_token":', b"[1]", b"\xff\xfe", b"[" * 100_000])
def test_a_broken_file_beside_it(tmp_path: Path, name: str, content: bytes) -> None:
    """The other files of the tokenizer are named by their directory when one of them is broken."""
    write(tmp_path, small(), jinja=None)
    (tmp_path / name).write_bytes(content)
    if name.endswith("jinja") and content[0] < 128:  # any text is a template
        assert made(tmp_path)[0]["chat_template"] == content.decode()
    else:
        assert f"The tokenizer files in {tmp_path} cannot be read: " in refusal(tmp_path)


@pytest.mark.parametrize(
    "config", [None, {}, {"eos_token": None}, {"eos_token": "absent"}, {"eos_token": "a"}, {"eos_token": 7}]
)
def test_no_token_ends_a_turn(tmp_path: Path, config: object) -> None:
    """Without an end token the model would never stop; the file that should name it is said."""
    message = refusal(write(tmp_path, small(), config, config={"eos_token_id": None}))
    assert f"No token of {tmp_path} ends a turn: tokenizer_config.json" in message


JSON = st.recursive(
    st.none()
    | st.booleans()
    | st.integers(-2, SIZE)
    | st.floats()
    | st.sampled_from(["a", "ab", "[e~[", "default", "BPE", "\ud800", "", "a b"]),
    lambda inner: (
        st.lists(inner, max_size=3)
        | st.dictionaries(
            st.sampled_from(["a", "type", "content", "id", "name", "template"]), inner, max_size=3
        )
    ),
    max_leaves=6,
)


def mutate(document: Any, data: st.DataObject) -> Any:
    """Replace, drop or add something at a random place."""
    document = copy.deepcopy(document)
    place: Any = document
    while True:
        keys = list(place) if isinstance(place, dict) else list(range(len(place)))
        if not keys:
            break
        key = data.draw(st.sampled_from(keys))
        if isinstance(place[key], (dict, list)) and data.draw(st.integers(0, 3)):
            place = place[key]
            continue
        if data.draw(st.integers(0, 3)):
            place[key] = data.draw(JSON)
        else:
            del place[key]
        return document
    place.append(data.draw(JSON)) if isinstance(place, list) else place.update(x=data.draw(JSON))
    return document


POST_PROCESSORS = [
    None,
    {
        "type": "TemplateProcessing",
        "single": [
            {"SpecialToken": {"id": "]~!b[", "type_id": 0}},
            {"Sequence": {"id": "A", "type_id": 0}},
            {"SpecialToken": {"id": "]!p~[", "type_id": 0}},
        ],
        "pair": [{"Sequence": {"id": "A", "type_id": 0}}, {"Sequence": {"id": "B", "type_id": 1}}],
        "special_tokens": {},
    },
    {"type": "RobertaProcessing", "sep": ["[e~[", 7], "cls": ["]~!b[", 6]},
]


@settings(max_examples=400)
@given(st.data())
def test_no_change_ends_in_another_error(
    tmp_path_factory: pytest.TempPathFactory, data: st.DataObject
) -> None:
    """Whatever stands in the files, llama.cpp can read what is written, or a ModelError says why not."""
    directory = tmp_path_factory.getbasetemp() / "mutated"
    tokenizer, config = small(), {**CONFIG, "pad_token": {"content": "]!p~["}, "chat_template": NAMED}
    tokenizer["post_processor"] = data.draw(st.sampled_from(POST_PROCESSORS))
    model_config: Any = {"bos_token_id": 6, "text_config": {"eos_token_id": 7}}
    for _ in range(data.draw(st.integers(1, 3))):
        which = data.draw(st.integers(0, 5))
        if which == 0:
            config = mutate(config, data)
        elif which == 1:
            model_config = mutate(model_config, data)
        else:
            tokenizer = mutate(tokenizer, data)
    write(directory, tokenizer, config, None, config=model_config)
    try:
        keys, notes = made(directory)
    except ModelError as error:
        said = error.message
    else:
        said = str(directory)
        check(keys, notes)
    assert str(directory) in said


def check(keys: dict[str, Any], notes: list[str]) -> None:
    """What llama.cpp asserts, and what it takes on trust."""
    assert len(keys["ggml.tokens"]) == len(set(keys["ggml.tokens"])) == len(keys["ggml.token_type"]) == SIZE
    assert all(set(merge.split(" ")) < set(keys["ggml.tokens"]) for merge in keys["ggml.merges"])
    assert 0 <= keys["ggml.eos_token_id"] < SIZE
    assert bool(notes) == ("chat_template" not in keys)
