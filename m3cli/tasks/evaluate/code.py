"""Tasks about code: questions about a corpus of source files that its syntax trees answer.

All of them have the same haystacks, of the corpus as `m3 ask` shows it, and their answers are in the text:
no answer is in its question, none has a second one in the haystack, and what is easily guessed is not asked.
"""

from __future__ import annotations

import re
from collections import Counter
from dataclasses import dataclass
from functools import partial
from hashlib import blake2b
from pathlib import PurePosixPath
from typing import TYPE_CHECKING, Literal

from m3cli.tasks.context import INSTRUCTIONS
from m3cli.tasks.evaluate.code_haystack import code_corpus, qualified
from m3cli.tasks.evaluate.trial import Group, Question, TooShortError, Trial

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from m3cli.corpus.facts import Call, Constant, Function
    from m3cli.tasks.evaluate.code_haystack import CodeFile, CodeHaystack, Known
    from m3cli.tasks.evaluate.trial import Material, Measure, Scope

MAX_TOKENS = 48
_SHORTEST, _LONGEST = 2, 40  # characters of an answer
_LONGEST_PATH = 80
_MOST_PARAMETERS = 6
_CAPITALS = re.compile(r"\b_*[A-Z][A-Z0-9_]+\b")
# Strings and comments; the strings are there so that no mark of a comment is found in one.
_STRING = r"""\"{3}[\s\S]*?\"{3}|'{3}[\s\S]*?'{3}|"(?:\\.|[^"\\\n])*"|'(?:\\.|[^'\\\n])*'"""
_REMARK_OF_PYTHON = re.compile(rf"{_STRING}|#.*")
_REMARK = re.compile(rf"{_STRING}|`[^`\n]*`|//.*|/\*[\s\S]*?\*/")
_THEMSELVES = frozenset(("self", "cls", "this", "Self"))
# Defaults that the name of a parameter, as of an encoding, leads to.
_USUAL = frozenset(
    (
        *("utf-8", "utf8", "utf-8-sig", "ascii", "latin-1"),
        *("strict", "replace", "ignore", "rb", "wb", "none"),
    )
)
_SHORTEST_STEM = 3  # a file's stem of fewer characters gives nothing away

_DEFAULT = (
    "What is the default value of the parameter `{parameter}` of the {symbol} in {path}? "
    "Answer with the value alone."
)
_FILE = "In which file is the {symbol} defined? Answer with the path alone."
_CONSTANT = "What is the value of the constant `{name}` in {path}? Answer with the value alone."
_CALLER = (
    "Which function or method calls the {symbol} of {path}? Answer with the bare name of the caller alone, "
    "without a class."
)
_SIGNATURE = "What are the parameters of the {symbol} in {path}? Answer with their names alone."
_LINE = "At which line does the {symbol} begin in {path}? Answer with the number of the line alone."
_HOP = (
    "The {symbol} in {path} returns a constant. What is the value of that constant? "
    "Answer with the value alone."
)
_HOP_BY_USE = (
    "The {symbol} in {path} uses one constant with a name in capitals. What is the value of that constant? "
    "Answer with the value alone."
)
# Questions may take as many tokens as the longest of these, whatever is asked, so that all haystacks agree.
_SYMBOL = "method `DocumentConverter.convert_all_pages`"
_PATH = "package/subpackage/another/module_name.py"
_PROBES = tuple(
    text.format(symbol=_SYMBOL, path=_PATH, name="Converter.MAXIMUM_PAGES", parameter="maximum_pages")
    for text in (_DEFAULT, _FILE, _CONSTANT, _CALLER, _SIGNATURE, _LINE, _HOP, _HOP_BY_USE)
)


@dataclass(frozen=True, slots=True)
class _Candidate:
    """A question that could be asked. `shown` are words with their rows; the first has the depth.

    `is_line` says that the answer is the number of a line, which a citation may give.
    """

    text: str
    answers: tuple[str, ...]
    file: CodeFile
    shown: tuple[tuple[str, int], ...]
    is_line: bool = False


def _defaults(known: Known) -> Iterator[_Candidate]:
    for file, rows, function in known.clear_functions():
        for parameter in function.parameters:
            is_asked = parameter.default and parameter.default.casefold() not in _USUAL
            if is_asked and parameter.name and parameter.row < rows:
                text = _DEFAULT.format(parameter=parameter.name, symbol=_symbol(function), path=file.path)
                yield _Candidate(text, (parameter.default,), file, ((parameter.default, parameter.row),))


def _files(known: Known) -> Iterator[_Candidate]:
    defined = [(file, f"type `{name}`", name, row) for file, name, row in known.types]
    for file, _, function in known.functions:
        if function.name and not (function.nested or function.owner):
            defined.append((file, _symbol(function), function.name, function.row))
    # The path of one file may end with that of another: a short one would be found in the longer.
    ends = Counter(
        "/".join(parts[start:])
        for parts in (path.split("/") for path in {file.path for file, _ in known.files})
        for start in range(len(parts))
    )
    for file, symbol, name, row in defined:
        stem, name_folded = PurePosixPath(file.path).stem.casefold(), name.casefold()
        guessed = name_folded in file.path.casefold() or (
            len(stem) >= _SHORTEST_STEM and stem.strip("_") in name_folded
        )
        if known.names[name] == 1 and name not in known.loose and ends[file.path] == 1 and not guessed:
            yield _Candidate(_FILE.format(symbol=symbol), (file.path,), file, ((name, row),))


def _constants(known: Known) -> Iterator[_Candidate]:
    for file, _, constant in known.constants:
        name = qualified(constant)
        if constant.value and known.qualified[file.path, name] == 1:
            text = _CONSTANT.format(name=name, path=file.path)
            yield _Candidate(text, (constant.value,), file, ((constant.value, constant.row),))


def _callers(known: Known) -> Iterator[_Candidate]:
    for file, _, function in known.clear_functions():
        name = function.name
        calls = known.calls.get(name, ())
        if known.names[name] != 1 or name in known.loose or known.calls_in_text[name] > 1 + len(calls):
            continue
        callers: dict[tuple[str, int], tuple[CodeFile, Call]] = {}
        for place, call in calls:
            itself = place is file and call.function >= 0
            if not (itself and file.functions[call.function] is function):
                callers.setdefault((place.path, call.function), (place, call))
        if len(callers) != 1:
            continue
        ((place, call),) = callers.values()
        if call.function < 0:
            continue
        caller = place.functions[call.function]
        # Names like `__init__` and `main` would be a fair guess.
        if not caller.name or caller.nested or caller.name.startswith("__") or caller.name == "main":
            continue
        if _is_meant(call, caller, place, function, file):
            text = _CALLER.format(symbol=_symbol(function), path=file.path)
            yield _Candidate(text, (caller.name,), place, ((name, call.row), (caller.name, caller.row)))


def _is_meant(call: Call, caller: Function, place: CodeFile, function: Function, file: CodeFile) -> bool:
    """Whether a call is surely one of this function, and not of a stranger of the same name."""
    if function.owner:
        own = place is file and caller.owner == function.owner
        return own and (call.receiver in _THEMSELVES or call.receiver == function.owner)
    if place is file:
        return not call.receiver
    return _mentions(place, file) and (not call.receiver or call.receiver.endswith(_stem(file)))


def _mentions(place: CodeFile, file: CodeFile) -> bool:
    """Whether a file names another one, as it has to where it imports what is defined there."""
    return re.search(rf"\b{re.escape(_stem(file))}\b", place.text) is not None


def _stem(file: CodeFile) -> str:
    return PurePosixPath(file.path).stem


def _signatures(known: Known) -> Iterator[_Candidate]:
    for file, rows, function in known.clear_functions():
        # Special methods of Python have the parameters that the language says.
        if function.name.startswith("__") and function.name != "__init__":
            continue
        shown = tuple((parameter.name, parameter.row) for parameter in function.parameters)
        if 2 <= len(shown) <= _MOST_PARAMETERS and all(name and row < rows for name, row in shown):
            text = _SIGNATURE.format(symbol=_symbol(function), path=file.path)
            yield _Candidate(text, tuple(name for name, _ in shown), file, shown)


def _lines(known: Known) -> Iterator[_Candidate]:
    for file, _, function in known.clear_functions():
        text = _LINE.format(symbol=_symbol(function), path=file.path)
        shown = ((function.name, function.row),)
        yield _Candidate(text, (str(function.row + 1),), file, shown, is_line=True)


def _hops(known: Known) -> Iterator[_Candidate]:
    for file, rows, function in known.clear_functions():
        if function.end >= rows:
            continue
        body = "\n".join(file.lines[function.row : function.end + 1])
        if function.returns:
            form, found = _HOP, _returned(known, file, function, body)
        else:
            form, found = _HOP_BY_USE, _used(known, file, function, body)
        if found is None or not found[1].value:
            continue
        place, constant = found
        # The function says the value, too, where it is the constant's own name, or stands beside it.
        if constant.value.casefold() not in body.casefold():
            text = form.format(symbol=_symbol(function), path=file.path)
            yield _Candidate(text, (constant.value,), place, ((constant.value, constant.row),))


def _returned(
    known: Known, file: CodeFile, function: Function, body: str
) -> tuple[CodeFile, Constant] | None:
    """The constant that a function always returns: the file's own, or the only one of its name there is."""
    name = function.returns
    if len(re.findall(rf"\b{re.escape(name)}\b", body)) != 1:  # the function may set it, too
        return None
    # A value at the end needs no such word in some languages; then there may be none at all.
    returns = re.findall(r"\breturn\b([^;}\n]*)", _code(file, body))
    if len(returns) > 1 or any(name not in what for what in returns):
        return None
    whole = f"{function.owner}.{name}" if function.returns_own else name
    constant = known.constants_of.get((file.path, whole))
    if constant is not None:
        changes = rf"\b{re.escape(name)}\b[^=\n]*=(?!=)"
        is_set_once = not function.returns_own or len(re.findall(changes, file.text)) == 1
        return (file, constant) if is_set_once else None
    if function.returns_own or known.qualified[file.path, name]:
        return None
    found = known.constant_of.get(name)
    return found if found is not None and _mentions(file, found[0]) else None


def _used(known: Known, file: CodeFile, function: Function, body: str) -> tuple[CodeFile, Constant] | None:
    """The constant of the file that a function uses, if no other name in it is in capitals."""
    names = set(_CAPITALS.findall(body))
    if len(names) != 1:
        return None
    (name,) = names
    if {name, ""} & {parameter.name for parameter in function.parameters}:  # a pattern may hold any name
        return None
    constant = known.constants_of.get((file.path, name))
    code = _code(file, body)
    is_used = re.search(rf"(?<!\.)\b{name}\b(?!\s*=[^=])", code) is not None
    is_set = (
        re.search(rf"\b{name}\b\s*(?:[-+*/|&^]|:[^=\n]*)?=(?!=)|\b(?:for|as|lambda)\s+{name}\b", code)
        is not None
    )
    return (file, constant) if constant is not None and is_used and not is_set else None


def _code(file: CodeFile, text: str) -> str:
    """The text without strings and comments."""
    remark = _REMARK_OF_PYTHON if file.path.endswith((".py", ".pyi")) else _REMARK
    return remark.sub(" ", text)


class CodeTask:
    """A kind of question about code; `find` gives all that could be asked."""

    group: Group = "code"

    def __init__(
        self,
        material: Material,
        measure: Measure,
        scope: Scope,
        *,
        name: str,
        find: Callable[[Known], Iterator[_Candidate]],
    ) -> None:
        self.name = name
        self._find = find
        self._corpus = code_corpus(material, measure)
        self._measure = measure
        self._scope = scope

    def trials(self, length: int) -> Iterator[Trial]:
        """One trial with all questions.

        Raises TooShortError where the corpus, or the length, is too short.
        """
        probes = [Question("", f"\nQuestion: {text}", ()) for text in _PROBES]
        longest = max(self._measure.count([probe.text]) for probe in probes)
        haystack = self._corpus.haystack(self._measure.room(length, MAX_TOKENS, probes, INSTRUCTIONS))
        questions = self._questions(haystack, longest)
        if not questions:
            raise TooShortError(f"{haystack.tokens:,} tokens of these files hold nothing to ask about")
        yield Trial(
            self.name,
            self.group,
            length,
            MAX_TOKENS,
            questions,
            chunks=haystack.chunks,
            system=INSTRUCTIONS,
            nested=True,
        )

    def _questions(self, haystack: CodeHaystack, longest: int) -> tuple[Question, ...]:
        """So many of each row of depths as the scope says, or as there are; a hash chooses them.

        A longer haystack asks many of the same. No two have the same answer, but for paths, which nobody
        guesses.
        """
        scope = self._scope
        rows: list[list[tuple[str, _Candidate]]] = [[] for _ in range(scope.depths)]
        for candidate in self._find(haystack.known):
            depth = haystack.depth(candidate.file.place(candidate.shown[0][1]))
            key = blake2b(
                f"{scope.seed} {self.name} {candidate.text}".encode("utf-8", "surrogatepass"), digest_size=8
            ).hexdigest()
            rows[min(int(depth * scope.depths), scope.depths - 1)].append((key, candidate))
        questions: list[Question] = []
        answered: set[tuple[str, ...]] = set()
        for row in rows:
            asked = 0
            for key, candidate in sorted(row, key=lambda item: item[0]):
                if asked == scope.samples:
                    break
                is_path = candidate.answers == (candidate.file.path,)
                if candidate.answers in answered and not is_path:  # one lucky guess is one answer
                    continue
                question = self._asked(key, candidate, haystack, longest)
                if question is not None:
                    answered.add(candidate.answers)
                    questions.append(question)
                    asked += 1
        return tuple(questions)

    def _asked(
        self, key: str, candidate: _Candidate, haystack: CodeHaystack, longest: int
    ) -> Question | None:
        """The question with its depth; None if it is too long, or its answer does not do."""
        places = [candidate.file.place(row) for _, row in candidate.shown]
        if any(word not in place.text for (word, _), place in zip(candidate.shown, places, strict=True)):
            return None  # a line that was cut
        depth = haystack.depth(places[0], exact=True)
        scoring: Literal["words", "lines"] = "lines" if candidate.is_line else "words"
        text = f"\nQuestion: {candidate.text}"
        question = Question(key, text, candidate.answers, depth, scoring=scoring)
        most = _LONGEST_PATH if candidate.answers == (candidate.file.path,) else _LONGEST
        if not _is_sound(question, most) or self._measure.count([question.text]) > longest:
            return None
        return question


def _is_sound(question: Question, longest: int) -> bool:
    """Whether the answers are found in a reply that gives them, and not in one that repeats the question."""
    answers = question.answers
    return (
        all(
            _SHORTEST <= len(answer) <= longest and answer.isprintable() and answer == answer.strip()
            for answer in answers
        )
        and any(character.isalnum() for answer in answers for character in answer)
        and len({answer.casefold() for answer in answers}) == len(answers)
        and (len(answers) > 1 or answers[0].casefold() not in question.text.casefold())
        and question.score(question.text) == 0
        and question.score(", ".join(answers)) == 1
    )


def _symbol(function: Function) -> str:
    return f"{'method' if function.owner else 'function'} `{qualified(function)}`"


_FINDERS: dict[str, Callable[[Known], Iterator[_Candidate]]] = {
    "code_default": _defaults,
    "code_file": _files,
    "code_constant": _constants,
    "code_caller": _callers,
    "code_signature": _signatures,
    "code_line": _lines,
    "code_hop": _hops,
}
TASKS: dict[str, Callable[[Material, Measure, Scope], CodeTask]] = {
    name: partial(CodeTask, name=name, find=find) for name, find in _FINDERS.items()
}
