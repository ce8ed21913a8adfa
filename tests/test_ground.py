"The ground of the book: one source of metadata, floors, generated files in step."
import ast, builtins, dis, importlib, os, re, shutil, subprocess, sys, types
from pathlib import Path
import pytest, cwcl
from binder import name_of, settings, user_requirements
from pages import cells, root, source
from readme import render
from test_requirements import absent

try: import tomllib
except ImportError: import tomli as tomllib # Python 3.10

notebooks = sorted((root/'nbs').glob('*.ipynb'))
lessons = [o for o in notebooks if re.match(r'\d\d[a-z]?_', o.name)]

def module(nb):
    found = re.search(r'^#\| default_exp (\S+)', '\n'.join(source(c) for c in cells(nb)), flags=re.M)
    return found and 'cwcl.' + found[1]

def test_metadata_is_written_once():
    cfg = settings()
    toml = tomllib.loads((root/'pyproject.toml').read_text(encoding='utf-8'))
    assert toml['project']['name'] == cfg['lib_name'] == 'cwcl'
    assert cwcl.__version__ == cfg['version']
    assert toml['project']['requires-python'] == '>=' + cfg['min_python']
    assert (toml['tool']['nbdev']['nbs_path'], toml['tool']['nbdev']['lib_path']) == (cfg['nbs_path'], cfg['lib_path'])
    assert set(toml['project']) == {'name', 'requires-python', 'dynamic'}

def test_console_scripts_exist():
    for script in settings()['console_scripts'].split():
        name,_,target = script.partition('=')
        mod,_,func = target.partition(':')
        assert callable(getattr(importlib.import_module(mod), func)), name

def test_constraints_pin_every_requirement():
    lines = (root/'constraints.txt').read_text(encoding='utf-8').split()
    pinned = {re.split('==', o)[0].lower().replace('_', '-') for o in lines if '==' in o}
    all_of_them = user_requirements() + settings()['dev_requirements'].split()
    wanted = [name_of(o) for o in all_of_them if 'python_version<' not in o]
    assert set(wanted) <= pinned

def imports(code):
    for node in ast.walk(ast.parse(code)):
        if isinstance(node, ast.ImportFrom) and node.module: yield node.module
        if isinstance(node, ast.Import): yield from (o.name for o in node.names)

# What lessons 14 to 19 may use of fastai, beside fastai.data
DATA = ('fastai.torch_core', 'fastai.vision.core', 'fastai.vision.data')

@pytest.mark.parametrize('nb', lessons, ids=lambda o: o.stem)
def test_exported_cells_import_from_lower_floors(nb):
    "A smaller number, or the same one and an earlier place among the pages that share it"
    floor = {module(o): o.name for o in lessons if module(o)}
    number = int(nb.name[:2])
    for c in cells(nb):
        if c['cell_type'] != 'code' or not re.match(r'#\| export', source(c)): continue
        for name in imports(source(c)):
            if name.startswith('cwcl.'): assert floor[name] < nb.name, f'{nb.name} imports {name}'
            if name.split('.')[0] == 'fastai':
                assert number >= 30 or (14 <= number < 20), f'{nb.name} imports {name}'
                data = name.startswith('fastai.data') or name in DATA
                assert number >= 30 or data, f'{nb.name} imports {name}'

def used(code):
    "Names that a piece of compiled code looks up outside of itself"
    steps = list(dis.get_instructions(code))
    own = {o.argval for o in steps if o.opname == 'STORE_NAME'}
    yield from (o.argval for o in steps if o.opname in ('LOAD_GLOBAL', 'LOAD_NAME') and o.argval not in own)
    for o in code.co_consts:
        if isinstance(o, types.CodeType): yield from used(o)

exports = sorted(o for o in (root/'cwcl').rglob('*.py') if o.name != '_modidx.py')

@pytest.mark.parametrize('file', exports, ids=lambda o: o.stem)
def test_exported_code_imports_every_name_it_uses(file):
    "A notebook's hidden imports would hide it from its own tests"
    mod = importlib.import_module('.'.join(file.relative_to(root).with_suffix('').parts))
    code = compile(file.read_text(encoding='utf-8'), str(file), 'exec')
    lost = {o for o in used(code) if not hasattr(mod, o) and not hasattr(builtins, o)}
    assert not lost, f'{file.name} uses {", ".join(sorted(lost))} without importing it'

def test_widgets_and_video_are_imported_by_nothing():
    for nb in lessons:
        if int(nb.name[:2]) >= 60: continue
        code = [source(c) for c in cells(nb) if c['cell_type'] == 'code']
        code = '\n'.join(o for o in code if o.startswith('#| export'))
        assert not {'cwcl.widgets', 'cwcl.video'} & set(imports(code)), nb.name

def test_readme_is_the_index(): assert (root/'README.md').read_text(encoding='utf-8') == render(), 'run make readme'

def test_the_sidebar_of_the_site_lists_every_notebook():
    text = (root/'nbs'/'_quarto.yml').read_text(encoding='utf-8')
    assert sorted(re.findall(r'[\w.]+\.ipynb', text)) == [o.name for o in notebooks]

def without_empty(text):
    "Leave out of `_modidx.py` the modules that define nothing: older nbdev lists them"
    return re.sub(rb"\n *'[\w.]+': \{\},", b'', text)

def test_export_and_clean_leave_no_difference(tmp_path):
    caches = shutil.ignore_patterns('__pycache__', '.ipynb_checkpoints')
    for name in ('nbs', 'cwcl'): shutil.copytree(root/name, tmp_path/name, ignore=caches)
    for name in ('settings.ini', 'pyproject.toml', 'setup.py', 'README.md'): shutil.copy(root/name, tmp_path)
    for tool in ('export', 'clean'):
        command = Path(sys.executable).with_name(f'nbdev_{tool}')
        subprocess.run([command], cwd=tmp_path, check=True, capture_output=True)
    def sources(top, name):
        files = [o for o in (top/name).rglob('*') if o.suffix in ('.py', '.ipynb')]
        return {o.relative_to(top): without_empty(o.read_bytes()) for o in files if '.ipynb_checkpoints' not in o.parts}
    for name in ('nbs', 'cwcl'):
        old,new = sources(root, name),sources(tmp_path, name)
        assert old.keys() == new.keys()
        assert not [o for o in old if old[o] != new[o]]

@pytest.mark.parametrize('nb', notebooks, ids=lambda o: o.stem)
def test_notebook_is_run_small_and_whole(nb):
    assert nb.stat().st_size <= 200_000
    assert 'site-packages' not in nb.read_text(encoding='utf-8'), 'a warning of a library, with a path of the machine'
    code = [c for c in cells(nb) if c['cell_type'] == 'code']
    assert not [c for c in code for o in c['outputs'] if o['output_type'] == 'error']
    assert [c for c in code if c['outputs']], f'{nb.name} has not been run'

@pytest.mark.slow
def test_style_checker_finds_nothing():
    command = [Path(sys.executable).with_name('chkstyle'), 'nbs', 'tests', 'tools']
    out = subprocess.run(command, cwd=root, capture_output=True, text=True)
    assert out.returncode == 0, out.stdout

@pytest.mark.slow
def test_wheel_works_outside_the_checkout_without_extras(tmp_path):
    "But for the explorers, which need ipywidgets"
    pip = [sys.executable, '-m', 'pip', '--disable-pip-version-check']
    src = tmp_path/'src'
    made = shutil.ignore_patterns('.git', '.venv', 'runs', '__pycache__', 'build', '*.egg-info', '_proc', '_docs')
    shutil.copytree(root, src, ignore=made)
    build = [*pip, 'wheel', '-q', '--no-deps', '--no-build-isolation', '-w', tmp_path, src]
    subprocess.run(build, check=True, capture_output=True)
    wheel, = tmp_path.glob('cwcl-*.whl')
    install = [*pip, 'install', '-q', '--no-deps', '--target', tmp_path/'site', wheel]
    subprocess.run(install, check=True, capture_output=True)
    shutil.copy(root/'tools'/'wheel_check.py', tmp_path)
    missing = absent('anywidget', 'ipywidgets', 'traitlets', 'av', 'submitit', 'seaborn')
    (tmp_path/'site'/'sitecustomize.py').write_text(missing)
    env = {**os.environ, 'PYTHONPATH': str(tmp_path/'site'), 'MPLBACKEND': 'agg'}
    out = subprocess.run([sys.executable, 'wheel_check.py'], cwd=tmp_path, env=env, capture_output=True, text=True)
    assert out.returncode == 0, out.stderr
    assert re.search(r'modules imported, [1-9]\d* want an extra', out.stdout)
