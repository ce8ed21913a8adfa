"The drawn data set: its layout, its classes, and that it is the same everywhere."
import ast, hashlib, inspect, json, shutil
import numpy as np, pandas as pd, pytest
from PIL import Image
from cwcl.core import InputError, data_file
from cwcl.data import chance, organs, scene, synth
from cwcl.data.chance import around, cloud, sample_tile, lumps, smooth_noise, stream
from cwcl.data.labels import CLASSES, PHASES, class_set, color_mask, decode_mask, present_classes
from cwcl.data.organs import CLIPS, COUNTS, anatomy, shore, visible
from cwcl.data.camera import pixel_grid, lit, sway
from cwcl.data.phases import read_phases
from cwcl.data.scene import draw_labels
from cwcl.data.surface import video_look
from cwcl.data.synth import ORDER, clip_frames, render_scene, write_scenes

EIGHT = [0, 1, 2, 4, 5, 6, 9, 10]
SMALL = (107, 60)
SAMPLE = ('video01_00080', 'video01_16345', 'video09_00912', 'video12_15750', 'video12_19740', 'video20_03260',
    'video24_00000', 'video35_00940', 'video43_00547', 'video52_02826')

def labels(clip, at=0, size=SMALL, seed=0):
    frame = int(CLIPS.start[clip]) + at
    return draw_labels(clip[:7], clip, frame, size, seed).mask
def read(path): return np.array(Image.open(path))

@pytest.fixture(scope='module')
def drawn():
    "Masks of eight frames of every clip, small: one row per frame"
    rows = [(c[:7], labels(c, o)) for c in CLIPS.index for o in clip_frames(8)]
    return pd.Series([v for v,_ in rows]),np.stack([m for _,m in rows])

@pytest.fixture(scope='module')
def shown(drawn): return np.stack([present_classes(m, 1) for m in drawn[1]])

# Chance

def test_streams_have_addresses():
    assert stream(0, 1, 2).random() == stream(0, 1, 2).random()
    assert len({stream(0, *k).random() for k in ((1, 2), (2, 1), (1, 3), (1,))}) == 4

@pytest.mark.parametrize('rows,cols', [(4, 4), (2, 16), (32, 32)])
def test_smooth_noise_is_corner_cutting(rows, cols):
    "A literal loop: each value becomes two, three quarters of it and one quarter of a neighbour"
    def cut(line):
        out = []
        for i in range(len(line)): out += [(line[i-1] + 3*line[i])/4, (3*line[i] + line[(i+1)%len(line)])/4]
        return out
    a = (stream(5).random((rows,cols), dtype=np.float32)*2 - 1).tolist()
    while len(a) < 64: a = np.array([cut(list(c)) for c in zip(*a)]).T.tolist()
    while len(a[0]) < 64: a = [cut(r) for r in a]
    assert np.allclose(smooth_noise(stream(5), rows, cols, 64), a, atol=1e-5)

def test_noise_is_periodic_and_bounded():
    a = cloud(stream(3), size=64)
    inner = np.abs(np.diff(a, axis=0)).max()
    seam = np.abs(a[0]-a[-1]).max()
    assert seam <= 1.5*inner and np.abs(smooth_noise(stream(3), 4, 4, 64)).max() <= 1

def test_lumps_are_high_near_their_points():
    points = stream(4).random((9,2), dtype=np.float32)
    n = 64
    want = np.empty((n,n))
    for i in range(n):
        for j in range(n):
            d = [[min(abs((k+.5)/n - c), 1 - abs((k+.5)/n - c)) for k,c in ((j, x), (i, y))] for x,y in points]
            want[i,j] = 1 - min(a*a + b*b for a,b in d)*1.6*9
    assert np.allclose(lumps(stream(4), 9, n), want, atol=1e-4)

def test_look_interpolates():
    tile = cloud(stream(1), octaves=4, size=32)[None]
    rng = np.random.default_rng(0)
    x,y = rng.uniform(-2, 2, (2,50)).astype(np.float32)
    def one(x, y):
        x,y = x*32,y*32
        j,i = int(np.floor(x)),int(np.floor(y))
        at = lambda i,j: tile[0,i%32,j%32]
        return (at(i,j)*(1-x+j) + at(i,j+1)*(x-j))*(1-y+i) + (at(i+1,j)*(1-x+j) + at(i+1,j+1)*(x-j))*(y-i)
    assert np.allclose(sample_tile(tile, x[None], y[None])[0,0], [one(a, b) for a,b in zip(x, y)], atol=1e-4)

@pytest.mark.parametrize('spread', [0, .3, 1])
def test_directions_have_length_one(spread):
    rng = stream(8)
    v = np.array([around(rng, .6, -.8, spread) for _ in range(50)])
    assert np.allclose((v**2).sum(1), 1) and (v @ [.6, -.8] >= 1 - 1.2*spread - 1e-6).all()

def test_sway_is_smooth_and_periodic():
    t = np.linspace(0, 3, 301)
    s = np.array([sway(i) for i in t])
    assert s.min() == 0 and s.max() == 1 and np.abs(np.diff(s)).max() < .04
    assert np.allclose(s[:100], s[100:200], atol=1e-9)

@pytest.mark.parametrize('module', [chance, organs, scene])
def test_labels_use_exact_operations_only(module):
    "Sines, powers, matrix products and sums over floats differ between machines in their last bit; a mask must not"
    allowed = set('sqrt abs minimum maximum floor where sort clip roll stack arange zeros full broadcast_arrays '
        'float32 intp uint8 ndarray random isin'.split())
    for node in ast.walk(ast.parse(inspect.getsource(module))):
        assert not (isinstance(node, ast.BinOp) and isinstance(node.op, ast.MatMult))
        power = isinstance(node, ast.BinOp) and isinstance(node.op, ast.Pow)
        if power: assert ast.unparse(node.right) in ('2', 'o', 'i'), ast.unparse(node)
        if isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name) and node.value.id in ('np', 'math'):
            assert node.attr in allowed, ast.unparse(node)

# Which class, where and how large

def test_classes_live_where_they_do_in_the_table(drawn, shown):
    for v in COUNTS.index:
        share = shown[drawn[0] == v].mean(0)
        table = COUNTS.loc[v].iloc[1:].to_numpy()/COUNTS.frames[v]
        assert not share[table == 0].any(), v
        assert (share[table > .3] > 0).all(), v
        assert (np.abs(share-table) < .15).all(), (v, share-table)

def test_every_class_occurs(shown): assert shown.any(0).all()

def test_visible_keeps_the_counts():
    for v in COUNTS.index:
        n = COUNTS.frames[v]
        count = COUNTS.loc[v].iloc[1:].to_numpy()
        want = np.where(count > .97*n, n, np.where(count > .02*n, count, 0))
        for seed in range(3): assert ((visible(v, seed) > 0).sum(1) == want).all()

def test_areas_are_those_of_the_real_frames(drawn):
    area = 100*np.bincount(drawn[1][:,1:-1,1:-1].ravel(), minlength=13)/drawn[1][:,1:-1,1:-1].size
    factor = np.where(CLASSES.mean_area_pct < .43, 3, 1.5)
    ratio = area/CLASSES.mean_area_pct
    assert (np.abs(np.log(ratio)) < np.log(factor)).all(), ratio.round(2).tolist()

def test_label_sets_are_as_many_as_in_the_real_frames(drawn, shown):
    train = shown[~drawn[0].isin(['video12', 'video52'])]
    assert 18 <= len(np.unique(train[:,EIGHT], axis=0)) <= 36
    assert 28 <= len(np.unique(train, axis=0)) <= 58

def test_shore_claims_what_it_should():
    rng = np.random.default_rng(0)
    for _ in range(20):
        h = rng.random((9,11), dtype=np.float32)
        free = rng.random((9,11)) < .6
        n = int(rng.integers(1, free.sum()))
        level,peak = shore(h, free, n)
        assert (h[free] > level).sum() == n and peak == h[free].max()
    assert shore(h, free, 10_000)[0] == h[free].min()

def test_gallbladder_hangs_at_the_liver():
    near = []
    for c in CLIPS.index[::4]:
        m = labels(c)
        y,x = np.nonzero(m == 10)
        liver = np.argwhere(m == 2)
        if len(x) > 30 and len(liver): near.append(np.abs(liver[:,None] - np.stack([y, x], 1)[None]).max(-1).min())
    assert np.median(near) <= 3

# The mask

def test_masks_are_the_same_everywhere():
    "A checksum of the labels; if it changes, so does every result on the drawn data set"
    h = hashlib.sha256()
    for c in SAMPLE:
        for o in (0, 37): h.update(labels(c, o, (427,240)).tobytes())
    h.update(labels(SAMPLE[4], 20, (854,480)).tobytes())
    h.update(labels(SAMPLE[4], 20, seed=7).tobytes())
    assert h.hexdigest()[:16] == '1cf9bfdd09ac3656'

@pytest.mark.parametrize('clip', SAMPLE[:5])
def test_border_is_white_and_nothing_else_is(clip):
    m = labels(clip, 11, (427,240))
    ring = np.ones(m.shape, bool)
    ring[1:-1,1:-1] = False
    assert m.dtype == np.uint8 and (m[ring] == 255).all() and (m[~ring] < 13).all()

def test_outside_the_window_is_background():
    m,disc = labels('video09_00912', 5, (427,240))[1:-1,1:-1],lit('video09', 0, *pixel_grid((427,240)))[1:-1,1:-1]
    assert (m[~disc] == 0).all() and (m[disc] > 0).all()

@pytest.mark.parametrize('clip', SAMPLE[3:6])
def test_sizes_agree_up_to_edges(clip):
    small,large = labels(clip, 40, (427,240)),labels(clip, 40, (854,480))
    assert (large[::2,::2] == small).mean() > .96

@pytest.mark.parametrize('clip', SAMPLE)
def test_frames_of_a_clip_move_a_little(clip):
    a,b = labels(clip, 30),labels(clip, 31)
    assert (a == b).mean() > .9
    assert (labels(clip, 0) != labels(clip, 60)).any()

def test_clips_and_seeds_differ():
    assert (labels('video43_00547') != labels('video43_00627')).mean() > .1
    assert (labels('video43_00547') != labels('video43_00547', seed=1)).mean() > .1

def test_connective_tissue_has_the_gallbladders_color():
    for v in ('video01', 'video12'):
        c = video_look(v)['color'][0]**(1/2.2)
        assert np.abs(c[6]-c[10]).sum() < .3*np.abs(c[2]-c[10]).sum()

# The picture

def test_a_frame_is_drawn_the_same_twice():
    for size in (SMALL, (427,240)):
        (a,m),(b,n) = (render_scene('video20', 'video20_03260', 3300, size) for _ in range(2))
        assert a.shape == (size[1], size[0], 3) and a.dtype == np.uint8 and (a == b).all() and (m == n).all()
    anatomy.cache_clear()
    assert (render_scene('video20', 'video20_03260', 3300)[1] == m).all()

def test_pictures_are_round_and_neither_black_nor_white():
    for c in SAMPLE:
        image,mask = render_scene(c[:7], c, int(CLIPS.start[c])+10, (214,120))
        inside = image[(mask > 0) & (mask < 255)]
        assert image[mask == 0].mean() < 25 and 40 < inside.mean() < 190 and inside.std() > 20

# The files

def test_layout(scenes):
    images = sorted(scenes.glob('video*/video*_*/frame_*_endo.png'))
    assert len(images) == 101 and len(list(scenes.glob('video*/*/*'))) == 303
    assert {p.parent.name for p in images} == set(CLIPS.index) and len({p.parent.parent.name for p in images}) == 17
    for p in images[::9]:
        clip = p.parent.name
        frame = int(p.name.split('_')[1])
        code,color = (read(p.with_name(p.name.replace('.png', f'_{k}_mask.png'))) for k in ('watershed', 'color'))
        assert clip[:7] == p.parent.parent.name and frame == CLIPS.start[clip]
        assert code.shape == (60, 107, 3)
        assert (code == code[...,:1]).all()
        assert set(np.unique(code)) <= {255, *CLASSES.code}
        mask = decode_mask(code)
        assert (mask == labels(clip)).all() and (color == color_mask(mask, class_set(13).file_colors)).all()
        assert (read(p) == render_scene(clip[:7], clip, frame, SMALL)[0]).all()

def test_phase_files(scenes):
    files = sorted(scenes.glob('phase_annotations/*.txt'))
    assert [p.name for p in files] == [f'{v}-phase.txt' for v in COUNTS.index]
    seen = []
    for p in files:
        raw = p.read_bytes()
        assert raw.startswith(b'Frame\tPhase\r\n0\tPreparation\r\n1\t') and raw.count(b'\n') == raw.count(b'\r\n')
        phases = read_phases(p)
        assert (np.diff(phases) >= 0).all() and phases.index[0] == 0 and set(phases) == set(range(len(PHASES)))
        last = (CLIPS.start + CLIPS.frames)[CLIPS.video == p.name[:7]].max()
        assert phases.index[-1] >= last-1
        seen += [phases[s+40] for s in CLIPS.start[CLIPS.video == p.name[:7]]]
    assert np.mean(np.array(seen) <= 1) > .6 and len(set(seen)) >= 3

def test_fewer_frames_are_among_more():
    assert sorted(ORDER) == list(range(80))
    for n in (1, 8, 20, 80):
        f = np.array(clip_frames(n))
        assert len(f) == n and np.diff([*f, f[0]+80]).max() <= 1.5*80/n
    assert set(clip_frames(8)) < set(clip_frames(20)) < set(clip_frames(80))

def test_workers_make_no_difference(tmp_path):
    a,b = (write_scenes(tmp_path/str(w), 1, (64,36), workers=w, progress=False) for w in (1, 3))
    names = sorted(p.relative_to(a) for p in a.rglob('*.*'))
    assert names == sorted(p.relative_to(b) for p in b.rglob('*.*')) and len(names) == 303+17+1
    assert all((a/n).read_bytes() == (b/n).read_bytes() for n in names)

def test_an_interrupted_write_is_finished_by_the_next(tmp_path, monkeypatch):
    whole = write_scenes(tmp_path/'whole', 1, (64,36), workers=1, progress=False)
    root = tmp_path/'part'
    save = synth.save_png
    calls = []
    def stop(path, image):
        calls.append(path)
        if len(calls) == 100:
            def half(self, f, *args, **kwargs):
                f.write_bytes(b'half')
                raise KeyboardInterrupt
            monkeypatch.setattr(Image.Image, 'save', half)
        save(path, image)
    with monkeypatch.context() as m:
        m.setattr(synth, 'save_png', stop)
        with pytest.raises(KeyboardInterrupt): write_scenes(root, 1, (64,36), workers=1, progress=False)
    monkeypatch.undo()
    there = list(root.glob('video*/*/*.png'))
    assert len(there) == 99
    for p in there: read(p)
    left = there[0].parent.parent.parent/'video55'/'video55_00668'
    left.mkdir(parents=True)
    (left/'.123.frame_668_endo.png').write_bytes(b'half')
    (left/'.ipynb_checkpoints').mkdir()
    write_scenes(root, 1, (64,36), workers=1, progress=False)
    names = sorted(p.relative_to(whole) for p in whole.rglob('*.*'))
    (left/'.ipynb_checkpoints').rmdir()
    assert names == sorted(p.relative_to(root) for p in root.rglob('*.*'))
    assert all((whole/n).read_bytes() == (root/n).read_bytes() for n in names)

def test_a_finished_folder_is_left_alone(scenes, monkeypatch):
    monkeypatch.setattr(synth, 'render_scene', lambda *a: pytest.fail('drawn again'))
    before = {p: p.stat().st_mtime_ns for p in scenes.rglob('*.png')}
    write_scenes(scenes, 1, SMALL, progress=False)
    assert before == {p: p.stat().st_mtime_ns for p in scenes.rglob('*.png')}

@pytest.mark.parametrize('lost', ['', '_watershed_mask', '_color_mask'])
def test_a_file_that_is_missing_is_drawn_again(scenes, tmp_path, lost):
    root = shutil.copytree(scenes, tmp_path/'scenes')
    file = root/'video12'/'video12_15750'/f'frame_15750_endo{lost}.png'
    before = file.read_bytes()
    file.unlink()
    write_scenes(root, 1, SMALL, progress=False)
    assert file.read_bytes() == before

@pytest.mark.parametrize('kw,word', [(dict(frames_per_clip=0), 'choose 1 to 80'),
    (dict(frames_per_clip=81), 'choose 1 to 80'),
    (dict(size=(16,9)), '32 to 8192'), (dict(size=(9000,64)), '32 to 8192'),
    (dict(size=(64,)), 'size='), (dict(seed=-1), 'seed=-1'),
    (dict(workers=0), 'workers=0')])
def test_bad_arguments_leave_no_folder(tmp_path, kw, word):
    with pytest.raises(InputError, match=word): write_scenes(tmp_path/'new', progress=False, **kw)
    assert not (tmp_path/'new').exists()

def test_a_folder_of_something_else_is_refused(tmp_path):
    (tmp_path/'photo.png').write_bytes(b'x')
    with pytest.raises(InputError, match='holds other files'): write_scenes(tmp_path)
    with pytest.raises(InputError, match='a file, not a folder'): write_scenes(tmp_path/'photo.png')
    other = tmp_path/'other'
    other.mkdir()
    (other/'scenes.json').write_text(json.dumps(dict(scenes=1, frames_per_clip=8, size=[427,240], seed=3)))
    with pytest.raises(InputError, match='the same arguments'): write_scenes(other)
    (other/'scenes.json').write_text('{')
    with pytest.raises(InputError, match='not JSON'): write_scenes(other)
    assert sorted(p.name for p in tmp_path.iterdir()) == ['other', 'photo.png']

@pytest.mark.parametrize('video,clip,frame', [('video02', 'video02_00000', 0), ('video12', 'video01_00080', 80),
    ('video01', 'video01_00080', 79), ('video01', 'video01_00080', 160)])
def test_frames_that_do_not_exist(video, clip, frame):
    with pytest.raises(InputError): render_scene(video, clip, frame)

# How hard

@pytest.fixture(scope='module')
def runs(): return pd.read_csv(data_file('scene_runs.csv'))

def test_measured_difficulty(runs):
    iou = runs.groupby(['method', 'budget', 'epochs']).mean_iou.mean()
    map_,trees = (iou[k, 1, 0] for k in ('map', 'trees'))
    assert map_ < .35 and trees < .5
    assert iou['dcl+cls', .1, 11] > trees + .15
    assert iou['random', 1, 56] > iou['random', .01, 56] + .15
    assert iou['random', 1, 112] < iou['random', 1, 56] + .02

def test_measured_runs_are_whole(runs):
    nets = runs[runs.epochs > 0]
    names = list(CLASSES.name[EIGHT])
    assert np.allclose(runs[names].mean(axis=1), runs.mean_iou, atol=1e-3)
    assert (nets.groupby(['method', 'budget', 'epochs']).seed.agg(sorted).map(tuple) == (0, 1, 2)).all()
    assert set(zip(nets.budget, nets.masks)) == {(.01, 12), (.1, 122), (1., 1220)}
    assert (nets.steps == 138*nets.epochs).all()
    few = {(m, b) for m,b in zip(nets.method, nets.budget) if b < 1}
    assert few == {(m, b) for m in ('random', 'dcl', 'cls', 'dcl+cls') for b in (.01, .1)}
