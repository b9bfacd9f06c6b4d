"Mitigations in real fits: with mixed precision, with phases, together, stopped and gone on, and against a second, naive implementation."
from copy import deepcopy
import pytest, torch, torch.nn.functional as F
from torch import nn
from fastai.callback.mixup import MixUp
from fastai.vision.all import Callback, CrossEntropyLossFlat, DataLoaders, GradientAccumulation, Learner, MixedPrecision, SGD, TfmdDL, accuracy, set_seed
from stop import Boom, StopAt
from feature_erosion.data import digits_dls
from feature_erosion.learner import erosion_learner   # with it, `fit_phases`
from feature_erosion.mitigations import (DERpp, EWC, Adversarial, ContinualBackprop, GroupDRO, L2Init, L2SP, LwF, Mitigation, Only, ReDo, Replay, SAM, SI,
                                         ShrinkPerturb, SpectralDecoupling, fisher, grouped)
from feature_erosion.patterns import ColorSquare
from feature_erosion.phases import Phase
from feature_erosion.runs.resume import KeepRun
from feature_erosion.runs.store import RunStore

def data(): return digits_dls(n=128, n_valid=40, bs=32)   # a loader has random numbers of its own: a new one for each fit
dls = data()
def net(): return nn.Sequential(nn.Flatten(), nn.Linear(768,32), nn.BatchNorm1d(32), nn.ReLU(), nn.Linear(32,10))

every = dict(
    l2sp=lambda: L2SP(.1), l2sp_head=lambda: L2SP(.1, .1, head='4'), l2init=lambda: L2Init(.01), ewc=lambda: EWC(dls, 5., n=40), si=lambda: SI(.5), lwf=lambda: LwF(1.),
    decoupling=lambda: SpectralDecoupling(.01), replay=lambda: Replay(dls, 40), derpp=lambda: DERpp(dls, 40), sam=lambda: SAM(.05), asam=lambda: SAM(.5, adaptive=True),
    adversarial=lambda: Adversarial(8/255, steps=2), shrink=lambda: ShrinkPerturb(), only=lambda: Only('4'), redo=lambda: ReDo(1., every=2),
    backprop=lambda: ContinualBackprop(.02, maturity=2), dro=lambda: GroupDRO(.5))

def fit(cbs, folder=None, stop=None, lengths=(2,2), **kw):
    set_seed(0)
    clean,groups = data(),next((o.phases or ['erode'] for o in cbs if isinstance(o, GroupDRO)), [])
    learn = Learner(clean, net(), opt_func=lambda p, **k: SGD(p, mom=.9, **k), metrics=accuracy, loss_func=CrossEntropyLossFlat(), lr=.05, **kw)
    both = {'pretrain':clean, 'erode':clean.inject(ColorSquare(4), ratio=.7 if groups else 1.)}
    for o in groups: both[o] = grouped(both[o], torch.arange(128)%3)
    keep = [KeepRun(RunStore(folder).run('a'), minutes=0, strict=True)] if folder else []
    with learn.no_bar(), learn.no_logging():
        learn.fit_phases([Phase(k, n, d) for (k,d),n in zip(both.items(), lengths)], cbs=[*keep, StopAt(stop), *cbs])
    return learn

def weights(learn): return list(learn.model.state_dict().values())
def same(a, b): return all(torch.equal(x, y) for x,y in zip(weights(a), weights(b), strict=True))

def test_all_are_tried(): assert {type(f()) for f in every.values()} >= {c for c in _subclasses(Mitigation) if c.__name__[0]!='_' and c.__name__!='Penalty'}
def _subclasses(cls): return {o for c in cls.__subclasses__() for o in {c,*_subclasses(c)} if o.__module__=='feature_erosion.mitigations'}

@pytest.fixture(scope='module')
def plain(): return fit([])

@pytest.mark.parametrize('name', every)
def test_acts_in_the_second_phase_only(plain, name):
    "And what it leaves behind is a Learner like any other: all weights train, no hooks stay"
    learn = fit([every[name]()])
    for k,v in plain.snapshots['pretrain'].items(): assert torch.equal(v, learn.snapshots['pretrain'][k]), k
    assert not same(plain, learn)
    assert all(p.requires_grad for p in learn.model.parameters()) and not any(m._forward_pre_hooks or m._forward_hooks for m in learn.model.modules())
    assert all(v.isfinite().all() for v in weights(learn))

@pytest.mark.parametrize('name', every)
def test_named_phases(plain, name):
    "In the first phase alone it leaves the second as it is from there"
    cb = every[name]()
    cb.phases = ['pretrain']
    if name=='si':
        with pytest.raises(ValueError, match='nothing was learnt before'): fit([cb])
        return
    learn = fit([cb])
    assert not all(torch.equal(v, learn.snapshots['pretrain'][k]) for k,v in plain.snapshots['pretrain'].items()) and not cb.acts

@pytest.mark.parametrize('name', every)
def test_stopped_and_on(tmp_path, name):
    "In the middle of the second phase: the same weights to the last bit"
    whole = fit([every[name]()], tmp_path/'whole')
    with pytest.raises(Boom): fit([every[name]()], tmp_path/'cut', stop=11)
    assert same(whole, fit([every[name]()], tmp_path/'cut'))

class Half(MixedPrecision):
    def __init__(self): super().__init__('bf16')
    def before_fit(self): super().before_fit(); self.autocast = torch.autocast('cpu', torch.bfloat16)

@pytest.mark.parametrize('name', every)
def test_in_mixed_precision(name):
    "It trains, in its own phase too, and the weights stay in float32"
    learn = fit([every[name](), Half()])
    assert {v.dtype for v in learn.model.parameters()}=={torch.float32} and all(v.isfinite().all() for v in weights(learn))

def test_all_together():
    "Penalties, replay, flat minima, adversarial images and MixUp in one fit"
    cbs = [every[k]() for k in ('l2sp','l2init','ewc','si','lwf','decoupling','replay','derpp','adversarial','redo')]
    assert all(v.isfinite().all() for v in weights(fit([*cbs, every['sam'](), MixUp(.4)])))

def test_accumulated_gradients():
    "A penalty is divided like the loss: two halves of a batch are one batch"
    def trained(bs, *cbs):
        set_seed(0)
        items = [(torch.randn(768),torch.tensor(i%10)) for i in range(128)]
        d = DataLoaders(*[TfmdDL(items, bs=bs)]*2)
        m = nn.Sequential(nn.Flatten(), nn.Linear(768,10))
        learn = Learner(d, m, opt_func=SGD, loss_func=CrossEntropyLossFlat(), lr=.05, cbs=[L2SP(1.), *cbs])
        with learn.no_bar(), learn.no_logging(): learn.fit(2)
        return m[1].weight.detach()
    torch.testing.assert_close(trained(64), trained(32, GradientAccumulation(64)), atol=1e-5, rtol=1e-4)

def naive(kind, steps=5):
    "A plain loop in PyTorch on fixed batches, each method written out once more in another way"
    torch.manual_seed(0)
    model,X,y = nn.Sequential(nn.Linear(4,8), nn.Tanh(), nn.Linear(8,3)),torch.randn(steps,6,4),torch.randint(3, (steps,6))
    old = deepcopy(model)
    opt = torch.optim.SGD(model.parameters(), lr=.1)
    for x,t in zip(X, y):
        def loss():
            l = F.cross_entropy(model(x), t)
            if kind=='l2sp': l = l+.5*sum(((p-q.detach())**2).sum() for p,q in zip(model.parameters(), old.parameters()))
            if kind=='lwf':
                soft = F.softmax(old(x).detach(), 1)**.5   # as Mammoth smooths: powers of 1/T, normalised
                new = F.softmax(model(x), 1)**.5
                l = l-2*((soft/soft.sum(1, keepdim=True))*(new/new.sum(1, keepdim=True)).log()).sum(1).mean()
            if kind=='decoupling': l = l+.3*(model(x)**2).sum()/model(x).numel()
            return l
        if kind=='sam':
            grads = torch.autograd.grad(loss(), list(model.parameters()))
            flat = torch.cat([g.flatten() for g in grads])
            before = deepcopy(model.state_dict())
            with torch.no_grad():
                for p,g in zip(model.parameters(), grads): p += .2*g/flat.norm()
            up = torch.autograd.grad(loss(), list(model.parameters()))
            model.load_state_dict(before)
            with torch.no_grad():
                for p,g in zip(model.parameters(), up): p -= .1*g
        else:
            opt.zero_grad(); loss().backward(); opt.step()
    return old,X,y,torch.cat([p.detach().flatten() for p in model.parameters()])

@pytest.mark.parametrize('kind', ['plain','l2sp','lwf','decoupling','sam'])
def test_against_a_naive_loop(kind):
    start,X,y,want = naive(kind)
    cbs = dict(plain=[], l2sp=[L2SP(1.)], lwf=[LwF(2., 2.)], decoupling=[SpectralDecoupling(.3)], sam=[SAM(.2)])[kind]
    items = list(zip(X.flatten(0,1), y.flatten()))
    d = DataLoaders(TfmdDL(items, bs=6), TfmdDL(items, bs=6))
    learn = Learner(d, deepcopy(start), loss_func=nn.CrossEntropyLoss(), opt_func=SGD, lr=.1, cbs=cbs)
    with learn.no_bar(), learn.no_logging(): learn.fit(1)
    torch.testing.assert_close(torch.cat([p.detach().flatten() for p in learn.model.parameters()]), want, atol=1e-6, rtol=1e-5)
    if kind!='plain': assert not torch.allclose(want, naive('plain')[3], atol=1e-4)

def test_fisher_against_autograd_of_each_sample():
    torch.manual_seed(0)
    model,x,y = nn.Sequential(nn.Linear(4,5), nn.ReLU(), nn.Linear(5,3)),torch.randn(7,4),torch.randint(3, (7,))
    got = fisher(model, [(x,y)])
    per = torch.func.vmap(torch.func.grad(lambda p, a, t: F.cross_entropy(torch.func.functional_call(model, p, a[None]), t[None])), (None,0,0))(dict(model.named_parameters()), x, y)
    for n,g in per.items(): torch.testing.assert_close(got[n], (g**2).mean(0))

def test_ewc_protects_what_matters():
    "A weight whose input is always 0 in the old data has no importance, and is free to move"
    x = torch.randn(64,2); x[:,1] = 0
    old = DataLoaders(*[TfmdDL(list(zip(x, (x[:,0]>0).long())), bs=8)]*2)
    lin = nn.Linear(2,2)
    f = fisher(lin, old.train, None)
    assert (f['weight'][:,1]==0).all() and (f['weight'][:,0]>0).all()

def test_sam_refuses_accumulation():
    learn = Learner(dls, net(), loss_func=CrossEntropyLossFlat(), cbs=[SAM(), GradientAccumulation(64)])
    with pytest.raises(ValueError, match='GradientAccumulation'), learn.no_bar(), learn.no_logging(): learn.fit(1)

def test_validation_and_prediction_are_left_alone(plain):
    "Looking at a network does not start a method"
    learn = Learner(dls, net(), loss_func=CrossEntropyLossFlat(), cbs=[Adversarial(), Replay(dls, 40), ShrinkPerturb()])
    before = deepcopy(learn.model.state_dict())
    with learn.no_bar(), learn.no_logging(): learn.validate(); learn.get_preds()
    assert all(torch.equal(a, b) for a,b in zip(before.values(), weights(learn)))
