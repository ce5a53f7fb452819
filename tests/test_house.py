"""The budgets of the house: what one has to read, how it is set, and which file may import which."""

import ast
import glob
import io
import os
import tokenize

from conftest import ROOT

# Meant are 24,000 tokens, 2,450 lines, and 3,000 lines of tests. What there is, so that growth is seen.
LINES = {'config/__init__.py': 138, 'config/run.py': 345, 'prepare.py': 565, 'model.py': 1116,
         'train_encoder.py': 264, 'train_decoder.py': 206, 'evaluate.py': 648}
BELOW = {'config/__init__.py': set(), 'config/run.py': {'config'}, 'prepare.py': {'config'},
         'model.py': {'config', 'prepare'}}  # the others: these and model
FILES = {os.path.relpath(p, ROOT): open(p).read() for p in glob.glob(f'{ROOT}/**/*.py', recursive=True)}

def n_tokens(path):
    """Tokens of Python, without comments, docstrings and newlines."""
    n, last, layout = 0, tokenize.NEWLINE, (tokenize.NEWLINE, tokenize.INDENT, tokenize.DEDENT)
    for t in tokenize.generate_tokens(io.StringIO(FILES[path]).readline):
        if t.type not in (tokenize.NL, tokenize.COMMENT, tokenize.ENDMARKER):
            n += not (t.type in layout or (t.type == tokenize.STRING and last in layout))
            last = t.type
    return n

def test_budgets():
    lines = {path: FILES[path].count('\n') for path in LINES}
    assert {path: n for path, n in lines.items() if n > LINES[path]} == {}
    assert sum(map(n_tokens, LINES)) <= 29_151
    assert sum(text.count('\n') for path, text in FILES.items() if path.startswith('tests')) <= 3000

def test_lines_and_functions_fit_a_screen():
    for path, text in FILES.items():
        assert max(map(len, text.split('\n'))) <= 110, path
        for node in ast.walk(ast.parse(text)):
            if isinstance(node, ast.FunctionDef):
                assert node.end_lineno - node.lineno < 60, f'{path}: {node.name}'

def test_imports_run_one_way():
    own = {path.partition('/')[0].removesuffix('.py') for path in LINES}
    for path in LINES:
        nodes = [n for n in ast.walk(ast.parse(FILES[path])) if isinstance(n, ast.Import | ast.ImportFrom)]
        names = {(getattr(n, 'module', None) or n.names[0].name).partition('.')[0] for n in nodes}
        assert names & own <= BELOW.get(path, {'config', 'prepare', 'model'}), path
    assert 'import torch' not in FILES['prepare.py'], 'preparation starts at once'
