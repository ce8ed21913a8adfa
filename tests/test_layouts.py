"Own data in the layouts that people have: each is trained on by the command, and gives what the plain layout gives"
import json, shutil, pytest, numpy as np
from fastcore.script import CliError
from PIL import Image
from cwcl.core import InputError
from cwcl.data.cholec import frame_table
from cwcl.data.classes import OwnClasses
from cwcl.data.images import read_mask
from cwcl.data.outlines import outline_mask
from cwcl.data.own import own_table
from cwcl.train import cwcl_train

NAMES,CLASSES = ('floor', 'bar', 'disc', 'box'),'floor=7, bar=90, disc=180, box=250'
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
    home,rng = tmp_path_factory.mktemp('layouts'),np.random.default_rng(0)
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
    return np.diff(np.r_[0, np.flatnonzero(flat[1:] != flat[:-1]), layer.size]).tolist() if layer.any() else [layer.size]

def endovis(home, d):
    for v,k,_,pixels,ids in frames(home):
        for eye in ('left', 'right'): put(d/f'seq_{v}'/f'{eye}_frames'/f'frame{k}.png', pixels)
        put(d/f'seq_{v}'/'labels'/f'frame{k}.png', np.array(list(COLORS.values()), np.uint8)[ids])
    (d/'labels.json').write_text(json.dumps([dict(name=n, color=c, classid=i) for i,(n,c) in enumerate(COLORS.items())]))
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
        for i,n in enumerate(NAMES[1:], 1): put(d/f'0{v}'/f'mask{k[1:]}_{n}.png', np.uint8(255*(ids == i)))
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
            o['annotations'] += [dict(id=10*i+c, image_id=i, category_id=c, segmentation=dict(counts=runs(ids == c), size=[45, 60]))
                for c in (1, 2, 3) if (ids == c).any()]
            put(d/'semseg'/f'{v}_{k}.png', ids)
        (d/part/'annotation_coco.json').write_text(json.dumps(o))
    return dict(frames=f'{d}/*_seg/*.jpg', masks=f'{d}/*_seg/annotation_coco.json', videos='([0-9]+)_[0-9]+$')

def semseg(home, d):
    return endoscapes(home, d) | dict(masks=f'{d}/semseg', classes='floor=0, bar=1, disc=2, box=3')

LAYOUTS = dict(endovis=endovis, m2caiseg=m2caiseg, dsad=dsad, autolaparo=autolaparo, endoscapes=endoscapes, semseg=semseg)
SMALL = 'height=45,width=60,crop=32,window=32,batch=4,labelled=2,threads=1'

def train(out, options, valid, test, change=SMALL, **kwargs):
    cwcl_train(**options, valid=valid, test=test, preset='smoke', budget=1., change=change, device='cpu', out=str(out), **kwargs)
    return json.loads((out/'metrics.json').read_text())

@pytest.fixture(scope='module')
def plain(home):
    "What the command makes of the plain layout"
    here = {k: v if k == 'classes' else str(home/v) for k,v in PLAIN.items()}
    return train(home/'run', here, '2', '3')

@pytest.fixture
def no_figures(monkeypatch):
    for o in ('plot_curves', 'plot_iou', 'plot_segmentation', 'save_figure'): monkeypatch.setattr(f'cwcl.train.{o}', lambda *args: None)

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
