"One batch on several processes: the loss, the gradients, the training and the files of one process"
import json, multiprocessing, os, signal, socket, subprocess, sys, time, pytest, torch
import torch.distributed as dist
from dataclasses import replace
from itertools import islice
from pathlib import Path
from types import SimpleNamespace
from torch import nn
from torch.nn.parallel import DistributedDataParallel
from torch.torch_version import TorchVersion
from fastai.callback.core import Callback
from fastcore.script import CliError
from cwcl.core import InputError, default_device, find_method, method_recipe, ranks, recipe, set_seed, usable_cores
from cwcl.cost import step_seconds
from cwcl.data.cholec import frame_table
from cwcl.data.labels import class_set
from cwcl.data.splits import split_frames
from cwcl.data.store import FrameStore
from cwcl.data.streams import cwcl_dls, has_strong_views
from cwcl.distrib import GatheredLoss, check_ranks, join_ranks, joined, leave_ranks, synced
from cwcl.memory import one_step
from cwcl.methods import register_method
from cwcl.parts import part_of
from cwcl.recompute import frozen_running_stats
from cwcl.resume import ResumeCallback
from cwcl.study.command import cwcl_table
from cwcl.tasks import CWCLLoss, CWCLNet
from cwcl.train import train_run
from pages import root
from test_parts import CASES, draw, network

context = multiprocessing.get_context('forkserver')
context.set_forkserver_preload(['cwcl.stages', 'cwcl.study.grid', 'cwcl.baselines.byol', 'torchvision.transforms.v2'])

# Processes that meet

def _rank(f, rank, world, port, args, out):
    os.environ.update(RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE=str(world), LOCAL_WORLD_SIZE=str(world),
        MASTER_ADDR='127.0.0.1', MASTER_PORT=str(port))
    torch.set_num_threads(1)
    try:
        join_ranks('cpu')
        out.send((True, f(*args)))
    except BaseException as e: out.send((False, f'{type(e).__name__}: {e}'))
    if dist.is_initialized(): leave_ranks()

def free_port():
    with socket.socket() as s:
        s.bind(('127.0.0.1', 0))
        return s.getsockname()[1]

def start(f, world, *args):
    "Start a function in several processes, as torchrun does; return the processes and where each answers"
    port = free_port()
    started = []
    for rank in range(world):
        here,there = context.Pipe(False)
        p = context.Process(target=_rank, args=(f, rank, world, port, args, there), daemon=True)
        p.start()
        there.close()
        started.append((p, here))
    return started

def answer(p, here, seconds=300):
    try: return here.recv() if here.poll(seconds) else (False, 'no answer')
    except EOFError: return False,'died'
    finally: p.join(30)

def on_ranks(f, world, *args):
    "Call a function in several processes; return what each returns"
    found = [answer(*o) for o in start(f, world, *args)]
    assert all(ok for ok,_ in found), found
    return [value for _,value in found]

# The loss and its gradient

def case_error(name, seed):
    "Largest relative difference between the ranks together and one process alone: (loss, gradient)"
    r = CASES[name]
    net,loss = network(r, seed)
    x,mask,presence,ids = draw(r, seed)
    net.n_labelled = len(mask)
    weights = [o for o in net.parameters() if o.requires_grad]
    alone = loss(net(x), mask, presence, ids)
    want = torch.autograd.grad(alone, weights)
    views = 1 if r.method in ('simclr', 'byol') and r.strong else r.views
    own,*labels = part_of((x, mask, presence, ids), *ranks(), views)
    net.n_labelled = len(labels[0])
    together = DistributedDataParallel(net)
    shared = GatheredLoss(loss, r)
    value = shared(together(own), *labels)
    value.backward()
    off = max(((o.grad - g).abs().max()/(g.abs().max() + 1e-3)).item() for o,g in zip(weights, want))
    return abs(value.item()/alone.item() - 1), off

def case_errors(seed): return {k: case_error(k, seed) for k in CASES}

@pytest.mark.parametrize('world', [2, 4])
def test_loss_and_gradients_are_those_of_one_process(world):
    for found in on_ranks(case_errors, world, world):
        assert set(found) == set(CASES)
        assert all(max(o) < 1e-10 for o in found.values()), found

# Batches

TINY = recipe('smoke', norm='group', widths=(8, 8, 8, 16, 16), height=36, width=64, crop=32, window=32, budget=.5,
    batch=13, labelled=5, threads=1, epochs=5, schedule='plateau', patience=1, lr=3e-3, select='best', valid_step=2)

@pytest.fixture(scope='module')
def tiny(scenes):
    "A table of small frames"
    return split_frames(frame_table(scenes), TINY)

def loaders(table, r):
    set_seed(r.seed, 1)
    return cwcl_dls(table, r, device='cpu')

def bare_tensors(b): return tuple(o.as_subclass(torch.Tensor) for o in b)

KINDS = {'one view': TINY, 'two mild views': replace(TINY, views=2),
    'label sets': replace(TINY, sampler='pk', pk_frames=2),
    'presence of crops': replace(TINY, presence_from='crop'), 'random': replace(TINY, method='random'),
    'simclr': method_recipe(replace(TINY, batch=7, labelled=3), 'simclr'),
    'byol': method_recipe(replace(TINY, batch=7), 'byol'),
    'frozen': method_recipe(TINY, 'dcl', stage='frozen')}

@pytest.mark.parametrize('kind', KINDS)
@pytest.mark.parametrize('world', [2, 3])
def test_a_part_is_dealt_from_the_very_batch_of_one_process(tiny, kind, world):
    "Same frames, same order, same crops and views, labelled ones first"
    r = KINDS[kind]
    whole = loaders(tiny, r).train
    parts = [loaders(tiny, r).train.dealt(i, world) for i in range(world)]
    views = 1 if has_strong_views(r) else r.views
    steps = 1 if has_strong_views(r) else 6 # Those take their time
    for _ in range(1 if has_strong_views(r) else 2):
        batches = list(islice(whole, steps))
        for i,dl in enumerate(parts):
            assert len(dl) == len(whole)
            for a,b in zip(islice(dl, steps), batches, strict=True):
                for u,v in zip(a, part_of(bare_tensors(b), i, world, views)): assert torch.equal(torch.as_tensor(u), v)
                if len(a[1]): assert (a[1] != 255).flatten(1).any(1).all() # Labelled frames do have masks

def test_a_batch_is_whole_again_after_it_was_dealt(tiny):
    "Views of a part must leave nothing behind for a training of one process"
    dl = loaders(tiny, KINDS['simclr']).train
    want = next(iter(dl.new()))
    next(iter(dl.dealt(0, 2)))
    assert all(map(torch.equal, next(iter(dl.new())), want))

@pytest.mark.parametrize('world', [1, 2, 4, 200])
def test_validation_frames_are_dealt_without_padding(tiny, world):
    dl = loaders(tiny, TINY).valid
    rows = [list(dl.dealt(i, world).get_idxs()) for i in range(world)]
    assert sorted(sum(rows, [])) == list(range(len(dl.dataset)))
    assert sum(len(b[0]) for b in dl.dealt(1 % world, world)) == len(rows[1 % world])

# Training

class Double(Callback):
    "Let a training compute in float64, so that sums in another order differ by nothing to speak of"
    order = 10
    def before_batch(self): self.learn.xb = tuple(o.double() for o in self.xb)
    def after_loss(self): self.learn.loss = self.loss.float() # As the recorder wants it

class PowerCut(Callback):
    "The power fails before a step"
    order = 60
    def __init__(self, at): self.at = at
    def before_step(self):
        if self.learn.train_iter >= self.at: raise KeyError('power')

def learner(table, r, **kwargs):
    dls = loaders(table, r)
    learn = find_method(r.method).make(dls, r.method, r, cbs=Double(), **kwargs)
    learn.model.double()
    return learn

def trained(table, r, folder=None, stop=None):
    "Train under `distrib_ctx`; return the weights, the log and the learning rates"
    learn = learner(table, r)
    cbs = [] if folder is None else [ResumeCallback(folder)]
    if stop: cbs.append(PowerCut(stop))
    with learn.no_bar(), learn.no_logging(), learn.distrib_ctx():
        try: learn.fit_recipe(cbs=cbs)
        except KeyError: return
    assert type(learn.model).__name__ in ('CWCLNet', 'BYOLNet', 'MaskedNet')
    state = {k: v.numpy() for k,v in learn.model.state_dict().items()}
    log = [[float(v) if v is not None else 0. for v in row] for row in learn.recorder.values]
    seen = learn.recorder
    return SimpleNamespace(state=state, log=log, lrs=[float(o) for o in seen.lrs], steps=len(seen.losses),
        losses=[float(o) for o in seen.losses], names=list(seen.metric_names[1:-1]))

def same(a, b, tol=1e-8):
    assert a.state.keys() == b.state.keys() and a.steps == b.steps and a.lrs == b.lrs
    for k,v in a.state.items(): assert abs(v - b.state[k]).max() < tol, k
    valid = a.names.index('valid_loss') if 'valid_loss' in a.names else -1
    def compared(row): return [o for i,o in enumerate(row) if i != valid] # That loss is a mean over other batches
    for x,y in zip(a.log, b.log, strict=True): assert compared(x) == pytest.approx(compared(y), abs=1e-6)

@pytest.fixture(scope='module')
def alone(tiny): return trained(tiny, TINY)

@pytest.mark.parametrize('world', [2, 4])
def test_a_training_on_several_processes_is_that_of_one(tiny, alone, world):
    "30 steps with validation, plateau and best weights"
    found = on_ranks(trained, world, tiny, TINY)
    assert alone.steps == 30 and len(set(alone.lrs)) > 1
    for o in found:
        same(o, alone)
        assert (o.log, o.losses) == (found[0].log, found[0].losses)

@pytest.mark.parametrize('change', [dict(recompute=True), dict(chunks=2), dict(recompute=True, chunks=2)], ids=str)
def test_parts_computed_twice_train_on_two_processes_as_at_once(tiny, change):
    "A step of each with the hooks that add up gradients: they must fire once for each weight"
    r = replace(TINY, epochs=1, valid_step=8)
    whole = trained(tiny, r)
    for o in on_ranks(trained, 2, tiny, replace(r, **change)): same(o, whole)

@pytest.mark.parametrize('kind', ['dcl', 'simclr', 'random', 'byol', 'masked'])
def test_every_method_trains_on_two_processes(tiny, kind):
    "`dcl` has a presence head that nothing trains; BYOL, SimCLR and Masked have batch norm of their own"
    changes = dict(strong=False) if kind == 'byol' else dict(strong=False, projection='linear')
    if kind == 'masked': changes = dict(norm='batch')
    r = method_recipe(replace(TINY, epochs=1, valid_step=8), kind, **changes)
    a,b = on_ranks(trained, 2, tiny, r)
    assert a.steps == 6
    for k,v in a.state.items(): assert (v == b.state[k]).all(), k
    if kind not in ('byol', 'masked'): same(a, trained(tiny, r))

def test_running_averages_are_the_same_on_all_processes(tiny):
    r = replace(TINY, norm='batch', epochs=1, valid_step=8)
    a,b = on_ranks(trained, 2, tiny, r)
    for k,v in a.state.items(): assert (v == b.state[k]).all(), k
    assert a.log == b.log

@pytest.mark.parametrize('norm', ['group', 'batch'])
def test_averaged_weights_and_strong_colors_on_two_processes(tiny, norm):
    "With group norm they are those of one process; with batch norm, the running averages of both are equal"
    r = replace(TINY, norm=norm, epochs=1, valid_step=8, average=.8, colors=.5)
    a,b = on_ranks(trained, 2, tiny, r)
    for k,v in a.state.items(): assert (v == b.state[k]).all(), k
    assert a.log == b.log
    if norm == 'group': same(a, trained(tiny, r), 1e-4)

@pytest.mark.parametrize('first, then', [(2, 1), (1, 3)])
def test_a_training_resumes_on_another_number_of_processes(tiny, alone, tmp_path, first, then):
    def go(world, *args): return on_ranks(trained, world, *args) if world > 1 else [trained(*args)]
    assert go(first, tiny, TINY, tmp_path, 14) == [None]*first
    assert sorted(o.name for o in tmp_path.iterdir()) == ['before.safetensors', 'last.safetensors']
    for o in go(then, tiny, TINY, tmp_path): same(o, alone)

class Poison(Callback):
    "A loss that is NaN on one process"
    order = 12
    def before_batch(self):
        if ranks()[0] == 1 and self.training and self.learn.train_iter == 3: self.learn.xb = (self.xb[0]*torch.nan,)

def poisoned(table):
    learn = learner(table, TINY)
    learn.add_cb(Poison())
    with learn.no_bar(), learn.no_logging(), learn.distrib_ctx():
        try: learn.fit_recipe()
        except InputError as e: return str(e).splitlines()[-1]

def test_nan_on_one_process_stops_all_in_the_same_step(tiny):
    a,b = on_ranks(poisoned, 2, tiny)
    assert a == b and 'NaN in epoch 1, step 4 of 6' in a

def looked(table):
    "Only the first process validates: nobody waits for the other"
    learn = learner(table, TINY)
    with learn.no_bar(), learn.no_logging(), learn.distrib_ctx():
        learn.fit(1)
        if not ranks()[0]: return learn.validate()[-1], len(learn.get_preds()[0]), len(learn.dls.valid.dataset)
    return learn.recorder.values[-1][-1]

def test_an_evaluation_outside_a_training_is_not_shared(tiny):
    (score,seen,frames),during = on_ranks(looked, 2, tiny)
    assert score == pytest.approx(during) and seen == frames

# Files

def run_here(r, data, out):
    with joined('cpu') as device: return train_run(r, data, out=out, device=device)

def writers(r, data, out):
    "What this process opened for writing, or moved into its place"
    seen = []
    def hook(event, args):
        if event == 'open' and str(out) in str(args[0]) and set(args[1] or '') & set('wax+'): seen.append(str(args[0]))
        if event == 'os.rename' and str(out) in str(args[1]): seen.append(str(args[1]))
    sys.addaudithook(hook)
    os.environ['XDG_CACHE_HOME'] = str(out.parent/'cache')
    found = train_run(r, data, out=out, device='cpu')
    return found['test']['confusion'], found['processes'], seen

def test_one_process_writes_and_the_others_read(scenes, tmp_path):
    r = replace(TINY, epochs=1, valid_step=8)
    (a,n,wrote),(b,_,none) = on_ranks(writers, 2, r, scenes, tmp_path/'run')
    assert a == b and n == 2 and wrote and not none
    assert {'metrics.json', 'recipe.json', 'model.safetensors'} < {o.name for o in (tmp_path/'run').iterdir()}
    assert len(list((tmp_path/'cache'/'cwcl').glob('frames-*.npy'))) == 1

def until_killed(r, data, out, said):
    "As the command: what ends it is one line in a file"
    from cwcl.script import one_line_errors
    os.environ['XDG_CACHE_HOME'] = str(out.parent/f'cache{ranks()[0]}')
    try: one_line_errors(run_here)(r, data, out)
    except BaseException as e: Path(f'{said}{ranks()[0]}').write_text(f'{type(e).__name__}: {e}')

@pytest.mark.parametrize('victim', [0, 1])
def test_a_killed_process_ends_the_others_with_one_line(scenes, tmp_path, victim):
    r = replace(TINY, epochs=1000, valid_step=8)
    started = start(until_killed, 2, r, scenes, tmp_path/'run', tmp_path/'said')
    file = tmp_path/'run'/'checkpoint'/'last.safetensors'
    for _ in range(600):
        if file.exists(): break
        time.sleep(.1)
    assert file.exists()
    os.kill(started[victim][0].pid, signal.SIGKILL)
    p = started[1-victim][0]
    p.join(30)
    assert not p.is_alive()
    said = (tmp_path/f'said{1-victim}').read_text()
    assert 'another process of this training has ended' in said and 'resumes' in said and '\n' not in said

def command(world, *args): return [sys.executable, '-m', 'torch.distributed.run', '--standalone', '--nproc_per_node',
    str(world), '-m', 'cwcl.train', *map(str, args)]

def told(tmp_path): return dict(os.environ, XDG_CACHE_HOME=str(tmp_path/'cache'), OMP_NUM_THREADS='1',
    PYTHONPATH=str(root))

@pytest.mark.slow
def test_the_command_under_torchrun(scenes, tmp_path):
    changes = 'threads=1,norm=group,height=36,width=64,crop=32,window=32,batch=13,labelled=5,widths=(8,8,8,16,16)'
    args = command(2, '--data', scenes, '--preset', 'smoke', '--budget', .5, '--change', changes, '--out', 'run')
    p = subprocess.run(args, cwd=tmp_path, env=told(tmp_path), capture_output=True, text=True, timeout=300)
    assert p.returncode == 0, p.stdout + p.stderr
    assert p.stdout.count('mean IoU, test') == 1 and p.stdout.count('device: cpu') == 1
    found = json.loads((tmp_path/'run'/'metrics.json').read_text())
    assert found['processes'] == 2 and found['steps'] == 6 and not (tmp_path/'run'/'checkpoint').exists()
    assert not [o for o in (tmp_path/'run').iterdir() if o.name.startswith('.')]

@pytest.mark.slow
def test_torchrun_ends_all_processes_with_one_line_of_ours(scenes, tmp_path):
    args = command(2, '--data', scenes, '--preset', 'smoke', '--budget', .5, '--epochs', 1000, '--out', 'run')
    pipes = dict(stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    p = subprocess.Popen(args, cwd=tmp_path, env=told(tmp_path), **pipes)
    file = tmp_path/'run'/'checkpoint'/'last.safetensors'
    for _ in range(1200):
        if file.exists() or p.poll() is not None: break
        time.sleep(.1)
    import psutil
    workers = psutil.Process(p.pid).children()
    second = next(o for o in workers if o.environ().get('RANK') == '1')
    second.kill()
    _,err = p.communicate(timeout=30)
    assert p.returncode and err.count('another process of this training has ended') == 1
    assert not any(o.is_running() for o in workers)

# What cannot be shared

@pytest.mark.parametrize('change, world, words', [(dict(gdl_pool='batch'), 2, "choose gdl_pool='image'"),
    (dict(labelled=3), 4, '4 processes for a batch of 13 frames, 3 of them labelled.*--nproc_per_node 3'),
    (dict(method='byol', stage='pretrain', views=2), 7, '--nproc_per_node 6')])
def test_a_batch_that_cannot_be_shared_is_refused(change, world, words):
    r = replace(TINY, **change)
    with pytest.raises(InputError, match=words): check_ranks(r, r.labelled, world)

def test_a_smaller_last_batch_is_named():
    "Sizes are asked for once; other processes would wait for rows that do not come"
    loss = GatheredLoss(CWCLLoss(TINY), TINY)
    loss.sizes = [13]
    mask,labels = torch.zeros(2, 8, 8, dtype=torch.long),(torch.zeros(9, 8), torch.zeros(9, 3))
    with pytest.raises(ValueError, match='a batch of 9 frames after one of 13'): loss(([], [], []), mask, *labels)

def test_a_loss_of_ones_own_is_trained_whole(monkeypatch):
    from cwcl.methods import METHODS
    monkeypatch.setattr('cwcl.methods.METHODS', dict(METHODS))
    monkeypatch.setitem(METHODS, 'center', None)
    del METHODS['center']
    register_method('center', loss=lambda *_: 0.)
    try:
        with pytest.raises(InputError, match='a loss of its own'): check_ranks(replace(TINY, method='center'), 5, 2)
    finally: METHODS.pop('center', None)

def test_batch_norm_is_synchronized_on_gpus_alone():
    net = CWCLNet(replace(TINY, norm='batch', sync_bn=True))
    with pytest.raises(InputError, match="sync_bn=True on cpu.*norm='group'"): synced(net, 'cpu')
    masked = SimpleNamespace(recipe=recipe('smoke', method='masked', stage='pretrain'))
    with pytest.raises(InputError, match='sync_bn=True.*visible cells'): synced(masked, 'cuda', True)
    assert not any(isinstance(o, nn.SyncBatchNorm) for o in synced(net, 'cpu', False).modules())
    assert any(isinstance(o, nn.SyncBatchNorm) for o in synced(net, 'cuda').modules())
    with pytest.raises(InputError, match="norm='group'"): replace(TINY, sync_bn=True)

def test_synchronized_norms_may_be_frozen():
    "PyTorch's norm for several GPUs asks that its count of batches be there"
    norm = nn.SyncBatchNorm(3)
    with frozen_running_stats(norm):
        assert norm.num_batches_tracked is not None
        norm.num_batches_tracked += 1
    assert norm.num_batches_tracked == 0

def test_two_processes_on_one_gpu_are_told_so(monkeypatch):
    monkeypatch.setattr('cwcl.distrib.join_ranks', lambda device: device)
    monkeypatch.setattr('cwcl.distrib.ranks', lambda: (1, 2))
    monkeypatch.setattr('signal.signal', lambda *a: None)
    with pytest.raises(InputError, match='two processes have the same GPU'), joined('cuda'):
        raise RuntimeError('NCCL error: Duplicate GPU detected : rank 1 and rank 0')

def test_levels_below_the_deepest_head_have_no_gradient_to_wait_for():
    for skip,want in ((0, [True]*5), (1, [True]*4 + [False])):
        net = CWCLNet(recipe('smoke', method='dcl', stage='pretrain', skip=skip, scales=2))
        assert [all(p.requires_grad for p in o.parameters()) for o in net.encoder.levels] == want
        net.n_labelled = 0
        loss = sum(z.sum() for z in net(torch.rand(2, 3, 64, 64))[2])
        loss.backward()
        assert all((p.grad is not None) == p.requires_grad for p in net.encoder.parameters())

def test_a_process_alone_meets_nobody(tiny, alone):
    with joined('cpu') as device: assert device == 'cpu' and ranks() == (0, 1)
    learn = learner(tiny, replace(TINY, epochs=1))
    with learn.no_bar(), learn.no_logging(), learn.distrib_ctx(): learn.fit_recipe()
    assert type(learn.loss_func).__name__ == 'CWCLLoss'

def test_each_process_has_a_gpu_of_its_own(monkeypatch):
    monkeypatch.setattr(torch.cuda, 'is_available', lambda: True)
    for gpus,rank,name in ((8, '3', 'cuda:3'), (1, '3', 'cuda'), (8, None, 'cuda')):
        monkeypatch.setattr(torch.cuda, 'device_count', lambda gpus=gpus: gpus)
        monkeypatch.setenv('LOCAL_RANK', rank) if rank else monkeypatch.delenv('LOCAL_RANK', raising=False)
        assert str(default_device()) == name

def test_older_pytorch_frees_no_group(monkeypatch):
    "Its destructor holds Python's lock and waits for threads that may need it"
    left = []
    monkeypatch.setattr('cwcl.distrib._kept', left)
    monkeypatch.setattr(dist, 'group', SimpleNamespace(WORLD='all'))
    monkeypatch.setattr(dist, 'destroy_process_group', lambda: None)
    for version,kept in (('2.8.0', []), ('2.7.1+cpu', ['all'])):
        monkeypatch.setattr(torch, '__version__', TorchVersion(version))
        leave_ranks()
        assert left == kept

def test_more_processes_than_gpus_is_one_line(monkeypatch):
    monkeypatch.setattr(torch.cuda, 'is_available', lambda: True)
    monkeypatch.setattr(torch.cuda, 'device_count', lambda: 4)
    for k,v in dict(WORLD_SIZE=8, LOCAL_WORLD_SIZE=8, LOCAL_RANK=0, RANK=0).items(): monkeypatch.setenv(k, str(v))
    with pytest.raises(InputError, match='8 processes and 4 GPUs.*--nproc_per_node 4'): join_ranks()

def test_a_process_that_sees_one_gpu_takes_it(monkeypatch):
    "As on a cluster that shows each process its own"
    took = []
    monkeypatch.setattr(torch.cuda, 'is_available', lambda: True)
    for name,v in dict(device_count=lambda: 1, current_device=lambda: 0, set_device=took.append).items():
        monkeypatch.setattr(torch.cuda, name, v)
    monkeypatch.setattr(dist, 'init_process_group', lambda backend, **k: took.append(backend))
    for k,v in dict(WORLD_SIZE=2, LOCAL_WORLD_SIZE=1, LOCAL_RANK=0, RANK=1).items(): monkeypatch.setenv(k, str(v))
    assert str(join_ranks()) == 'cuda:0' and took == [torch.device('cuda:0'), 'nccl']

# Heads that no term reaches

@pytest.mark.parametrize('change', [dict(method='random'), dict(method='dcl'), dict(method='cls', alpha=0.),
    method_recipe(TINY, 'simclr').__dict__, dict(method='dcl', stage='pretrain')])
def test_what_no_term_reaches_is_frozen_and_no_weight_changes_by_it(tiny, monkeypatch, change):
    "An optimizer skips weights without a gradient, decay and all: the bits of earlier runs are repeated"
    r = replace(TINY, **{**change, 'epochs': 1, 'wd': .1, 'batch': 40, 'valid_step': 8, 'strong': False})
    def weights():
        learn = learner(tiny, r)
        before = {k: v.clone() for k,v in learn.model.named_parameters()}
        with learn.no_bar(), learn.no_logging(): learn.fit_recipe()
        return learn.model, before
    net,before = weights()
    frozen = {k for k,o in net.named_parameters() if not o.requires_grad}
    monkeypatch.setattr(CWCLNet, 'unreached', lambda self: [])
    free,_ = weights()
    assert frozen and all(o.requires_grad for o in free.parameters())
    for (k,a),b in zip(net.named_parameters(), free.parameters()):
        assert torch.equal(a, b)
        assert torch.equal(a, before[k]) == (k in frozen), k

# The study

def test_a_table_is_not_done_by_every_process(monkeypatch, tmp_path):
    monkeypatch.setenv('WORLD_SIZE', '2')
    with pytest.raises(CliError, match='cwcl_table under torchrun.*--jobs'): cwcl_table(out=str(tmp_path))

def test_a_step_is_timed_in_the_precision_of_the_recipe():
    seen = set()
    def timed(r, device, repeat):
        net,forward,_ = one_step(r, device)
        conv = next(o for o in net.modules() if isinstance(o, nn.Conv2d))
        conv.register_forward_hook(lambda m, i, o: seen.add(o.dtype))
        forward()
        return 1., 1.
    with pytest.MonkeyPatch.context() as m:
        m.setattr('cwcl.cost._timed', timed)
        step_seconds(replace(TINY, precision='bf16'), 'cpu')
    assert seen == {torch.bfloat16}

def test_no_more_threads_than_cores_that_may_be_used(monkeypatch):
    monkeypatch.setattr(os, 'cpu_count', lambda: 64)
    monkeypatch.setattr(os, 'sched_getaffinity', lambda _: {3}, raising=False)
    assert usable_cores() == 1 and FrameStore([], [], class_set(8), (6, 8)).threads == 1
