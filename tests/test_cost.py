"What a run costs: pretended tensors against real ones, cards of three sizes, and nothing changed by looking"
import random, re, subprocess, sys
import numpy as np, pytest, torch
from contextlib import contextmanager
from dataclasses import replace
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.profiler import ProfilerActivity, profile
from cwcl.baselines.byol import BYOLLoss, BYOLNet
from cwcl.core import InputError, recipe
from cwcl.cost import _sample, run_cost, run_seconds, say_device, share_of_step, step_flops, step_seconds
from cwcl.memory import GiB, advice, check_memory, free_memory, one_step, random_batch, saved_bytes, say_bytes
from cwcl.memory import step_bytes
from cwcl.options import parse_changes
from pages import root

def real_bytes(r):
    "What a real step keeps and has beside it"
    net,forward,_ = one_step(r, 'cpu')
    return saved_bytes(forward, net) + sum(o.nbytes*(4 if o.requires_grad else 1) for o in net.parameters())

@pytest.mark.parametrize('change', [dict(), dict(precision='bf16'), dict(method='simclr'), dict(stage='pretrain'),
    dict(stage='frozen'), dict(norm='group', up='bilinear'), dict(teacher=1., average=.9)])
def test_pretended_tensors_keep_what_real_ones_keep(change):
    "Two percent for other backends, which keep other small things"
    r = recipe('smoke', **change)
    assert step_bytes(r, True) == pytest.approx(real_bytes(r), rel=.02)

@contextmanager
def cuda_autocast():
    "CUDA's autocast on a machine without a GPU, where `torch.autocast` leaves it off"
    torch.autocast_increment_nesting() # So that a loss in float32 within does not forget the weights in sixteen bits
    torch.set_autocast_dtype('cuda', torch.bfloat16)
    torch.set_autocast_enabled('cuda', True)
    try: yield
    finally:
        torch.set_autocast_enabled('cuda', False)
        torch.autocast_decrement_nesting()
        torch.clear_autocast_cache()

@pytest.mark.parametrize('change', [dict(), dict(norm='group'), dict(up='bilinear'), dict(absent=.1),
    dict(method='simclr'), dict(method='masked', stage='pretrain'), dict(encoder='timm:convnext_atto', crop=64)])
def test_half_precision_is_counted_as_a_pretended_gpu_keeps_it(monkeypatch, change):
    "PyTorch's own list of what a GPU computes in float32 decides, on pretended tensors of a GPU"
    r = recipe('smoke', precision='bf16', **change)
    counted,on_cpu = step_bytes(r), step_bytes(r, True)
    monkeypatch.setattr('cwcl.memory._half', lambda r, device: cuda_autocast())
    with FakeTensorMode():
        net,forward,_ = one_step(r, 'cuda')
        kept = saved_bytes(forward, net)
    weights = sum(o.nbytes*(4 if o.requires_grad else 1) for o in net.parameters())
    assert counted == pytest.approx(kept + weights, rel=.002)
    if {'norm', 'absent', 'encoder'} & set(change): assert on_cpu < .995*counted

def test_half_precision_saves_nothing_behind_group_norm():
    "Neither at once nor where levels are computed twice, and it is not proposed"
    for again in (False, True):
        r = recipe('paper', norm='group', recompute=again)
        half = replace(r, precision='bf16')
        assert step_bytes(half, True) < .6*step_bytes(r) and step_bytes(half) > step_bytes(r)
        assert 'precision' not in advice(r, .4*step_bytes(r))

def test_the_work_of_a_teacher():
    "The student's second pass costs as much for each frame as its first, the teacher's look a third of that"
    r = recipe('smoke', method='random', batch=8, labelled=4)
    plain,absent,teacher = (step_flops(replace(r, **o)) for o in ({}, dict(absent=.1), dict(teacher=1., average=.9)))
    assert absent == pytest.approx(2*plain, rel=.02) and teacher - absent == pytest.approx(plain/3, rel=.05)
    assert step_bytes(replace(r, teacher=1., average=.9)) == step_bytes(replace(r, absent=.1)) > 1.4*step_bytes(r)

@pytest.mark.parametrize('change', [dict(), dict(method='random')])
def test_what_is_kept_is_what_was_allocated(change):
    "The allocator's own account of a forward pass; frames and masks were there before"
    r = recipe('smoke', **change)
    net,forward,_ = one_step(r, 'cpu')
    forward().backward()
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as p: loss = forward()
    allocated = sum(o.self_cpu_memory_usage for o in p.key_averages())
    before = sum(o.nbytes for o in random_batch(r, 'cpu'))
    kept = saved_bytes(forward, net)
    assert loss.requires_grad and kept - before <= allocated*1.02 and allocated <= kept*1.02

def test_weights_are_not_counted_twice():
    "By hand: a convolution keeps its input, a ReLU its output"
    net = torch.nn.Sequential(torch.nn.Conv2d(3, 8, 3, padding=1, bias=False), torch.nn.ReLU())
    x = torch.randn(2, 3, 16, 16)
    assert saved_bytes(lambda: net(x).sum(), net) == 4*2*16*16*(3 + 8)

def test_byol_keeps_what_simclr_keeps_without_masks():
    r = recipe('smoke', method='byol')
    net = BYOLNet(r).train()
    loss = BYOLLoss()
    x,*_ = random_batch(r, 'cpu')
    weights = sum(o.nbytes*(4 if o.requires_grad else 1) for o in net.parameters())
    assert saved_bytes(lambda: loss(net(x)), net) + weights == pytest.approx(step_bytes(r), rel=.1)

def test_memory_grows_with_frames_and_falls_with_precision():
    "The paper's step, as counted by hand elsewhere: 20 GiB, half of it in half precision"
    paper = step_bytes(recipe('paper'))
    assert paper/GiB == pytest.approx(20, rel=.05)
    assert step_bytes(recipe('paper', precision='bf16'))/paper == pytest.approx(.55, abs=.03)
    assert step_bytes(recipe('paper', batch=100, labelled=30))/paper == pytest.approx(.5, abs=.01)
    assert step_bytes(recipe('smoke', class_set='a=0, b=1')) < step_bytes(recipe('smoke'))

def lines(monkeypatch, r, free, device='cpu'):
    "What is said on a device with so much free memory"
    monkeypatch.setattr('cwcl.cost.free_memory', lambda device: (free*GiB, 80*GiB))
    monkeypatch.setattr('cwcl.cost.step_seconds', lambda r, device: (2., .01))
    said = []
    try: said += run_cost(r, (5600, 1000), 1440, device)
    except InputError as e: said.append(str(e))
    return said

@pytest.mark.parametrize('free, fits', [(24, True), (22.3, False), (13, False)])
def test_frames_that_will_lie_on_the_gpu_need_room_too(monkeypatch, free, fits):
    "20.0 GiB of a step and 2.5 GiB of frames, which move to the GPU where they are a sixth of what is free"
    monkeypatch.setattr('cwcl.cost.say_device', lambda device, threads: 'device: cuda')
    said = lines(monkeypatch, recipe('paper'), free, torch.device('cuda'))
    if fits: assert said[1].endswith('for a training step, 2.5 GiB for frames')
    else: assert (' beside the frames: ' in said[1]) == (free > 16) and '--change precision=bf16' in said[1]

def test_what_pytorch_holds_for_later_is_free(monkeypatch):
    monkeypatch.setattr(torch.cuda, 'mem_get_info', lambda device: (3, 24))
    monkeypatch.setattr(torch.cuda, 'memory_reserved', lambda device: 15)
    monkeypatch.setattr(torch.cuda, 'memory_allocated', lambda device: 5)
    assert free_memory('cuda') == (13, 24)

@pytest.mark.parametrize('change, share, says', [
    (dict(teacher=1., average=.9), .1, 'take a smaller crop'), (dict(absent=.1), .1, 'take a smaller crop'),
    (dict(), .9, 'and so the contrast, as it is'), (dict(method='random'), .9, 'leaves the batch as it is'),
    (dict(method='simclr'), .2, 'another contrast: each frame meets fewer others'),
    (dict(method='byol', stage='pretrain'), .4, 'a smaller batch is another training')])
def test_advice_is_a_recipe_and_speaks_of_a_contrast_only_where_there_is_one(change, share, says):
    r = recipe('smoke', norm='group', **change)
    said = advice(r, share*step_bytes(r))
    assert says in said
    for o in re.findall('--change ([a-z]\S+)', said): replace(r, **parse_changes(o))

@pytest.mark.parametrize('change,free,says', [(dict(), 80, ''), (dict(), 24, ''),
    (dict(), 16, r'--change precision=bf16 needs 10\.. GiB and leaves the batch'),
    (dict(), 8, r'precision=bf16,recompute=True needs 5\.. GiB and leaves the batch'),
    (dict(), 3, r'recompute=True,chunks=2 needs .* leaves the batch.*chunk at a time'),
    (dict(), .5, r'chunks=8,batch=\d+,labelled=\d+ would fit, but a smaller batch is another contrast'),
    (dict(), .05, r'even --change .*chunks=2,batch=2,labelled=2 needs .*; take a smaller crop'),
    (dict(method='simclr'), 80, ''), (dict(method='simclr'), 24,
        r'simclr needs 38\.. GiB, 24\.0 GiB are free; --change prec'),
    (dict(method='simclr'), 8, r'recompute=True,chunks=2 needs .* batch norm then sees a chunk'),
    (dict(precision='bf16'), 8, '--change recompute=True needs')])
def test_a_card_of_8_24_or_80_gib(monkeypatch, change, free, says):
    r = recipe('paper', **change)
    said = lines(monkeypatch, r, free)
    assert said[0].startswith('device: cpu')
    assert len(said) == (2 if says else 3)
    assert re.search(says or '^memory: at least', said[1]) and '\n' not in said[1]
    if not says: assert said[2] == 'time: about 4 h 14 min, 200 epochs of 33 steps of 2 s'
    if found := re.search(r'; --change (\S+)', said[-1]):
        need = step_bytes(replace(r, **parse_changes(found[1])))
        assert need <= free*GiB, 'the advice fits'
        assert 'batch=' not in found[1] or need > .8*free*GiB, 'and takes no more frames away than it must'

def test_advice_for_byol_and_group_norm():
    r = recipe('paper', method='byol', precision='bf16')
    assert 'chunks' not in advice(r, GiB) and 'recompute=True,batch=' in advice(r, GiB)
    assert 'chunk at a time' not in advice(recipe('paper', norm='group', precision='bf16', recompute=True), 3*GiB)

def test_each_gpu_holds_its_part_of_a_batch(monkeypatch):
    "As lesson 32 says: a run on eight cards is for a batch that does not fit on one"
    r = recipe('paper')
    part = share_of_step(r, 8)
    assert (part.batch, part.labelled) == (25, 8) and share_of_step(r, 1) == r
    assert share_of_step(recipe('paper', batch=3, labelled=2, chunks=2), 2).chunks == 1
    assert share_of_step(recipe('smoke', batch=2, labelled=1, average=.9, teacher=1.), 2).batch == 2, 'one has no mask'
    monkeypatch.setattr('cwcl.cost.ranks', lambda: (0, 8))
    monkeypatch.setattr('torch.cuda.get_device_name', lambda device: 'a card')
    assert 'needs 20' in lines(monkeypatch, r, 12)[1], 'on the CPU the processes share the memory'
    need = say_bytes(step_bytes(part))
    assert lines(monkeypatch, r, 12, 'cuda:0')[1] == f'memory: at least {need} for a training step'

@pytest.mark.parametrize('change', [dict(method='masked'), dict(average=.99, teacher=1.), dict(absent=.1)])
def test_nobody_is_advised_what_a_recipe_cannot_have(change):
    r = recipe('paper', **change)
    says = 'cuda:0: a step of .* needs 30.0 GiB, 0.5 GiB are free; --change prec.* would fit'
    with pytest.raises(InputError, match=says): check_memory(r, 30*GiB, .5*GiB, 'cuda:0')

def test_processes_share_a_card():
    r = recipe('smoke')
    check_memory(r, 5*GiB, 10*GiB, jobs=2)
    says = 'cuda:0: a step of dcl.cls needs 5.0 GiB in each of 3 processes, 10.0 GiB are free'
    with pytest.raises(InputError, match=says): check_memory(r, 5*GiB, 10*GiB, 'cuda:0', 3)

def test_a_step_that_runs_out_of_memory_gets_the_same_advice(monkeypatch):
    def full(*args): raise torch.cuda.OutOfMemoryError('CUDA out of memory. Tried to allocate 2.00 GiB')
    monkeypatch.setattr('cwcl.cost._timed', full)
    monkeypatch.setattr('cwcl.cost.free_memory', lambda device: (21*GiB, 24*GiB))
    says = 'out of memory in a step of dcl.cls, with 21.0 GiB free; --change precision=bf16 needs 10'
    with pytest.raises(InputError, match=says): step_seconds(recipe('paper'), 'cpu')

def test_a_device_is_named(monkeypatch):
    monkeypatch.setattr('cwcl.cost.free_memory', lambda device: (20*GiB, 24*GiB))
    monkeypatch.setattr('torch.cuda.is_available', lambda: False)
    assert say_device('cpu', 2) == 'device: cpu, 2 threads, as PyTorch sees no GPU; 20.0 GiB of 24.0 GiB free'
    monkeypatch.setattr('torch.cuda.is_available', lambda: True)
    monkeypatch.setattr('torch.cuda.get_device_name', lambda device: 'NVIDIA A10G')
    assert 'cpu, 1 thread, although there is a GPU (--device cuda)' in say_device('cpu', 1)
    assert say_device('cuda:1', 2) == 'device: cuda:1, NVIDIA A10G; 20.0 GiB of 24.0 GiB free'

def test_looking_changes_nothing():
    "Neither generators nor threads, also where the recipe asks for others"
    def state():
        numbers = random.getstate(),np.random.get_state()[1].tolist(),torch.get_rng_state().tolist()
        return numbers, torch.get_num_threads()
    before = state()
    r = recipe('smoke', threads=torch.get_num_threads() + 1)
    assert len(list(run_cost(r, (60, 20), 18, 'cpu'))) == 3 and state() == before

def test_a_large_step_is_timed_on_a_fraction_of_its_batch(monkeypatch):
    r = recipe('paper')
    few = _sample(r, 'cpu').batch
    assert few < 20 and _sample(r, 'cuda') == r and _sample(recipe('demo'), 'cpu') == recipe('demo')
    monkeypatch.setattr('cwcl.cost._timed', lambda r, device, repeat: (1., .5))
    monkeypatch.setattr('cwcl.cost.step_flops', lambda r: r.batch)
    assert step_seconds(r, 'cpu') == (200/few, .5)
    assert step_seconds(recipe('demo'), 'cpu') == (1., .5)

def test_the_time_of_a_run_is_that_of_its_steps_and_frames():
    r = recipe('demo', epochs=10, valid_step=2)
    assert run_seconds(r, (60, 20), 30, 3., 0.) == 10*(80//12)*3
    assert run_seconds(r, (60, 20), 30, 0., 1.) == 10*20/2 + 20 + 3*30
    assert run_seconds(replace(r, stage='pretrain'), (60, 20), 30, 0., 1.) == 0

def test_the_command_prints_every_method_in_a_fresh_process():
    call = [sys.executable, '-m', 'cwcl.cost', '--preset', 'smoke']
    out = subprocess.run(call, cwd=root, capture_output=True, text=True, check=True).stdout
    assert re.findall(r'^\| ([\w+]+) \| [\d.]+ \|', out, re.M) == ['random', 'simclr', 'dcl', 'cls', 'dcl+cls', 'byol',
        'masked']

@pytest.mark.parametrize('method', ['random', 'simclr', 'dcl+cls'])
def test_the_table_of_the_readme_is_what_the_command_prints(method):
    text = (root/'README.md').read_text(encoding='utf-8')
    found = re.search(rf'^\| {re.escape(method)} \| ([\d.]+) \| ([\d.]+) \|$', text, re.M)
    counted = [step_bytes(recipe('paper', method=method, precision=p))/GiB for p in ('fp32', 'bf16')]
    assert [float(o) for o in found.groups()] == pytest.approx(counted, abs=.11)
