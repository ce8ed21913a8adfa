"Files that appear whole, say what is wrong with the disk, and know what they should hold"
import errno, json, os, pytest, torch
from pathlib import Path
from safetensors import SafetensorError
from safetensors.torch import save_file
from cwcl.core import InputError
from cwcl.whole import DamagedFile, atomic_path, check_seal, digest, lacks_memory, read_json, read_tensors, save_tensors
from cwcl.whole import sealed, sweep_parts, write_text

def names(folder): return sorted(o.name for o in folder.iterdir())

@pytest.mark.parametrize('sync', [False, True])
def test_whole_files(tmp_path, sync):
    path = tmp_path/'new'/'a.txt'
    with atomic_path(path, sync) as p: p.write_text('1')
    with pytest.raises(ZeroDivisionError), atomic_path(path, sync) as p:
        p.write_text('2')
        1/0
    assert path.read_text() == '1' and names(path.parent) == ['a.txt']

@pytest.mark.parametrize('write', ['text', 'tensors'])
def test_a_file_is_on_the_disk_before_it_gets_its_name_and_its_folder_after(tmp_path, monkeypatch, write):
    done,opened = [],{}
    sync,move,open_file = os.fsync,os.replace,os.open
    def opening(path, *args):
        fd = open_file(path, *args)
        opened[fd] = Path(path)
        return fd
    def syncing(fd): done.append(('fsync', opened[fd])) or sync(fd)
    def moving(a, b): done.append(('replace', Path(b))) or move(a, b)
    for k,f in dict(open=opening, fsync=syncing, replace=moving).items(): monkeypatch.setattr(os, k, f)
    path = tmp_path/'a'
    if write == 'text': write_text(path, '1', sync=True)
    else: save_tensors(path, {'a': torch.zeros(1)}, {})
    assert [k for k,_ in done] == ['fsync', 'replace', 'fsync']
    (_,part),(_,there),(_,folder) = done
    assert part.name.endswith('.part.a') and there == path and folder == tmp_path
    done.clear()
    write_text(path, '2')
    assert [k for k,_ in done] == ['replace'], 'who does not ask need not wait'

def test_two_writers_of_one_file_do_not_meet(tmp_path):
    with atomic_path(tmp_path/'a') as p, atomic_path(tmp_path/'a') as q:
        p.write_text('1')
        q.write_text('2')
        assert p != q
    assert (tmp_path/'a').read_text() == '1' and names(tmp_path) == ['a']

DISK = dict(ENOSPC='disk is full', EDQUOT='quota', EROFS='read-only', EIO='reports an error', EFBIG='too large',
    ESTALE='vanished')
PLACE = dict(EACCES='may not write', EPERM='may not write', ENOENT='vanished', ENOTDIR='a file is where',
    EISDIR='a folder has this name', EXDEV='two disks', EBUSY='may not write', ENAMETOOLONG='too long')

@pytest.mark.parametrize('where', ['block', 'rename', 'first'])
@pytest.mark.parametrize('name', [*DISK, *PLACE])
def test_what_the_disk_says_is_one_line_with_a_cure(tmp_path, monkeypatch, name, where):
    number = getattr(errno, name)
    file = tmp_path/'a.txt'
    file.write_text('old')
    def fail(*args, **kwargs): raise OSError(number, os.strerror(number))
    says = {**DISK, **PLACE}[name]
    with monkeypatch.context() as m, pytest.raises(InputError, match=f'a.txt: cannot be written: .*{says}.*; ') as e:
        if where == 'rename': m.setattr(os, 'replace', fail)
        if where == 'first': m.setattr('cwcl.whole.Path.touch', fail)
        with atomic_path(file) as p:
            p.write_text('new')
            if where == 'block': fail()
    assert '\n' not in str(e.value) and file.read_text() == 'old' and names(tmp_path) == ['a.txt']

def test_an_error_about_another_file_keeps_its_name(tmp_path):
    with pytest.raises(FileNotFoundError, match='frame.png'), atomic_path(tmp_path/'a.txt'): open(tmp_path/'frame.png')
    with pytest.raises(InputError, match='^mine$'), atomic_path(tmp_path/'a.txt'): raise InputError('mine')

@pytest.mark.skipif(not hasattr(os, 'geteuid') or not os.geteuid(), reason='who is root may write everywhere')
def test_a_folder_that_may_not_be_written_to(tmp_path):
    tmp_path.chmod(0o500)
    with pytest.raises(InputError, match='may not write there'), atomic_path(tmp_path/'a.txt') as p: p.write_text('1')

def test_a_file_in_the_place_of_a_folder(tmp_path):
    (tmp_path/'a').write_text('1')
    says = 'a file is where its folder should be'
    with pytest.raises(InputError, match=says), atomic_path(tmp_path/'a'/'b') as p: p.write_text('1')

def test_safetensors_says_it_in_its_own_way(tmp_path):
    def fail(text): raise SafetensorError(text)
    for number,says in ((28, 'disk is full'), (30, 'read-only')):
        with pytest.raises(InputError, match=says), atomic_path(tmp_path/'a'): fail(f'I/O error: X (os error {number})')
    with pytest.raises(SafetensorError, match='invalid header'), atomic_path(tmp_path/'a'): fail('invalid header')

def test_parts_of_killed_processes_are_swept(tmp_path):
    for o in ('.0a1b2c3d.part.a.txt', 'a.txt', '.hidden', 'below/.ffffffff.part.b'):
        (tmp_path/o).parent.mkdir(exist_ok=True)
        (tmp_path/o).touch()
    assert sweep_parts(tmp_path) == 2 and names(tmp_path) == ['.hidden', 'a.txt', 'below']

# Digests

TENSORS = dict(a=torch.arange(6.).reshape(2, 3), b=torch.tensor(True), c=torch.zeros(0), d=torch.ones(3).bfloat16())

def changed(**kwargs): return TENSORS | kwargs

@pytest.mark.parametrize('other', [changed(a=TENSORS['a'].reshape(3, 2)), changed(b=torch.tensor(False)),
    changed(c=torch.zeros(0, 2)), changed(d=torch.ones(3).half()), changed(a=TENSORS['a'].nextafter(torch.tensor(9.))),
    {k: v for k,v in TENSORS.items() if k != 'c'}, changed(a=-TENSORS['a'])], ids=range(7))
def test_every_difference_changes_the_digest(other): assert digest({}, other) != digest({}, TENSORS)

def test_order_and_layout_do_not(tmp_path):
    same = dict(reversed(TENSORS.items()), a=TENSORS['a'].T.contiguous().T)
    assert digest(dict(x=1, y=2), same) == digest(dict(y=2, x=1), TENSORS) != digest(dict(x=1, y=3), TENSORS)

def test_every_flipped_bit_of_a_file_is_seen(tmp_path):
    file = tmp_path/'a.safetensors'
    save_tensors(file, TENSORS, dict(kit='cwcl', recipe='{"seed": 1}'))
    content = file.read_bytes()
    tensors,header = read_tensors(file, 'cure')
    assert all(torch.equal(v, TENSORS[k]) for k,v in tensors.items()) and 'digest' not in header
    unseen = []
    for bit in range(8*len(content)):
        turned = bytearray(content)
        turned[bit//8] ^= 1 << bit%8
        file.write_bytes(turned)
        try:
            found = read_tensors(file, 'cure')
            same = all(found[1].get(k) == v for k,v in header.items()) # The name of the digest itself may be hit
            if not same or digest({}, found[0]) != digest({}, tensors): unseen.append(bit)
        except DamagedFile: pass
    assert not unseen

@pytest.mark.parametrize('content', [b'', b'half', b'\xff'*8 + b'{}', (10**7).to_bytes(8, 'little'), b'PK\3\4'])
def test_what_is_no_safetensors_file(tmp_path, content):
    (tmp_path/'a').write_bytes(content)
    for o in (tmp_path/'a', tmp_path):
        says = f'{o}: not a whole safetensors file .*; the cure$'
        with pytest.raises(DamagedFile, match=says): read_tensors(o, 'the cure')

@pytest.mark.parametrize('e', [OSError(12, 'Cannot allocate memory'), SafetensorError('Cannot allocate memory')],
    ids=['system', 'safetensors'])
def test_a_lack_of_memory_is_no_damage(tmp_path, monkeypatch, e):
    def refused(*args, **kwargs): raise e
    monkeypatch.setattr('cwcl.whole.safe_open', refused)
    with pytest.raises(MemoryError, match='a: .*Cannot allocate'): read_tensors(tmp_path/'a', '')

def test_the_ways_in_which_libraries_say_that_memory_is_short():
    said = ('CUDA out of memory. Tried to allocate 2 GiB', 'cuDNN error: CUDNN_STATUS_ALLOC_FAILED',
        'CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`')
    for o in said: assert lacks_memory(RuntimeError(o))
    assert not lacks_memory(RuntimeError('CUDNN_STATUS_EXECUTION_FAILED'))

def test_a_file_without_a_digest_is_read(tmp_path):
    save_file(TENSORS, tmp_path/'a')
    assert read_tensors(tmp_path/'a', '')[1] == {}

@pytest.mark.parametrize('facts', [dict(a=1.5, b=[None, 'ü', {'3': .1+.2}]), {}, dict(a=float('inf'))])
def test_a_seal_survives_the_file(tmp_path, facts):
    (tmp_path/'a.json').write_text(json.dumps(sealed(facts, dict(seed=1)), indent=1), encoding='utf-8')
    found = read_json(tmp_path/'a.json', 'cure')
    check_seal('a.json', found, 'cure', dict(seed=1))
    for beside in (dict(seed=2), None):
        with pytest.raises(DamagedFile, match='a.json: damaged or edited'): check_seal('a.json', found, 'cure', beside)
    with pytest.raises(DamagedFile): check_seal('a.json', dict(found, more=1), 'cure', dict(seed=1))
    check_seal('a.json', {k: v for k,v in found.items() if k != 'digest'}, 'cure')
    assert sealed(sealed(facts)) == sealed(facts)

@pytest.mark.parametrize('content', [b'', b'{"a": ', b'\xff{}', b'['*100_000, b'1'*5000])
def test_what_is_no_json(tmp_path, content):
    (tmp_path/'a.json').write_bytes(content)
    says = 'a.json: half-written or not JSON .*; cure'
    with pytest.raises(DamagedFile, match=says): read_json(tmp_path/'a.json', 'cure')
