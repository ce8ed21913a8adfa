"The environment for Binder is the one of settings.ini; badges stand where a repository is known, and nowhere else"
import json, os, sys, pytest
from binder import badges, binder_files, name_of, open_in, root, settings
from pages import source

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

pages = sorted((root/'nbs').glob('*.ipynb'))

@pytest.mark.parametrize('path', pages, ids=lambda o: o.name)
def test_every_page_opens_where_the_address_is_known(path):
    nb = json.loads(path.read_text(encoding='utf-8'))
    assert open_in(nb, settings().get('git_url'), f'nbs/{path.name}') == nb, 'run python tests/binder.py'

def test_badges_come_and_go():
    nb = json.loads(pages[5].read_text(encoding='utf-8'))
    page = f'nbs/{pages[5].name}'
    new = open_in(nb, 'https://github.com/some/kit', page)
    assert new['cells'][0] == nb['cells'][0] and new['cells'][3:] == nb['cells'][1:]
    assert source(new['cells'][1]).count(page) == 2
    assert open_in(new, 'https://github.com/some/kit', page) == new and open_in(new, None, page) == nb

def test_the_cell_installs_on_colab_and_nowhere_else(monkeypatch):
    url,calls = 'https://github.com/some/kit.git',[]
    shell = type('Shell', (), {'system': lambda self, s: calls.append(s)})()
    def run(): exec(source(open_in({'cells': [{}]}, url, 'nbs/a.ipynb')['cells'][2]), {'get_ipython': lambda: shell})
    run()
    assert calls == []
    monkeypatch.setitem(sys.modules, 'google.colab', sys)
    run()
    assert calls == [f'pip install -q git+{url}']
