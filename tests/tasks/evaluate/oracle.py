"""Answers any question of the tasks with known answers, from the text of its prompt alone."""

from __future__ import annotations

import re
from collections import Counter

_ORDINALS = ("first", "second", "third", "fourth")


def oracle(prompt_text: str) -> str:
    """The right answer, read with regular expressions. Raises ValueError if no question is known."""
    for answer in (_niah, _tracing, _common_words, _frequent_words, _coreference):
        found = answer(prompt_text)
        if found is not None:
            return found
    raise ValueError("no known question")


def _last(pattern: str, text: str) -> re.Match[str] | None:
    """The question stands last, after examples and whatever the haystack holds."""
    matches = list(re.finditer(pattern, text))
    return matches[-1] if matches else None


def _niah(text: str) -> str | None:
    question = _last(
        r"What (?:is|are all) the special magic \w+ for ([\w, -]+) mentioned in the provided", text
    )
    if question is None:
        return None
    keys = re.split(r", and |, ", question[1])
    needles = re.findall(r"One of the special magic \w+ for ([\w-]+) is: ([\w-]+)\.", text)
    return ", ".join(value for key, value in needles if key in keys)


def _tracing(text: str) -> str | None:
    question = _last(r"Find all variables that are assigned the value (\d+) in the text", text)
    if question is None:
        return None
    known = {question[1]}
    names = []
    for name, value in re.findall(r"VAR ([A-Z]+) = (?:VAR )?([A-Z]+|\d+)", text):
        if value in known:
            known.add(name)
            names.append(name)
    return " ".join(names)


def _common_words(text: str) -> str | None:
    if _last(r"What are the 10 most common words in the above list", text) is None:
        return None
    words = re.findall(r"\d+\. ([a-z-]+)", text[text.rindex("Below is a numbered list") :])
    return " ".join(word for word, _ in Counter(words).most_common(10))


def _frequent_words(text: str) -> str | None:
    question = _last(r"What are the three most frequently appeared words in the above coded text", text)
    if question is None:
        return None
    start = text.rindex("most frequently appeared coded words. ")
    words = re.findall(r"(?<!\S)[a-z]{6}(?!\S)", text[start : text.rindex("\nQuestion:")])
    return " ".join(word for word, _ in Counter(words).most_common(3))


def _coreference(text: str) -> str | None:
    question = _last(r"What is the code of the (\w+) ([\w ]+) about the (\w+)\?", text)
    if question is None:
        return None
    request = rf"User: Write a {question[2]} about the {question[3]}\.\n\nAssistant: .*? Its code is (\w+)\."
    return re.findall(request, text)[_ORDINALS.index(question[1])]
