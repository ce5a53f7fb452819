"""README.md and tests/results/README.md: links lead somewhere, commands and names exist."""

import os
import re
import shlex

import pytest
from conftest import ROOT

PLACES = 'README.md', 'tests/results/README.md'

def read(place):
    with open(os.path.join(ROOT, place), encoding='utf-8') as f:
        return f.read()

@pytest.mark.parametrize('place', PLACES)
def test_links_lead_somewhere(place):
    text, folder = read(place), os.path.join(ROOT, os.path.dirname(place))
    links = [link.partition('#')[0] for link in re.findall(r'\]\(([^)]+)\)', text)]
    files = re.findall(r'`((?:tests|config)/[\w./]+\.\w+)`', text)
    assert links
    paths = [os.path.join(folder, link) for link in links if link] + [os.path.join(ROOT, f) for f in files]
    for path in paths:
        assert os.path.exists(path), path

@pytest.mark.parametrize('place', PLACES)
def test_commands_exist(place):
    seen = 0
    for command in re.findall(r'^ {4}(.*\.py\b.*)$', read(place).replace('\\\n', ''), re.MULTILINE):
        words = shlex.split(command, comments=True)
        script = next((i for i, word in enumerate(words) if re.fullmatch(r'(tests/)?\w+\.py', word)), None)
        if script is None:
            continue
        source, seen = read(words[script]), seen + 1
        for word in words[script + 1:]:
            name = word.partition('=')[0]
            if name.startswith('--'):
                assert re.search(rf"^{name[2:]} = |'{name}'", source, re.MULTILINE), f'{words[script]} {word}'
            elif name.startswith('config/'):
                assert os.path.exists(os.path.join(ROOT, name)), name
    assert seen > 3

def test_names_in_the_table_of_places_exist():
    rows = re.findall(r'^\| [^|]+ \| (.*?) \|$', read('README.md').partition('## Hack it')[2], re.MULTILINE)
    code = ''.join(map(read, ('prepare.py', 'model.py', 'train_decoder.py', 'config/run.py', 'evaluate.py')))
    names = [name.rpartition('.')[2] for row in rows for name in re.findall(r'`([\w.]+)`', row)]
    assert len(names) > 10
    for name in names:
        assert re.search(rf'\b(def|class) {name}\b', code), name
