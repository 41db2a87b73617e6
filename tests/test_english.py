"""The English of the repo: wordings that a reader stumbles over are in no docstring, comment, message, help or page.

Each row of PATTERNS is a habit that this code once had, with what to write instead. RIGHT lists the few places where
the words are the best ones, by file and by the exact text around them.
"""

import ast
import io
import re
import tokenize
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.helpers import ROOT

# name -> (pattern, what to write)
PATTERNS = {
    'usual': (r'\busual\b', 'default, previous, saved, names: whichever it is'),
    'beside': (r'\bbeside\b', 'next to, besides, as well as'),
    'those of': (r'\b(those|that) of\b|\bof (which|whom)\b', 'repeat the noun'),
    'alone': (r'\balone\b', 'only, by itself'),
    'comment of': (r'\A#\s*of\b', 'a noun phrase, "hash of the weights"; or rename what it explains'),
    'is no': (r'(?<![Tt]here )\b(is|are|was|were) no\b(?! longer| more)', 'is not a'),
    'that is none': (
        r'\b(that|which) (is|are|has|have) none\b|\basked (?!for\b|to\b|by\b|whether\b|if\b)[a-z]+',
        'a malformed grid, the requested label',
    ),
    'goes on': (r'\b(goes|go|went|going|gone) on\b', 'resumes, continues'),
    'is said': (r'\b(is|are|was|were|be|been|being) (said|told)\b|\bsa(y|ys|id) so\b', 'prints, warns, raises'),
    'Of ...': (r'(\A#?\s*|[.:;] |\n\n\s*)Of (?!course)', 'subject, verb, object: "ODE only: tau2 is ignored"'),
    'in words': (
        r'\bin words\b|\banew\b|\b(comes?|came) about\b|\bby heart\b|\bmend(s|ed|ing)?\b',
        'as text, again, is made, memorised, fix',
    ),
}  # fmt: skip
BEGINS = re.compile(r'(What|How|Who|Whom|Whose)\b')  # no docstring begins so: name the thing
# names of older versions, whose users are sent to the new ones by name
RIGHT = {
    (file, 'beside') for file in ('training/experiment.py', 'tests/training/test_experiment.py', 'CHANGELOG.md')
} | {('CHANGELOG.md', text) for text in ('usual=', 'ranks.alone`')}
SKIPPED = {'tests/test_english.py'}
FOLDERS = 'settings runtime networks solvers data_loading training evaluation reports scripts launch'.split()
OTHERS = 'examples benchmarks docs tests'.split()
FILES = [
    path
    for folder, how in [(ROOT, 'glob'), *((ROOT / name, 'rglob') for name in [*FOLDERS, *OTHERS])]
    for path in sorted(getattr(folder, how)('*.*'))
    if path.suffix in {'.py', '.md', '.sh'} and str(path.relative_to(ROOT)) not in SKIPPED
]


def passages(source: str, suffix: str) -> Iterator[tuple[int, str]]:
    """(line, text): comments, strings and names of a Python file; all of another one."""
    if suffix != '.py':
        yield 1, source
        return
    for token in tokenize.generate_tokens(io.StringIO(source).readline):
        kind = tokenize.tok_name[token.type]
        if kind == 'STRING':
            yield token.start[0], token.string.lstrip('rbfuRBFU').strip('\'"')
        elif kind in ('COMMENT', 'FSTRING_MIDDLE'):
            after_code = not token.line.lstrip().startswith('#')
            yield token.start[0], token.string if after_code else token.string.lstrip('#')
        elif kind == 'NAME':
            yield token.start[0], token.string.replace('_', ' ')


def stumbling(source: str, suffix: str) -> Iterator[tuple[int, str, str]]:
    """(line, text around it, what to write) of each wording that is in PATTERNS, and of docstrings that begin so."""
    for line, text in passages(source, suffix):
        for pattern, better in PATTERNS.values():
            for found in re.finditer(pattern, text):
                around = text[max(0, found.start() - 50) : found.end() + 50]
                yield line + text[: found.start()].count('\n'), ' '.join(around.split()), better
    nodes = ast.walk(ast.parse(source)) if suffix == '.py' else ()
    for node in nodes:
        if isinstance(node, (ast.Module, ast.ClassDef, ast.FunctionDef)):
            first = (ast.get_docstring(node) or '').partition('\n')[0]
            if BEGINS.match(first):
                yield getattr(node, 'lineno', 1), first, 'name the thing: "Feature extractors for comparing samples"'


@pytest.mark.parametrize('path', FILES, ids=lambda path: str(path.relative_to(ROOT)))
def test_wording(path: Path) -> None:
    name = str(path.relative_to(ROOT))
    right = [text for file, text in RIGHT if file == name]
    found = [hit for hit in stumbling(path.read_text(), path.suffix) if not any(text in hit[1] for text in right)]
    assert not found, '\n'.join(f'{name}:{line}: {text!r}: write {better}' for line, text, better in found)


def test_each_exception_is_still_there() -> None:
    """So that the list of exceptions cannot outlive them."""
    texts = {name: ' '.join((ROOT / name).read_text().split()) for name, _ in RIGHT}
    assert not [(name, text) for name, text in RIGHT if text not in texts[name]]


@pytest.mark.parametrize(
    'text',
    [
        'the usual one', 'beside it', 'those of x', 'a set of which none is left', 'x alone', 'this is no test',
        'a grid that is none', 'an asked label', 'it goes on', 'it is said at once', 'it says so', 'it. Of the ODE',
        'written anew', 'in words', 'comes about', 'mended',
    ],
)  # fmt: skip
def test_patterns_find(text: str) -> None:
    assert list(stumbling(f'x = 1  # see: {text}\n', '.py'))
    assert list(stumbling(f'"""Sum.\n\n{text}."""\n', '.py'))
    assert list(stumbling(f'# Title\n\n{text}\n', '.md'))


def test_patterns_let_pass() -> None:
    text = 'It is no longer there; there is no file; of course, as asked for; it is a mention of words that go by'
    assert not list(stumbling(f'"""Sum.\n\n{text}."""\n', '.py'))
    assert [line for line, *_ in stumbling('def f():\n    """What it does."""\n', '.py')] == [1]
    assert [line for line, *_ in stumbling('x = 1\ny = 2  # of the weights\n', '.py')] == [2]
    assert list(stumbling('def beside(usual): ...\n', '.py'))
    assert not list(stumbling('"""Sum.\n\nWhat follows is free."""\n', '.py'))
