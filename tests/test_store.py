"Runs that are killed, stopped, damaged, or handed something malicious."
import errno, io, os, pickle, signal, struct, subprocess, tarfile, time, warnings, zlib
from functools import partial
from pathlib import Path
import filelock, numpy as np, pandas as pd, pytest, torch
from torch import nn
from fastai.callback.mixup import MixUp
from fastai.vision.all import (CSVLogger, Callback, CancelFitException, DataLoaders, EarlyStoppingCallback, F1Score,
                               GradientAccumulation, LabelSmoothingCrossEntropy, Learner, MixedPrecision, SGD, SaveModelCallback,
                               accuracy, load_learner, noop, set_seed)
import kill
from run_notebooks import forked
from trainings import same
from feature_erosion import callbacks, files as files_module
from feature_erosion.callbacks import LoggedCallback
from feature_erosion.cli import main
from feature_erosion.data import _unpack, digits_dls, extract, to_uint8
from feature_erosion.evalsets import EvalSets
from feature_erosion.learner import erosion_learner   # with it, `fit_phases`
from feature_erosion.mitigations import DERpp, EWC, L2Init, L2SP, LwF, Only, Replay, SAM, SI, ContinualBackprop, ShrinkPerturb
from feature_erosion.patterns import ColorSquare
from feature_erosion.phases import Phase
from feature_erosion.paper.report import report
from feature_erosion.files import load_json, save_folder, save_json
from feature_erosion.runs.resume import KeepRun
from feature_erosion.runs.store import Run, RunStore, checkpoint_files, environment, git_revision, pack, unpack

@pytest.mark.parametrize('what,kills',
                         [('few',7), pytest.param('many', 2,
                                                  marks=pytest.mark.slow('a run with many callbacks, killed, and trained to its end twice more'))])
def test_kills(what, kills):
    "`python tests/kill.py 100 many` is the long version"
    hits = kill.main(kills, what=what)
    assert sum(hits.values())>=kills and (what=='many' or all(hits.values())), hits

def net(): return nn.Sequential(nn.Flatten(), nn.Linear(768,16), nn.BatchNorm1d(16), nn.ReLU(), nn.Linear(16,10))

def fit(folder, name='a', epochs=(2,2), seed=0, cbs=(), lr=.05, pattern=None, ratio=1., bs=32, minutes=0., model=net, run=None,
        after=None, **kw):
    set_seed(seed)
    dls = digits_dls(n=160, n_valid=50, bs=bs)
    easy = dls.inject(pattern or ColorSquare(4), ratio=ratio)
    learn = Learner(dls, model(), opt_func=SGD, metrics=accuracy, lr=lr, path=folder)
    with learn.no_bar(), learn.no_logging():
        phases = [Phase('pretrain', dls=dls, epochs=epochs[0], **kw),
                  *(Phase(p, n, d) for p,n,d in zip(('erode','relearn'), epochs[1:], (easy,dls)))]
        learn.fit_phases(phases, cbs=[KeepRun(run or RunStore(folder).run(name), minutes=minutes, after=after), *cbs])
    return learn

class Stop(Callback):
    "Raise, or send a signal, at an iteration"
    order,run_valid,passive = 30,False,True
    def __init__(self, at, what): self.at,self.what = at,what
    def after_batch(self):
        if self.learn.train_iter==self.at: self.what()

def boom(e):
    def f(): raise e
    return f

@pytest.fixture(params=[1,7], ids=['losses seen at once','losses seen late, as on a GPU'])
def pace(request, monkeypatch): monkeypatch.setattr(callbacks, '_pace', lambda every, learn: every or request.param)

@pytest.mark.usefixtures('pace')
def test_ctrl_c_leaves_a_run_that_goes_on(tmp_path):
    whole = fit(tmp_path/'whole')
    before = signal.getsignal(signal.SIGINT)
    with pytest.raises(KeyboardInterrupt, match="run 'a' stopped after 7 iterations in phase 'pretrain'; start it again"):
        fit(tmp_path, minutes=99, cbs=[Stop(7, lambda: os.kill(os.getpid(), signal.SIGINT))])
    assert signal.getsignal(signal.SIGINT) is before and RunStore(tmp_path)['a'].status=='stopped'
    with pytest.raises(SystemExit): fit(tmp_path, minutes=99, cbs=[Stop(13, lambda: os.kill(os.getpid(), signal.SIGTERM))])
    learn = fit(tmp_path)
    assert same(learn, whole) and learn.recorder.history.equals(whole.recorder.history)
    assert learn.recorder.evals.equals(whole.recorder.evals)
    run = RunStore(tmp_path)['a']
    assert run.status=='finished' and run.history.clean.tolist()==whole.recorder.history.clean.tolist()
    assert len(run.info['sessions'])==3

def test_a_signal_that_is_ignored_stays_ignored(tmp_path):
    "As in a job that a script began with `&`: Ctrl-C is for another"
    before = signal.signal(signal.SIGINT, signal.SIG_IGN)
    try:
        fit(tmp_path, cbs=[Stop(7, lambda: os.kill(os.getpid(), signal.SIGINT))])
        assert signal.getsignal(signal.SIGINT)==signal.SIG_IGN
    finally: signal.signal(signal.SIGINT, before)
    assert RunStore(tmp_path)['a'].status=='finished'

class Long(Callback):
    "A signal at the beginning of an evaluation before an epoch"
    order,passive,ended = 30,True,False
    def __init__(self, epoch, number): self.at,self.number = epoch,number
    def before_train(self):
        if self.learn.epoch!=self.at: return
        os.kill(os.getpid(), self.number)
        self.ended = sum(range(1000))>0

@pytest.mark.parametrize('epoch,its,number,error', [(0, 0, signal.SIGTERM, SystemExit), (1, 5, signal.SIGINT, KeyboardInterrupt),
                                                    (2, 10, signal.SIGTERM, SystemExit)])
def test_an_evaluation_is_not_waited_for(tmp_path, epoch, its, number, error):
    "Where no batch was trained since the last checkpoint, there is nothing to wait for"
    cb = Long(epoch, number)
    with pytest.raises(error, match=f"run 'a' stopped after {its} iterations"): fit(tmp_path, minutes=99, cbs=[cb])
    run = RunStore(tmp_path)['a']
    assert not cb.ended and run.status=='stopped' and not run.is_busy()
    assert same(fit(tmp_path), fit(tmp_path/'whole'))

class ToAll(Callback):
    "SIGTERM to all processes of a session, sent by another, as SLURM does"
    order,passive = 30,True
    def after_batch(self):
        if self.learn.train_iter!=2: return
        subprocess.run(['sh','-c',f'kill -TERM -{os.getpid()}'], start_new_session=True)
        time.sleep(.3)   # until the end of a worker would be noticed

def with_a_worker(folder):
    os.setsid()
    set_seed(0)
    data = [(torch.randn(4), i%2) for i in range(16)]
    learn = Learner(DataLoaders.from_dsets(data, data, bs=4, num_workers=1), nn.Linear(4, 2), loss_func=nn.CrossEntropyLoss())
    with learn.no_bar(), learn.no_logging(): learn.fit(1, cbs=[KeepRun(RunStore(folder).run('a'), minutes=99), ToAll()])

def test_a_signal_to_all_processes_stops_the_run(tmp_path):
    "Which its loader's worker gets, too: the run is stopped, with a checkpoint, and has not failed"
    p = forked(with_a_worker, tmp_path)
    p.start(), p.join()
    run = RunStore(tmp_path)['a']
    assert run.status=='stopped' and 'stopped after 2 iterations' in run.info['error'], run.info['error']
    assert [o['iteration'] for o in run._checkpoints().values()]==[2,0]

def test_a_run_stays_where_it_was_made(tmp_path, monkeypatch, capsys):
    "Also when the process has gone to another folder, with a run of the same name"
    for o in 'here','there':
        (tmp_path/o).mkdir()
        monkeypatch.chdir(tmp_path/o)
        run = RunStore('runs').run('a')
    monkeypatch.chdir(tmp_path/'here')
    fit(tmp_path, run=run)
    assert [RunStore(tmp_path/o/'runs')['a'].status for o in ('here','there')]==['new','finished']
    monkeypatch.chdir(tmp_path/'there')
    fit(tmp_path, run=run)
    assert "`RunStore('runs').delete('a')`" in capsys.readouterr().out

def test_a_store_stays_where_it_was_named(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    store = RunStore('runs')
    run = store.run('a')
    assert repr(store)=="RunStore('runs')"
    monkeypatch.chdir('/')
    assert store['a'].path==run.path==tmp_path/'runs'/'a' and [o.name for o in store]==['a']
    assert repr(store)==f"RunStore('{str(tmp_path/'runs')[1:]}')"

def test_a_run_that_was_deleted_is_not_begun(tmp_path):
    "Nothing is put where it was, so that it can be made anew"
    run = RunStore(tmp_path).run('a')
    RunStore(tmp_path).delete('a')
    with pytest.raises(ValueError, match='run.json: cannot be read'): fit(tmp_path, run=run)
    assert not run.path.exists() and RunStore(tmp_path).run('a').status=='new'

def test_a_finished_run_is_loaded_not_computed(tmp_path):
    first = fit(tmp_path)
    class Never(Callback):
        run_valid,passive = False,True
        def before_batch(self): raise AssertionError('trained again')
    again = fit(tmp_path, cbs=[Never()])
    assert same(first, again) and list(again.snapshots)==['start','pretrain','erode']
    assert again.recorder.phases.equals(first.recorder.phases)

def test_another_config_is_refused_and_named(tmp_path):
    fit(tmp_path)
    for change,msg in ((dict(lr=.1),'lr: was 0.05, is 0.1'), (dict(epochs=(2,3)),'phases.1.epochs: was 2, is 3'),
                       (dict(seed=1),'seed: was 0, is 1'), (dict(bs=16),'bs: was 32, is 16'),
                       (dict(pattern=ColorSquare(5)),'size: was 4, is 5'), (dict(ratio=.5),'painted: was 160, is 80')):
        with pytest.raises(ValueError, match=msg): fit(tmp_path, **change)
    assert RunStore(tmp_path)['a'].status=='finished'

def pretrained(seed, run): return fit(run.path.parent, run=run, epochs=(2,), seed=seed)

@pytest.mark.usefixtures('pace')
def test_a_run_after_another_is_one_run_of_all(tmp_path):
    "To the same bit; the first phases are trained once"
    whole = fit(tmp_path/'whole')
    base = RunStore(tmp_path/'parts').once(pretrained, seed=0)
    parts = fit(tmp_path/'parts', after=base)
    assert same(whole, parts) and list(parts.snapshots)==['start','pretrain','erode']
    assert parts.recorder.history.iters.tolist()==whole.recorder.history.iters.tolist()
    assert parts.recorder.evals[parts.recorder.evals.phase=='erode'].equals(whole.recorder.evals[whole.recorder.evals.phase=='erode'].reset_index(drop=True).set_index(parts.recorder.evals[parts.recorder.evals.phase=='erode'].index))
    seen = []
    class Count(Callback):
        passive = True
        def before_phase(self): seen.append(self.learn.phase.name)
    fit(tmp_path/'parts', 'b', after=base, cbs=[Count()])
    assert seen==['erode'] and RunStore(tmp_path/'parts').once(pretrained, seed=0).path==base.path
    with pytest.raises(ValueError, match='trained with other settings: lr: was 0.05, is 0.06'):
        fit(tmp_path/'parts', 'c', after=base, lr=.06)
    with pytest.raises(ValueError, match="has trained pretrain, and `phases` begins with erode; give its phases first"):
        erosion_learner(whole.dls, net).fit_phases([Phase('erode', 2)], run=RunStore(tmp_path/'parts').run('f'), after=base)
    with pytest.raises(ValueError, match="after: run 'd' is new and has ended no phase"):
        fit(tmp_path/'parts', 'e', after=RunStore(tmp_path/'parts').run('d'))

methods = dict(replay=lambda old: Replay(old, 20), der=lambda old: DERpp(old, 20), ewc=lambda old: EWC(old, 10., n=40),
               lwf=lambda old: LwF(), l2sp=lambda old: L2SP(.1), sam=lambda old: SAM(), only=lambda old: Only('4'),
               shrink=lambda old: ShrinkPerturb(.5), backprop=lambda old: ContinualBackprop(.1, maturity=2))

@pytest.mark.parametrize('make', methods.values(), ids=methods)
def test_methods_that_act_later_share_a_start(tmp_path, make):
    "To the same bit as if they had been there from the beginning; and they do act"
    old,store = digits_dls(n=160, n_valid=50, bs=32),RunStore(tmp_path/'parts')
    whole = fit(tmp_path/'whole', cbs=[make(old)])
    base = store.once(pretrained, seed=0)
    plain,parts = (fit(store.path, k, after=base, cbs=cbs) for k,cbs in dict(plain=[], method=[make(old)]).items())
    assert same(whole, parts) and not same(plain, parts)

@pytest.mark.parametrize('make,name', [(SI,'SI'), (L2Init,'L2Init'), (partial(LwF, phases=['pretrain']),'LwF'), (MixUp,'MixUp')])
def test_methods_that_were_to_act_before_share_none(tmp_path, make, name):
    base = RunStore(tmp_path).once(pretrained, seed=0)
    with pytest.raises(ValueError, match=f"callbacks.all: was '[^']*', is '[^']*{name}"): fit(tmp_path, after=base, cbs=[make()])

def is_first(path):
    try: path.mkdir()
    except FileExistsError: return False
    return True

def other_process(folder, dies):
    def tell(seed, run):
        with open(folder/'log.txt', 'a') as f: f.write('begun ')
        die = [Stop(5, lambda: os.kill(os.getpid(), signal.SIGKILL))] if dies and is_first(folder/'first') else []
        return fit(folder, run=run, epochs=(2,), seed=seed, cbs=die)
    torch.set_num_threads(1)
    RunStore(folder).once(tell, seed=0)

@pytest.mark.parametrize('dies', [False, True])
def test_two_processes_compute_once(tmp_path, dies):
    "Also when the first one is killed while it holds the lock: then the other one goes on"
    for o in 'a','whole': (tmp_path/o).mkdir()
    other_process(tmp_path/'whole', False)
    both = [forked(other_process, tmp_path/'a', dies) for _ in range(2)]
    for p in both: p.start()
    for p in both: p.join()
    assert sorted(p.exitcode for p in both)==([-signal.SIGKILL,0] if dies else [0,0])
    assert len((tmp_path/'a'/'log.txt').read_text().split())==1+dies
    (run,),(whole,) = RunStore(tmp_path/'a'),RunStore(tmp_path/'whole')
    assert run.status=='finished' and all(torch.equal(v, run.weights()[k]) for k,v in whole.weights().items())
    assert run.history.equals(whole.history)

def flip(f):
    b = bytearray(f.read_bytes())
    b[len(b)//2] ^= 4
    f.write_bytes(b)

def test_nothing_good_left_is_an_error(tmp_path):
    with pytest.raises(RuntimeError): fit(tmp_path, cbs=[Stop(3, boom(RuntimeError('x')))])
    for f in Path(tmp_path).rglob('state.pt'): flip(f)
    with pytest.raises(ValueError, match='none of its checkpoints can be read'), pytest.warns(UserWarning): fit(tmp_path)
    assert list(Path(tmp_path).rglob('state.pt'))

@pytest.mark.parametrize('why,says', [(errno.ENOSPC,'No space left'), (errno.EROFS,'Read-only')])
def test_disk_full_or_read_only(tmp_path, monkeypatch, why, says):
    whole,n = fit(tmp_path/'whole'),[0]
    real = files_module._flush
    def full(f):
        n[0] += 1
        if n[0]>40: raise OSError(why, os.strerror(why))
        real(f)
    monkeypatch.setattr(files_module, '_flush', full)
    with pytest.raises(OSError, match=f'{says}.*make room'): fit(tmp_path)
    monkeypatch.undo()
    assert same(fit(tmp_path), whole)

@pytest.mark.parametrize('name', checkpoint_files)
def test_disk_full_inside_of_a_file(tmp_path, monkeypatch, name):
    "torch.save would hide the reason"
    real,n = files_module._create,[0]
    class Full(io.FileIO):
        def write(self, b):
            if self.tell()+len(b)<1000: return super().write(b)
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
    def create(f):
        n[0] += f.name==name
        return Full(f, 'x') if f.name==name and n[0]>3 else real(f)
    monkeypatch.setattr(files_module, '_create', create)
    with pytest.raises(OSError, match='No space left.*make room'): fit(tmp_path)
    monkeypatch.undo()
    assert not list(tmp_path.rglob('*.part')) and same(fit(tmp_path), fit(tmp_path/'whole'))

@pytest.mark.usefixtures('pace')
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

class Spoilt(nn.CrossEntropyLoss):
    "Not finite in one batch of training, or in validation"
    def __init__(self, learn, it): super().__init__(); self.learn,self.it = [learn],it
    def forward(self, x, y):
        learn, = self.learn
        if learn.training: return super().forward(x, y)*(float('nan') if learn.train_iter==self.it else 1)
        return super().forward(x, y)+(float('inf') if self.it is None else 0)

@pytest.mark.parametrize('it,status', [(4,'failed'), (None,'finished')])
def test_a_plain_fit_that_ends_in_nan_has_failed(tmp_path, it, status):
    "Its last good weights are kept; a loss of validation that is infinite is no fault"
    learn = plain_learner(tmp_path)
    learn.loss_func = Spoilt(learn, it)
    with learn.no_bar(), learn.no_logging(): learn.fit(2, cbs=KeepRun(RunStore(tmp_path).run('a'), minutes=0))
    run = RunStore(tmp_path)['a']
    assert run.status==status and (it is None or 'loss is nan at iteration 6' in run.info['error'])
    assert all(v.isfinite().all() for v in run.weights().values() if v.is_floating_point())
    assert unpack(run._newest(run._ended()))[1]['train_iter']==(6 if it is None else 4)

class Unsettled(Callback):
    "Ends the fit, and once more when its last values are asked for"
    run_valid,passive = False,True
    def after_batch(self):
        if self.learn.train_iter==4: raise CancelFitException
    def settle(self):
        if self.learn.train_iter==4: raise CancelFitException

def test_a_fit_that_was_ended_twice_has_failed(tmp_path):
    learn = plain_learner(tmp_path)
    with learn.no_bar(), learn.no_logging(): learn.fit(2, cbs=[KeepRun(RunStore(tmp_path).run('a'), minutes=99), Unsettled()])
    run = RunStore(tmp_path)['a']
    assert run.status=='failed' and run.info['error']=='the fit was ended again after iteration 4' and run._ended()==['start']

def named(name):
    res = F1Score(average='macro')
    res.name = name
    return res

@pytest.mark.parametrize('metrics,name,phases',
                         [([F1Score(average='micro'),F1Score(average='macro')],'f1_score',False),
                          *(([named(o)],o,False)
                            for o in ('sum','table','iters','phase','epoch','time','train_loss','valid_loss')),
                          *(([named(o)],o,True) for o in ('phase','iters','epoch'))])
def test_a_metric_whose_name_is_taken_is_refused_before_training(tmp_path, metrics, name, phases):
    def train(metrics):
        learn = Learner(digits_dls(n=64, n_valid=40, bs=32), net(), opt_func=SGD, metrics=metrics, path=tmp_path)
        with learn.no_bar(), learn.no_logging():
            if phases: learn.fit_phases([Phase('one', 1)], cbs=[KeepRun(run, minutes=0)])
            else: learn.fit(1, cbs=[KeepRun(run, minutes=0)])
    run = RunStore(tmp_path).run('a')
    with pytest.raises(ValueError, match=f"metrics: '{name}' is the name of another column"): train(metrics)
    assert run.status=='new'
    train([*metrics[:-1], named('other')])
    assert run.status=='finished' and 'other' in run.history

def test_a_row_with_a_sum_of_its_own(tmp_path):
    run = RunStore(tmp_path).run('a')
    rows = [dict(table='t', sum=1), dict(table='t', x='", "sum": "ab'), dict(table='t', sum='", "sum": "')]
    run.append(*rows)
    assert RunStore(tmp_path)['a'].rows()==rows
    with open(run.path/'history.jsonl', 'a') as f: f.write('['*100_000+'\n')
    with pytest.raises(ValueError, match='line 4 is not what was written'): run.rows()

def test_rows_of_tensors_and_arrays(tmp_path):
    "What a callback measures is often one: numbers and lists in the history, as in the metrics"
    class Norms(LoggedCallback):
        columns = ['norm']
        def look(self):
            norms = torch.stack([p.norm() for p in self.learn.model.parameters()])
            return dict(norm=norms.sum(), each=norms, n=np.array([len(norms)]))
    learn,run = fit(tmp_path, epochs=(1,1), cbs=[Norms()]),RunStore(tmp_path)['a']
    got,norms = run.table('logged'),[p.norm().item() for p in learn.model.parameters()]
    assert got.norm.iloc[-1]==run.history.norm.iloc[-1]==pytest.approx(sum(norms)) and got['each'].iloc[-1]==pytest.approx(norms)
    assert got.n.tolist()==[[6]]*3
    run.save_metrics(dict(a=torch.tensor(.5), b=np.arange(2)))
    assert run.metrics==dict(a=.5, b=[0,1])

def test_rows_of_two_objects_of_a_run(tmp_path):
    "The second may have written since; a finished run takes rows, too"
    run,store = RunStore(tmp_path).run('a'),RunStore(tmp_path)
    for r,x in zip((run, store['a'], run), range(3)): r.append(dict(table='t', x=np.float32(x)))
    run.begin(), run._note('history.jsonl'), run.update(status='finished')
    store['a'].append(dict(table='mine', x=3))
    assert store['a'].table('t').x.tolist()==[0,1,2] and store['a'].table('mine').x.tolist()==[3] and not run.damaged()
    with pytest.raises(ValueError, match="rows: {'loss': 1} belongs to no table; give it a name"): run.append(dict(loss=1))

def first_half_fails(run, fits):
    "A recipe with rows of its own, that fails after them on its first attempt"
    folder = run.path.parent.parent
    run.append(dict(table='before', x=1))
    if fits: fit(folder, run=run, epochs=(1,1))
    run.append(dict(table='after', x=1))
    tries = folder/'tries'
    tries.mkdir(exist_ok=True)
    (tries/str(len(list(tries.iterdir())))).touch()
    if len(list(tries.iterdir()))<2: raise OSError('gone')

@pytest.mark.parametrize('fits', [False, True])
def test_a_recipe_that_runs_again_has_its_rows_once(tmp_path, fits):
    "Before and after a fit, too, which is resumed where it was"
    store = RunStore(tmp_path/'runs')
    with pytest.raises(OSError, match='gone'): store.once(first_half_fails, fits=fits)
    failed, = store
    run = store.once(first_half_fails, fits=fits)
    assert (failed.name,run.info['tries'])==(run.name,2)
    assert run.table('before').x.tolist()==run.table('after').x.tolist()==[1]
    assert len(run.history)==2*fits and len(RunStore(store.path)[run.name].rows())==len(run.rows())

def test_rows_and_files_of_one_name(tmp_path):
    "One of them would be hidden"
    run,df = RunStore(tmp_path).run('a'),pd.DataFrame(dict(a=[1]))
    run.append(dict(table='mine', x=1))
    for k in ('mine','epochs','evals','phases'):
        with pytest.raises(ValueError, match=f"name='{k}': the run's history has a table of this name"): run.save_table(k, df)
    run.save_table('other', df)
    with pytest.raises(ValueError, match="`save_table` has written a table of this name, 'other'"): run.append(dict(table='other', x=1))
    assert run.table('mine').x.tolist()==[1] and run.table('other').a.tolist()==[1]

@pytest.mark.parametrize('write',
                         [lambda r: r.save_metrics(dict(acc=.9)), lambda r: r.save_table('t', pd.DataFrame(dict(a=['007']))),
                          lambda r: r.append(dict(table='t', acc=.9))])
def test_what_was_measured_keeps_its_settings(tmp_path, write):
    "A run without training has results, too"
    write(RunStore(tmp_path).run('a', lr=.1))
    before = everything(tmp_path)
    with pytest.raises(ValueError, match="run 'a' has other settings: lr: was 0.1, is 0.2"): RunStore(tmp_path).run('a', lr=.2)
    assert everything(tmp_path)==before and RunStore(tmp_path).run('a', lr=.1).settings==dict(lr=.1)

def test_folders_that_cannot_be_looked_into_hide_no_run(tmp_path, monkeypatch):
    "Of somebody else, in a store that is shared"
    make_run(tmp_path)
    (tmp_path/'theirs').mkdir()
    real = os.stat
    def denied(p, *a, **k):
        if 'theirs/' in str(p): raise PermissionError(13, 'Permission denied')
        return real(p, *a, **k)
    monkeypatch.setattr(os, 'stat', denied)
    assert [o.name for o in RunStore(tmp_path)]==['a'] and report(tmp_path).is_file()

def make_run(folder): RunStore(folder).run('a', lr=.1).save_metrics(dict(acc=.9))

def test_other_callbacks_and_no_phases(tmp_path):
    "A plain fit with fastai's own callbacks goes on as well"
    def plain_fit(folder, *cbs):
        set_seed(0)
        dls = digits_dls(n=160, n_valid=50, bs=32)
        learn = Learner(dls, net(), metrics=accuracy, path=folder)
        with learn.no_bar(), learn.no_logging():
            learn.fit_one_cycle(4,
                                cbs=[KeepRun(RunStore(folder).run('b'), minutes=0), SaveModelCallback(),
                                     EarlyStoppingCallback(patience=9), GradientAccumulation(64), *cbs])
        return learn
    whole = plain_fit(tmp_path/'whole')
    for at in (3, 5, 12):
        with pytest.raises(RuntimeError): plain_fit(tmp_path, Stop(at, boom(RuntimeError('x'))))
    again = plain_fit(tmp_path)
    assert same(again, whole) and again.recorder.values==whole.recorder.values
    pd.testing.assert_frame_equal(RunStore(tmp_path)['b'].history, again.recorder.history)

def plain_learner(folder, n=96):
    set_seed(0)
    return Learner(digits_dls(n=n, n_valid=40, bs=32), net(), opt_func=SGD, metrics=accuracy, lr=.05, path=folder)

@pytest.mark.filterwarnings('ignore::UserWarning', 'ignore::FutureWarning')   # mixed precision without a GPU
@pytest.mark.parametrize('cb', [lambda: CSVLogger(), lambda: MixedPrecision(), lambda: MixUp(.4)])
def test_a_fit_without_phases_ends(tmp_path, cb):
    "Callbacks end what they do before the run is finished; its weights are those that the fit ended with, not those it began with"
    learns = []
    for _ in range(2):   # the second time it is loaded
        learns.append(learn := plain_learner(tmp_path))
        with learn.no_bar(), learn.no_logging(): learn.fit(2, cbs=[cb(), KeepRun(RunStore(tmp_path).run('a'))])
    run = RunStore(tmp_path)['a']
    assert run.status=='finished' and same(*learns) and same(run.learner(plain_learner(tmp_path)), learns[0])
    assert run.history.valid_loss.tolist()==learns[1].recorder.history.valid_loss.tolist() and len(run.history)==2

def ends(where):
    "A callback that ends the fit: after a batch of the second phase, or after its first epoch, before the run hears of that epoch"
    if where=='epoch': return EarlyStoppingCallback('accuracy', comp=np.less, min_delta=2, patience=2)
    def stop(): raise CancelFitException
    return Stop(8, stop)

@pytest.mark.usefixtures('pace')
@pytest.mark.parametrize('where', ['batch','epoch'])
def test_a_fit_that_a_callback_ends(tmp_path, where):
    learns = []
    for _ in range(2):
        learns.append(learn := plain_learner(tmp_path))
        dls = learn.dls
        with learn.no_bar(), learn.no_logging():
            learn.fit_phases([Phase('one', 2, dls), Phase('two', 3, dls)], run=RunStore(tmp_path).run('a'), cbs=[ends(where)])
    run = RunStore(tmp_path)['a']
    assert run.status=='finished' and run._ended()==['start','one'] and same(*learns)
    assert same(run.learner(plain_learner(tmp_path)), learns[0])
    assert not same(run.learner(plain_learner(tmp_path), 'one'), learns[0])
    assert run.history.train_loss.tolist()==learns[0].recorder.history.train_loss.tolist()==learns[1].recorder.history.train_loss.tolist()

def test_an_error_that_is_handled_around_a_fit_is_not_its_own(tmp_path):
    "`try: load() except FileNotFoundError: store.once(train)`: the function goes on after its fit"
    seen = []
    def f(seed, run):
        fit(tmp_path, epochs=(1,), run=run)
        seen.append((run.status, run.info['error']))
    try: raise FileNotFoundError('no such weights')
    except FileNotFoundError: run = RunStore(tmp_path).once(f, seed=0)
    assert seen==[('running',None)] and run.status=='finished'

@pytest.mark.usefixtures('pace')
def test_a_callback_that_stays_on_the_learner(tmp_path):
    "An error releases the run and the signal handlers; a second fit goes on where it was; the Learner can be exported"
    before = signal.getsignal(signal.SIGINT)
    def train(stop):
        learn = plain_learner(tmp_path).add_cb(KeepRun(RunStore(tmp_path).run('a'), minutes=0))
        with learn.no_bar(), learn.no_logging():
            learn.fit(1)
            learn.fit(3, cbs=[Stop(stop, boom(RuntimeError('x')))])
        return learn
    whole = plain_learner(tmp_path)
    with whole.no_bar(), whole.no_logging(): whole.fit(1), whole.fit(3)
    with pytest.raises(RuntimeError): train(5)
    first,second = RunStore(tmp_path)
    assert (first.status,second.name,second.status)==('finished','a, fit 2','failed')
    assert signal.getsignal(signal.SIGINT) is before and not second.is_busy()
    learn = train(None)
    assert same(learn, whole) and second.status=='finished' and len(second.rows())==len(second.history)==3
    assert signal.getsignal(signal.SIGINT) is before and not second.is_busy()
    learn.export('x.pkl')
    assert same(load_learner(tmp_path/'x.pkl'), learn) and (tmp_path/'x.pkl').stat().st_size<200_000
    learn.remove_cb(KeepRun)
    assert '_do_fit' not in vars(learn)

def test_a_loss_made_with_something_else(tmp_path):
    "Neither its name nor its weights tell; what an earlier version has not stored is not held against a run"
    def train(eps, stop=None):
        learn = plain_learner(tmp_path)
        learn.loss_func = LabelSmoothingCrossEntropy(eps)
        with learn.no_bar(), learn.no_logging(): learn.fit(1, cbs=[KeepRun(run, minutes=0), Stop(stop, boom(RuntimeError('x')))])
    run = RunStore(tmp_path).run('a')
    with pytest.raises(RuntimeError): train(.1, 2)
    with pytest.raises(ValueError, match='other settings: loss_settings.eps: was 0.1, is 0.3'): train(.3)
    run.update(fit={k:v for k,v in run.info['fit'].items() if k!='loss_settings'})
    train(.1)
    assert run.status=='finished'

def test_a_table_of_runs_with_names_of_its_own(tmp_path):
    run = RunStore(tmp_path).run('a', epochs=9, run=1, accuracy='top 5')
    run.save_metrics(dict(accuracy=.5, status=1))
    row = RunStore(tmp_path).runs().loc['a']
    assert row[['epochs','settings.epochs','settings.run','accuracy','metrics.accuracy','status',
                'metrics.status']].tolist()==[0,9,1,'top 5',.5,'new',1]

def test_a_table_comes_back(tmp_path):
    "Whole numbers with all digits, even if one is missing; names that look like a missing value; columns of two levels"
    run = RunStore(tmp_path).run('a')
    run.save_table('t', pd.DataFrame({'seed':[20231120, np.nan], 'name':['NA','null'], 'x':[.123456789, np.inf]}))
    t = run.table('t')
    assert t.seed[0]==20231120 and np.isnan(t.seed[1]) and t.name.tolist()==['NA','null'] and t.x.tolist()==[.123457, np.inf]
    run.save_table('u', pd.DataFrame([[1,.5]], columns=pd.MultiIndex.from_tuples([('acc','n'), ('acc','mean')])))
    assert run.table('u').to_dict('list')=={'acc n':[1], 'acc mean':[.5]}

def test_text_in_a_table(tmp_path):
    "Of categories, over several lines as on any system; a column that was text once may hold numbers later"
    run,names = RunStore(tmp_path).run('a'),['007','a\rb','c\r\nd','e\nf']
    run.save_table('t', pd.DataFrame(dict(c=pd.Categorical(['007','042']*2), s=names, n=[1,2,3,4], x=[.5,1.,np.nan,2.])))
    t = run.table('t')
    assert t.c.tolist()==['007','042']*2 and t.s.tolist()==names and t.n.tolist()==[1,2,3,4] and t.x[0]==.5
    run.save_table('t', pd.DataFrame(dict(c=[1,2])))
    assert run.table('t').c.tolist()==[1,2] and run.info['text']=={}

def test_a_table_that_would_not_come_back_is_refused(tmp_path):
    run = RunStore(tmp_path).run('a')
    run.append(dict(table='epochs', x=1))
    with pytest.raises(ValueError, match="df: 'a' is the name of several columns"):
        run.save_table('t', pd.DataFrame([[1,2]], columns=['a','a']))
    with pytest.raises(ValueError, match="name='epochs': the run's history has a table of this name"):
        run.save_table('epochs', pd.DataFrame())
    assert run.history.x.tolist()==[1]

@pytest.mark.parametrize('values', [['x','\t',' ','y'], ['\t'], [' ','  '], ['x',' 1','2 ']])
def test_blank_text_in_a_table_of_one_column(tmp_path, values):
    run = RunStore(tmp_path).run('a')
    run.save_table('t', pd.DataFrame(dict(a=values)))
    assert run.table('t').a.tolist()==values

def test_missing_values_in_a_table_of_one_column(tmp_path):
    run = RunStore(tmp_path).run('a')
    run.save_table('t', pd.DataFrame(dict(a=[None,1.5,None])))
    assert run.table('t').a.isna().tolist()==[True,False,True]

@pytest.mark.parametrize('text', [{'tables/t.csv':5}, {'tables/t.csv':[5]}, {'tables/t.csv':'ab'}])
def test_text_of_another_type(tmp_path, text):
    run = RunStore(tmp_path).run('a')
    save_json(run.path/'run.json', dict(run.info, text=text))
    with pytest.raises(ValueError, match='missing or wrong fields text'): run.table('t')

def test_an_empty_table(tmp_path):
    run = RunStore(tmp_path).run('a')
    run.save_table('t', pd.DataFrame())
    assert run.table('t').empty

def test_rows_after_one_that_was_cut_off(tmp_path):
    run = RunStore(tmp_path).run('a')
    run.append(dict(table='t', x=1))
    with open(run.path/'history.jsonl', 'a') as f: f.write('{"table": "t", "x"')
    RunStore(tmp_path)['a'].append(dict(table='t', x=2))
    assert RunStore(tmp_path)['a'].table('t').x.tolist()==[1,2]

def test_a_damaged_run_hides_no_other(tmp_path):
    store = RunStore(tmp_path)
    store.run('a', lr=.1), (store.run('b').path/'run.json').write_text('{"of": "another program"}')
    with pytest.warns(UserWarning, match='run.json: not a file of this library'): table = store.runs()
    assert table.status.to_dict()==dict(a='new', b='damaged') and table.lr['a']==.1

def test_what_is_no_run_hides_no_run(tmp_path):
    "Nested too deeply to read, or a pipe, which nobody writes to"
    store = RunStore(tmp_path)
    store.run('a'), (store.run('b').path/'run.json').write_text('['*100_000)
    (tmp_path/'c').mkdir(), os.mkfifo(tmp_path/'c'/'run.json')
    with pytest.warns(UserWarning, match='b/run.json: damaged, not JSON'):
        assert store.runs().status.to_dict()==dict(a='new', b='damaged')

def test_weights_that_are_gone_are_not_those_before(tmp_path):
    learn,run = fit(tmp_path),RunStore(tmp_path)['a']
    for k,v in run.weights().items(): assert torch.equal(v, learn.model.state_dict()[k])
    files_module.remove_folder(run.path/'phases'/'erode', checkpoint_files)
    with pytest.raises(ValueError,
                       match="phases/erode: gone, with the weights at the end of this run; put it back, .*`weights\\('pretrain'\\)`"):
        run.weights()
    assert run.weights('pretrain')

def test_a_finished_run_is_loaded_from_where_nothing_can_be_written(tmp_path, monkeypatch):
    def train():
        learn = plain_learner(tmp_path)
        with learn.no_bar(), learn.no_logging(): learn.fit(1, cbs=KeepRun(RunStore(tmp_path).run('a')))
        return learn
    whole = train()
    def denied(self, *a, **k): raise PermissionError(13, 'Permission denied')
    monkeypatch.setattr(filelock.FileLock, '_acquire', denied)
    assert same(train(), whole)

def test_a_loaded_run_has_its_own_final_record(tmp_path):
    "Not that of the fit before it"
    def train():
        learn = plain_learner(tmp_path)
        with learn.no_bar(), learn.no_logging():
            learn.fit(1)
            before = list(learn.final_record)
            set_seed(3)
            learn.fit(2, cbs=KeepRun(RunStore(tmp_path).run('a')))
        assert learn.final_record==learn.recorder.values[-1]!=before
        return list(learn.final_record)
    assert train()==train()

def test_numbers_of_several_evaluation_sets(tmp_path):
    "Each `EvalSets` has a row of its own: the numbers of a run are those of all"
    def train(run, seed):
        dls = digits_dls(n=64, n_valid=32, bs=16)
        learn = Learner(dls, net(), opt_func=SGD, lr=.05, path=tmp_path)
        sets = EvalSets({'a':dls.valid}),EvalSets({'b':dls.valid}, n=8)
        with learn.no_bar(), learn.no_logging(): learn.fit_phases([Phase('p', 1)], cbs=sets, run=run)
        return learn
    run = RunStore(tmp_path).once(train, seed=0)
    assert set(run.metrics)=={'a','b'} and run.metrics==run.evals.query("when=='epoch'")[['a','b']].max().to_dict()
    kept = RunStore(tmp_path).run('kept')
    train(kept, 0)
    assert {k:kept.metrics[k] for k in 'ab'}=={k:kept.evals.iloc[i][k] for k,i in (('a',-2),('b',-1))}

@pytest.mark.parametrize('wrap', [noop, lambda ds: torch.utils.data.Subset(ds, range(32))], ids=['whole','subset'])
def test_other_tensors_of_a_pytorch_dataset_are_noticed(tmp_path, wrap):
    def train(scale):
        set_seed(0)
        ds = torch.utils.data.TensorDataset(torch.rand(64,3,16,16)*scale, torch.arange(64)%10)
        dls = DataLoaders(*(torch.utils.data.DataLoader(wrap(ds), 16) for _ in range(2)))
        learn = Learner(dls, net(), opt_func=SGD, lr=.05, loss_func=nn.functional.cross_entropy, path=tmp_path)
        with learn.no_bar(), learn.no_logging(): learn.fit(1, cbs=KeepRun(RunStore(tmp_path).run('a')))
    train(1), train(1)
    with pytest.raises(ValueError, match=r"run 'a' was begun with other settings: samples\.0\.held\.0: was"): train(2)

def test_a_store_in_the_home_folder(tmp_path, monkeypatch):
    monkeypatch.setenv('HOME', str(tmp_path))
    assert RunStore('~/runs').run('a').path==tmp_path/'runs'/'a'
    assert Run('~/runs/a').name=='a' and Run('~/runs/a').status=='new'

def test_two_processes_make_a_run(tmp_path):
    "The second leaves what the first may have begun with"
    run = RunStore(tmp_path).run('a', lr=.1)
    before = (run.path/'run.json').stat()
    assert RunStore(tmp_path).run('a', lr=.1).settings==dict(lr=.1) and (run.path/'run.json').stat().st_ino==before.st_ino
    assert RunStore(tmp_path).run('a', lr=.2).settings==dict(lr=.2)   # nothing was done with it yet

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

@pytest.mark.parametrize('name,kind',
                         [('../out',tarfile.REGTYPE), ('/feature_erosion_out',tarfile.REGTYPE), ('a/../../out',tarfile.REGTYPE),
                          ('link',tarfile.SYMTYPE), ('link',tarfile.LNKTYPE), ('fifo',tarfile.FIFOTYPE)])
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
    (tmp_path/'bomb.png').write_bytes(b'\x89PNG\r\n\x1a\n'+chunk(b'IHDR',
                                                                 struct.pack('>IIBBBBB', 12000, 12000, 8, 2, 0, 0, 0))+chunk(b'IDAT', zlib.compress(bytes(100)))+chunk(b'IEND', b''))
    with pytest.raises(ValueError, match='bomb.png: not a readable image'), warnings.catch_warnings():
        warnings.simplefilter('ignore')
        to_uint8(tmp_path/'bomb.png', (8,8))

def test_config_with_unknown_fields_or_code(tmp_path):
    run = RunStore(tmp_path).run('a', lr=.1)
    save_json(run.path/'run.json', dict(load_json(run.path/'run.json'), hook='__import__("os").mkdir("pwned")'))
    with pytest.raises(ValueError, match='unknown fields hook'): run.settings

@pytest.mark.parametrize('name', ['a/b', '../a', '/a', 'a\\b', '..', '.a', 'a\0b', ''])
def test_run_names(tmp_path, name):
    with pytest.raises(ValueError, match='name of a folder'): RunStore(tmp_path/'s').run(name)
    assert not list(tmp_path.iterdir())

@pytest.mark.parametrize('name', ['CON', 'nul', 'Aux.txt', 'prn.a.b', 'COM1', 'lpt9 .x'])
def test_names_of_devices(tmp_path, name):
    with pytest.raises(ValueError, match='Windows has a device'): RunStore(tmp_path/'s').run(name)
    for o in 'console','null','aux-1','com','COM10','lpt': RunStore(tmp_path).run(o)

# Nothing that is not ours is touched

def strangers(folder):
    "A folder as people have it: a checkout, secrets, an environment"
    for f in ('.git/config', '.git/HEAD', '.env', '.ssh/id', '.venv/bin/python', 'notes.txt', 'data/.hidden',
              'figures/.old.png.abcd1234x'):
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

def test_a_run_holds_no_others(tmp_path, capsys):
    "Neither of a store nor of the figure of several networks"
    run = RunStore(tmp_path).run('a')
    before = everything(tmp_path)
    with pytest.raises(ValueError, match='is a run, and cannot hold others.*a-runs1'): RunStore(run.path).run('b')
    assert main(['run','fig3','--data','digits','--arch','perceptron','--out',str(run.path)])==2
    assert f'{run.path} is a run' in capsys.readouterr().err and everything(tmp_path)==before

def test_leftovers_go_and_nothing_else(tmp_path):
    "In a run's folder, too: what a killed process was writing goes, by its own name; other people's files stay"
    whole = fit(tmp_path)
    run = RunStore(tmp_path)['a']
    before = strangers(run.path)
    (run.path/'last').mkdir(exist_ok=True)
    parts = [run.path/'.run.json.abcd1234.part', run.path/'last'/'.3.abcd1234.part'/'about.json']
    parts[1].parent.mkdir()
    for p in parts: p.write_text('{')
    run.update(status='running')
    assert same(fit(tmp_path), whole)
    after = everything(run.path)
    assert all(after[k]==v for k,v in before.items() if k not in ('run.json','.run.json.abcd1234.part') and 'last' not in k)
    assert not any(p.exists() for p in parts)

def test_delete_takes_only_what_the_run_wrote(tmp_path):
    "Not what others put next to its checkpoints, into one, or behind a link; and nothing outside that its run.json may name"
    fit(tmp_path, epochs=(1,1))
    store,run = RunStore(tmp_path),RunStore(tmp_path)['a']
    others = [run.path/'phases'/'mine'/'notes.txt', run.path/'phases'/'erode'/'notes.txt', run.path/'last'/'plan'/'x'/'y.txt',
              tmp_path/'precious.txt']
    for p in others:
        p.parent.mkdir(parents=True, exist_ok=True)
        p.write_text('mine')
    info = run.info
    for bad in ('../precious.txt', str(others[-1]), 'tables/../../precious.txt', 'phases/mine/notes.txt'):
        save_json(run.path/'run.json', dict(info, files={bad:'0'*64}))
        with pytest.raises(ValueError, match='none that a run writes'): store.delete('a')
    save_json(run.path/'run.json', info)
    (run.path/'phases'/'elsewhere').symlink_to(others[0].parent)
    store.delete('a')
    assert set(everything(tmp_path))=={str(p.relative_to(tmp_path)) for p in others}

@pytest.mark.parametrize('what', ['phases','last','tables','figures'])
def test_delete_does_not_follow_links(tmp_path, what):
    "Nor does a run that goes on: what lies behind one may belong to somebody else"
    fit(tmp_path, epochs=(1,1))
    run = RunStore(tmp_path)['a']
    run.save_table('t', pd.DataFrame(dict(a=[1])))
    (run.path/'last').mkdir(exist_ok=True)
    (run.path/what).rename(tmp_path/'theirs')
    (run.path/what).symlink_to(tmp_path/'theirs')
    before = everything(tmp_path)
    with pytest.raises(ValueError, match=f"name='a': .*{what} is a link; delete it by hand"): RunStore(tmp_path).delete('a')
    assert everything(tmp_path)==before
    assert not (what in ('phases','last') and any(p.parent.name==what for p in run._kept_folders()))

def test_checkpoints_behind_a_link_stay(tmp_path):
    "When a run goes on, and writes its own"
    run = RunStore(tmp_path).run('a')
    with pytest.raises(RuntimeError): fit(tmp_path, cbs=[Stop(4, boom(RuntimeError('x')))])
    (run.path/'last').rename(theirs := tmp_path/'theirs')
    (run.path/'last').symlink_to(theirs)
    before = {p.name for p in theirs.iterdir()}
    assert before and same(fit(tmp_path), fit(tmp_path/'whole')) and before<={p.name for p in theirs.iterdir()}

@pytest.mark.parametrize('state', [b'', b'x'])
def test_a_checkpoint_of_nothing(tmp_path, state):
    save_folder(tmp_path/'c', {**pack({}, {}), 'state.pt':state})
    with pytest.raises(ValueError, match='not a checkpoint of plain tensors'): unpack(tmp_path/'c')

@pytest.mark.parametrize('packed', [False, True])
def test_the_revision_is_read_and_nothing_of_the_folder_is_executed(tmp_path, monkeypatch, packed):
    "As `git rev-parse HEAD` says it; a `core.fsmonitor` of a folder that came from elsewhere is not run"
    git = lambda *a: subprocess.run(['git', '-c', 'user.name=a', '-c', 'user.email=a@b', *a], cwd=tmp_path, check=True,
                                    capture_output=True, text=True).stdout.strip()
    (tmp_path/'f').write_text('')
    git('init', '-b', 'main'), git('add', '.'), git('commit', '-m', 'x')
    want = git('rev-parse', 'HEAD')
    if packed: git('pack-refs', '--all')
    fit(tmp_path, 'run', epochs=(1,1))
    with open(tmp_path/'.git'/'config', 'a') as f: f.write(f'[core]\n\tfsmonitor = "touch {tmp_path}/pwned; false"\n')
    monkeypatch.chdir(tmp_path)
    report('run')
    assert environment()['git']==want==git_revision(tmp_path/'run') and not (tmp_path/'pwned').exists()
    git('-c', 'core.fsmonitor=', 'checkout', '--detach')
    assert git_revision(tmp_path)==want

def test_the_revision_of_a_worktree_and_a_submodule(tmp_path):
    "Inside of another checkout it is theirs, not that of the other; each as `git rev-parse HEAD` says it"
    main,work,part = tmp_path/'main',tmp_path/'main'/'work',tmp_path/'main'/'part'
    own = 'user.name=a','user.email=a@b','protocol.file.allow=always'
    def git(at, *a):
        return subprocess.run(['git', *(o for c in own for o in ('-c', c)), *a], cwd=at, check=True, capture_output=True,
                              text=True).stdout.strip()
    def commit(at): git(at, 'commit', '--allow-empty', '-m', at.name)
    for o in main,tmp_path/'other': git(tmp_path, 'init', '-b', 'main', str(o)), commit(o)
    git(main, 'worktree', 'add', '-b', 'new', str(work)), git(main, 'submodule', 'add', str(tmp_path/'other'), 'part')
    for o in work,part: commit(o)
    heads = [git(o, 'rev-parse', 'HEAD') for o in (main,work,part)]
    assert len(set(heads))==3 and [git_revision(o) for o in (main,work,part)]==heads
    git(work, 'pack-refs', '--all')
    assert git_revision(work)==heads[1]
    (work/'.git').write_text('')
    assert git_revision(work) is None

@pytest.mark.parametrize('head', ['ref: ../../secret', 'ref: refs/../../secret', 'ref: /etc/passwd', 'secret', ''])
def test_a_revision_is_nothing_but_a_hash(tmp_path, head):
    (tmp_path/'.git').mkdir()
    (tmp_path/'secret').write_text('a'*40)
    (tmp_path/'.git'/'HEAD').write_text(head)
    assert git_revision(tmp_path) is None
