"Runs that are killed, stopped, damaged, or handed something malicious."
import errno, io, json, multiprocessing as mp, os, pickle, shutil, signal, struct, subprocess, tarfile, time, warnings, zlib
from pathlib import Path
import numpy as np, pytest, torch
from torch import nn
from fastai.vision.all import Callback, EarlyStoppingCallback, GradientAccumulation, Learner, SGD, SaveModelCallback, accuracy, set_seed
import kill
from feature_erosion import store as store_module
from feature_erosion.cli import main
from feature_erosion.data import _unpack, digits_dls, extract, to_uint8
from feature_erosion.experiments import demo
from feature_erosion.evalsets import EvalSets, pattern_sets
from feature_erosion.learner import erosion_learner
from feature_erosion.patterns import ColorSquare, Stripes
from feature_erosion.phases import Phase
from feature_erosion.report import report
from feature_erosion.resume import KeepRun
from feature_erosion.store import RunStore, environment, git_revision, load_folder, pack, save_folder, unpack

def test_ten_kills():
    "`python tests/kill.py 100` is the long version"
    hits = kill.main(10)
    assert sum(hits.values())>=10 and all(hits.values()), hits

def net(): return nn.Sequential(nn.Flatten(), nn.Linear(768,16), nn.BatchNorm1d(16), nn.ReLU(), nn.Linear(16,10))

def fit(folder, name='a', epochs=(2,2), seed=0, cbs=(), lr=.05, pattern=None, ratio=1., bs=32, minutes=0., model=net, **kw):
    set_seed(seed)
    dls = digits_dls(n=160, n_valid=50, bs=bs)
    easy = dls.inject(pattern or ColorSquare(4), ratio=ratio)
    learn = Learner(dls, model(), opt_func=SGD, metrics=accuracy, lr=lr, path=folder)
    with learn.no_bar(), learn.no_logging():
        learn.fit_phases([Phase('pretrain', epochs[0], dls, **kw), Phase('erode', epochs[1], easy), *(Phase('relearn', n, dls) for n in epochs[2:])], cbs=[KeepRun(RunStore(folder).run(name), minutes=minutes), *cbs])
    return learn

def same(a, b): return all(torch.equal(x, y) for x,y in zip(a.model.state_dict().values(), b.model.state_dict().values()))

class Stop(Callback):
    "Raise, or send a signal, at an iteration"
    order,run_valid,passive = 30,False,True
    def __init__(self, at, what): self.at,self.what = at,what
    def after_batch(self):
        if self.learn.train_iter==self.at: self.what()

def boom(e):
    def f(): raise e
    return f

def test_ctrl_c_leaves_a_run_that_goes_on(tmp_path):
    whole = fit(tmp_path/'whole')
    before = signal.getsignal(signal.SIGINT)
    with pytest.raises(KeyboardInterrupt, match="run 'a' stopped after 7 iterations in phase 'pretrain'; start it again"):
        fit(tmp_path, minutes=99, cbs=[Stop(7, lambda: os.kill(os.getpid(), signal.SIGINT))])
    assert signal.getsignal(signal.SIGINT) is before and RunStore(tmp_path)['a'].status=='stopped'
    with pytest.raises(SystemExit): fit(tmp_path, minutes=99, cbs=[Stop(13, lambda: os.kill(os.getpid(), signal.SIGTERM))])
    learn = fit(tmp_path)
    assert same(learn, whole) and learn.recorder.history.equals(whole.recorder.history) and learn.recorder.evals.equals(whole.recorder.evals)
    run = RunStore(tmp_path)['a']
    assert run.status=='finished' and run.history().clean.tolist()==whole.recorder.history.clean.tolist() and len(json.loads((run.path/'environment.json').read_text()))==3

def test_a_finished_run_is_loaded_not_computed(tmp_path):
    first = fit(tmp_path)
    class Never(Callback):
        run_valid,passive = False,True
        def before_batch(self): raise AssertionError('trained again')
    again = fit(tmp_path, cbs=[Never()])
    assert same(first, again) and list(again.snapshots)==['start','pretrain','erode'] and again.recorder.phases.equals(first.recorder.phases)

def test_another_config_is_refused_and_named(tmp_path):
    fit(tmp_path)
    for change,msg in ((dict(lr=.1),'lr: was 0.05, is 0.1'), (dict(epochs=(2,3)),'phases.1.epochs: was 2, is 3'), (dict(seed=1),'seed: was 0, is 1'), (dict(bs=16),'bs: was 32, is 16'),
                       (dict(pattern=ColorSquare(5)),'size: was 4, is 5'), (dict(ratio=.5),'painted: was 160, is 80')):
        with pytest.raises(ValueError, match=msg): fit(tmp_path, **change)
    assert RunStore(tmp_path)['a'].status=='finished'

def test_phases_are_shared_and_only_the_same_ones(tmp_path):
    "Every field changes the key: the second run takes pretrain from the first only if all that led to it is the same"
    seen = []
    class Count(Callback):
        passive = True
        def before_phase(self): seen.append(self.learn.phase.name)
    fit(tmp_path, 'first', cbs=[Count()])
    keys = RunStore(tmp_path)['first'].info['keys']
    seen.clear()
    fit(tmp_path, 'longer', epochs=(2,3), cbs=[Count()])
    assert seen==['erode'] and RunStore(tmp_path)['longer'].info['keys']['pretrain']==keys['pretrain']
    shift = lambda learn: False
    changes = dict(epochs=dict(epochs=(3,2)), seed=dict(seed=1), lr=dict(lr=.06), bs=dict(bs=16), sched=dict(sched='constant'), opt=dict(opt='keep'), wd=dict(wd=.1), until=dict(until=shift),
                   pattern=dict(pattern=Stripes(8)), model=dict(model=lambda: nn.Sequential(nn.Flatten(), nn.Linear(768,10))))
    all_keys = {keys['pretrain']}
    for i,(k,v) in enumerate(changes.items()):
        fit(tmp_path, f'other{i}', **v)
        all_keys.add(RunStore(tmp_path)[f'other{i}'].info['keys']['pretrain'])
        assert len(all_keys)==i+2, k

def test_a_shared_phase_is_followed_by_the_phases_of_whoever_takes_it(tmp_path):
    "A run that ended with 'erode' serves one that relearns afterwards, to the same bit as one fit of all three; and one of three phases serves one of two"
    whole = fit(tmp_path/'whole', epochs=(2,2,2))
    fit(tmp_path/'parts', 'short')
    longer,shorter = fit(tmp_path/'parts', 'long', epochs=(2,2,2)),fit(tmp_path/'whole', 'short')
    assert list(longer.snapshots)==['start','pretrain','erode','relearn'] and same(whole, longer)
    assert RunStore(tmp_path/'parts')['long'].history().equals(RunStore(tmp_path/'whole')['a'].history()) and longer.recorder.evals.equals(whole.recorder.evals)
    assert list(shorter.snapshots)==['start','pretrain','erode'] and RunStore(tmp_path/'whole')['short'].history().equals(RunStore(tmp_path/'parts')['short'].history())

def start_key(folder, name, data={}, inject={}, pattern=ColorSquare(4), arch='resnet20', train={}, evals={}, lengths=dict(epochs=1)):
    "The key of 'erode', without training"
    set_seed(0)
    dls = digits_dls(**dict(dict(n=96, n_valid=40, bs=32), **data))
    easy = dls.inject(pattern, **inject)
    learn = erosion_learner(dls, arch, **dict(dict(width=.25), **train))
    class Enough(Callback):
        order,passive = 1001,True
        def before_fit(self): raise RuntimeError('enough')
    with pytest.raises(RuntimeError, match='enough'), learn.no_bar():
        learn.fit_phases([Phase('pretrain', 1), Phase('erode', dls=easy, **lengths)], cbs=[EvalSets(pattern_sets(easy), **evals), Enough(), KeepRun(RunStore(folder).run(name))])
    return RunStore(folder)[name].info['keys']['erode']

def test_every_setting_changes_the_key(tmp_path):
    base = start_key(tmp_path, 'base')
    assert start_key(tmp_path, 'twin')==base
    changes = dict(n=dict(data=dict(n=95)), n_valid=dict(data=dict(n_valid=41)), bs=dict(data=dict(bs=16)), data_seed=dict(data=dict(seed=1)), ratio=dict(inject=dict(ratio=.9)), strength=dict(inject=dict(strength=.9)), classes=dict(inject=dict(classes=[1,2])),
                   stamp_seed=dict(inject=dict(ratio=.5, seed=1)), ratio_half=dict(inject=dict(ratio=.5)), stratify=dict(inject=dict(ratio=.5, stratify=True)), size=dict(pattern=ColorSquare(3)), corner=dict(pattern=ColorSquare(4, 'center')), margin=dict(pattern=ColorSquare(4, margin=1)),
                   opacity=dict(pattern=ColorSquare(4, opacity=.9)), palette=dict(pattern=ColorSquare(4, palette='tab10')), kind=dict(pattern=Stripes(4)), arch=dict(arch='resnet32'), width=dict(train=dict(width=.5)), lr=dict(train=dict(lr=.2)), mom=dict(train=dict(mom=.8)),
                   wd=dict(train=dict(wd=1e-3)), train_bn=dict(train=dict(train_bn=False)), at=dict(evals=dict(at=[0,3])), n_at=dict(evals=dict(n_at=20)), evaluated=dict(evals=dict(n=20)), epochs=dict(lengths=dict(epochs=2)), iters=dict(lengths=dict(iters=2)),
                   phase_lr=dict(lengths=dict(epochs=1, lr=.3)), phase_wd=dict(lengths=dict(epochs=1, wd=.1)), sched=dict(lengths=dict(epochs=1, sched='one_cycle')), opt=dict(lengths=dict(epochs=1, opt='keep')))
    keys = {k:start_key(tmp_path, f'run {k}', **v) for k,v in changes.items()}
    same = [k for k,v in keys.items() if v==base]
    assert not same and len(set(keys.values()))==len(keys), same

def other_process(folder, name, log):
    class Tell(Callback):
        passive,run_valid = True,False
        def after_batch(self):
            if self.learn.train_iter==1 or self.learn.phase.name=='erode' and self.learn.train_iter==11:
                with open(log, 'a') as f: f.write(f'{self.learn.phase.name}\n')
            if name=='dies' and self.learn.train_iter==5: os.kill(os.getpid(), signal.SIGKILL)
    torch.set_num_threads(1)
    fit(folder, name, cbs=[Tell()])

def test_two_processes_compute_a_phase_once(tmp_path):
    "Also when the first one is killed while it holds the lock: then the other one computes it"
    ctx = mp.get_context('forkserver')
    both = [ctx.Process(target=other_process, args=(tmp_path/'a', n, tmp_path/'a.txt')) for n in ('x','y')]
    for p in both: p.start()
    for p in both: p.join()
    assert [p.exitcode for p in both]==[0,0] and sorted((tmp_path/'a.txt').read_text().split())==['erode','pretrain']
    x,y = (RunStore(tmp_path/'a')[n] for n in 'xy')
    assert all(torch.equal(v, y.weights()[k]) for k,v in x.weights().items()) and x.history().equals(y.history())
    both = [ctx.Process(target=other_process, args=(tmp_path/'b', n, tmp_path/'b.txt')) for n in ('dies','lives')]
    both[0].start()
    while not (tmp_path/'b.txt').exists() and both[0].is_alive(): time.sleep(.01)   # 'dies' holds the lock now
    both[1].start()
    for p in both: p.join()
    assert [p.exitcode for p in both]==[-signal.SIGKILL,0] and RunStore(tmp_path/'b')['lives'].status=='finished' and RunStore(tmp_path/'b')['dies'].status=='killed'
    assert all(torch.equal(v, RunStore(tmp_path/'b')['lives'].weights()[k]) for k,v in x.weights().items())

def damage(f, how):
    b = bytearray(f.read_bytes())
    if how=='truncated': f.write_bytes(b[:len(b)//2])
    if how=='flipped': b[len(b)//2] ^= 4; f.write_bytes(b)
    if how=='missing': f.unlink()

@pytest.mark.parametrize('how', ['truncated','flipped','missing'])
@pytest.mark.parametrize('name', ['model.safetensors','state.pt','about.json'])
def test_damaged_checkpoints(tmp_path, how, name):
    "The last good one is used, the bad one stays"
    whole = fit(tmp_path/'whole')
    with pytest.raises(RuntimeError): fit(tmp_path, cbs=[Stop(8, boom(RuntimeError('x')))])
    last = RunStore(tmp_path)['a'].path/'last'
    newest = max(last.iterdir(), key=lambda p: int(p.name))
    damage(newest/name, how)
    with pytest.warns(UserWarning, match='stays where it is'): learn = fit(tmp_path)
    assert same(learn, whole)

def test_nothing_good_left_is_an_error(tmp_path):
    with pytest.raises(RuntimeError): fit(tmp_path, cbs=[Stop(3, boom(RuntimeError('x')))])
    for f in Path(tmp_path).rglob('state.pt'): damage(f, 'flipped')
    with pytest.raises(ValueError, match='none of its checkpoints can be read'), pytest.warns(UserWarning): fit(tmp_path)
    assert list(Path(tmp_path).rglob('state.pt'))

@pytest.mark.parametrize('why,says', [(errno.ENOSPC,'No space left'), (errno.EROFS,'Read-only')])
def test_disk_full_or_read_only(tmp_path, monkeypatch, why, says):
    whole,n = fit(tmp_path/'whole'),[0]
    real = store_module._write
    def full(f, b):
        n[0] += 1
        if n[0]>40:
            f.write_bytes(b[:10])
            raise OSError(why, os.strerror(why))
        real(f, b)
    monkeypatch.setattr(store_module, '_write', full)
    with pytest.raises(OSError, match=f'{says}.*make room'): fit(tmp_path)
    monkeypatch.undo()
    assert same(fit(tmp_path), whole)

def test_nan_keeps_the_last_good_state(tmp_path):
    class Spoil(Callback):
        order,run_valid,passive = -50,False,True
        def before_batch(self):
            if self.learn.train_iter==6: self.learn.xb = (self.xb[0]*float('nan'),)
    with pytest.raises(ValueError, match="at iteration 6 of phase 'pretrain', lr="): fit(tmp_path, cbs=[Spoil()])
    run = RunStore(tmp_path)['a']
    assert run.status=='failed' and 'iteration 6' in run.info['error'] and not (run.path/'phases'/'pretrain').exists()
    w,s = unpack(max((run.path/'last').iterdir(), key=lambda p: int(p.name)))
    assert s['train_iter']==6 and all(v.isfinite().all() for v in w.values() if v.is_floating_point())

def test_other_callbacks_and_no_phases(tmp_path):
    "A plain fit with fastai's own callbacks goes on as well"
    def plain_fit(folder, *cbs):
        set_seed(0)
        dls = digits_dls(n=160, n_valid=50, bs=32)
        learn = Learner(dls, net(), metrics=accuracy, path=folder)
        with learn.no_bar(), learn.no_logging():
            learn.fit_one_cycle(4, cbs=[KeepRun(RunStore(folder).run('b'), minutes=0), SaveModelCallback(), EarlyStoppingCallback(patience=9), GradientAccumulation(64), *cbs])
        return learn
    whole = plain_fit(tmp_path/'whole')
    for at in (3, 5, 12):
        with pytest.raises(RuntimeError): plain_fit(tmp_path, Stop(at, boom(RuntimeError('x'))))
    again = plain_fit(tmp_path)
    assert same(again, whole) and again.recorder.values==whole.recorder.values

# Nothing is executed, nothing is written outside

class Evil:
    def __init__(self, f): self.f = f
    def __reduce__(self): return (os.mkdir, (str(self.f),))

def test_malicious_pickle(tmp_path):
    buf = io.BytesIO(); torch.save(dict(a=Evil(tmp_path/'pwned')), buf)
    save_folder(tmp_path/'c', dict(pack({'w':torch.zeros(1)}, {}), **{'state.pt':buf.getvalue()}))   # with checksums that agree
    with pytest.raises(ValueError, match='nothing in it was executed'): unpack(tmp_path/'c')
    save_folder(tmp_path/'d', {**pack({}, {}), 'model.safetensors':pickle.dumps(Evil(tmp_path/'pwned'))})
    with pytest.raises(ValueError, match='nothing in it was executed'): unpack(tmp_path/'d')
    assert not (tmp_path/'pwned').exists()

@pytest.mark.parametrize('name,kind', [('../out',tarfile.REGTYPE), ('/feature_erosion_out',tarfile.REGTYPE), ('a/../../out',tarfile.REGTYPE), ('link',tarfile.SYMTYPE), ('link',tarfile.LNKTYPE), ('fifo',tarfile.FIFOTYPE)])
def test_malicious_tar(tmp_path, name, kind):
    with tarfile.open(tmp_path/'a.tgz', 'w:gz') as f:
        f.addfile(tarfile.TarInfo('good'), io.BytesIO())
        m = tarfile.TarInfo(name); m.type,m.linkname = kind,'/etc/passwd'
        f.addfile(m, io.BytesIO())
    with pytest.raises(ValueError, match='nothing was unpacked'): extract(tmp_path/'a.tgz', tmp_path/'in'/'it')
    assert sorted(p.name for p in tmp_path.rglob('*'))==['a.tgz'] and not os.path.exists('/feature_erosion_out')

def test_a_good_archive(tmp_path):
    "One folder, which takes the name that is asked for; a second process finds it there"
    (tmp_path/'in'/'train').mkdir(parents=True)
    (tmp_path/'in'/'train'/'a.txt').write_text('x')
    with tarfile.open(tmp_path/'a.tgz', 'w:gz') as f: f.add(tmp_path/'in', 'in')
    for _ in range(2): assert (_unpack(tmp_path/'a.tgz', tmp_path/'data'/'out')/'train'/'a.txt').read_text()=='x'
    assert [p.name for p in (tmp_path/'data').iterdir()]==['out']

def test_image_bomb(tmp_path):
    def chunk(t, b): return struct.pack('>I', len(b))+t+b+struct.pack('>I', zlib.crc32(t+b))
    (tmp_path/'bomb.png').write_bytes(b'\x89PNG\r\n\x1a\n'+chunk(b'IHDR', struct.pack('>IIBBBBB', 12000, 12000, 8, 2, 0, 0, 0))+chunk(b'IDAT', zlib.compress(bytes(100)))+chunk(b'IEND', b''))
    with pytest.raises(ValueError, match='bomb.png: not a readable image'), warnings.catch_warnings():
        warnings.simplefilter('ignore')
        to_uint8(tmp_path/'bomb.png', (8,8))

def test_config_with_unknown_fields_or_code(tmp_path):
    run = RunStore(tmp_path).run('a', lr=.1)
    info = json.loads((run.path/'run.json').read_text())
    (run.path/'run.json').write_text(json.dumps(dict(info, hook='__import__("os").mkdir("pwned")')))
    with pytest.raises(ValueError, match='unknown fields hook'): run.config

@pytest.mark.parametrize('name', ['a/b', '../a', '/a', 'a\\b', '..', '.a', 'a\0b', ''])
def test_run_names(tmp_path, name):
    with pytest.raises(ValueError, match='name of a folder'): RunStore(tmp_path/'s').run(name)
    assert not list(tmp_path.iterdir())

# Nothing that is not ours is touched

def strangers(folder):
    "A folder as people have it: a checkout, secrets, an environment"
    for f in ('.git/config', '.git/HEAD', '.env', '.ssh/id', '.venv/bin/python', 'notes.txt', 'data/.hidden', 'figures/.old.png.abcd1234x'):
        (folder/f).parent.mkdir(parents=True, exist_ok=True)
        (folder/f).write_text(f)
    return everything(folder)

def everything(folder): return {str(p.relative_to(folder)):p.read_bytes() for p in Path(folder).rglob('*') if p.is_file()}

@pytest.mark.parametrize('out', ['.', 'sub/..', ''])
def test_a_folder_of_others_is_not_taken_as_a_run(tmp_path, monkeypatch, capsys, out):
    before = strangers(tmp_path)
    (tmp_path/'sub').mkdir()
    monkeypatch.chdir(tmp_path)
    assert main(['demo', '--out', out])==2 and 'neither empty nor a run' in (said := capsys.readouterr().err) and 'run1' in said
    assert everything(tmp_path)==before

def test_leftovers_go_and_nothing_else(tmp_path):
    "In a run's folder, too: what a killed process was writing goes, by its own name; other people's files stay"
    whole = fit(tmp_path)
    run = RunStore(tmp_path)['a']
    before = strangers(run.path)
    (run.path/'last').mkdir(exist_ok=True)
    (run.path/'.run.json.abcd1234').write_text('{')
    (run.path/'last'/'.part-x').mkdir()
    assert same(fit(tmp_path), whole)
    after = everything(run.path)
    assert all(after[k]==v for k,v in before.items() if not k.endswith('.json')) and not [k for k in after if 'abcd1234' in k and 'x' not in k]
    assert not (run.path/'last'/'.part-x').exists()

def test_two_reports_at_once(tmp_path):
    "Neither falls over a file of the other's"
    demo(tmp_path/'run', lengths=(1,1,0))
    ctx = mp.get_context('forkserver')
    both = [ctx.Process(target=report_often, args=(tmp_path/'run',)) for _ in range(2)]
    for p in both: p.start()
    for p in both: p.join()
    assert [p.exitcode for p in both]==[0,0] and not list((tmp_path/'run').glob('.try*'))

def report_often(folder):
    for _ in range(8): report(folder)

@pytest.mark.parametrize('packed', [False, True])
def test_the_revision_is_read_and_nothing_of_the_folder_is_executed(tmp_path, monkeypatch, packed):
    "As `git rev-parse HEAD` says it; a `core.fsmonitor` of a folder that came from elsewhere is not run"
    git = lambda *a: subprocess.run(['git', '-c', 'user.name=a', '-c', 'user.email=a@b', *a], cwd=tmp_path, check=True, capture_output=True, text=True).stdout.strip()
    (tmp_path/'f').write_text('')
    git('init', '-b', 'main'), git('add', '.'), git('commit', '-m', 'x')
    want = git('rev-parse', 'HEAD')
    if packed: git('pack-refs', '--all')
    demo(tmp_path/'run', lengths=(1,1,0))
    with open(tmp_path/'.git'/'config', 'a') as f: f.write(f'[core]\n\tfsmonitor = "touch {tmp_path}/pwned; false"\n')
    monkeypatch.chdir(tmp_path)
    report('run')
    assert environment()['git']==want==git_revision(tmp_path/'run') and not (tmp_path/'pwned').exists()
    git('-c', 'core.fsmonitor=', 'checkout', '--detach')
    assert git_revision(tmp_path)==want

@pytest.mark.parametrize('head', ['ref: ../../secret', 'ref: refs/../../secret', 'ref: /etc/passwd', 'secret', ''])
def test_a_revision_is_nothing_but_a_hash(tmp_path, head):
    (tmp_path/'.git').mkdir()
    (tmp_path/'secret').write_text('a'*40)
    (tmp_path/'.git'/'HEAD').write_text(head)
    assert git_revision(tmp_path) is None
