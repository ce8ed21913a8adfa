"Times each part on this machine; run by `make bench`."
import tempfile, time
import numpy as np, pandas as pd, torch
from pathlib import Path
from cwcl.core import default_device, recipe, set_seed
from cwcl.data.cholec import frame_table
from cwcl.data.splits import split_frames
from cwcl.data.streams import cwcl_dls
from cwcl.data.synth import render_scene, write_scenes
from cwcl.multitask import cwcl_learner
from dataclasses import replace

def measure(f, n=5):
    "Return the median seconds of n calls after one that warms up"
    f()
    took = []
    for _ in range(n):
        start = time.perf_counter()
        f()
        if torch.cuda.is_available(): torch.cuda.synchronize()
        took.append(time.perf_counter() - start)
    return np.median(took)

def step(learn, batch):
    "Make a training step outside the loop of the Learner"
    x,mask,*labels = batch
    learn.model.train()
    learn.model.n_labelled = len(mask)
    device = x.device.type
    half = learn.model.recipe.precision == 'bf16'
    def run():
        with torch.autocast(device, torch.bfloat16, enabled=half): loss = learn.loss_func(learn.model(x), mask, *labels)
        loss.backward()
        learn.opt.step()
        learn.opt.zero_grad()
    return run

def rows(data):
    "Yield name and seconds of each part, at the demo's sizes"
    r = recipe('demo')
    device = default_device()
    set_seed(r.seed, r.threads)
    table = split_frames(frame_table(data), r)
    dls = cwcl_dls(table, r, device=device)
    yield 'draw a scene of 427×240', measure(lambda: render_scene('video01', 'video01_00080', 80))
    yield f'load and augment a batch of {r.batch}', measure(dls.train.one_batch)
    batch = dls.train.one_batch()
    changes = {'fp32': {}, 'bf16': dict(precision='bf16'), 'channels_last': dict(channels_last=True),
        'bf16, channels_last': dict(precision='bf16', channels_last=True), 'random, fp32': dict(method='random')}
    for name,change in changes.items():
        o = replace(r, **change)
        learn = cwcl_learner(dls, o.method, o)
        if o.channels_last: learn.model.to(memory_format=torch.channels_last)
        learn.create_opt()
        yield f'a step, {name}', measure(step(learn, batch))
    x,_ = dls.valid.one_batch()
    net = learn.model.eval()
    with torch.no_grad(): yield f'segment a frame of {r.width}×{r.height}', measure(lambda: net(x[:4]))/4

if __name__ == '__main__':
    with tempfile.TemporaryDirectory() as tmp:
        data = write_scenes(Path(tmp)/'scenes', frames_per_clip=2, progress=False)
        table = pd.DataFrame(rows(data), columns=['part', 'seconds'])
    print(f'{torch.get_num_threads()} threads, {default_device()}, torch {torch.__version__}')
    print(table.assign(milliseconds=(table.seconds*1000).round(1)).drop(columns='seconds').to_string(index=False))
