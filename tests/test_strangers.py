"Nothing that is given to the kit is executed, and what builds it in public may only read"
import ast, pickle, re, shutil, numpy as np, pytest, torch
from pathlib import Path
from cwcl.checkpoint import load_model
from cwcl.core import InputError, Recipe
from cwcl.data.cholec import frame_table
from cwcl.data.files import INDEX
from cwcl.data.folders import data_root
from cwcl.data.images import ENDINGS, picture_size, read_image, read_mask
from cwcl.data.lists import class_text
from cwcl.data.own import own_table
from cwcl.data.phases import read_phases
from cwcl.data.store import mapped_array
from cwcl.film import probe_video
from cwcl.resume import read_checkpoint
from cwcl.study.records import read_result
from cwcl.tasks import CWCLNet

root = Path(__file__).parent.parent
CODE = sorted((root/'cwcl').rglob('*.py'))

# Searched for in the code

RUNS = set('eval exec compile __import__ pickle.load pickle.loads pickle.Unpickler torch.load marshal.load '
    'marshal.loads joblib.load shelve.open yaml.load os.system os.popen pd.read_pickle runpy.run_path '
    'torch.jit.load torch.hub.load importlib.util.spec_from_file_location urllib.request.urlopen '
    'requests.get'.split())

@pytest.mark.parametrize('file', CODE, ids=lambda o: o.stem)
def test_no_line_runs_what_a_file_holds(file):
    "Lesson 03 has the one exception, which `--with` asks for"
    nodes = list(ast.walk(ast.parse(file.read_text(encoding='utf-8'))))
    calls = [o for o in nodes if isinstance(o, ast.Call)]
    found = {ast.unparse(o.func) for o in calls} & RUNS
    assert found <= ({'importlib.util.spec_from_file_location'} if file.stem == 'methods' else set())
    words = {k.arg: ast.unparse(k.value) for o in calls for k in o.keywords}
    assert words.get('allow_pickle') != 'True' and words.get('shell') != 'True' and words.get('weights_only') != 'False'
    imported = {a.name for o in nodes if isinstance(o, ast.Import) for a in o.names}
    imported |= {o.module for o in nodes if isinstance(o, ast.ImportFrom)}
    assert not imported & set('pickle marshal shelve dill cloudpickle joblib yaml requests urllib.request'.split())

# Tried

class Payload:
    "What runs when it is unpickled"
    def __init__(self, mark): self.mark = mark
    def __reduce__(self): return open, (str(self.mark), 'w')

def pickled(path, mark): path.write_bytes(pickle.dumps(Payload(mark)))
def saved(path, mark): torch.save(dict(model=Payload(mark)), path)
def array(path, mark):
    with open(path, 'wb') as f: np.save(f, np.array([Payload(mark)], dtype=object), allow_pickle=True)

def in_folder(name, read):
    "Read a folder in which the file has this name"
    def f(path):
        home = path.parent/'home'
        (home/name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(path, home/name)
        return read(home)
    return f

def checkpoint(path):
    net = CWCLNet(Recipe(widths=(4, 8, 8, 16, 16)))
    return read_checkpoint(path, net, 1)

def refill(path):
    "A store is made again from its pictures"
    def fill(out): out[:] = 0
    with pytest.warns(UserWarning, match='damaged'): mapped_array(path, (2, 2), fill)
    raise InputError('decoded again')

def recipe_of(path): return Recipe.from_json(path.read_text(encoding='utf-8', errors='replace'), path)

def own(home):
    shutil.copytree(home/'frames', home/'masks')
    return [read_image(o) for o in own_table(home/'frames', home/'masks', 'bed=0, tool=5').image]

FRAME = 'video01/video01_00080/frame_80_endo.png'
READERS = [(f'a{o}', f) for o in ENDINGS for f in (read_image, read_mask, picture_size)]
READERS += [('a.safetensors', load_model), ('a.pth', load_model), ('a.pkl', load_model),
    ('last.safetensors', checkpoint), ('a.npy', refill), ('a.json', read_result),
    ('metrics.json', in_folder('run/metrics.json', lambda o: read_result(o/'run'))),
    ('recipe.json', recipe_of), ('video01-phase.txt', read_phases), ('VID01.json', read_phases), ('a.zip', data_root),
    ('a.mp4', probe_video), ('a.mkv', probe_video), ('a.csv', class_text),
    ('frame.png', in_folder(FRAME, frame_table)), ('frames/a/0.png', in_folder('frames/a/0.png', own))]

@pytest.mark.parametrize('write', [pickled, saved, array])
@pytest.mark.parametrize('name,read', READERS, ids=[f'{o}-{f.__name__}' for o,f in READERS])
def test_a_pickle_under_any_name_is_refused_and_not_run(tmp_path, name, read, write):
    mark = tmp_path/'it ran'
    path = tmp_path/Path(name).name
    write(path, mark)
    with pytest.raises(InputError) as e: read(path)
    assert not mark.exists() and '\n' not in str(e.value)

def test_an_index_that_is_a_pickle_is_made_again(tmp_path, scenes):
    data = Path(shutil.copytree(scenes, tmp_path/'data'))
    whole = frame_table(data)
    pickled(data/INDEX, tmp_path/'it ran')
    assert frame_table(data).equals(whole) and not (tmp_path/'it ran').exists()

# Workflows

FLOWS = sorted((root/'.github'/'workflows').glob('*.yml'))

@pytest.mark.parametrize('file', FLOWS, ids=lambda o: o.stem)
def test_workflows_pin_actions_and_may_only_read(file):
    text = file.read_text(encoding='utf-8')
    used = re.findall(r'uses: (\S+)', text)
    assert used and all(re.fullmatch(r'[\w/-]+@[0-9a-f]{40}', o) for o in used)
    rights = re.search(r'^permissions: \{(.*)\}$', text, re.M)[1]
    assert rights == ('contents: read' if file.stem != 'docs' else 'contents: read, pages: write, id-token: write')
    assert text.count('actions/checkout@') == text.count('persist-credentials: false')

def test_every_lesson_is_run_by_a_workflow():
    decades = re.search(r'decade: \[(.*)\]', (root/'.github'/'workflows'/'test.yml').read_text())[1]
    patterns = [o.strip(" '") for o in decades.split(',')]
    for f in (root/'nbs').glob('*.ipynb'): assert sum(bool(re.search(p, f.name)) for p in patterns) == 1, f.name

def test_what_serves_pages_listens_to_this_machine_alone():
    make = (root/'Makefile').read_text(encoding='utf-8')
    assert '/jupyter lab --ip=127.0.0.1\n' in make and '--Voila.ip=127.0.0.1 --Voila.auto_token=True' in make
    assert '0.0.0.0' not in make
