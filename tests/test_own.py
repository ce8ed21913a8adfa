"Pictures, masks and classes that are not CholecSeg8k's: read right, refused in one line, and trained on"
import os, re, pytest, shutil, torch, numpy as np
from pathlib import Path
from PIL import Image
from cwcl.checkpoint import load_model, save_model
from cwcl.core import InputError, Recipe, recipe, set_seed
from cwcl.data.classes import OwnClasses, class_values
from cwcl.data.images import read_mask
from cwcl.data.labels import class_set, decode_mask
from cwcl.data.streams import cwcl_dls
from cwcl.multitask import cwcl_learner
from cwcl.data.lists import _by_rule
from cwcl.data.own import copies_apart, own_remarks
from cwcl.own import class_text, own_folds, own_split, own_table, pictures, video_names
from cwcl.results import evaluate
from cwcl.ready import run_parts
from cwcl.stages import stages_run
from cwcl.study.records import read_result
from cwcl.video import segment_images

GREY,COLOR = 'floor=7, bar=90, disc=180, box=255','floor=#102030, bar=#ff0000, disc=#00ff00, box=#0000ff'
VIDEOS = dict(anna=6, berta=4, carla=5)

def scene(rng):
    y,x = np.mgrid[:150, :200]
    mask = np.zeros((150, 200), np.uint8)
    if rng.random() < .7: mask[np.abs(x - rng.uniform(30, 170)) < 12] = 1
    if rng.random() < .7: mask[(x - rng.uniform(40, 160))**2 + (y - rng.uniform(40, 110))**2 < 900] = 2
    if rng.random() < .7: mask[np.maximum(np.abs(x - rng.uniform(40, 160)), np.abs(y - rng.uniform(40, 110))) < 20] = 3
    colors = np.array([[120, 60, 60], [200, 40, 160], [60, 200, 80], [230, 220, 90]])
    return (colors[mask] + rng.normal(0, 10, (150, 200, 3))).clip(0, 255).astype(np.uint8), mask

@pytest.fixture(scope='module')
def home(tmp_path_factory):
    "Three videos, every second picture a JPEG, 200x150 pixels, four classes, no phases"
    home = tmp_path_factory.mktemp('own')
    rng = np.random.default_rng(0)
    for video,n in VIDEOS.items():
        for kind in ('frames', 'masks', 'colors'): (home/kind/video).mkdir(parents=True)
        for k in range(n):
            frame,mask = scene(rng)
            Image.fromarray(frame).save(home/'frames'/video/f'{k:02d}.{("png", "jpg")[k % 2]}')
            Image.fromarray(OwnClasses(GREY).write(mask)[..., 0]).save(home/'masks'/video/f'{k:02d}.png')
            Image.fromarray(OwnClasses(COLOR).write(mask)).save(home/'colors'/video/f'{k:02d}.png')
    (home/'gray.csv').write_text('name,value\nfloor,7\nbar,90\ndisc,180\nbox,255\n')
    (home/'color.csv').write_text('name,red,green,blue\nfloor,16,32,48\nbar,255,0,0\ndisc,0,255,0\nbox,0,0,255\n')
    return home

@pytest.fixture
def copy(home, tmp_path):
    "A copy that may be damaged"
    shutil.copytree(home, tmp_path/'own')
    return tmp_path/'own'

def small(**changes):
    fields = dict(class_set=GREY, use_phase=False, budget=.5, height=75, width=100, crop=64, window=64, batch=6,
        labelled=3, threads=1)
    return recipe('smoke', **{**fields, **changes})

@pytest.mark.parametrize('text', (GREY, COLOR, 'a=0, b=255', 'white=#ffffff, black=0'))
@pytest.mark.parametrize('channels', (1, 3, 4))
def test_reading_is_the_literal_loop(text, channels):
    rng = np.random.default_rng(1)
    values = class_values(text)
    pool = [*(v for v, in values.values()), 0xffffff, 0x112233, 0x050505]
    v = np.array(pool)[rng.integers(0, len(pool), (9, 11))]
    if channels == 1: v = (v & 255)*0x010101
    rgb = np.stack([v >> 16, v >> 8 & 255, v & 255, v*0 + 77], -1).astype(np.uint8)
    pixels = rgb[..., 0] if channels == 1 else rgb[..., :channels]
    order = [v for v, in values.values()]
    want = [[order.index(o) if o in order else 255 for o in row] for row in v.tolist()]
    own = OwnClasses(text)
    assert own.read(pixels).tolist() == want
    strange = [o for row in v.tolist() for o in row if o not in order and o != 0xffffff]
    assert sum(own.unknown(pixels).values()) == len(strange)
    assert {int(k[1:], 16) if k[0] == '#' else int(k)*0x010101 for k in own.unknown(pixels)} == set(strange)

@pytest.mark.parametrize('text,says', [('a=0', '1 class'), ('a=0, a=1', "'a' is listed twice"),
    ('a=0, b=0', 'another class'),
    ('a=255, b=#FFFFFF', 'another class'), ('a=0, b=1|0', "the value 0 of another class, 'a'"),
    ('a=0, b=2|2', "another class, 'b'"),
    ('a=0, b=256', "'b=256': 256 is above 255"), ('a=0, b', "'b'"), ('a=0, =3', 'give name=value'),
    ('a=0, b=#12345', '#12345'),
    ('a=0, b=1.5', "'1.5' is neither an integer"), ('a=0, ignore=1', '1 class'),
    ('grasper, left=1', "class 'grasper': give name=value; a comma"),
    (', '.join(f'c{i}={i}' for i in range(51)), '51 class')])
def test_text_that_cannot_be(text, says):
    with pytest.raises(InputError, match=says): OwnClasses(text)

def test_several_values_are_one_class_and_some_are_none():
    own = OwnClasses('floor=0, tool=5|#b05a64|9, ignore=7|8')
    gray = np.array([[0, 5, 9, 7, 8, 255, 11]], np.uint8)
    assert own.read(gray).tolist() == [[0, 1, 1, 255, 255, 255, 255]] and own.unknown(gray) == {'11': 1}
    assert own.read(np.array([[[0xb0, 0x5a, 0x64]]], np.uint8)).tolist() == [[1]]
    assert own.names == ('floor', 'tool')
    assert len(own) == 2
    assert own.write(np.array([[1, 255]], np.uint8)).tolist() == [[[5]*3, [255]*3]]

def test_a_class_may_be_called_na(copy):
    "pandas would read it as nothing; labels may be truths, ones or numbers with a point"
    (copy/'classes.csv').write_bytes(b'\xef\xbb\xbfname,value\r\nNA,7\r\nnull,90\r\ndisc,180\r\nbox,255\r\n')
    text = class_text(copy/'classes.csv')
    assert OwnClasses(text).names == ('NA', 'null', 'disc', 'box')
    (copy/'masks'/'anna'/'02.png').unlink()
    (copy/'labels.csv').write_text('name,NA,null,disc,box\nanna/02,True,1.0,0,False\n')
    t = own_table(copy/'frames', copy/'masks', text, labels=copy/'labels.csv').set_index('name')
    assert t.loc['anna/02', ['NA', 'null', 'disc', 'box']].tolist() == [True, True, False, False]

@pytest.mark.parametrize('word', ['ignore', 'Ignore', 'IGNORE'])
def test_what_is_ignored_may_be_written_in_any_way(word):
    assert OwnClasses(f'floor=0, tool=5, {word}=7').names == ('floor', 'tool')
    with pytest.raises(InputError, match='listed twice'): OwnClasses(f'floor=0, tool=5, ignore=7, {word}=8')

def test_nothing_is_never_a_class():
    "Also where a class is white"
    mask = np.array([[0, 1, 255]], np.uint8)
    for text in ('bed=0, tool=255', 'bed=1, tool=255', 'bed=0, tool=5, ignore=255', 'a=#ffffff, b=#fffffe'):
        own = OwnClasses(text)
        assert (own.read(own.write(mask)) == mask).all() and not own.unknown(own.write(mask)), text

def test_a_recipe_carries_its_classes():
    r = small()
    assert Recipe.from_json(r.to_json()) == r
    assert class_set(r.class_set, r.left_out).names == ('floor', 'bar', 'disc', 'box')
    assert class_set(8).names[2] == 'liver' and isinstance(class_set(GREY).colors, np.ndarray)
    for wrong in ('floor', 9, '8'):
        with pytest.raises(InputError, match='class_set'): small(class_set=wrong)

def test_the_sets_of_the_data_set_read_as_before():
    pixels = np.random.default_rng(0).integers(0, 256, (20, 30), dtype=np.uint8)
    for n in (8, 10, 13): assert (class_set(n).read(pixels) == class_set(n).encode(decode_mask(pixels))).all()

def test_tables_of_classes(home):
    assert class_text(home/'gray.csv') == GREY and class_text(home/'color.csv') == COLOR and class_text(GREY) == GREY

@pytest.mark.parametrize('text', ['name,value\nfloor,0\ntool,5\ntool,9\n', 'Name;Value\r\nfloor; 0\r\ntool;5|9\r\n\r\n',
    '"name"\t"value"\t""\n"floor"\t0.0\ntool\t5.0|9\t\n', 'value,name\n0 ,floor\n 5,tool\n9,tool'])
@pytest.mark.parametrize('encoding', ['utf-8', 'utf-8-sig', 'utf-16'])
def test_a_table_may_be_saved_in_any_way(tmp_path, text, encoding):
    (tmp_path/'c.csv').write_text(text, encoding=encoding, newline='')
    assert class_text(tmp_path/'c.csv') == 'floor=0, tool=5|9'

@pytest.mark.parametrize('text,says',
    [('name,value\nfloor,0\n"grasper, left",1\n', "c.csv line 3: the name 'grasper, left' of a class holds a ','"),
        ('name,value\nfloor,0\ngrasper, left,1\n', "line 3: more columns than its header, '1'"),
        ('name,value\nfloor,0\na=b,1', "holds a '='"),
        ('name,value\nfloor,0\ntool,1.5', "line 3, class 'tool': '1.5' is neither an integer"),
        ('name,value\nfloor,0\n,1', "name '' of a class holds nothing"),
        ('name,red,green,blue\nfloor,0,0,0\ntool,300,0,0', "line 3, color of 'tool': 300 is above 255"),
        ('', 'c.csv: is empty'),
        ('name,value,value\nfloor,0,1', 'two columns are called value'),
        ('name,value\nfloor,0\ntool,256', "line 3, class 'tool': 256 is above 255")])
def test_a_row_that_cannot_be_is_named_with_its_cause(tmp_path, text, says):
    (tmp_path/'c.csv').write_text(text)
    with pytest.raises(InputError, match=re.escape(says)) as e: class_text(tmp_path/'c.csv')
    assert '\n' not in str(e.value)

def test_a_long_text_is_no_file_name():
    text = ', '.join(f'structure number {i}={i}' for i in range(40))
    assert len(text) > 800 and class_text(text) == text

def test_a_table_in_another_code_says_how_to_save_it(tmp_path):
    (tmp_path/'c.csv').write_bytes('name,value\nfloor,0\nÜbergang,1\n'.encode('cp1252'))
    says = 'not in UTF-8; save the table of classes as "CSV UTF-8"'
    with pytest.raises(InputError, match=says): class_text(tmp_path/'c.csv')
    for text in ('{"a": 1}', '[{"name": "a"}]', 'x'):
        (tmp_path/'c.json').write_text(text)
        with pytest.raises(InputError, match='c.json: neither a list of classes'): class_text(tmp_path/'c.json')

@pytest.mark.parametrize('masks,classes', [('masks', 'gray.csv'), ('colors', 'color.csv')])
def test_the_table_says_what_the_files_say(home, masks, classes):
    t = own_table(home/'frames', home/masks, home/classes)
    own = OwnClasses(class_text(home/classes))
    assert t.groupby('source').size().to_dict() == VIDEOS and t.video.nunique() == 3 and (t.phase == -1).all()
    assert t.image.str.endswith('.jpg').sum() == 7 and not t.duplicated(['video', 'frame']).any()
    for o in t.itertuples():
        ids = own.read(read_mask(o.mask))
        assert [getattr(o, c) for c in own.names] == [bool((ids == k).sum() >= 16) for k in range(4)]
        assert o.image.rsplit('.', 1)[0].split('/')[-2:] == o.mask.rsplit('.', 1)[0].split('/')[-2:]
        assert o.source in o.image

def edit(copy, what):
    "Do one kind of damage"
    mask,frame = copy/'masks'/'anna'/'00.png',copy/'frames'/'anna'/'01.jpg'
    if what == 'no frame': (copy/'frames'/'anna'/'00.png').unlink()
    if what == 'size': Image.open(mask).resize((100, 75), Image.NEAREST).save(mask)
    if what == 'value':
        spoilt = np.where(np.arange(200) < 3, 91, np.array(Image.open(mask)))
        Image.fromarray(spoilt.astype(np.uint8)).save(mask)
    if what == 'torn frame': frame.write_bytes(frame.read_bytes()[:900])
    if what == 'torn mask': mask.write_bytes(mask.read_bytes()[:60])
    if what == 'two frames': Image.new('RGB', (200, 150)).save(copy/'frames'/'anna'/'01.png')
    if what == 'flat': [(copy/o/'anna'/n).rename(copy/o/n) for o,n in (('frames', '01.jpg'), ('masks', '01.png'))]
    if what == 'same value': (copy/'gray.csv').write_text('name,value\nfloor,7\nbar,90\ndisc,90\n')
    if what == 'columns': (copy/'gray.csv').write_text('class,code\nfloor,7\nbar,90\n')
    if what == 'number': (copy/'gray.csv').write_text('name,red,green,blue\nfloor,7,a,3\nbar,90,1,1\n')
    if what == 'taken': (copy/'gray.csv').write_text('name,value\nmask,7\nbar,90\ndisc,180\nbox,255\n')

@pytest.mark.parametrize('what,says', [('no frame', 'masks/anna/00.png: mask without a frame'),
    ('size', 'masks/anna/00.png: 100x75, its frame 200x150'),
    ('value', r'masks/anna/00.png: value 91 \(450 pixels\) is in no row of the table'),
    ('torn frame', 'frames/anna/01.jpg: unreadable'), ('torn mask', 'masks/anna/00.png: unreadable'),
    ('two frames', 'a second file of the name anna/01'), ('flat', '01: which video is it from'),
    ('same value', "gray.csv: class 'disc' has the value 90 of another"),
    ('columns', 'gray.csv: columns class, code; name and value'), ('number', "'a' is neither an integer"),
    ('taken', "'mask': the name is taken")])
def test_bad_folders_are_one_line(copy, what, says):
    edit(copy, what)
    with pytest.raises(InputError, match=says) as e: own_table(copy/'frames', copy/'masks', copy/'gray.csv')
    assert '\n' not in str(e.value)

def test_lost_folders_are_one_line(home, tmp_path):
    for call,says in [(lambda: own_table(home/'frames', home/'nosuch', GREY), 'nosuch: no such folder of masks'),
        (lambda: own_table(home/'nosuch', home/'masks', GREY), 'folder of pictures'),
        (lambda: own_table(home/'frames', tmp_path, GREY), 'no masks in it'),
        (lambda: class_text(home/'nosuch.csv'), 'no such table of classes'),
        (lambda: class_text(home/'frames'), 'no such table of classes')]:
        with pytest.raises(InputError, match=says) as e: call()
        assert '\n' not in str(e.value)

def test_a_picture_is_from_one_video(tmp_path):
    (tmp_path/'v.csv').write_text('name,video\ntrain/01.png,op1\ntest/01.png,op2\n')
    with pytest.raises(InputError, match='01 is from op1 and from op2'): video_names(['01'], tmp_path/'v.csv')
    (tmp_path/'v.csv').write_text('name,video\ntrain/01.png,op1\n01.png,op1\n')
    assert video_names(['01'], tmp_path/'v.csv') == ['op1']

def test_videos(home, tmp_path):
    names = list(pictures(home/'frames'))
    (tmp_path/'v.csv').write_text('name,video\n' + '\n'.join(f'{n},{"x" if "anna" in n else "y"}' for n in names))
    assert set(video_names(names, tmp_path/'v.csv')) == {'x', 'y'} and video_names(names, lambda n: n[0])[0] == 'a'
    t = own_table(home/'frames', home/'masks', GREY, tmp_path/'v.csv')
    assert t.groupby('source').size().to_dict() == dict(x=6, y=9)
    (tmp_path/'short.csv').write_text('name,video\nanna/00,x\n')
    (tmp_path/'hole.csv').write_text((tmp_path/'v.csv').read_text().replace('anna/03,x', 'anna/03,'))
    for videos,says in ((tmp_path/'short.csv', r'no video for the picture anna/01 \(14 of 15\)'),
        (tmp_path/'hole.csv', 'no video for the picture anna/03'), (home/'gray.csv', 'no column video'),
        (tmp_path/'gone.csv', 'no such list of videos'),
        ('(op.*)_', r"finds no video in the name anna/00 \(15 of 15\)"), ('(op', 'not a regular expression'),
        ('videos (1).csv', 'no such file')):
        with pytest.raises(InputError, match=says): video_names(names, videos)
    with pytest.raises(InputError, match='takes too long.*repeat inside a repeat'): _by_rule(['a'*40], '((a*)*)*b', 1)

@pytest.mark.parametrize('where', ['frames', 'masks'])
def test_litter_is_not_data(copy, where):
    litter = 'anna/._00.png __MACOSX/anna/._01.png __MACOSX/anna/01.png .trash/anna/01.png Thumbs.db .DS_Store'
    for name in litter.split():
        (copy/where/name).parent.mkdir(parents=True, exist_ok=True)
        (copy/where/name).write_bytes(b'\0\5\x16\7')
    assert own_table(copy/'frames', copy/'masks', GREY).groupby('source').size().to_dict() == VIDEOS

def test_linked_folders_are_followed(home, copy, tmp_path):
    for kind in ('frames', 'masks'):
        shutil.rmtree(copy/kind/'berta')
        try: os.symlink(home/kind/'berta', copy/kind/'berta')
        except OSError: pytest.skip('no right to make links')
    os.symlink(copy/'frames', copy/'frames'/'anna'/'round')
    assert own_table(copy/'frames', copy/'masks', GREY).groupby('source').size().to_dict() == VIDEOS

@pytest.mark.parametrize('tag', [3, 6, 8])
def test_a_turned_photograph_lies_as_its_mask_does(copy, tag):
    "Masks are drawn on what viewers show"
    bright = np.zeros((150, 200, 3), np.uint8)
    bright[:60] = 200
    stored = np.ascontiguousarray(np.rot90(bright, {3: 2, 6: 1, 8: 3}[tag]))
    exif = Image.Exif()
    exif[0x0112] = tag
    Image.fromarray(stored).save(copy/'frames'/'anna'/'01.jpg', exif=exif, quality=95)
    halves = np.where(np.arange(150)[:, None] < 60, 90, 7).repeat(200, 1)
    Image.fromarray(halves.astype(np.uint8)).save(copy/'masks'/'anna'/'01.png')
    t = own_split(own_table(copy/'frames', copy/'masks', GREY), small(), 'anna', 'carla')
    d = cwcl_dls(t, small(batch=4), device='cpu')
    x,mask = d.valid_ds.batch([1])
    assert x[0].float().mean(0)[mask[0] == 1].mean() > 190 and x[0].float().mean(0)[mask[0] == 0].mean() < 10

def test_smoothed_edges_are_named_as_what_they_are(copy):
    rng = np.random.default_rng(0)
    mask = np.where(rng.random((150, 200)) < .5, 7, 90).astype(np.uint8)
    mask[0, :70] = np.arange(8, 78)
    mask[1, :9] = 8
    Image.fromarray(mask).save(copy/'masks'/'anna'/'00.png')
    says = r'anna/00.png: 70 values \(79 pixels\), the first 8 \(10 pixels\), are in no row .*smoothed edges, or a JPEG'
    with pytest.raises(InputError, match=says): own_table(copy/'frames', copy/'masks', GREY)

def test_pictures_of_other_kinds(copy):
    "TIFF, BMP, capitals in an ending; a mask as JPEG is refused with the reason"
    for name,new in (('01.jpg', '01.TIF'), ('03.jpg', '03.BMP'), ('00.png', '00.PNG')):
        Image.open(copy/'frames'/'anna'/name).save(copy/'x.png')
        (copy/'frames'/'anna'/name).unlink()
        Image.open(copy/'x.png').save(copy/'frames'/'anna'/new)
    (copy/'masks'/'anna'/'00.png').rename(copy/'masks'/'anna'/'00.PNG')
    t = own_table(copy/'frames', copy/'masks', GREY)
    assert t.groupby('source').size().to_dict() == VIDEOS and (t['mask'] != '').all()
    d = cwcl_dls(own_split(t, small(), 'berta', 'carla'), small(batch=6), device='cpu')
    assert len(d.train_ds.store.frames) == 10
    for path in list((copy/'masks').rglob('*.*')):
        Image.open(path).save(path.with_suffix('.jpg'))
        path.unlink()
    says = 'anna/00.jpg: a mask as JPEG, whose compression'
    with pytest.raises(InputError, match=says): own_table(copy/'frames', copy/'masks', GREY)
    with pytest.raises(InputError, match='a mask as JPEG'): own_table(copy/'frames', copy/'masks'/'*'/'*.jpg', GREY)

def test_empty_folders_are_one_line(home, tmp_path):
    (tmp_path/'empty'/'a').mkdir(parents=True)
    frames,masks,empty = home/'frames',home/'masks',tmp_path/'empty'
    cases = [(empty, masks, 'empty: no pictures in it'), (frames, empty, 'empty: no masks in it'),
        (frames/'*'/'*.bmp', masks, r'\*.bmp: no pictures')]
    for f,m,says in cases:
        with pytest.raises(InputError, match=says): own_table(f, m, GREY)

def test_phases_of_ones_own(home, tmp_path):
    names = [f'{v}/{k:02d}' for v,n in VIDEOS.items() for k in range(n)]
    phases = 'cut', 'enter', ''
    rows = [f'{n.replace("/", chr(92))}.png;{phases[i % 3]}' for i,n in enumerate(names)]
    (tmp_path/'p.csv').write_text('\n'.join(['name;phase', *rows]), encoding='utf-8-sig')
    t = own_table(home/'frames', home/'masks', GREY, phases=tmp_path/'p.csv')
    assert t.phase.tolist() == [(0, 1, -1)[i % 3] for i in range(15)] and t.phase.dtype == np.int8
    (tmp_path/'files').mkdir()
    (tmp_path/'files'/'anna.txt').write_text('frame,phase\n0,enter\n2,cut\n4,close\n')
    (tmp_path/'files'/'carla-phase.txt').write_text('Frame\tPhase\n1\tcut\n3\tenter\n')
    t = own_table(home/'frames', home/'masks', GREY, phases=tmp_path/'files')
    assert t[t.source == 'anna'].phase.tolist() == [2, 2, 1, 1, 0, 0] and (t[t.source == 'berta'].phase == -1).all()
    assert t[t.source == 'carla'].phase.tolist() == [-1, 1, 1, 2, 2]
    (tmp_path/'files'/'anna.txt').write_text('frame,phase\n2,cut\n0,enter\n')
    (tmp_path/'n.csv').write_text('name,phase\nanna/00,200\n')
    cases = {tmp_path/'files': 'anna.txt line 3: frame 0 follows 2',
        tmp_path/'n.csv': 'phase 200: give numbers up to 127',
        home/'gray.csv': 'no column phase', tmp_path/'gone': 'gone: no such list of phases',
        home/'frames': 'no file of a video in it'}
    for phases,says in cases.items():
        with pytest.raises(InputError, match=says): own_table(home/'frames', home/'masks', GREY, phases=phases)

@pytest.mark.parametrize('rows,says', [('0,a\n100,b\n9000,c', 'line 4: frame 9000 follows 100'),
    ('0,a\n0,b\n9,c', 'line 3: frame 0 follows 0')])
def test_a_file_of_phases_has_a_row_for_every_step(home, tmp_path, rows, says):
    (tmp_path/'anna.txt').write_text('frame,phase\n' + rows)
    with pytest.raises(InputError, match=says + '.*also where the phase stays'):
        own_table(home/'frames', home/'masks', GREY, phases=tmp_path)

def test_a_video_has_one_file_of_phases(home, tmp_path):
    for k in ('anna.txt', 'anna-phase.txt'): (tmp_path/k).write_text('frame,phase\n0,a\n')
    given = home/'frames',home/'masks',GREY
    with pytest.raises(InputError, match='a second file of the same video'): own_table(*given, phases=tmp_path)

def test_a_test_needs_masks(home):
    "Or its score would be that of validation, without a word"
    t = own_table(home/'frames', home/'masks', GREY)
    bare = t.assign(mask=t['mask'].where(t.source != 'carla', ''))
    says = 'carla: for the test, but without a mask'
    with pytest.raises(InputError, match=says): own_split(bare, small(), test='carla')
    assert (own_split(bare.assign(mask=t['mask'].where(t.frame > 0, '')), small(), test='carla').part == 'test').any()

def test_every_how_many_th_mask_is_validated_on(home):
    "And not every how many-th picture, which may have none"
    t = own_table(home/'frames', home/'masks', GREY)
    s = own_split(t.assign(mask=t['mask'].where(t.frame % 2 == 1, '')), small(batch=2, labelled=1), 'anna')
    for step,want in ((1, [1, 3, 5]), (2, [1, 5]), (80, [1])):
        dls = cwcl_dls(s, small(batch=2, labelled=1, valid_step=step), device='cpu')
        assert dls.valid.dataset.table.frame.tolist() == want

def test_videos_for_validation_may_be_dealt(home):
    t = own_table(home/'frames', home/'masks', GREY)
    dealt = [own_split(t, small(fold=k)) for k in range(3)]
    assert {s.source[s.part == 'valid'].unique().tolist()[0] for s in dealt} == set(VIDEOS)
    assert all(s.source[s.part == 'valid'].nunique() == 1 and not (s.part == 'test').any() for s in dealt)
    kept = [own_split(t, small(fold=k), test='anna') for k in range(2)]
    assert {s.source[s.part == 'valid'].iloc[0] for s in kept} == {'berta', 'carla'}
    assert all((s.part[s.source == 'anna'] == 'test').all() for s in kept)
    bare = t.assign(mask=t['mask'].where(t.source != 'berta', ''))
    assert len(own_folds(bare)) == 2
    assert all((own_split(bare, small(fold=k)).part[t.source == 'berta'] == 'train').all() for k in range(2))
    cases = [(2, None, 'anna', 'fold=2: choose 0 to 1'), (0, None, 'anna,berta', '1 video with masks besides'),
        (0, 'anna, doris', (), "'doris': no video"), (0, '', (), "valid='': names no video")]
    for k,valid,test,says in cases:
        with pytest.raises(InputError, match=says): own_split(t, small(fold=k), valid, test)

def test_a_video_plays_one_part(home):
    t = own_table(home/'frames', home/'masks', GREY)
    s = own_split(t, small(), 'berta', ['carla'])
    parts = s.groupby('source').part.unique().map(list).to_dict()
    assert parts == dict(anna=['train'], berta=['valid'], carla=['test'])
    assert s.labelled.sum() == 3
    assert (s.part[s.labelled] == 'train').all()
    assert (own_split(t, small(budget=1.), 'berta').labelled >= s.labelled)[s.part == 'train'].all()
    cases = [(('doris',), 'there are anna, berta, carla'), (('anna', 'anna'), 'one part'),
        ((['anna', 'berta', 'carla'],), 'no training frame')]
    for args,says in cases:
        with pytest.raises(InputError, match=says): own_split(t, small(), *args)

def test_labels_make_class_only_frames(copy):
    for k in range(2, 6): (copy/'masks'/'anna'/f'{k:02d}.png').unlink()
    head = 'name;floor;bar;disc;box'
    rows = [head, r'C:\own\frames\anna\02.png;1;1.0;0;0', 'anna/03.jpg;TRUE;0;0;1', './anna/00;0;0;0;0']
    (copy/'labels.csv').write_text('\n'.join(rows) + '\n', encoding='utf-8-sig')
    t = own_table(copy/'frames', copy/'masks', GREY, labels=copy/'labels.csv').set_index('name')
    assert t.loc['anna/02', ['floor', 'bar', 'disc', 'box']].tolist() == [True, True, False, False]
    assert t.loc['anna/00', 'floor']
    assert not t.loc['anna/04', ['floor', 'bar', 'disc', 'box']].any()
    r = small(budget=1., batch=4, labelled=2)
    d = cwcl_dls(own_split(t.reset_index(), r, 'berta', 'carla'), r, device='cpu')
    assert set(d.train_ds.table.name) == {f'{o}/0{k}' for o in ('anna', 'berta') for k in range(4)}
    assert d.train_ds.table.labelled.sum() == 2
    for text,says in (('floor,bar\nanna/02,1,1', 'no column disc'),
        ('floor,bar,disc,box\ndoris/02,1,1,0,0', r'line 2: no picture doris/02 \(1 of 1 rows\)'),
        ('floor,bar,disc,box\nanna/02,1,1,0,0\nanna/02,1,0,0,0', 'anna/02 is listed twice'),
        ('floor,bar,disc,box\nanna/02,1,yes,0,0', 'anna/02 has .*yes')):
        (copy/'labels.csv').write_text(f'name,{text}\n')
        labels = copy/'labels.csv'
        with pytest.raises(InputError, match=says): own_table(copy/'frames', copy/'masks', GREY, labels=labels)

def test_pictures_without_masks_and_labels_teach_where_nothing_reads_labels(copy):
    for k in (1, 2, 3): (copy/'masks'/'anna'/f'{k:02d}.png').unlink()
    t = own_split(own_table(copy/'frames', copy/'masks', copy/'gray.csv'), small(budget=1.), ('berta',), ('carla',))
    teacher = dict(method='random', average=.9, colors=.5, teacher=1., batch=5, labelled=2, valid_labels=False)
    told,blind = small(**teacher),small(**teacher, allowed=False)
    left = [o for o in own_remarks(t, told) if 'left out' in o]
    assert left == ['3 pictures with neither mask nor label are left out (--labels)']
    assert not [o for o in own_remarks(t, blind) if 'left out' in o]
    with pytest.raises(InputError, match='3 class-labelled frames cannot fill'): cwcl_dls(t, told)
    learn = cwcl_learner(cwcl_dls(t, blind, device='cpu'))
    with learn.no_bar(), learn.no_logging(): learn.fit_recipe()
    assert learn.dls.train_ds.table.name.tolist() == sorted(t.name[t.source == 'anna'])

def test_ten_lines_train(home, tmp_path):
    text = class_text(home/'color.csv')
    r = small(class_set=text, batch=6, labelled=3)
    set_seed(r.seed, r.threads)
    split = own_split(own_table(home/'frames', home/'colors', text), r, valid='berta', test='carla')
    learn = cwcl_learner(cwcl_dls(split, r, device='cpu'), 'dcl+cls')
    rows = split[split.part == 'test']
    before = evaluate(learn.model, learn.dls, rows)
    with learn.no_bar(), learn.no_logging(): learn.fit_one_cycle(40, 2e-2)
    after = evaluate(learn.model, learn.dls, rows)
    assert after['mean_iou'] > before['mean_iou'] + .2 and set(after['class_iou']) == {'floor', 'bar', 'disc', 'box'}
    assert after['native']['mean_iou'] > before['native']['mean_iou'] + .2
    assert np.sum(after['native']['confusion']) == 5*150*200
    again = load_model(save_model(tmp_path/'m.safetensors', learn.model), 'cpu')
    x,mask = learn.dls.test_dl(rows).one_batch()
    assert again.classes.names == ('floor', 'bar', 'disc', 'box') and torch.equal(again(x), learn.model.eval()(x))
    ids = OwnClasses(text).read(read_mask(rows['mask'].iloc[0]))
    truth = np.asarray(Image.fromarray(ids).resize((100, 75), Image.NEAREST))
    assert (np.asarray(mask[0]) == truth).all()
    segment_images(again, rows.image.iloc[1], tmp_path/'seen', progress=False)
    seen = OwnClasses(text).read(read_mask(tmp_path/'seen'/'01_mask.png'))
    assert seen.shape == (150, 200) and seen.max() < 4
    with learn.no_bar(): assert learn.predict(rows.image.iloc[1])[0].shape == (75, 100)

def test_own_frames_in_two_stages(home, tmp_path):
    text = class_text(home/'color.csv')
    r = small(class_set=text, batch=6, labelled=3, stage='frozen', epochs=1)
    split = own_split(own_table(home/'frames', home/'colors', text), r, valid='berta', test='carla')
    found = stages_run(r, split, out=tmp_path/'o', device='cpu')
    assert set(found['test']['class_iou']) == {'floor', 'bar', 'disc', 'box'}
    assert read_result(tmp_path/'o')['pretrain']['stage'] == 'pretrain'
    again = stages_run(r, lambda: split, out=tmp_path/'again', device='cpu')
    assert again['test'] == found['test'], 'or what makes the table'
    shutil.rmtree(tmp_path/'o'/'pretrain')
    with pytest.raises(InputError, match='a finished run'): stages_run(r, pytest.fail, out=tmp_path/'o', device='cpu')
    assert not (tmp_path/'o'/'pretrain').exists(), 'no first stage is trained for a second one that is refused'

def test_a_note_says_how_many_masks_are_used(home):
    t = own_table(home/'frames', home/'masks', GREY)
    def said(r): return [o for o in own_remarks(own_split(t, r, 'berta', 'carla'), r) if 'masks are trained on' in o]
    assert said(small()) == ['3 of 6 masks are trained on (budget=0.5); --budget 1 takes all']
    assert not said(small(budget=1.))

def test_a_note_names_a_class_that_no_mask_shows(copy):
    "As when masks of 0 and 255 are read as 0 and 1"
    own = OwnClasses(GREY)
    for p in (copy/'masks').rglob('*.png'):
        white = np.where(own.read(read_mask(p)), 255, 0)
        Image.fromarray(white.astype(np.uint8)).save(p)
    def said(text):
        r = small(class_set=text)
        t = own_split(own_table(copy/'frames', copy/'masks', text), r, 'berta', 'carla')
        return [o for o in own_remarks(t, r) if 'no mask has' in o]
    assert said('floor=0, tool=1') == ['tool: no mask has 16 pixels of it; white (255) is of no class unless a class has '
        'that value']
    assert not said('floor=0, tool=255')

@pytest.mark.parametrize('part', ['valid', 'test', 'train'])
def test_a_note_names_copies_in_two_parts(copy, part):
    "A folder copied for a try, a picture that is as long as another, and both within the part of the first"
    for kind in ('frames', 'masks'): shutil.copytree(copy/kind/'anna', copy/kind/'dora')
    table = own_table(copy/'frames', copy/'masks', GREY)
    parts = dict(valid='berta', test='carla')
    if part in parts: parts[part] += ',dora'
    t = own_split(table, small(), **parts)
    found = copies_apart(t)
    if part == 'train':
        assert not len(found) and not [o for o in own_remarks(t, small()) if 'one picture' in o]
        return
    assert sorted(found.name) == sorted(t.name[t.source.isin(['anna', 'dora'])])
    said = [o for o in own_remarks(t, small()) if 'one picture' in o]
    n = (t.source == 'anna').sum()
    assert len(said) == 1 and f'of dora ({part}) are one picture; {n} in all' in said[0]
    other = Path(t.image[t.source == 'dora'].iloc[0])
    other.write_bytes(other.read_bytes()[:-1] + b'x')
    assert len(copies_apart(t)) == len(found) - 2

def test_fields_that_belong_to_cholecseg8k_are_refused(home):
    t = own_table(home/'frames', home/'masks', GREY)
    cases = ((dict(budget_of='all'), "budget_of='all'.*choose fold"), (dict(fold_scheme='seeds'), 'pinned or six'))
    for change,says in cases:
        with pytest.raises(InputError, match=says): own_split(t, small(**change))
    assert own_split(t, small(fold_scheme='six', fold=2)).part.eq('valid').any(), 'as many folds as there are videos'

def test_frames_count_in_the_order_of_their_numbers(copy):
    for kind in ('frames', 'masks'):
        for k,p in enumerate(sorted((copy/kind/'anna').iterdir())): p.rename(p.with_stem(f'frame{2*k}'))
    t = own_table(copy/'frames', copy/'masks', GREY).set_index('name').frame
    assert [t[f'anna/frame{k}'] for k in (0, 2, 4, 6, 8, 10)] == list(range(6))

def test_parts_of_a_run_leave_out_what_nobody_looks_at(copy):
    for k in (1, 2, 3): (copy/'masks'/'anna'/f'{k:02d}.png').unlink()
    (copy/'masks'/'carla'/'00.png').unlink()
    told = small(budget=1.)
    t = own_split(own_table(copy/'frames', copy/'masks', GREY), told, 'berta', 'carla')
    assert run_parts(t, told) == (3, 4, 4) and run_parts(t, small(method='random')) == (6, 4, 4)

def test_empty_lists_and_missing_outlines_are_named(home, tmp_path):
    lists = dict(empty=('', 'is empty'), head=('name,value\n', 'a header and no row'))
    for k,(text,says) in lists.items():
        (tmp_path/f'{k}.csv').write_text(text)
        with pytest.raises(InputError, match=f'{k}.csv: .*{says}'): class_text(tmp_path/f'{k}.csv')
    given = home/'frames',tmp_path/'gone.json',GREY
    with pytest.raises(InputError, match='gone.json: no such file'): own_table(*given, drawn=tmp_path)
