"What the tests share."
import os, matplotlib, pytest, torch
from pathlib import Path
from torch._subclasses.fake_tensor import FakeTensorMode
from cwcl.core import recipe, set_seed
from cwcl.data.cholec import frame_table
from cwcl.data.splits import split_frames
from cwcl.data.streams import cwcl_dls
from cwcl.data.synth import write_scenes

matplotlib.use('agg')

# Files that take longest: begun first, so that of two processes neither waits long for the other
LONG = 'grid bench browser resume byol multitask simclr stages_net train command ground own docs streams'.split()
threads = torch.get_num_threads()

def pretends():
    "PyTorch 2.6 for CUDA cannot index on a pretended GPU without a driver"
    try:
        with FakeTensorMode(), torch.device('cuda'): torch.ones(2)[torch.arange(2)]
    except RuntimeError: return False
    return True

def pytest_collection_modifyitems(items):
    def place(o):
        name = o.path.stem.removeprefix('test_')
        return LONG.index(name) if name in LONG else len(LONG)
    items.sort(key=place)
    if pretends(): return
    skip = pytest.mark.skip(reason=f'PyTorch {torch.__version__} cannot pretend a GPU here')
    for o in items:
        if 'pretended' in o.name: o.add_marker(skip)

@pytest.fixture(autouse=True)
def own_threads():
    "Each test begins with the threads that PyTorch began with, also after one that changed them"
    torch.set_num_threads(threads)

@pytest.fixture(scope='session')
def real():
    "Folder with a few real frames and tables; licensed, so never part of the project"
    path = os.environ.get('CWCL_REAL')
    if not path or not Path(path).is_dir(): pytest.skip('CWCL_REAL does not name the folder of real frames')
    return Path(path)

@pytest.fixture(scope='session')
def scenes(tmp_path_factory):
    "A small set of drawn scenes: one frame of each clip, at the size of the smoke recipe"
    return write_scenes(tmp_path_factory.mktemp('scenes')/'data', frames_per_clip=1, size=(107, 60), progress=False)

@pytest.fixture(scope='session')
def smoke():
    "Recipe of the small trainings: one thread, half of the masks"
    return recipe('smoke', budget=0.5, threads=1)

@pytest.fixture(scope='session')
def table(scenes, smoke): return split_frames(frame_table(scenes), smoke)

@pytest.fixture
def dls(table, smoke):
    "Fresh loaders, seeded"
    set_seed(smoke.seed, smoke.threads)
    return cwcl_dls(table, smoke, device='cpu')
