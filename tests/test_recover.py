"Recoverable accuracy against known networks and a second implementation; ramps by hand, stopped and gone on, and after errors."
import random
from copy import deepcopy
from functools import partial
import numpy as np, pandas as pd, pytest, torch
from matplotlib.colors import to_rgb
from torch import nn
from sklearn.linear_model import LogisticRegression
from sklearn.preprocessing import StandardScaler
from fastai.tabular.all import CategoryBlock, Normalize, TabularPandas, tabular_learner
from fastai.vision.all import (Callback, CategoryMap, CrossEntropyLossFlat, DataLoader, DataLoaders, IntToFloatTensor, L, Learner,
                               SchedCos, SGD, TensorCategory, TensorImage, TfmdDL, accuracy, plt, set_seed)
from trainings import Boom, StopAt, same
from feature_erosion.data import TensorImages, digits_dls, tensor_dls
from feature_erosion.evalsets import EvalSets, pattern_sets
from feature_erosion.mitigations import Ensemble, GroupDRO, grouped
import feature_erosion.learner   # `fit_phases`, `recover` and others on every Learner
from feature_erosion.measures.rank import layer_rank
from feature_erosion.patterns import ColorSquare, Noise
from feature_erosion.phases import Phase
from feature_erosion.loaders import same_dl
from feature_erosion.recover import Ramp, Recovery, dfr, group_accuracy, recover, strengths
from feature_erosion.runs.resume import KeepRun
from feature_erosion.runs.store import RunStore

# --- deep feature reweighting

def blobs(n=90, d=8, seed=0):
    rng = np.random.RandomState(seed)
    y = np.arange(n)%3
    return rng.randn(n, d)*[1,5,.1,1,1,1,1,1] + 1.5*np.eye(3, d)[y] + 4, y

def test_each_class_solves_its_l1_problem():
    "Conditions of optimality: the slope of C·Σ log-loss is ±1 against each weight, and at most 1 where the weight is 0"
    X,y = blobs()
    p = dfr(X, y)
    scale = StandardScaler().fit(X)
    Z = np.c_[scale.transform(X), np.ones(len(X))]   # liblinear also penalises the intercept
    assert p.C in strengths and (p.weight==0).any()
    for c in range(3):
        w = p.weight[c].numpy()
        v = np.r_[w*scale.scale_, p.bias[c].item()+w@scale.mean_]
        s = np.where(y==c, 1., -1.)
        slope = -p.C*(s/(1+np.exp(s*(Z@v))))@Z
        on = np.abs(v)>1e-8
        np.testing.assert_allclose(slope[on], -np.sign(v[on]), atol=.03)
        assert (np.abs(slope[~on])<1.03).all()

def naive_dfr(X, y, g, retrain, seed):
    "The authors' two functions written as plain loops, on two classes, with the same random draws"
    order = np.random.RandomState([seed,0])
    train = np.zeros(len(y), dtype=bool)
    for c in sorted(set(g)): train[order.permutation(np.where(g==c)[0])[::2]] = True
    Xt,yt,gt,Xv,yv,gv = X[train],y[train],g[train],X[~train],y[~train],g[~train]
    sub = np.random.RandomState([seed,1])
    least = min((gt==c).sum() for c in set(g))
    i = np.concatenate([sub.permutation(np.where(gt==c)[0])[:least] for c in sorted(set(g))])
    scaler,best = StandardScaler().fit(Xt[i]),(-1,None)
    for C in strengths:
        m = model(C, seed).fit(scaler.transform(Xt[i]), yt[i])
        right = m.predict(scaler.transform(Xv))==yv
        worst = min(right[gv==c].mean() for c in set(g))
        if worst>best[0]: best = worst,C
    scaler,sub,ms = StandardScaler().fit(X),np.random.RandomState([seed,2]),[]
    least = min((g==c).sum() for c in set(g))
    for _ in range(retrain):
        i = np.concatenate([sub.permutation(np.where(g==c)[0])[:least] for c in sorted(set(g))])
        ms.append(model(best[1], seed).fit(scaler.transform(X[i]), y[i]))
    scores = scaler.transform(X)@np.mean([m.coef_[0] for m in ms], 0)+np.mean([m.intercept_ for m in ms])
    return best[1],scores

def model(C, seed):
    how = dict(l1_ratio=1.) if LogisticRegression().penalty!='l2' else dict(penalty='l1')
    return LogisticRegression(C=C, solver='liblinear', max_iter=1000, random_state=seed, **how)

@pytest.mark.parametrize('seed', (0,1))
def test_against_a_plain_version_of_the_authors_code(seed):
    rng = np.random.RandomState(seed)
    y,rare = rng.randint(2, size=300),rng.rand(300)<.15
    X = rng.randn(300, 5)*.8
    X[:,0] += np.where(rare, 1-y, y)*3
    X[:,1] += y
    g = 2*y+rare
    p,(C,scores) = dfr(X, y, g, retrain=20, seed=seed),naive_dfr(X, y, g, 20, seed)
    assert p.C==C
    np.testing.assert_allclose(p.logits(torch.tensor(X))[:,1].numpy(), scores, atol=1e-2)
    named = dfr(X, y, [f'group {o}' for o in g], seed=seed)
    assert torch.equal(p.weight, named.weight)
    assert torch.equal(p.predict(torch.tensor(X)), torch.tensor((scores>0).astype(int)))

def test_average_settles():
    "Subsets differ, so one layer depends on the seed more than the mean of twenty does"
    X,y = blobs(120)
    g = np.r_[np.zeros(100, dtype=int), np.ones(20, dtype=int)]
    spread = {n:torch.stack([dfr(X, y, g, retrain=n, seed=s).weight for s in range(6)]).std(0).mean().item() for n in (1,20)}
    assert spread[20]<spread[1] and not torch.equal(dfr(X, y, g, retrain=1).weight, dfr(X, y, g, retrain=2).weight)

def test_equal_groups_need_one_layer():
    X,y = blobs()
    assert torch.equal(dfr(X, y, retrain=1).weight, dfr(X, y, retrain=20).weight)

def test_constant_feature():
    X,y = blobs()
    p = dfr(np.c_[X, np.full(len(X), 3.)], y)
    assert p.weight.isfinite().all() and (p.weight[:,-1]==0).all()

# --- recoverable accuracy: networks of which it is known what they know

def spots(n, seed, classes=4):
    "Images of one bright pixel, which is the class, and a little noise"
    rng = np.random.RandomState(seed)
    y = np.arange(n)%classes
    x = rng.randint(20, size=(n,4,4,1), dtype=np.uint8)
    x.reshape(n,16)[np.arange(n),y] = 220
    return TensorImages(x, y, [f'spot {c}' for c in range(classes)])

def spot_dls(n=200, **kw): return tensor_dls(spots(n, 0), spots(120, 1), bs=16, pad=0, flip=False)

class Known(nn.Module):
    "Passes its pixels on; the last layer may answer wrongly, what it sees may be empty"
    def __init__(self, gone=False):
        super().__init__()
        self.early,self.late,self.head = nn.Linear(16,16),nn.Linear(16,16),nn.Linear(16,4)
        with torch.no_grad():
            for m,w in ((self.early,torch.eye(16)), (self.late,torch.zeros(16,16) if gone else torch.eye(16)),
                        (self.head,torch.eye(4,16).roll(1, 0))):
                m.weight.copy_(w)
                m.bias.zero_()
    def forward(self, x): return self.head(self.late(self.early(x.flatten(1))))

def test_hidden_is_found_and_gone_is_not():
    "A last layer that mixes up the classes hides everything, and one image a class brings it back; an empty layer before it loses it, but an earlier one has it"
    dls = spot_dls()
    r = recover(dict(hidden=Known(), gone=Known(gone=True)), dls.train, dls.valid, few=(1,5), seeds=2, progress=False)
    m = r.means()
    assert r.attrs['now']=={'hidden':0., 'gone':.25} and r.attrs['chance']==.25   # equal scores are answered with class 0
    assert (m.loc['hidden'][[1,5]]==1).all().all()
    assert (m.loc[('gone','last')][[1,5]]==.25).all() and (m.loc[('gone','all')][[1,5]]==1).all()
    with pytest.raises(ValueError, match="no model 'pretrain'; there are hidden, gone"): r.gone('hidden', 'gone', 'pretrain')
    assert r.gone('hidden', 'gone', 'hidden').isna().all().all()   # where even an untrained one finds all, nothing can be gone
    g = r.gone('hidden', 'gone')
    assert np.isnan(g.now).all() and g.loc['last',5]==1 and g.loc['all',5]==0

def test_same_images_for_all_models_and_nested():
    dls = digits_dls(n=400, n_valid=100, seed=0)
    torch.manual_seed(0)
    net = nn.Sequential(nn.Flatten(), nn.Linear(768,20), nn.ReLU(), nn.Linear(20,10))
    r = recover([net, deepcopy(net)], dls.train, dls.valid, few=(1,4), seeds=2,
                progress=False).set_index(['model','features','few','seed'])
    assert r.accuracy.xs('model0').equals(r.accuracy.xs('model1'))
    alone = recover(net, dls.train, dls.valid, few=1, features='last', seeds=1, progress=False)
    assert alone.accuracy[0]!=0 and (r.accuracy.groupby(level='seed').mean()).nunique()==2

def test_few_are_among_more():
    from feature_erosion.recover import _draw
    y = np.random.RandomState(0).randint(5, size=300)
    assert (_draw(y, 3, 7)==_draw(y, 20, 7)[:3]).all() and (y[_draw(y, 20, 7)]==np.arange(5)).all()

def test_any_kind_of_data():
    "PyTorch loaders and lists of batches give what fastai's loaders give"
    dls = spot_dls(80)
    torch.manual_seed(0)
    net = nn.Sequential(nn.Flatten(), nn.Linear(16,8), nn.ReLU(), nn.Linear(8,4))
    def see(train, test): return recover(net, train, test, few=(1,3), seeds=2, n_test=None, progress=False).accuracy.tolist()
    want = see(dls.train, dls.valid)
    lists = [[(x,y) for x,y in dl.new(shuffle=False, drop_last=False)] for dl in dls]
    assert see(*lists)==want
    sets = [torch.utils.data.TensorDataset(*[torch.cat([b[i].as_subclass(torch.Tensor) for b in l]) for i in (0,1)])
            for l in lists]
    assert see(*[torch.utils.data.DataLoader(s, batch_size=32, shuffle=True) for s in sets])==want

def test_missing_classes_are_named():
    dls = spot_dls(200)
    some = TensorImages(dls.train.dataset.x, dls.train.dataset.y, dls.vocab).take(torch.where(dls.train.dataset.y!=2)[0])
    lacks = tensor_dls(some, spots(40, 2), bs=16, pad=0, flip=False)
    with pytest.raises(ValueError, match="few=1: class 'spot 2' has 0 training images"):
        recover(Known(), lacks.train, lacks.valid, few=1, progress=False)
    with pytest.raises(ValueError, match="few=80: class 'spot 0' has 50 training images"):
        recover(Known(), dls.train, dls.valid, few=(1,80), progress=False)
    with pytest.raises(ValueError, match='shares images with train'):
        recover(Known(), dls.train, dls.train, few=1, progress=False)

class Both(nn.Module):
    "Returns a tuple; normalises by batch"
    def __init__(self):
        super().__init__()
        self.norm,self.net = nn.BatchNorm2d(1),Known()
    def forward(self, x): return self.net(self.norm(x)),'more'

def test_leaves_no_trace():
    "Modes, buffers, hooks, gradients and random states stay; a model may return more than scores"
    dls,net = spot_dls(),Both()
    net.train()
    net.net.eval()
    learn = Learner(dls, net, loss_func=CrossEntropyLossFlat())
    random.seed(3); np.random.seed(3); torch.manual_seed(3)
    before = random.getstate(),np.random.get_state()[1].tolist(),torch.get_rng_state().tolist(),{k:v.clone() for k,v in net.state_dict().items()}
    r = learn.recover(few=1, seeds=1)
    learn.group_accuracy()
    assert (random.getstate(),np.random.get_state()[1].tolist(),torch.get_rng_state().tolist())==before[:3]
    assert all(torch.equal(v, before[3][k]) for k,v in net.state_dict().items())
    assert net.training and not net.net.training and not any(m._forward_hooks or m._forward_pre_hooks for m in net.modules())
    assert r.attrs['now']=={'now':0.} and (r.accuracy==1).all()

# --- during a fit

def fit(cbs=(), folder=None, stop=None, iters=None):
    set_seed(0)
    dls = digits_dls(n=128, n_valid=40, bs=32, seed=0)
    easy = dls.inject(ColorSquare(4))
    net = nn.Sequential(nn.Flatten(), nn.Linear(768,16), nn.ReLU(), nn.Linear(16,10))
    learn = Learner(dls, net, opt_func=SGD, metrics=accuracy, loss_func=CrossEntropyLossFlat(), lr=.05)
    keep = [KeepRun(RunStore(folder).run('a'), minutes=0, strict=True)] if folder else []
    with learn.no_bar(), learn.no_logging():
        phases = [Phase('pretrain', 1, dls), Phase('erode', None if iters else 2, easy, iters=iters)]
        learn.fit_phases(phases, cbs=[*keep, StopAt(stop), *cbs])
    return learn

def watch():
    d = digits_dls(n=128, n_valid=40, seed=0)
    return Recovery(d.train, d.valid, at=(0,2,5), few=2, seeds=1)

def test_recovery_does_not_affect_training(tmp_path):
    "The same weights to the last bit, the same table of the Recorder; and the same measurements after a stop"
    plain,watched = fit(),fit([watch()])
    assert same(plain, watched) and plain.recorder.metric_names==watched.recorder.metric_names
    w = watched.recorder.recovery
    assert list(zip(w.phase, w.iter))==[('pretrain',0),('pretrain',2),('pretrain',4),('erode',0),('erode',2),('erode',5),
                                        ('erode',8)]
    assert w.epoch.tolist()==[0,0,1,1,1,2,3]
    for at in (3, 7):
        with pytest.raises(Boom): fit([watch()], tmp_path, stop=at)
    again = fit([watch()], tmp_path)
    assert same(plain, again) and again.recorder.recovery.equals(w)

def test_recovery_without_phases(tmp_path):
    "The end of the fit is measured, too: once, whether the run is stopped, goes on, or is loaded"
    def fit(name, *cbs, at=(0,2,5)):
        set_seed(0)
        dls = digits_dls(n=128, n_valid=40, bs=32, seed=0)
        net = nn.Sequential(nn.Flatten(), nn.Linear(768,10))
        learn = Learner(dls, net, opt_func=SGD, loss_func=CrossEntropyLossFlat(), lr=.05)
        keep,d = KeepRun(RunStore(tmp_path).run(name), minutes=0, strict=True),dls
        with learn.no_bar(), learn.no_logging():
            learn.fit(2, cbs=[Recovery(d.train, d.valid, at=at, few=2, seeds=1), keep, *cbs])
        return learn
    learn = fit('whole')
    want = learn.recorder.recovery
    assert want.iter.tolist()==[0,2,5,8] and want.epoch.tolist()==[0,0,1,2]
    assert learn.recorder.plot_recovery().get_xlabel()=='iteration'
    assert fit('none', at=()).recorder.recovery.now.tolist()==want.now.tolist()[-1:]
    for at in (3,8):
        with pytest.raises(Boom): fit('cut', StopAt(at))
    for name in ('cut','cut','whole'): pd.testing.assert_frame_equal(fit(name).recorder.recovery, want)

# --- ramps

class Look(Callback):
    "The stamps; of each batch the top left pixels, the numbers of the images, which their bottom right pixels tell, and the labels"
    run_valid = False
    def before_fit(self): self.stamps,self.pixels,self.ids,self.labels = [],[],[],[]
    def before_batch(self):
        self.stamps.append(getattr(self.learn.dls.train.dataset, 'stamps', None))
        x = self.xb[0].as_subclass(torch.Tensor)
        self.pixels.append(x[:,0,0,0].clone())
        self.ids.append((x[:,0,-1,-1]*255).round().long()-100)
        self.labels.append(self.yb[0])

def grey_dls(n=16, bs=4):
    "Grey images (100, 101, … of 255) of two classes, in 0…1"
    x = np.broadcast_to(np.arange(100, 100+n, dtype=np.uint8)[:,None,None,None], (n,8,8,3))
    sets = [TensorImages(x.copy(), np.arange(n)%2, ['a','b']) for _ in (0,1)]
    return tensor_dls(*sets, bs=bs, pad=0, flip=False)

def run(cb, dls=None, phases=None, **kw):
    "A phase without and one with black squares (class a) and white ones (class b); what was seen, and the painted loader"
    dls = dls or grey_dls()
    easy,look = dls.inject(ColorSquare(2, palette=['black','white']), **kw),Look()
    learn = Learner(dls, nn.Sequential(nn.Flatten(), nn.Linear(192,2)), loss_func=CrossEntropyLossFlat(), opt_func=SGD, lr=.01)
    phases = phases or [dict(epochs=1)]
    with learn.no_bar(), learn.no_logging():
        learn.fit_phases([Phase('clean', 1, dls)]+[Phase(f'erode{i or ""}', dls=easy, **p) for i,p in enumerate(phases)],
                         cbs=[*L(cb), look])
    return look,easy

def counts(stamps): return [int((o>=0).sum()) for o in stamps if o is not None]

def test_ratio_by_hand():
    "Four batches: none, a quarter, a half, three quarters of 16 images; what has a picture keeps it; all have it in the end"
    look,easy = run(Ramp(ratio=(0,1)))
    assert look.stamps[:4]==[None]*4 and counts(look.stamps)==[0,4,8,12] and counts([easy.train.dataset.stamps])==[16]
    for a,b in zip(look.stamps[4:], look.stamps[5:]): assert (b[a>=0]==a[a>=0]).all()
    check_painted(look)

def test_groups_of_stamps_would_not_follow():
    "Groups of another kind, and a pattern that only fades, leave them true"
    def fit(groups=None, **kw):
        easy = grouped(grey_dls().inject(ColorSquare(2, palette=['black','white'])), groups)
        learn = Learner(easy, nn.Sequential(nn.Flatten(), nn.Linear(192,2)), loss_func=CrossEntropyLossFlat(), opt_func=SGD, lr=.01)
        with learn.no_bar(), learn.no_logging(): learn.fit(1, cbs=[Ramp(**kw), GroupDRO()])
    for k in 'ratio','strength':
        with pytest.raises(ValueError, match=f'Ramp: {k} on data whose groups'): fit(**{k:(0,1)})
    fit(opacity=(0,1))
    fit(np.arange(16)//8, ratio=(0,1))

def test_a_validation_within_a_fit_ends_no_ramp():
    "After the second batch of each epoch; what is seen begins anew with it"
    class Validates(Callback):
        run_valid = False
        def after_batch(self):
            if self.learn.iter==1: self.learn.validate()
    assert counts(run([Ramp(ratio=(0,1)), Validates()])[0].stamps)==[8,12]

def check_painted(look):
    "Each batch was painted as the stamps said when it was read"
    for s,p,i in zip(look.stamps, look.pixels, look.ids):
        assert torch.equal((p-(100+i)/255).abs()>.1, torch.zeros(len(i), dtype=torch.bool) if s is None else s[i]>=0)

def test_lengths_and_schedules():
    "Two epochs, iterations, a phase that spans one and a half epochs; a fastai schedule; each phase starts again"
    assert counts(run(Ramp(ratio=(0,1)), phases=[dict(epochs=2)])[0].stamps)==[0,2,4,6,8,10,12,14]
    assert counts(run(Ramp(ratio=(1,0)), phases=[dict(iters=6)])[0].stamps)==[16,13,11,8,5,3]     # 16·(1, 5/6, …) rounded
    assert counts(run(Ramp(ratio=SchedCos(0,1)), phases=[dict(epochs=1)])[0].stamps)==[0,2,8,14]  # (1-cos πt)/2
    assert counts(run(Ramp(ratio=(0,1)), phases=[dict(epochs=1),dict(epochs=1)])[0].stamps)==[0,4,8,12]*2
    assert counts(run(Ramp(ratio=(0,1), phases=['erode1']), phases=[dict(epochs=1),dict(epochs=1)])[0].stamps)==[16]*4+[0,4,8,12]
    assert counts(run(Ramp(ratio=(0,1)), ratio=.5)[0].stamps)==[0,2,4,6]                          # of the eight that are painted

def check_faded(look):
    "Grey to black or white: the image's own grey and a share of the way to 0 or 1"
    for share,p,i,y in zip((0,.25,.5,.75), look.pixels[4:], look.ids[4:], look.labels[4:]):
        own = (100+i)/255
        assert torch.allclose(p, own+share*(y.as_subclass(torch.Tensor).float()-own), atol=1e-6)

def test_strength_of_some_classes():
    "Images of the painted classes get each other's pictures in the end, and no others; one class has no other"
    def ramped(classes):
        dls = digits_dls(n=100, n_valid=20, bs=10)
        easy,look = dls.inject(ColorSquare(4), classes=classes),Look()
        learn = Learner(dls, nn.Sequential(nn.Flatten(), nn.Linear(768,10)), loss_func=CrossEntropyLossFlat(), opt_func=SGD, lr=.01)
        with learn.no_bar(), learn.no_logging(): learn.fit_phases([Phase('erode', 1, easy)], cbs=[Ramp(strength=(1,0)), look])
        return look.stamps
    first,*_,last = ramped(['3','8'])
    assert set(first.tolist())==set(last.tolist())=={-1,3,8} and ((first>=0)==(last>=0)).all() and (first!=last).any()
    with pytest.raises(ValueError, match="strength: only one class has a picture"): ramped(['3'])

def test_strength_with_classes_without_samples():
    "Images get pictures of classes that there are, those that `inject` draws"
    data = TensorImages(np.full((60,8,8,3), 90, np.uint8), np.arange(60)%3, ['a','b','c','#na#','unused'])
    dls = tensor_dls(data, data, bs=60, pad=0, flip=False)
    look = Look()
    learn = Learner(dls, nn.Sequential(nn.Flatten(), nn.Linear(192,5)), loss_func=CrossEntropyLossFlat(), opt_func=SGD)
    with learn.no_bar(), learn.no_logging():
        learn.fit_phases([Phase('erode', 1, dls.inject(ColorSquare(4), seed=3))], cbs=[Ramp(strength=lambda pct: 0., seed=3), look])
    want = dls.inject(ColorSquare(4), seed=3, strength=0).train_ds.stamps
    assert torch.equal(look.stamps[-1], want) and set(want.tolist())=={0,1,2}

def test_opacity_by_hand():
    look,easy = run(Ramp(opacity=(0,1)))
    check_faded(look)
    assert counts(look.stamps)==[16]*4
    assert not [k for f in easy.train.after_batch.fs for k in vars(f) if k=='_pictures']
    assert set(easy.train.one_batch()[0][:,0,0,0].tolist())<={0.,1.}

@pytest.mark.parametrize('share', (0.,.3,.5,1.))
@pytest.mark.parametrize('kind', ('ratio','strength'))
def test_as_inject_would_choose(kind, share):
    "At each ratio or strength the stamps are those of `inject`, with the same seed"
    look,_ = run(Ramp(**{kind:lambda pct: share}, seed=5), seed=5)
    assert torch.equal(look.stamps[-1], grey_dls().inject(ColorSquare(2), seed=5, **{kind:share}).train.dataset.stamps)

def test_strength_by_hand():
    "All 16 have a picture, of their own class none, 4, 8, 12"
    look,easy = run(Ramp(strength=(0,1)))
    y = torch.arange(16)%2
    assert counts(look.stamps)==[16]*4 and [int((s==y).sum()) for s in look.stamps[4:]]==[0,4,8,12]
    assert torch.equal(easy.train.dataset.stamps, y)

def test_together():
    "Ratio and strength and opacity at once"
    look,easy = run(Ramp(ratio=(0,1), strength=(0,1), opacity=(1,1)))
    y = torch.arange(16)%2
    assert counts(look.stamps)==[0,4,8,12] and torch.equal(easy.train.dataset.stamps, y)
    assert 0<(look.stamps[-1]==y).sum()<12

def test_full_from_the_start_is_no_ramp():
    plain,full = fit(),fit([Ramp(ratio=(1,1), strength=(1,1), opacity=(1,1))])
    assert same(plain, full) and not same(plain, fit([Ramp(ratio=(0,1))]))

@pytest.mark.parametrize('what', ('ratio','strength','opacity'))
@pytest.mark.parametrize('length', (dict(), dict(iters=7)))
def test_stopped_and_on(tmp_path, what, length):
    "In the clean phase, in the middle of the ramp's first and second epoch: the same weights to the last bit"
    whole = fit([Ramp(**{what:(0,1)})], **length)
    for at in (2, 6, 9):
        with pytest.raises(Boom): fit([Ramp(**{what:(0,1)})], tmp_path, stop=at, **length)
    assert same(whole, fit([Ramp(**{what:(0,1)})], tmp_path, **length))

def test_other_ramp_is_another_run(tmp_path):
    with pytest.raises(Boom): fit([Ramp(ratio=(0,1))], tmp_path, stop=6)
    with pytest.raises(ValueError, match='other settings'): fit([Ramp(ratio=(0,.5))], tmp_path)

def test_effects_have_no_opacity():
    "What would be ramped without a word is nothing; their ratio is ramped like any pattern's"
    def ramped(**kw):
        look,easy = Look(),grey_dls().inject(Noise(.1, .2))
        learn = Learner(easy, nn.Sequential(nn.Flatten(), nn.Linear(192,2)), loss_func=CrossEntropyLossFlat(), opt_func=SGD,
                        lr=.01)
        with learn.no_bar(), learn.no_logging(): learn.fit(1, cbs=[Ramp(**kw), look])
        return look.stamps
    with pytest.raises(ValueError, match=r'opacity: Noise\(.*has none; ramp the ratio or the strength'): ramped(opacity=(0,1))
    assert counts(ramped(ratio=(0,1)))==[0,4,8,12]

@pytest.mark.parametrize('what', ('ratio','strength','opacity'))
def test_restored_after_an_error(what):
    set_seed(0)
    dls = digits_dls(n=128, n_valid=40, bs=32, seed=0)
    easy = dls.inject(ColorSquare(4))
    before = easy.train.dataset.stamps.clone()
    learn = Learner(dls, nn.Sequential(nn.Flatten(), nn.Linear(768,10)), opt_func=SGD, loss_func=CrossEntropyLossFlat(), lr=.05)
    with pytest.raises(Boom), learn.no_bar(), learn.no_logging():
        learn.fit_phases([Phase('erode', 2, easy)], cbs=[Ramp(**{what:(0,1)}), StopAt(3)])
    assert torch.equal(easy.train.dataset.stamps, before) and not any('_pictures' in vars(f) for f in easy.train.after_batch.fs)
    assert not any(isinstance(o, Ramp) for o in learn.cbs)

def test_without_phases():
    "Over the whole fit, on the Learner's own data; not while searching a learning rate; export works"
    easy,look = grey_dls().inject(ColorSquare(2)),Look()
    ramp = Ramp(ratio=(0,1))
    learn = Learner(easy, nn.Sequential(nn.Flatten(), nn.Linear(192,2)), loss_func=CrossEntropyLossFlat(), opt_func=SGD, lr=.01,
                    cbs=[ramp, look])
    with learn.no_bar(), learn.no_logging():
        learn.fit(2)
        assert counts(look.stamps)==[0,2,4,6,8,10,12,14]
        learn.lr_find(num_it=6, show_plot=False)
        assert counts(look.stamps)==[16]*len(look.stamps)
    learn.remove_cb(look)

class Items:
    "Read one by one"
    def __init__(self, n=16): self.n = n
    def __len__(self): return self.n
    def __getitem__(self, i): return TensorImage(torch.full((3,8,8), 100+i, dtype=torch.uint8)),TensorCategory(i%2)

def slow_dls(num_workers=0):
    dls = DataLoaders(*[TfmdDL(Items(), bs=4, shuffle=s, num_workers=num_workers, after_batch=[IntToFloatTensor()])
                        for s in (True,False)])
    for dl in dls.loaders: dl.vocab = CategoryMap(['a','b'])
    dls.vocab = CategoryMap(['a','b'])
    return dls

def test_item_by_item():
    look,_ = run(Ramp(ratio=(0,1)), slow_dls(), n_classes=2)
    assert counts(look.stamps)==[0,4,8,12]
    check_painted(look)

def test_workers():
    "What lies in the data cannot change in worker processes, and is refused; opacity is painted in the main process"
    for k in ('ratio','strength'):
        with pytest.raises(ValueError, match=f'Ramp: {k} with num_workers=1'): run(Ramp(**{k:(0,1)}), slow_dls(1), n_classes=2)
    look,_ = run(Ramp(opacity=(0,1)), slow_dls(1), n_classes=2)
    check_faded(look)

def test_refused():
    for kw,said in ((dict(), 'say what is to change'), (dict(ratio=.5), 'ratio=0.5: must be a pair'),
                    (dict(ratio=(0,2)), 'ratio: its schedule gives 2 after 100%'),
                    (dict(opacity=(-.1,1)), 'gives -0.1 after 0%')):
        with pytest.raises(ValueError, match=said): Ramp(**kw)
    with pytest.raises(ValueError, match="no phase 'erase' in this fit; must be among clean, erode"):
        run(Ramp(ratio=(0,1), phases=['erase']))
    with pytest.raises(ValueError, match="of phase 'clean' have no pattern"): run(Ramp(ratio=(0,1), phases=['clean']))
    dls = grey_dls()
    learn = Learner(dls, nn.Sequential(nn.Flatten(), nn.Linear(192,2)), loss_func=CrossEntropyLossFlat(), lr=.01,
                    cbs=Ramp(ratio=(0,1)))
    with pytest.raises(ValueError, match='the training data have no pattern'), learn.no_bar(), learn.no_logging(): learn.fit(1)
    bent = Ramp(ratio=lambda pct: 1+pct*(1-pct))
    with pytest.raises(ValueError, match='after 25% of the phase'): run(bent)

def test_two_ramps():
    "In different phases they work, in one they are refused, and the data are as they were"
    phases = [dict(epochs=1),dict(epochs=1)]
    class Second(Ramp): pass
    look,easy = run([Ramp(ratio=(0,1), phases=['erode']), Second(ratio=(1,0), phases=['erode1'])], phases=phases)
    assert counts(look.stamps)==[0,4,8,12]+[16,12,8,4] and counts([easy.train.dataset.stamps])==[16]
    with pytest.raises(ValueError, match="Ramp: two of them act on the data of phase 'erode'; combine them"):
        run([Ramp(ratio=(0,1)), Second(opacity=(0,1))])

def test_evaluation_sets_stay():
    "They have the full pattern, whatever the ramp does"
    set_seed(0)
    dls = digits_dls(n=128, n_valid=40, bs=32, seed=0)
    easy = dls.inject(ColorSquare(4))
    sets = pattern_sets(easy)
    before = {k:[b[0].clone() for b in dl] for k,dl in sets.items()}
    class Check(Callback):
        def after_batch(self):
            if self.training: assert all(torch.equal(a, b[0]) for k,dl in sets.items() for a,b in zip(before[k], dl))
    learn = Learner(dls, nn.Sequential(nn.Flatten(), nn.Linear(768,10)), opt_func=SGD, loss_func=CrossEntropyLossFlat(), lr=.05)
    with learn.no_bar(), learn.no_logging():
        learn.fit_phases([Phase('erode', iters=3, dls=easy)],
                         cbs=[EvalSets(sets, at=[]), Ramp(ratio=(0,1), opacity=(0,1)), Check()])

class Cosine(nn.Module):
    "Scores by the angle to a prototype of each class: no linear layer is last, and what the last one sees are the pixels"
    def __init__(self): super().__init__(); self.body,self.protos = nn.Linear(16,8),nn.Parameter(torch.randn(4,8))
    def forward(self, x): return nn.functional.normalize(self.body(x.flatten(1)).relu()) @ nn.functional.normalize(self.protos).T

def test_a_head_that_is_not_linear():
    dls = spot_dls()
    with pytest.raises(ValueError, match='Cosine answers with 4 scores, and its last linear layer has 8 outputs'):
        recover(Cosine(), dls.train, dls.valid, few=(1,), progress=False)
    with pytest.raises(ValueError, match='its last linear layer is missing'):
        recover(nn.Sequential(nn.Conv2d(1,4,4), nn.Flatten()), dls.train, dls.valid, few=(1,), progress=False)
    assert len(recover(Cosine(), dls.train, dls.valid, few=(1,), features='all', seeds=1, progress=False))==1

def test_tables():
    "Read by rows, with labels in a column: the same as the same rows in tensors"
    rng = np.random.RandomState(0)
    df = pd.DataFrame(rng.randn(200,3), columns=list('abc')).assign(y=lambda d: np.where(d.a+d.b>0, 'p', 'q'))
    splits = list(range(120)),list(range(120,200))
    table = TabularPandas(df, [Normalize], [], list('abc'), 'y', CategoryBlock(), splits=splits).dataloaders(bs=50)
    model = tabular_learner(table, layers=[8]).model
    batches = [[(torch.tensor(d.conts.values).float(),torch.tensor(d.ys.values[:,0]).long())]
               for d in (table.train_ds,table.valid_ds)]
    class Alone(nn.Module):
        def __init__(self): super().__init__(); self.m = model
        def forward(self, x): return self.m(x.new_zeros(len(x),0).long(), x)
    got = recover(model, table.train, table.valid, few=(2,), seeds=2, features='last', progress=False)
    want = recover(Alone(), *batches, few=(2,), seeds=2, features='last', progress=False)
    assert got.attrs['now']==want.attrs['now'] and got.accuracy.tolist()==want.accuracy.tolist()

def test_classes_in_another_order():
    learn = Learner(spot_dls(), Known(), loss_func=CrossEntropyLossFlat())
    other = tensor_dls(*(TensorImages(o.x, o.targets, [f'spot {c}' for c in (1,0,2,3)]) for o in (spots(200, 2),spots(120, 3))),
                       bs=16, pad=0, flip=False)
    for f in (lambda: learn.recover(train=other.train, test=other.valid, few=(1,)),
              lambda: learn.group_accuracy(sets=other.valid), lambda: learn.group_accuracy(sets=dict(a=other.valid))):
        with pytest.raises(ValueError, match="has class 'spot 1' as label 0"): f()

def test_groups_too_small_for_all_classes():
    "Two samples of each group cannot be of three classes"
    X,y = blobs()
    g = np.where(np.arange(90)<88, 'sea', 'land')
    for seed in range(3):
        with pytest.raises(ValueError, match='are not of all 3 classes'): dfr(X, np.where(g=='land', 0, y), g, seed=seed)

# --- what is known at the start, what is missing, what has no meaning

def digits_fit(lr, *cbs, n_epoch=2):
    "A Learner after a fit"
    set_seed(0)
    dls = digits_dls(n=128, n_valid=40, bs=32, seed=0)
    learn = Learner(dls, nn.Sequential(nn.Flatten(), nn.Linear(768,10)), opt_func=SGD, loss_func=CrossEntropyLossFlat(), lr=lr)
    with learn.no_bar(), learn.no_logging(): learn.fit(n_epoch, cbs=cbs)
    return learn

@pytest.mark.parametrize('kw,text',
                         [(dict(few=(1,500)), "few=500: class '0' has"), (dict(features='lst'), r"features=\['lst'\]"),
                          (dict(seeds=0), 'seeds=0'),
                                     (dict(layers='nope'), "layers='nope'"), (dict(n_test=0), 'n_test=0')])
def test_recovery_is_checked_before_training(kw, text):
    class Started(Exception): pass
    class Start(Callback):
        def before_epoch(self): raise Started('now')
    d = digits_dls(n=128, n_valid=40, seed=0)
    with pytest.raises(ValueError, match=text):
        digits_fit(.05, Recovery(d.train, d.valid, at=20, **{**dict(few=1), **kw}), Start())
    with pytest.raises(Started): digits_fit(.05, Recovery(d.train, d.valid, at=20, few=1), Start())

def test_iterations_of_recovery():
    for at in (-1,1.5,(0,'1')):
        with pytest.raises(ValueError, match='at=.*must be iterations, whole numbers from 0'): Recovery(None, None, at=at)
    with pytest.raises(TypeError, match='fewer'): Recovery(None, None, fewer=1)
    assert Recovery(None, None, at=5).at=={5} and Recovery(None, None, at=range(3)).at=={0,1,2}

def test_a_diverged_network_is_logged_as_nan():
    "As `PlasticityLog` does: the fit goes on"
    d = digits_dls(n=128, n_valid=40, seed=0)
    r = digits_fit(1e38, Recovery(d.train, d.valid, at=(0,2,5), few=(1,2), seeds=1)).recorder.recovery
    assert r.iter.tolist()==[0,2,5,8] and list(r.filter(regex='now|_'))[-5:]==['now','last_1','last_2','all_1','all_2']
    vals = r[['now','last_1','last_2','all_1','all_2']]
    assert vals.iloc[0].notna().all() and vals.iloc[1:].isna().all(axis=None)

def test_numbers_of_classes_in_messages():
    x,y = torch.randn(40, 4),torch.arange(40)%4
    with pytest.raises(ValueError, match='few=50: class 0 has 10 training'):
        recover(nn.Linear(4, 4), [(x,y)], [(x+1,y)], few=(50,), progress=False)

@pytest.mark.parametrize('missing', [None,float('nan'),pd.NA,pd.NaT])
def test_missing_groups(missing):
    "Their samples were left out without a word"
    x,y = torch.randn(40, 4),torch.arange(40)%4
    for g in (pd.Series(['a','b',missing,'a']*10), ['a','b',missing,'a']*10):
        with pytest.raises(ValueError, match='by: missing for 10 of 40 samples'): group_accuracy(nn.Linear(4, 4), [(x,y)], by=g)
        with pytest.raises(ValueError, match='groups: missing for 10 of 40 samples'): dfr(x, y, g)
    whole = group_accuracy(nn.Linear(4, 4), [(x,y)], by=['a','b','none','a']*10)
    assert whole.n.sum()==40 and whole.n.to_dict()==dict(a=20, b=10, none=10)

@pytest.mark.parametrize('missing', [None,float('nan'),pd.NA,pd.NaT])
def test_missing_names(missing):
    "As keys of models and sets they ended in an error about an index"
    x,y = torch.randn(40, 4),torch.arange(40)%4
    m,dl = nn.Linear(4, 4),[(x,y)]
    with pytest.raises(ValueError, match=f'models: one is called {missing!r}'): layer_rank({'a':m, missing:m}, dl)
    with pytest.raises(ValueError, match=f'models: one is called {missing!r}'): group_accuracy({missing:m}, dl)
    with pytest.raises(ValueError, match=f'sets: one is called {missing!r}'): group_accuracy(m, {'a':dl, missing:dl})

def test_groups_of_other_shapes():
    x,y = torch.randn(40, 4),torch.arange(40)%4
    for by,shape in (([],r'\(0,\)'),(np.zeros((40,2)),r'\(40, 2\)'),([('a',1)]*40,r'\(40, 2\)')):
        with pytest.raises(ValueError, match=f'by: of shape {shape}; must be one'):
            group_accuracy(nn.Linear(4, 4), [(x,y)], by=by)
        with pytest.raises(ValueError, match=f'groups: of shape {shape}; must be one'): dfr(x, y, by)
    for level in (0,1.,95,float('nan')):
        with pytest.raises(ValueError, match=f'level={level}: must be above 0 and below 1'):
            group_accuracy(nn.Linear(4, 4), [(x,y)], level=level)

def test_features_of_any_precision():
    X,y = blobs()
    X = torch.tensor(X).bfloat16()
    a,b,c = (dfr(o, y) for o in (X, X.double().numpy(), X.float().requires_grad_()))
    for o in (b,c): assert torch.equal(a.weight, o.weight) and torch.equal(a.bias, o.bias)

def test_parts_of_one_dataset_share_no_images():
    "Parts of parts are compared by the samples that they come from; those of one list may be apart"
    X,part,loader = torch.rand(40,3,4,4),torch.utils.data.Subset,partial(torch.utils.data.DataLoader, batch_size=8)
    ds = torch.utils.data.TensorDataset(X, torch.arange(40)%2)
    items,net = [(x,int(y)) for x,y in ds],nn.Sequential(nn.Flatten(), nn.Linear(48,2))
    first,rest = part(ds, range(25)),part(ds, range(25,40))
    def see(a, b): return recover(net, a, b, few=2, seeds=1, features='last', progress=False)
    for a,b in ((loader(ds),loader(rest)), (loader(first),loader(part(ds, [39,24,30,31]))),
                (loader(rest),DataLoader(part(part(ds, range(20,40)), [8,9,10,11]), bs=8, num_workers=0))):
        with pytest.raises(ValueError, match='shares images with train'): see(a, b)
    assert see(loader(first), loader(rest)).attrs['n_test']==15
    dl = DataLoader(items, bs=8, num_workers=0)
    assert see(*[same_dl(dl, idxs=i) for i in (list(range(25)),list(range(25,40)))]).attrs['n_test']==15

class Two(nn.Module):
    "Two heads, whose answers are added"
    def __init__(self, a, b): super().__init__(); self.a,self.b = a,b
    def forward(self, x): return self.a(x)+self.b(x)

def test_a_last_layer_beside_others():
    "A new one in its place would replace a part of the network only, without a word"
    set_seed(0)
    x,y = torch.randn(60, 4),torch.arange(60)%3
    data,heads = ([(x[:30],y[:30])],[(x[30:],y[30:])]),[nn.Linear(4, 3) for _ in range(2)]
    def see(model, **kw): return recover(model, *data, few=2, seeds=1, progress=False, **kw)
    for model in (Ensemble(heads),Two(*heads)):
        with pytest.raises(ValueError, match="do not go by '.*', its last linear layer, alone"): see(model, features='last')
        assert len(see(model, features='all'))==1 and not heads[1]._forward_hooks
    for model in (nn.Sequential(heads[0], nn.Softmax(1)),Ensemble(heads[:1])): see(model, features='last')

@pytest.mark.parametrize('label,named', [(-1,False), (-1,True), (3,True)])
def test_labels_of_no_class_are_refused(label, named):
    "-1 was counted as the class that is named last"
    set_seed(0)
    items = [(torch.randn(4),[0,1,2,label][i%4]) for i in range(40)]
    class Items(list): vocab = ['a','b','c'] if named else None
    dl,test = (DataLoader(Items(o), bs=8, num_workers=0) for o in (items, items[::-1]))
    said = f'dl: 10 of 40 samples have labels such as {label}, which is none of the classes'
    with pytest.raises(ValueError, match=said): group_accuracy(nn.Linear(4, 3), dl)
    with pytest.raises(ValueError, match=said): recover(nn.Linear(4, 3), dl, test, few=1, progress=False)

def test_guessing_goes_by_all_classes():
    "A part of the data has fewer classes than the model chooses from"
    x,model = torch.randn(20, 4),nn.Linear(4, 5)
    for y in (torch.full((20,), 3),torch.arange(20)%2):
        g = group_accuracy(dict(pretrain=model, erode=model), [(x,y)])
        assert g.attrs['chance']==.2 and (g.lost().lost==0).all()

def test_many_models_stay_in_their_row():
    "Each of 14 dots lies nearest to its own group, and no two have the same colour"
    x,y = torch.randn(8, 4),torch.arange(8)%2
    ax = group_accuracy({str(i):nn.Linear(4, 2) for i in range(14)}, [(x,y)]).plot()
    dots = [o.lines[0] for o in ax.containers]
    assert [o.get_ydata().round().tolist() for o in dots]==[[0,1]]*14
    assert len({to_rgb(o.get_color()) for o in dots})==14
    plt.close(ax.figure)

def test_one_sample_of_each_of_two_classes_says_nothing():
    "Its standardised features are 1 and -1; the slope of the log-loss at 0 is C = 1, no more than the penalty's"
    X = np.random.RandomState(0).randn(2, 5)
    assert not model(1., 0).fit(StandardScaler().fit_transform(X), [0,1]).coef_.any()
    with pytest.raises(ValueError, match='X, y: one sample of each of two classes has .* give two of each or more'): dfr(X, [0,1])
    data = [[(torch.randn(9, 4), torch.arange(9)%2)] for _ in range(2)]
    net = nn.Sequential(nn.Linear(4, 4), nn.ReLU(), nn.Linear(4, 2))
    with pytest.raises(ValueError, match=r'few=\[1\]: one sample of each of two classes .* choose 2 or more'):
        recover(net, *data, few=1, progress=False)
    with pytest.warns(UserWarning, match=r'few=\[1, 3\]: 1 is left out'): r = recover(net, *data, few=(1,3), progress=False)
    assert {*r.few}=={3}
    assert len(recover(net, *data, few=2, seeds=1, progress=False))==2

def test_a_probe_takes_arrays():
    X,y = blobs()
    p = dfr(X, y)
    assert p.predict(X).tolist()==p.predict(torch.tensor(X)).tolist()
    assert p.accuracy(X, pd.Series(y, range(5, 95)))==np.mean(p.predict(X).numpy()==y)
