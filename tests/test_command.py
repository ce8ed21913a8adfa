"The command behind the tables, as a user meets it"
import io, json, re, shutil, pandas as pd, pytest
from fastcore.script import CliError
from commands import run_command
from cwcl.core import InputError, data_file, recipe
from cwcl.data.cholec import frames_digest
from cwcl.data.splits import TEST_VIDEOS
from cwcl.study.ablation import ablation, ablation_markdown, ablation_table
from cwcl.study.claims import CLAIMS, claims_of
from cwcl.study.command import _check_alike, _confirm, _do_missing, _integers, _wanted_runs, cwcl_table
from cwcl.study.grid import grid
from cwcl.study.kit import embedded_frames, frame_counts, kit_results, to_draw
from cwcl.study.records import read_results
from cwcl.study.rows import check_frames

def command(*args, cwd, timeout=900):
    "Exit code, output, errors"
    p = run_command('cwcl_table', *args, cwd=cwd, timeout=timeout, CUDA_VISIBLE_DEVICES='')
    return p.returncode,p.stdout,p.stderr

def complete(): return len(list(data_file('results').glob('table[12]-*.json'))) == 126

@pytest.mark.skipif(not (kit_results() and complete()), reason='the published results are not complete')
@pytest.mark.parametrize('table,rows', [(1, 17), (2, 4)])
def test_published_tables_are_printed_without_a_training(tmp_path, table, rows):
    code,out,err = command('--table', str(table), '--per-fold', cwd=tmp_path)
    assert not code, err
    body = [o for o in out.splitlines() if re.match(r'\| (Random|SimCLR|BYOL|DCL|cls)[^|]*\|\s+\d+ % ', o)]
    assert len(body) == rows and 'missing' not in out and 'n/a' not in '\n'.join(body)
    assert [o.name for o in (tmp_path/'runs').iterdir()] == ['study']
    written = {o.name for o in (tmp_path/'runs'/'study').iterdir()}
    assert written == {f'table{table}.{k}' for k in ('md', 'tex', 'csv', 'svg')}

BAD = """--table 3 -> Tables 1 and 2
--folds 0;1 -> integers
--seeds 1,1 -> different numbers
--jobs 0 -> at least 1
--data nosuch --show -> nosuch: no such folder
--preset tiny -> choose one of
--change tmep=1 -> not a field
--change budget=0.5,temp=0.1 -> --change budget: the table sets this itself
--data nowhere --preset smoke -> nowhere
--sbatch mem=4G -> --sbatch mem=4G: belongs to a cluster; add --cluster slurm
--change class_set=13 -> a table has the paper's 8 classes
--ablate --change class_set=10 -> a table has the paper's 8 classes
--ablate --table 2 -> the ablation is of Table 1
--table trial1 --per-fold -> --per-fold with --table trial1: has no effect there
--table beyond --seeds 0,2 -> --seeds with --table beyond: has no effect there
--ablate --with mine.py -> --with with --ablate: has no effect there
--phases nowhere -> --phases nowhere: belongs to --data
--seeds 0,10 -> seed 10 of a fold: choose 0 to 9
--table why --folds 6 --show -> fold=6"""

@pytest.mark.parametrize('line', BAD.splitlines())
def test_bad_input_is_one_line(tmp_path, line):
    given,_,says = line.partition(' -> ')
    code,_,err = command(*given.split(), cwd=tmp_path)
    assert code == 1 and says in err and 'Traceback' not in err and len(err.strip().splitlines()) == 1

def test_nothing_starts_unasked(tmp_path, scenes):
    small = '--preset smoke --change threads=1 --folds 0 --seeds 0 --table 2'.split()
    code,out,err = command('--data', str(scenes), *small, cwd=tmp_path)
    assert code == 1 and '4 runs, 0 of them done' in out and 'say --yes to start' in err
    assert [o.split(':')[0] for o in out.splitlines()[1:]] == ['device', 'memory', 'time']
    assert not list((tmp_path/'runs'/'smoke').glob('table2-*'))

def test_a_table_is_checked_before_anything_is_timed(tmp_path, scenes, monkeypatch, capsys):
    monkeypatch.setattr('cwcl.study.jobs.step_seconds', lambda *a: pytest.fail('a step was timed'))
    shutil.copytree(scenes, tmp_path/'d', ignore=shutil.ignore_patterns('phase_annotations'))
    where = dict(data=str(tmp_path/'d'), out=str(tmp_path/'o'))
    call = dict(where, table=1, preset='smoke', folds='0', seeds='0', device='cpu', yes=True)
    with pytest.raises(CliError, match='no phase is known.*--no-phases'): cwcl_table(**call)
    call['no_phases'] = True
    with pytest.raises(CliError, match='cannot fill a batch of 1000'): cwcl_table(**call, change='batch=1000')
    assert not capsys.readouterr().out
    monkeypatch.setattr('cwcl.study.command.free_memory', lambda device: (2**20, 2**30))
    says = 'simclr needs .* in each of 2 processes, 1.0 MiB are free'
    with pytest.raises(CliError, match=says): cwcl_table(**call, jobs=2)
    assert 'device: cpu' in capsys.readouterr().out and not (tmp_path/'o').exists()

def test_without_phases_a_table_is_that_of_another_recipe(tmp_path, scenes, monkeypatch):
    def stop(todo, n, *args):
        assert {(o.recipe.method, o.recipe.use_phase) for o in todo} == {('dcl', False), ('dcl+cls', False)}
        assert (len(todo), n) == (7, 7)
        raise InputError('seen')
    monkeypatch.setattr('cwcl.study.command._confirm', stop)
    call = dict(data=str(scenes), preset='smoke', out=str(tmp_path), folds='0', seeds='0')
    with pytest.raises(CliError, match='seen'): cwcl_table(**call, no_phases=True, methods='dcl,dcl+cls')
    for given in (dict(phases='p'), dict(change='use_phase=True')):
        with pytest.raises(CliError, match='leave one out'): cwcl_table(**call, no_phases=True, **given)
    with pytest.raises(CliError, match='choose among random, simclr'): cwcl_table(**call, methods='byol')
    with pytest.raises(CliError, match='an ablation has its own'): cwcl_table(**call, methods='dcl', ablate=True)

@pytest.mark.skipif(not (kit_results() and complete()), reason='the published results are not complete')
def test_a_table_of_some_methods(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    cwcl_table(table=1, methods='random, dcl+cls', show=True)
    found = re.findall(r'^\| (Random|SimCLR|DCL\+cls|DCL|cls)[^|]*\|\s+\d+ % ', capsys.readouterr().out, re.M)
    assert set(found) == {'Random', 'DCL+cls'} and len(found) == 8

def test_help_names_every_option(tmp_path):
    code,out,_ = command('--help', cwd=tmp_path)
    where = 'table ablate data phases no-phases methods out preset folds seeds'
    how = 'jobs cluster partition gpus timeout resubmit sbatch yes'
    assert not code and all(f'--{o}' in out for o in (where + ' ' + how).split())

def test_every_claim_belongs_to_one_table():
    one,two = ({c.name for c in claims_of(k)} for k in ('table1', 'table2'))
    assert one | two == {c.name for c in CLAIMS} and not one & two

def test_scenes_are_drawn_once(tmp_path, monkeypatch):
    drawn = []
    def draw(path, frames_per_clip, sets): drawn.append((frames_per_clip, sets))
    monkeypatch.setattr('cwcl.study.kit.write_scenes', draw)
    embedded_frames('smoke', tmp_path)
    (tmp_path/'scenes-2').mkdir()
    (tmp_path/'scenes-2'/'scenes.json').write_text('{"frames_per_clip": 2}')
    embedded_frames('smoke', tmp_path)
    embedded_frames('trial', tmp_path)
    assert drawn == [(2, 1), (2, 1), (20, 3)]

def test_an_ablation_brings_its_bases_first():
    runs,pairs = _wanted_runs('ablate', recipe('smoke'), (0, 1), (0,), {0: (60, 20), 1: (50, 30)})
    place = {o.key: i for i,o in enumerate(runs)}
    assert len(place) == len(runs) and all(place[b.key] < place[a.key] for a,b in pairs)

@pytest.mark.skipif(not kit_results(), reason='there are no published results')
def test_an_ablation_is_compared_with_all_seeds_of_its_bases(tmp_path, monkeypatch, capsys):
    "As in lesson 54"
    monkeypatch.chdir(tmp_path)
    cwcl_table(ablate=True, show=True)
    home = kit_results()
    pairs = ablation(recipe('study'), frame_counts(home))
    assert ablation_markdown(ablation_table(pairs, read_results(home))) in capsys.readouterr().out

def test_results_of_other_data_are_not_taken_for_these(tmp_path, table, scenes, monkeypatch):
    digest,counts = frames_digest(table),table.video.value_counts().to_dict()
    check_frames(dict(a=dict(frames=counts, data_digest=digest), old=dict(frames=counts)), table)
    made = dict(a=dict(frames=counts, data_digest=digest))
    two = dict(old=dict(frames=dict(a=2)))
    with pytest.raises(InputError, match='old: made from 2 other frames'): check_frames(two, table)
    phase,label = table.phase.copy(),table.liver.copy()
    phase.iloc[3] += 1
    label.iloc[5] ^= True
    for other in (table.assign(phase=phase), table.assign(liver=label), table.iloc[::-1]):
        with pytest.raises(InputError, match='a: made from'): check_frames(made, other)
    assert frames_digest(table.assign(part='train', labelled=True)) == digest

def test_a_table_needs_masks_of_its_test(tmp_path, scenes):
    shutil.copytree(scenes, tmp_path/'d')
    for v in TEST_VIDEOS:
        for o in (tmp_path/'d'/v).rglob('*watershed_mask.png'): o.unlink()
    where = dict(data=str(tmp_path/'d'), out=str(tmp_path/'o'), preset='smoke', device='cpu', yes=True)
    with pytest.raises(CliError, match='video12, video52: without a mask'): cwcl_table(**where)

def test_integers():
    assert _integers('0,2', 'folds') == (0, 2)
    with pytest.raises(InputError, match='--seeds -1'): _integers('-1', 'seeds')

@pytest.mark.parametrize('args', [('--table', '1'), ('--table', '2'), ('--ablate',)])
def test_what_is_done_is_shown_without_a_question(tmp_path, args):
    code,out,err = command(*args, '--show', cwd=tmp_path)
    assert not code and 'written:' in out and 'Start?' not in out and not list(tmp_path.glob('runs/scenes*')), err
    assert ('| Random ' in out) == (args == ('--table', '1'))

def test_an_ablation_counts_the_frames_of_folds_that_are_not_published(tmp_path, scenes, monkeypatch, capsys):
    monkeypatch.setattr('cwcl.study.jobs.step_seconds', lambda *a: (.1, .1))
    with pytest.raises(CliError, match='say --yes'):
        cwcl_table(ablate=True, data=str(scenes), preset='smoke', folds='0,2', device='cpu', out=str(tmp_path/'o'))
    assert '70 runs, 0 of them done' in capsys.readouterr().out

def test_an_ablation_asks_before_it_draws(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr('cwcl.study.command.embedded_frames', lambda *a: pytest.fail('drawn'))
    monkeypatch.setattr('sys.stdin', io.StringIO())
    for options,says in ((dict(show=True), 'frames must be drawn first.*leave --show out'), ({}, 'say --yes')):
        with pytest.raises(CliError, match=says): cwcl_table(ablate=True, folds='3', out='x', **options)
    assert 'frames are drawn first' in capsys.readouterr().out

def test_a_folder_of_other_frames_is_not_filled_up_with_scenes(tmp_path, scenes, monkeypatch):
    run = grid('table1', recipe('smoke', threads=1), (0,), (0,))[0]
    found = next(iter(read_results(kit_results()).values()))
    found = dict(found, key=run.key, recipe=json.loads(run.recipe.to_json()), data_digest='another')
    (tmp_path/f'{run.key}.json').write_text(json.dumps({k: v for k,v in found.items() if k != 'digest'}))
    monkeypatch.setattr('cwcl.study.command.embedded_frames', lambda *a: scenes)
    monkeypatch.setattr('cwcl.study.command.to_draw', lambda *a: 0)
    monkeypatch.setattr('cwcl.study.command._do_missing', lambda *a, **k: pytest.fail('trained'))
    options = dict(preset='smoke', change='threads=1', folds='0', seeds='0', out=str(tmp_path), yes=True)
    with pytest.raises(CliError, match='made from .* other frames'): cwcl_table(**options, device='cpu')

def test_runs_of_a_trial_are_of_one_data_set(tmp_path):
    found = [o for k,o in read_results(kit_results('trial')).items() if k.startswith('trial1-random-b01')]
    results = {o['key']: o for o in found}
    _check_alike(results)
    for other in (dict(data_digest='another'), dict(test=dict(found[0]['test'], frames=7))):
        mixed = results | {found[0]['key']: dict(found[0], **other)}
        if 'data_digest' in other: mixed[found[1]['key']] = dict(found[1], data_digest='own')
        with pytest.raises(InputError, match='made from different frames'): _check_alike(mixed)

def test_a_job_that_fails_matters_only_if_a_run_is_missing(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr('cwcl.study.command.run_jobs', lambda *a, **k: ['killed'])
    todo = grid('table2', recipe('smoke', threads=1), (0,), (0,))[:2]
    for there,says in ((todo, ''), (todo[:1], '1 of 2 jobs failed: killed; what they finished is kept')):
        monkeypatch.setattr('cwcl.study.command.find_results', lambda *a: {o.key: {} for o in there})
        if not says: _do_missing(todo, tmp_path, 'data', jobs=2)
        else:
            with pytest.raises(InputError, match=says): _do_missing(todo, tmp_path, 'data', jobs=2)
    assert 'the others have done all runs' in capsys.readouterr().out

def test_a_named_device_is_shared_by_all_jobs(tmp_path, monkeypatch):
    seen = []
    monkeypatch.setattr('cwcl.study.command.check_memory', lambda *a: seen.append(a[-1]))
    monkeypatch.setattr('cwcl.study.command.estimate', lambda *a: {})
    monkeypatch.setattr('cwcl.study.command.say_estimate', lambda *a: '')
    monkeypatch.setattr('cwcl.study.command.say_device', lambda *a: '')
    monkeypatch.setattr('cwcl.study.command.free_memory', lambda *a: (2**40, 2**40))
    monkeypatch.setattr('torch.cuda.device_count', lambda: 4)
    runs = grid('table2', recipe('smoke', threads=1), (0,), (0,))[:1]
    for beside in (4, None): _confirm(runs, 1, tmp_path, None, 4, 'cuda', True, True, beside)
    assert seen == [4, 1]

def test_scenes_are_not_drawn_unasked(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr('cwcl.study.kit.write_scenes', lambda *a, **k: pytest.fail('drawn'))
    monkeypatch.setattr('sys.stdin', io.StringIO())
    with pytest.raises(CliError, match='say --yes'): cwcl_table(table='beyond', device='cpu')
    assert to_draw('trial') == 2828 and to_draw('study') == 2020 and not list(tmp_path.glob('runs/scenes*'))

def test_a_table_of_nothing_is_not_written_over_a_whole_one(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(CliError, match='none of these 102 runs is done'): cwcl_table(no_phases=True, show=True)
    assert not list(tmp_path.glob('runs/*/table1*'))

def trial_p(methods, folder):
    cwcl_table(table='trial1', methods=methods, show=True)
    return pd.read_csv(folder/'runs'/'trial'/'trial1-deciding.csv').p

def test_claims_on_methods_that_are_left_out_are_not_judged(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    cwcl_table(table='trial1', methods='random,dcl+cls', show=True)
    out = capsys.readouterr().out
    claims,deciding = out.split('| a ')
    assert 'missing' not in claims and 'are not judged here: they are about cls, dcl, simclr too' in deciding
    assert deciding.count('runs are missing') == 3, 'and the other three are corrected for six'
    few,every = (trial_p(o, tmp_path) for o in ('random,dcl+cls', ''))
    assert len(few) == len(every) == 6 and (few.dropna() >= every[few.notna()] - 1e-4).all()
    names = {o.stem for o in (tmp_path/'runs'/'trial').iterdir()}
    assert names == {f'trial1-{k}' for k in ('table', 'verdicts', 'deciding')}
