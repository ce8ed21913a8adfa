"The environment for Binder is the one of settings.ini; there are badges if a repository is known, and only then"
import importlib.metadata, json, os, sys, pytest
from pathlib import Path
from binder import badges, binder_files, name_of, open_in, root, settings, user_requirements
from pages import source

@pytest.mark.parametrize('name,text', binder_files().items())
def test_files_are_in_step(name, text):
    found = (root/'binder'/name).read_text('utf-8')
    assert found == text, 'run python tools/binder.py'

def test_every_requirement_is_there_at_one_version():
    lines = binder_files()['requirements.txt'].splitlines()[2:]
    assert {name_of(o) for o in user_requirements()} <= {name_of(o) for o in lines}
    assert all(o.count('==') == 1 for o in lines)
    assert len(lines) == len({name_of(o) for o in lines})

def test_torch_is_the_small_build():
    lines = binder_files()['requirements.txt'].splitlines()
    assert '--extra-index-url https://download.pytorch.org/whl/cpu' in lines
    assert [name_of(o) for o in lines if o.endswith('+cpu')] == ['torch', 'torchvision']

def test_the_kit_is_installed_last():
    assert os.access(root/'binder'/'postBuild', os.X_OK)
    assert '--no-deps -e .' in binder_files()['postBuild']

def test_badges():
    text = badges('https://github.com/some/kit.git')
    assert 'colab.research.google.com/github/some/kit/blob/main/nbs/index.ipynb' in text
    assert 'mybinder.org/v2/gh/some/kit/main' in text
    assert badges('') == badges(None) == badges('https://example.org/kit') == ''

pages = sorted((root/'nbs').glob('*.ipynb'))

@pytest.mark.parametrize('path', pages, ids=lambda o: o.name)
def test_every_page_opens_where_the_address_is_known(path):
    nb = json.loads(path.read_text(encoding='utf-8'))
    assert open_in(nb, settings().get('git_url'), f'nbs/{path.name}') == nb, 'run python tools/binder.py'

def test_badges_come_and_go():
    nb = json.loads(pages[5].read_text(encoding='utf-8'))
    page = f'nbs/{pages[5].name}'
    new = open_in(nb, 'https://github.com/some/kit', page)
    assert new['cells'][0] == nb['cells'][0] and new['cells'][3:] == nb['cells'][1:]
    assert source(new['cells'][1]).count(page) == 2
    assert open_in(new, 'https://github.com/some/kit', page) == new and open_in(new, None, page) == nb

@pytest.fixture
def colab(monkeypatch, tmp_path):
    "Runs the cell: commands given to the shell, and the versions that these change"
    calls = []
    url = 'https://github.com/some/kit.git'
    code = source(open_in({'cells': [{}]}, url, 'nbs/a.ipynb')['cells'][2])
    monkeypatch.chdir(tmp_path)
    old = importlib.metadata.version
    def run(**changes):
        new = {}
        monkeypatch.setattr(importlib.metadata, 'version', lambda o: new.get(o) or old(o))
        def system(self, s):
            calls.append(s)
            new.update(changes)
        exec(code, {'get_ipython': lambda: type('Shell', (), {'system': system})()})
        return calls
    return run

def test_elsewhere_the_cell_does_nothing(colab): assert colab() == []

def test_on_colab_the_cell_installs_the_kit_and_keeps_what_is_there(colab, monkeypatch):
    monkeypatch.setitem(sys.modules, 'google.colab', sys)
    assert colab() == ["pip install -q -c kept.txt 'cwcl[all] @ git+https://github.com/some/kit.git'"]
    kept = [o.partition('==') for o in Path('kept.txt').read_text().splitlines()]
    assert [k for k,*_ in kept] == ['torch', 'torchvision', 'numpy', 'pandas', 'ipywidgets']
    assert all(v == importlib.metadata.version(k) for k,_,v in kept)

def test_the_cell_asks_for_a_restart_when_a_loaded_library_has_changed(colab, monkeypatch):
    monkeypatch.setitem(sys.modules, 'google.colab', sys)
    with pytest.raises(SystemExit, match='Restart session, then run again: pytest changed'): colab(pytest='99')
    assert colab(voila='99')
