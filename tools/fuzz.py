"Fuzzes what reads a stranger's files and texts: an input must be read rightly, or end in one line of InputError."
import argparse, hashlib, json, multiprocessing, os, random, re, signal, sys, tempfile, time, traceback
import warnings, zlib
from contextlib import nullcontext
from pathlib import Path

root = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(root), str(root/'tests'), str(root/'tools')]

# Texts that have broken parsers
WORDS = ['', ' ', '\0', '\ufeff', '\n', '²', '٣', '\u2028', '\ud800', '"', '=', '../', '**/', '{class}', '(a*)*',
    *'-1 0 1.5 1e999 NaN Infinity 1e30 255 256 9223372036854775808 null true None preset ignore'.split(),
    *'([{\\?|#,;', '{1,99999999999}', '0x' + 'f'*5000, '1' + '0'*300, '9'*5000]
LONG = ['['*200_000, '-'*5000, ','*3000, '"' + 'a'*140_000 + '"']
TOKENS = [o.encode('utf-8', 'surrogatepass') for o in WORDS + LONG] + [b'\xff\xfe', b'PK\5\6', b'\r', b'\xff'*4]
ODD = [None, True, -1, 0, 1, 1.5, 300, 10**6, 2**63, 10**400, float('nan'), float('inf'), [], {}, [[]], [1, 2], *WORDS]

def renode(o, rng):
    "Change a value somewhere in a nest, or in a text that is JSON itself"
    if isinstance(o, str) and o[:1] == '{' and o[1:]: return json.dumps(renode(json.loads(o), rng))
    if not o or not isinstance(o, (dict, list)) or rng.random() < .1: return rng.choice(ODD)
    keys = [*o] if isinstance(o, dict) else range(len(o))
    k, = rng.choices(keys, [len(str(o[k])) + 1 for k in keys])
    if rng.random() < .8: o[k] = renode(o[k], rng)
    else:
        v = o.pop(k)
        if isinstance(o, dict) and rng.random() < .5: o[str(rng.choice(ODD))] = v
    return o

def rejson(data, rng):
    "Change a value of a JSON file, or of the header of a safetensors file"
    at = 8 if data[8:9] == b'{' else 0
    end = at + int.from_bytes(data[:8], 'little') if at else len(data)
    try: said = json.dumps(renode(json.loads(data[at:end]), rng)).encode()
    except (ValueError, RecursionError): return data
    return (len(said).to_bytes(8, 'little') if at else b'') + said + data[end:]

def checked(data):
    "Make the checksums of a PNG right again"
    out = data[:8]
    at = 8
    while at < len(data):
        n = 8 + int.from_bytes(data[at:at+4], 'big')
        out += data[at:at+n] + zlib.crc32(data[at+4:at+n]).to_bytes(4, 'big')
        at += n + 4
    return out

def mutate(data, rng, seeds):
    "Return an input that differs in a few places"
    for _ in range(rng.choice((1, 1, 1, 2, 3, 6))):
        i = rng.randint(0, len(data))
        j = i + 1 + int(rng.expovariate(.1))
        a,b = rng.choice([o.span() for o in re.finditer(rb'[-+.\w]+', data[:99_999])] or [(i, j)])
        start,end = rng.choice([(data[:a], data[b:]), (data[:i], data[i:]), (data[:i], data[j:])])
        middle = rng.choice([b'', rng.choice(TOKENS), bytes([rng.randrange(256)]), data[i:j]*rng.choice((2, 2000))])
        data = rng.choice([lambda: rejson(data, rng), lambda: start + middle + end, lambda: start + middle + end,
            lambda: data[:i], lambda: data[:i] + rng.choice(seeds)[i:]])()[:400_000]
    return checked(data) if data[:4] == b'\x89PNG' and rng.random() < .8 else data

NEVER = {'os.system', 'os.posix_spawn', 'subprocess.Popen', 'pickle.find_class', 'socket.connect'}
seen = []

def watch(event, args):
    "Note what no parser has to do"
    if event in NEVER: seen.append(event)

def peak():
    "Return the most memory in use since the last call, in MB; 0 where the system does not say"
    try:
        found = re.search(r'VmHWM:\s*(\d+)', Path('/proc/self/status').read_text())
        Path('/proc/self/clear_refs').write_text('5')
        return int(found[1])//1000
    except OSError: return 0

class Hang(BaseException):
    "An input took too long"

def trouble(f, data, seconds=10):
    "Return how an input ends, if neither in a value nor in one line of InputError: (kind, where and why)"
    def ring(*_): raise Hang(f'no end after {seconds} s')
    peak()
    before = peak()
    seen.clear()
    signal.signal(signal.SIGALRM, ring)
    signal.alarm(seconds)
    try:
        f(data)
        signal.alarm(0)
        more = peak() - before
        if more > 300: raise MemoryError(f'{more} MB')
        assert not seen, f'forbidden: {seen}'
    except KeyboardInterrupt: raise
    except BaseException as e:
        signal.alarm(0)
        calls = [o for o in traceback.extract_tb(e.__traceback__) if o.filename.startswith(str(root/'cwcl'))]
        what = str(e).split(':')[0] if isinstance(e, AssertionError) else type(e).__name__
        at = ' < '.join(f'{o.name}:{o.lineno}' for o in calls[:-4:-1])
        return f'{what} in {calls[-1].name if calls else f.__name__}',f'{at} {str(e)[:300]}'

def smallest(data, same, seconds=10):
    "Take parts out of an input, halves first, as long as the same happens"
    end = time.time() + seconds
    size = len(data)//2
    while size:
        at = 0
        while at < len(data) and time.time() < end:
            less = data[:at] + data[at+size:]
            if same(less): data = less
            else: at += size
        size //= 2
    return data

def limit_memory(extra):
    "Let this process take so many more bytes of memory"
    import resource
    now = int(re.search(r'VmSize:\s*(\d+)', Path('/proc/self/status').read_text())[1])*1024
    resource.setrlimit(resource.RLIMIT_AS, (now + extra, now + extra))

def hunter(name, f, minutes, out):
    "Return a function that tries an input, keeps the smallest of each kind of find, and ends the process in time"
    found = {}
    last = out/f'{name}-last.bin'
    n = 0
    start = time.time()
    def kind_of(data): return (trouble(f, data) or [''])[0]
    def one(data):
        nonlocal n
        n += 1
        last.write_bytes(data)
        kind,why = trouble(f, data) or ('', '')
        if kind and kind not in found:
            if 'Hang' not in kind: data = smallest(data, lambda o: kind_of(o) == kind)
            kept = out/f'{name}-{hashlib.sha256(kind.encode()).hexdigest()[:8]}.bin'
            kept.write_bytes(data)
            found[kind] = f'\n  {kept.name}: {kind}, {len(data)} bytes: {why}'
        if time.time() < start + 60*minutes: return
        print(f'{name}: {n} inputs, {time.time() - start:.0f} s, {len(found)} finds', *found.values(), flush=True)
        last.unlink()
        os._exit(0)
    return one

def hunt(name, minutes, seed, out):
    "Fuzz a target: by coverage where atheris is installed, and else by chance alone"
    warnings.simplefilter('ignore')
    try: import atheris
    except ImportError: atheris = None
    watched = atheris.instrument_imports(include=['cwcl', 'PIL', 'zipfile']) if atheris else nullcontext()
    with watched: from test_fuzz import TARGETS, home
    f,make = TARGETS[name]
    seeds = make()
    for o in seeds: assert not trouble(f, o), trouble(f, o)
    limit_memory(3*2**30)
    sys.addaudithook(watch)
    one = hunter(name, f, minutes, out)
    rng = random.Random(seed)
    while not atheris: one(mutate(rng.choice(seeds), rng, seeds))
    corpus = home()/'corpus'
    corpus.mkdir()
    for i,o in enumerate(seeds): (corpus/str(i)).write_bytes(o)
    def custom(data, most, seed):
        rng = random.Random(seed)
        if rng.random() < .3: return atheris.Mutate(data, most)
        return mutate(rng.choice([data, rng.choice(seeds)]), rng, seeds)[:most]
    options = '-max_len=400000 -timeout=0 -rss_limit_mb=0 -report_slow_units=999 -verbosity=0'.split()
    atheris.Setup([name, f'-seed={seed+1}', *options, str(corpus)], one, custom_mutator=custom)
    atheris.Fuzz()

def main():
    from test_fuzz import TARGETS
    p = argparse.ArgumentParser(description=__doc__)
    p.add_argument('--only', action='append', choices=TARGETS, help='a target; all if left out')
    p.add_argument('--minutes', type=float, default=1, help='for each target')
    p.add_argument('--seed', type=int, default=0)
    p.add_argument('--out', type=Path, default=Path('runs/fuzz'), help='folder for the finds')
    args = p.parse_args()
    args.out.mkdir(parents=True, exist_ok=True)
    process = multiprocessing.get_context('spawn').Process
    with tempfile.TemporaryDirectory() as tmp:
        os.environ['TMPDIR'] = tmp
        for name in args.only or TARGETS:
            child = process(target=hunt, args=(name, args.minutes, args.seed, args.out.resolve()))
            child.start()
            child.join()
            if child.exitcode: print(f'{name}: DIED ({child.exitcode}) of {args.out}/{name}-last.bin', flush=True)
    return bool(list(args.out.glob('*.bin')))

if __name__ == '__main__': sys.exit(main())
