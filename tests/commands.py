"""Console scripts as a user runs them, without the seconds that each of them would import.

Every call is a process of its own, forked from one that has imported the kit and run nothing."""
import atexit, json, os, subprocess, sys, tempfile
from functools import cache
from pathlib import Path

NURSERY = '''
import json, os, resource, runpy, signal, sys, traceback
import cwcl.export, cwcl.study.command, cwcl.video

def run(argv, cwd, env, files, spare):
    os.chdir(cwd)
    os.environ.clear()
    os.environ.update(env)
    for fd,path in enumerate([os.devnull, *files]): os.dup2(os.open(path, os.O_WRONLY if fd else os.O_RDONLY), fd)
    sys.stdin,sys.stdout = open(0), open(1, 'w', buffering=1)
    sys.stderr = open(2, 'w', buffering=1, errors='backslashreplace')
    sys.argv = argv
    if spare:
        pages = int(open('/proc/self/statm').read().split()[0])
        resource.setrlimit(resource.RLIMIT_AS, (pages*resource.getpagesize() + spare*2**20,)*2)
    try: runpy.run_path(argv[0], run_name='__main__')
    except SystemExit as e:
        if isinstance(e.code, str): print(e.code, file=sys.stderr)
        return 1 if isinstance(e.code, str) else int(e.code or 0)
    except BaseException:
        traceback.print_exc()
        return 1
    return 0

def give_up(*_): raise TimeoutError
signal.signal(signal.SIGALRM, give_up)
for line in sys.stdin:
    job = json.loads(line)
    timeout = job.pop('timeout')
    pid = os.fork()
    if not pid:
        code = 1
        try: code = run(**job)
        finally:
            sys.stdout.flush()
            sys.stderr.flush()
            os._exit(code)
    signal.alarm(timeout)
    try: code = os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
    except TimeoutError:
        os.kill(pid, signal.SIGKILL)
        os.waitpid(pid, 0)
        code = None
    signal.alarm(0)
    print(json.dumps(code), flush=True)
'''

@cache
def nursery():
    "The process that the others are forked from"
    env = {**os.environ, 'MPLBACKEND': 'agg', 'OMP_NUM_THREADS': '1', 'CUDA_VISIBLE_DEVICES': ''}
    code = [sys.executable, '-W', 'ignore', '-c', NURSERY]
    p = subprocess.Popen(code, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env=env)
    atexit.register(p.kill)
    return p

def run_command(script, *args, cwd=None, timeout=900, spare=0, **env):
    "What subprocess.run would return for a console script of this environment; `spare`: MiB that it may add, 0 for any"
    argv = [str(Path(sys.executable).with_name(script)), *map(str, args)]
    with tempfile.TemporaryDirectory() as home:
        files = [f'{home}/out', f'{home}/err']
        for o in files: Path(o).touch()
        env = {**os.environ, 'MPLBACKEND': 'agg', 'OMP_NUM_THREADS': '1', **env}
        job = dict(argv=argv, cwd=str(cwd or os.getcwd()), env=env, files=files, timeout=timeout, spare=spare)
        p = nursery()
        p.stdin.write(json.dumps(job) + '\n')
        p.stdin.flush()
        code = json.loads(p.stdout.readline())
        out,err = (Path(o).read_text(encoding='utf-8') for o in files)
    if code is None: raise subprocess.TimeoutExpired(argv, timeout, out, err)
    return subprocess.CompletedProcess(argv, code, out, err)
