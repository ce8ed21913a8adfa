"Does what a study does for days, small and many times, and prints how memory, open files and times grow."
import argparse, gc, json, os, psutil, subprocess, sys, tempfile, threading, time, numpy as np, torch
from dataclasses import replace
from itertools import islice
from pathlib import Path
from scipy import stats

root = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(root), str(root/'tools')]

from fastai.callback.core import Callback, CancelFitException # chkstyle: ignore
from bench_lines import loaders, scenes # chkstyle: ignore
from cwcl.core import recipe # chkstyle: ignore
from cwcl.data.cholec import frame_table, presence # chkstyle: ignore
from cwcl.data.labels import class_set # chkstyle: ignore
from cwcl.data.order import label_groups, two_streams # chkstyle: ignore
from cwcl.data.splits import split_frames # chkstyle: ignore
from cwcl.film import video_writer # chkstyle: ignore
from cwcl.multitask import cwcl_learner # chkstyle: ignore
from cwcl.pairs import label_set_ids, pair_stats # chkstyle: ignore
from cwcl.study.grid import Run, publish, run_all # chkstyle: ignore
from cwcl.study.records import read_results # chkstyle: ignore
from cwcl.study.tables import summary # chkstyle: ignore
from cwcl.tasks import CWCLNet # chkstyle: ignore
from cwcl.video import segment_video # chkstyle: ignore
from cwcl.whole import sealed # chkstyle: ignore

TINY = recipe('smoke', widths=(4, 4, 8, 8), scales=1, crop=32, threads=1)

def held():
    "Return the bytes and the open files of this process alone"
    me = psutil.Process()
    return me.memory_full_info().uss, me.num_fds()

def slope(points, blocks=16):
    "Fit a line to means of blocks, as neighbors are alike: (growth for each x, half of its 95 % interval)"
    x,y = (np.array([o.mean() for o in np.array_split(v, blocks)]) for v in np.array(points, float).T)
    fit = stats.linregress(x, y)
    return fit.slope, stats.t.ppf(.975, blocks - 2)*fit.stderr if np.ptp(y) else 0.

def flat(points, what, skip=.2):
    "Say how fast bytes and files grow once everything has been warmed up"
    points = points[int(skip*len(points)):]
    out = {}
    for i,name in enumerate(('bytes', 'files'), 1):
        b,half = slope([(p[0], p[i]) for p in points])
        ends = dict(first=int(points[0][i]), last=int(points[-1][i]))
        out[name] = dict(slope=float(f'{b:.3g}'), half=float(f'{half:.3g}'), **ends)
    print(f'{what}: {out}', flush=True)
    return dict(n=points[-1][0], **out)

class Sampled(Callback):
    "Note what is held every hundred steps, and stop after so many"
    order = 90
    def __init__(self, steps): self.most,self.points = steps,[]
    def after_batch(self):
        if not self.training or (self.train_iter % 100): return
        self.points.append((self.train_iter, *held()))
        if self.train_iter >= self.most: raise CancelFitException

def steps(n):
    "A training of n steps with contrast and a validation every epoch"
    sampled = Sampled(n)
    learn = cwcl_learner(loaders(TINY, 2), 'dcl+cls', TINY, cbs=sampled)
    with learn.no_bar(), learn.no_logging(): learn.fit_recipe(epochs=10**6)
    return flat(sampled.points, f'{n} steps')

def film(path, frames, size=(36, 64)):
    "Write a film of noise that moves"
    noise = np.random.default_rng(0).integers(0, 255, (*size, 3), dtype=np.uint8)
    with video_writer(path, 25) as add:
        for i in range(frames): add(np.roll(noise, i % size[1], 1))

def video(n):
    "A prediction of n frames: masks, and a film with colors"
    net = CWCLNet(replace(TINY, height=36, width=64, window=64)).eval()
    points,done = [],threading.Event()
    with tempfile.TemporaryDirectory() as tmp:
        tmp = Path(tmp)
        film(tmp/'long.mp4', n)
        def watch():
            while not done.wait(.5): points.append((sum(1 for _ in os.scandir(tmp/'out')), *held()))
        (tmp/'out').mkdir()
        thread = threading.Thread(target=watch)
        thread.start()
        try: segment_video(net, tmp/'long.mp4', tmp/'out', progress=False, batch=16)
        finally: done.set()
        thread.join()
    return flat(points, f'{n} frames of a film')

def exponent(times):
    "Fit how a time grows: the power of n"
    return float(f'{stats.linregress(*np.log(np.array(times)).T).slope:.2f}')

def growing(f, sizes, what):
    "Time something at several sizes; the least of three"
    found = []
    for n in sizes:
        call = f(n)
        def once():
            start = time.perf_counter()
            call()
            return time.perf_counter() - start
        found.append((n, min(once() for _ in range(3))))
        gc.collect()
    print(f'{what}: {[(n, round(t, 3)) for n,t in found]}, exponent {exponent(found)}', flush=True)
    return dict(points=[[n, float(f'{t:.3g}')] for n,t in found], exponent=exponent(found))

def grid_runs(n): return [Run('table1', replace(TINY, seed=i)) for i in range(n)]

def grid(n):
    "Listing, resuming and tabling of up to n finished runs: one is done, the others are copies with another seed"
    sizes = [n//8, n//4, n//2, n]
    with tempfile.TemporaryDirectory() as tmp:
        tmp = Path(tmp)
        run_all(grid_runs(1), tmp/'one', scenes())
        file, = publish(grid_runs(1), tmp/'one', tmp)
        done = {k: v for k,v in json.loads(file.read_text()).items() if k != 'digest'}
        for size in sizes:
            (tmp/f'{size}').mkdir()
            for o in grid_runs(size):
                found = sealed({**done, 'key': o.key, 'recipe': {**done['recipe'], 'seed': o.recipe.seed}})
                (tmp/f'{size}'/f'{o.key}.json').write_text(json.dumps(found))
        def all_of(size): return run_all(grid_runs(size), tmp/f'{size}', scenes())
        assert len(read_results(tmp/f'{n}')) == len(all_of(n)) == n
        table = {k: read_results(tmp/f'{k}') for k in sizes}
        return dict(listing=growing(lambda k: lambda: read_results(tmp/f'{k}'), sizes, 'listing of runs'),
            resuming=growing(lambda k: lambda: all_of(k), sizes, 'resuming of runs'),
            tabling=growing(lambda k: lambda: summary(grid_runs(k), table[k]), sizes, 'tabling of runs'))

def many_rows(n):
    "The table of the drawn scenes, as if each of its frames came many times"
    t = frame_table(scenes())
    times = -(-n//len(t))
    t = t.loc[t.index.repeat(times)].reset_index(drop=True)
    return t.assign(frame=np.arange(len(t)), image=t.image + t.index.astype(str)).iloc[:n]

def rows(n):
    "Split, group, count and deal out up to n frames"
    r = recipe('paper', method='dcl+cls')
    sizes = [n//64, n//16, n//4, n]
    tables = {k: many_rows(k) for k in sizes}
    split = {k: split_frames(t, r) for k,t in tables.items()}
    seen = {k: torch.tensor(presence(t, class_set(8))) for k,t in tables.items()}
    def first_batches(k):
        labelled = np.flatnonzero(split[k].labelled)
        return lambda: list(islice(two_streams(labelled, np.zeros(k), 60, 200), k//200))
    return dict(splitting=growing(lambda k: lambda: split_frames(tables[k], r), sizes, 'splitting of rows'),
        grouping=growing(lambda k: lambda: label_groups(seen[k]), sizes, 'grouping of rows'),
        pairs=growing(lambda k: lambda: pair_stats(label_set_ids(seen[k])), sizes, 'pairs of rows'),
        epoch=growing(first_batches, sizes, 'an epoch of rows'))

PARTS = dict(steps=(steps, 20_000), video=(video, 100_000), grid=(grid, 2_000), rows=(rows, 1_000_000))

def main():
    p = argparse.ArgumentParser(description=__doc__)
    p.add_argument('parts', nargs='*', help=f'of {", ".join(PARTS)}; all if none is named')
    p.add_argument('--n', type=int, help='how often; thousands if not given')
    p.add_argument('--out', type=Path, help='JSON file that what was found goes into, beside what it holds')
    args = p.parse_args()
    strange = set(args.parts) - set(PARTS)
    if strange: p.error(f'{min(strange)}: choose of {", ".join(PARTS)}')
    if len(args.parts) != 1: # Each in a process of its own, whose memory no other part has stretched
        more = [f'--{k}={v}' for k,v in vars(args).items() if k != 'parts' and v is not None]
        for o in args.parts or PARTS: subprocess.run([sys.executable, __file__, o, *more], check=True)
        return
    torch.set_num_threads(1)
    name, = args.parts
    f,n = PARTS[name]
    found = f(args.n or n)
    if not args.out: return
    known = json.loads(args.out.read_text()) if args.out.exists() else {}
    args.out.write_text(json.dumps({**known, name: found}, indent=1) + '\n')

if __name__ == '__main__': main()
