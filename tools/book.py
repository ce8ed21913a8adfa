"Runs the book: every lesson in a process of its own, two at a time, each exercise first as a blank and then solved."
import argparse, multiprocessing, os, re, sys, time, traceback
from concurrent.futures import ThreadPoolExecutor, as_completed
from pathlib import Path

root = Path(__file__).parents[1]
# The longest begin first, so that no core waits for the last lesson
SLOW = '42 53a_study 33a_resume 41 50a_study.grid 60_widgets.pairs 34 40 30 01 53 51b_study 11_data.synth 52'.split()
# Imported once, by the process that all others are forked from
PRELOAD = 'cwcl torch torchvision pandas matplotlib.pyplot fastai.callback.schedule execnb.shell nbdev.process'.split()
PRELOAD.append('cwcl.stages')

def lesson_cells(file):
    "The cells that nbdev_test runs: code, but for what waits for a GPU or `make test-slow`"
    from nbdev.process import NBProcessor
    def runs(c):
        d = getattr(c, 'directives_', None) or {}
        return c.cell_type == 'code' and 'false' not in d.get('eval', ()) and not {'slow', 'cuda'} & d.keys()
    return [c for c in NBProcessor(file, rm_directives=False, process=True).nb.cells if runs(c)]

def run_lesson(file):
    "Run the cells of a lesson as nbdev_test does, each solution first as a blank; return what went wrong"
    from cwcl.check import blank, is_solution
    from execnb.shell import CaptureShell
    os.chdir(file.parent)
    shell = CaptureShell(file)
    found = []
    def run(code):
        shell.run(code)
        return shell.exc
    cells = lesson_cells(file)
    for c,after in zip(cells, cells[1:] + [None]):
        if is_solution(c):
            if run(blank(c.source)) is not None: return found + [f'the blank does not run: {shell.exc!r}\n{c.source}']
            e = run(after.source)
            refused = type(e).__name__ == 'NotYet' and 'still blank' in str(e)
            if not refused: found.append(f'a blank gives {e!r}\n{c.source}')
        if (e := run(c.source)) is not None: return found + [''.join(traceback.format_exception(e)) + c.source]
    return found

def child(file, out, start_method):
    "Run a lesson, as if its process had been started by hand, and send what went wrong"
    multiprocessing.set_start_method(start_method, force=True)
    os.environ.update(IN_TEST='1', MPLBACKEND='agg')
    try: out.send(run_lesson(file))
    except BaseException as e: out.send([repr(e)])

def in_own_process(file, context, minutes=60):
    "Run a lesson that has Python to itself; return file, seconds and what went wrong"
    start = time.perf_counter()
    here,there = context.Pipe(False)
    p = context.Process(target=child, args=(file, there, multiprocessing.get_start_method()))
    p.start()
    there.close()
    try: found = here.recv() if here.poll(60*minutes) else [f'no end after {minutes} minutes']
    except EOFError: found = ['its process died']
    p.join(60)
    p.kill()
    return file,time.perf_counter() - start,found

def place(file):
    "Return the place of a lesson in the queue"
    return next((i for i,o in enumerate(SLOW) if file.name.startswith(o)), len(SLOW)),file.name

def main():
    p = argparse.ArgumentParser(description=__doc__)
    p.add_argument('--files', default='.', help='a pattern that the name of a lesson must match')
    p.add_argument('--book', type=Path, default=root/'nbs', help='folder of the lessons')
    p.add_argument('--workers', type=int, default=2)
    args = p.parse_args()
    files = sorted((o for o in args.book.resolve().glob('*.ipynb') if re.search(args.files, o.name)), key=place)
    context = multiprocessing.get_context('forkserver' if os.name == 'posix' else 'spawn')
    if os.name == 'posix': context.set_forkserver_preload(PRELOAD)
    failed = 0
    with ThreadPoolExecutor(args.workers) as pool:
        for o in as_completed([pool.submit(in_own_process, f, context) for f in files]):
            file,seconds,found = o.result()
            failed += bool(found)
            print(f'{file.name}: {seconds:.0f} s' + ''.join(f'\n  FAILED: {o}' for o in found), flush=True)
    print(f'{len(files)} lessons, {failed} failed')
    return bool(failed or not files)

if __name__ == '__main__': sys.exit(main())
