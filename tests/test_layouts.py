"Own data in the layouts that people have: each is trained on by the command, and gives what the plain layout gives"
import importlib, json, shutil, pytest, torch, numpy as np
from fastai.callback.core import Callback
from fastcore.script import CliError
from PIL import Image
from cwcl.checkpoint import LICENSES, load_model
from cwcl.core import InputError, Recipe, recipe
from cwcl.data.cholec import frame_table
from cwcl.data.classes import OwnClasses
from cwcl.data.images import read_mask
from cwcl.data.lists import class_text
from cwcl.data.match import pair_names
from cwcl.data.outlines import outline_mask
from cwcl.data.own import own_split, own_table
from cwcl.leases import Lease
from cwcl.options import parse_changes
from cwcl.ready import license_of
from cwcl.study.jobs import step_seconds
from cwcl.train import StepTime, cwcl_train, train_run

NAMES = ('floor', 'bar', 'disc', 'box')
CLASSES = 'floor=7, bar=90, disc=180, box=250'
COLORS = dict(floor=(0, 0, 0), bar=(0, 255, 0), disc=(0, 255, 255), box=(125, 255, 12))
PLAIN = dict(frames='plain/frames', masks='plain/masks', classes=CLASSES)

def scene(rng):
    "A frame and the numbers of its classes, 60x45"
    y,x = np.mgrid[:45, :60]
    mask = np.zeros((45, 60), np.uint8)
    mask[np.abs(x - rng.uniform(8, 52)) < 4] = 1
    mask[(x - rng.uniform(10, 50))**2 + (y - rng.uniform(10, 35))**2 < 60] = 2
    if rng.random() < .5: mask[np.maximum(np.abs(x - rng.uniform(10, 50)), np.abs(y - rng.uniform(10, 35))) < 6] = 3
    colors = np.array([[120, 60, 60], [200, 40, 160], [60, 200, 80], [230, 220, 90]])
    return (colors[mask] + rng.normal(0, 10, (45, 60, 3))).clip(0, 255).astype(np.uint8), mask

def put(path, array):
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.fromarray(array).save(path)

@pytest.fixture(scope='module')
def home(tmp_path_factory):
    "Three videos of four frames in the plain layout"
    home = tmp_path_factory.mktemp('layouts')
    rng = np.random.default_rng(0)
    for v in '123':
        for k in range(4):
            frame,mask = scene(rng)
            put(home/'plain'/'frames'/v/f'{k:03d}.jpg', frame)
            put(home/'plain'/'masks'/v/f'{k:03d}.png', OwnClasses(CLASSES).write(mask)[..., 0])
    return home

def frames(home):
    "(video, number, the JPEG, its pixels, numbers of the classes) of each frame"
    own = OwnClasses(CLASSES)
    for path in sorted((home/'plain'/'frames').rglob('*.jpg')):
        v,k = path.parent.name,path.stem
        yield v,k,path,np.array(Image.open(path)),own.read(read_mask(home/'plain'/'masks'/v/f'{k}.png'))

def copy(path, to):
    to.parent.mkdir(parents=True, exist_ok=True)
    shutil.copy(path, to)

def runs(layer):
    "Run lengths down the columns"
    flat = np.r_[False, layer.T.ravel(), False]
    if not layer.any(): return [layer.size]
    return np.diff(np.r_[0, np.flatnonzero(flat[1:] != flat[:-1]), layer.size]).tolist()

def endovis(home, d):
    for v,k,_,pixels,ids in frames(home):
        for eye in ('left', 'right'): put(d/f'seq_{v}'/f'{eye}_frames'/f'frame{k}.png', pixels)
        put(d/f'seq_{v}'/'labels'/f'frame{k}.png', np.array(list(COLORS.values()), np.uint8)[ids])
    classes = [dict(name=n, color=c, classid=i) for i,(n,c) in enumerate(COLORS.items())]
    (d/'labels.json').write_text(json.dumps(classes))
    return dict(frames=f'{d}/*/left_frames/*.png', masks=f'{d}/*/labels/*.png', classes=f'{d}/labels.json')

def m2caiseg(home, d):
    lines = ['name;video']
    for v,k,path,_,ids in frames(home):
        copy(path, d/'images'/f'{v}{k}.jpg')
        put(d/'groundtruth'/f'{v}{k}_gt.png', np.array(list(COLORS.values()), np.uint8)[ids])
        lines.append(f'images\\{v}{k}.jpg;op {v}')
    rows = [f'{n},{",".join(map(str, c))}' for n,c in COLORS.items()]
    (d/'classes.csv').write_text('\n'.join(['name,red,green,blue', *rows]))
    (d/'videos.csv').write_text('\n'.join(lines), encoding='utf-8-sig')
    return dict(frames=f'{d}/images', masks=f'{d}/groundtruth', classes=f'{d}/classes.csv', videos=f'{d}/videos.csv')

def dsad(home, d):
    for v,k,_,pixels,ids in frames(home):
        put(d/f'0{v}'/f'image{k[1:]}.png', pixels)
        for i,n in enumerate(NAMES[1:], 1):
            layer = np.where(ids == i, 255, 0).astype(np.uint8)
            put(d/f'0{v}'/f'mask{k[1:]}_{n}.png', layer)
    return dict(frames=f'{d}/*/image*.png', masks=f'{d}/*/mask*_{{class}}.png', classes='floor=0, bar=1, disc=2, box=3')

def autolaparo(home, d):
    for v,k,path,_,ids in frames(home):
        copy(path, d/'imgs'/f'{v}_{k}.jpg')
        parts = 20*ids.astype(int)*2
        parts[:20][ids[:20] == 1] = 20
        put(d/'masks'/f'{v}_{k}.png', parts.astype(np.uint8))
    text = 'floor=0, bar=20|40, disc=80, box=120, ignore=60'
    return dict(frames=f'{d}/imgs', masks=f'{d}/masks', classes=text, videos='([0-9]+)_')

def endoscapes(home, d):
    where = dict(zip('123', ('train_seg', 'val_seg', 'test_seg')))
    for v,part in where.items():
        o = dict(images=[], annotations=[], categories=[dict(id=i, name=n) for i,n in enumerate(NAMES[1:], 1)])
        for i,(w,k,path,_,ids) in enumerate(frames(home)):
            if w != v: continue
            copy(path, d/part/f'{v}_{k}.jpg')
            o['images'].append(dict(id=i, file_name=f'{v}_{k}.jpg', height=45, width=60, video_id=int(v)))
            for c in (1, 2, 3):
                if not (ids == c).any(): continue
                outline = dict(counts=runs(ids == c), size=[45, 60])
                o['annotations'].append(dict(id=10*i+c, image_id=i, category_id=c, segmentation=outline))
            put(d/'semseg'/f'{v}_{k}.png', ids)
        (d/part/'annotation_coco.json').write_text(json.dumps(o))
    return dict(frames=f'{d}/*_seg/*.jpg', masks=f'{d}/*_seg/annotation_coco.json', videos='([0-9]+)_[0-9]+$')

def semseg(home, d): return endoscapes(home, d) | dict(masks=f'{d}/semseg', classes='floor=0, bar=1, disc=2, box=3')

LAYOUTS = {f.__name__: f for f in (endovis, m2caiseg, dsad, autolaparo, endoscapes, semseg)}
SMALL = 'height=45,width=60,crop=32,window=32,batch=4,labelled=2,threads=1'

def train(out, options, valid, test, change=SMALL, **kwargs):
    always = dict(preset='smoke', budget=1., device='cpu')
    cwcl_train(**options, **always, valid=valid, test=test, change=change, out=str(out), **kwargs)
    return json.loads((out/'metrics.json').read_text())

@pytest.fixture(scope='module')
def plain(home):
    "What the command makes of the plain layout"
    here = {k: v if k == 'classes' else str(home/v) for k,v in PLAIN.items()}
    return train(home/'run', here, '2', '3')

@pytest.fixture
def no_figures(monkeypatch):
    plots = 'plot_curves', 'plot_iou', 'plot_segmentation', 'save_figure'
    for o in plots: monkeypatch.setattr(f'cwcl.train.{o}', lambda *args: None)

@pytest.mark.parametrize('layout', LAYOUTS)
def test_every_layout_trains_as_the_plain_one_does(home, plain, no_figures, tmp_path, layout):
    options = LAYOUTS[layout](home, tmp_path/'data')
    names = [o + v for o in (dict(endovis='seq_', m2caiseg='op ', dsad='0').get(layout, ''),) for v in '23']
    got = train(tmp_path/'run', options, *names)
    assert got['steps'] == plain['steps'] > 1 and got['frames'] == plain['frames'] and got['labelled'] == 4
    for part in ('test', 'valid'): assert got[part]['confusion'] == plain[part]['confusion']
    assert list(got['test']['class_iou'].values()) == list(plain['test']['class_iou'].values())
    assert got['test']['native']['confusion'] == plain['test']['native']['confusion']
    assert set(got['sources'].values()) >= set(names) and got['data'] == 'unknown'

def test_pictures_and_masks_of_one_organ_lie_in_one_folder(home, no_figures, tmp_path):
    "As in DSAD; every pixel of the organ in the test video is counted"
    d,pixels = tmp_path/'liver',0
    for v,k,_,frame,ids in frames(home):
        put(d/f'0{v}'/f'image{k[1:]}.png', frame)
        put(d/f'0{v}'/f'mask{k[1:]}.png', np.where(ids == 2, 255, 0).astype(np.uint8))
        if v == '3': pixels += int((ids == 2).sum())
    here = dict(frames=str(d), masks=str(d), classes='other=0, liver=255')
    got = train(tmp_path/'run', here, '02', '03')
    assert got['steps'] > 1 and list(got['test']['class_iou']) == ['other', 'liver'] and got['frames']['test'] == 4
    assert np.sum(got['test']['native']['confusion'][1]) == pixels > 0

def test_the_run_is_that_of_python_and_is_kept(home, plain, no_figures, tmp_path):
    "Weights to the bit, card, refusal of a finished run, a training that resumes, remarks by the names of the videos"
    here = {k: v if k == 'classes' else str(home/v) for k,v in PLAIN.items()}
    r = recipe('smoke', budget=1., class_set=CLASSES, use_phase=False, **parse_changes(SMALL))
    assert Recipe.from_json((home/'run'/'recipe.json').read_text()) == r
    table = own_split(own_table(here['frames'], here['masks'], CLASSES), r, '2', '3')
    train_run(r, table, out=tmp_path/'p', device='cpu')
    a,b = (load_model(o/'model.safetensors', 'cpu').state_dict() for o in (home/'run', tmp_path/'p'))
    assert all(torch.equal(a[k], b[k]) for k in a)
    assert LICENSES['unknown'] in (home/'run'/'model.md').read_text() and plain['data'] == 'unknown'
    assert {'floor: learned from 1 alone; 4 test frames show it', 'test on 3'} < set(plain['remarks'])
    assert plain['sources'] == dict(video01='1', video02='2', video03='3')
    with pytest.raises(CliError, match='holds a finished run'): train(home/'run', here | dict(masks='nosuch'), '2', '3')
    assert train(home/'run', here, '2', '3', overwrite=True)['test'] == plain['test']

class Stop(Callback):
    "Stop after the first epoch"
    order = 200
    def after_epoch(self): raise KeyboardInterrupt

def test_a_stopped_run_goes_on(home, no_figures, tmp_path, monkeypatch):
    here = {k: v if k == 'classes' else str(home/v) for k,v in PLAIN.items()}
    options = dict(change=f'{SMALL},epochs=2')
    whole = train(tmp_path/'whole', here, '2', '3', **options)
    with monkeypatch.context() as m:
        m.setattr('cwcl.train.StepTime', lambda: [StepTime(), Stop()][1])
        with pytest.raises(SystemExit): train(tmp_path/'cut', here, '2', '3', **options)
    assert (tmp_path/'cut'/'checkpoint'/'last.safetensors').exists()
    assert train(tmp_path/'cut', here, '2', '3', **options)['test'] == whole['test']

@pytest.mark.parametrize('options,says', [(dict(data='d', masks='m'), '--data with --masks'),
    (dict(masks='m'), '--masks: own data need --frames and --masks'),
    (dict(valid='a'), 'own data need'), (dict(frames='f', masks='m'), 'which value is which class'),
    (dict(frames='nosuch', masks='m', classes=CLASSES), 'nosuch: no such folder'),
    (dict(data='d', change='class_set=a=1, b=2'), 'own classes are given with --classes'),
    (dict(frames='f', masks='nosuch.json'), 'nosuch.json: no such table of classes')])
def test_options_that_do_not_fit_are_one_line(tmp_path, options, says):
    with pytest.raises(CliError, match=says) as e: cwcl_train(**options, preset='smoke', out=str(tmp_path/'run'))
    assert '\n' not in str(e.value) and not (tmp_path/'run').exists()

def test_what_the_command_asks_for_is_what_is_run(home, tmp_path, monkeypatch):
    "Phases, labels, a rule for videos and a dealt fold reach the run; nothing is trained"
    asked = []
    def caught(r, table, phases, *args, **kwargs):
        asked.append((r, table, phases))
        raise InputError('seen')
    monkeypatch.setattr('cwcl.train.train_run', caught)
    shutil.copytree(home/'plain', tmp_path/'own')
    (tmp_path/'own'/'masks'/'1'/'000.png').unlink()
    (tmp_path/'p.csv').write_text('name,phase\n1/001,cut\n2/001,sew\n')
    (tmp_path/'l.csv').write_text('name,floor,bar,disc,box\n1/000,1,0,1,0\n')
    here = dict(frames=str(tmp_path/'own'/'frames'), masks=str(tmp_path/'own'/'masks'), classes=CLASSES)
    lists = dict(phases=str(tmp_path/'p.csv'), labels=str(tmp_path/'l.csv'), fold=1, test='3', budget=1.)
    for more in (lists, dict(videos='(.)/', budget=.5)):
        with pytest.raises(CliError, match='seen'): cwcl_train(**here, **more, preset='smoke', out=str(tmp_path/'run'))
    (r,make,phases),(r2,make2,_) = asked
    t,t2 = make(),make2()
    assert r.use_phase
    assert not r2.use_phase
    assert r.class_set == r2.class_set == CLASSES
    assert phases is None
    assert (r.fold, r2.budget) == (1, .5)
    assert t.phase.tolist() == [-1, 0, -1, -1, -1, 1] + [-1]*6 and (t2.phase == -1).all()
    assert t.loc[0, [*NAMES]].tolist() == [True, False, True, False]
    assert t.loc[0, 'mask'] == ''
    assert not t2.loc[0, [*NAMES]].any()
    assert set(t.source[t.part == 'test']) == {'3'}
    assert t.source[t.part == 'valid'].nunique() == t2.source[t2.part == 'valid'].nunique() == 1
    assert license_of(t, t[t.video == 'video01']) == 'unknown'

def test_overfitting_own_data(home, no_figures, tmp_path):
    here = {k: v if k == 'classes' else str(home/v) for k,v in PLAIN.items()}
    got = train(tmp_path/'run', here, None, None, split='none', epochs=1)
    assert got['overfit']
    assert got['test']['confusion'] == got['valid']['confusion']
    assert got['frames'] == dict(train=12, valid=12)

def test_cost_of_own_classes_is_measured():
    r = recipe('smoke', class_set='a=0, b=1|2', widths=(4, 8), scales=1, crop=16, threads=1)
    assert step_seconds(r, 'cpu', 1)[0] > 0

def test_codes_of_the_data_set_may_be_merged(scenes):
    "Table 1's classes by a pattern over CholecSeg8k's own folders"
    text = 'wall=11, liver=21, tool=31|32, ignore=0|5|12|13|22|23|24|25|33|50'
    t = own_table(f'{scenes}/video0*/*/frame_*_endo.png', f'{scenes}/video0*/*/frame_*_endo_watershed_mask.png', text)
    real = frame_table(scenes).query('video in ("video01", "video09")')
    assert len(t) == len(real) > 8 and ('video0' + t.source).tolist() == real.video.tolist()
    assert (t.liver.to_numpy() == real.liver).all() and (t.wall.to_numpy() == real['abdominal wall']).all()
    assert (t.tool.to_numpy() >= (real.grasper | real['l-hook electrocautery'])).all() and t.tool.any()

def coco(home, tmp_path, change, classes='background=0, disc=1, bar=2'):
    "A COCO file of the plain layout's first frame, changed"
    o = dict(images=[dict(id=1, file_name='1/000.jpg', height=45, width=60)], categories=[dict(id=1, name='disc')],
        annotations=[dict(id=5, image_id=1, category_id=1, segmentation=[[10, 10, 30, 10, 30, 30, 10, 30]])])
    change(o)
    (tmp_path/'c.json').write_text(json.dumps(o))
    return own_table(home/'plain'/'frames', tmp_path/'c.json', classes, drawn=tmp_path/'drawn')

def test_polygons_are_filled(home, tmp_path):
    t = coco(home, tmp_path, lambda o: None)
    mask = OwnClasses('background=0, disc=1').read(read_mask(t['mask'].iloc[0]))
    assert (mask[10:31, 10:31] == 1).all()
    assert mask.sum() == 21*21
    assert (t['mask'] != '').sum() == 1
    assert t.disc.sum() == 1

BAR = [[40, 10, 50, 10, 50, 30]]
FROM_0 = lambda o: (o['categories'].append(dict(id=0, name='bar')), o['annotations'].append(dict(o['annotations'][0],
    category_id=0, segmentation=BAR)))

@pytest.mark.parametrize('classes', [None, 'bar=0, disc=1', 'bar=0, disc=1, rest=255', 'bar=0, disc=1, bg=7'])
def test_the_first_organ_is_not_everything_else(home, tmp_path, classes):
    "In a file that numbers its categories from 0"
    t = coco(home, tmp_path, FROM_0, classes)
    own = OwnClasses(class_text(tmp_path/'c.json') if classes is None else classes)
    mask = own.read(read_mask(t['mask'].iloc[0]))
    pixels = {k: int((mask == i).sum()) for i,k in enumerate(own.names)}
    bar = int(outline_mask(BAR, (45, 60)).sum())
    assert (pixels['bar'], pixels['disc']) == (bar, 21*21)
    rest = 45*60 - bar - 21*21
    ground = {'background', 'bg'} & pixels.keys()
    if ground: assert pixels[ground.pop()] == rest
    else: assert (mask == 255).sum() == rest

def test_a_file_may_name_its_background(home, tmp_path):
    for i in (0, 5):
        coco(home, tmp_path, lambda o: o['categories'].append(dict(id=i, name='background')), None)
        assert sorted(class_text(tmp_path/'c.json').split(', ')) == [f'background={i}', 'disc=1']

def test_two_entries_of_one_picture_are_refused(home, tmp_path):
    again = dict(id=2, file_name='elsewhere/1/000.jpg', height=45, width=60)
    with pytest.raises(InputError, match='elsewhere/1/000.jpg and another image both mean the picture 1/000'):
        coco(home, tmp_path, lambda o: o['images'].append(again))
    for k in 'ab': shutil.copy(tmp_path/'c.json', tmp_path/f'{k}.json')
    (tmp_path/'c.json').unlink()
    text = (tmp_path/'a.json').read_text().replace('elsewhere/1/000', '1/001')
    for k in 'ab': (tmp_path/f'{k}.json').write_text(text)
    with pytest.raises(InputError, match='b.json: another file has masks of 1/000 too'):
        own_table(home/'plain'/'frames', tmp_path/'*.json', 'background=0, disc=1', drawn=tmp_path/'drawn')

def test_masks_are_drawn_by_who_may_write(home, tmp_path, monkeypatch):
    "A second command does not draw over the masks of the first, which is training"
    monkeypatch.setattr('cwcl.leases.Lease.alive', lambda self: True)
    coco(home, tmp_path, lambda o: None)
    given = dict(frames=str(home/'plain'/'frames'), masks=str(tmp_path/'c.json'), classes='background=0, disc=1')
    with Lease(tmp_path/'run'/'writer.lease').hold(), pytest.raises(CliError, match='another training is writing here'):
        cwcl_train(**given, out=str(tmp_path/'run'), preset='smoke')
    assert not (tmp_path/'run'/'masks').exists()

def rle(counts, size=(45, 60)): return dict(counts=counts, size=list(size))
BAD = {}
BAD['box'] = lambda o: o['annotations'][0].pop('segmentation'), 'annotation 5 has no outline'
BAD['name'] = lambda o: o['categories'][0].update(id=2), "category 'disc' has the number 2"
BAD['other'] = lambda o: o['categories'].append(dict(id=9, name='x')), 'write x=9, or ignore=9'
BAD['lost'] = lambda o: o['images'][0].update(file_name='9.jpg'), 'no picture 9.jpg'
BAD['short'] = lambda o: o['annotations'][0].update(segmentation=rle([3, 2])), 'runs of 5 pixels'
BAD['size'] = lambda o: o['images'][0].update(height=40), '60x40, its frame 60x45'
BAD['turned'] = lambda o: o['annotations'][0].update(segmentation=rle([2700], (60, 45))), 'size .60, 45'
BAD['key'] = lambda o: o.pop('images'), 'not a file in the COCO format'
BAD['odd'] = lambda o: o['annotations'][0].update(segmentation=[[1, 2, 3]]), 'not a file in the COCO format'
BAD['squeezed'] = lambda o: o['annotations'][0].update(segmentation=rle('PPYo0')), r'pip install .cwcl\[coco\]'

@pytest.mark.parametrize('kind', BAD)
def test_a_coco_file_that_cannot_be_drawn_is_one_line(home, tmp_path, monkeypatch, kind):
    real = importlib.import_module
    def without(name, *args):
        if name.startswith('pycocotools'): raise ModuleNotFoundError(name='pycocotools')
        return real(name, *args)
    monkeypatch.setattr('importlib.import_module', without)
    with pytest.raises(InputError, match=BAD[kind][1]) as e: coco(home, tmp_path, BAD[kind][0])
    assert '\n' not in str(e.value) and '.json' in str(e.value) or kind == 'size'

def test_squeezed_run_lengths_are_read_by_their_library():
    "From the library's own encoder"
    lib = pytest.importorskip('pycocotools.mask')
    want = np.zeros((45, 60), bool)
    want[5:20, 7:30] = True
    found = lib.encode(np.asfortranarray(want, dtype=np.uint8))
    assert (outline_mask(dict(counts=found['counts'].decode(), size=[45, 60]), (45, 60)) == want).all()

def test_run_lengths_are_the_literal_loop():
    rng = np.random.default_rng(0)
    for _ in range(20):
        layer = rng.random((7, 5)) < rng.random()
        counts = [0]
        now = False
        for v in layer.T.ravel().tolist():
            if v != now: counts.append(0)
            now = v
            counts[-1] += 1
        assert (outline_mask(dict(counts=counts), (7, 5)) == layer).all()

def test_names_that_leave_a_doubt_are_refused(tmp_path):
    def lay(*names):
        shutil.rmtree(tmp_path/'d', ignore_errors=True)
        for o in names: put(tmp_path/'d'/o, np.zeros((4, 6), np.uint8))
        return tmp_path/'d'
    cases = {'a/img_1 a/image_1 a/1_gt': 'mask of a/image_1 or of a/img_1', 'a/1 b/1 masks/1': 'mask of a/1 or of b/1',
        'a/1 a/1_gt a/1_mask': 'a second mask of a/1', 'a/1 a/2': 'no word in a name tells pictures and masks apart',
        'a/1 a/2_gt': r'a/2_gt.png: mask without a frame \(1 of 1\)', 'a/1 b/masks/1': 'mask without a frame'}
    for names,says in cases.items():
        d = lay(*(f'{o}.png' for o in names.split()))
        with pytest.raises(InputError, match=says): pair_names(d, d)
