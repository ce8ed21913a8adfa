"Phase files in every dialect, the lag of repeated frames, bad input."
import json
import numpy as np, pandas as pd, pytest
from cwcl.core import InputError, data_file
from cwcl.data.labels import PHASES
from cwcl.data.phases import phase_at, read_phases
from cwcl.data.join import cholec80_frame, frame_phases, phase_files, phase_remark

@pytest.fixture
def write(tmp_path):
    def f(text, name='video05-phase.txt'):
        (tmp_path/name).write_bytes(text if isinstance(text, bytes) else text.encode())
        return tmp_path/name
    return f

def test_the_dialects_agree(write):
    rows = [(25*i, i//3) for i in range(12)]
    by_id = write(''.join(f'{f}\t{p}\n' for f,p in rows), 'video01-phase.txt')
    by_name = write('Frame\tPhase\r\n' + ''.join(f'{f}\t{PHASES[p]}\r\n' for f,p in rows), 'video02-phase.txt')
    with_tools = write('frame,phase,grasper,hook\n' + ''.join(f'{f},{p},1,0\n' for f,p in rows), 'video03.csv')
    swapped = write('\ufeffPhase,Frame\n' + ''.join(f'{PHASES[p]},{f}\n' for f,p in rows) + '\n', 'video04.csv')
    for p in by_id,by_name,with_tools,swapped:
        s = read_phases(p)
        assert s.index.tolist() == [f for f,_ in rows] and s.tolist() == [p for _,p in rows] and s.dtype == 'int8'

@pytest.mark.parametrize('text', [
    '"frame","phase"\n"0","Preparation"\n"25","CalotTriangleDissection"\n', '0.0\t0.0\n25.0\t1.0\n',
    '0  preparation\n25  1\n',
    'Phase_ID;Frame No\n0;0\n1,0;25,0\n', 'FRAME_IDX , PHASE\n0 , PREPARATION\n25 , calot triangle dissection\n',
    ',frame,phase\n0,0,preparation\n1,25,carlot-triangle-dissection\n',
    '\n"Frame" "Surgical phase"\n0 "Preparation"\n25 "Calot-Triangle Dissection"\n',
    'frame;phase;grasper\n0;Preparation;0.0\n25;CALOTTRIANGLEDISSECTION;1.0\n'])
def test_what_spreadsheets_write_is_read(write, text): assert read_phases(write(text)).to_dict() == {0: 0, 25: 1}

def test_every_name_of_a_phase_is_known(write):
    other = ['preparation', 'carlot-triangle-dissection', 'clipping-and-cutting', 'gallbladder-dissection',
        'gallbladder-packaging', 'cleaning-and-coagulation', 'gallbladder-extraction']
    for names in (PHASES, other, [o.upper() for o in PHASES], [o.replace('-', ' ').title() for o in other]):
        assert read_phases(write(''.join(f'{i}\t{o}\n' for i,o in enumerate(names)))).tolist() == list(range(7))

@pytest.mark.parametrize('text,says', [
    ('frame,phase\n0,Phase 1\n', "unknown phase 'Phase 1'"), ('0\tP3\n', "unknown phase 'P3'"),
    ('0\t-1\n', "unknown phase '-1'"),
    ('seconds,phase\n0,0\n', 'seconds times 25'), ('Timestamp;Phase\n00:00:00;0\n', 'seconds times 25'),
    ('00:00:01\tPreparation\n', "'00:00:01' is a time"),
    ('frame,phase\n00:01,0\n', "'00:01' is a time"), ('0.04\t0\n', "'0.04' is not a frame number"),
    ('Frame|Phase\n0|Preparation\n', 'tabs, semicolons, commas or blanks'),
    ('0|Preparation\n', 'tabs, semicolons, commas or blanks'),
    ('0\t0\n\0\n', 'plain text'), ('{"annotations": ' + 20_000*'x' + '}', 'plain text')])
def test_what_could_be_read_in_two_ways_is_refused(write, text, says):
    p = write(text)
    with pytest.raises(InputError) as e: read_phases(p)
    said = str(e.value)
    assert said.startswith(str(p)) and says in said and len(said.splitlines()) == 1 and len(said) < 600

def triplets(phases, **changes):
    "A file of CholecT50: a list of phases, one for each instrument, by frame"
    def vector(p, i): return [17, i, 1, -1, -1, -1, -1, 1, 0, 1, -1, -1, -1, -1, p]
    notes = {str(k): [vector(p, i) for i,p in enumerate(v)] for k,v in phases.items()}
    return json.dumps({**dict(video=12, fps=1, annotations=notes), **changes})

def test_labels_of_cholect50_are_phases(write):
    s = read_phases(write(triplets({0: [0], 1: [0, 0, 0], 2: [-1], 3: [], 5: [3.0]}), 'VID12.json'))
    assert s.to_dict() == {0: 0, 25: 0, 50: -1, 75: -1, 100: -1, 125: 3} and s.dtype == 'int8'
    assert phase_at(s, [0, 49, 50, 124, 125, 149, 150]).tolist() == [0, 0, -1, -1, 3, 3, -1]
    assert read_phases(write(triplets({0: [1], 5: [2]}, fps=5), 'VID12.json')).index.tolist() == [0, 5, 10, 15, 20, 25]

@pytest.mark.parametrize('box', [lambda o: o, lambda o: [dict(triplet={}), o]])
def test_the_names_in_a_file_of_cholect50_come_before_its_ids(write, box):
    names = {'0': 'gallbladder-extraction', '1': 'preparation', '2': 'carlot-triangle-dissection'}
    s = read_phases(write(triplets({0: [0], 1: [1], 2: [2]}, categories=box(dict(phase=names))), 'VID12.json'))
    assert s.tolist() == [6, 0, 1]

@pytest.mark.parametrize('text,says', [('{"annotations"', 'unreadable'), ('[]', 'no frames with annotations'),
    (triplets({}), 'no frames with annotations'), (triplets({'a': [0]}), 'no frames with annotations'),
    (triplets({0: [0], 4: [1, 2]}), 'frame 4: has the phases 1 and 2'), (triplets({0: [7]}), "unknown phase '7'"),
    (triplets({0: ['0']}), 'vectors of 15 numbers'),
    (triplets({}, annotations={'0': [[1, 2]]}), 'vectors of 15 numbers'),
    (triplets({}, annotations={'0': 3}), 'vectors of 15 numbers'), (triplets({0: [0]}, fps=30), 'fps is 30'),
    (triplets({0: [0]}, fps='1'), "fps is '1'"), (triplets({0: [-1], 1: []}), 'none of 2 frames has a phase'),
    (triplets({0: [0]}, categories=dict(phase={'0': 'lunch'})), "unknown phase '0'")])
def test_bad_files_of_cholect50_are_refused(write, text, says):
    p = write(text, 'VID12.json')
    with pytest.raises(InputError) as e: read_phases(p)
    assert str(e.value).startswith(str(p)) and says in str(e.value) and len(str(e.value).splitlines()) == 1

def test_cholect50_stands_where_phases_stand(write, tmp_path):
    (tmp_path/'labels').mkdir()
    write(triplets({0: [0], 1: [4]}), 'labels/VID12.json')
    write(triplets({0: [5]}), 'labels/VID103.json')
    for phases in (tmp_path, tmp_path/'labels', tmp_path/'labels'/'VID12.json'):
        assert frame_phases(['video12']*3 + ['video03'], [24, 25, 50, 0], phases).tolist() == [0, 4, -1, -1]

def test_two_files_for_one_video_are_one_too_many(write, tmp_path):
    write('0\t0\n', 'Video05.TXT')
    assert frame_phases(['video05'], [0], tmp_path).tolist() == [0]
    write(triplets({0: [1]}), 'VID05.json')
    assert frame_phases(['video12'], [0], tmp_path).tolist() == [-1]
    says = 'VID05.json and Video05.TXT are both for video05'
    with pytest.raises(InputError, match=says): frame_phases(['video05'], [0], tmp_path)

def test_phases_that_may_be_counted_from_1_or_by_the_second_are_remarked_on(write):
    ids = lambda *p: read_phases(write(''.join(f'{25*i}\t{o}\n' for i,o in enumerate(p))))
    assert 'ids from 1 to 6 and no 0' in phase_remark(ids(1, 2, 3, 4, 5, 6), [0])
    assert not phase_remark(ids(0, 1, 6), [0]) and not phase_remark(ids(2, 1), [0]) and not phase_remark(ids(3, 4), [0])
    assert not phase_remark(read_phases(write('0\tCalotTriangleDissection\n25\tClippingCutting\n')), [0])
    assert not phase_remark(read_phases(write(triplets({0: [1], 1: [2]}), 'VID12.json')), [0])
    seconds = pd.Series(0, index=range(1800))
    assert 'if they are seconds, multiply them by 25' in phase_remark(seconds, [100, 30_000])
    assert not phase_remark(seconds, [100, 1799]) and not phase_remark(seconds, [50_000])
    assert not phase_remark(pd.Series(0, index=range(0, 45_000, 25)), [50_000])
    assert not phase_remark(seconds[:200], [4000])

@pytest.mark.parametrize('text,line,value', [
    ('0\t0\n25\t0\n75\t1\n100\t1\n125\t1\n', 'line 3', 'frame 75 follows 25'),
    ('Frame\tPhase\n0\tPreparation\n1\tPreparation\n2\tPreparation\n4\tPreparation\n', 'line 5', 'frame 4 follows 2'),
    ('0\t0\n25\t0\n25\t0\n50\t1\n75\t1\n', 'line 3', 'frame 25 follows 25'),
    ('0\t0\n25\t0\n75\t1\n', 'line 3', 'frame 75 follows 25, where the step is 25'),
    ('5\t0\n4\t0\n3\t0\n', 'line 2', 'frame 4 follows 5'),
    ('3\t0\n3\t0\n3\t0\n', 'line 2', 'frame 3 follows 3'),
    ('0\t0\n25\t7\n', 'line 2', "unknown phase '7'"),
    ('Frame\tPhase\n0\tPreparing\n', 'line 2', "unknown phase 'Preparing'"),
    ('0\t0\n2.5\t0\n', 'line 2', "'2.5' is not a frame number"),
    ('0\t0\n25\n', 'line 2', 'has no phase'),
    ('Frame\tGrasper\n0\t0\n', 'line 1', 'lacks frame or phase'),
    ('', '', 'no rows'), ('Frame\tPhase\n', '', 'no rows'), (b'\xff\xfe\x00', '', 'unreadable')])
def test_bad_files_name_file_line_value_and_cure(write, text, line, value):
    p = write(text)
    with pytest.raises(InputError) as e: read_phases(p)
    message = str(e.value)
    assert message.startswith(str(p)) and line in message and value in message
    assert len(message.splitlines()) == 1
    cures = 'fetch', 'use an id', 'give a phase file', 'give frame numbers', 'give plain text'
    assert any(o in message for o in cures)

def test_no_file(tmp_path):
    with pytest.raises(InputError, match='nosuch.txt: unreadable'): read_phases(tmp_path/'nosuch.txt')

@pytest.mark.parametrize('step', [1, 25])
def test_phase_at_equals_a_literal_search(step):
    rng = np.random.default_rng(step)
    phases = pd.Series(rng.integers(0, 7, 30).astype('int8'), index=100 + step*np.arange(30))
    frames = rng.integers(0, 1200, 300)
    def literal(f):
        if f < 100 or f >= 100 + 30*step: return -1
        return [p for at,p in phases.items() if at <= f][-1]
    assert phase_at(phases, frames).tolist() == [literal(f) for f in frames]
    assert phase_at(phases, frames).dtype == np.int8

def test_one_row_is_one_frame(): assert phase_at(pd.Series([3], index=[7]), [6, 7, 8]).tolist() == [-1, 3, -1]

def test_lag_counts_repeats():
    "Play 25 frames a second with every sixth doubled, and number what is shown"
    for r in pd.read_csv(data_file('lag.csv')).itertuples():
        true = []
        at = r.start_frame
        for shown in range(r.start_frame, r.end_frame+1):
            true.append(at)
            repeat = shown >= r.stack_startpoint and (shown-r.stack_startpoint) % 6 == 0
            at += not repeat
        got = cholec80_frame(r.video_name, np.arange(r.start_frame, r.end_frame+1))
        assert got.tolist() == true

def test_lag_leaves_other_frames_alone():
    assert cholec80_frame('video01', [80, 28580]).tolist() == [80, 28580]
    assert cholec80_frame('video24', [5000]).tolist() == [5000]
    assert cholec80_frame('video99', [5]).tolist() == [5]

def test_lag_equals_the_published_frames(real):
    f = pd.read_csv(real/'facts'/'cholecseg8k_frames.csv')
    for v,g in f.groupby('video'): assert (cholec80_frame(v, g.frame) == g.actual_cholec80_frame).all(), v

def test_phase_files_finds_by_name(tmp_path):
    names = 'video05-phase.txt', 'video12.csv', 'video05-tool.txt', 'notes.txt', 'video7-phase.txt'
    for n in names: (tmp_path/n).write_text('0\t0\n')
    found = phase_files(tmp_path, ['video05', 'video07', 'video12', 'video52'])
    want = dict(video05='video05-phase.txt', video07='video7-phase.txt', video12='video12.csv')
    assert {v: p.name for v,p in found.items()} == want

def test_phase_files_takes_the_folder_above_and_one_file(tmp_path):
    d = tmp_path/'phase_annotations'
    d.mkdir()
    (d/'video05-phase.txt').write_text('0\t0\n')
    (tmp_path/'mine.txt').write_text('0\t0\n')
    assert phase_files(tmp_path, ['video05']) == {'video05': d/'video05-phase.txt'}
    assert phase_files(d/'video05-phase.txt', ['video05', 'video12']) == {'video05': d/'video05-phase.txt'}
    assert phase_files(tmp_path/'mine.txt', ['video12']) == {'video12': tmp_path/'mine.txt'}
    with pytest.raises(InputError, match='for which video'): phase_files(tmp_path/'mine.txt', ['video05', 'video12'])
    with pytest.raises(InputError, match='no such folder'): phase_files(tmp_path/'nosuch', ['video05'])
    (tmp_path/'empty').mkdir()
    with pytest.raises(InputError, match='no videoNN-phase.txt'): phase_files(tmp_path/'empty', ['video05'])

def test_frame_phases_of_several_videos(tmp_path):
    (tmp_path/'video05-phase.txt').write_text('0\t0\n25\t1\n')
    (tmp_path/'video52-phase.txt').write_text(''.join(f'{i}\t{int(i > 90)}\n' for i in range(200)))
    v,f = ['video52', 'video05', 'video12', 'video52'],[100, 30, 30, 80]
    assert frame_phases(v, f, tmp_path).tolist() == [1, 1, -1, 0]
    assert frame_phases(v, f, tmp_path, lag=True).tolist() == [0, 1, -1, 0]

def test_real_files(real):
    s = read_phases(real/'cholec80'/'phase_annotations'/'video05-phase.txt')
    assert s.index.tolist() == list(range(18)) and set(s) <= {0, 1}
    one = real/'cholec80'/'phases_1fps'
    rows = [('video48-phase.txt', 1835, 45850), ('video52-phase.txt', 1967, 49150), ('video55-phase.txt', 1038, 25925),
        ('video01.csv', 1733, 43300)]
    for name,n,last in rows:
        s = read_phases(one/name)
        assert (len(s), s.index[-1]) == (n, last) and set(s) == set(range(7))
    tools = real/'cholec80'/'tool_annotations'/'video03-tool.txt'
    with pytest.raises(InputError, match='lacks frame or phase'): read_phases(tools)

def test_clips_that_straddle_a_transition(real):
    clips = pd.read_csv(data_file('clips.csv')).set_index('clip')
    def phases(clip):
        r = clips.loc[clip]
        return set(frame_phases([r.video]*80, range(r.start, r.end+1), real/'cholec80'/'phases_1fps'))
    want = dict(video52_02746=2, video55_00508=2, video52_00080=1)
    assert {c: len(phases(c)) for c in want} == want

def test_the_quick_way_and_the_careful_one_agree(scenes, tmp_path):
    for file in sorted((scenes/'phase_annotations').iterdir())[:3]:
        text = file.read_text()
        other = tmp_path/file.name
        other.write_text(text.replace('\t', ' \t'))
        quick,careful = read_phases(file),read_phases(other)
        assert careful.equals(quick) and careful.attrs == quick.attrs
        lines = text.splitlines(keepends=True)
        lunch = [*lines[:9], '9\tLunch\n', *lines[10:]]
        for odd,says in ((lines[:9] + lines[10:], 'follows'), (lunch, 'line 10: unknown phase')):
            other.write_text(''.join(odd))
            with pytest.raises(InputError, match=says): read_phases(other)
