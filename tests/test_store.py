"""The store under fire: killed writers, rival drivers, readers during writes, hostile values, unwritable places.

The tests run on SQLite, and on PostgreSQL too where LLPROBE_TEST_POSTGRES holds a URL such as
postgresql+psycopg://user@127.0.0.1/llprobe (each test works in a schema of its own).
"""
import contextlib, multiprocessing, os, random, shutil, signal, socket, sqlite3, subprocess, sys, tempfile, time
from pathlib import Path
import numpy as np, pytest, sqlalchemy as sa
from hypothesis import HealthCheck, given, settings, strategies as st
from llprobe.core import InputError
from llprobe.store import METADATA, SCHEMA_VERSION, Store, open_store, storable_text

fork = multiprocessing.get_context('fork') # a child starts in milliseconds, so that many can be killed
CONFIGS = [dict(learning_rate=10.**-n, width=2**n, optimizer='sgd', nesterov=bool(n % 2)) for n in range(1, 9)]
POSTGRES = os.environ.get('LLPROBE_TEST_POSTGRES')

def postgres_schema(name):
    "A URL whose tables live in a fresh schema"
    engine = sa.create_engine(POSTGRES, isolation_level='AUTOCOMMIT')
    with engine.connect() as connection:
        connection.execute(sa.text(f'DROP SCHEMA IF EXISTS {name} CASCADE'))
        connection.execute(sa.text(f'CREATE SCHEMA {name}'))
    engine.dispose()
    return sa.make_url(POSTGRES).update_query_dict(dict(options=f'-csearch_path={name}')).render_as_string(hide_password=False)

@pytest.fixture(params=['sqlite', pytest.param('postgresql', marks=pytest.mark.skipif(not POSTGRES, reason='LLPROBE_TEST_POSTGRES is not set'))])
def fresh(request, tmp_path):
    "Gives the place of an empty database at each call"
    def place(n=iter(range(1000))):
        return str(tmp_path/f'study{next(n)}.db') if request.param == 'sqlite' else postgres_schema(f'test_{os.getpid()}_{next(n)}')
    return place

def make_record(n, ids, n_epochs=20, n_responses=60):
    "The n-th probe of the tests' study, a function of n alone"
    value = random.Random(n).random
    return dict(config_id=ids[n % 8], config=CONFIGS[n % 8], level=(.1, .2, .4)[n//8 % 3], seed=n//24, purpose='probe',
        status='ok', n_epochs=n_epochs, n_samples=128, val_score=value(), val_loss=value(), test_score=None, test_loss=None,
        train_samples=128*n_epochs, forward_samples=n_responses*64., seconds=value(), error=None,
        curve=[dict(epoch=e, train_loss=value(), val_loss=value(), val_score=value(), gradient_norm=value(), seconds=value())
               for e in range(n_epochs)],
        responses=[dict(kind='gaussian', radius=.1*(r//8), direction=r % 8, sample=('train', 'val')[r % 2], loss=value(),
                        accuracy=value(), margin=None, confidence=float('nan') if r % 3 else value()) for r in range(n_responses)])

def same(a, b):
    "Equality to which NaN equals NaN"
    if isinstance(a, dict) and isinstance(b, dict): return a.keys() == b.keys() and all(same(a[k], b[k]) for k in a)
    if isinstance(a, list) and isinstance(b, list): return len(a) == len(b) and all(map(same, a, b))
    return a == b and (a is None) == (b is None) or (isinstance(a, float) and isinstance(b, float) and a != a and b != b)

def number_of(record, ids): return ids.index(record['config_id'])+8*(.1, .2, .4).index(record['level'])+24*record['seed']

def begin(where):
    store = open_store(where)
    store.create_study('s', dict(levels=[.1, .2, .4]), space=dict(width=[2, 4]))
    return store, store.add_configs('s', CONFIGS)

def in_child(function, *arguments):
    "Run `function(connection, *arguments)` in a child process; gives the process and our end of the pipe"
    ours, theirs = fork.Pipe()
    process = fork.Process(target=function, args=(theirs, *arguments), daemon=True)
    process.start()
    theirs.close()
    return process, ours

def drive(pipe, where, until):
    "A driver: takes the lock, resumes, tells each number after its probe was committed"
    store, ids = begin(where)
    with store.lock('s'):
        done = {number_of(r, ids) for r in store.probes('s')}
        for n in range(until):
            if n in done: continue
            store.add_probe('s', make_record(n, ids))
            pipe.send(n)
    store.close()

def received(pipe):
    "All that a killed child managed to send whole"
    with contextlib.suppress(EOFError, OSError):
        while pipe.poll(): yield pipe.recv()

def check_sqlite(where):
    if '://' in where or not Path(where).exists(): return
    with contextlib.closing(sqlite3.connect(where)) as connection:
        assert connection.execute('PRAGMA integrity_check').fetchone() == ('ok',)
        assert not connection.execute('PRAGMA foreign_key_check').fetchall()

# ---- crashes

def test_killed_at_any_moment_every_probe_is_whole_or_absent(fresh):
    where, rng, told, ids = fresh(), random.Random(0), set(), None
    kills = 0
    while kills < 40 or len(told) <= 40 and kills < 400: # a slow machine commits less between two kills
        kills += 1
        process, pipe = in_child(drive, where, 10_000)
        time.sleep(rng.uniform(.02, .15))
        os.kill(process.pid, signal.SIGKILL)
        process.join()
        told |= set(received(pipe))
        check_sqlite(where)
        with open_store(where) as store: # the lock is free at once, without a wait
            store.create_study('s', dict(levels=[.1, .2, .4]), space=dict(width=[2, 4]))
            ids = store.add_configs('s', CONFIGS)
            with store.lock('s', wait=0 if store.path else 5): records = store.probes('s')
        numbers = {number_of(r, ids) for r in records}
        assert told <= numbers and len(records) == len(numbers) # what was told to be committed is there, once
        assert all(same(r, make_record(number_of(r, ids), ids)) for r in records)
    assert len(told) > 40

def test_killed_while_the_database_is_made(fresh):
    rng = random.Random(1)
    for _ in range(20):
        where = fresh()
        process, pipe = in_child(drive, where, 1)
        time.sleep(rng.uniform(0, .04))
        os.kill(process.pid, signal.SIGKILL)
        process.join()
        check_sqlite(where)
        store, ids = begin(where)
        store.add_probe('s', make_record(0, ids))
        assert same(store.probes('s'), [make_record(0, ids)])
        store.close()

def test_a_probe_that_cannot_be_written_whole_leaves_no_trace(fresh):
    store, ids = begin(fresh())
    record = make_record(0, ids)
    with pytest.raises(InputError, match='refuses this'): store.add_probe('s', record | dict(curve=record['curve']+record['curve'][:1]))
    with pytest.raises(InputError, match='no column sharpness'): store.add_probe('s', record | dict(responses=[dict(record['responses'][0], sharpness=1.)]))
    assert store.probes('s') == [] and store.response_frame('s').empty
    assert store.add_probe('s', record)

# ---- drivers and readers

def hold(pipe, where, name):
    with open_store(where) as store, store.lock(name):
        pipe.send('held')
        pipe.recv()

def test_a_second_driver_fails_clearly_or_waits(fresh):
    where = fresh()
    begin(where)[0].close()
    process, pipe = in_child(hold, where, 's')
    assert pipe.recv() == 'held'
    store = open_store(where)
    with pytest.raises(InputError, match=f"study 's' is being driven by process {process.pid} on {socket.gethostname()}"):
        with store.lock('s'): pass
    start = time.monotonic()
    with pytest.raises(InputError, match='being driven'):
        with store.lock('s', wait=.3): pass
    assert .3 <= time.monotonic()-start < 3
    with store.lock('other study'): pass # each study has its own
    assert len(store.studies()) == 1 # readers need no lock
    pipe.send('end')
    with store.lock('s', wait=True): pass
    process.join()

def test_a_lock_is_free_when_its_block_raises(fresh):
    store, _ = begin(fresh())
    with pytest.raises(RuntimeError):
        with store.lock('s'): raise RuntimeError
    with store.lock('s'): pass

HOLDER = '''
import subprocess, sys, time
from llprobe.store import open_store
with open_store(sys.argv[1]).lock('s'):
    child = subprocess.Popen(['sleep', '60'], close_fds=False)
    print(child.pid, flush=True)
    time.sleep(60)
'''
def test_a_worker_that_outlives_its_driver_does_not_hold_the_lock(tmp_path):
    where = tmp_path/'study.db'
    holder = subprocess.Popen([sys.executable, '-c', HOLDER, where], stdout=subprocess.PIPE, text=True)
    worker = int(holder.stdout.readline())
    holder.kill()
    holder.wait()
    try:
        os.kill(worker, 0) # it lives
        with open_store(where).lock('s'): pass
    finally: os.kill(worker, signal.SIGKILL)

def test_readers_see_whole_probes_while_a_driver_writes(fresh):
    where = fresh()
    store, ids = begin(where)
    process, pipe = in_child(drive, where, 150)
    counts, reader = [], open_store(where, read_only=True)
    while process.is_alive():
        records = reader.probes('s')
        assert all(same(r, make_record(number_of(r, ids), ids)) for r in records)
        frame = reader.response_frame('s')
        assert len(frame) % 60 == 0 and len(frame) >= 60*len(records)
        counts.append(len(records))
    process.join()
    assert process.exitcode == 0 and counts == sorted(counts) and len(reader.probes('s')) == 150

def test_two_studies_in_one_database_with_a_driver_each(fresh):
    where = fresh()
    begin(where)[0].close()
    def other(pipe):
        with open_store(where) as store:
            store.create_study('t', {})
            ids = store.add_configs('t', CONFIGS)
            with store.lock('t'):
                for n in range(60): store.add_probe('t', make_record(n, ids))
    children = [in_child(drive, where, 60)[0], in_child(other)[0]]
    for child in children: child.join()
    assert [child.exitcode for child in children] == [0, 0]
    assert list(open_store(where).studies()['n_probes']) == [60, 60]

def test_many_processes_make_the_same_database_at_once(fresh):
    where = fresh()
    def make(pipe): begin(where)
    children = [in_child(make)[0] for _ in range(6)]
    for child in children: child.join()
    assert [child.exitcode for child in children] == [0]*6
    with open_store(where) as store: assert store.configs('s') == CONFIGS and len(store.studies()) == 1

# ---- round trips

real = st.floats(allow_nan=True, allow_infinity=True, width=64)
maybe = st.none() | real
words = st.text(max_size=40) | st.sampled_from(['', "'; DROP TABLE probe; --", '"quoted" \\ %s :name ?', 'naïve 深度 🧪', '\udcff\0', 'x'*2_000_000])
curves = st.lists(st.fixed_dictionaries({k: maybe for k in ('train_loss', 'val_loss', 'val_score', 'gradient_norm', 'seconds')}), max_size=4)
responses = st.lists(st.fixed_dictionaries(dict(kind=st.sampled_from(['gaussian', 'sam']), radius=st.floats(0, 10),
    direction=st.none() | st.integers(0, 9), sample=st.sampled_from(['train', 'val']), loss=maybe, accuracy=maybe, margin=maybe, confidence=maybe)), max_size=4)
heads = st.fixed_dictionaries(dict(level=st.floats(0, 1, exclude_min=True), seed=st.integers(0, 2**63-1), purpose=st.sampled_from(['probe', 'final']),
    status=st.sampled_from(['ok', 'diverged', 'crashed']), n_epochs=st.none() | st.integers(0, 2**31-1), n_samples=st.none() | st.integers(0, 2**31-1),
    train_samples=st.none() | st.integers(0, 2**63-1), error=st.none() | words,
    **{k: maybe for k in ('val_score', 'val_loss', 'test_score', 'test_loss', 'forward_samples', 'seconds')}))
values = st.none() | st.booleans() | st.integers(-2**40, 2**40) | real | words.filter(lambda w: len(w) < 100)
hypers = st.dictionaries(st.text(max_size=8), values | st.lists(values, max_size=3), max_size=4)

def test_records_come_back_as_they_went_in(fresh):
    store = open_store(fresh())

    @settings(max_examples=80, deadline=None, suppress_health_check=[HealthCheck.too_slow, HealthCheck.data_too_large])
    @given(hypers, hypers, st.lists(st.tuples(heads, curves, responses), max_size=3, unique_by=lambda r: [r[0][k] for k in ('level', 'seed', 'purpose')].__str__()))
    def check(study_settings, config, drawn):
        name = f'study {len(store.studies())}'
        store.create_study(name, study_settings)
        assert same(store.study(name)['settings'], study_settings)
        config_id, = store.add_configs(name, [config])
        assert same(store.configs(name), [config])
        records = [dict(config_id=config_id, config=config, **head, curve=[dict(epoch=e, **row) for e, row in enumerate(rows)], responses=parts)
                   for head, rows, parts in drawn]
        for record in records: assert store.add_probe(name, record)
        for record in records: # the first stays; a full training that awaits its test would give way to a crash, which is tested elsewhere
            awaits = record['purpose'] == 'final' and record['status'] != 'crashed' and record['test_score'] is None
            assert not store.add_probe(name, record | dict(status=record['status'] if awaits else 'crashed', val_loss=1., curve=[]))
        wanted = [r | dict(error=r['error'] and storable_text(r['error'])) for r in sorted(records, key=lambda r: (r['level'], r['seed'], r['purpose']))]
        assert same(store.probes(name), wanted)
        assert len(store.probe_frame(name)) == len(records)
    check()

def test_the_order_of_probes_is_that_of_the_design(fresh):
    numbers, found = list(range(48)), []
    for seed in range(3):
        store, ids = begin(fresh())
        for n in random.Random(seed).sample(numbers, 48): store.add_probe('s', make_record(n, ids, 1, 1))
        found.append(store.probes('s'))
        frames = [store.probe_frame('s'), store.curve_frame('s'), store.response_frame('s')]
        for frame in frames: assert list(zip(frame.config_id, frame.level, frame.seed)) == [(r['config_id'], r['level'], r['seed']) for r in found[-1]]
    assert same(found[0], found[1]) and same(found[0], found[2])
    assert [ids.index(r['config_id']) for r in found[0]] == sorted(n % 8 for n in numbers)

def test_reading_takes_a_fixed_number_of_queries(fresh):
    store, ids = begin(fresh())
    for n in range(30): store.add_probe('s', make_record(n, ids, 2, 2))
    selects = []
    sa.event.listen(sa.Engine, 'before_cursor_execute', listener := lambda c, cursor, statement, *rest: selects.append(statement))
    try: store.probes('s')
    finally: sa.event.remove(sa.Engine, 'before_cursor_execute', listener)
    assert sum(s.startswith('SELECT') for s in selects) <= 4

def test_numpy_scalars_are_cast(fresh):
    store, ids = begin(fresh())
    record = make_record(0, ids, 1, 1) | dict(level=np.float64(.1), seed=np.int64(0), val_loss=np.float32(.5), n_epochs=np.int32(1), test_loss=np.float64('nan'))
    store.add_probe('s', record)
    (found,) = store.probes('s')
    assert type(found['val_loss']) is float and type(found['n_epochs']) is int and np.isnan(found['test_loss'])
    config = dict(width=np.int64(3), dropout=np.float64(.5), nesterov=np.bool_(True))
    assert store.add_configs('s', [config]) == store.add_configs('s', [dict(width=3, dropout=.5, nesterov=True)])
    assert store.configs('s')[-1] == dict(width=3, dropout=.5, nesterov=True)

def test_frames(fresh):
    store, ids = begin(fresh())
    assert store.probe_frame('s').empty and store.curve_frame('s').empty and store.predictions('s').empty
    clash = dict(seed=7, momentum=.9)
    ids += store.add_configs('s', [clash])
    store.add_probe('s', make_record(0, ids))
    store.add_probe('s', make_record(1, ids) | dict(config_id=ids[-1], config=clash, status='diverged', val_loss=float('inf'), val_score=None))
    frame = store.probe_frame('s')
    assert list(frame.seed) == [0, 0] and frame.config_seed[1] == 7 and np.isnan(frame.learning_rate[1])
    assert frame.val_loss[1] == np.inf and frame.test_loss.dtype == 'float64' and frame.position.tolist() == [0, 8]
    assert len(store.curve_frame('s')) == 40 and store.response_frame('s').margin.dtype == 'float64'
    rows = [dict(config_id=i, stage=0, level=1., mean=.5, std=float('nan')) for i in ids[:3]]
    for told in (rows, [r | dict(mean=.1) for r in rows], [r | dict(stage=1) for r in rows[:1]]): store.add_predictions('s', told)
    assert list(store.predictions('s')['mean']) == [.5]*4 and list(store.predictions('s').stage) == ['0', '0', '0', '1']

# ---- mistakes

def test_another_study_under_the_same_name_is_refused(fresh):
    store = open_store(fresh())
    space = dict(hyperparameters=dict(width=dict(low=8, high=64)))
    first = store.create_study('x', dict(levels=[.1, .2], n_epochs=5, seed=0), dataset='digits', fingerprint='aa', space=space)
    assert first == store.create_study('x', dict(seed=0, n_epochs=np.int64(5), levels=(.1, .2)), dataset='/data/digits', fingerprint='aa', space=space,
                                       versions=dict(torch='3'))
    with pytest.raises(InputError) as error:
        store.create_study('x', dict(levels=[.1], n_epochs=5, momentum=.9), fingerprint='bb', space=dict(hyperparameters=dict(width=dict(low=8, high=32))))
    for part in ("study 'x' was begun with", 'levels [0.1, 0.2], now [0.1]', 'seed 0, now unset', 'momentum unset, now 0.9', "fingerprint 'aa', now 'bb'",
                 'space.hyperparameters.width.high 64, now 32', 'choose another name or folder'): assert part in str(error.value)
    assert 'n_epochs' not in str(error.value)
    for name in ('', '  ', 'a\nb', 'a\0'):
        with pytest.raises(InputError, match='printable'): store.create_study(name, {})
    with pytest.raises(InputError, match="no study 'y': it has 'x'"): store.probes('y')
    with pytest.raises(InputError, match='no study 99'): store.probes(99)

def test_wrong_records_are_refused(fresh):
    store, ids = begin(fresh())
    record = make_record(0, ids)
    for change, words in ((dict(status='fine'), 'status is one of ok, diverged, crashed'), (dict(purpose='x'), 'purpose is one of probe, final'),
                          (dict(config_id='0'*16), 'refuses this'), (dict(level=None), 'refuses this'), (dict(n_epochs=2.5), 'probe.n_epochs cannot be 2.5'),
                          (dict(val_los=.1), 'no column val_los')):
        with pytest.raises(InputError, match=words): store.add_probe('s', record | change)
    assert store.probes('s') == []

def damaged(path):
    "Overwrite the middle of the file"
    data = bytearray(path.read_bytes())
    data[4096*2:] = os.urandom(len(data)-4096*2)
    path.write_bytes(data)

def test_what_cannot_be_opened(tmp_path):
    place = tmp_path/'study.db'
    with pytest.raises(InputError, match='no study database'): open_store(place, create=False)
    with pytest.raises(InputError, match='no study database'): open_store(place, read_only=True)
    assert not place.exists()
    (tmp_path/'text.db').write_text('hello '*500)
    (tmp_path/'short.db').write_text('hello')
    for name in ('text.db', 'short.db'):
        before = (tmp_path/name).read_bytes()
        with pytest.raises(InputError, match='not an llprobe database'): open_store(tmp_path/name)
        assert (tmp_path/name).read_bytes() == before
    with contextlib.closing(sqlite3.connect(tmp_path/'foreign.db')) as connection: connection.execute('CREATE TABLE trials (x)')
    before = (tmp_path/'foreign.db').read_bytes()
    with pytest.raises(InputError, match='not an llprobe database.*trials'): open_store(tmp_path/'foreign.db')
    assert (tmp_path/'foreign.db').read_bytes() == before
    with pytest.raises(InputError, match='is a folder'): open_store(tmp_path)
    with pytest.raises(InputError, match='cannot open'): open_store(tmp_path/'text.db'/'study.db')
    for url in ("sqlite://", ""):
        with pytest.raises(InputError, match='file'): open_store(url)
    with pytest.raises(InputError, match='nosuch'): open_store('nosuch://x/y')
    with pytest.raises(InputError): open_store('postgresql://user:secret@127.0.0.1:1/x')
    with pytest.raises(InputError) as error: open_store('postgresql://user:secret@h:port/x')
    assert 'secret' not in str(error.value)

def test_damage_is_said_in_one_sentence(tmp_path):
    store, ids = begin(tmp_path/'study.db')
    for n in range(20): store.add_probe('s', make_record(n, ids))
    store.close()
    damaged(tmp_path/'study.db')
    with pytest.raises(InputError, match='damaged'): open_store(tmp_path/'study.db').probes('s')
    (tmp_path/'study.db').write_bytes((tmp_path/'study.db').read_bytes()[:5000])
    with pytest.raises(InputError, match='damaged'): open_store(tmp_path/'study.db').probes('s')

def test_a_missing_table_is_said_in_one_sentence(tmp_path):
    begin(tmp_path/'study.db')[0].close()
    engine = sa.create_engine(f'sqlite:///{tmp_path/"study.db"}')
    with engine.begin() as connection: connection.execute(sa.text('drop table probe'))
    engine.dispose()
    with pytest.raises(InputError, match='damaged .no such table'): open_store(tmp_path/'study.db').probes('s')

def test_an_older_schema_is_refused(fresh):
    store, _ = begin(where := fresh())
    with store._begin(write=True) as connection: connection.execute(sa.update(METADATA.tables['schema_version']).values(version=SCHEMA_VERSION-1))
    store.close()
    for read_only in (False, True):
        with pytest.raises(InputError, match=f'an older llprobe .schema {SCHEMA_VERSION-1}, this one knows {SCHEMA_VERSION}.*begin the study again') as error:
            open_store(where, read_only=read_only)
        assert len(str(error.value).splitlines()) == 1

def test_a_newer_schema_is_refused(fresh):
    where = fresh()
    store, _ = begin(where)
    with store._begin(write=True) as connection: connection.execute(sa.update(METADATA.tables['schema_version']).values(version=SCHEMA_VERSION+1))
    store.close()
    for read_only in (False, True):
        with pytest.raises(InputError, match=f'newer llprobe .schema {SCHEMA_VERSION+1}'): open_store(where, read_only=read_only)

def as_nobody(pipe, function):
    if os.getuid() == 0: os.setgroups([]); os.setgid(65534); os.setuid(65534)
    try: pipe.send(function())
    except BaseException as error: pipe.send(error)

def test_places_that_cannot_be_written():
    folder = Path(tempfile.mkdtemp())
    try:
        store, ids = begin(folder/'study.db')
        store.add_probe('s', make_record(0, ids))
        store.close()
        for lock in folder.glob('*.lock'): lock.unlink()
        (folder/'study.db').chmod(0o444)
        folder.chmod(0o555)
        def ask(function):
            process, pipe = in_child(as_nobody, function)
            answer = pipe.recv()
            process.join()
            return answer
        assert same(ask(lambda: open_store(folder/'study.db', read_only=True).probes('s')), [make_record(0, ids)])
        for where in ('study.db', 'new.db', 'deeper/new.db'):
            error = ask(lambda: open_store(folder/where))
            assert isinstance(error, InputError) and str(folder) in str(error), error
        assert sorted(p.name for p in folder.iterdir()) == ['study.db']
    finally:
        folder.chmod(0o755)
        shutil.rmtree(folder)

def test_a_read_only_store_never_writes(fresh):
    where = fresh()
    store, ids = begin(where)
    store.add_probe('s', make_record(0, ids))
    store.close()
    reader = open_store(where, read_only=True)
    assert len(reader.probes('s')) == 1
    for write in (lambda: reader.add_probe('s', make_record(1, ids)), lambda: reader.create_study('t', {}), lambda: reader.add_configs('s', [{}]),
                  lambda: reader.lock('s').__enter__()):
        with pytest.raises(InputError, match='read-only'): write()

def test_paths_with_hostile_names(tmp_path):
    for name in ('a b?mode=memory.db', 'x#y%20.db', "quo'te.db", 'ünï/深.db'):
        store, ids = begin(tmp_path/name)
        store.add_probe('s', make_record(0, ids))
        assert (tmp_path/name).stat().st_size
        with open_store(f'sqlite:///{tmp_path/"url.db"}') as other: assert isinstance(other, Store) and other.path == tmp_path/'url.db'
