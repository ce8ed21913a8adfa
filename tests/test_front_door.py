"What somebody meets first: README, citation, templates, hooks"
import json, re, cwcl, pytest
from binder import settings
from pages import cells, root, source
from readme import INDEX, LISTS, lists, opening, sections, study_text

readme = (root/'README.md').read_text(encoding='utf-8')

def text(name): return (root/name).read_text(encoding='utf-8')

def test_results_in_the_readme_are_those_of_the_files():
    "Table and intervals are computed again; `make readme` writes them"
    assert study_text(json.loads(INDEX.read_text(encoding='utf-8'))) in readme

def test_lists_of_lessons_are_in_step():
    "With the sections of the site, and with the titles and questions of the lessons; `make readme` writes them"
    cell, = [c for c in cells('index.ipynb') if c['id'] == LISTS]
    assert source(cell) == lists()
    assert re.findall('^### (.+)$', source(cell), re.M) == list(sections())

def test_a_lesson_is_listed_once_with_its_number():
    listed = re.findall(r'^\| \[(\S+) .+?\]\(nbs/(.+?)_.+ipynb\) \|', readme, re.M)
    pages = sorted(o.name.partition('_')[0] for o in (root/'nbs').glob('[0-9]*.ipynb'))
    assert all(a == b for a,b in listed) and sorted(a for a,_ in listed) == pages

@pytest.mark.parametrize('page', sorted(o.name for o in (root/'nbs').glob('[0-9]*.ipynb')))
def test_a_lesson_opens_with_a_title_and_a_question(page):
    title,question = opening(page)
    assert title and question.endswith(('?', '.'))

def test_what_was_not_measured_is_said_once():
    "In a paragraph, and in no cell of a table"
    assert readme.count('not measured') == 1 and readme.count('**What was not measured.**') == 1

def test_the_first_screen_is_picture_paragraph_result():
    order = [readme.index(o) for o in ('demo.png', 'Masks are expensive', '| DCL+cls ', '## Install', '## Quick start')]
    assert order == sorted(order)

def test_the_citation_has_the_version_and_the_paper():
    cff = text('CITATION.cff')
    doi = '10.1049/htl2.12069'
    assert f'version: {settings()["version"]}\n' in cff and doi in cff and doi in readme

def test_hooks_clean_and_check():
    hooks = re.findall(r'entry: (.+)', text('.pre-commit-config.yaml'))
    assert [o.split()[0].split('/')[-1] for o in hooks] == ['nbdev_clean', 'chkstyle']

@pytest.mark.parametrize('name', ['ISSUE_TEMPLATE/bug.md', 'ISSUE_TEMPLATE/question.md', 'PULL_REQUEST_TEMPLATE.md'])
def test_templates_are_there(name): assert len(text(f'.github/{name}').split()) > 30

def test_types_are_announced(): assert (root/cwcl.__name__/'py.typed').exists()
