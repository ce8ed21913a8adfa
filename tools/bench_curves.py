"Series for lesson 32b: how time and memory grow with the batch, the masks, the frames and their size"
import numpy as np
from dataclasses import replace
from bench_clock import clock, in_turns
from bench_lines import backward, contrast_calls, in_evaluation, loaders, randn, step_call
from cwcl.core import default_device, recipe
from cwcl.infer import sliding_window
from cwcl.memory import one_step, step_bytes
from cwcl.multitask import cwcl_learner
from cwcl.tasks import CWCLNet

DEMO = recipe('demo')

def seconds(f): return float(np.median(in_turns([f], 3.)))

def contrast_time():
    for b in (64, 128, 256, 512, 1024, 2048, 4096): yield b,seconds(backward(*contrast_calls(b)[:2]))

def step_time(**changes):
    _,forward,_ = one_step(replace(DEMO, **changes), default_device())
    return seconds(lambda: forward().backward())

def step_time_batch():
    for b in (6, 12, 24, 48, 96): yield b,step_time(batch=b, labelled=6)

def step_time_masks():
    for n in (3, 6, 12, 24, 48): yield n,step_time(batch=48, labelled=n)

def paper_memory(b, chunks): return b,step_bytes(recipe('paper', batch=b, labelled=3*b//10, chunks=chunks))
def step_memory(): return (paper_memory(b, 1) for b in (25, 50, 100, 200, 400, 800))
def cached_memory(): return (paper_memory(b, b//25) for b in (50, 100, 200, 400, 800))

def epoch_time():
    for per_clip in (1, 2, 4, 8):
        learn = cwcl_learner(loaders(DEMO, per_clip), DEMO.method, DEMO)
        dl = learn.dls.train
        with learn.no_bar(), learn.no_logging():
            step_call(learn, dl.one_batch())()
            def epoch():
                for i,b in enumerate(dl): learn.one_batch(i, b)
            yield len(dl.dataset),clock(epoch)

def window_time():
    net = CWCLNet(recipe('paper', widths=DEMO.widths)).to(default_device()).eval()
    for n in range(1, 6):
        side = 64 + 192*n
        x = randn(1, 3, side, side)
        yield side*side,seconds(in_evaluation(lambda: sliding_window(net.segment, x, 256, .25)))

SERIES = { # Name to (how it is measured, what grows, what is measured, what stays)
    'contrast': (contrast_time, 'frames of a batch, B', 'seconds', 'L = 3, D = 128, forward and backward'),
    'step, batch': (step_time_batch, 'frames of a batch, B', 'seconds', 'N = 6, demo widths, forward and backward'),
    'step, masks': (step_time_masks, 'masks of a batch, N', 'seconds', 'B = 48, demo widths, forward and backward'),
    'step, memory': (step_memory, 'frames of a batch, B', 'bytes', 'N = 0.3 B, paper, counted on pretended tensors'),
    'chunks, memory': (cached_memory, 'frames of a batch, B', 'bytes', 'the same in chunks of 25 frames'),
    'epoch': (epoch_time, 'frames to train on', 'seconds', 'demo, in the Learner'),
    'window': (window_time, 'pixels of a frame', 'seconds', 'windows of 256 pixels, demo widths')}

def curves(tell=print):
    "Measure all series; each is a list of (x, y)"
    out = {}
    for name,(f,x,y,fixed) in SERIES.items():
        out[name] = dict(x=x, y=y, fixed=fixed, points=[[int(a), float(f'{b:.4g}')] for a,b in f()])
        tell(f'{name}: {out[name]["points"]}')
    return out
