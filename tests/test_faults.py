"Faults that are injected for real, and what must happen; the table of all of them is data/faults.csv"
import json, multiprocessing, os, re, shutil, signal, subprocess, sys, time, tracemalloc, zipfile, zlib
import numpy as np, pytest, torch
from contextlib import contextmanager
from fastcore.script import CliError
from pathlib import Path
from PIL import Image
from cwcl.checkpoint import load_model, save_model
from cwcl.core import InputError, recipe
from cwcl.data.cholec import frame_table
from cwcl.data.files import INDEX
from cwcl.data.folders import unpacked
from cwcl.data.images import MOST_PIXELS, picture_size, read_image, read_mask
from cwcl.data.labels import save_png
from cwcl.data.store import mapped_array
from cwcl.data.streams import cwcl_dls
from cwcl.film import probe_video, read_film, video_writer
from cwcl.results import evaluate
from cwcl.script import one_line_errors
from cwcl.study.records import read_result
from cwcl.tasks import CWCLNet
from cwcl.whole import read_tensors, save_tensors, sealed
from commands import run_command
from test_resume import names

root = Path(__file__).parent.parent
posix = pytest.mark.skipif(os.name == 'nt', reason='Windows has no such limits')

@pytest.fixture(scope='module')
def net(): return CWCLNet(recipe('smoke'), (.4, .3, .3), (.2, .2, .2)).eval()

def film(path, n=6, size=(48,64)):
    rng = np.random.default_rng(0)
    with video_writer(path, 25) as add:
        for _ in range(n): add(rng.integers(0, 255, (*size, 3), dtype=np.uint8))
    return path

# The disk

@contextmanager
def no_more_than(n):
    "Every file ends after so many bytes, as on a full disk, whoever writes it"
    import resource
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (n, before[1]))
    try: yield
    finally: resource.setrlimit(resource.RLIMIT_FSIZE, before)

def write_array(path):
    def fill(out): out[:] = 1
    mapped_array(path, (100, 100), fill)

WRITERS = dict(weights=lambda p, net: save_model(p, net), film=lambda p, net: film(p),
    mask=lambda p, net: save_png(p, np.random.default_rng(0).integers(0, 255, (60,60), dtype=np.uint8)),
    frames=lambda p, net: write_array(p))

@posix
@pytest.mark.parametrize('full', [0, 100, 2000])
@pytest.mark.parametrize('kind,name', [('weights', 'a.safetensors'), ('film', 'a.mp4'), ('mask', 'a.png'),
    ('frames', 'a.npy')])
def test_a_disk_that_takes_no_more(tmp_path, net, kind, name, full):
    path = tmp_path/name
    with pytest.raises(InputError, match=r'a\.\w+: cannot be written: .*; choose another') as e, no_more_than(full):
        WRITERS[kind](path, net)
    assert '\n' not in str(e.value)
    assert {o for o in names(tmp_path) if not o.endswith('.lease')} <= {'a.md'}
    WRITERS[kind](path, net)
    assert path.stat().st_size > 2000

def test_a_folder_that_vanishes_is_made_again_or_named(tmp_path, net, monkeypatch):
    real = os.replace
    def gone(a, b):
        shutil.rmtree(tmp_path/'run')
        real(a, b)
    with monkeypatch.context() as m, pytest.raises(InputError, match='vanished'):
        m.setattr(os, 'replace', gone)
        save_model(tmp_path/'run'/'a.safetensors', net)
    assert save_model(tmp_path/'run'/'a.safetensors', net).exists()

# Files: a bit turns over

def turned(content, rng):
    bit = int(rng.integers(8*len(content)))
    found = bytearray(content)
    found[bit//8] ^= 1 << bit%8
    return bytes(found)

def flip(path, read, seen, n=200, seed=0):
    "How many of n turned bits were refused; `seen` judges what was read of the others"
    content = path.read_bytes()
    rng = np.random.default_rng(seed)
    refused = 0
    for _ in range(n):
        path.write_bytes(turned(content, rng))
        try: assert seen(read(path))
        except InputError as e:
            refused += 1
            assert path.name in str(e) and '\n' not in str(e)
    path.write_bytes(content)
    return refused

@pytest.fixture
def picture(tmp_path):
    rng = np.random.default_rng(0)
    return np.kron(rng.integers(0, 255, (6,8,3), dtype=np.uint8), np.ones((8,8,1), np.uint8))

@pytest.mark.parametrize('read', [read_image, read_mask])
def test_a_turned_bit_of_a_png_is_refused_or_harmless(tmp_path, picture, read):
    "Each chunk that makes the pixels has a checksum; others are not read"
    Image.fromarray(picture).save(tmp_path/'a.png')
    assert flip(tmp_path/'a.png', read, lambda a: (a == picture).all()) > 190

def test_a_turned_bit_of_a_jpeg_may_pass(tmp_path, picture):
    "JPEG has no checksum: what decodes is a picture of that size, and nothing else is raised"
    Image.fromarray(picture).save(tmp_path/'a.jpg')
    flip(tmp_path/'a.jpg', read_image, lambda a: a.dtype == np.uint8 and a.ndim == 3)

def test_a_turned_bit_of_weights_is_refused(tmp_path, net):
    path = save_model(tmp_path/'a.safetensors', net)
    whole = net.state_dict()
    def same(o): return all(torch.equal(v, whole[k]) for k,v in o.state_dict().items())
    assert flip(path, lambda p: load_model(p, 'cpu'), same, n=60) > 55

def test_a_turned_bit_of_a_result_is_refused(tmp_path):
    facts = dict(kind='cwcl run', version=1, key='a', recipe=dict(seed=1))
    facts['test'] = dict(mean_iou=.5136, confusion=[[9]*8]*8)
    path = tmp_path/'a.json'
    path.write_text(json.dumps(sealed(facts), indent=1))
    assert flip(path, read_result, lambda found: facts.items() <= found.items()) > 150

def test_a_turned_bit_of_the_index_costs_a_reading_at_most(tmp_path, scenes):
    data = Path(shutil.copytree(scenes, tmp_path/'data'))
    whole = frame_table(data, False)
    index = data/INDEX
    content = index.read_bytes()
    rng = np.random.default_rng(0)
    for _ in range(12):
        index.write_bytes(turned(content, rng))
        try: assert list(frame_table(data, False).image) == list(whole.image)
        except InputError as e: assert '\n' not in str(e)

def test_a_turned_bit_of_a_film_stops_in_one_line_or_is_painted_over(tmp_path):
    path = film(tmp_path/'a.mp4')
    def read(p): return [frame.shape for _,frame in read_film(p)]
    flip(path, read, lambda found: all(len(o) == 3 for o in found), n=100)

# Files: larger than they seem

def huge_png(path, width, height):
    "A header that promises much, with nothing behind it"
    def four(n): return n.to_bytes(4, 'big')
    def chunk(name, data): return four(len(data)) + name + data + four(zlib.crc32(name + data))
    head = four(width) + four(height) + b'\x08\x02\0\0\0'
    chunks = chunk(b'IHDR', head) + chunk(b'IDAT', zlib.compress(b'')) + chunk(b'IEND', b'')
    path.write_bytes(b'\x89PNG\r\n\x1a\n' + chunks)

@pytest.mark.parametrize('size', [(60_000, 60_000), (2**31-1, 2**31-1), (MOST_PIXELS//100 + 1, 100)])
@pytest.mark.parametrize('read', [read_image, read_mask, picture_size])
def test_an_absurdly_large_picture_is_refused_by_its_header(tmp_path, size, read):
    huge_png(tmp_path/'a.png', *size)
    with pytest.raises(InputError, match='a.png: (another kind of file|unreadable)'): read(tmp_path/'a.png')

def test_a_large_file_and_what_is_no_file_are_not_read(tmp_path):
    with open(tmp_path/'a.png', 'wb') as f: f.truncate(2**30 + 1)
    with pytest.raises(InputError, match='a file of 1.1 GB'): read_image(tmp_path/'a.png')
    (tmp_path/'a.png').unlink()
    (tmp_path/'a.png').mkdir()
    with pytest.raises(InputError, match='not a file'): read_image(tmp_path/'a.png')

@posix
def test_a_pipe_in_the_place_of_a_picture_does_not_wait_for_ever(tmp_path):
    os.mkfifo(tmp_path/'a.png')
    with pytest.raises(InputError, match='not a file'): read_image(tmp_path/'a.png')

def test_a_member_that_unpacks_to_much_more_takes_no_memory(tmp_path):
    with zipfile.ZipFile(tmp_path/'a.zip', 'w', zipfile.ZIP_DEFLATED) as z:
        z.writestr('video01/video01_00080/frame_80_endo.png', bytes(2**26))
    tracemalloc.start()
    try:
        to = unpacked(tmp_path/'a.zip', cache_dir=tmp_path/'cache')
        most = tracemalloc.get_traced_memory()[1]
    finally: tracemalloc.stop()
    assert next(to.rglob('*.png')).stat().st_size == 2**26 and most < 2**24

@pytest.mark.parametrize('name', ['../../a.png', '/tmp/a.png', 'C:/a.png', 'video01/../../a.png', '..\\a.png'])
def test_a_member_that_climbs_out_is_refused(tmp_path, name):
    with zipfile.ZipFile(tmp_path/'a.zip', 'w') as z: z.writestr(name, b'1')
    with pytest.raises(InputError, match='would land outside'): unpacked(tmp_path/'a.zip', cache_dir=tmp_path/'cache')
    assert names(tmp_path) == ['a.zip']

@posix
def test_a_link_within_a_zip_is_a_text(tmp_path):
    info = zipfile.ZipInfo('video01/video01_00080/frame_80_endo.png')
    info.external_attr = 0o120777 << 16
    with zipfile.ZipFile(tmp_path/'a.zip', 'w') as z: z.writestr(info, '/etc/passwd')
    file = next(unpacked(tmp_path/'a.zip', cache_dir=tmp_path/'cache').rglob('*.png'))
    assert not file.is_symlink() and file.read_text() == '/etc/passwd'

@pytest.mark.parametrize('text', ['ffconcat version 1.0\nfile secret.mp4\n',
    '#EXTM3U\n#EXT-X-TARGETDURATION:9\n#EXTINF:9,\nsecret.mp4\n#EXT-X-ENDLIST\n'])
def test_a_film_that_names_other_files_is_not_opened(tmp_path, text):
    film(tmp_path/'secret.mp4')
    (tmp_path/'a.mp4').write_text(text)
    with pytest.raises(InputError, match='a.mp4: '): probe_video(tmp_path/'a.mp4')

def test_a_network_of_a_billion_channels_is_refused_before_it_is_built(tmp_path, net):
    save_model(tmp_path/'a.safetensors', net)
    tensors,header = read_tensors(tmp_path/'a.safetensors', '')
    facts = json.loads(header['recipe']) | dict(widths=[10**6]*5)
    save_tensors(tmp_path/'a.safetensors', tensors, header | dict(recipe=json.dumps(facts)))
    with pytest.raises(InputError, match='this network needs'): load_model(tmp_path/'a.safetensors', 'cpu')

# Numbers

@pytest.mark.parametrize('value', [float('nan'), float('inf')])
def test_weights_that_are_no_numbers_are_refused(tmp_path, value):
    broken = CWCLNet(recipe('smoke'))
    with torch.no_grad(): broken.decoder.head.weight[0] = value
    path = save_model(tmp_path/'a.safetensors', broken)
    with pytest.raises(InputError, match='decoder.head.weight holds NaN or infinity'): load_model(path, 'cpu')

def test_answers_that_are_no_numbers_have_no_score(table, dls):
    broken = CWCLNet(recipe('smoke')).eval()
    with torch.no_grad(): broken.decoder.head.bias[0] = float('nan')
    rows = table[table['mask'] != ''].head(2)
    with pytest.raises(InputError, match='NaN or infinity, which has no class'): evaluate(broken, dls, rows)

# Memory

@pytest.mark.slow
@pytest.mark.skipif(sys.platform != 'linux', reason='what a process has is read from /proc')
@pytest.mark.parametrize('script', ['cwcl_data', 'cwcl_train', 'cwcl_predict'])
def test_memory_that_is_refused_is_one_line(tmp_path, scenes, script):
    "Loading a library, starting a thread, making an array; some libraries then end the process themselves"
    to = '--overwrite', '--out', 'out'
    args = dict(cwcl_data=['audit', scenes], cwcl_predict=[film(tmp_path/'a.mp4', 9, (240, 320)), *to],
        cwcl_train=['--data', scenes, *'--preset smoke --budget .5 --epochs 2'.split(), *to])
    codes = []
    for spare in (4, 16, 30, 60, *range(100, 1000, 75), 3000):
        p = run_command(script, *args[script], cwd=tmp_path, spare=spare)
        codes.append(p.returncode)
        assert not list(tmp_path.rglob('*.part.*')) and 'Traceback' not in p.stderr, p.stderr
        last = ''.join(p.stderr.splitlines()[-1:])
        of_a_library = p.returncode < 0 or p.returncode == 127
        says = re.match(f'{script}: (out of memory|cpu: out of memory in a step|.*mostly memory is short)', last)
        assert p.returncode == 0 or of_a_library or says, p.stderr
    assert any(o == 1 for o in codes) and not codes[-1]

# The machine

@pytest.mark.skipif(not hasattr(os, 'fork'), reason='a worker that is spawned does not know what is injected')
def test_a_worker_that_is_killed(table, smoke, monkeypatch):
    "As Linux does to the largest process when memory ends"
    dls = cwcl_dls(table, smoke, device='cpu', workers=1)
    me = os.getpid()
    def gather(*_):
        assert os.getpid() != me
        os.kill(os.getpid(), signal.SIGKILL)
    monkeypatch.setattr(type(dls.train), 'gather', gather)
    monkeypatch.setattr(type(dls.train.fake_l), 'multiprocessing_context', multiprocessing.get_context('fork'))
    @one_line_errors
    def cwcl_train(): list(dls.train)
    with pytest.raises(CliError, match='cwcl_train: a helper process was killed, mostly for lack'): cwcl_train()

@pytest.mark.slow
def test_an_installation_that_nobody_may_write_to(tmp_path, scenes):
    "Root may write everywhere: there what the files hold must tell"
    home = tmp_path/'site'
    for o in ('cwcl', 'data'): shutil.copytree(root/o, home/o, ignore=shutil.ignore_patterns('__pycache__', 'results'))
    for o in [*home.rglob('*')]: o.chmod(0o555 if o.is_dir() else 0o444)
    home.chmod(0o555)
    def held(): return {o: o.read_bytes() for o in home.rglob('*') if o.is_file()}
    before = held()
    out = tmp_path/'out'
    out.mkdir()
    args = f'--data {scenes} --preset smoke --budget .5 --epochs 1 --out {out}/run'.split()
    env = dict(os.environ, PYTHONPATH=str(home), HOME=str(out), PYTHONDONTWRITEBYTECODE='1', MPLCONFIGDIR=str(out))
    python = [sys.executable, '-W', 'ignore']
    where = subprocess.run([*python, '-c', 'import cwcl; print(cwcl.__file__)'], cwd=out, env=env, capture_output=True)
    assert os.fsdecode(where.stdout).startswith(str(home))
    p = subprocess.run([*python, '-m', 'cwcl.train', *args], cwd=out, env=env, text=True, capture_output=True)
    assert not p.returncode and (out/'run'/'metrics.json').exists(), p.stderr
    assert held() == before

@pytest.mark.slow
def test_no_warning_is_ours(scenes, tmp_path):
    "Every module is imported, and a training is done"
    pytest.importorskip('anywidget')
    code = '''
import importlib, pkgutil, sys, warnings
warnings.filterwarnings('error', module='cwcl')
import cwcl
for o in pkgutil.walk_packages(cwcl.__path__, 'cwcl.'): importlib.import_module(o.name)
from cwcl.train import cwcl_train
cwcl_train(sys.argv[1], preset='smoke', budget=.5, epochs=1, out=sys.argv[2])
'''
    p = subprocess.run([sys.executable, '-c', code, scenes, tmp_path/'run'], capture_output=True, text=True)
    assert not p.returncode and (tmp_path/'run'/'metrics.json').exists(), p.stderr

# A request to end

@pytest.mark.slow
@pytest.mark.parametrize('sign,code', [(signal.SIGTERM, 143), (signal.SIGINT, 130)])
def test_a_request_to_end_leaves_a_checkpoint_and_its_code(scenes, tmp_path, sign, code):
    args = '--preset smoke --budget .5 --epochs 1000 --change threads=1 --out run'.split()
    p = subprocess.Popen([sys.executable, '-W', 'ignore', '-m', 'cwcl.train', '--data', scenes, *args], cwd=tmp_path,
        env=dict(os.environ, PYTHONPATH=str(root)), stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True)
    last = tmp_path/'run'/'checkpoint'/'last.safetensors'
    for _ in range(1200):
        if last.exists() or p.poll() is not None: break
        time.sleep(.1)
    p.send_signal(sign)
    _,err = p.communicate(timeout=60)
    assert p.returncode == code and 'Traceback' not in err, err
    assert last.exists() and not list(tmp_path.rglob('*.part.*'))

@pytest.mark.skipif(sys.platform != 'linux', reason='macOS and Windows refuse such names')
def test_names_of_any_bytes(tmp_path, scenes):
    "Blanks, a new line, and bytes that are no text"
    folder = os.fsdecode(bytes(tmp_path) + b'/a b\nc\xff')
    shutil.copytree(scenes, f'{folder}/data')
    p = run_command('cwcl_data', 'audit', f'{folder}/data')
    assert p.returncode == 0 and 'Traceback' not in p.stderr, p.stderr
    p = run_command('cwcl_train', '--data', f'{folder}/nowhere', '--preset', 'smoke')
    assert p.returncode == 1 and len(p.stderr.splitlines()) == 1, p.stderr
