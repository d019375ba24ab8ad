"""How text is cut before byte-pair merging: one pattern for each `tokenizer.ggml.pre`.

Merges never cross the edges of these pieces, so the pattern decides ids as much as the merges do.
The patterns are the published ones, in the Unicode form that tiktoken's engine understands
(llama.cpp spells them out differently). Tokenizers that split in several stages are folded into
one pattern that gives the same pieces; the tests compare each with its stages in Hugging Face's
tokenizers. Every pattern matches every character, because tiktoken drops what is not matched.

Names that llama.cpp splits alike (llama-vocab.cpp, `tokenizer_pre ==`) are split alike here. Left
out are those of embedding models, of SentencePiece-like BPE (gemma4) and of old models whose
several stages nobody folded (falcon, bloom, viking, chameleon); llama.cpp tokenizes for them.
"""

from __future__ import annotations

import re

_CONTRACTION = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)"
_BLANKS = r"\s*[\r\n]+|\s+(?!\S)|\s+"

# ByteLevel with `use_regex`: GPT-2's own pattern.
_GPT_2 = r"'(?:[sdmt]|ll|ve|re)| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"

# Digits(individual_digits), then GPT-2's pattern. Blanks before a digit end a piece of the first
# stage, so they stay together instead of leaving the last one to what follows.
_DIGITS_GPT_2 = r"'(?:[sdmt]|ll|ve|re)| ?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+|\s+(?=\p{N})|\s+(?!\S)|\s+"

_LLAMA_3 = (
    _CONTRACTION + r"|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|" + _BLANKS
)  # fmt: skip
_QWEN_2 = _CONTRACTION + r"|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|" + _BLANKS
_QWEN_35 = (
    _CONTRACTION
    + r"|[^\r\n\p{L}\p{N}]?[\p{L}\p{M}]+|\p{N}| ?[^\s\p{L}\p{M}\p{N}]+[\r\n]*|"
    + _BLANKS
)  # fmt: skip
_SEED_CODER = _CONTRACTION + r"|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}\r\n]+|" + _BLANKS
_BAILING = (
    r"'(?i:[sdmt]|ll|ve|re)|[^\r\n\p{L}\p{N}]?+\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]++[\r\n]*"
    r"|\s*[\r\n]|\s+(?!\S)|\s+"
)

# Words whose capitals stand in front; o200k adds contractions and numbers of three digits.
_UPPER, _LOWER = r"\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}", r"\p{Ll}\p{Lm}\p{Lo}\p{M}"
_WORD = (
    rf"[^\r\n\p{{L}}\p{{N}}]?[{_UPPER}]*[{_LOWER}]+",
    rf"[^\r\n\p{{L}}\p{{N}}]?[{_UPPER}]+[{_LOWER}]*",
)
_O200K = (
    f"{_WORD[0]}{_CONTRACTION}?|{_WORD[1]}{_CONTRACTION}?"
    r"|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n/]*|" + _BLANKS
)  # fmt: skip
_TEKKEN = f"{_WORD[0]}|{_WORD[1]}" + r"|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n/]*|" + _BLANKS
_KIMI_K2 = (
    r"\p{Han}+"
    rf"|[^\r\n\p{{L}}\p{{N}}]?[{_UPPER}&&[^\p{{Han}}]]*[{_LOWER}&&[^\p{{Han}}]]+{_CONTRACTION}?"
    rf"|[^\r\n\p{{L}}\p{{N}}]?[{_UPPER}&&[^\p{{Han}}]]+[{_LOWER}&&[^\p{{Han}}]]*{_CONTRACTION}?"
    r"|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|" + _BLANKS
)

# DeepSeek-V3: \p{N}{1,3}, then runs of kanji and kana (J), then the rest, whose pieces cannot
# reach over the edges of the first two. Inside a run of J the third stage splits again.
_J = r"\u3040-\u30ff\u4e00-\u9fa5"
_DEEPSEEK_V3 = (
    r"\p{N}{1,3}"
    rf"|[{_J}--[\p{{L}}\p{{P}}\p{{S}}]]?[[\p{{L}}\p{{M}}]&&[{_J}]]+"
    rf"|[[\p{{P}}\p{{S}}]&&[{_J}]]+"
    rf"|(?:[{_J}--[\p{{L}}\p{{M}}\p{{P}}\p{{S}}]](?![[\p{{L}}\p{{M}}]&&[{_J}]]))+"
    r"|[!-/:-@\[-`{-~][A-Za-z]+"
    rf"|[^\r\n\p{{L}}\p{{P}}\p{{S}}\p{{N}}{_J}]?[\p{{L}}\p{{M}}--[{_J}]]+"
    rf"| ?[\p{{P}}\p{{S}}--[{_J}]]+[\r\n]*"
    rf"|\s*[\r\n]+|\s+(?=[\p{{N}}{_J}])|\s+(?!\S)|\s+"
    # What no stage matches (controls, unassigned) stays one piece, up to what begins a word.
    rf"|(?:[^\s\p{{L}}\p{{M}}\p{{N}}\p{{P}}\p{{S}}{_J}](?![\p{{L}}\p{{M}}--[{_J}]]))+"
)

# DeepSeek's first tokenizers isolate, in turn: line ends; words and marks, each with one blank in
# front; runs of E (most scripts of the east, also inside words and marks); single digits. What is
# left over stays together. So blanks come in two kinds: those outside of E (W) and those in it (V).
_E = r"\u0800-\u9fa5\uac00-\ud7ff"
_W = rf"[\s--[\r\n{_E}]]"
_V = rf"[\s&&[{_E}--\u3000]]"
_DEEPSEEK_CODER = (
    r"[\r\n]|\p{N}"
    rf"|{_W}?[\p{{L}}--[{_E}]]+|[\s&&[{_E}]]?[\p{{L}}&&[{_E}]]+"
    rf"|{_W}?[\p{{P}}--[{_E}]]+|[\s&&[{_E}]]?[\p{{P}}&&[{_E}]]+"
    r"|\s(?=[\p{L}\p{P}])"
    rf"|(?:[{_E}--[\s\p{{L}}\p{{N}}\p{{P}}]]|[\s&&[{_E}]](?![\p{{L}}\p{{P}}]))+"
    rf"|(?:[^\s\p{{L}}\p{{N}}\p{{P}}{_E}]|{_W}(?![\p{{L}}\p{{P}}]))+"
)

# The LLM's lists its letters and marks. Its marks hold the Latin letters, which cuts words, and
# U+3000, which is a blank too: the word's in front of a word, else a mark. Blanks at the end of
# what words and marks leave over stand alone; blanks further in (_OPEN) belong to what surrounds them.
# Looking past 8 changes between W and V would take quadratic time, as the original `\s+$` does.
_LATIN = r"A-Za-z\uff21-\uff3a\uff41-\uff5a"
_CASED = (
    r"A-Za-z\u00b5\u00c0-\u00d6\u00d8-\u00f6\u00f8-\u01ba\u01bc-\u01bf\u01c4-\u0293\u0295-\u02af"
    r"\u0370-\u0373\u0376\u0377\u037b-\u037d\u037f\u0386\u0388-\u038a\u038c\u038e-\u03a1\u03a3-\u03f5"
    r"\u03f7-\u0481\u048a-\u052f\u0531-\u0556\u10a0-\u10c5\u13a0-\u13f5\u13f8-\u13fd\u1c90-\u1cba"
    r"\u1cbd-\u1cbf\u1d00-\u1d2b\u1d6b-\u1d77\u1d79-\u1d9a\u1e00-\u1f15\u1f18-\u1f1d\u1f20-\u1f45"
    r"\u1f48-\u1f4d\u1f50-\u1f57\u1f59\u1f5b\u1f5d\u1f5f-\u1f7d\u1f80-\u1fb4\u1fb6-\u1fbc\u1fbe"
    r"\u1fc2-\u1fc4\u1fc6-\u1fcc\u1fd0-\u1fd3\u1fd6-\u1fdb\u1fe0-\u1fec\u1ff2-\u1ff4\u1ff6-\u1ffc\u2102"
    r"\u2107\u210a-\u2113\u2115\u2119-\u211d\u2124\u2126\u2128\u212a-\u212d\u212f-\u2134\u2139"
    r"\u213c-\u213f\u2145-\u2149\u214e\u2183\u2184\u2c00-\u2c7b\u2c7e-\u2ce4\u2ceb-\u2cee\u2cf2\u2cf3"
    r"\ua640-\ua66d\ua680-\ua69b\ua722-\ua76f\ua771-\ua787\ua78b-\ua78e\uab70-\uabbf\ufb00-\ufb06"
    r"\ufb13-\ufb17\uff21-\uff3a\uff41-\uff5a\U00010400-\U0001044f\U000104b0-\U000104d3"
    r"\U000104d8-\U000104fb\U00010c80-\U00010cb2\U00010cc0-\U00010cf2\U000118a0-\U000118df"
    r"\U0001e900-\U0001e943"
)
_MARK = r"!-/:-@\[-`{-~\uff01-\uff0f\uff1a-\uff20\uff3b-\uff40\uff5b-\uff5e"
_MARK_E = r"\u2018-\u201f\u3001\u3002"
_U3000 = rf"\u3000(?![{_CASED}])"
_OPEN = rf"(?=(?>(?:{_W}++|{_V}++){{0,8}})[^\s{_CASED}{_MARK}{_MARK_E}])"
_SHUT = rf"(?=[\r\n]|\u3000[{_CASED}]|(?![\s\S]))"
_DEEPSEEK_LLM = (
    r"[\r\n]|\p{N}"
    rf"|{_W}?[{_LATIN}]+|{_W}?[{_CASED}--[{_E}{_LATIN}]]+|{_V}?[[{_CASED}]&&[{_E}]]+|\s(?=[{_CASED}])"
    rf"|{_W}?[{_MARK}]+|{_V}?(?:[{_MARK_E}]|\u3000++(?=[{_MARK}{_MARK_E}]))+|{_V}?(?:{_U3000})+"
    rf"|{_W}(?=[{_MARK_E}]|{_U3000})|{_V}(?=[{_MARK}])"
    rf"|(?:[{_E}--[\s\p{{N}}{_CASED}{_MARK_E}]]|{_OPEN}{_V}++)+"
    rf"|(?:[^\s\p{{N}}{_CASED}{_MARK}{_E}]|{_OPEN}{_W}++)+"
    rf"|{_W}++{_SHUT}|{_W}+(?=[\s--\u3000])|{_V}++{_SHUT}|{_V}+(?=[\s--\u3000])"
)

_LLAMA_3_WITH_BOS = (
    "llama3", "llama-v3", "llama-bpe", "falcon3", "falcon-h1", "pixtral", "midm-2.0", "lfm2",
)  # fmt: skip
_FAMILIES: tuple[tuple[str, tuple[str, ...]], ...] = (
    (_GPT_2, ("gpt-2", "phi-2", "mpt", "olmo", "jais", "trillion", "granite-docling", "exaone4", "mellum",
              "gigachat", "a.x-4.0")),
    (_DIGITS_GPT_2, ("smollm", "starcoder", "refact", "command-r", "codeshell", "exaone", "minerva-7b",
                     "mellum2")),
    (_LLAMA_3, (*_LLAMA_3_WITH_BOS, "dbrx", "smaug-bpe", "chatglm-bpe", "glm4", "glm5")),
    (_QWEN_2, ("qwen2", "deepseek-r1-qwen", "kormo", "megrez", "stablelm2", "hunyuan", "solar-open",
               "grok-2")),
    (_QWEN_35, ("qwen35",)),
    (_O200K, ("gpt-4o", "minimax-m2", "llama4", "kanana2", "talkie")),
    (_TEKKEN, ("tekken",)),
    (_KIMI_K2, ("kimi-k2",)),
    (_SEED_CODER, ("seed-coder",)),
    (_BAILING, ("bailingmoe", "bailingmoe2", "llada-moe")),
    (_DEEPSEEK_V3, ("deepseek-v3", "hunyuan-dense", "joyai-llm", "hy_v4")),
    (_DEEPSEEK_CODER, ("deepseek-coder",)),
    (_DEEPSEEK_LLM, ("deepseek-llm",)),
)  # fmt: skip

# `tokenizer.ggml.pre` → pattern.
PATTERNS: dict[str, str] = {name: pattern for pattern, names in _FAMILIES for name in names}

# Where llama.cpp begins prompts with BOS unless `tokenizer.ggml.add_bos_token` says otherwise.
BOS_BY_DEFAULT = frozenset((*_LLAMA_3_WITH_BOS, "tekken"))


def grouped(pattern: str) -> str:
    """`pattern` with its first alternatives in a group, which changes nothing but the speed.

    tiktoken's engine tries an alternation part by part if any part looks around or is possessive. A group
    of parts that do not is searched as one: encoding is a third faster.
    """
    alternatives = _alternatives(pattern)
    plain = next((i for i, part in enumerate(alternatives) if _FANCY.search(part)), len(alternatives))
    if not 1 < plain < len(alternatives):
        return pattern
    return "|".join([f"(?:{'|'.join(alternatives[:plain])})", *alternatives[plain:]])


# Lookaround, atomic groups, possessive quantifiers.
_FANCY = re.compile(r"\(\?<?[=!>]|[+*?]\+|\{\d[\d,]*\}\+")


def _alternatives(pattern: str) -> list[str]:
    """The parts of `pattern` between the `|` that stand in no group and no class."""
    parts, start, depth, i = [], 0, 0, 0
    in_class = 0
    while i < len(pattern):
        letter = pattern[i]
        if letter == "\\":
            i += 1
        elif letter == "[":
            in_class += 1
        elif letter == "]":
            in_class -= 1
        elif not in_class and letter in "()":
            depth += 1 if letter == "(" else -1
        elif letter == "|" and not in_class and not depth:
            parts.append(pattern[start:i])
            start = i + 1
        i += 1
    return [*parts, pattern[start:]]
