"The reader: table, index, audit and command on tiny folders, each kind of damage, and real frames."
import os, re, runpy, shutil, subprocess, sys
from pathlib import Path
import numpy as np, pandas as pd, pytest
from PIL import Image
from cwcl.core import InputError
from cwcl.data import cholec, files as data_files
from cwcl.data.cholec import PROBLEMS, audit, audit_text, cwcl_data, frame_table, phase_at, presence, read_frame
from cwcl.data.cholec import read_phases
from cwcl.data.files import FACTS, INDEX, frame_facts, list_frames, mask_facts, scan
from cwcl.data.images import picture_size, read_mask
from cwcl.data.labels import CLASSES, class_set, decode_mask, present_classes, unknown_values

SIZE = 24,16

def pair(root, video, start, frame, mask=None, size=SIZE):
    "Write a frame and its mask; both are noise unless a mask is given"
    folder = Path(root)/f'video{video:02}'/f'video{video:02}_{start:05}'
    folder.mkdir(parents=True, exist_ok=True)
    rng = np.random.default_rng(video*1000 + frame)
    if mask is None:
        mask = rng.choice(CLASSES.code.to_numpy(np.uint8)[[0, 2, video % 13]], size[::-1])
        mask[[0,-1]] = mask[:,[0,-1]] = 255
    Image.fromarray(rng.integers(0, 256, (*size[::-1], 3), dtype=np.uint8)).save(folder/f'frame_{frame}_endo.png')
    if mask.ndim == 2: mask = np.repeat(mask[...,None], 3, axis=2)
    Image.fromarray(mask).save(folder/f'frame_{frame}_endo_watershed_mask.png')
    for other in 'color_mask','mask': Image.new('RGB', size).save(folder/f'frame_{frame}_endo_{other}.png')
    return folder/f'frame_{frame}_endo.png',folder/f'frame_{frame}_endo_watershed_mask.png'

@pytest.fixture
def root(tmp_path):
    root = tmp_path/'data'
    for v,start in ((1, 80), (1, 160), (12, 15750), (52, 0)):
        for f in range(start+8, start+11): pair(root, v, start, f)
    (root/'phase_annotations').mkdir()
    for v,n in ((1, 400), (12, 20000), (52, 400)):
        rows = ''.join(f'{i}\t{"Preparation" if i < 90 else "ClippingCutting"}\r\n' for i in range(n))
        (root/'phase_annotations'/f'video{v:02}-phase.txt').write_text('Frame\tPhase\r\n' + rows, newline='')
    return root

def files(root, kind='_endo_watershed_mask.png'): return sorted(Path(root).rglob(f'*{kind}'))
def one_line(e):
    assert len(str(e.value).splitlines()) == 1
    return str(e.value)

# The table

def test_rows_columns_and_order(root):
    t = frame_table(root)
    assert list(t.columns) == ['video', 'clip', 'frame', 'image', 'mask', *CLASSES.name, 'phase']
    assert list(zip(t.video, t['clip'], t.frame)) == sorted(zip(t.video, t['clip'], t.frame))
    assert t['clip'].tolist()[:3] == ['video01_00080']*3 and t.frame.tolist()[:3] == [88, 89, 90]
    assert t.index.tolist() == list(range(12))
    assert t.phase.dtype == np.int8 and all(t[c].dtype == bool for c in CLASSES.name)
    assert all(re.search(r'frame_\d+_endo\.png$', o) and Path(o).exists() for o in t.image)
    assert all(o.endswith('_endo_watershed_mask.png') for o in t['mask'])

def test_frame_numbers_sort_as_numbers(tmp_path):
    for f in (99, 100, 9): pair(tmp_path, 1, 0, f)
    assert frame_table(tmp_path).frame.tolist() == [9, 99, 100]

@pytest.mark.parametrize('min_pixels', [1, 16, 130])
def test_presence_equals_a_look_at_each_mask(root, min_pixels):
    t = frame_table(root, min_pixels=min_pixels)
    for r in t.to_dict('records'):
        want = present_classes(decode_mask(np.asarray(Image.open(r['mask']))), min_pixels)
        assert [r[c] for c in CLASSES.name] == want.tolist()
    assert (presence(t, class_set(8)) == t[list(class_set(8).names)].to_numpy()).all()

def test_min_pixels_are_enough(tmp_path):
    mask = np.full(SIZE[::-1], 21, np.uint8)
    mask[0,:16],mask[1,:15] = 22,25
    pair(tmp_path, 1, 80, 80, mask)
    t = frame_table(tmp_path)
    assert t.gallbladder[0] and not t['cystic duct'][0]
    assert audit(tmp_path).query('problem == "specks"').value.tolist() == ['cystic duct: 15 pixels']

@pytest.mark.parametrize('size', [(5, 4), (427, 240), (854, 480)])
def test_any_frame_size(tmp_path, size):
    pair(tmp_path, 1, 80, 80, size=size)
    assert frame_table(tmp_path)[['black background', 'liver']].all().all() or size == (5, 4)
    assert scan(tmp_path)[['width', 'height']].values.tolist() == [list(size)]

def test_phases(root):
    t = frame_table(root)
    assert t.phase.tolist() == [0 if f < 90 else 2 for f in t.frame]
    assert (frame_table(root, root/'phase_annotations').phase == t.phase).all()
    assert (frame_table(root, root/'phase_annotations'/'video01-phase.txt').phase[t.video != 'video01'] == -1).all()
    shutil.rmtree(root/'phase_annotations')
    assert (frame_table(root).phase == -1).all()

def test_lag_moves_the_phase(tmp_path):
    for f in (95, 110): pair(tmp_path, 52, 80, f)
    (tmp_path/'video52.csv').write_text('frame,phase\n' + ''.join(f'{i},{int(i >= 90)}\n' for i in range(200)))
    assert frame_table(tmp_path, tmp_path).phase.tolist() == [1, 1]
    assert frame_table(tmp_path, tmp_path, lag=True).phase.tolist() == [0, 1]

@pytest.mark.parametrize('mode', ['L', 'RGB', 'RGBA', 'P'])
def test_masks_of_every_mode(root, mode):
    want = frame_table(root)
    for m in files(root): Image.open(m).convert('L').convert(mode).save(m)
    assert frame_table(root).equals(want)

def test_read_frame(root):
    t = frame_table(root)
    frame,mask = read_frame(t.iloc[0])
    assert frame.shape == (16,24,3) and frame.dtype == np.uint8
    assert (mask == decode_mask(np.asarray(Image.open(t['mask'][0])))).all()
    Image.open(t.image[1]).convert('L').save(t.image[1])
    Image.open(t.image[2]).convert('RGBA').save(t.image[2])
    assert all(read_frame(r)[0].shape == (16,24,3) for _,r in t[:3].iterrows())
    assert read_frame(dict(image=t.image[0], mask=''))[1] is None

def test_a_frame_may_lack_its_mask(root):
    files(root)[0].unlink()
    t = frame_table(root)
    assert t['mask'][0] == '' and not t.loc[0, CLASSES.name].any()

# Bad input, a line each

def test_bad_folders(tmp_path):
    with pytest.raises(InputError, match='no such folder'): frame_table(tmp_path/'nosuch')
    with pytest.raises(InputError, match='give the folder that holds video01'): frame_table(tmp_path)
    (tmp_path/'file').write_text('')
    with pytest.raises(InputError, match='neither a folder nor a zip'): audit(tmp_path/'file')

def test_mask_without_its_frame(root):
    files(root, '_endo.png')[4].unlink()
    with pytest.raises(InputError) as e: frame_table(root)
    assert str(files(root)[4]) in one_line(e) and 'add the frame' in str(e.value)

@pytest.mark.parametrize('kind', ['_endo.png', '_endo_watershed_mask.png'])
@pytest.mark.parametrize('keep', [0, 5, 20, 60, -30, -5])
def test_truncated_png(root, kind, keep):
    p = files(root, kind)[5]
    p.write_bytes(p.read_bytes()[:keep])
    with pytest.raises(InputError) as e: frame_table(root)
    assert one_line(e).startswith(f'{p}: unreadable') and 'fetch the file again' in str(e.value)
    with pytest.raises(InputError, match='unreadable'): picture_size(p)
    if keep < 0: return
    with pytest.raises(InputError, match='unreadable'): read_mask(p)

@pytest.mark.parametrize('kind', ['_endo.png', '_endo_watershed_mask.png'])
def test_not_a_png(root, kind):
    p = files(root, kind)[0]
    p.write_text('<html>404</html>')
    with pytest.raises(InputError, match=r"unreadable \(no picture, it begins with '<html>404"): frame_table(root)
    Image.new('RGB', SIZE).save(p, format='GIF')
    with pytest.raises(InputError, match=r'another kind of file \(a GIF\)'): frame_table(root)

def test_what_could_not_be_read_is_tried_again(root):
    p = files(root, '_endo.png')[0]
    whole = p.read_bytes()
    stat = p.stat()
    p.write_bytes(b'?'*len(whole))
    os.utime(p, ns=(stat.st_atime_ns, stat.st_mtime_ns))
    with pytest.raises(InputError, match='unreadable'): frame_table(root)
    p.write_bytes(whole)
    os.utime(p, ns=(stat.st_atime_ns, stat.st_mtime_ns))
    assert len(frame_table(root))

def test_brackets_in_a_path(root):
    moved = root.rename(root.with_name('data (1)'))
    files(moved)[0].write_bytes(b'')
    with pytest.raises(InputError) as e: frame_table(moved)
    assert one_line(e).count('unreadable') == 1 and one_line(e).endswith('unreadable (empty); fetch the file again')

def test_a_flipped_bit(root):
    p = files(root, '_endo.png')[0]
    b = bytearray(p.read_bytes())
    b[len(b)//2] ^= 16
    p.write_bytes(bytes(b))
    with pytest.raises(InputError, match='unreadable'): frame_table(root)

def test_mask_of_another_size(root):
    m = files(root)[3]
    Image.open(m).resize((12,8), Image.NEAREST).save(m)
    with pytest.raises(InputError) as e: frame_table(root)
    assert one_line(e).startswith(str(m)) and '12x8, its frame 24x16' in str(e.value) and 'nearest' in str(e.value)

@pytest.mark.parametrize('row,match', [
    ('200\tPreparation\r\n205\tPreparation\r\n', 'line 402: frame 205|frame 200'),
    ('400\tLunch\r\n', "line 402: unknown phase 'Lunch'")])
def test_bad_phase_file(root, row, match):
    p = root/'phase_annotations'/'video01-phase.txt'
    with p.open('a', newline='') as f: f.write(row)
    with pytest.raises(InputError, match=match) as e: frame_table(root)
    assert one_line(e).startswith(str(p))
    report = audit(root)
    assert report.problem[0] == 'bad phase file' and report.file[0] == str(p) and report.attrs['stops'] == 1

def test_bad_phases_argument(root):
    with pytest.raises(InputError, match='no such folder'): frame_table(root, root/'nosuch')
    with pytest.raises(InputError, match='no videoNN-phase.txt'): frame_table(root, root/'video01')

# The index

@pytest.fixture
def reads(monkeypatch):
    "The pairs that are really read"
    seen = []
    real_facts = data_files.frame_facts
    def spy(files, root):
        seen.append(files)
        return real_facts(files, root)
    monkeypatch.setattr(data_files, 'frame_facts', spy)
    return seen

def test_second_reading_reads_nothing(root, reads):
    first = frame_table(root)
    assert len(reads) == 12
    reads.clear()
    assert frame_table(root).equals(first) and frame_table(root, min_pixels=1)['liver'].all()
    assert not reads

def test_changed_new_and_removed_files_are_noticed(root, reads):
    frame_table(root)
    reads.clear()
    m = files(root)[2]
    Image.fromarray(np.full((*SIZE[::-1],3), 22, np.uint8)).save(m)
    pair(root, 52, 0, 70)
    files(root)[0].unlink()
    files(root, '_endo.png')[0].unlink()
    t = frame_table(root)
    assert len(t) == 12 and len(reads) == 2
    assert t.gallbladder[t['mask'] == str(m)].all()
    assert len(pd.read_csv(root/INDEX, skiprows=1)) == 12

def test_a_file_of_the_same_size_but_another_time_is_read_again(root, reads):
    frame_table(root)
    reads.clear()
    os.utime(files(root)[0], ns=(0, 0))
    frame_table(root)
    assert len(reads) == 1

@pytest.mark.parametrize('junk', [b'', b'\xff\xfe', b'stamp,file\nx,1\n', b'stamp,' + ','.join(FACTS).encode()])
def test_a_damaged_index_is_rebuilt(root, reads, junk):
    want = frame_table(root)
    (root/INDEX).write_bytes(junk)
    assert frame_table(root).equals(want)
    assert len(pd.read_csv(root/INDEX, skiprows=1)) == 12

def test_a_folder_that_is_not_writable(root, monkeypatch):
    def refuse(*_): raise PermissionError('read only')
    monkeypatch.setattr(data_files, 'atomic_path', refuse)
    assert len(frame_table(root)) == 12 and not (root/INDEX).exists()

def test_a_folder_without_write_bits_is_left_alone(root):
    root.chmod(0o555)
    try: assert len(frame_table(root)) == 12 and not (root/INDEX).exists()
    finally: root.chmod(0o755)

def test_a_moved_folder_keeps_its_index(root, reads):
    frame_table(root)
    reads.clear()
    moved = root.rename(root.with_name('moved'))
    assert frame_table(moved).image[0].startswith(str(moved)) and not reads

@pytest.mark.parametrize('workers', [1, 2, 5])
def test_workers_do_not_change_the_table(root, workers):
    want = frame_table(root)
    (root/INDEX).unlink()
    assert frame_table(root, workers=workers).equals(want)

def test_progress_shows_the_time_left(root, capsys):
    frame_table(root, progress=True)
    err = capsys.readouterr().err
    assert '12/12' in err and 'frame/s' in err and '<' in err

# What is counted

@pytest.mark.parametrize('seed', range(4))
def test_mask_facts_against_literal_counts(seed):
    rng = np.random.default_rng(seed)
    a = rng.choice(np.array([0, 7, 255, 50, 21, 5], np.uint8), (9,11))
    f = mask_facts(a)
    h,w = a.shape
    edge = [(y,x) for y in range(h) for x in range(w) if y in (0, h-1) or x in (0, w-1)]
    assert f['border'] == pytest.approx(sum(a[o] == 255 for o in edge)/len(edge), abs=5e-4)
    assert f['contour'] == sum(a[y,x] == 255 for y in range(1, h-1) for x in range(1, w-1))
    assert f['zero'] == (a == 0).sum()
    assert f['unknown'] == sum(unknown_values(a).values())
    assert f['values'] == f'7:{(a == 7).sum()}'
    assert [f[c] for c in CLASSES.name] == [(a == k).sum() for k in CLASSES.code]
    assert f['channels'] == 1 and list(f) == FACTS[6:]

def test_many_unknown_values_are_cut_short():
    assert mask_facts(np.arange(100, 140, dtype=np.uint8).reshape(4,10))['values'] == '100:1 101:1 102:1 103:1 ...'

def test_frame_facts_of_a_tiny_pair(tmp_path):
    pair(tmp_path, 1, 0, 0, np.full((1,1), 50, np.uint8), size=(1,1))
    stem = 'video01/video01_00000/frame_0_endo'
    assert not frame_facts((f'{stem}.png', f'{stem}_watershed_mask.png'), tmp_path)['problem']

# The audit

def damage(root):
    m,f = files(root),files(root, '_endo.png')
    a = np.array(Image.open(m[0]))
    a[5,5:9],a[7,7] = 99,25
    a[[0,-1]] = a[:,[0,-1]] = 21
    a[3,3],a[3,4] = 255,0
    Image.fromarray(a).convert('RGBA').save(m[0])
    f[1].unlink()
    f[2].write_bytes(f[2].read_bytes()[:-40])
    m[3].write_bytes(m[3].read_bytes()[:70])
    Image.open(m[4]).resize((12,8), Image.NEAREST).save(m[4])
    m[5].unlink()
    Image.open(f[6]).resize((30,20)).save(f[6])
    Image.open(m[6]).resize((30,20), Image.NEAREST).save(m[6])
    p = root/'phase_annotations'
    (p/'video12-phase.txt').unlink()
    (p/'video52-phase.txt').write_text('0\t0\n1\t0\n')
    return m,f

def test_phases_that_look_odd_are_listed_and_passed_on(root):
    p = root/'phase_annotations'
    (p/'video12-phase.txt').write_text(''.join(f'{25*i}\t{1 + i//300}\n' for i in range(1500)))
    report = audit(root)
    odd = report[report.problem == 'odd phases']
    assert odd.file.tolist() == [str(p/'video12-phase.txt')] and 'ids from 1 to 5 and no 0' in odd.value.iloc[0]
    assert report.attrs['stops'] == 0 and report.attrs['summary']['odd phases'] == 1
    remarks = frame_table(root).attrs['remarks']
    assert len(remarks) == 1 and remarks[0].startswith(f'{p/"video12-phase.txt"}: phase ids from 1 to 5')
    assert frame_table(root, False).attrs['remarks'] == [] and (frame_table(root, False).phase == -1).all()

def test_audit_lists_everything(root):
    m,f = damage(root)
    report = audit(root)
    assert list(report.columns) == ['file', 'problem', 'value', 'cure']
    rel = lambda p: p.relative_to(root).as_posix()
    got = set(zip(report.file, report.problem))
    want = {(rel(m[1]), 'mask without its frame'), (rel(f[2]), 'unreadable'), (rel(m[3]), 'unreadable'),
        (rel(m[4]), 'mask of another size'), (rel(f[5]), 'frame without its mask'), (rel(f[6]), 'another frame size'),
        (rel(m[0]), 'unknown values'), (rel(m[0]), 'alpha channel'), (rel(m[0]), 'specks'),
        *((o, 'phase missing') for o in ('video12-phase.txt', str(root/'phase_annotations'/'video52-phase.txt')))}
    names = 'video01_00080', 'video01_00160', 'video12_15750', 'video52_00000'
    clips = {(f'{c[:7]}/{c}', 'clip length') for c in names}
    assert got == want | clips
    assert report.attrs['stops'] == 4
    stops = report.problem.map(lambda p: PROBLEMS[p][0]).tolist()
    assert stops == sorted(stops, reverse=True)
    value = dict(zip(zip(report.file, report.problem), report.value))
    assert value[rel(m[0]), 'unknown values'] == '4 pixels (99:4)'
    assert value[rel(m[0]), 'specks'] == 'cystic duct: 1 pixels'
    assert (report.cure.str.len() > 5).all()
    s = report.attrs['summary']
    assert (s['videos'], s['clips'], s['frames']) == (3, 4, 12)
    assert {k: s[k] for k in PROBLEMS if k in s} == report.groupby('problem').file.nunique().to_dict()
    assert [s[k] for k in s if 'border' in k] == [1]
    assert [s[k] for k in s if 'contour' in k] == [1]
    assert [s[k] for k in s if 'unsegmented' in k] == [1]

def test_audit_of_whole_clips_finds_nothing(tmp_path):
    for f in range(80): pair(tmp_path, 1, 80, 80+f)
    (tmp_path/'video01.csv').write_text(''.join(f'{25*i},0\n' for i in range(20)))
    report = audit(tmp_path, tmp_path)
    assert not len(report) and report.attrs['stops'] == 0
    assert 'nothing would stop a training' in audit_text(report)

def test_everything_that_stops_the_table_stops_in_the_audit(root):
    "One damage at a time: the table raises if and only if the audit counts a stop"
    def alone(change):
        to = root.with_name('copy')
        shutil.rmtree(to, ignore_errors=True)
        shutil.copytree(root, to)
        change(to)
        try: frame_table(to)
        except InputError: return True, audit(to).attrs['stops']
        return False, audit(to).attrs['stops']
    changes = [lambda r: files(r)[0].unlink(), lambda r: files(r, '_endo.png')[0].unlink(),
        lambda r: files(r)[0].write_bytes(b''),
        lambda r: Image.new('RGB', (3,3)).save(files(r)[0]),
        lambda r: Image.new('RGB', SIZE, (9,9,9)).save(files(r)[0]),
        lambda r: (r/'phase_annotations'/'video01-phase.txt').write_text('x'),
        lambda r: shutil.rmtree(r/'phase_annotations')]
    assert [alone(c) for c in changes] == [(s, int(s)) for s in (False, True, True, True, True, True, False)]

# The command

@pytest.fixture
def command(tmp_path, monkeypatch, capsys):
    "Run the console script in this process: exit code, or the line it dies with, and what it wrote"
    script = tmp_path/'cwcl_data'
    script.write_text('import sys; from cwcl.data.cholec import cwcl_data; sys.exit(cwcl_data())')
    def run(*args):
        monkeypatch.setattr(sys, 'argv', [str(script), *map(str, args)])
        with pytest.raises(SystemExit) as e: runpy.run_path(str(script), run_name='__main__')
        out = capsys.readouterr()
        return e.value.code or 0,out.out,out.err
    return run

def test_command_audits(root, command):
    code,out,_ = command('audit', root)
    assert code == 0 and 'video01/video01_00080: clip length: 3 frames, not 80; ' in out and 'frames: 12' in out
    damage(root)
    code,out,_ = command('audit', root)
    assert code == 1 and '4 would stop a training' in out

def test_command_indexes(root, command):
    code,out,err = command('index', root)
    assert code == 0 and '3 videos, 4 clips, 12 frames, 0 without phase' in out and '12/12' in err
    assert (root/INDEX).exists()
    assert '12 without phase' in command('index', root, '--phases', copied(root))[1]

def copied(root):
    "A folder with phases of another video alone"
    (root/'other').mkdir()
    (root/'other'/'video77.csv').write_text('0,0\n')
    return root/'other'

def test_command_refuses_in_one_line(tmp_path, command):
    bad = [(('audit', tmp_path/'nosuch'), 'no such folder'), (('index', tmp_path), 'give the folder'),
        (('write', tmp_path/'new', '--size', '12'), "size '12'")]
    for args,line in bad:
        code,out,_ = command(*args)
        assert code.startswith('cwcl_data: ') and line in code and len(code.splitlines()) == 1 and not out
    assert not (tmp_path/'new').exists()
    assert command('burn', tmp_path)[0] == 2

def test_command_writes_scenes_that_read(tmp_path, command):
    options = '--frames-per-clip 1 --size 64x36 --seed 3 --workers 1'.split()
    code,out,_ = command('write', tmp_path/'scenes', *options)
    assert code == 0 and '17 videos, 101 clips, 101 frames' in out
    t = frame_table(tmp_path/'scenes')
    assert t.liver.all() and len(t) == 101
    assert audit(tmp_path/'scenes').attrs['stops'] == 0

def test_installed_command():
    done = subprocess.run([Path(sys.executable).with_name('cwcl_data'), '--help'], capture_output=True, text=True)
    assert done.returncode == 0 and 'Write the drawn scenes' in done.stdout and '--frames-per-clip' in done.stdout

def test_names_relied_on():
    assert cholec.read_phases is read_phases
    assert 'read_phases' in cholec.__all__
    assert callable(phase_at)
    assert callable(cwcl_data)

# Real frames

TRUTH = dict(video52={11: 43703, 12: 18102, 21: 6024, 22: 3580, 31: 2628, 50: 27777},
    video55={11: 4754, 12: 14577, 13: 11180, 21: 24973, 22: 13619, 31: 3439, 50: 29272})

@pytest.fixture
def real_copy(real, tmp_path):
    "A writable copy that goes away with the test"
    return shutil.copytree(real/'cholecseg8k', tmp_path/'real', copy_function=shutil.copyfile)

def test_real_pixel_counts(real_copy):
    t = scan(real_copy).set_index('video')
    for v,truth in TRUTH.items():
        assert {k: t.loc[v, c] for c,k in zip(CLASSES.name, CLASSES.code) if t.loc[v, c]} == truth
        assert (t.loc[v, 'unknown'], t.loc[v, 'zero'], t.loc[v, 'contour']) == (0, 0, 0)
        assert t.loc[v, 'border'] > .25

def test_real_table(real, real_copy):
    t = frame_table(real_copy, real/'cholec80'/'phases_1fps')
    want = [['video52', 'video52_00080', 120], ['video55', 'video55_00508', 508]]
    assert t[['video', 'clip', 'frame']].values.tolist() == want
    facts = pd.read_csv(real/'facts'/'cholecseg8k_frames.csv').merge(t[['clip', 'frame']])
    shown = [set(np.flatnonzero(r)) for r in t[CLASSES.name.tolist()].to_numpy()]
    assert shown == [set(map(int, o.split())) for o in facts.classes_present]
    assert (t.phase >= 0).all()
    assert (frame_table(real_copy, real/'cholec80'/'phases_1fps', lag=True).phase >= 0).all()
    assert len(list_frames(real_copy)) == 2

def test_real_audit(real, real_copy):
    report = audit(real_copy, real/'cholec80'/'phases_1fps')
    assert report.attrs['stops'] == 0
    assert set(report.problem) == {'clip length'}
    s = report.attrs['summary']
    assert s['liver'] == '2 frames, 30997 pixels'
    assert s['gastrointestinal tract'] == '1 frames, 11180 pixels'
    assert s['blood'] == '0 frames, 0 pixels'
    assert [s[k] for k in s if k.startswith('masks with')] == [0, 0, 0]
    assert set(audit(real_copy).problem) == {'clip length', 'phase missing'}
