"The environment for Binder is the one of settings.ini; badges stand where a repository is known, and nowhere else"
import os, pytest
from binder import badges, binder_files, name_of, root, settings
from pages import cells, source

@pytest.mark.parametrize('name,text', binder_files().items())
def test_files_are_in_step(name, text): assert (root/'binder'/name).read_text(encoding='utf-8') == text, 'run python tests/binder.py'

def test_every_requirement_is_there_at_one_version():
    lines = binder_files()['requirements.txt'].splitlines()[1:]
    assert {name_of(o) for o in settings()['requirements'].split()} <= {name_of(o) for o in lines} and all(o.count('==') == 1 for o in lines)
    assert len(lines) == len({name_of(o) for o in lines})

def test_the_kit_is_installed_last(): assert os.access(root/'binder'/'postBuild', os.X_OK) and '--no-deps -e .' in binder_files()['postBuild']

def test_badges():
    text = badges('https://github.com/some/kit.git')
    assert 'colab.research.google.com/github/some/kit/blob/main/nbs/index.ipynb' in text and 'mybinder.org/v2/gh/some/kit/main' in text
    assert badges('') == badges(None) == badges('https://example.org/kit') == ''

def test_the_first_page_has_badges_where_the_address_is_known():
    first,want = ''.join(map(source, cells('index.ipynb')[:2])),badges(settings().get('git_url'))
    assert want in first and ('badge' in first) == bool(want)
