"Studies on a real Slurm of two nodes, all on this machine, that cancels, preempts and stops jobs and loses a node"
import os, shutil, socket, subprocess, tempfile, time, psutil, pytest
from collections import Counter
from contextlib import ExitStack
from dataclasses import replace
from pathlib import Path
from commands import run_command
from cwcl.study.grid import run_all
from cwcl.study.jobs import partition_gpus, run_jobs
from test_grid import figures, small_runs

pytestmark = pytest.mark.slow
submitit = pytest.importorskip('submitit')

# Every daemon has processes and a host name of its own, as on a machine of its own, and ends when the tests end
APART = 'setpriv --pdeathsig KILL unshare --pid --uts --fork --kill-child --mount-proc'.split()
NEEDED = 'munged mariadbd mariadb-install-db slurmdbd slurmctld slurmd sbatch sacct hostname setpriv unshare'.split()

# Where files and ports are; how jobs are started, watched, ended and preempted
SLURM = '''ClusterName=small SlurmUser=root SlurmctldHost=control(127.0.0.1) SlurmctldPort={control}
AuthInfo=socket={home}/munge,cred_expire=15 StateSaveLocation={home}/state SlurmctldPidFile={home}/control.pid
SlurmdSpoolDir={home}/%n SlurmdPidFile={home}/%n.pid AccountingStorageType=accounting_storage/slurmdbd
AccountingStorageHost=127.0.0.1 AccountingStoragePort={account} AccountingStoragePass={home}/munge
SlurmdParameters=config_overrides ProctrackType=proctrack/linuxproc SelectType=select/cons_tres
SelectTypeParameters=CR_CPU SchedulerParameters=bf_interval=1,sched_interval=1 GresTypes=gpu KillWait=2
ReturnToService=1 PreemptType=preempt/partition_prio PreemptMode=REQUEUE'''
NODES = '''
NodeName=n1 NodeAddr=127.0.0.1 Port={n1} CPUs=4
NodeName=n2 NodeAddr=127.0.0.1 Port={n2} CPUs=4
NodeName=n3 NodeAddr=127.0.0.1 Port={n3} CPUs=4 Gres=gpu:1 State=DOWN
PartitionName=main Nodes=n[1-2] Default=YES
PartitionName=first Nodes=n[1-2] PriorityTier=9
PartitionName=gpus Nodes=n3
'''
ACCOUNTS = '''SlurmUser=root DbdHost=account DbdAddr=127.0.0.1 DbdPort={account} PidFile={home}/account.pid
AuthInfo=socket={home}/munge StorageType=accounting_storage/mysql StorageHost=127.0.0.1 StoragePort={base}
StorageUser=root'''

def until(true, seconds=180):
    end = time.monotonic() + seconds
    while not true():
        assert time.monotonic() < end, 'Slurm does not get on'
        time.sleep(.1)

def answers(port):
    with socket.socket() as s: return not s.connect_ex(('127.0.0.1', port))

def free_ports(n):
    with ExitStack() as stack:
        found = [stack.enter_context(socket.socket()) for _ in range(n)]
        for s in found: s.bind(('127.0.0.1', 0))
        return [s.getsockname()[1] for s in found]

class Slurm:
    "Daemons by host name; called with a command line, it returns what that says"
    def __init__(self, home):
        self.home = home
        self.daemons = {}

    def __call__(self, line): return subprocess.run(line.split(), check=True, capture_output=True, text=True).stdout

    def start(self, host, *command):
        script = 'hostname $0; "$@"; exit'
        with open(self.home/f'{host}.log', 'a') as log:
            self.daemons[host] = subprocess.Popen([*APART, 'sh', '-c', script, host, *command], stdout=log, stderr=log)

    def stop(self, host):
        "As if power failed: kill the first process of a host, and with it all others"
        p = self.daemons.pop(host)
        for o in psutil.Process(p.pid).children() or [p]: o.kill()
        p.wait(30)

    def job(self, node): return self(f'squeue --noheader --states=running --nodelist={node} --format=%i').strip()

    def states(self, folder):
        "States in which attempts of a study's jobs have ended"
        ids = ','.join(o.name.split('_')[0] for o in (folder/'jobs').glob('*_submitted.pkl'))
        said = self(f'sacct --jobs={ids} --duplicates --allocations --noheader --parsable2 --format=State')
        return Counter(o.split()[0] for o in said.splitlines())

@pytest.fixture(scope='module')
def slurm():
    missing = [o for o in NEEDED if not shutil.which(o)]
    if missing: pytest.skip(f'no {", ".join(missing)}: apt install slurm-wlm slurmdbd munge mariadb-server')
    if os.geteuid() or subprocess.run([*APART, 'true'], capture_output=True).returncode:
        pytest.skip('only root may start a Slurm, with namespaces')
    with ExitStack() as stack:
        home = Path(stack.enter_context(tempfile.TemporaryDirectory(prefix='slurm')))
        names = 'control account base n1 n2 n3'.split()
        ports = dict(zip(names, free_ports(len(names))))
        lines = ['\n'.join(o.split()) for o in (SLURM, ACCOUNTS)]
        for file,text in (('slurm.conf', lines[0] + NODES), ('slurmdbd.conf', lines[1]), ('key', os.urandom(64).hex())):
            (home/file).write_text(text.format(home=home, **ports))
            (home/file).chmod(0o600)
        for o in ('state', 'n1', 'n2'): (home/o).mkdir()
        env = stack.enter_context(pytest.MonkeyPatch.context())
        env.setenv('SLURM_CONF', str(home/'slurm.conf'))
        slurm = Slurm(home)
        stack.callback(lambda: [slurm.stop(o) for o in [*slurm.daemons]])
        slurm.start('keys', 'munged', '--foreground', '--force', f'--socket={home}/munge', f'--key-file={home}/key',
            f'--pid-file={home}/keys.pid', f'--log-file={home}/munge.log', f'--seed-file={home}/seed')
        database = ['--no-defaults', f'--datadir={home}/base', '--user=root']
        slurm(f'mariadb-install-db --auth-root-authentication-method=normal {" ".join(database)}')
        slurm.start('base', 'mariadbd', *database, f'--socket={home}/sql', '--bind-address=127.0.0.1',
            f'--port={ports["base"]}')
        until(lambda: answers(ports['base']))
        slurm.start('account', 'slurmdbd', '-D')
        until(lambda: answers(ports['account']))
        slurm.start('control', 'slurmctld', '-D')
        for o in ('n1', 'n2'): slurm.start(o, 'slurmd', '-D')
        until(lambda: answers(ports['control']) and slurm('sinfo --noheader --states=idle').split()[3:4] == ['2'])
        yield slurm

# The jobs write down what they do, and take their time for an epoch
WITNESS = '''
import os, time, cwcl.study.grid as g
from pathlib import Path
from fastai.callback.core import Callback
from cwcl.methods import register_method
class Slow(Callback):
    def after_epoch(self): time.sleep(float(os.environ['PACE']))
register_method('slow')
real = g.stages_run
def told(r, data, phases, out, *args, cbs, **kwargs):
    def note(what):
        with open(Path(out).parent/'journal.txt', 'a') as f:
            print(what, Path(out).name, os.environ['SLURMD_NODENAME'], file=f)
    note('resumed' if list(Path(out).rglob('last.safetensors')) else 'begun')
    real(r, data, phases, out, *args, cbs=[*cbs, Slow()], **kwargs)
    note('ended')
g.stages_run = told
'''

def journal(folder):
    "What was done, to which run, on which node"
    file = folder/'journal.txt'
    return [o.split() for o in file.read_text().splitlines()] if file.exists() else []

def in_turn(folder, node, *acts):
    "Do one thing after the other to a node, each as soon as a job there is at work on a run that has a checkpoint"
    left = list(acts)
    after = 0
    def seen(now):
        nonlocal after
        lines = [o for o in journal(folder) if o[2] == node]
        if not left or len(lines) == after or now['epoch'] < 2: return
        if lines[-1][0] == 'ended' or lines[-1][1] != now['key']: return
        after = len(lines)
        left.pop(0)()
    seen.left = left
    return seen

@pytest.fixture(scope='module')
def runs(smoke): return [replace(o, recipe=replace(o.recipe, epochs=12//len(o.stages))) for o in small_runs(smoke)]

@pytest.fixture(scope='module')
def undisturbed(runs, scenes, tmp_path_factory):
    folder = tmp_path_factory.mktemp('grid')
    run_all(runs, folder, scenes, device='cpu')
    return folder

@pytest.fixture
def submit(slurm, runs, scenes, tmp_path, monkeypatch):
    "Function that does a study, and returns the errors"
    monkeypatch.setattr(submitit.SlurmJob, 'watcher', type(submitit.SlurmJob.watcher)(delay_s=1))
    (tmp_path/'witness.py').write_text(WITNESS)
    def do(runs=runs, pace=3, **kwargs):
        monkeypatch.setenv('PACE', str(pace))
        return run_jobs(runs, tmp_path/'g', scenes, device='cpu', poll=.5, methods=[tmp_path/'witness.py'],
            cluster='slurm', **kwargs)
    yield do
    slurm('scancel --user=root')
    until(lambda: not slurm('squeue --noheader'))

def check(folder, undisturbed, runs):
    "Each run was done to the end once, and gave what it gives undisturbed"
    keys = sorted(o.key for o in runs)
    whole = figures(undisturbed)
    assert figures(folder) == {k: whole[k] for k in keys}
    assert sorted(o[1] for o in journal(folder) if o[0] == 'ended') == keys
    assert not list(folder.rglob('checkpoint'))

def test_a_study_survives_what_slurm_does_to_its_jobs(slurm, submit, undisturbed, runs, tmp_path):
    "A node dies, a job of a higher priority takes its place, and its manager requeues what runs there"
    def die():
        slurm.stop('n1')
        slurm('scontrol update nodename=n1 state=down reason=dead')
        slurm.start('n1', 'slurmd', '-D')
        slurm('scontrol update nodename=n1 state=resume')
    def preempt(): slurm('sbatch --partition=first --nodelist=n1 --cpus-per-task=4 --output=/dev/null --wrap=true')
    def requeue(): slurm(f'scontrol requeue {slurm.job("n1")}')
    seen = in_turn(tmp_path/'g', 'n1', die, preempt, requeue)
    assert submit(seen=seen, partition='main') == [] and not seen.left
    check(tmp_path/'g', undisturbed, runs)
    assert [o for o in journal(tmp_path/'g') if o[0] == 'resumed']
    until(lambda: slurm.states(tmp_path/'g') == dict(NODE_FAIL=1, PREEMPTED=1, REQUEUED=1, COMPLETED=2))

def test_a_study_resumes_after_jobs_that_ended(slurm, submit, undisturbed, runs, tmp_path):
    "One job is canceled, the other runs out of time too often"
    cancel = in_turn(tmp_path/'g', 'n1', lambda: slurm(f'scancel {slurm.job("n1")}'))
    warn = in_turn(tmp_path/'g', 'n2', lambda: slurm(f'scancel --signal=USR2 {slurm.job("n2")}'))
    errors = submit(seen=lambda now: (cancel(now), warn(now)), timeout=9, resubmit=0)
    assert len(errors) == 2 and all('; its log is ' in o and '\n' not in o for o in errors)
    for o in ('CANCELLED', 'timed-out too many times'): assert [e for e in errors if o in e], errors
    assert submit() == []
    check(tmp_path/'g', undisturbed, runs)

def test_a_study_takes_several_time_limits(slurm, submit, undisturbed, runs, tmp_path):
    "Slurm warns a minute and a half or more before the end of three"
    assert submit(runs[:1], pace=9, jobs=1, timeout=3) == []
    check(tmp_path/'g', undisturbed, runs[:1])
    until(lambda: slurm.states(tmp_path/'g')['COMPLETED'])
    assert slurm.states(tmp_path/'g')['REQUEUED']

def test_which_partition_has_gpus(slurm):
    assert [partition_gpus(o) for o in (None, 'main', 'first', 'gpus', 'first,gpus')] == [0, 0, 0, 1, 1]

def test_the_command(slurm, scenes, tmp_path):
    given = '--table 2 --preset smoke --methods simclr,byol --folds 0 --seeds 0 --cluster slurm --jobs 2 --yes --data'
    def command(*args): return run_command('cwcl_table', *given.split(), scenes, *args, cwd=tmp_path)
    bad = command('--partition', 'nosuch')
    assert bad.returncode and 'Invalid partition name' in bad.stderr and 'Traceback' not in bad.stderr
    good = command()
    assert not good.returncode and '2 of 2 runs are done' in good.stdout, good.stderr
