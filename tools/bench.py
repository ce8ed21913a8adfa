"""Measure the kit beside its peers on this machine; one table, as Markdown and JSON.

    python tools/bench.py [--only NAME] [--out FOLDER] [--curves] [--demo ours]

`--only` measures one line and only prints it; `--curves` measures the series of lesson 32b instead, and `--demo` the
whole demo with three seeds, `ours`, the `plain` one of the peers or ours on two `ranks`, which the table then quotes.
Calls that are compared take turns in one process of one thread, after a warm-up; each figure is the median of the
time that this process had a core. On CUDA it is the time on the clock, synchronized. A line whose peer is missing
says so: pip install 'cwcl[peers]'."""
import argparse, datetime, json, os, platform, time, pandas as pd, torch
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
import bench_demo, bench_lines # chkstyle: ignore
from bench_clock import LINES, lacking, measured, on_cuda
from bench_curves import curves
from cwcl.core import default_device, set_seed
from cwcl.train import kit_commit
from cwcl.whole import atomic_path
from cwcl.study.tables import frame_markdown

HOME = Path(__file__).parents[1]/'data'/'results'/'bench'

def rows(only=None, tell=print):
    "Yield the rows of all lines, or of one"
    for name,f in LINES.items():
        if only and name != only: continue
        reason = lacking(f.needs)
        if reason: yield dict(line=name, skipped=reason)
        for case in () if reason else f():
            row = dict(line=name, **(case if isinstance(case, dict) else measured(case)))
            tell(', '.join(f'{k}: {v}' for k,v in said(row).items() if v))
            yield row

def all_rows(only, folder):
    "The lines that are measured now, and the demo as it was"
    found = list(rows(only))
    return found if only else [*found, dict(line='demo', **bench_demo.demo_row(folder))]

def say_ms(seconds): return f'{1000*seconds:,.2f}' if seconds < .01 else f'{1000*seconds:,.0f}'
def say_mb(n): return '' if n is None else f'{n/1e6:,.1f}'

def said_ratio(row):
    "A row of two calls, as it is read"
    many,few = ('at most {:g} × its time', '{:.2f} × its time'),('{:g} × faster', '{:.2f} × faster')
    asked,got = many if row['at_most'] else few
    out = {'ours, ms': say_ms(row['ours']), 'other, ms': say_ms(row['peer']), 'ratio': got.format(row['ratio'])}
    out |= {'limit': asked.format(row['limit']), 'share of the limit': f'{row["share"]:.0%}'}
    out |= {'ours, MB': say_mb(row['ours_bytes']), 'other, MB': say_mb(row['peer_bytes']), 'note': row['note']}
    times = row.get('memory_limit')
    if times: out['note'] = f'memory: {row["memory_share"]:.0%} of its limit, {times} × as much'
    return dict(against=row['against']) | out

def said_bytes(row):
    "A row with a limit of memory alone, as it is read"
    limit = f'at most {say_mb(row["limit_bytes"])} MB'
    found = {'ours, ms': say_ms(row['ours']), 'limit': limit, 'share of the limit': f'{row["share"]:.0%}'}
    return found | {'ours, MB': say_mb(row['ours_bytes']), 'note': 'measured once'}

def said(row):
    "One row, as it is read"
    head = dict(what=row.get('what', row['line']), size=row.get('size', ''))
    if 'skipped' in row: return head | dict(note=f'skipped: {row["skipped"]}')
    return head | (said_bytes if 'limit_bytes' in row else said_ratio)(row)

def processor():
    "Name of the processor, or of the GPU"
    if on_cuda(): return torch.cuda.get_device_name()
    try: found = [o for o in Path('/proc/cpuinfo').read_text().splitlines() if o.startswith('model name')]
    except OSError: found = []
    return found[0].partition(': ')[2] if found else platform.processor() or platform.machine()

def machine():
    "What a table of times must say of where it was measured"
    def found(name):
        try: return version(name)
        except PackageNotFoundError: return None
    names = 'torch', 'torchvision', 'fastai', 'monai', 'pytorch-metric-learning', 'torchmetrics', 'numpy'
    kernels = torch.backends.cpu.get_cpu_capability()
    load = round(os.getloadavg()[0], 1) if hasattr(os, 'getloadavg') else None
    today = f'{datetime.date.today()}'
    return dict(date=today, commit=kit_commit(), device=str(default_device()), processor=processor(), kernels=kernels,
        threads=torch.get_num_threads(), cores=os.cpu_count(), load=load, python=platform.python_version(),
        versions={k: found(k) for k in names if found(k)})

def reasons(found):
    "Where the time goes in lines that miss their limit, as Markdown"
    out = []
    for row in found:
        if 'profile' not in row: continue
        times = pd.DataFrame([dict(operator=f'`{o["name"]}`', calls=f'{o["calls"]:,}', ms=f'{o["ms"]:,.2f}',
            share=f'{o["share"]:.0%}') for o in row['profile']])
        out += [f'### {row["what"]}, {row["size"]}, against {row["against"]}', '', row['why'], '']
        out += [frame_markdown(times), '']
    head = ['## Where a limit is missed', '', 'The longest operators of one call of ours, by their own time, while a '
        'profiler watches (which makes many short calls look longer).', '']
    return '\n'.join([*head, *out] if out else [])

def read_table(found): return pd.DataFrame([said(o) for o in found]).fillna('')

def markdown(where, found):
    versions = ', '.join(f'{k} {v}' for k,v in where['versions'].items())
    return '\n'.join([f'Measured on {where["date"]} by `make bench`: {where["device"]}, {where["processor"]} '
        f'({where["kernels"]}), {where["threads"]} of {where["cores"]} cores, load {where["load"]} at the start, '
        f'Python {where["python"]}, {versions}; {where["seconds"]} s, commit {str(where["commit"])[:12]}.', '',
        'Milliseconds are medians of calls that took turns in one process, of the time that it had a core. '
        'MB: the peak of memory beyond what was there before, in PyTorch\'s own allocator, so what NumPy and SciPy '
        'hold is not in it. Share of the limit: how much of the time that is '
        'allowed is used; more than 100 % misses the limit.', '',
        frame_markdown(read_table(found)), '', reasons(found)])

def write(folder, name, where, found, text=None):
    "Write JSON, and Markdown if there is a text"
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    with atomic_path(folder/f'{name}.json') as p: p.write_text(json.dumps(dict(machine=where, **found), indent=1))
    if not text: return
    with atomic_path(folder/f'{name}.md') as p: p.write_text(text, encoding='utf-8')

def main():
    args = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    args.add_argument('--only', choices=LINES, help='measure and print this line alone')
    args.add_argument('--curves', action='store_true', help='measure the series of lesson 32b instead')
    args.add_argument('--demo', choices=bench_demo.KINDS, help='train the whole demo with three seeds instead')
    args.add_argument('--out', type=Path, help='folder for the files; data/results/bench if not given')
    args = args.parse_args()
    set_seed(0, 1)
    where = machine()
    if args.curves: return write(args.out or HOME, 'curves', where, dict(series=curves(tell=print)))
    if args.demo: return bench_demo.measure_demo(args.demo, args.out or HOME, where)
    start = time.perf_counter()
    found = all_rows(args.only, args.out or HOME)
    where['seconds'] = round(time.perf_counter() - start)
    print(read_table(found).to_string(index=False))
    print(reasons(found))
    if args.out or not args.only: write(args.out or HOME, 'bench', where, dict(rows=found), markdown(where, found))

if __name__ == '__main__': main()
