"The command behind the tables, as a user meets it"
import os, re, subprocess, sys, pytest
from pathlib import Path
from cwcl.core import InputError, data_file, recipe
from cwcl.study.claims import CLAIMS, claims_of
from cwcl.study.command import embedded_frames, published_folder, wanted_runs, whole_numbers

def command(*args, cwd, timeout=900):
    "Exit code, output, errors"
    env = dict(os.environ, OMP_NUM_THREADS='1', CUDA_VISIBLE_DEVICES='')
    p = subprocess.run([Path(sys.executable).with_name('cwcl_table'), *args], cwd=cwd, capture_output=True, text=True,
        stdin=subprocess.DEVNULL, env=env, timeout=timeout)
    return p.returncode,p.stdout,p.stderr

def complete(): return len(list(data_file('results').glob('table[12]-*.json'))) == 126

@pytest.mark.skipif(not (published_folder() and complete()), reason='the published results are not complete')
@pytest.mark.parametrize('table,rows', [(1, 17), (2, 4)])
def test_published_tables_are_printed_without_a_training(tmp_path, table, rows):
    code,out,err = command('--table', str(table), '--per-fold', cwd=tmp_path)
    assert not code, err
    body = [o for o in out.splitlines() if re.match(r'\| (Random|SimCLR|BYOL|DCL|cls)[^|]*\|\s+\d+ % ', o)]
    assert len(body) == rows and 'missing' not in out and 'n/a' not in '\n'.join(body)
    assert {o.name for o in (tmp_path/'runs').iterdir()} == {'study'}
    assert {o.name for o in (tmp_path/'runs'/'study').iterdir()} == {f'table{table}.{k}' for k in ('md', 'tex', 'csv')}

@pytest.mark.parametrize('args,says', [(['--table', '3'], 'Tables 1 and 2'), (['--folds', '0;1'], 'whole numbers'), (['--seeds', '1,1'], 'different numbers'), (['--jobs', '0'], 'at least 1'), (['--data', 'nosuch', '--show'], 'nosuch: no such folder'),
    (['--preset', 'tiny'], 'choose one of'), (['--change', 'tmep=1'], 'no field'), (['--change', 'budget=0.5,temp=0.1'], '--change budget: the table sets this itself'), (['--data', 'nowhere', '--preset', 'smoke'], 'nowhere')])
def test_bad_input_is_one_line(tmp_path, args, says):
    code,_,err = command(*args, cwd=tmp_path)
    assert code == 1 and says in err and 'Traceback' not in err and len(err.strip().splitlines()) == 1

def test_nothing_starts_unasked(tmp_path, scenes):
    code,out,err = command('--data', str(scenes), '--preset', 'smoke', '--change', 'threads=1', '--folds', '0', '--seeds', '0', '--table', '2', cwd=tmp_path)
    assert code == 1 and '4 runs, 0 of them done' in out and 'say --yes to start' in err
    assert not list((tmp_path/'runs'/'smoke').glob('table2-*'))

def test_help_names_every_option(tmp_path):
    code,out,_ = command('--help', cwd=tmp_path)
    assert not code and all(o in out for o in '--table --ablate --data --phases --out --preset --folds --seeds --jobs --cluster --partition --gpus --timeout --resubmit --yes'.split())

def test_every_claim_belongs_to_one_table():
    one,two = claims_of('table1'),claims_of('table2')
    assert set(c.name for c in one) | set(c.name for c in two) == {c.name for c in CLAIMS} and not {c.name for c in one} & {c.name for c in two}

def test_scenes_are_drawn_once(tmp_path, monkeypatch):
    drawn = []
    monkeypatch.setattr('cwcl.study.command.write_scenes', lambda path, frames_per_clip: drawn.append(frames_per_clip) or path)
    embedded_frames('smoke', tmp_path)
    (tmp_path/'scenes-2').mkdir()
    (tmp_path/'scenes-2'/'scenes.json').write_text('{"frames_per_clip": 2}')
    embedded_frames('smoke', tmp_path)
    assert drawn == [2, 2]

def test_an_ablation_brings_its_bases_first():
    runs,pairs = wanted_runs('ablate', recipe('smoke'), (0, 1), (0,), {0: (60, 20), 1: (50, 30)})
    place = {o.key: i for i,o in enumerate(runs)}
    assert len(place) == len(runs) and all(place[b.key] < place[a.key] for a,b in pairs)

def test_whole_numbers():
    assert whole_numbers('0,2', 'folds') == (0, 2)
    with pytest.raises(InputError, match='--seeds -1'): whole_numbers('-1', 'seeds')

@pytest.mark.parametrize('args', [('--table', '1'), ('--table', '2'), ('--ablate',)])
def test_what_is_done_is_shown_without_a_question(tmp_path, args):
    code,out,err = command(*args, '--show', cwd=tmp_path)
    assert not code and 'written:' in out and 'Start?' not in out and not list(tmp_path.glob('runs/scenes*')), err
    assert ('| Random ' in out) == (args == ('--table', '1'))

def test_an_ablation_counts_the_frames_of_folds_that_are_not_published(tmp_path, scenes):
    code,out,err = command('--ablate', '--data', str(scenes), '--preset', 'smoke', '--folds', '0,2', cwd=tmp_path)
    assert code == 1 and '66 runs, 0 of them done' in out and 'say --yes' in err
