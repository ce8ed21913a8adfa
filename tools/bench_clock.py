"What `make bench` measures with: calls in turns, one thread, time of the process, peak of the allocator"
import cProfile, gc, importlib, os, pstats, time, warnings
os.environ.setdefault('KINETO_LOG_LEVEL', '6') # The profiler otherwise speaks of every start
import numpy as np, torch
from dataclasses import dataclass
from torch.profiler import ProfilerActivity, profile
from cwcl.core import default_device

warnings.filterwarnings('ignore')
LINES = {} # Name to a generator of cases

@dataclass
class Case:
    "Two calls that are measured in turns, and what is asked of their ratio"
    what: str
    size: str
    ours: object # A call
    against: str # What the other call is
    peer: object # A call
    limit: float # So many times faster at least; or, `at_most`, so many times its time
    at_most: bool = False
    memory: float|None = None # At most so many times the peer's peak of memory
    seconds: float = 6. # Measure for so long, and three times at least
    note: object = '' # What to say of it; or a call that returns that, after the measuring
    why: str = '' # What stands in the way, and what is left, where the limit is missed
    python: bool = False # Is its work done outside of PyTorch?

def line(name, *needs): # Name for `--only`; modules of peers
    "Register a generator of cases"
    def add(f):
        f.needs = needs
        LINES[name] = f
        return f
    return add

def lacking(needs):
    "Return the first module that cannot be imported, with the reason"
    for name in needs:
        try: importlib.import_module(name)
        except ImportError as e: return f'{name} is missing ({e})'

def on_cuda(): return default_device().type == 'cuda'

def clock(f, wall=False):
    "Return the seconds of a call; `wall` counts those that it waits for others too"
    now = time.perf_counter if wall or on_cuda() else time.process_time
    if on_cuda(): torch.cuda.synchronize()
    start = now()
    f()
    if on_cuda(): torch.cuda.synchronize()
    return now() - start

def in_turns(calls, seconds, least=3, most=200):
    "Return the seconds of each call, turn by turn, after a warm-up of each"
    for f in calls: f()
    times = []
    start = time.perf_counter()
    def enough(): return len(times) >= least and (len(times) >= most or time.perf_counter() > start + seconds)
    while not enough(): times.append([clock(f) for f in calls])
    return np.array(times).T

def peak_bytes(f):
    "Return how far memory rises during a call, as PyTorch's allocator counts it"
    gc.collect()
    if on_cuda():
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        f()
        return torch.cuda.max_memory_allocated() - before
    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as p: f()
    found = [o for o in p.profiler.kineto_results.events() if o.name() == '[memory]']
    held = np.cumsum([0, *(o.nbytes() for o in sorted(found, key=lambda o: o.start_ns()))])
    return int((held - np.minimum.accumulate(held)).max())

def operators(f):
    "Return (operator, calls, seconds without those that it calls) of a call"
    with profile(activities=[ProfilerActivity.CPU]) as p: f()
    return [(o.key, o.count, o.self_cpu_time_total/1e6) for o in p.key_averages()]

def functions(f):
    "The same of Python's functions"
    p = cProfile.Profile(time.process_time)
    p.runcall(f)
    def name(file, line, own): return own if file == '~' else f'{os.path.basename(file)}: {own}'
    return [(name(*k), v[1], v[2]) for k,v in pstats.Stats(p).stats.items()]

def where_time_goes(case, top=8):
    "Return the longest operators of ours, with their share of all that was seen; the rest in one row"
    found = sorted((functions if case.python else operators)(case.ours), key=lambda o: -o[2])
    whole = sum(o[2] for o in found)
    shown = found[:top]
    rest = len(found) - top, sum(o[1] for o in found[top:]), sum(o[2] for o in found[top:])
    if rest[0] > 0: shown.append((f'{rest[0]} others', *rest[1:]))
    return [dict(name=k, calls=n, ms=1000*t, share=t/whole if whole else 0.) for k,n,t in shown]

def measured(case):
    "Return a row of the table"
    calls = case.ours,case.peer
    times = in_turns(calls, case.seconds)
    ours,peer = np.median(times, axis=1)
    a,b = (peak_bytes(f) for f in calls)
    ratio = ours/peer if case.at_most else peer/ours
    share = ratio/case.limit if case.at_most else case.limit/ratio
    row = dict(what=case.what, size=case.size, ours=ours, against=case.against, peer=peer, ratio=ratio)
    row |= dict(limit=case.limit, at_most=case.at_most, share=share, ours_bytes=a, peer_bytes=b)
    row |= dict(repetitions=times.shape[1])
    if case.memory: row.update(memory_limit=case.memory, memory_share=a/b/case.memory)
    row['note'] = case.note() if callable(case.note) else case.note # Before ours is called once more
    if share > 1 and not on_cuda(): row.update(why=case.why, profile=where_time_goes(case))
    return row
