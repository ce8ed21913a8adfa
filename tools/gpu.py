"""Check and time the kit on a CUDA device: one script of ten minutes, JSON after every part.

    python tools/gpu.py [--out gpu.json] [--seconds 560] [--only PART ...]
    python tools/gpu.py --smoke
    python tools/gpu.py --cost gpu.json

Parts run in order, those that matter most first; each is bounded, and an error or a part that takes too long is written
down and does not end the others. `--smoke` does the same small, on the CPU, to test this script; there a part
may take what is left of an hour. `--cost` prints what Tables 1 and 2 of the paper take on cards of 24, 40 and 80 GB,
by the steps that were measured."""
import argparse, gc, json, os, signal, sys, tempfile, threading, time, traceback, torch
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from gpu_cost import cost_table
from gpu_parts import PARTS
from cwcl.core import recipe, set_seed
from cwcl.whole import atomic_path

@dataclass
class Bench:
    "What the parts share"
    device: torch.device
    smoke: bool
    folder: Path # For scenes and runs
    found: dict = field(default_factory=dict) # What earlier parts have found
    def recipe(self, **changes):
        base = dict(window=64) if self.smoke else {}
        return recipe('smoke' if self.smoke else 'paper', **{'threads': 1, **base, **changes})
    def sizes(self, whole, small): return small if self.smoke else whole

class OutOfTime(Exception): "A part took longer than it may"

@contextmanager
def at_most(seconds):
    "Raise `OutOfTime` where Python is when the time is over; on Windows never"
    def stop(*_): raise OutOfTime(f'stopped after {seconds:.0f} s')
    if not hasattr(signal, 'setitimer'):
        yield
        return
    old = signal.signal(signal.SIGALRM, stop)
    signal.setitimer(signal.ITIMER_REAL, seconds)
    try: yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, old)

def machine(device):
    "Say where this ran"
    found = dict(device=str(device), torch=torch.__version__, cuda=torch.version.cuda, python=sys.version.split()[0])
    if device.type != 'cuda': return found
    p = torch.cuda.get_device_properties(device)
    cudnn = torch.backends.cudnn.version()
    return found | dict(name=p.name, bytes=p.total_memory, capability=f'{p.major}.{p.minor}', cudnn=cudnn)

def run_part(name, bench, seconds):
    "Return what a part found, or why it did not end; it fills `found` while it runs"
    found = bench.found[name] = {}
    start,threads = time.perf_counter(),torch.get_num_threads()
    try:
        with at_most(seconds): PARTS[name][1](bench, found)
    except Exception as e:
        last = traceback.extract_tb(e.__traceback__)[-1]
        found['error'] = f'{type(e).__name__}: {e} ({Path(last.filename).name}:{last.lineno})'
    finally:
        torch.set_num_threads(threads)
        gc.collect()
        with suppress(RuntimeError): torch.cuda.empty_cache() # After some errors nothing works any more
    found['part_seconds'] = round(time.perf_counter() - start, 1)

def run_all(bench, out, limit, only, tell):
    "Run all parts, and write what is known after each"
    start = time.perf_counter()
    for name,(seconds,_) in PARTS.items():
        left = limit - (time.perf_counter() - start)
        if only and name not in only: continue
        if left < 5: bench.found[name] = dict(error='no time left')
        else: run_part(name, bench, left if bench.smoke else min(seconds, left))
        text = json.dumps(dict(machine=machine(bench.device), **bench.found), indent=1)
        with atomic_path(out) as p: p.write_text(text)
        tell(f'{name}: {json.dumps(bench.found[name])[:300]}')

def main():
    args = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    args.add_argument('--out', type=Path, default=Path('gpu.json'), help='file to write')
    args.add_argument('--seconds', type=float, help='at most, in all; 560 if not given, with --smoke an hour')
    args.add_argument('--only', nargs='*', choices=PARTS, help='these parts alone')
    args.add_argument('--smoke', action='store_true', help='the same, small, on the CPU')
    args.add_argument('--cost', type=Path, help='a file that this script wrote: print the cost of both tables')
    args = args.parse_args()
    seconds = args.seconds if args.seconds is not None else 3600. if args.smoke else 560.
    if args.cost: return print(cost_table(json.loads(args.cost.read_text())))
    if not args.smoke and not torch.cuda.is_available(): raise SystemExit('gpu.py: PyTorch sees no GPU; try --smoke')
    set_seed(0, 1 if args.smoke else os.cpu_count())
    out_of_time = threading.Timer(seconds + 20, os._exit, (1,)) # If CUDA does not come back, nothing else ends it
    out_of_time.daemon = True
    out_of_time.start()
    with tempfile.TemporaryDirectory() as folder:
        bench = Bench(torch.device('cpu' if args.smoke else 'cuda'), args.smoke, Path(folder))
        run_all(bench, args.out, seconds, args.only, print)
    failed = [k for k,v in bench.found.items() if 'error' in v]
    if failed: raise SystemExit(f'gpu.py: {", ".join(failed)} did not end well; see {args.out}')

if __name__ == '__main__': main()
