"What is required is imported, what is imported is required, and no part needs more than it uses"
import ast, json, os, subprocess, sys
import numpy as np, pytest
from packaging.requirements import Requirement
from packaging.version import Version
from binder import TOOLS, pins, root, settings
from cwcl.core import MissingExtra, need

CODE = sorted((root/'cwcl').rglob('*.py'))
NAMES = dict(PIL='pillow', sklearn='scikit-learn', IPython='ipython') # Module to distribution
NOT_IMPORTED = {'plum-dispatch'} # Caps what fastai 2.8.8 lets in
OPTIONAL = {'tensorboard', 'atheris', 'coverage'} # Used where they are installed
OURS = 'dev', 'peers' # Extras that the kit itself does not import
STANDARD = {*sys.stdlib_module_names, 'tomllib', 'google', 'cwcl', 'peers'}

def required(key): return {o.name: o for o in map(Requirement, settings()[key].split())}

CORE = required('requirements')
EXTRAS = {k.removesuffix('_requirements'): required(k) for k in settings() if k.endswith('_requirements')}
KNOWN = CORE | {k: v for o in EXTRAS.values() for k,v in o.items()}

def distribution(module):
    name = module.split('.')[0]
    return NAMES.get(name, name).replace('_', '-')

def imported(code):
    "Distributions that code imports, each with the extra that brings it"
    for node in ast.walk(ast.parse(code)):
        found = []
        if isinstance(node, ast.Import): found = [(o.name, '') for o in node.names]
        if isinstance(node, ast.ImportFrom) and not node.level: found = [(node.module, '')]
        if isinstance(node, ast.Call) and getattr(node.func, 'id', '') == 'need':
            found = [tuple([o.value for o in node.args] + [''])[:2]] if isinstance(node.args[0], ast.Constant) else []
        yield from ((distribution(name), extra) for name,extra in found if name.split('.')[0] not in STANDARD)

def uses(files):
    "The same for files; what a file needs of an extra is the extra's, however it is imported there"
    for f in files:
        found = set(imported(f.read_text(encoding='utf-8')))
        extra = dict(o for o in found if o[1])
        yield from ((name, extra.get(name, '')) for name,_ in found)

def book_code(path):
    "The code cells of a notebook, without lines for the shell"
    for c in json.loads(path.read_text(encoding='utf-8'))['cells']:
        code = ''.join(c['source']).splitlines()
        if c['cell_type'] == 'code': yield '\n'.join(o for o in code if not o.startswith(('%', '!')))

def plain(found): return {o for o,extra in found if not extra}

def test_the_core_requires_what_it_imports(): assert plain(uses(CODE)) == set(CORE) - NOT_IMPORTED

def test_an_extra_requires_what_is_imported_for_it():
    listed = {(o, k) for k,v in EXTRAS.items() if k not in OURS for o in set(v) - NOT_IMPORTED}
    assert {o for o in uses(CODE) if o[1]} == listed

def test_tests_and_lessons_import_what_is_required():
    files = [o for home in ('tests', 'tests/peers', 'tools') for o in (root/home).glob('*.py')]
    used = plain(uses(files)) - {o.stem.replace('_', '-') for o in files}
    for f in (root/'nbs').glob('*.ipynb'): used |= {o for code in book_code(f) for o in plain(imported(code))}
    assert used <= set(KNOWN) | OPTIONAL
    assert {o for k in OURS for o in EXTRAS[k]} - TOOLS <= used

def test_every_floor_is_what_the_lowest_pins_prove():
    low = {k: o.partition('==')[2] for k,o in pins('constraints-low.txt').items()}
    users = {k: v.specifier for k,v in KNOWN.items() if not any(k in EXTRAS[o] for o in OURS)}
    floors = {k: Version(o.version) for k,v in users.items() for o in v if o.operator == '>='}
    assert {k: Version(low[k]) for k in floors} == floors

@pytest.mark.parametrize('file', ['constraints.txt', 'constraints-low.txt', 'constraints-colab.txt'])
def test_pins_are_among_the_versions_that_are_allowed(file):
    found = {k: Version(o.partition('==')[2]) for k,o in pins(file).items()}
    assert not {k: str(v) for k,v in found.items() if k in KNOWN and not KNOWN[k].specifier.contains(v)}

def absent(*modules):
    "Python code after which modules cannot be imported"
    return f"""import sys
class Absent:
    def find_spec(self, name, path=None, target=None):
        if name.split('.')[0] in {modules!r}: raise ModuleNotFoundError(name, name=name)
sys.meta_path.insert(0, Absent())
"""

def test_losses_networks_metrics_and_windows_need_torch_and_numpy_alone():
    back = {v: k for k,v in NAMES.items()}
    kept = 'torch', 'numpy', 'filelock' # The last one is imported by torch
    code = absent(*(back.get(o, o.replace('-', '_')) for o in KNOWN if o not in kept)) + """
import json, torch
from cwcl.core import InputError, recipe
from cwcl.infer import sliding_window
from cwcl.losses.contrastive import deep_contrastive_loss
from cwcl.losses.segmentation import focal_loss, generalized_dice_loss
from cwcl.metrics import class_iou, confusion_matrix, surface_dice
from cwcl.models.heads import MultiScaleProjectionHead
from cwcl.models.unet import UNet
from cwcl.pairs import label_set_ids, positive_mask
net = UNet(3, widths=(4, 4)).eval()
mask = sliding_window(net, torch.randn(1, 3, 16, 16), window=16).argmax(1)
iou = class_iou(confusion_matrix(mask, mask, 3)).nan_to_num(1).tolist()
try: surface_dice(mask, mask, 3)
except ImportError as e: print(json.dumps([recipe('smoke').to_json()[:1], iou, str(e)]))"""
    out = subprocess.run([sys.executable, '-W', 'ignore', '-c', code], capture_output=True, text=True)
    assert out.returncode == 0, out.stderr
    assert json.loads(out.stdout) == ['{', [1, 1, 1], 'scipy is not installed; get it with: pip install scipy']

@pytest.mark.parametrize('extra,module', [('video', 'av'), ('study', 'submitit')])
def test_what_needs_an_extra_says_which(extra, module, monkeypatch, tmp_path):
    from cwcl.study.jobs import executor
    from cwcl.video import cwcl_predict
    (tmp_path/'a.mp4').touch()
    monkeypatch.setitem(sys.modules, module, None)
    line = rf"^(cwcl_predict: )?{module} is not installed; get it with: pip install 'cwcl\[{extra}\]'$"
    call = dict(video=lambda: cwcl_predict(str(tmp_path/'a.mp4')), study=lambda: executor(tmp_path))[extra]
    with pytest.raises(Exception, match=line): call()

def test_a_module_of_an_extra_is_the_module_itself():
    assert need('fractions', 'study').Fraction(2, 4).denominator == 2 and need('os.path').join is os.path.join
    with pytest.raises(AttributeError): need('fractions').nothing
    with pytest.raises(MissingExtra, match=r"nowhere is not .*'cwcl\[video\]'"): need('nowhere.at', 'video').a

def test_a_broken_extra_keeps_its_own_error(tmp_path, monkeypatch):
    (tmp_path/'halfthere.py').write_text('import nowhere_else')
    monkeypatch.syspath_prepend(tmp_path)
    with pytest.raises(ModuleNotFoundError, match='nowhere_else') as e: need('halfthere', 'video').anything
    assert not isinstance(e.value, MissingExtra)

@pytest.mark.parametrize('file', CODE, ids=lambda o: o.stem)
def test_nothing_is_imported_that_only_posix_has(file):
    nodes = list(ast.walk(ast.parse(file.read_text(encoding='utf-8'))))
    names = {o.name for n in nodes if isinstance(n, ast.Import) for o in n.names}
    names |= {n.module for n in nodes if isinstance(n, ast.ImportFrom)}
    assert not names & set('fcntl grp posix pty pwd resource syslog termios tty'.split())
    calls = {n.attr for n in nodes if isinstance(n, ast.Attribute) and ast.unparse(n.value) == 'os'}
    signals = {n.attr for n in nodes if isinstance(n, ast.Attribute) and ast.unparse(n.value) == 'signal'}
    assert signals <= {'signal', 'getsignal', 'raise_signal', 'default_int_handler', 'SIGINT', 'SIGTERM', 'SIG_IGN',
        'SIG_DFL'} # Windows has these
    assert not calls & set('fork forkpty getuid geteuid killpg mkfifo nice setsid statvfs sysconf uname wait'.split())

def test_several_processes_are_refused_where_submitit_cannot_work(monkeypatch):
    from cwcl.study.jobs import executor
    with monkeypatch.context() as m, pytest.raises(ValueError, match='Linux or macOS'):
        m.setattr('os.name', 'nt')
        executor('study')

def test_a_mapped_file_is_closed_before_it_is_renamed(monkeypatch, tmp_path):
    "Windows renames no file that is open"
    import cwcl.core, gc
    from cwcl.data.store import mapped_array
    move = os.replace
    alive = []
    def replace(a, b):
        alive.extend(o for o in gc.get_objects() if isinstance(o, np.memmap) and str(o.filename) == str(a))
        move(a, b)
    monkeypatch.setattr(cwcl.core.os, 'replace', replace)
    assert mapped_array(tmp_path/'a.npy', (2, 3), lambda out: out.fill(7)).sum() == 42 and not alive

def set_up(*variables):
    "What make would do to set up, as text"
    make = ['make', '-n', '-B', 'setup', *variables]
    passed_on = 'MAKEFLAGS', 'MAKEOVERRIDES', 'MFLAGS', 'PINS', 'TORCH', 'PYTHON' # Of a make that runs these tests
    plain = {k: v for k,v in os.environ.items() if k not in passed_on}
    out = subprocess.run(make, cwd=root, env=plain, capture_output=True, text=True, check=True)
    return '\n'.join(' '.join(o.split()) for o in out.stdout.splitlines())

def test_make_takes_the_small_build_of_torch_when_it_is_told_to():
    line = next(o for o in set_up('TORCH=cpu').splitlines() if o.endswith('torch torchvision'))
    assert '--index-url https://download.pytorch.org/whl/cpu --no-deps' in line and '-c constraints.txt' in line
    assert '--index-url file:///mirror --no-deps' in set_up('TORCH=cpu', 'TORCH_INDEX=file:///mirror')

def test_make_takes_the_default_build_otherwise():
    text = set_up()
    assert 'index' not in text and '-c constraints.txt torch torchvision' in text
    assert '-c constraints-low.txt' in set_up('PINS=constraints-low.txt') and ' -c ' not in set_up('PINS=')
