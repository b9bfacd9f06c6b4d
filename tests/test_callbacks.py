"Who leads the learning rate, what watches a phase, and what loggers write: other people's callbacks in a fit of several phases."
import json
from copy import copy
import numpy as np, pandas as pd, pytest, torch
from torch import nn
from fastai.callback.all import CSVLogger, EarlyStoppingCallback, GradientAccumulation, ParamScheduler, ReduceLROnPlateau, SaveModelCallback, SchedLin, ShortEpochCallback
from fastai.callback.fp16 import NonNativeMixedPrecision
from fastai.vision.all import SGD, Callback, CancelEpochException, CancelFitException, CancelTrainException, CancelValidException, DataLoaders, FetchPredsCallback, Learner, OptimWrapper, ValueMetric, accuracy, load_learner, params, partial, plt, set_seed
from feature_erosion.data import digits_dls
from feature_erosion.evalsets import EvalSets, pattern_sets, train_accuracy
from feature_erosion.learner import erosion_learner
from feature_erosion.mitigations import Only, Replay
from feature_erosion.patterns import ColorSquare
from feature_erosion.phases import Phase, PhaseSchedule, PerPhase, schedules
from feature_erosion.runs.store import RunStore
from feature_erosion.watch import WatchErosion

works = partial(pytest.mark.works, kind='callbacks')

def net(): return nn.Sequential(nn.Flatten(), nn.Linear(768,10))

@pytest.fixture
def dls():
    set_seed(0)
    return digits_dls(n=64, n_valid=60, bs=16)   # four batches an epoch

@pytest.fixture(params=['torch SGD','fastai SGD'])
def learn(request, dls, tmp_path):
    "With the optimiser of `erosion_learner`, and with fastai's own"
    plain = partial(Learner, opt_func=SGD, metrics=accuracy)
    learner = (erosion_learner if request.param=='torch SGD' else plain)(dls, net(), path=tmp_path)
    with learner.no_bar(), learner.no_logging(): yield learner

class Score(Callback):
    "A metric that says what it is told, an entry an epoch, so that what watches it can be worked out by hand"
    order = 0
    def __init__(self, *scores): self.scores = scores
    def before_fit(self): self.learn.metrics = self.learn.metrics + ValueMetric(lambda: self.scores[self.learn.epoch], 'score')
    def after_fit(self): self.learn.metrics = self.learn.metrics[:-1]

class Weights(Callback):
    "The weights after each epoch, and when a phase begins"
    order,run_valid = 55,False
    def before_fit(self): self.ends,self.starts = [],[]
    def before_phase(self): self.starts.append(self.now())
    def after_epoch(self): self.ends.append(self.now())
    def now(self): return self.learn.model[1].weight.detach().clone()

def lrs(learn): return [float(o) for o in learn.recorder.lrs]
def two(lr=(.001,.01), n=1, sched='constant'): return [Phase(k, n, lr=l, sched=sched) for k,l in zip('ab', lr)]

# who leads

def hypers(learn, k): return [round(h[k], 6) for h in learn.opt.hypers]

class Seen(Callback):
    "Learning rate and weight decay of each group at the first batch of each phase"
    order = 70
    def before_fit(self): self.rates = {}
    def before_batch(self):
        if self.training: self.rates.setdefault(self.learn.phase.name, (hypers(self.learn, 'lr'), hypers(self.learn, 'wd')))

def test_phases_train_as_fit_says(learn):
    "A phase of its own keeps what it was given; the next has the fit's again"
    seen = Seen()
    learn.fit(3, lr=.003, wd=.5,
              cbs=[PhaseSchedule([Phase('a', 1, sched='constant'), Phase('b', 1, lr=.02, wd=.1, sched='constant'),
                                  Phase('c', 1, opt='keep', sched='constant')]), seen])
    assert seen.rates==dict(a=([.003],[.5]), b=([.02],[.1]), c=([.003],[.5]))

def test_parameter_groups_train_as_fit_says(dls):
    learn,seen = Learner(dls, nn.Sequential(nn.Flatten(), nn.Linear(768,10), nn.Linear(10,10)),
                         splitter=lambda m: [list(m[1].parameters()), list(m[2].parameters())], opt_func=SGD),Seen()
    with learn.no_bar(), learn.no_logging():
        learn.fit(2, lr=slice(.001,.1),
                  cbs=[PhaseSchedule([Phase('a', 1, sched='constant'), Phase('b', 1, lr=[.02,.03], sched='constant')]), seen])
    assert {k:v[0] for k,v in seen.rates.items()}==dict(a=[.001,.1], b=[.02,.03])

@pytest.mark.parametrize('lr,want', [(slice(.001,.1), [.001,.1]), (slice(.1), [.01,.1])])
def test_parameter_groups_of_an_erosion_learner(dls, lr, want):
    "PyTorch's optimiser takes no slice: the rates are set as fastai would"
    learn,seen = erosion_learner(dls, nn.Sequential(nn.Flatten(), nn.Linear(768,10), nn.Linear(10,10)), lr=lr,
                                 splitter=lambda m: [list(m[1].parameters()), list(m[2].parameters())]),Seen()
    with learn.no_bar(), learn.no_logging(): learn.fit_phases([Phase('a', 1, sched='constant')], cbs=seen)
    assert seen.rates['a'][0]==want

@works(what='`PerPhase(ParamScheduler(…))`', how='refused: a phase has its own schedule, Phase(…, sched={…})')
@pytest.mark.parametrize('k', ['lr','wd'])
def test_a_scheduler_is_not_per_phase(learn, k):
    with pytest.raises(ValueError, match='`PerPhase` does not make a ParamScheduler begin anew'):
        learn.fit_phases(two(), cbs=PerPhase(ParamScheduler({k:SchedLin(0, 1)})))
    learn.fit(1, cbs=PerPhase(ParamScheduler({'lr':SchedLin(.1, 0)})))   # without phases it works as usual
    assert lrs(learn)==pytest.approx([.1,.075,.05,.025])

@pytest.mark.parametrize('kw,said',
                         [(dict(lr=[.1,.2,.3]), "phase 'b' has 3 values, the optimiser 1"),
                          (dict(wd=[.1,.2]), "phase 'b' has 2 values"), (dict(sched={'lrr':SchedLin(.1, 0)}), "schedules 'lrr'"),
                                     (dict(sched=lambda pct: 'low'), "sets 'lr' to 'low'"),
                                     (dict(sched=lambda pct: [.1,.2]), "sets 'lr' to")])
def test_wrong_settings_are_found_before_training(learn, kw, said):
    start = net_weights(learn)
    with pytest.raises(ValueError, match=said): learn.fit_phases([Phase('a', 1), Phase('b', 1, **kw)])
    assert torch.equal(net_weights(learn), start)

def net_weights(learn): return learn.model[1].weight.detach().clone()

def test_a_phase_needs_a_validation_set(dls):
    with pytest.raises(ValueError, match="dls: phase 'b' has no validation set"): Phase('b', 1, DataLoaders(dls.train))

def test_an_export_leaves_the_phases_data_out(learn, dls, tmp_path):
    easy = dls.inject(ColorSquare(4))
    learn.add_cb(PhaseSchedule([Phase('a', 1), Phase('b', 1, easy)]))
    learn.fit(2)
    learn.export('x.pkl')
    new = load_learner(tmp_path/'x.pkl').phase_schedule.phases
    assert new.attrgot('name')==['a','b'] and new.attrgot('dls')==[None,None] and (tmp_path/'x.pkl').stat().st_size<4*7690+60_000
    assert learn.phase_schedule.phases[1].dls is easy and copy(learn.phase_schedule).phases[1].dls is easy
    learn.fit(2)

@works(what='`fit_one_cycle` or `fit_flat_cos` around phases with schedules of their own', how='refused: says how to choose one')
@pytest.mark.parametrize('fit', ['fit_one_cycle','fit_flat_cos'])
def test_two_schedules_are_refused(learn, fit):
    said = r"the phases schedule lr, and so does a ParamScheduler.*Phase\(…, sched={}\)"
    with pytest.raises(ValueError, match=said): getattr(learn, fit)(2, cbs=PhaseSchedule(two()))
    learn.fit(2, cbs=PhaseSchedule(two()))
    assert lrs(learn)==[.001]*4+[.01]*4

@works(what='`fit_one_cycle` around phases that leave it the schedule, `sched={}`', how='works: one cycle over all phases')
def test_phases_can_leave_the_schedule_to_the_fit(learn):
    learn.fit_one_cycle(2, lr_max=.1, cbs=PhaseSchedule([Phase('a', 1, sched={}), Phase('b', 1, sched={})]))
    got = lrs(learn)
    learn.fit_one_cycle(2, lr_max=.1)
    assert got==lrs(learn) and len(set(got))==8 and got[0]==pytest.approx(.1/25) and max(got)==pytest.approx(.1)

@works(what='`ParamScheduler` of what the phases do not schedule', how='works: beside the phases\' learning rate')
def test_another_hyper_parameter_has_its_own_schedule(learn):
    seen = []
    class Look(Callback):
        order = 100
        def after_batch(self): self.training and seen.append(self.opt.hypers[-1]['wd'])
    learn.fit(2, cbs=[PhaseSchedule(two()), ParamScheduler({'wd':SchedLin(.8, 0.)}), Look()])
    assert seen==pytest.approx([.8-.1*i for i in range(8)]) and lrs(learn)==[.001]*4+[.01]*4

@works(what='`ReduceLROnPlateau` over all phases', how="works: a factor on the phase's schedule until the phase ends")
def test_a_plateau_scales_what_is_scheduled(learn):
    "multi_step on 4 epochs of 4 batches steps after 8 and 12; the plateau is noticed after epochs 2, 3 and 4"
    phases = [Phase('a', 4, lr=1e-3), Phase('b', 1, lr=2e-3, sched='constant')]
    learn.fit_phases(phases, cbs=[Score(1,1,1,1,1), ReduceLROnPlateau('score', factor=2.)])
    base = [1e-3]*8+[1e-4]*4+[1e-5]*4
    assert lrs(learn)==pytest.approx([b/f for b,f in zip(base, [1]*8+[2]*4+[4]*4)]+[2e-3]*4)

@works(what='`PerPhase(ReduceLROnPlateau(…))`', how='works: what is best is asked anew in each phase')
def test_a_plateau_in_each_phase(learn):
    scores = 5,1,1, 4,3,3   # phase b never comes near the best of a
    learn.fit_phases(two((1e-3,1e-2), 3), cbs=[Score(*scores), PerPhase(ReduceLROnPlateau('score', comp=np.less))])
    assert lrs(learn)==pytest.approx([1e-3]*12+[1e-2]*12)
    learn.fit_phases(two((1e-3,1e-2), 4), cbs=[Score(5,5,5,5, 4,3,3,3), PerPhase(ReduceLROnPlateau('score', comp=np.less))])
    assert lrs(learn)==pytest.approx([1e-3]*8+[1e-4]*4+[1e-5]*4 + [1e-2]*12+[1e-3]*4)

@works(what="a callback that scales the learning rate in each batch, e.g. a warm-up", how='works: for that batch only')
def test_what_is_scaled_within_a_batch_is_not_scaled_twice(learn):
    class Warm(Callback):
        run_valid,order = False,70
        def before_batch(self): self.opt.set_hyper('lr', self.opt.hypers[-1]['lr']*min(1, (self.learn.iter+1)/4))
    learn.fit_phases(two(), cbs=Warm())
    assert lrs(learn)==pytest.approx([1e-3*o for o in (.25,.5,.75,1)]+[1e-2*o for o in (.25,.5,.75,1)])

@works(what='a callback that halves the learning rate between batches', how='works: the halves add up until the phase ends')
def test_what_is_scaled_between_batches_lasts(learn):
    class Halve(Callback):
        run_valid,order = False,70
        def after_batch(self): self.opt.set_hyper('lr', self.opt.hypers[-1]['lr']/2)
    learn.fit_phases(two(), cbs=Halve())
    assert lrs(learn)==pytest.approx([1e-3/2**i for i in range(4)]+[1e-2/2**i for i in range(4)])

def test_parameter_groups_are_scaled_each_by_itself(dls):
    class Freeze(Callback):
        run_valid = False
        def after_batch(self):
            if self.learn.train_iter==2: self.opt.set_hyper('lr', [self.opt.hypers[0]['lr']/8, self.opt.hypers[1]['lr']])
    seen = []
    class Look(Callback):
        order = 100
        def after_step(self): seen.append([h['lr'] for h in self.opt.hypers])
    learn = Learner(dls, net(), opt_func=SGD, splitter=lambda m: [[m[1].weight],[m[1].bias]])
    phases = PhaseSchedule([Phase('a', 1, lr=slice(.01,.1), sched='linear')])
    with learn.no_bar(), learn.no_logging(): learn.fit(1, cbs=[phases, Freeze(), Look()])
    assert np.allclose(seen, [[.01,.1],[.0075,.075],[.005/8,.05],[.0025/8,.025]])

def test_state_of_the_schedule_is_plain(learn):
    states = []
    class Keep(Callback):
        order,run_valid = 90,False
        def after_epoch(self): states.append(json.loads(json.dumps(self.learn.phase_schedule.state_dict())))
    learn.fit(4, cbs=[PhaseSchedule(two(n=2)), Score(1,1,1,1), ReduceLROnPlateau('score'), Keep()])
    assert [o['factors'] for o in states]==[{},{},{},{'lr':[pytest.approx(.1)]}]   # known at the next batch, if the phase has one
    assert states[1]['left_at']=={'lr':[.001]}

# what watches a phase

@works(what='`PerPhase(EarlyStoppingCallback(…))`', how='works: ends the phase, the next goes on')
def test_early_stopping_in_each_phase(learn):
    scores = [.5,.4,.3, .1,.2,.3,.1,.1, .9]   # a: best at once, two worse; b: best in its third epoch, two worse; c
    stop = PerPhase(EarlyStoppingCallback('score', patience=2))
    learn.fit_phases([Phase('a', 8), Phase('b', 8), Phase('c', 1)], cbs=[Score(*scores), stop])
    assert learn.recorder.phases.stop_epoch.tolist()==[3,8,9] and learn.recorder.history.score.tolist()==scores

@works(what='`EarlyStoppingCallback` over all phases', how='works: ends the whole fit, with what was done')
def test_early_stopping_of_the_fit(learn):
    stop = EarlyStoppingCallback('score', patience=2)
    learn.fit_phases([Phase('a', 2), Phase('b', 8), Phase('c', 1)], cbs=[Score(.5,.4,.3,.9), stop])
    assert learn.recorder.history.phase.tolist()==['a','a','b'] and list(learn.snapshots)==['start','a','b']

@works(what='`PerPhase(SaveModelCallback(…))`', how='works: a file for each phase, which ends with its best weights')
def test_the_best_of_each_phase(learn):
    w = Weights()
    save = PerPhase(SaveModelCallback('score', fname='best'))
    learn.fit_phases([Phase('a', 3, lr=.1), Phase('b', 3, lr=.1)], cbs=[Score(1,3,2, 2,0,1), w, save])
    assert torch.equal(w.starts[1], w.ends[1]) and not torch.equal(w.ends[1], w.ends[2])          # b begins with a's second epoch
    for p,e in (('a',1),('b',3)):
        assert torch.equal(learn.snapshots[p]['1.weight'], w.ends[e])
        assert torch.equal(torch.load(learn.path/'models'/f'best_{p}.pth', weights_only=True)['1.weight'], w.ends[e])

def test_per_phase_without_phases(learn):
    "In an ordinary fit the callback is what it ever was"
    learn.fit(9, cbs=[Score(.5,.4,.3,.2), PerPhase(EarlyStoppingCallback('score', patience=2))])
    assert learn.recorder.history.score.tolist()==[.5,.4,.3] and not hasattr(learn, 'per_phase')

def test_per_phase_of_a_class(learn):
    "As in fastai, a class stands for a callback made without arguments"
    with learn.no_logging(): learn.fit_phases([Phase('a', 4, lr=0.), Phase('b', 1)], cbs=PerPhase(EarlyStoppingCallback))
    assert learn.recorder.history.phase.tolist()==['a','a','b']   # nothing improves: its patience is 1

def test_per_phase_of_what_knows_phases(learn):
    "It would not act, or rows would lack the phase"
    with pytest.raises(ValueError, match='replay knows about phases'): PerPhase(Replay(learn.dls, 8))
    with pytest.raises(ValueError, match='CSVLogger has a column for the phase'): PerPhase(CSVLogger)

@pytest.mark.parametrize('make', [WatchErosion, lambda d: EvalSets({'a':d.valid})])
@pytest.mark.filterwarnings('ignore::feature_erosion.watch.ErosionWarning')
def test_per_phase_adds_no_column_in_the_middle_of_a_table(learn, make):
    cb = make(learn.dls)
    learn.fit_phases(two(), cbs=PerPhase(cb))
    df = learn.recorder.history
    assert df.phase.tolist()==['a','b'] and not set(cb.columns) & set(df.columns) and len(df.dropna())==2
    logged = cb.history if isinstance(cb, WatchErosion) else learn.recorder.evals
    assert set(logged.phase)=={'a','b'} and logged[cb.columns[0]].notna().all()

def test_per_phase_keeps_its_state():
    a,b = (PerPhase(EarlyStoppingCallback('score', patience=2)) for _ in range(2))
    a.watcher.best,a.watcher.wait = .75,1
    b.load_state_dict(json.loads(json.dumps(a.state_dict())))
    assert (b.watcher.best,b.watcher.wait)==(.75,1)

# which weights are kept

@works(what='many phases, of which few are to be kept: `snapshots=`', how='works: those named, no others')
def test_snapshots(learn):
    phases = [Phase(f't{i}', iters=1) for i in range(6)]
    learn.fit_phases(phases, snapshots=['start','t4'])
    assert list(learn.snapshots)==['start','t4']
    with pytest.raises(ValueError, match='start, t4.*snapshots='): learn.models_at('t3')
    learn.snapshots = {}
    learn.fit_phases(phases, snapshots=[])
    assert learn.snapshots=={} and len(learn.recorder.phases)==6
    for bad in ('last',['t9']):
        with pytest.raises(ValueError, match="snapshots=.*must be 'all', or a list of names among start, t0"):
            learn.fit_phases(phases, snapshots=bad)

def test_an_earlier_fits_weights_are_not_those_of_a_phase_of_the_same_name(learn, tmp_path):
    learn.fit_phases([Phase('a', iters=1), Phase('b', iters=1)])
    run,phases = RunStore(tmp_path).run('r'),[Phase('a', iters=2)]
    for _ in 'trained','loaded':   # both times its weights are in the run's folder only
        learn.fit_phases(phases, run=run, snapshots=[])
        assert all(torch.equal(v, run.weights('a')[k]) for k,v in learn.snapshots['a'].items())
        assert list(learn.snapshots)==['b']
        learn.snapshots['a'] = {}
    learn.fit_phases(phases, snapshots=[])
    with pytest.raises(ValueError, match="name='a': no weights of such a phase are kept; there are b"): learn.models_at('a')

# which epochs count

class EndEpoch(Callback):
    "Ends each epoch's training after its second batch"
    def __init__(self, error): self.error = error
    def after_batch(self):
        if self.training and self.learn.iter==1: raise self.error

def test_a_cancelled_epoch_counts(learn):
    "The second phase has its epochs, though none was whole; nothing was measured"
    learn.fit_phases(two(n=2), cbs=EndEpoch(CancelEpochException))
    assert learn.recorder.phases[['start_epoch','stop_epoch','start_iter','stop_iter']].values.tolist()==[[0,2,0,4],[2,4,4,8]]
    assert list(learn.snapshots)==['start','a','b']
    assert learn.recorder.history.drop(columns=['phase','iters']).isna().all(axis=None)

def test_skipped_epochs_count(learn):
    "`start_epoch=1` leaves out the first of the four"
    learn.fit(4, cbs=PhaseSchedule(two(n=2)), start_epoch=1)
    assert learn.recorder.phases[['stop_epoch','stop_iter']].values.tolist()==[[2,4],[4,12]]

def test_phases_that_are_not_reached_are_named(learn):
    "Two epochs of four batches are reserved for eight iterations, and each epoch ends after two"
    with pytest.warns(UserWarning, match='not trained to the end: b, c;.*cut epochs short.*4 are over'):
        learn.fit_phases([Phase('a', 1), Phase('b', iters=8), Phase('c', iters=4)], cbs=ShortEpochCallback(.25))
    assert learn.recorder.phases[['phase','stop_iter']].values.tolist()==[['a',2],['b',8]]

@pytest.mark.parametrize('phases', [True,False], ids=['phases','none'])
@pytest.mark.parametrize('train_metrics', [False,True])
def test_a_short_epoch_keeps_its_columns(learn, dls, phases, train_metrics):
    "At a learning rate of zero each epoch has the numbers of one validation; fastai's row begins with the validation loss"
    learn.recorder.train_metrics = train_metrics
    cbs = [EndEpoch(CancelTrainException), CSVLogger(), EvalSets(dict(clean=dls.valid, twin=dls.valid))]
    if phases: learn.fit_phases([Phase('a', 1, lr=0.), Phase('b', 1, lr=0.)], cbs=cbs)
    else: learn.fit(2, 0., cbs=cbs)
    h,ev,v = learn.recorder.history,learn.recorder.evals,'valid_' if train_metrics else ''
    loss,acc = learn.validate()[:2]
    if not phases and train_metrics:
        # as many columns of one as of the other: which they were is not known
        assert h.drop(columns='iters').isna().all(axis=None)
        return
    assert np.allclose(h[['valid_loss',f'{v}accuracy',f'{v}clean',f'{v}twin']].astype(float), [[loss,acc,acc,acc]]*2, atol=1e-6)
    assert h.train_loss.notna().all()==phases
    if phases: assert np.allclose(pd.read_csv(learn.path/'history.csv').valid_loss, loss, atol=1e-5)
    assert (ev.iter==ev.total_iter-np.where(ev.phase=='b', 2, 0)).all() and ev[ev.when=='epoch'].total_iter.tolist()==[2,4]

def test_sets_are_no_metrics_of_training(learn, dls):
    "With `train_metrics` fastai has two columns for each; a set is measured once, after the epoch, and never on training batches"
    learn.recorder.train_metrics = True
    learn.fit(2, cbs=EvalSets(dict(twin=dls.valid)))
    h = learn.recorder.history
    assert h.train_twin.isna().all() and h.train_accuracy.notna().all()
    assert np.allclose(h.valid_twin, h.valid_accuracy)

def test_validation_within_a_fit(learn, dls):
    "What it changes of the Learner and the Recorder is put back"
    class Checks(Callback):
        order = 30
        def __init__(self, *events): [setattr(self, o, partial(self.go, o)) for o in events]
        def go(self, event):
            if self.learn.lock.locked() or event=='after_batch' and not (self.training and self.learn.iter==2): return
            self.learn.validate(), self.learn.get_preds(dl=dls.train), self.learn.tta(n=1)
    start,got = learn.model.state_dict(),[]
    start = {k:v.clone() for k,v in start.items()}
    for cbs in ([], [Checks('after_batch','after_train','after_epoch')]):
        learn.model.load_state_dict(start)
        sets = EvalSets(dict(clean=dls.valid))
        learn.fit_phases([Phase('a', 2, lr=.01, sched='cosine'), Phase('b', iters=6, lr=.01)], cbs=[sets, *cbs])
        got.append([learn.recorder.history.drop(columns=['train_loss','valid_loss','accuracy','clean']), learn.recorder.phases,
                    learn.recorder.evals.drop(columns='clean'), lrs(learn)])
        assert learn.recorder.history.notna().all(axis=None) and len(learn.recorder.losses)==14
    for a,b in zip(*got): assert a==b if isinstance(a, list) else a.equals(b)

@pytest.mark.parametrize('phases', [True,False])
def test_predictions_fetched_within_a_fit(learn, dls, phases):
    "fastai takes the Recorder away while it predicts: evaluations wait until it is back"
    cbs = [FetchPredsCallback(), EvalSets(dict(clean=dls.valid), at=[])]
    if phases: learn.fit_phases(two(), cbs=cbs)
    else: learn.fit(2, .01, cbs=cbs)
    h,ev = learn.recorder.history,learn.recorder.evals
    assert ev.total_iter.tolist()==h.iters.tolist() and ev.clean.tolist()==h.clean.tolist()==h.accuracy.tolist()

# what a phase begins with

def test_no_gradients_are_left(dls):
    "A batch of the first phase was not enough for a step: the second one's first step is by its own two batches, as in a fit"
    batches,steps = [],[]
    class Grads(Callback):
        order,run_valid = GradientAccumulation.order+1,False
        def before_batch(self): batches.append((self.learn.phase.name, self.x, self.y))
        def before_step(self): steps.append((len(batches), [p.grad.clone() for p in self.model.parameters()]))
    learn = Learner(dls, net(), opt_func=SGD)
    with learn.no_bar(), learn.no_logging():
        learn.fit_phases([Phase('a', iters=3, lr=0.), Phase('b', iters=2, lr=0.)], cbs=[GradientAccumulation(32), Grads()])
    assert [n for n,_ in steps]==[2,5] and [o for o,*_ in batches]==list('aaabb') and {len(x) for _,x,_ in batches}=={16}
    x,y = (torch.cat([v.as_subclass(torch.Tensor) for v in o]) for o in list(zip(*batches[3:]))[1:])
    want = torch.autograd.grad(nn.functional.cross_entropy(learn.model(x), y), list(learn.model.parameters()))
    assert all(torch.allclose(a, b, atol=1e-6) for a,b in zip(steps[-1][1], want))

@pytest.mark.parametrize('sched', [o for o in schedules if o!='one_cycle'])
def test_groups_at_learning_rate_zero_stay(dls, sched):
    m = nn.Sequential(nn.Flatten(), nn.Linear(768,8), nn.ReLU(), nn.Linear(8,10))
    learn = Learner(dls, m, opt_func=SGD, splitter=lambda m: [params(m[1]),params(m[3])])
    body,head = m[1].weight.detach().clone(),m[3].weight.detach().clone()
    with learn.no_bar(), learn.no_logging(): learn.fit_phases([Phase('a', 1, lr=[0,.1], sched=sched), Phase('b', 1, lr=0, sched=sched)])
    assert torch.equal(m[1].weight, body) and not torch.equal(m[3].weight, head) and lrs(learn)[-4:]==[0]*4

@pytest.mark.parametrize('opt', ['reset','keep'])
def test_frozen_weights_do_not_decay(dls, opt):
    "fastai's optimisers decay whatever has a gradient, and the first phase leaves zeros"
    m = nn.Sequential(nn.Flatten(), nn.Linear(768,8), nn.ReLU(), nn.Linear(8,10))
    learn = Learner(dls, m, opt_func=SGD, wd=.1, splitter=lambda m: [params(m[1]),params(m[3])])
    with learn.no_bar(), learn.no_logging():
        learn.fit_phases([Phase('a', 1, lr=.1)])
        learn.freeze()
        body,head = m[1].weight.detach().clone(),m[3].weight.detach().clone()
        learn.fit_phases([Phase('b', 1, lr=.1), Phase('c', 1, lr=.1, opt=opt)])
    assert torch.equal(m[1].weight, body) and not torch.equal(m[3].weight, head) and learn.opt.frozen_idx==1

def test_what_phases_cannot_train_is_refused(learn, dls):
    class Half(NonNativeMixedPrecision):
        def __init__(self): pass
    with pytest.raises(ValueError, match='would train nothing; use `to_fp16`'): learn.fit_phases(two(), cbs=Half())
    with pytest.raises(ValueError, match="schedules 'momentum'; the optimiser has .*mom"):
        learn.fit_phases([Phase('a', 1, sched={'momentum':SchedLin(.9, 0.)})])
    learn.opt_func,learn.opt = partial(OptimWrapper, opt=torch.optim.Adagrad),None
    with pytest.raises(ValueError, match="phase 'b' schedules 'mom'; the optimiser has lr"):
        learn.fit_phases([Phase('a', 1), Phase('b', 1, sched='one_cycle')])
    learn.dls = DataLoaders(dls.train.new(bs=65, drop_last=True), dls.valid)
    with pytest.raises(ValueError, match="phase 'a' has no batch to train on"): learn.fit_phases(two())
    learn.dls = DataLoaders(dls.train)
    with pytest.raises(ValueError, match="phase 'a' has no validation set"): learn.fit_phases(two())
    learn.dls = dls.new_empty()
    with pytest.raises(ValueError, match="phase 'a' has no batch.*an exported Learner has none"): learn.fit_phases(two())

def test_schedules_that_stay_on_a_learner(learn):
    "What watches their phases stays out of `lr_find`, before the first fit as well; one fit has one schedule"
    learn.add_cbs([PhaseSchedule(two()), PerPhase(ReduceLROnPlateau())])
    learn.lr_find(num_it=20, show_plot=False)
    with pytest.raises(ValueError, match='more than one `PhaseSchedule`, for a, b and c; give one'): learn.fit_phases(Phase('c', 1))
    learn.fit(2)
    assert learn.recorder.history.phase.tolist()==['a','b']
    learn.remove_cb(PhaseSchedule)
    learn.fit_phases(Phase('c', 1))
    assert learn.recorder.history.phase.tolist()==['c']

class Interrupts(Callback):
    "The user presses Ctrl-C in the second phase, once"
    order,run_valid,left = 70,False,1
    def after_batch(self):
        if self.learn.train_iter<5 or not self.left: return
        self.left = 0
        raise KeyboardInterrupt

@pytest.mark.parametrize('how', ['fit','lr_find','validate'])
def test_after_an_interrupt_a_callback_that_stays_leaves_no_trace(learn, dls, how):
    "Data of the phase, frozen weights and columns: whatever comes next is as if it had not been"
    other = digits_dls(n=48, n_valid=60, bs=16)
    learn.add_cbs([PhaseSchedule([Phase('a', 1), Phase('b', 1, other), Phase('c', 1)]), WatchErosion(dls), Only('1.bias', ['b'])])
    with pytest.raises(KeyboardInterrupt): learn.fit(3, cbs=Interrupts())
    seen = []
    class Sees(Callback):
        order = 90
        def look(self): seen.append((learn.dls, [p.requires_grad for p in params(learn.model)]))
        def before_train(self):
            if how=='lr_find': self.look()   # it does not validate
        def before_validate(self): self.look()
    with learn.added_cbs(Sees()):
        if how=='fit': learn.fit(3)
        elif how=='lr_find': learn.lr_find(num_it=8, show_plot=False)
        else: assert len(learn.validate())==2
    assert learn.dls is dls and learn.metrics.attrgot('name')==['accuracy']
    assert seen and [o[0] for o in seen]==([dls,other,dls] if how=='fit' else [dls]*len(seen))
    assert all(all(o[1]) or o[0] is other for o in seen)

def test_another_models_optimiser_is_not_kept(learn):
    "It would train nothing of the new model, without a word; one that has some of its weights is kept"
    learn.fit_phases(two())
    learn.model = net()
    with pytest.raises(ValueError, match="opt='keep': phase 'a' would keep an optimiser of another model"):
        learn.fit_phases(Phase('a', 1, opt='keep'))
    learn.create_opt()
    start = learn.model[1].weight.detach().clone()
    learn.fit_phases(Phase('a', 1, lr=.1, opt='keep'))
    assert (learn.model[1].weight!=start).any()

def test_phases_on_a_logarithmic_axis(learn, dls):
    learn.fit_phases(two(), cbs=EvalSets(dict(clean=dls.valid), at=[]))
    ax = plt.subplots()[1]
    ax.set_xscale('symlog')
    assert learn.recorder.plot_phases(ax=ax).get_xscale()=='symlog'

def test_a_plot_of_the_schedule(learn):
    "fastai's, of this fit's learning rates, after another schedule's"
    learn.fit_one_cycle(1, .1)
    learn.fit_phases(two())
    learn.recorder.plot_sched()
    assert learn.recorder.hps=={'lr':learn.recorder.lrs} and lrs(learn)==[.001]*4+[.01]*4

def test_until_with_a_pytorch_loader():
    torch.manual_seed(0)
    items = [(torch.randn(4), i%2) for i in range(10)]
    loaders = DataLoaders(*(torch.utils.data.DataLoader(items, 4, shuffle=True) for _ in range(2)))
    learn = Learner(loaders, nn.Linear(4,2), loss_func=nn.CrossEntropyLoss(), opt_func=SGD)
    right = int((learn.model(torch.stack([x for x,_ in items])).argmax(1)==torch.tensor([y for _,y in items])).sum())
    for level,epochs in ((right/10,1), (right/10+.05,2)):
        with learn.no_bar(), learn.no_logging(): learn.fit_phases([Phase('a', 2, lr=0., until=train_accuracy(level))])
        assert learn.recorder.phases.stop_epoch.tolist()==[epochs]

# what is written

def painted(dls): return [Phase('learn', 2), Phase('erode', iters=6, dls=dls.inject(ColorSquare(4)))]

def logged(learn, name):
    return [('learn',1),('learn',1),('erode',2),('erode',2)], learn.recorder.history[name].astype(float).tolist()

@works(what='`CSVLogger`', how='works: evaluation sets and the phase are columns')
def test_csv(learn, dls):
    learn.fit_phases(painted(dls), cbs=CSVLogger())
    df,(names,clean) = pd.read_csv(learn.path/'history.csv'),logged(learn, 'clean')
    assert df.phase.tolist()==[k for k,_ in names] and np.allclose(df.clean, clean, atol=1e-6)
    assert list(df)==['epoch','train_loss','valid_loss','accuracy','clean','pattern','conflict','conflict_picture','phase','time']

@works(what='the table of epochs on the screen', how='works: shows the phase, and a number once')
def test_table(dls, capsys):
    learn = erosion_learner(dls, net())
    before = learn.logger
    learn.fit_phases(painted(dls))
    rows = [o.split() for o in capsys.readouterr().out.replace('\r', '\n').splitlines() if o[:1] in '0123' and len(o.split())>5]
    assert [r[-2] for r in rows]==['learn','learn','erode','erode'] and [r.count('(same)') for r in rows]==[1,1,0,0], rows
    assert all(float(a)==pytest.approx(b, abs=1e-6) for r,b in zip(rows, learn.recorder.history.accuracy) for a in r[3:4])
    assert learn.logger==before and 'phase_column' not in vars(learn) and learn.recorder.history.clean.notna().all()
    assert learn.recorder.values[-1][2]==learn.recorder.history.accuracy.iloc[-1]   # positions are those of fastai

def test_names_and_values_fit_afterwards(learn, dls):
    "What reads the Recorder after a fit, as fastai's `plot_metrics`"
    learn.fit_phases(painted(dls))
    assert len(learn.recorder.metric_names)==len(learn.recorder.values[-1])+2 and 'phase' not in learn.recorder.metric_names

def test_a_fit_without_phases_has_no_such_column(learn, dls):
    learn.fit(1, cbs=[EvalSets(pattern_sets(dls, ColorSquare(4))), CSVLogger()])
    assert 'phase' not in pd.read_csv(learn.path/'history.csv')

def test_the_logger_is_back_after_an_interrupt(dls):
    learn = erosion_learner(dls, net())
    said = []
    learn.remove_cb(learn.progress)
    learn.logger = said.append
    class Stop(Callback):
        def after_batch(self):
            if self.learn.train_iter==6: raise KeyboardInterrupt
    with pytest.raises(KeyboardInterrupt): learn.fit_phases(two(n=2), cbs=Stop())
    assert learn.logger==said.append and len(said)==1 and str(said[0][-2])=='a'

@works(what='`TensorBoardCallback`', how="works: evaluation sets, the phase's number and the learning rate are scalars")
def test_tensorboard(learn, dls):
    pytest.importorskip('tensorboard')
    from fastai.callback.tensorboard import TensorBoardCallback
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
    learn.fit_phases(painted(dls), cbs=TensorBoardCallback(log_dir=learn.path/'tb'))
    got,(names,clean) = EventAccumulator(str(learn.path/'tb')).Reload(),logged(learn, 'clean')
    read = lambda k: [(o.step, o.value) for o in got.Scalars(k)]
    assert read('phase')==list(zip((4,8,12,14), [i for _,i in names]))
    assert np.allclose([v for _,v in read('clean')], clean, atol=1e-6)
    rates = dict(read('lr_0'))   # one for each step, and fastai writes it again at each validation batch
    assert list(rates)==list(range(1,15)) and np.allclose(list(rates.values()), lrs(learn))

class CutValidation(Callback):
    "Validation of the second epoch ends before it begins"
    def before_validate(self):
        if self.epoch==1: raise CancelValidException

def test_a_row_cut_short_keeps_its_columns(dls, tmp_path, capsys):
    learn = erosion_learner(dls, net(), path=tmp_path)
    with learn.no_bar(): learn.fit_phases(painted(dls), cbs=[CSVLogger(), CutValidation()])
    rows = pd.read_csv(tmp_path/'history.csv')
    assert rows.phase.tolist()==['learn','learn','erode','erode'] and rows.epoch.tolist()==[0,1,2,3]
    assert rows[['valid_loss','accuracy']].isna().any(axis=1).tolist()==[i==1 for i in range(len(rows))]
    assert all(rows.train_loss.notna())

@works(what='`WandbCallback`, offline',
       how="with fastcore 2.2 it fails for any Learner, and the page 'How do I' has another; with that mended, evaluation sets and the phase's number are in its log")
def test_wandb(learn, dls, monkeypatch):
    wandb = pytest.importorskip('wandb')
    import fastai.callback.wandb as fw
    old = fw.init_args   # with some versions of fastcore it takes objects only, and fastai hands it numbers, whatever the Learner
    monkeypatch.setattr(fw, 'init_args', lambda o: old(o) if hasattr(o, '__dict__') else {})
    Run,logs = wandb.sdk.wandb_run.Run,[]
    def log(self, data, *args, **kwargs):
        logs.append(data)
        return plain(self, data, *args, **kwargs)
    plain = Run.log
    monkeypatch.setattr(Run, 'log', log)
    run = wandb.init(mode='offline', dir=str(learn.path), settings=wandb.Settings(console='off', silent=True))
    try: learn.fit_phases(painted(dls), cbs=fw.WandbCallback(log_preds=False))
    finally: run.finish()
    assert list((learn.path/'wandb').rglob('*.wandb'))
    rows,(names,clean) = [o for o in logs if 'clean' in o],logged(learn, 'clean')
    assert [o['phase'] for o in rows]==[i for _,i in names] and [float(o['clean']) for o in rows]==clean

@works(what="MLflow, by a callback that logs the Recorder's columns", how="works: evaluation sets, and the phase's number")
def test_mlflow(learn, dls, monkeypatch):
    mlflow = pytest.importorskip('mlflow')
    monkeypatch.setenv('MLFLOW_ALLOW_FILE_STORE', 'true')   # a folder is enough here
    class Log(Callback):
        order,run_valid = 60,False
        def after_epoch(self):
            row = dict(zip(self.recorder.metric_names, self.recorder.log))
            mlflow.log_metrics({k:float(v) for k,v in row.items() if k!='time'}, step=self.learn.epoch)
    mlflow.set_tracking_uri((learn.path/'mlruns').resolve().as_uri())
    with mlflow.start_run() as run: learn.fit_phases(painted(dls), cbs=Log())
    read = lambda k: [o.value for o in mlflow.MlflowClient().get_metric_history(run.info.run_id, k)]
    names,clean = logged(learn, 'clean')
    assert read('phase')==[i for _,i in names] and read('clean')==clean

# between two phases

class EndAt(Callback):
    "Notes each event `after_phase`, and raises `error` in that of phase `name`"
    def __init__(self, name, error): self.at,self.error,self.seen = name,error,[]
    def after_phase(self):
        self.seen.append(self.learn.phase.name)
        if self.learn.phase.name==self.at: raise self.error

@pytest.mark.parametrize('name,seen', [('a',['a']), ('b',['a','b'])])
def test_a_fit_that_is_ended_between_phases(learn, name, seen, recwarn):
    cb,own = EndAt(name, CancelFitException),learn.dls
    learn.fit_phases(two(n=2), cbs=cb)
    assert cb.seen==seen and learn.recorder.history.phase.tolist()==[o for o in seen for _ in range(2)]
    assert learn.phase is None and learn.dls is own and list(learn.snapshots)==['start',*seen]
    assert not any('not trained to the end' in str(o.message) for o in recwarn)

@pytest.mark.parametrize('name', ['a','b'])
@pytest.mark.parametrize('error', [CancelEpochException, CancelTrainException])
def test_between_phases_there_is_no_epoch_to_cancel(learn, name, error):
    cb = EndAt(name, error)
    with pytest.raises(ValueError, match=f'after_phase: {error.__name__} .* raise CancelFitException'):
        learn.fit_phases(two(), cbs=cb)
    assert cb.seen==list('ab')[:'ab'.index(name)+1] and learn.phase is None

# the history of fits that were cut short

class StopAt(Callback):
    "Raises `error` in the event `when`, once `learn` has got there"
    def __init__(self, when, error, at=lambda learn: True): self.error,self.at = error,at; setattr(self, when, self.go)
    def go(self):
        if self.at(self.learn): raise self.error

@pytest.mark.parametrize('error', [KeyboardInterrupt('x'), RuntimeError('x')], ids=repr)
@pytest.mark.parametrize('at', [0, 3])
def test_an_interrupted_lr_find_leaves_the_history(learn, error, at):
    learn.fit_phases(two())
    h,e = learn.recorder.history,learn.recorder.evals
    cb = StopAt('after_loss', error, lambda learn: learn.train_iter==at)
    learn.add_cb(cb)
    with pytest.raises(type(error)): learn.lr_find(num_it=6, show_plot=False)
    learn.remove_cb(cb)
    assert learn.recorder.history.equals(h) and len(h)==2 and learn.recorder.evals.equals(e)

@pytest.mark.parametrize('error', [KeyboardInterrupt, CancelFitException])
def test_a_fit_that_ends_before_its_first_epoch_has_an_empty_history(learn, error):
    try: learn.fit_phases(two(), cbs=StopAt('after_loss', error))
    except KeyboardInterrupt: pass
    h = learn.recorder.history
    assert len(h)==0 and h.columns.tolist()==['phase','iters','train_loss','valid_loss','accuracy'] and h.index.name=='epoch'

@pytest.mark.parametrize('add_time', [True, False])
@pytest.mark.parametrize('phases', [True, False])
def test_an_epoch_that_the_recorder_does_not_see(learn, add_time, phases):
    "By hand: of four epochs the second and third are cancelled before they begin, which leaves four batches each for the others"
    learn.recorder.add_time = add_time
    cb = StopAt('before_epoch', CancelEpochException, lambda learn: learn.epoch in (1,2))
    cb.order = -5
    if phases: learn.fit_phases([Phase('a', 4)], cbs=cb)
    else: learn.fit(4, cbs=cb)
    h = learn.recorder.history
    assert h.iters.tolist()==[4,4,4,8] and h[['train_loss','valid_loss','accuracy']].isna().all(axis=1).tolist()==[False,True,True,False]
    assert h.columns[0]==('phase' if phases else 'iters') and h.notna().iloc[[0,3]].all().all()

# callbacks that give the Learner other data

class Swap(Callback):
    "Gives the Learner other data in the event `when`, in epoch `at`, and notes with how many samples each epoch is trained"
    run_valid = False
    def __init__(self, when, dls, at=0): self.new,self.at,self.sizes = dls,at,[]; setattr(self, when, self.swap)
    def swap(self):
        if getattr(self.learn, 'epoch', 0)==self.at: self.learn.dls = self.new
    def before_train(self): self.sizes.append(len(self.dl.dataset))

@pytest.mark.parametrize('when,at,sizes', [('before_epoch',1,[64,32,32,48,32]), ('before_epoch',4,[64,64,64,48,32]),
                                           ('before_fit',0,[32,32,32,48,32]), ('after_epoch',3,[64,64,64,48,32])])
def test_data_that_a_callback_has_set(learn, when, at, sizes):
    "By hand: 64 samples, from the swap on 32, but in the fourth epoch the 48 of its phase; in the end the Learner has what a plain fit leaves"
    other,own = digits_dls(n=32, n_valid=60, bs=16),digits_dls(n=48, n_valid=60, bs=16)
    cb = Swap(when, other, at)
    learn.epoch = 0
    learn.fit_phases([Phase('a', 1), Phase('b', 2), Phase('c', 1, own), Phase('d', 1)], cbs=cb)
    assert cb.sizes==sizes and learn.dls is other

def test_the_learner_gets_its_own_data_back(learn):
    own = learn.dls
    learn.fit_phases([Phase('a', 1), Phase('b', 1, digits_dls(n=48, n_valid=60, bs=16))])
    assert learn.dls is own
