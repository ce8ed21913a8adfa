"Files and texts of strangers: read rightly, or refused in one line; tools/fuzz.py looks for more of them"
import atexit, faulthandler, io, json, os, random, re, shutil, signal, struct, tempfile, zipfile, zlib
import numpy as np, pytest
from fastai.callback.core import Callback, CancelFitException
from functools import cache
from fuzz import mutate, trouble
from pathlib import Path
from PIL import Image
from cwcl.checkpoint import check_device, load_model, save_model
from cwcl.core import InputError, Recipe, find_method, recipe, set_seed
from cwcl.data.cholec import audit, audit_text, frame_table
from cwcl.data.classes import OwnClasses
from cwcl.data.files import INDEX, mask_facts, scan
from cwcl.data.folders import data_root
from cwcl.data.images import picture_size, read_image, read_mask
from cwcl.data.join import frame_phases
from cwcl.data.labels import PHASES, class_set, decode_mask
from cwcl.data.lists import class_text, video_names
from cwcl.data.outlines import coco_masks
from cwcl.data.own import add_labels, own_phases, own_split, own_table
from cwcl.data.phases import read_phases
from cwcl.data.store import load_image
from cwcl.data.streams import cwcl_dls
from cwcl.options import given_recipe, parse_changes, run_key, without_phases
from cwcl.study.command import _integers
from cwcl.study.records import invented_run, read_result
from cwcl.whole import digest

pytestmark = pytest.mark.filterwarnings('ignore')
CLASSES = 'bed=0, tool=5|9, gut=#102030'

@cache
def home():
    "Return a folder for all files, which goes with this process"
    path = tempfile.mkdtemp(prefix='fuzz-')
    atexit.register(shutil.rmtree, path, ignore_errors=True)
    return Path(path)

def put(name, data):
    "Write a file and return its path"
    path = home()/name
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(data)
    return path

def picture(im, kind='PNG', **kwargs):
    "Return the bytes of a picture file"
    out = io.BytesIO()
    im.save(out, kind, **kwargs)
    return out.getvalue()

def pictures():
    "Return pictures of every kind and mode, one of them turned, one animated, one of two pages"
    modes = dict(PNG='1 L LA P RGB RGBA I;16', TIFF='1 L RGB CMYK LAB YCbCr F I I;16B', JPEG='L RGB CMYK',
        BMP='1 L P RGB', WEBP='RGB RGBA')
    plain = [picture(Image.new(m, (5, 4)), k) for k,v in modes.items() for m in v.split()]
    im = Image.new('L', (5, 4), 50)
    exif = Image.Exif()
    exif[0x0112] = 6
    several = [picture(im, k, save_all=True, append_images=[im]) for k in ('PNG', 'TIFF')]
    return [*plain, *several, picture(im, exif=exif)]

@cache
def tiny():
    "Return the recipe of a network of two levels"
    return recipe('smoke', class_set=CLASSES, use_phase=False, widths=(2, 4), scales=1, dim=2, height=12, width=16,
        crop=8, window=8, batch=4, labelled=2, budget=1., threads=1)

@cache
def own():
    "Return the table of three operations of two frames, split"
    rng = np.random.default_rng(0)
    for i in range(6):
        put(f'own/image/op{i//2}/f{i}.png', picture(Image.fromarray(rng.integers(0, 256, (12, 16, 3), np.uint8))))
        put(f'own/mask/op{i//2}/f{i}.png', picture(Image.fromarray(rng.choice(np.uint8([0, 5, 9]), (12, 16)))))
    return own_split(own_table(home()/'own/image', home()/'own/mask', CLASSES), tiny(), ['op1'])

@cache
def loaders(): return cwcl_dls(own(), tiny(), device='cpu')

def train(folder, *cbs):
    "Train a network, from the checkpoint in a folder if one is there"
    learn = find_method(tiny().method).make(loaders(), tiny().method, tiny())
    learn.add_cbs(cbs)
    with learn.no_bar(), learn.no_logging(): learn.fit_resumed(folder)
    return learn

def undigested(path):
    "Return a safetensors file without its digest, which a stranger could compute as well"
    data = path.read_bytes()
    end = 8 + int.from_bytes(data[:8], 'little')
    header = json.loads(data[8:end])
    header['__metadata__'].pop('digest', None)
    said = json.dumps(header, sort_keys=True).encode()
    return len(said).to_bytes(8, 'little') + said + data[end:]

@cache
def trained():
    "Return weights and a checkpoint"
    set_seed(0)
    weights = save_model(home()/'model.safetensors', train(home()/'trained').model)
    return [undigested(o) for o in (weights, home()/'trained/last.safetensors')]

@cache
def seg8k():
    "Return a folder of one frame in the layout of CholecSeg8k"
    for o in ('', '_watershed_mask'):
        pixels = picture(Image.new('RGB', (5, 4), (50, 50, 50)))
        os.utime(put(f'seg8k/video01/video01_00080/frame_80_endo{o}.png', pixels), (10**9,)*2)
    put('seg8k/phase_annotations/video01-phase.txt', b'0\t0\n')
    return home()/'seg8k'

@cache
def indexed():
    "Return the index of that folder below its first line, which is a digest"
    scan(seg8k())
    return (seg8k()/INDEX).read_bytes().partition(b'\n')[2]

def zips():
    "Return zips of that folder: one with its folders, and one that is packed in another way"
    out = io.BytesIO()
    with zipfile.ZipFile(out, 'w', zipfile.ZIP_LZMA) as z:
        for o in sorted(seg8k().rglob('*.png')): z.write(o, o.relative_to(home()))
    return [Path(shutil.make_archive(home()/'seg8k', 'zip', home(), 'seg8k')).read_bytes(), out.getvalue()]

def result():
    "Return the result of a run as it is published"
    run = invented_run('dcl', .05, 0, 0)
    r = json.loads(recipe('study').to_json())
    return json.dumps(run | dict(kind='cwcl run', version=1, kit='0.1', key='a', recipe=r))

def triplets():
    "Return phases as CholecT50 has them"
    names = {str(i): o for i,o in enumerate(PHASES)}
    return json.dumps(dict(fps=1, categories=dict(phase=names), annotations={'0': [[0]*15], '2': [[-1]*14 + [2.]]}))

def coco():
    "Return outlines in a frame"
    outlines = [[1, 1, 8, 1, 8, 8]],dict(size=[12, 16], counts=[20, 50, 122])
    notes = [dict(id=i, image_id=1, category_id=5, segmentation=o) for i,o in enumerate(outlines)]
    frames = [dict(id=1, file_name='op0/f0.png', height=12, width=16)]
    return json.dumps(dict(images=frames, categories=[dict(id=5, name='tool')], annotations=notes))

TARGETS = {} # Name to (function of bytes, function that returns inputs to begin with)

def target(*seeds):
    "Register a function of bytes, with texts to begin with, or a function that returns files"
    def add(f):
        TARGETS[f.__name__] = f,seeds[0] if callable(seeds[0]) else lambda: [o.encode() for o in seeds]
        return f
    return add

def calm(f, *args, **kwargs):
    "Call a parser; `None` if it refuses its input in one line"
    try: return f(*args, **kwargs)
    except InputError as e: said = str(e)
    assert not re.search(r'[\n\r]', said), f'several lines: {said[:300]!r}'
    assert len(said) < 3000, f'a long line: {said[:300]!r}'

def text(data): return data.decode('utf-8', 'ignore').replace('\0', '')

def mask(a):
    "Decode a mask in every way"
    ids = calm(decode_mask, a)
    if ids is not None: assert ids.shape == a.shape[:2] and mask_facts(a)
    for f in (class_set(8).read, OwnClasses(CLASSES).read, OwnClasses(CLASSES).unknown): calm(f, a)

@target(pictures)
def image(data):
    size,frame,pixels = (calm(f, put('image.png', data)) for f in (picture_size, read_image, read_mask))
    if frame is not None: assert frame.shape == (*size[::-1], 3) and frame.dtype == np.uint8
    if pixels is not None: mask(pixels)

@target(lambda: [bytes([k, n, 4, 5, 3]) + bytes(range(60)) for k in range(13) for n in range(5)])
def array(data):
    kinds = 'u1 u2 >u2 i1 i8 f2 f4 f8 ? c8 S3 U2 M8[s]'.split()
    k,n,*shape = data[:5].ljust(5, b'\0')
    kind = np.dtype(kinds[k % len(kinds)])
    body = data[5:][:max(len(data) - 5, 0)//kind.itemsize*kind.itemsize]
    a = np.resize(np.frombuffer(body, kind), [o % 8 for o in shape*2][:n % 5])
    mask(a)
    calm(load_image, a, (4, 4))

def phases(path):
    "Read phases, and look frames up in them"
    found = calm(read_phases, path)
    if found is not None: assert found.between(-1, 6).all() and found.index.is_monotonic_increasing
    calm(frame_phases, ['video01']*3, [0, 30, 10**9], path)

@target('Frame\tPhase\n0\tPreparation\n25\tClippingCutting\n', 'frame,phase,hook\n0,0,1\n1,0,1\n2,1,0\n',
    '0.0\t0.0\n25.0\t1.0\n', '\n"Frame" "Surgical phase"\n0 "Preparation"\n', 'Phase_ID;Frame No\n0;0\n1,0;25,0\n')
def phase(data): phases(put('video01-phase.txt', data))

@target(triplets())
def triplet(data): phases(put('VID01.json', data))

@target(recipe('smoke').to_json(), tiny().to_json(), result())
def settings(data):
    r = calm(given_recipe, put('recipe.json', data), 'smoke', {})
    if r is None: return
    assert Recipe.from_json(r.to_json()) == r
    assert Path(run_key(r)).name == run_key(r), f'results elsewhere: {run_key(r)}'
    calm(class_set, r.class_set, r.left_out)
    set_seed(r.seed)

@target(result(), recipe('study').to_json())
def results(data):
    right = {'metrics.json': result(), 'recipe.json': recipe('study').to_json()}
    files = [*right, *(f'pretrain/{o}' for o in right)]
    found = [calm(read_result, put('a.json', data))]
    for one in files:
        for o in files: put(f'run/{o}', data if o == one else right[Path(o).name].encode())
        found.append(calm(read_result, home()/'run'))
    for o in filter(None, found): assert isinstance(o['key'], str) and isinstance(o['recipe'], dict), 'no key or recipe'

@target(lambda: trained()[:1])
def weights(data): calm(load_model, put('model.safetensors', data), 'cpu')

class Stop(Callback):
    "Train no step"
    def before_train(self): raise CancelFitException

@target(lambda: trained()[1:])
def checkpoint(data): calm(train, put('kept/last.safetensors', data).parent, Stop())

@target(CLASSES, 'a=1|2, b=#ff0000, ignore=3')
def classes(data):
    for f in (class_text, class_set): calm(f, text(data) if b'=' in data else text(data) + '=1')

@target('name,value\nbed,0\ntool,5|9\n', 'Name;Red;Green;Blue\nbed;1;2;3\ntool;4;5;6\n', coco(),
    '[{"name": "bed", "color": [1, 2, 3]}, {"name": "tool", "classid": 5}]')
def class_file(data):
    for o in ('classes.csv', 'classes.json'): calm(class_text, put(o, data))

@target('name,bed,tool,gut\nop0/f0,0,1,1\nop2/f5.png,true,FALSE,1.0\n')
def labels(data): calm(add_labels, own().assign(mask=''), put('labels.csv', data), OwnClasses(CLASSES))

@target('name,phase\nop0/f0.png,1\nop2/f5,0\n', 'name\tphase\nf1\tcut\n', 'frame,phase\n0,cut\n3,sew\n',
    'frame,phase\n1.0,0\n')
def own_phase(data):
    for o in (put('phases.csv', data), put('own_phases/op0.txt', data).parent): calm(own_phases, own(), o)

@target('name,video\nop0/f0,a\nop0/f1,a\nop1/f2,b\nop1/f3,b\nop2/f4,c\nop2/f5,c\n')
def videos(data): calm(video_names, [*own().name], put('videos.csv', data))

@target('(op[0-9]+)/', '(.*)_', '(?P<a>.)(?:f|g){2}\\d')
def rule(data): calm(video_names, [*own().name], '(' + text(data))

@target(coco())
def outlines(data):
    images = {o: home()/f'own/image/{o}.png' for o in own().name}
    calm(coco_masks, put('own/coco.json', data), images, OwnClasses(CLASSES), home()/'drawn')

@target('temp=0.1,use_phase=False', 'widths=(8, 16),seed=3', 'class_set=10,name=a,lr=1e-3')
def change(data):
    found = calm(parse_changes, text(data))
    if found: calm(recipe, 'smoke', **found)
    calm(without_phases, None, text(data))

@target('0,1,2', 'op0,op2', 'cuda:1', 'image/*/f?.png', '**/mask', '*/{class}.png', 'meta', 'mps', '13')
def options(data):
    said = text(data).replace('..', '').lstrip('/')
    for f in (check_device, class_set, lambda o: _integers(o, 'folds')): calm(f, said)
    calm(own_split, own(), tiny(), said, said)
    for o in ('image/*/*', said): calm(own_table, home()/'own'/o, home()/'own'/said, CLASSES, drawn=home()/'drawn')

@target(lambda: [indexed()])
def index(data):
    content = f'# {digest(data.decode("utf-8", "replace"))}\n'.encode() + data
    for f in (frame_table, audit): found = put(f'seg8k/{INDEX}', content) and calm(f, seg8k(), workers=1)
    if found is not None: audit_text(found)

@target(zips)
def archive(data):
    path = put('zip/a.zip', data)
    folder = calm(data_root, path, cache_dir=home()/'zip/cache')
    if folder: calm(frame_table, folder, workers=1)
    assert {o.name for o in path.parent.iterdir()} <= {'a.zip', 'cache'}, 'files elsewhere'
    shutil.rmtree(home()/'zip/cache', ignore_errors=True)

def swap(data, *path):
    "Replace what a path leads to by its last part: in JSON, in JSON within it, or in the header of a safetensors file"
    if isinstance(data, bytes):
        end = 8 + int.from_bytes(data[:8], 'little')
        said = swap(data[8:end].decode(), '__metadata__', *path).encode()
        return len(said).to_bytes(8, 'little') + said + data[end:]
    o = json.loads(data)
    k,*rest = path
    if len(rest) == 1: o[k] = rest[0]
    elif isinstance(o[k], str): o[k] = swap(o[k], *rest)
    else: o[k] = json.loads(swap(json.dumps(o[k]), *rest))
    return json.dumps(o)

def field(k, v): return swap(tiny().to_json(), k, v)
def note(k, v=0): return swap(triplets(), 'annotations', {'0': [[0]*15], k: [[0]*14 + [v]]})
def outline(i, o): return swap(coco(), 'annotations', i, 'segmentation', o)
def size(v): return swap(coco(), 'images', 0, 'height', v)
def net(*path): return swap(trained()[0], *path)
def state(*path): return swap(trained()[1], 'state', *path)

def zip_with(*patches):
    "Return a zip with other bytes, so far behind the signature of its last header of a kind"
    data = zips()[1]
    for kind,at,new in patches:
        i = data.rfind(kind) + at
        data = data[:i] + new + data[i+len(new):]
    return data

def tiff(bits, samples, *tags):
    "Return a TIFF of one pixel whose samples are 1, and at 16 bits 257"
    tags = [(256, 1), (257, 1), (258, bits), (259, 1), (262, 2 if samples > 2 else 1), (273, 8), (277, samples),
        (278, 1), (279, bits*samples//8), *tags]
    body = b'\1'*16
    rows = b''.join(struct.pack('<HHII', k, 3, 1, v) for k,v in sorted(tags))
    return b'II*\0' + struct.pack('<I', 8 + len(body)) + body + struct.pack('<H', len(tags)) + rows + b'\0'*4

NESTED,DIGITS,HEX,LETTERS = '['*100_000,'9'*5000,'0x' + 'f'*5000,'a'*140_000
CSV = f'name,value\na,"{LETTERS}"\n'
FINDS = [ # (target, input); those that take long to write, or a training, are made when they are needed
    ('image', lambda: tiff(8, 2, (338, 1))),
    ('phase', '9'*20 + '\t0\n'), ('phase', DIGITS + '\t0\n'), ('phase', '0\t' + DIGITS + '\n'),
    ('triplet', NESTED), ('triplet', lambda: note('9'*13)), ('triplet', lambda: note('9'*25)),
    ('triplet', lambda: note(str(2**63))), ('triplet', lambda: note(DIGITS)), ('triplet', lambda: note('1', 10**400)),
    ('triplet', lambda: swap(triplets(), 'categories', 'phase', '0', DIGITS)),
    ('settings', b'\xff'), ('settings', NESTED), ('settings', DIGITS), ('settings', lambda: field('seed', DIGITS)),
    ('settings', lambda: field('class_set', ['a=1'])), ('settings', lambda: field('class_set', 'a=1, b=' + DIGITS)),
    ('settings', lambda: field('name', '../../x')), ('settings', lambda: field('\n', 1)),
    ('settings', lambda: field('seed', 2**64)),
    ('results', b'\xff'), ('results', NESTED), ('results', '[]'), ('results', lambda: swap(result(), 'recipe', None)),
    ('weights', lambda: net('recipe', NESTED)), ('weights', lambda: net('recipe', 'widths', [10**300]*2)),
    ('weights', lambda: net('recipe', 'dim', 10**300)), ('weights', lambda: net('recipe', 'class_set', ['='])),
    ('weights', lambda: trained()[0].replace(b'"encoder.levels.0.0.weight"', b'"encoder\\nevels.0.0.weight"')),
    ('checkpoint', lambda: swap(trained()[1], 'state', NESTED)), ('checkpoint', lambda: state('model', {})),
    ('checkpoint', lambda: state('model', 'mean', 5)), ('checkpoint', lambda: state('epoch', None)),
    ('checkpoint', lambda: state('epoch', -1)), ('checkpoint', lambda: state('opt', 'hypers', [])),
    ('checkpoint', lambda: state('parts', 5)),
    ('classes', 'a=1, b=' + DIGITS),
    ('class_file', CSV), ('class_file', NESTED), ('class_file', 'name,value\na,1\nb,' + DIGITS),
    ('class_file', '[{"name": 5, "classid": 1}]'), ('class_file', '[{"name": ["a"], "classid": 1}]'),
    ('class_file', '[{"name": "a", "color": [Infinity]}]'),
    ('class_file', lambda: 'name,value' + ''.join(f',{i}' for i in range(40_000)) + '\na,1\nb,2\n'),
    ('labels', CSV), ('labels', f'name,bed,tool,gut\n{"/f"*50_000},0,1,1\n'),
    ('own_phase', CSV), ('own_phase', 'frame,phase\n'), ('own_phase', f'frame,phase\n{"9"*400},a\n'),
    ('own_phase', f'name,phase\nop0/f0,{DIGITS}\n'), ('videos', CSV), ('videos', 'name,"a\nb"\n'),
    ('videos', f'name,video\n{"/f"*50_000},a\n'), ('rule', 'a{1,99999999999})'), ('rule', 'a{1,' + DIGITS + '})'),
    ('rule', '('*5000 + ')'*5001), ('rule', '\r'),
    ('outlines', NESTED), ('outlines', lambda: size(10**30)), ('outlines', lambda: size(float('inf'))),
    ('outlines', lambda: size(20_000_000)), ('outlines', lambda: swap(coco(), 'categories', 0, 'id', float('inf'))),
    ('outlines', lambda: outline(0, [[10**400]*6])), ('outlines', lambda: outline(1, dict(counts=[2**63]))),
    ('change', 'seed=1e999'), ('change', 'seed=' + HEX), ('change', 'class_set=' + HEX), ('change', 'lr=' + HEX),
    ('change', 'seed=' + '-'*5000 + '1'), ('change', 'widths=(' + '-'*9000), ('change', ','*130_000 + 'x'),
    ('change', 'seed=1\r2'),
    ('options', 'hpu'), ('options', 'privateuseone'), ('options', 'x'*300), ('options', '{class}/{class}.png'),
    ('options', '*'*40 + 's'), ('options', '\r'),
    ('index', lambda: indexed().replace(b',,,,', b',,x,,', 1)), ('index', lambda: indexed().replace(b',20,', b',x,')),
    ('index', lambda: indexed().replace(b',20,', b',1e999,')), ('index', lambda: indexed().replace(b',5,4,', b',x,4,')),
    ('index', '$'), ('index', ','*24 + '\n' + ','*25),
    ('archive', lambda: zip_with((b'PK\1\2', 6, b'\xff'))),
    ('archive', lambda: zip_with((b'PK\1\2', 8, b'\0\x08'), (b'PK\1\2', 46, b'\xff'))),
    ('archive', lambda: zip_with((b'PK\3\4', 6, b'\0\x08'), (b'PK\3\4', 30, b'\xff')))]

def as_bytes(o):
    "Return an input of the table as bytes"
    o = o() if callable(o) else o
    return o if isinstance(o, bytes) else o.encode('utf-8', 'surrogatepass')

alarm = pytest.mark.skipif(not hasattr(signal, 'SIGALRM'), reason='no alarm here, which ends an input that hangs')

@alarm
@pytest.mark.parametrize('i', range(len(FINDS)), ids=lambda i: f'{FINDS[i][0]}{i}')
def test_what_was_once_found_is_read_or_refused(i):
    name,data = FINDS[i]
    assert trouble(TARGETS[name][0], as_bytes(data), seconds=60) is None

FEW = dict(index=8, checkpoint=30, results=30, weights=40, labels=60, archive=40, change=100, own_phase=100,
    class_file=100, image=100) # Those that take long

@alarm
@pytest.mark.parametrize('name', TARGETS)
def test_what_is_a_little_different_is_read_or_refused(name):
    f,make = TARGETS[name]
    seeds = make()
    rng = random.Random(name)
    inputs = seeds + [mutate(rng.choice(seeds), rng, seeds) for _ in range(FEW.get(name, 200))]
    found = dict(filter(None, (trouble(f, o, seconds=60) for o in inputs)))
    assert not found, '\n'.join(f'{k}: {v}' for k,v in found.items())

@pytest.mark.skipif(not hasattr(os, 'fork'), reason='no fork here')
def test_runs_that_add_up_only_by_overflow_are_refused():
    "In a child, which NumPy would end by a write beyond its memory"
    data = outline(1, dict(counts=[2**62]*4 + [192])).encode()
    own()
    child = os.fork()
    if not child:
        faulthandler.disable()
        os._exit(bool(trouble(TARGETS['outlines'][0], data)))
    assert os.waitpid(child, 0)[1] == 0

def test_a_zip_with_its_folders_is_read(tmp_path):
    folder = data_root(put('whole.zip', zips()[0]), cache_dir=tmp_path)
    assert (folder/'phase_annotations/video01-phase.txt').read_text() == '0\t0\n'
    assert len(frame_table(folder)) == 1

@pytest.mark.parametrize('digits', [20, 200])
def test_the_number_of_a_frame_may_be_any(digits, tmp_path):
    frame = shutil.copytree(seg8k(), tmp_path/'data')/'video01/video01_00080/frame_80_endo.png'
    frame.with_name(f'frame_{"9"*digits}_endo.png').write_bytes(frame.read_bytes())
    for f in (frame_table, audit): calm(f, tmp_path/'data')
    table = own().assign(name=[*own().name[:-1], 'op2/f' + '9'*digits])
    calm(own_phases, table, put('numbers/op2.txt', b'frame,phase\n0,cut\n5,sew\n').parent)

def chunk(kind, body): return struct.pack('>I', len(body)) + kind + body + struct.pack('>I', zlib.crc32(kind + body))

def test_a_mask_of_16_bits_a_channel_is_never_halved():
    head = chunk(b'IHDR', struct.pack('>IIBBBBB', 1, 1, 16, 2, 0, 0, 0))
    pixel = chunk(b'IDAT', zlib.compress(b'\0' + b'\1'*6)) + chunk(b'IEND', b'')
    for early in (b'', chunk(b'tEXt', b'a\0b')):
        with pytest.raises(InputError): read_mask(put('deep.png', b'\x89PNG\r\n\x1a\n' + early + head + pixel))
    assert read_mask(put('deep.tif', tiff(16, 1))).item() == 257
    with pytest.raises(InputError): read_mask(put('deep.tif', tiff(16, 3)))
