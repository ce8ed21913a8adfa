"Who is at a piece of work, on any disk"
import os, pytest, re, subprocess, sys, time
from concurrent.futures import ThreadPoolExecutor
from cwcl.leases import TERM, Lease, LostLease

@pytest.fixture(autouse=True, params=['a lock that locks', 'a lock that does not'])
def disk(request, monkeypatch):
    "As NFS is with nolock: everybody is told yes"
    if request.param == 'a lock that does not': monkeypatch.setattr('fcntl.flock', lambda *_: None)

def from_elsewhere(path, term):
    "The lease of a process on a machine that we cannot ask"
    other = Lease(path, term)
    assert other.take()
    text = path.read_text()
    other.file.release()
    path.write_text(re.sub('host=.*', 'host=another-machine', text))

def test_of_many_one_has_it(tmp_path):
    "Each waits for its turn; a counter that all of them read and write misses none"
    count = tmp_path/'count'
    count.write_text('0')
    def add(_):
        with Lease(tmp_path/'a.lease').hold(wait=-1) as ours:
            assert ours
            n = int(count.read_text())
            time.sleep(.002)
            count.write_text(str(n+1))
    with ThreadPoolExecutor(8) as pool: list(pool.map(add, range(16)))
    assert count.read_text() == '16'

def test_nobody_waits_unless_asked(tmp_path):
    a,b = Lease(tmp_path/'a.lease'),Lease(tmp_path/'a.lease')
    with a.hold() as mine:
        assert mine and not b.take() and not b.take(wait=.3) and not b.alive()
        a.check()
    assert b.take()
    b.file.release()
    assert not (tmp_path/'a.lease').exists()

def test_it_is_given_back_by_an_error(tmp_path):
    with pytest.raises(ZeroDivisionError), Lease(tmp_path/'a.lease').hold(): 1/0
    assert not (tmp_path/'a.lease').exists()

def test_a_killed_owner_of_this_machine_is_known_at_once(tmp_path):
    code = 'import os, sys; from cwcl.leases import Lease; c = Lease(sys.argv[1]); c.take(); os.kill(os.getpid(), 9)'
    subprocess.run([sys.executable, '-c', code, str(tmp_path/'a.lease')])
    assert (tmp_path/'a.lease').exists() and Lease(tmp_path/'a.lease').take()

def test_an_owner_elsewhere_is_given_its_term(tmp_path, monkeypatch):
    "On clocks that go on when they are told to, whatever else the machine does"
    path = tmp_path/'a.lease'
    later = [0]
    for k in ('monotonic', 'time'): # Older versions of filelock read the age of the file
        monkeypatch.setattr(time, k, lambda clock=getattr(time, k): clock() + later[0])
    from_elsewhere(path, 3000.)
    mine = Lease(path, 3000.)
    assert not mine.take() and not mine.alive()
    later[0] += 2000
    os.utime(path, (time.time(),)*2)
    assert mine.alive() and not mine.take()
    later[0] += 2000
    assert not mine.take(), 'its term began again'
    later[0] += 1001
    assert mine.take()

def test_half_a_lease_of_a_killed_process_does_not_block_for_ever(tmp_path):
    (tmp_path/'a.lease').write_text('filelock/2\npid=1')
    assert Lease(tmp_path/'a.lease').take(wait=60)

@pytest.mark.parametrize('how', ['gone', 'taken over'])
def test_an_owner_that_slept_too_long_stops(tmp_path, how):
    mine = Lease(tmp_path/'a.lease')
    with mine.hold():
        mine.check()
        if how == 'gone': mine.path.unlink()
        else: mine.path.write_text(re.sub('(token|host)=.*', r'\1=other', mine.path.read_text()))
        with pytest.raises(LostLease, match=f'a.lease: taken over by another process.*{TERM:.0f} s'): mine.check()
