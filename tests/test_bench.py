"What measures: ratios, shares, memory of a known call, missing peers, small lines, the GPU script on the CPU"
import json, re, subprocess, sys, time
import bench, bench_clock, bench_curves, bench_demo, bench_lines, gpu, gpu_cost, numpy as np, pytest, torch
from bench_clock import Case, measured, peak_bytes
from pages import root

def clocked(monkeypatch):
    "Let every call take the seconds that it returns"
    monkeypatch.setattr(bench_clock, 'clock', lambda f: f())
    monkeypatch.setattr(bench_clock, 'peak_bytes', lambda f: int(100*f()))

@pytest.mark.parametrize('at_most, limit, ratio, share', [(False, 4, 2, 2), (True, 2, .5, .25)])
def test_ratio_and_share_of_the_limit(monkeypatch, at_most, limit, ratio, share):
    "One second beside two: twice as fast where four times is asked; half its time where twice is allowed"
    clocked(monkeypatch)
    row = measured(Case('a', 'b', lambda: 1., 'c', lambda: 2., limit, at_most, memory=.8, seconds=0))
    assert (row['ratio'], row['share']) == (ratio, share) and row['repetitions'] == 3
    assert row['memory_share'] == 100/200/.8

@pytest.mark.parametrize('python, name', [(False, '`aten::mul`'), (True, '`test_bench.py: work`')])
def test_a_missed_limit_has_a_reason_and_shows_where_the_time_goes(monkeypatch, python, name):
    "One second beside two is twice as fast: enough for 2, and not for 4"
    clocked(monkeypatch)
    x = torch.ones(1000, 1000)
    def work():
        for _ in range(100) if python else (): x.sum(), sum(range(10_000))
        x*2
        called.append(1)
        return 1.
    called = []
    met,missed = (measured(Case('a', 'b', work, 'c', lambda: called.pop() and 2., n, seconds=0, why='so it is',
        note=lambda: f'{len(called)} more', python=python))
        for n in (2, 4))
    assert met['note'] == missed['note'] == '0 more', 'one side did more than the other'
    assert 'profile' not in met and bench.reasons([met]) == ''
    text = bench.reasons([met, missed])
    assert text.count('so it is') == 1 and name in text
    assert sum(o['share'] for o in missed['profile']) == pytest.approx(1) and len(missed['profile']) < 10

def test_calls_take_turns_after_a_warm_up():
    said = []
    times = bench_clock.in_turns([lambda: said.append('a'), lambda: said.append('b')], 0, least=4)
    assert said == ['a', 'b']*5 and times.shape == (2, 4)

def test_memory_is_the_highest_rise():
    "Two megabytes at once; what was held before, and is freed first, does not count"
    x = torch.ones(250_000)
    held = []
    def call():
        held.clear()
        y = x + 1
        held.append(y + 1)
    for _ in range(3): assert peak_bytes(call) == pytest.approx(2e6, rel=.01)

def test_a_line_without_its_peer_is_skipped_with_a_reason(monkeypatch):
    def nothing(): yield 1/0
    nothing.needs = 'json', 'no_such_peer'
    monkeypatch.setattr(bench, 'LINES', dict(nothing=nothing))
    rows = list(bench.rows(tell=None))
    assert 'no_such_peer is missing' in rows[0]['skipped']
    assert 'skipped: no_such_peer' in bench.said(rows[0])['note']

def test_the_lines_that_were_asked_for():
    names = 'contrast contrast_large segmentation window iou surface store views step switches optimizer order'
    assert list(bench.LINES) == names.split() and len(bench_curves.SERIES) == 7

@pytest.mark.parametrize('name', ['iou', 'surface', 'optimizer', 'order', 'step'])
def test_a_line_on_small_data(monkeypatch, scenes, name, tmp_path):
    "Both sides compute the same where a line says so, and the files appear whole"
    for o in ('monai', 'torchmetrics'): pytest.importorskip(o)
    monkeypatch.setattr(bench_lines, 'scenes', lambda: scenes)
    monkeypatch.setattr(bench_clock, 'in_turns', lambda calls, s: np.array([[bench_clock.clock(f)] for f in calls]))
    found = list(bench.rows(name, tell=lambda s: None))
    text = bench.markdown(bench.machine() | dict(seconds=1), found)
    bench.write(tmp_path, 'bench', bench.machine(), dict(rows=found), text)
    assert json.loads((tmp_path/'bench.json').read_text())['rows'][0]['line'] == name
    assert found[0]['what'] in (tmp_path/'bench.md').read_text(encoding='utf-8')
    note = found[0]['note']
    assert 'DIFFERENT' not in note
    for o in re.findall('difference (.*)', note): assert float(o) < 1e-5

@pytest.mark.slow
def test_every_part_for_a_gpu_runs_on_the_cpu(tmp_path):
    out = tmp_path/'gpu.json'
    call = [sys.executable, '-W', 'ignore', root/'tools'/'gpu.py', '--smoke', '--out', out]
    p = subprocess.run(call, capture_output=True, text=True, cwd=tmp_path)
    assert p.returncode == 0, p.stdout + p.stderr
    found = json.loads(out.read_text())
    assert set(found) == {'machine', *gpu.PARTS}
    parity = {k: v for k,v in found['parity'].items() if k != 'part_seconds'}
    assert all(v['float64'] == 0 and v['ieee'] < 1e-4 for v in parity.values())
    assert all(v['bf16'] < .1 for k,v in parity.items() if k != 'step')
    assert found['determinism']['deterministic=True'] == dict(again=0, resumed=0)
    assert found['training']['steps'] == 26 and found['training']['iou'] > 0

def run_parts(monkeypatch, tmp_path, seconds=9., **found):
    "Run these functions as parts; returns what the file held after each, and at the end"
    monkeypatch.setattr(gpu, 'PARTS', {k: (.2, f) for k,f in found.items()})
    held = []
    b = gpu.Bench(torch.device('cpu'), False, tmp_path)
    out = tmp_path/'a.json'
    gpu.run_all(b, out, seconds, None, lambda s: held.append(json.loads(out.read_text())))
    return held

def test_no_part_is_stopped_while_the_script_tests_itself(tmp_path, monkeypatch):
    monkeypatch.setattr(gpu, 'PARTS', dict(long=(.05, lambda b, found: time.sleep(.2))))
    b = gpu.Bench(torch.device('cpu'), True, tmp_path)
    gpu.run_all(b, tmp_path/'a.json', 60., None, str)
    assert set(b.found['long']) == {'part_seconds'}

def test_a_part_that_fails_or_takes_too_long_does_not_end_the_others(monkeypatch, tmp_path):
    def fails(b, found):
        found['half'] = 1
        raise ValueError('no')
    def hangs(b, found):
        while True: time.sleep(.01)
    def works(b, found): found['x'] = 2
    first,second,last = run_parts(monkeypatch, tmp_path, fails=fails, hangs=hangs, works=works)
    assert first['fails']['half'] == 1 and 'ValueError: no (test_bench.py' in first['fails']['error']
    assert 'stopped after 0 s' in second['hangs']['error'] and 'works' not in second
    assert last['works']['x'] == 2

def test_no_part_begins_when_the_time_is_over(monkeypatch, tmp_path):
    held = run_parts(monkeypatch, tmp_path, seconds=1., works=lambda b, found: found.update(x=2))
    assert held[-1]['works'] == dict(error='no time left')

def measured_card(ms, reserved): return dict(ms=ms, reserved=reserved*1e9)

def test_cost_of_both_tables():
    "A card takes the fastest step that it has room for; twice the time of a step, twice the hours"
    speed = {f'{m} {k}': measured_card(ms, gb) for m in ('random', 'dcl+cls', 'simclr')
        for k,ms,gb in (('bf16 NHWC', 50, 20), ('bf16 NHWC compiled', 25, 30))}
    found = dict(machine=dict(device='cuda', name='a card'), speed=speed)
    assert gpu_cost.fastest(speed, 'simclr', 24) == (50, 'simclr bf16 NHWC')
    assert gpu_cost.fastest(speed, 'simclr', 40) == (25, 'simclr bf16 NHWC compiled')
    rows = [o.split('|') for o in gpu_cost.cost_table(found).splitlines()[-3:]]
    hours = [float(o[2]) for o in rows]
    assert hours[0] == pytest.approx(2*hours[1], abs=.15) and hours[1] == hours[2]
    speed['simclr bf16 NHWC'] = measured_card(50, 28)
    assert 'does not fit' in gpu_cost.cost_table(found)
    speed['simclr bf16 NHWC recomputed'] = measured_card(70, 15)
    first = gpu_cost.cost_table(found).splitlines()[-3]
    assert 'does not fit' not in first and 'simclr bf16 NHWC recomputed' in first, 'what is computed twice fits again'

def test_the_demo_is_quoted_with_its_spread(monkeypatch, tmp_path):
    "Three seeds each, written down one by one; half the seconds are twice as fast"
    monkeypatch.setattr(bench_demo, 'scenes', lambda: None)
    monkeypatch.setattr(bench_demo, 'clock', lambda f, wall: f() or 10.)
    where = dict(date='2020-01-01')
    scores = iter((.6, .7, .8, .5, .6, .7))
    monkeypatch.setattr(bench_demo, 'KINDS', dict.fromkeys(('ours', 'plain'), lambda r: next(scores)))
    assert '--demo ours' in bench_demo.demo_row(tmp_path)['skipped']
    bench_demo.measure_demo('ours', tmp_path, where, tell=str)
    assert '--demo plain' in bench_demo.demo_row(tmp_path)['skipped']
    monkeypatch.setattr(bench_demo, 'clock', lambda f, wall: f() or 20.)
    bench_demo.measure_demo('plain', tmp_path, where, tell=str)
    row = bench_demo.demo_row(tmp_path)
    assert (row['ratio'], row['share'], row['repetitions']) == (2, .75, 3)
    assert row['note'] == 'test IoU ours 0.700 ± 0.100, plain 0.600 ± 0.100; measured on 2020-01-01 by --demo'
    assert bench.said(dict(line='demo', **row))['ratio'] == '2.00 × faster'
