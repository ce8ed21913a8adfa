"What Tables 1 and 2 of the paper take on cards of 24, 40 and 80 GB, by steps that `tools/gpu.py` measured"
import functools, pandas as pd
from cwcl.core import recipe
from cwcl.cost import run_seconds, step_flops
from cwcl.study.grid import TABLE_METHODS, grid
from cwcl.study.jobs import kinds
from cwcl.study.tables import frame_markdown

CARDS = 24, 40, 80 # GB
FRAMES = (5200, 1440) # Training and validation frames of CholecSeg8k in a fold, about
TEST = 1440 # Frames of its two test videos

work = functools.cache(step_flops)

def fastest(found, method, gigabytes):
    "Milliseconds and name of the fastest step of a method that fits a card, or `None`"
    room = gigabytes*1e9*.95
    def fits(k, v): return k.startswith(method + ' ') and ',' not in k and v.get('reserved', room+1) <= room
    steps = {k: v['ms'] for k,v in found.items() if isinstance(v, dict) and fits(k, v)}
    return min(((ms, k) for k,ms in steps.items()), default=None)

def step_on(found, r, gigabytes):
    "Seconds of a step of any recipe, by its work beside that of the nearest method that was measured; and its name"
    near = r.method if r.method in ('random', 'simclr') else 'simclr' if r.method == 'byol' else 'dcl+cls'
    step = fastest(found, near, gigabytes)
    if step is None: return
    ms,name = step
    return ms/1000*work(r)/work(recipe('paper', method=near)),name

def cost_table(found): # What `tools/gpu.py` wrote -> Markdown
    "Hours of both tables on each card, one run after another"
    speed,pieces = found.get('speed', {}),found.get('pieces', {})
    frames = [v['ms']/int(k.split()[0]) for k,v in pieces.items() if 'windows a pass' in k and 'ms' in v]
    rows = [cost_row(speed, gb, min(frames, default=0)/1000) for gb in CARDS]
    name = found['machine'].get('name', found['machine']['device'])
    return f'Hours on {name}, with the memory of each card:\n\n' + frame_markdown(pd.DataFrame(rows))

def cost_row(speed, gigabytes, frame):
    "One card: hours of each table, and the precisions that fit"
    row = dict(card=f'{gigabytes} GB')
    used = set()
    for table in TABLE_METHODS:
        hours = 0.
        for run in grid(table, recipe('paper')):
            for r in kinds([run]):
                step = step_on(speed, r, gigabytes)
                hours += float('nan') if step is None else run_seconds(r, FRAMES, TEST, step[0], frame)/3600
                if step: used.add(step[1])
        row[table] = 'does not fit' if hours != hours else f'{hours:.1f}'
    return row | {'steps': '; '.join(sorted(used))}
