"""The demo and the same written plainly, three seeds each: seconds that the process had a core, and test IoU.

`ranks` is the demo shared by two processes, as `torchrun` starts them; its seconds are those of the clock."""
import json, subprocess, sys, numpy as np
from dataclasses import replace
from bench_clock import clock
from bench_lines import DEMO, root, scenes # Finds `peers` too
from cwcl.train import train_run
from cwcl.whole import atomic_path

SEEDS = 0, 1, 2

def ours(r): return train_run(r, scenes(), out=root/'runs'/f'bench-{r.seed}', overwrite=True)['test']['mean_iou']

def plain(r):
    from peers.plain import run
    return run(scenes(), r)[0]

def ranks(r):
    out = root/'runs'/f'bench-ranks-{r.seed}'
    subprocess.run([sys.executable, '-m', 'torch.distributed.run', '--standalone', '--nproc_per_node', '2', '-m',
        'cwcl.train', '--data', scenes(), '--preset', 'demo', '--seed', str(r.seed), '--out', out, '--overwrite'],
        check=True)
    return json.loads((out/'metrics.json').read_text())['test']['mean_iou']

KINDS = dict(ours=ours, plain=plain, ranks=ranks)

def place(kind, folder): return folder/f'demo-{kind}.json'

def measure_demo(kind, folder, machine, tell=print):
    "Train with each seed, and write down what was found as it comes"
    scenes()
    runs = []
    for seed in SEEDS:
        scores = []
        seconds = clock(lambda: scores.append(KINDS[kind](replace(DEMO, seed=seed))), wall=kind == 'ranks')
        runs.append(dict(seed=seed, seconds=round(seconds, 1), mean_iou=scores[0]))
        tell(runs[-1])
        with atomic_path(place(kind, folder)) as p: p.write_text(json.dumps(dict(machine=machine, runs=runs), indent=1))

def demo_row(folder, limit=1.5):
    "The row of the table, from what was measured; or why there is none"
    compared = 'ours','plain'
    lacking = [k for k in compared if not place(k, folder).exists()]
    if lacking: return dict(skipped=f'python tools/bench.py --demo {lacking[0]} measures it in half an hour')
    found = {k: json.loads(place(k, folder).read_text()) for k in KINDS if place(k, folder).exists()}
    def values(kind, k): return [o[k] for o in found[kind]['runs']]
    a,b = (float(np.mean(values(k, 'seconds'))) for k in compared)
    def score(v): return f'{np.mean(v):.3f} ± {np.std(v, ddof=1):.3f}'
    names = dict(ours='ours', plain='plain', ranks='ours on two processes')
    scores = ', '.join(f'{names[k]} {score(values(k, "mean_iou"))}' for k in found)
    when = ' and '.join(dict.fromkeys(o['machine']['date'] for o in found.values()))
    return dict(what='whole demo', size=f'{DEMO.epochs} epochs, {len(SEEDS)} seeds', ours=a, peer=b, ratio=b/a,
        against='the same written plainly with MONAI', limit=limit, share=limit*a/b, at_most=False, ours_bytes=None,
        peer_bytes=None, repetitions=len(SEEDS), note=f'test IoU {scores}; measured on {when} by --demo')
