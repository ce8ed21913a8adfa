"Commands: one line instead of a traceback, on every output"
import os, pytest, signal, subprocess, sys, time
from fastai.callback.progress import progress_bar
from fastcore.script import CliError
from cwcl.core import InputError
from cwcl.script import one_line_errors, orderly_end

def test_scripts_fail_in_one_line():
    @one_line_errors
    def script(e): raise e
    with pytest.raises(CliError, match='^script: a b$'): script(InputError('a\n  b'))
    with pytest.raises(CliError, match='No space left'): script(OSError(28, 'No space left on device'))
    with pytest.raises(ZeroDivisionError): script(ZeroDivisionError())
    lack = "[enforce fail at alloc_cpu.cpp:118] err == 0. DefaultCPUAllocator: can't allocate memory: you tried\nto"
    short = MemoryError(),OSError(12, 'Cannot allocate memory'),RuntimeError(lack)
    threads = RuntimeError("can't start new thread"),RuntimeError('Resource temporarily unavailable')
    for e in short + threads:
        with pytest.raises(CliError, match='^script: out of memory .*a smaller batch'): script(e)
    parts = RuntimeError('could not create a primitive'),ImportError('a.so: failed to map segment from shared object')
    for e in parts:
        with pytest.raises(CliError, match=f'{e}: mostly memory is short.*forbids memory or a folder'): script(e)
    for e in (RuntimeError('could not create a primitive descriptor for it'), ImportError('a: No such file')):
        with pytest.raises(type(e)): script(e)
    with pytest.raises(CliError, match='a helper process was killed'):
        script(RuntimeError('DataLoader worker (pid 4) is killed by signal: Killed.'))

@pytest.mark.parametrize('encoding', ['ascii', 'cp1252'])
def test_a_table_is_printed_in_any_encoding(encoding):
    "As on Windows, where what is sent to a file has no minus"
    script = 'from cwcl.script import one_line_errors\n@one_line_errors\ndef f(): print("\u2212.01\u00b1.02")\nf()'
    env = dict(os.environ, PYTHONIOENCODING=encoding)
    p = subprocess.run([sys.executable, '-c', script], env=env, capture_output=True)
    assert p.stdout.decode(encoding).strip() == ('-.01+-.02' if encoding == 'ascii' else '-.01\u00b1.02'), p.stderr

@pytest.mark.skipif(os.name == 'nt', reason='names are text on Windows')
def test_names_go_out_as_they_came_in_the_locale_c():
    script = 'import sys\nfrom cwcl.script import one_line_errors\n@one_line_errors\ndef f(): print(sys.argv[1])\nf()'
    env = dict(os.environ, LC_ALL='C', PYTHONUTF8='0', PYTHONCOERCECLOCALE='0')
    p = subprocess.run([sys.executable, '-c', script, 'sc\u00e9ne'.encode()], env=env, capture_output=True)
    assert p.stdout.strip() == 'sc\u00e9ne'.encode(), p.stderr

@pytest.mark.skipif(os.name == 'nt', reason='a shell of Unix')
@pytest.mark.parametrize('closed', ['>&-', '2>&-', '>&- 2>&-'])
def test_an_output_that_is_closed_is_not_written_to(closed, tmp_path):
    (tmp_path/'a.py').write_text('import sys\nfrom cwcl.script import one_line_errors\n@one_line_errors\n'
        'def f():\n    for o in (sys.stdout, sys.stderr): o.write("x")\n    open(sys.argv[1], "w").close()\nf()')
    command = f'exec "{sys.executable}" "{tmp_path}/a.py" "{tmp_path}/done" {closed}'
    p = subprocess.run(['sh', '-c', command], capture_output=True, text=True)
    assert p.returncode == 0 and (tmp_path/'done').exists(), p.stderr

TWICE = '--n 2 --number=3', '--numb 2 --number 3', '-w 2 --with 3', '-w 2 -w 3', '--wi=2 --with 3'

@pytest.mark.parametrize('args, twice', [*((o, True) for o in TWICE), ('--number 2 --all --all -w 3', False)])
def test_an_option_given_twice_is_refused(args, twice, tmp_path):
    "However it is written; a flag may come twice"
    (tmp_path/'a.py').write_text('from fastcore.script import call_parse, store_true\n'
        'from cwcl.script import one_line_errors\n@call_parse\n@one_line_errors\n'
        'def f(number:int=1, With:int=1, all:store_true=False): print(number + With)\n')
    p = subprocess.run([sys.executable, tmp_path/'a.py', *args.split()], capture_output=True, text=True)
    assert p.returncode == twice and p.stdout.strip() == ('' if twice else '5')
    assert ('given 2 times, and only the last would count' in p.stderr) == twice

@pytest.fixture
def usual_signals():
    "As in a command; a worker of pytest ignores Ctrl-C"
    usual = {signal.SIGTERM: signal.SIG_DFL, signal.SIGINT: signal.default_int_handler}
    before = {k: signal.signal(k, o) for k,o in usual.items()}
    yield usual
    for k,o in before.items(): signal.signal(k, o)

@pytest.mark.parametrize('sign, want', [(signal.SIGTERM, SystemExit), (signal.SIGINT, KeyboardInterrupt)])
def test_a_request_to_end_is_heard_while_a_bar_is_made(monkeypatch, usual_signals, sign, want):
    "The bar takes whatever happens in its first print for a sign that the output lacks"
    asked = []
    def ask(*args, **kwargs):
        if not asked: asked.append(signal.raise_signal(sign))
    bars = sys.modules[progress_bar.__module__]
    monkeypatch.setattr(bars, 'print', ask, raising=False)
    with pytest.raises(want), orderly_end():
        for _ in bars.ConsoleProgressBar(range(200)): time.sleep(.05)
    assert asked and {k: signal.getsignal(k) for k in usual_signals} == usual_signals

def test_a_handler_of_the_caller_stays(usual_signals):
    for k in usual_signals: signal.signal(k, signal.SIG_IGN)
    with orderly_end(): assert all(signal.getsignal(k) == signal.SIG_IGN for k in usual_signals)
    assert all(signal.getsignal(k) == signal.SIG_IGN for k in usual_signals)
