"A grid that is killed, shared and looked at"
import json, os, re, subprocess, sys, pytest
import cwcl.data.store as store
from collections import Counter
from dataclasses import replace
from types import SimpleNamespace
from cwcl.core import InputError
from cwcl.data.cholec import frame_table
from cwcl.memory import batch_rows, random_batch, step_bytes
from cwcl.study.grid import TABLE_METHODS, Run, check_runs, do_run, fold_parts, grid, method_recipe, publish
from cwcl.study.grid import run_all
from cwcl.study.records import read_result, read_results
from cwcl.study.jobs import EpochBar, Worker, estimate, executor, kinds, largest_step, say_estimate, sharing
from cwcl.study.jobs import _written_down, partition_gpus, visible_gpus
from cwcl.study.ablation import READINGS, ablation, same_steps
from cwcl.train import steps_per_epoch

def small_runs(smoke):
    "Three kinds of run: joint, joint with two views, two stages"
    a = method_recipe(smoke, 'dcl+cls', epochs=3, fold=0)
    b = method_recipe(smoke, 'simclr', epochs=2, fold=1)
    c = method_recipe(smoke, 'byol', epochs=2, stage='frozen', fold=2)
    return [Run('table1', a), Run('table1', b), Run('table2', c)]

# One interpreter imports everything once and forks a process for each attempt, which runs on or dies at a moment
# that is counted and not timed: before its n-th backward pass or renaming of a finished file.
ZYGOTE = '''
import os, signal, sys, json, time, torch, cwcl.study.grid as g
from pathlib import Path
from cwcl.core import Recipe
folder,data,plan,spec = Path(sys.argv[1]),sys.argv[2],json.loads(sys.argv[3]),json.loads(sys.argv[4])
runs = [g.Run(t, Recipe(**r)) for t,r in spec]
real = g.stages_run
def logged(r, data, phases, out, *args, **kwargs):
    with open(folder/'journal.txt', 'a') as f: f.write(f'{Path(out).name} {os.getpid()}\\n')
    found = real(r, data, phases, out, *args, **kwargs)
    with open(folder/'ended.txt', 'a') as f: f.write(f'{Path(out).name}\\n')
    return found
g.stages_run = logged
def doom(n):
    left = [n]
    def counted(f):
        def wrapped(*args, **kwargs):
            left[0] -= 1
            if not left[0]: os.kill(os.getpid(), signal.SIGKILL)
            return f(*args, **kwargs)
        return wrapped
    torch.Tensor.backward,os.replace = counted(torch.Tensor.backward),counted(os.replace)
def child(n=None):
    pid = os.fork()
    if pid: return pid
    if n: doom(n)
    try:
        g.run_all(runs, folder, data, check=False)
        os._exit(0)
    except BaseException as e:
        print(repr(e), file=sys.stderr, flush=True)
        os._exit(1)
def code(pid): return os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
if plan['kind'] == 'kill': print(json.dumps([code(child(n)) for n in [*plan['after'], None]]))
elif plan['kind'] == 'four':
    alive = [child() for _ in range(4)]
    for seconds in plan['after']:
        time.sleep(seconds)
        os.kill(alive[0], signal.SIGKILL)
        code(alive.pop(0))
        alive.append(child())
    print(json.dumps([code(o) for o in alive]))
else: print(json.dumps([code(pid) for pid in [child(), child()]]))
'''

def attempt(folder, data, plan, runs):
    "Exit codes of the processes"
    folder.mkdir(parents=True, exist_ok=True)
    spec = json.dumps([(o.table, vars(o.recipe)) for o in runs])
    env = dict(os.environ, OMP_NUM_THREADS='1', CUDA_VISIBLE_DEVICES='')
    command = [sys.executable, '-c', ZYGOTE, str(folder), str(data), json.dumps(plan), spec]
    p = subprocess.run(command, capture_output=True, text=True, env=env, timeout=1800)
    assert not p.returncode, p.stderr[-2000:]
    return json.loads(p.stdout.splitlines()[-1]),p.stderr

def figures(folder):
    kept = ('test', 'valid', 'log', 'steps', 'labelled')
    return {k: [o[f] for f in kept] for k,o in read_results(folder).items()}

@pytest.fixture(scope='module')
def undisturbed(smoke, scenes, tmp_path_factory):
    folder = tmp_path_factory.mktemp('grid')
    run_all(small_runs(smoke), folder, scenes, device='cpu')
    return folder

@pytest.mark.slow
def test_a_grid_killed_five_times_gives_what_an_undisturbed_one_does(smoke, scenes, undisturbed, tmp_path):
    codes,err = attempt(tmp_path/'g', scenes, dict(kind='kill', after=(9, 22, 17, 58, 40)), small_runs(smoke))
    assert codes == [-9]*5 + [0], err
    assert figures(tmp_path/'g') == figures(undisturbed)
    assert not list((tmp_path/'g').glob('*/checkpoint'))

def test_two_processes_never_do_a_run_twice(smoke, scenes, undisturbed, tmp_path):
    codes,err = attempt(tmp_path/'g', scenes, dict(kind='two'), small_runs(smoke))
    assert codes == [0, 0], err
    done = [o.split()[0] for o in (tmp_path/'g'/'journal.txt').read_text().splitlines()]
    assert sorted(done) == sorted(o.key for o in small_runs(smoke))
    assert figures(tmp_path/'g') == figures(undisturbed)

def test_finished_runs_are_read_and_not_repeated(smoke, scenes, undisturbed, monkeypatch):
    monkeypatch.setattr('cwcl.study.grid.stages_run', lambda *a, **k: pytest.fail('done twice'))
    assert set(run_all(small_runs(smoke), undisturbed, scenes)) == {o.key for o in small_runs(smoke)}

def test_published_results_hold_what_a_table_needs(smoke, scenes, undisturbed, tmp_path):
    runs = small_runs(smoke)
    files = publish([*runs, Run('table1', replace(smoke, seed=9))], undisturbed, tmp_path)
    assert {o.stem for o in files} == {o.key for o in runs}
    for run in runs:
        a,b = run.result(undisturbed),run.result(tmp_path)
        for k in ('recipe', 'steps', 'seconds', 'key', 'step_seconds'): assert a[k] == b[k]
        for x,y in zip(a['log'], b['log'], strict=True): assert x == pytest.approx(y, rel=1e-4) and set(x) == set(y)
        assert a['test']['confusion'] == b['test']['confusion'] and a['test']['clips'] == b['test']['clips']
        assert ('pretrain' in b) == (run.recipe.stage == 'frozen')

@pytest.mark.parametrize('table', TABLE_METHODS)
def test_methods_of_a_table_do_equal_work(smoke, table):
    "Steps, masks, seeds, folds and weights of a table differ in the method alone"
    shared = ('seed', 'fold', 'budget', 'batch', 'labelled', 'epochs', 'lr', 'wd', 'schedule', 'crop', 'widths',
        'valid_labels', 'threads', 'select', 'stage')
    cells = {}
    for o in grid(table, smoke): cells.setdefault((o.recipe.budget, o.recipe.fold, o.recipe.seed), []).append(o.recipe)
    for rs in cells.values(): assert len({tuple(getattr(r, k) for k in shared) for r in rs}) == 1
    assert all({r.method for r in rs} == set(TABLE_METHODS[table]) for (b,*_),rs in cells.items() if b < 1)

def test_keys_are_method_budget_fold_and_seed(smoke):
    for table in TABLE_METHODS:
        for o in grid(table, smoke, seeds=range(3)):
            m = re.fullmatch(r'(table[12])-([a-z+]+)-b(\d+)-f(\d)-s(\d+)', o.key)
            r = o.recipe
            assert m.groups() == (table, r.method, f'{round(100*r.budget):02}', str(r.fold), str(r.seed))

def test_no_two_folds_share_a_seed(smoke):
    for table in TABLE_METHODS:
        seen = {(o.recipe.seed, o.recipe.fold) for o in grid(table, smoke, seeds=range(10))}
        assert len({s for s,_ in seen}) == len(seen) == 30

def test_a_study_starts_with_every_method_on_the_first_fold_and_seed(smoke):
    first = grid('table1', smoke)[:17]
    assert {(o.recipe.fold, o.recipe.seed) for o in first} == {(0, 0)}
    assert {o.recipe.method for o in first} == set(TABLE_METHODS['table1'])

@pytest.mark.parametrize('text,says', [
    ('', 'half-written'),
    ('{"kind": "cwcl run", "vers', 'half-written'),
    ('[]', 'not the result'),
    ('{"kind": "other"}', 'not the result'),
    ('{"kind": "cwcl run", "version": 2, "kit": "9.9"}', 'version 2.*9.9'),
    ('{"kind": "cwcl run", "version": 1}', 'no key and no recipe; give the folder')])
def test_broken_results_are_named(tmp_path, text, says):
    (tmp_path/'a.json').write_text(text)
    with pytest.raises(InputError, match=f'a.json.*{says}'): read_result(tmp_path/'a.json')

def test_results_of_another_recipe_are_refused(smoke, scenes, undisturbed):
    run = small_runs(smoke)[0]
    with pytest.raises(InputError, match='made with lr=0.01, this table wants lr=0.02'):
        do_run(replace(run, recipe=replace(run.recipe, lr=.02)), undisturbed, scenes)

def test_the_parts_of_a_fold_do_not_depend_on_what_the_budget_is_of(smoke, scenes):
    t = frame_table(scenes)
    assert fold_parts(t, replace(smoke, budget_of='all')) == fold_parts(t, smoke)

def test_a_run_without_test_masks_is_told(smoke, monkeypatch, tmp_path):
    said = []
    monkeypatch.setattr('cwcl.study.grid.do_run', lambda *a, **k: dict(test=None, seconds=1.))
    run_all(small_runs(smoke)[:1], tmp_path, 'nowhere', tell=said.append, check=False)
    assert 'no test frames with masks' in said[0]

@pytest.mark.parametrize('n,named,want', [
    (0, None, []), (2, None, [0, 1]), (2, '1,3', [1, 3]), (0, '', [])])
def test_processes_of_this_machine_see_its_gpus(monkeypatch, tmp_path, n, named, want):
    monkeypatch.setattr('torch.cuda.device_count', lambda: n)
    monkeypatch.delenv('CUDA_VISIBLE_DEVICES', raising=False)
    if named is not None: monkeypatch.setenv('CUDA_VISIBLE_DEVICES', named)
    got = executor(tmp_path).parameters
    assert visible_gpus() == want and got['gpus_per_node'] == len(want) and list(got.get('visible_gpus', ())) == want

def test_a_gpu_without_a_number_is_not_taken_for_the_first(monkeypatch):
    "submitit would name it 0 to its process: another one, and perhaps somebody else's"
    monkeypatch.setattr('torch.cuda.device_count', lambda: 2)
    monkeypatch.setenv('CUDA_VISIBLE_DEVICES', 'GPU-a,GPU-b')
    with pytest.raises(InputError, match='CUDA_VISIBLE_DEVICES=GPU-a,GPU-b: .*leave --jobs out'): visible_gpus()

def test_no_folder_of_results(tmp_path):
    with pytest.raises(InputError, match='no such folder'): read_results(tmp_path/'nowhere')

def test_a_failed_run_leaves_the_finished_ones(smoke, scenes, undisturbed, tmp_path, monkeypatch):
    "A full disk in the middle of a run"
    runs = small_runs(smoke)[:1]
    folder = tmp_path/'g'
    def full(*a, **k): raise OSError(28, 'No space left on device')
    with monkeypatch.context() as m:
        m.setattr('cwcl.train.save_model', full)
        with pytest.raises(OSError, match='No space left'): run_all(runs, folder, scenes, device='cpu')
    assert runs[0].result(folder) is None and (folder/runs[0].key/'checkpoint'/'last.safetensors').exists()
    run_all(runs, folder, scenes, device='cpu')
    assert figures(folder)[runs[0].key] == figures(undisturbed)[runs[0].key]

@pytest.mark.parametrize('change,says', [
    (dict(method='dcl'), 'no phase is known'),
    (dict(method='cls', budget=1e-4), 'leaves no mask'),
    (dict(precision='fp16'), 'fp16 needs CUDA'),
    (dict(method='cls', batch=1000), 'cannot fill a batch of 1000'),
    (dict(method='dcl', stage='frozen'), 'no phase is known')])
def test_what_stops_the_last_run_stops_all_before_the_first(smoke, scenes, tmp_path, monkeypatch, change, says):
    monkeypatch.setattr('cwcl.study.grid.stages_run', lambda *a, **k: pytest.fail('a training was begun'))
    runs = [Run('table1', method_recipe(smoke, 'random')), Run('table1', replace(smoke, **change))]
    with pytest.raises(InputError, match=says): run_all(runs, tmp_path/'g', scenes, phases=False, device='cpu')
    assert not (tmp_path/'g').exists()

def test_runs_that_need_no_phases_are_not_asked_for_them(smoke, scenes):
    table = frame_table(scenes, False)
    assert (table.phase == -1).all()
    check_runs(grid('table2', replace(smoke, use_phase=False)), table, 'cpu')
    check_runs([o for o in grid('table2', smoke) if 'dcl' not in o.recipe.method], table, 'cpu')

def test_kinds_of_runs_and_the_largest_of_them(smoke, monkeypatch):
    one,two = kinds(grid('table1', smoke)),kinds(grid('table2', smoke))
    assert len(one) == 5 and len(two) == 8
    first = [('simclr', 'pretrain'), ('simclr', 'frozen'), ('byol', 'pretrain')]
    assert [(o.method, o.stage) for o in two[:3]] == first
    assert largest_step(grid('table1', smoke)) == max(((step_bytes(o), o) for o in one), key=lambda o: o[0])
    assert sharing(3, 'cpu') == 3
    monkeypatch.setattr('torch.cuda.device_count', lambda: 2)
    assert (sharing(3, 'cuda'), sharing(2, 'cuda'), sharing(3, 'cpu')) == (2, 1, 3)

def test_a_reading_that_changes_nothing_is_left_out(smoke):
    without = ablation(replace(smoke, use_phase=False, temp=.2), {0: (60, 20)})
    assert {o.name for o in READINGS} - {a.reading for a,_ in without} == {'use_phase=no', 'temp=0.2'}

def test_the_estimate_counts_what_is_missing(smoke, scenes, undisturbed, tmp_path, monkeypatch):
    runs = small_runs(smoke)
    table = frame_table(scenes)
    none,some = estimate(runs, tmp_path, table, device='cpu'),estimate(runs, undisturbed, table, device='cpu')
    assert (none['runs'], none['done'], some['done']) == (3, 0, 3)
    assert none['seconds'] > 0 == some['seconds'] == some['bytes']
    monkeypatch.setattr('cwcl.study.jobs.step_seconds', lambda r, device: (2., .5))
    one,three = (estimate(runs, tmp_path, table, jobs=n, device='cpu')['seconds'] for n in (1, 3))
    def steps_of(r): return r.epochs*steps_per_epoch(r, fold_parts(table, r)[r.fold])
    steps = sum(len(o.stages)*steps_of(o.recipe) for o in runs)
    assert one == pytest.approx(3*three) and one > 2.*steps
    assert '3 runs, 0 of them done' in say_estimate(none, tmp_path/'not'/'there')

def test_what_runs_elsewhere_is_not_timed_here(smoke, scenes, tmp_path, monkeypatch):
    monkeypatch.setattr('cwcl.study.jobs.step_seconds', lambda *a: pytest.fail('a step was timed'))
    found = estimate(small_runs(smoke), tmp_path, frame_table(scenes), here=False)
    assert found['seconds'] != found['seconds'] and found['bytes'] > 0
    assert 'timed where they run' in say_estimate(found, tmp_path)

def test_a_job_asks_for_a_gpu_where_its_partition_has_one(tmp_path, monkeypatch):
    monkeypatch.setenv('PATH', str(tmp_path))
    assert partition_gpus() == partition_gpus('fast') == 0, 'no Slurm here'
    sinfo = tmp_path/'sinfo'
    sinfo.write_text('#!/bin/sh\necho "cpu* (null)"\necho "fast gpu:a100:8(S:0-1)"\necho "slow (null)"\n')
    sinfo.chmod(0o755)
    assert [partition_gpus(o) for o in (None, 'cpu', 'fast', 'slow', 'slow,fast', 'fas')] == [0, 0, 1, 0, 1, 0]
    sinfo.write_text('#!/bin/sh\necho "fast* gpu:8"\n')
    assert partition_gpus() == 1

@pytest.mark.parametrize('given,want', [(None, 1), (0, 0), (2, 2)])
def test_gpus_of_a_job(tmp_path, monkeypatch, given, want):
    asked = {}
    fake = SimpleNamespace(update_parameters=lambda **kw: asked.update(kw))
    monkeypatch.setattr('cwcl.study.jobs.submitit', SimpleNamespace(AutoExecutor=lambda **kw: fake))
    monkeypatch.setattr('cwcl.study.jobs.partition_gpus', lambda partition: 1)
    executor(tmp_path, cluster='slurm', gpus=given, partition='fast')
    assert asked['gpus_per_node'] == want and asked['slurm_partition'] == 'fast'

def test_what_a_cluster_is_told_beside(tmp_path, monkeypatch):
    "An account, the memory of a job: written into the script of submitit"
    from submitit.slurm.slurm import SlurmExecutor
    monkeypatch.setattr(SlurmExecutor, 'affinity', classmethod(lambda cls: 2))
    ex = executor(tmp_path, cluster='slurm', gpus=0, sbatch='--account=surgery --mem=32G exclusive')
    script = ex._executor._make_submission_file_text('true', 'x')
    told = re.findall(r'^#SBATCH --(account|mem|exclusive|time)(?:=(\S+))?$', script, re.M)
    assert sorted(told) == [('account', 'surgery'), ('exclusive', ''), ('mem', '32G'), ('time', '1440')]

def test_a_job_has_time_to_begin(tmp_path, monkeypatch):
    monkeypatch.setattr('cwcl.study.jobs.submitit', SimpleNamespace(AutoExecutor=lambda **kw: None))
    with pytest.raises(InputError, match='timeout=2: .*at least 3 minutes'): executor(tmp_path, 'slurm', timeout=2)

@pytest.mark.parametrize('method', ['random', 'simclr', 'byol', 'dcl', 'dcl+cls'])
def test_random_batches_have_the_rows_of_real_ones(smoke, table, method):
    from cwcl.data.streams import cwcl_dls
    for stage in ('joint', 'pretrain', 'frozen'):
        if (method == 'random' and stage != 'joint') or (method == 'byol' and stage == 'joint'): continue
        r = method_recipe(smoke, method, stage=stage)
        x,mask,*_ = cwcl_dls(table, r, device='cpu').train.one_batch()
        assert batch_rows(r) == (len(x), len(mask))
        a,b,*_ = random_batch(r, 'cpu')
        assert a.shape == x.shape and b.shape == mask.shape

def test_the_bar_counts_epochs_of_both_stages(smoke):
    runs = small_runs(smoke)
    bar = EpochBar(runs, disable=False, file=open(os.devnull, 'w'))
    assert bar.bar.total == 3 + 2 + 4
    bar(dict(key=runs[2].key, epoch=2, epochs=2, stage='pretrain', mean_iou=None))
    bar(dict(key=runs[2].key, epoch=1, epochs=2, stage='frozen', mean_iou=.3))
    bar(dict(key='table1-other', epoch=1, epochs=2, stage='joint', mean_iou=.3))
    assert bar.bar.n == 3

def test_a_worker_does_what_is_free(smoke, scenes, undisturbed):
    runs = small_runs(smoke)
    assert Worker()(runs, undisturbed, scenes, device='cpu') == [o.key for o in runs]

def test_workers_of_a_study_decode_each_frame_once(smoke, scenes, tmp_path, monkeypatch):
    loaded = Counter()
    load = store.load_image
    def counted(path, size):
        loaded[path] += 1
        return load(path, size)
    monkeypatch.setattr(store, 'load_image', counted)
    first,second = small_runs(smoke)[:2]
    Worker()([first], tmp_path, scenes, device='cpu')
    assert len(loaded) > 50 and first.result(tmp_path)
    before = dict(loaded)
    Worker()([second], tmp_path, scenes, device='cpu')
    assert loaded == before and second.result(tmp_path) and list((tmp_path/'frames').glob('frames-*.npy'))

def test_readings_keep_the_steps(smoke, scenes):
    parts = fold_parts(frame_table(scenes), smoke)
    r = replace(smoke, epochs=11)
    pairs = ablation(r, parts)
    assert len(pairs) == 3*len(READINGS)
    for a,b in pairs:
        n = [o.recipe.epochs*steps_per_epoch(o.recipe, parts[o.recipe.fold]) for o in (a, b)]
        assert abs(n[0] - n[1]) <= steps_per_epoch(a.recipe, parts[a.recipe.fold])/2 + 1
    assert same_steps(replace(r, batch=12), r, parts[0]).epochs > r.epochs

def test_what_is_half_written_is_not_read(tmp_path):
    "`write_text` writes beside the file, and renames"
    (tmp_path/'.ab12.part.table1-x.json').touch()
    (tmp_path/'torn.json').write_text('{"key"')
    (tmp_path/'table1-x.json').write_text('{"key": "table1-x"}')
    assert list(_written_down(tmp_path)) == [dict(key='table1-x')]
    (tmp_path/'torn.json').unlink()
    (tmp_path/'table1-x.json').unlink()
    assert read_results(tmp_path) == {}
