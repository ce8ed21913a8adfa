"The lines of `make bench`: what training and evaluation really use, beside its peer, and how much faster it should be"
import contextlib, copy, functools, sys, numpy as np, psutil, torch, torch.nn.functional as F
from dataclasses import replace
from functools import partial
from pathlib import Path
from torchvision.transforms import v2
from fastai.optimizer import Adam
from bench_clock import Case, clock, in_turns, line, peak_bytes
from cwcl.core import default_device, recipe, set_seed
from cwcl.data.cholec import frame_table
from cwcl.data.splits import split_frames
from cwcl.data.streams import batch_views, cwcl_dls
from cwcl.data.synth import write_scenes
from cwcl import infer
from cwcl.infer import sliding_window
from cwcl.metrics import class_iou, confusion_matrix, surface_dice
from cwcl.multitask import cwcl_learner
from cwcl.tasks import CWCLLoss, CWCLNet

root = Path(__file__).parents[1]
sys.path.append(str(root/'tests')) # For `peers`
DEMO = recipe('demo')
WHOLE = recipe('paper', widths=DEMO.widths, batch=24, labelled=8, budget=.1) # Frames of 427×240, crops of 256

def randn(*shape): return torch.randn(*shape, device=default_device())
def spread(a, b): return f'largest difference {(a - b).abs().max().item():.1g}'

@functools.cache
def scenes(): return write_scenes(root/'runs'/'scenes', progress=False)

def frames(r, per_clip=8):
    "The embedded data set's table, with as many frames of each clip"
    t = frame_table(scenes())
    return split_frames(t[t.groupby('clip').cumcount() < per_clip].reset_index(drop=True), r)

def loaders(r, per_clip=8):
    set_seed(r.seed, 1)
    return cwcl_dls(frames(r, per_clip), r)

def backward(leaves, loss):
    "A call of a forward and a backward pass"
    def run():
        for o in leaves: o.grad = None
        loss().backward()
    return run

def contrast_calls(b):
    "Ours, as training calls it, and three calls of a peer"
    r = recipe('paper')
    zs = [randn(b, r.dim).requires_grad_() for _ in range(r.scales)]
    sets = torch.randint(60, (b,), device=default_device())
    loss = CWCLLoss(r)
    def ours(): return loss.dcl(zs, sets, None, r.temp, r.reduction)[0]
    def peer():
        from pytorch_metric_learning.losses import SupConLoss
        each = SupConLoss(r.temp)
        return sum(each(z, sets) for z in zs)
    return zs,ours,peer

@line('contrast', 'pytorch_metric_learning')
def contrast():
    for b,least in ((200, 3.), (1024, 3.), (4096, 5.)):
        zs,*losses = contrast_calls(b)
        ours,peer = (backward(zs, o) for o in losses)
        note = partial(lambda a, b: spread(a(), b()), *losses)
        yield Case('contrast, L = 3, D = 128, forward and backward', f'B = {b}', ours,
            'pytorch-metric-learning, three calls', peer, least, note=note if b < 4096 else '')

@line('contrast_large')
def contrast_large():
    "Memory alone; counted at a quarter of the batch first, so that nothing is begun that does not fit"
    what = dict(what='contrast, L = 3, D = 128, forward and backward', size='B = 16384')
    limit = 3e8
    small,big = (backward(*contrast_calls(b)[:2]) for b in (4096, 16384))
    square = 16*peak_bytes(small)
    if square > psutil.virtual_memory().available/2:
        yield what | dict(skipped=f'about {square/1e9:.0f} GB, by what B = 4096 takes, and the limit is {limit/1e9} GB')
        return
    found = {}
    def run(): found['bytes'] = peak_bytes(big)
    seconds = clock(run)
    yield what | dict(ours=seconds, ours_bytes=found['bytes'], limit_bytes=limit, share=found['bytes']/limit)

@line('segmentation', 'monai')
def segmentation():
    from monai.losses import GeneralizedDiceFocalLoss
    x = randn(8, 8, 256, 256).requires_grad_()
    mask = torch.randint(8, (8, 256, 256), device=x.device)
    loss = CWCLLoss(recipe('paper'))
    monai = GeneralizedDiceFocalLoss(to_onehot_y=True, softmax=True)
    ours = backward([x], lambda: sum(w*v for w,v in loss.segmentation(x, mask).values()))
    what = 'generalized Dice and focal loss, forward and backward','8×8×256×256'
    yield Case(*what, ours, 'MONAI GeneralizedDiceFocalLoss', backward([x], lambda: monai(x, mask[:,None])), 4.5)
    yield Case(*what, ours, 'cross-entropy', backward([x], lambda: F.cross_entropy(x, mask)), 2.4, True, 1.2)

def in_evaluation(call): # A call without gradients
    def run():
        with torch.no_grad(): return call()
    return run

@line('window', 'monai')
def window():
    from monai.inferers import sliding_window_inference
    r = WHOLE
    set_seed(0, 1)
    net = CWCLNet(r).to(default_device()).eval()
    x = randn(4, 3, r.height, r.width)
    peer = in_evaluation(lambda: sliding_window_inference(x, (r.window,)*2, 2, net.segment, r.overlap,
        padding_mode='reflect'))
    ours = in_evaluation(lambda: sliding_window(net.segment, x, r.window, r.overlap))
    where = f'4 frames of {r.width}×{r.height}'
    def same(): return spread(ours(), peer())
    yield Case('sliding window, same network', where, ours, 'MONAI sliding_window_inference', peer, 1.1, note=same,
        why='Both do the same convolutions, poolings and batch norms on as many windows at a time. What differs is to '
        'cut windows out and to blend them, and that is a few hundredths of the time.')
    whole = in_evaluation(lambda: net.segment(x))
    yield Case('sliding window, same network', where, ours, 'the whole frame', whole, 1.27, at_most=True,
        why='Two windows of 256×256 share a third of their pixels, and see 1.28 times those of the frame.')
    best = infer.folded(net)
    evaluated = in_evaluation(lambda: best(x))
    other = in_evaluation(lambda: sliding_window_inference(x, (r.window,)*2, 2, best.segment, r.overlap,
        padding_mode='reflect'))
    def same():
        a,b = 1000*np.median(in_turns([evaluated, other], 3), axis=1)
        return f'{spread(evaluated(), peer())}; MONAI gains as much: ours {a:.0f}, MONAI folded {b:.0f} ms'
    yield Case('sliding window, as cwcl_predict', where, evaluated, 'MONAI, the network as it is', peer, 1.6, note=same,
        why='Folding saves the batch norms, and maps with channels last their pooling; the convolutions remain, and '
        'are what is left.')

@line('iou', 'torchmetrics')
def iou():
    from torchmetrics.functional.classification import multiclass_jaccard_index
    pred,mask = masks(16)
    def ours(): return class_iou(confusion_matrix(pred, mask, 8))
    def peer(): return multiclass_jaccard_index(pred, mask, 8, average=None, ignore_index=255)
    yield Case('class-wise IoU', '16 frames of 427×240', ours, 'torchmetrics multiclass_jaccard_index', peer, 8.,
        note=lambda: spread(ours(), peer()))

def masks(n):
    "A prediction and a truth of so many frames, with blobs as of organs and some ignored pixels"
    def blobs(seed):
        rough = torch.randn(n, 8, 8, 14, generator=torch.Generator().manual_seed(seed))
        return F.interpolate(rough, (240, 427), mode='bicubic').argmax(1)
    truth = blobs(0)
    pred = truth.where(blobs(1) > 1, blobs(2))
    truth[:,:20] = 255
    return pred.to(default_device()),truth.to(default_device())

@line('surface')
def surface():
    from peers.earlier import surface_dice as earlier
    pred,mask = (o.cpu() for o in masks(1))
    def ours(): return surface_dice(pred, mask, 8)
    def peer(): return earlier(pred, mask, 8)
    yield Case('surface Dice', 'a frame of 427×240', ours, 'its earlier form', peer, 5.,
        note=lambda: spread(ours().nan_to_num(-1), peer().nan_to_num(-1)), python=True,
        why="Most of it is SciPy's compiled code: trees of edge pixels, built and asked, and the nearest class of an "
        'ignored pixel. The rest is a thousand small calls. What is left is to ask fewer pixels.')

def whole_pass(loader): # A call that makes every batch of an epoch
    def run():
        for _ in loader: pass
    return run

@line('store', 'monai')
def store():
    from peers.plain import training_loader
    r = WHOLE
    dls = loaders(r, 2)
    peer,*_ = training_loader(frames(r, 2), r)
    n = f'{dls.train.steps} batches of {r.batch} frames of {r.width}×{r.height}'
    yield Case('store to augmented batch', n, whole_pass(dls.train), 'MONAI CacheDataset and DataLoader',
        whole_pass(peer), 5., seconds=15, why='Sampling the crops and blurring them are two thirds, a few compiled '
        'calls for a batch; most of the rest copies memory: whole frames are gathered, then cropped. What is left '
        'is to gather what a crop will show.')

@line('views')
def views():
    r = recipe('paper', method='simclr', stage='pretrain')
    x = torch.rand(24, 3, r.height, r.width, device=default_device())
    ours = batch_views(r, 0)
    labels = torch.zeros(24, 8),torch.zeros(24, 3, dtype=torch.long)
    empty = torch.zeros(0, r.height, r.width, device=x.device)
    one = v2.Compose([v2.RandomResizedCrop(r.crop, scale=(.2, 1)), v2.RandomHorizontalFlip(),
        v2.RandomApply([v2.ColorJitter(.4, .4, .4, .1)], p=.8), v2.RandomGrayscale(.2),
        v2.RandomApply([v2.GaussianBlur(25, (.1, 2.))], p=.5)])
    def run(): return ours.encodes((x, empty, *labels))
    def peer(): return [torch.stack([one(o) for o in x]) for _ in range(2)]
    what = 'two strong views of a frame', f'24 frames to {r.crop}×{r.crop}'
    yield Case(*what, run, 'torchvision v2, frame by frame', peer, 10., why='Both sides compute the same; ours '
        'does it for all frames at once, which saves kernels on a GPU and little on a CPU. Half of it are colors, in '
        'seven places of which a frame uses four, so that all frames can go the same way. What is left on a CPU is to '
        'skip the places that a frame does not use.')

def step_call(learn, batch):
    "A step of a Learner, with its callbacks"
    learn.create_opt()
    learn.epoch,learn.n_epoch = 0,1
    learn.dl = learn.dls.train
    learn.n_iter = len(learn.dl)
    for o in ('before_fit', 'before_epoch', 'before_train'): learn(o)
    return lambda: learn.one_batch(0, batch)

def bare_convolutions(net, forward):
    "A call of every convolution of a forward pass, forward and backward on random maps of the same layout"
    seen = []
    def note(o, args, out): seen.append((o, args[0].detach(), out.detach()))
    kinds = torch.nn.Conv2d,torch.nn.ConvTranspose2d
    handles = [o.register_forward_hook(note) for o in net.modules() if isinstance(o, kinds)]
    forward()
    for o in handles: o.remove()
    work = []
    for o,x,y in seen:
        own = copy.deepcopy(o)
        work.append((own, torch.randn_like(x).requires_grad_(x.shape[1] > 3), torch.randn_like(y)))
    def run():
        for o,x,g in work:
            for p in (x, *o.parameters()): p.grad = None
            o(x).backward(g)
    return run

@line('step')
def step():
    r = recipe('demo', batch=24, labelled=8)
    learn = cwcl_learner(loaders(r, 2), r.method, r)
    batch = learn.dls.train.one_batch()
    with learn.no_bar(), learn.no_logging():
        ours = step_call(learn, batch)
        net = copy.deepcopy(learn.model)
        net.n_labelled = r.labelled
        x = torch.as_tensor(batch[0]).as_subclass(torch.Tensor)
        bare = bare_convolutions(net, lambda: net(x))
        what = 'training step, demo widths', 'B = 24, N = 8'
        yield Case(*what, ours, 'its bare convolutions, forward and backward', bare, 1.1, at_most=True,
            why='About two thirds are the convolutions themselves. Batch norm and ReLU read and write every map again, '
            'forward and backward, and take more than the tenth that the limit allows for everything; only kernels '
            'that join them with the convolution would help. Pooling, losses and optimizer share the rest.')

@line('switches')
def switches():
    "A step with a switch beside one without it: what pays on this device"
    for k,v in dict(channels_last=True, precision='bf16', compile=True).items():
        plain = recipe('demo', batch=24, labelled=8, channels_last=k == 'compile')
        learns = [cwcl_learner(loaders(o, 2), o.method, o) for o in (replace(plain, **{k: v}), plain)]
        with contextlib.ExitStack() as held:
            for o in learns: [held.enter_context(f()) for f in (o.no_bar, o.no_logging)]
            calls = [step_call(o, o.dls.train.one_batch()) for o in learns]
            yield Case('training step, demo widths', f'{k}={v}', calls[0], 'the step without it', calls[1], 1.,
                why='It does not pay here, and the presets leave it off on such a device.')

@line('optimizer')
def optimizer():
    "At thin widths the cost of the calls alone; at the demo's also that of the memory that is moved"
    yield optimizer_case(replace(DEMO, widths=recipe('smoke').widths), 'thin')
    yield optimizer_case(DEMO, 'demo widths')

def optimizer_case(r, widths):
    learns = [cwcl_learner(loaders(r, 1), r.method, r) for _ in range(2)]
    learns[1].opt_func = partial(Adam, mom=.9, sqr_mom=.999, eps=1e-8)
    learns[1].model.load_state_dict(learns[0].model.state_dict())
    for o in learns: o.create_opt()
    weights = [[p for p in o.model.parameters()] for o in learns]
    for a,b in zip(*weights):
        a.grad = torch.randn_like(a)
        b.grad = a.grad.clone()
    def same(): return 'equal to the bit' if all(map(torch.equal, *weights)) else 'DIFFERENT'
    ours,peer = (o.opt.step for o in learns)
    return Case('optimizer', f'{len(weights[0])} tensors, {widths}', ours, 'fastai Adam', peer, 2., note=same,
        why="On a CPU PyTorch's `_foreach_` functions take one tensor after another, and make a tensor of every number "
        'first. Its fused Adam does not, but rounds in another order.')

@line('order')
def order():
    "Late epochs beside early ones, each looked at once, as training does"
    late = loaders(recipe('demo', sampler='pk')).train
    early = late.new()
    late.epoch = 198
    late.get_idxs()
    def turn(dl):
        def run():
            dl.epoch += 1
            dl.get_idxs()
        return run
    early.epoch = -1
    what = 'order of an epoch, sampler pk', 'from epoch 199'
    # Both are the same work; a fifth is what times of two milliseconds wander by
    yield Case(*what, turn(late), 'from epoch 0', turn(early), 1.2, at_most=True, seconds=1)
