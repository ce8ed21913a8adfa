"The parts of `tools/gpu.py`: each fills a dict, so that what it found before an error is kept"
import copy, gc, itertools, numpy as np, time, torch, torch.nn.functional as F, warnings
from contextlib import contextmanager, nullcontext
from dataclasses import replace
from functools import partial
from pathlib import Path
from torch.autograd import DeviceType
from torch.profiler import ProfilerActivity, profile as profiler
from bench_clock import in_turns
from bench_lines import step_call
from cwcl.arithmetic import arithmetic
from cwcl.core import set_seed
from cwcl.cost import step_flops
from cwcl.data.augment import blur_frames, draw_factors, take_crops
from cwcl.data.cholec import frame_table
from cwcl.data.splits import split_frames
from cwcl.data.streams import batch_views, cwcl_dls
from cwcl.data.synth import write_scenes
from cwcl.infer import sliding_window
from cwcl.losses.segmentation import presence_loss
from cwcl.memory import one_step
from cwcl.metrics import confusion_matrix, surface_dice
from cwcl.multitask import cwcl_learner
from cwcl.optimizer import ForeachAdam
from cwcl.tasks import CWCLLoss, CWCLNet
from cwcl.train import train_learner, train_run

PARTS = {} # Name to (seconds at most, function of a `Bench` and of the dict to fill)

def part(seconds):
    def add(f):
        PARTS[f.__name__] = (seconds, f)
        return f
    return add

@contextmanager
def precision(name): # ieee, tf32, bf16
    "Multiply in the precision of a name: all 24 bits of float32, 10 of them, or bf16 where a recipe says so"
    backends = torch.backends.cuda.matmul,torch.backends.cudnn
    old = [o.allow_tf32 for o in backends]
    try:
        for o in backends: o.allow_tf32 = name == 'tf32'
        yield
    finally:
        for o,v in zip(backends, old): o.allow_tf32 = v

def with_gradient(f, *leaves):
    "Return the value of a loss and its gradients"
    leaves = [o.detach().requires_grad_() for o in leaves]
    loss = f(*leaves)
    return [loss.detach(), *torch.autograd.grad(loss, leaves)]

def functions(b):
    "Yield name and function of (device, dtype) for everything that runs on both devices, on the same numbers"
    r = b.recipe()
    n,c,side = b.sizes((16, 8, 128), (6, 8, 32))
    g = torch.Generator().manual_seed(0)
    def draw(*shape): return torch.randn(*shape, generator=g, dtype=torch.float64)
    zs = [draw(n, r.dim) for _ in range(3)]
    logits,seen,x = draw(n, c, side, side),draw(n, c),draw(n, 3, side, side)
    ids,mask = torch.randint(4, (n,), generator=g),torch.randint(c, (n, side, side), generator=g)
    presence = torch.rand(n, c, generator=g).round()
    loss = CWCLLoss(r)
    def contrast(to): return with_gradient(lambda *o: loss.dcl(o, to(ids), None, r.temp)[0], *map(to, zs))
    def segmentation(to):
        truth = to(mask)
        return with_gradient(lambda o: sum(w*v for w,v in loss.segmentation(o, truth).values()), to(logits))
    def presence_term(to): return with_gradient(lambda o: presence_loss(o, to(presence)), to(seen))
    d = draw_factors(n, (side, side), side//2, rng=g)
    def augment(to):
        moved = {k: to(v) for k,v in d.items()}
        image,ids = take_crops(to(x), to(mask), moved, side//2)
        return [blur_frames(image, moved['blur']), ids]
    set_seed(0)
    net = CWCLNet(r).double()
    batch = x,mask,presence,torch.stack([ids]*3, 1)
    def evaluated(to):
        own = to(copy.deepcopy(net)).eval()
        with torch.no_grad(): return [own.segment(to(x))]
    def windows(to):
        own = to(copy.deepcopy(net)).eval()
        with torch.no_grad(): return [sliding_window(own.segment, to(x), side//2)]
    def step(to):
        own = to(copy.deepcopy(net)).train()
        image,*labels = map(to, batch)
        value = loss(own(image), *labels)
        value.backward()
        return [value.detach(), torch.cat([p.grad.flatten() for p in own.parameters() if p.grad is not None])]
    def confusion(to): return [confusion_matrix(to(mask), to(mask.flip(0)), c)]
    given = dict(contrast=contrast, segmentation=segmentation, presence=presence_term, augmentation=augment)
    yield from given.items()
    yield from dict(network=evaluated, window=windows, step=step, confusion=confusion).items()

def largest_difference(got, want):
    "The largest difference of any result, beside its largest number"
    def one(a, b): return ((a.cpu().double() - b.double()).norm()/b.double().norm().clamp(min=1e-30)).item()
    return max(map(one, got, want))

@part(60)
def parity(b, found):
    "Everything on the device, against float64 on the CPU, as norms of differences beside norms"
    kinds = dict(float64=torch.float64, ieee=torch.float32, tf32=torch.float32, bf16=torch.float32)
    def to(device, dtype, o):
        if isinstance(o, torch.nn.Module): return o.to(device, dtype)
        return o.to(device, dtype) if o.is_floating_point() else o.to(device)
    for name,f in functions(b):
        want = f(partial(to, 'cpu', torch.float64))
        for kind,dtype in kinds.items():
            half = torch.autocast(b.device.type, torch.bfloat16) if kind == 'bf16' else nullcontext()
            with precision(kind), half: got = f(partial(to, b.device, dtype))
            found.setdefault(name, {})[kind] = largest_difference(got, want)

def scenes(b):
    "Draw the embedded data set once"
    per_clip,size = b.sizes((4, (427, 240)), (1, (107, 60)))
    return write_scenes(b.folder/'scenes', per_clip, size, workers=b.sizes(None, 1), progress=False)

def table(b, r): return split_frames(frame_table(scenes(b)), r)

def learner(b, **changes):
    r = b.recipe(**{'budget': .5, **changes})
    set_seed(0)
    return cwcl_learner(cwcl_dls(table(b, r), r, device=b.device), r.method, r)

@contextmanager
def step_of(learn):
    "A call of a step of a Learner, on one batch"
    with learn.no_bar(), learn.no_logging(): yield step_call(learn, learn.dls.train.one_batch())

@part(60)
def syncs(b, found):
    "Where a step of the Learner waits for the GPU, by file and line; drawing the scenes is part of the time"
    with step_of(learner(b)) as step:
        step()
        if b.device.type != 'cuda': return found.update(skipped='needs CUDA')
        with warnings.catch_warnings(record=True) as seen:
            warnings.simplefilter('always')
            torch.cuda.set_sync_debug_mode('warn')
            try: step()
            finally: torch.cuda.set_sync_debug_mode('default')
    places = [f'{Path(o.filename).name}:{o.lineno}' for o in seen if 'synchroniz' in str(o.message)]
    found.update(syncs=len(places), places={k: places.count(k) for k in sorted(set(places))})

def step_time(b, r, steps, compiled=False):
    "Milliseconds of a step, with its optimizer, and bytes at its peak"
    set_seed(0)
    net,forward,factor = one_step(r, b.device)
    if r.channels_last: net.to(memory_format=torch.channels_last)
    if compiled: net.forward = torch.compile(net.forward, backend=b.sizes('inductor', 'eager'))
    opt = ForeachAdam([[p for p in net.parameters() if p.requires_grad]], lr=1e-4, mom=.9, sqr_mom=.999, eps=1e-8)
    def step():
        forward().backward()
        opt.step()
        opt.zero_grad()
    with arithmetic(r, training=True):
        for _ in range(b.sizes(4, 0)): step()
        if b.device.type == 'cuda': # What cuDNN took to choose its algorithms is no part of a step
            torch.cuda.empty_cache()
            torch.cuda.reset_peak_memory_stats()
        times = in_turns([step], 0, steps, steps)[0]
    seconds = float(np.median(times))*factor
    found = dict(ms=1000*seconds, tflops=step_flops(r)/seconds/1e12)
    if b.device.type != 'cuda': return found
    return found | dict(allocated=torch.cuda.max_memory_allocated(), reserved=torch.cuda.max_memory_reserved())

def measure(found, name, f):
    "Keep what a call returns, or that memory ran out"
    try: found[name] = f()
    except torch.cuda.OutOfMemoryError: found[name] = dict(error='out of memory')
    gc.collect()
    if torch.cuda.is_available(): torch.cuda.empty_cache()

@part(170)
def speed(b, found):
    "A step with its optimizer: method, precision, format; the best compiled, recomputed, with an eighth of the batch"
    steps = b.sizes(20, 1)
    layouts = {'NCHW': False, 'NHWC': True}
    def plain(method):
        for kind,layout in itertools.product(('bf16', 'tf32', 'ieee'), layouts):
            if b.smoke and (method, kind) not in (('dcl+cls', 'bf16'), ('simclr', 'ieee')): continue
            r = b.recipe(method=method, precision=dict(ieee='fp32').get(kind, kind), channels_last=layouts[layout])
            measure(found, f'{method} {kind} {layout}', partial(step_time, b, r, steps))
    plain('dcl+cls')
    best = b.recipe(precision='bf16', channels_last=True)
    eighth = replace(best, batch=max(4, best.batch//8), labelled=max(2, best.labelled//8))
    measure(found, 'dcl+cls bf16 NHWC, an eighth of the batch', partial(step_time, b, eighth, steps))
    measure(found, 'dcl+cls bf16 NHWC compiled', partial(step_time, b, best, steps, compiled=True))
    for o in ('random', 'simclr'): plain(o)
    for o in ('dcl+cls', 'simclr'):
        again = b.recipe(method=o, precision='bf16', channels_last=True, recompute=True)
        measure(found, f'{o} bf16 NHWC recomputed', partial(step_time, b, again, b.sizes(5, 1)))

# Ways to compute a step that a recipe may have: field to values that differ from the default
WAYS = dict(chunks=(2, 8))

@part(40)
def ways(b, found):
    "Ways to compute the same step with less memory or faster"
    for k,values in WAYS.items():
        for v in values:
            if b.smoke and v == 8: continue
            r = b.recipe(precision='bf16', channels_last=True, **{k: v})
            measure(found, f'{k}={v}', partial(step_time, b, r, b.sizes(5, 1)))

# The drawn scenes are few: with a quarter of the paper's batch an epoch has several steps
SHARE = dict(batch=48, labelled=14)

def weights(learn): return torch.cat([p.detach().flatten().cpu() for p in learn.model.parameters()])

class Stop(Exception): "As if the machine had stopped"

def stop_after(epochs):
    "A callback that stops a training after some epochs, when its state is written"
    from fastai.callback.core import Callback
    class StopAfter(Callback):
        order = 200
        def after_epoch(self):
            if self.epoch == epochs-1: raise Stop('after an epoch')
    return StopAfter()

@part(60)
def determinism(b, found):
    "The same training twice, and once with a stop and a resume: largest difference of a weight"
    r = b.recipe(budget=.5, epochs=2, precision='bf16', lr=.001, valid_step=8, **b.sizes(SHARE, {}))
    t = table(b, r)
    for mode in b.sizes((False, True), (True,)):
        own = replace(r, deterministic=mode)
        def train(name, **kwargs): return weights(train_learner(own, t, b.folder/name, b.device, **kwargs)[0])
        name = f'deterministic={mode}'
        first,again = train(f'a{mode}'),train(f'b{mode}')
        try: train(f'c{mode}', cbs=[stop_after(1)])
        except Stop: pass
        resumed = train(f'c{mode}')
        found[name] = {k: (first - o).abs().max().item() for k,o in dict(again=again, resumed=resumed).items()}

@part(40)
def store(b, found):
    "A batch from its loader; and the gather alone, from memory of the host and of the device"
    learn = learner(b)
    dl = learn.dls.train
    def batches():
        for _ in dl: pass
    found['loader_ms'] = 1000*float(np.median(in_turns([batches], 0, 3, 3)))/dl.steps
    r = b.recipe()
    frames = torch.zeros(b.sizes(2000, 50), 4, r.height, r.width, dtype=torch.uint8)
    rows = torch.randint(len(frames), (r.batch,))
    there,at = (o.to(b.device) for o in (frames, rows))
    def fetched(): # As `FrameStore.gather` does it
        out = torch.empty(len(rows), *frames.shape[1:], dtype=frames.dtype, pin_memory=b.device.type == 'cuda')
        return torch.index_select(frames, 0, rows, out=out).to(b.device, non_blocking=True)
    calls = [fetched, lambda: there.index_select(0, at)]
    for k,t in zip(('host_ms', 'device_ms'), in_turns(calls, 0, 10, 10)): found[k] = 1000*float(np.median(t))

def timed(b, f, n=5): return dict(ms=1000*float(np.median(in_turns([f], 0, n, n))))

@part(60)
def pieces(b, found):
    "Contrast to 16,384 frames, segmentation loss, windows, views, surface Dice"
    r = b.recipe()
    loss = CWCLLoss(r)
    def contrast(n):
        zs = [torch.randn(n, r.dim, device=b.device, requires_grad=True) for _ in range(3)]
        ids = torch.randint(60, (n,), device=b.device)
        if b.device.type == 'cuda': torch.cuda.reset_peak_memory_stats()
        out = timed(b, lambda: loss.dcl(zs, ids, None, r.temp)[0].backward())
        return out | (dict(allocated=torch.cuda.max_memory_allocated()) if b.device.type == 'cuda' else {})
    for n in b.sizes((200, 1024, 4096, 16384), (16, 64)): measure(found, f'contrast B={n}', partial(contrast, n))
    shape = b.sizes((60, 8, 256, 256), (3, 8, 32, 32))
    x = torch.randn(shape, device=b.device, requires_grad=True)
    mask = torch.randint(8, (shape[0], *shape[2:]), device=b.device)
    def segmentation(): sum(w*v for w,v in loss.segmentation(x, mask).values()).backward()
    measure(found, 'generalized Dice and focal', lambda: timed(b, segmentation))
    measure(found, 'cross-entropy', lambda: timed(b, lambda: F.cross_entropy(x, mask).backward()))
    net = CWCLNet(r).to(b.device).eval()
    n = b.sizes(64, 2)
    x = torch.rand(n, 3, r.height, r.width, device=b.device)
    @torch.no_grad()
    def windows(batch):
        with arithmetic(r): sliding_window(net.segment, x, r.window, r.overlap, batch=batch)
    def window_time(k): return timed(b, partial(windows, k))
    for k in b.sizes((8, 64), (8,)): measure(found, f'{n} frames, {k} windows a pass', partial(window_time, k))
    simclr = b.recipe(method='simclr', stage='pretrain')
    frames = x[:b.sizes(20, 2)]
    empty = torch.zeros(0, r.height, r.width, device=b.device)
    views = batch_views(simclr, 0)
    measure(found, f'strong views of {len(frames)} frames', lambda: timed(b, lambda: views.encodes((frames, empty))))
    ids = (x[:4]*8).long()[:,0].clamp(max=7)
    measure(found, 'surface Dice of 4 frames', lambda: timed(b, lambda: surface_dice(ids, ids.flip(0), 8), 3))

KERNELS = dict(norm=('batch_norm', 'bn_'), convolution=('conv', 'gemm', 'cudnn', 'xmma', 'cutlass'), pooling=('pool',),
    copy=('memcpy', 'copy', 'memset'), optimizer=('multi_tensor', 'foreach', 'adam'))

def kind_of(name):
    name = name.lower()
    return next((k for k,words in KERNELS.items() if any(o in name for o in words)), 'other')

@part(40)
def profile(b, found):
    "Three steps of the Learner: share of each kind of kernel, the longest ones, and how long the GPU waited"
    kinds = [ProfilerActivity.CPU] + ([ProfilerActivity.CUDA] if b.device.type == 'cuda' else [])
    with step_of(learner(b, precision='bf16', channels_last=True)) as step:
        step()
        start = time.perf_counter()
        with profiler(activities=kinds) as p:
            for _ in range(b.sizes(3, 1)): step()
            if b.device.type == 'cuda': torch.cuda.synchronize()
        wall = time.perf_counter() - start
    own = 'self_device_time_total' if b.device.type == 'cuda' else 'self_cpu_time_total'
    seen = p.key_averages()
    if b.device.type == 'cuda': # An operator of the CPU counts its kernels once more
        seen = [o for o in seen if o.device_type == DeviceType.CUDA and not getattr(o, 'is_user_annotation', False)]
    rows = [(o.key, getattr(o, own)/1e6, o.count) for o in seen]
    total = sum(s for _,s,_ in rows) or 1
    shares = {}
    for k,s,_ in rows: shares[kind_of(k)] = shares.get(kind_of(k), 0) + s/total
    longest = sorted(rows, key=lambda o: -o[1])[:20]
    found.update(wall=wall, busy=total, calls=sum(n for *_,n in rows), shares=shares,
        longest=[[k[:80], round(s, 5), n] for k,s,n in longest])

@part(120)
def training(b, found):
    "A training of the paper's preset, in batches of 48, on drawn scenes, with validation, checkpoints and the test"
    r = b.recipe(budget=.5, lr=.001, precision='bf16', channels_last=True, valid_step=4, **b.sizes(SHARE, {}))
    m = train_run(r, scenes(b), out=b.folder/'run', device=b.device, steps=b.sizes(60, 26))
    log = m['log']
    found.update({k: m[k] for k in ('steps', 'step_seconds', 'train_seconds', 'seconds')})
    found.update(loss=[log[0]['train_loss'], log[-1]['train_loss']], iou=m['test']['mean_iou'])
