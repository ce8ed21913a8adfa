"The measure of what grows, on series that are known"
import sys, numpy as np, pytest
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]/'tools'))
import endurance # chkstyle: ignore

def series(growth, n=2000, seed=0):
    "What a process holds: steps that come and go, noise, and a leak"
    rng = np.random.default_rng(seed)
    wave = 5e4*np.repeat(rng.integers(0, 2, n//20), 20)
    return [(i, 5e8 + growth*i + w + 1e4*e, 8) for i,w,e in zip(range(n), wave, rng.normal(size=n))]

@pytest.mark.parametrize('growth', [0, 700, -700])
def test_a_leak_is_measured_and_noise_is_none(growth):
    found = [endurance.slope([o[:2] for o in series(growth, seed=k)]) for k in range(40)]
    held = sum(abs(b - growth) <= half for b,half in found)
    assert held >= 34, held
    if growth: assert all(half < abs(growth) for _,half in found)

def test_the_beginning_does_not_count():
    warming = [(i, 10**9 - 10**6*i, 99) for i in range(100)]
    rest = [(i + 100, b, f) for i,b,f in series(700, 900)]
    found = endurance.flat(warming + rest, 'a series')
    assert abs(found['bytes']['slope'] - 700) <= found['bytes']['half'] and found['n'] == 999
    assert found['files'] == dict(slope=0, half=0, first=8, last=8)

@pytest.mark.parametrize('power', [1, 2])
def test_the_exponent_of_a_power(power):
    times = [(n, 3e-4*n**power) for n in (10, 20, 40, 80)]
    assert endurance.exponent(times) == power

def test_rows_are_frames_that_come_again():
    t = endurance.many_rows(2500)
    assert len(t) == 2500 and t.image.is_unique and t.frame.is_unique and t.video.nunique() > 9

def test_each_part_has_a_process_of_its_own(tmp_path, monkeypatch):
    called = []
    monkeypatch.setattr(endurance.subprocess, 'run', lambda o, check: called.append(o[2:]))
    monkeypatch.setattr(sys, 'argv', ['endurance.py', '--n', '5', 'rows', 'grid', f'--out={tmp_path/"a"}'])
    endurance.main()
    assert called == [[o, '--n=5', f'--out={tmp_path/"a"}'] for o in ('rows', 'grid')]
