"""README.md and tests/results/README.md: tables are those of the files, links lead somewhere, commands exist."""

import os
import re
import shlex

import pytest
import tables
from conftest import ROOT

TEXTS = {}
for place in tables.PLACES:
    with open(os.path.join(ROOT, place), encoding='utf-8') as f:
        TEXTS[place] = f.read()


def test_tables_are_those_of_the_files():
    found = tables.tables()
    for name, (_, _, *rows) in found.items():
        assert all(row.split(' | ', 1)[1].strip('| ') for row in rows), name
    assert {name for text in TEXTS.values() for name in re.findall(r'<!-- (?!end)(.+?) -->\n', text)} == set(found)
    for place, text in TEXTS.items():
        assert tables.filled(text, found) == text, f'{place}: run python tests/tables.py --write'
    assert tables.filled(TEXTS['README.md'], found | {'headline': ['x']}) != TEXTS['README.md'], 'the test would see it'


@pytest.mark.parametrize('place', tables.PLACES)
def test_links_lead_somewhere(place):
    folder = os.path.dirname(place)
    links = re.findall(r'\]\(([^)]+)\)', TEXTS[place])
    files = re.findall(r'`((?:tests|config)/[\w./]+\.\w+|\w+\.(?:csv|json))`', TEXTS[place])
    assert links
    for link in links:
        file, _, heading = link.partition('#')
        if link.startswith('https://'):
            continue
        assert os.path.exists(os.path.join(ROOT, folder, file)), link
        if heading:
            headings = re.findall('^#+ (.*)$', TEXTS[os.path.normpath(os.path.join(folder, file))], re.MULTILINE)
            assert heading in {re.sub(r'[^\w-]', '', h.lower().replace(' ', '-')) for h in headings}, link
    for file in files:
        if '/' in file or folder:
            assert os.path.exists(os.path.join(ROOT, '' if '/' in file else folder, file)), file


@pytest.mark.parametrize('place', tables.PLACES)
def test_commands_name_scripts_presets_and_settings_that_there_are(place):
    seen = 0
    for command in re.findall(r'^ {4}(.*\.py .*)$', TEXTS[place].replace('\\\n', ''), re.MULTILINE):
        words = shlex.split(command, comments=True)
        at = next((i for i, word in enumerate(words) if re.fullmatch(r'(tests/)?\w+\.py', word)), None)
        if at is None:
            continue
        with open(os.path.join(ROOT, words[at]), encoding='utf-8') as f:
            source = f.read()
        seen += 1
        for word in words[at + 1:]:
            name = word.partition('=')[0]
            if name.startswith('--'):
                assert re.search(rf"^{name[2:]} = |'{name}'", source, re.MULTILINE) or name == '--help', f'{words[at]} {word}'
            elif name.startswith('config/'):
                assert os.path.exists(os.path.join(ROOT, name)), name
    assert seen > 3
