"Mitigations in real fits: with mixed precision, with phases, together, stopped and gone on, and against a second, naive implementation."
import random
from collections import Counter
from copy import deepcopy
from functools import cache, partial
from math import prod
import numpy as np, pandas as pd, pytest, torch, torch.nn.functional as F
import matplotlib.pyplot as plt
from torch import nn
from fastai.callback.data import WeightedDL
from fastai.callback.mixup import MixUp
from fastai.vision.all import (ActivationStats, CSVLogger, CancelBatchException, CancelStepException, Callback, CrossEntropyLossFlat,
                               DataLoader, DataLoaders, GradientAccumulation, Learner, Lookahead, SGD,
                               SkipItemException, TfmdDL, accuracy, no_random, set_seed)
from trainings import Bf16, Boom, StopAt, same, weights
from feature_erosion.batches import TensorAnswer
from feature_erosion.data import digits_dls
from feature_erosion.evalsets import EvalSets, pattern_sets
from feature_erosion.learner import erosion_learner   # with it, `fit_phases`
from feature_erosion.loaders import subset_dl
from feature_erosion.mitigations import (DERpp, EWC, Adversarial, ContinualBackprop, Ensemble, GroupDRO, L2Init, L2SP, LwF,
                                         Mitigation, Only, Penalty, ReDo, Replay, SAM, SI, ShrinkPerturb, SpectralDecoupling,
                                         _columns, fisher, fresh, grouped, just_train_twice, stamp_groups, unit_chains, wise_ft)
from feature_erosion.patterns import ColorSquare
from feature_erosion.phases import Phase
from feature_erosion.recover import Ramp, group_accuracy
from feature_erosion.runs.resume import KeepRun, _data_settings
from feature_erosion.runs.store import RunStore
from feature_erosion.unlearning import split_forget

def data(): return digits_dls(n=128, n_valid=40, bs=32)   # a loader has random numbers of its own: a new one for each fit
dls = data()
def net(): return nn.Sequential(nn.Flatten(), nn.Linear(768,32), nn.BatchNorm1d(32), nn.ReLU(), nn.Linear(32,10))

every = dict(
    l2sp=lambda: L2SP(.1), l2sp_head=lambda: L2SP(.1, .1, head='4'), l2init=lambda: L2Init(.01), ewc=lambda: EWC(dls, 5., n=40),
    si=lambda: SI(.5), lwf=lambda: LwF(1.),
    decoupling=lambda: SpectralDecoupling(.01), replay=lambda: Replay(dls, 40), derpp=lambda: DERpp(dls, 40),
    sam=lambda: SAM(.05), asam=lambda: SAM(.5, adaptive=True),
    adversarial=lambda: Adversarial(8/255, steps=2), shrink=lambda: ShrinkPerturb(), only=lambda: Only('4'),
    redo=lambda: ReDo(1., every=2),
    backprop=lambda: ContinualBackprop(.02, maturity=2), dro=lambda: GroupDRO(.5))

def fit(cbs, folder=None, stop=None, lengths=(2,2), **kw):
    set_seed(0)
    clean,groups = data(),next((o.phases or ['erode'] for o in cbs if isinstance(o, GroupDRO)), [])
    learn = Learner(clean, net(), opt_func=lambda p, **k: SGD(p, mom=.9, **k), metrics=accuracy, loss_func=CrossEntropyLossFlat(),
                    lr=.05, **kw)
    both = {'pretrain':clean, 'erode':clean.inject(ColorSquare(4), ratio=.7 if groups else 1.)}
    for o in groups: both[o] = grouped(both[o], torch.arange(128)%3)
    keep = [KeepRun(RunStore(folder).run('a'), minutes=0, strict=True)] if folder else []
    with learn.no_bar(), learn.no_logging():
        sets = EvalSets(pattern_sets(both['erode']), at=[0,3])
        learn.fit_phases([Phase(k, n, d) for (k,d),n in zip(both.items(), lengths)], cbs=[*keep, StopAt(stop), sets, *cbs])
    return learn


def test_all_are_tried():
    assert {type(f()) for f in every.values()} >= {c for c in _subclasses(Mitigation) if c.__name__[0]!='_' and c.__name__!='Penalty'}
def _subclasses(cls):
    return {o for c in cls.__subclasses__() for o in {c,*_subclasses(c)} if o.__module__=='feature_erosion.mitigations'}

@pytest.fixture(scope='module')
def plain(): return fit([])

@pytest.fixture(scope='module')
def whole():
    "A fit with a mitigation alone; each is made once"
    return cache(lambda name: fit([every[name]()]))

def test_batch_norms_of_averaged_weights(plain):
    "By hand: means and variances of what the averaged first layer makes of the data; momentum and weights stay"
    x = torch.cat([b[0] for b in plain.dls.valid])
    a,b = wise_ft(plain),wise_ft(plain, dl=[(x,torch.zeros(40))])
    with torch.no_grad(): z = a[:2](x)
    assert torch.allclose(b[2].running_mean, z.mean(0), atol=1e-5) and torch.allclose(b[2].running_var, z.var(0), rtol=1e-4)
    assert not torch.allclose(a[2].running_var, z.var(0), rtol=.05) and b[2].momentum==.1 and not b.training
    assert all(torch.equal(p, q) for p,q in zip(a.parameters(), b.parameters()))
    loose = wise_ft(plain, dl=plain.dls.valid.new(bs=13))[2]   # 3 batches, without the last image
    assert loose.num_batches_tracked==3 and (loose.running_mean-z.mean(0)).abs().max()<.3*z.std(0).max()

def test_masks_of_averaged_weights():
    "A mask of causal attention holds -inf; of two that are the same it is the mean"
    class Causal(nn.Module):
        def __init__(self):
            super().__init__()
            self.lin = nn.Linear(3,3)
            self.register_buffer('mask', torch.full((4,4), -torch.inf).triu(1))
        def forward(self, x): return self.lin((x@x.mT+self.mask).softmax(-1)@x).mean(1)
    items = [(torch.randn(4,3),torch.tensor(i%3)) for i in range(8)]
    learn = Learner(DataLoaders.from_dsets(items, items, bs=4), Causal(), loss_func=CrossEntropyLossFlat(), lr=.1)
    with learn.no_bar(), learn.no_logging(): learn.fit_phases([Phase(k, 1, learn.dls) for k in ('pretrain','erode')])
    a,b = learn.models_at('pretrain', 'erode').values()
    m = wise_ft(learn, alpha=.25)
    assert torch.equal(m.mask, a.mask)
    torch.testing.assert_close(m.lin.weight, .75*a.lin.weight+.25*b.lin.weight)

@pytest.mark.parametrize('name', every)
def test_acts_in_the_second_phase_only(plain, whole, name):
    "And what it leaves behind is a Learner like any other: all weights train, no hooks stay"
    learn = whole(name)
    for k,v in plain.snapshots['pretrain'].items(): assert torch.equal(v, learn.snapshots['pretrain'][k]), k
    assert not same(plain, learn)
    assert all(p.requires_grad for p in learn.model.parameters())
    assert not any(m._forward_pre_hooks or m._forward_hooks for m in learn.model.modules())
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
def test_stopped_and_on(tmp_path, whole, name):
    "In the middle of the second phase: the same weights to the last bit as without keeping the run"
    with pytest.raises(Boom): fit([every[name]()], tmp_path, stop=11)
    assert same(whole(name), fit([every[name]()], tmp_path))

@pytest.mark.parametrize('name', every)
def test_in_mixed_precision(name):
    "It trains, in its own phase too, and the weights stay in float32"
    learn = fit([every[name](), Bf16()])
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
        d = DataLoaders(*[TfmdDL(items, bs=bs, num_workers=0)]*2)
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
    d = DataLoaders(*[TfmdDL(items, bs=6, num_workers=0)]*2)
    learn = Learner(d, deepcopy(start), loss_func=nn.CrossEntropyLoss(), opt_func=SGD, lr=.1, cbs=cbs)
    with learn.no_bar(), learn.no_logging(): learn.fit(1)
    torch.testing.assert_close(torch.cat([p.detach().flatten() for p in learn.model.parameters()]), want, atol=1e-6, rtol=1e-5)
    if kind!='plain': assert not torch.allclose(want, naive('plain')[3], atol=1e-4)

def test_fisher_against_autograd_of_each_sample():
    torch.manual_seed(0)
    model,x,y = nn.Sequential(nn.Linear(4,5), nn.ReLU(), nn.Linear(5,3)),torch.randn(7,4),torch.randint(3, (7,))
    got = fisher(model, [(x,y)])
    per = torch.func.vmap(torch.func.grad(lambda p, a, t: F.cross_entropy(torch.func.functional_call(model, p, a[None]),
        t[None])), (None,0,0))(dict(model.named_parameters()), x, y)
    for n,g in per.items(): torch.testing.assert_close(got[n], (g**2).mean(0))

def test_ewc_protects_what_matters():
    "A weight whose input is always 0 in the old data has no importance, and is free to move"
    x = torch.randn(64,2); x[:,1] = 0
    old = DataLoaders(*[TfmdDL(list(zip(x, (x[:,0]>0).long())), bs=8, num_workers=0)]*2)
    lin = nn.Linear(2,2)
    f = fisher(lin, old.train, None)
    assert (f['weight'][:,1]==0).all() and (f['weight'][:,0]>0).all()

def test_sam_refuses_accumulation():
    learn = Learner(dls, net(), loss_func=CrossEntropyLossFlat(), cbs=[SAM(), GradientAccumulation(64)])
    with pytest.raises(ValueError, match='GradientAccumulation'), learn.no_bar(), learn.no_logging(): learn.fit(1)

@pytest.mark.parametrize('how', ['new tensor','in place'])
def test_sam_refuses_a_loss_that_it_would_not_know(how):
    "As of fastai's `RNNRegularizer`, or somebody's own; a `Penalty` is known"
    def term(model): return 10*sum(p.square().sum() for p in model.parameters())
    class More(Callback):
        run_valid = False
        def after_loss(self):
            if how=='in place': self.learn.loss_grad += term(self.model)
            else: self.learn.loss_grad = self.loss_grad+term(self.model)
    class Decay(Penalty):
        def penalty(self, pred): return term(self.learn.model)
    with pytest.raises(ValueError, match='SAM: more changes the loss, .* make a `Penalty` of what it adds'):
        small(points(), layers(), [SAM(), More()])
    a,b = (small(points(), layers(), cbs, lr=.01) for cbs in ([SAM(1e-6), Decay()], [More()]))
    for p,q in zip(a.model.parameters(), b.model.parameters()): torch.testing.assert_close(p, q, atol=1e-4, rtol=1e-3)

def test_adversarial_images_in_half_precision():
    "A network that is sure has small gradients: those of pixels must not become 0, nor NaN where the scale is too large"
    class Half16(Bf16):
        def before_fit(self):
            super().before_fit()
            self.autocast,self.learn.scaler = torch.autocast('cpu', torch.float16),torch.amp.GradScaler('cpu', init_scale=self.scale)
    def signs(*cbs):
        torch.manual_seed(0)
        m,cb,got = nn.Sequential(nn.Conv2d(3,8,3), nn.ReLU(), nn.Flatten(), nn.Linear(8*36,3)),Adversarial(8/255),[]
        with torch.no_grad(): m[3].bias.copy_(torch.tensor([14.,0,0]))   # all images are of class 0, with a loss near 1e-6
        uphill = cb._uphill
        cb._uphill = lambda x: got.append(uphill(x).sign()) or got[-1]
        small([(torch.rand(3,8,8),torch.tensor(0)) for _ in range(32)], m, [cb,*cbs], lr=0.)
        return torch.cat(got)
    full = signs()
    assert (full!=0).float().mean()>.9
    for scale,same in ((2.**16,.95), (2.**40,0.)):
        half = Half16()
        half.scale = scale
        got = signs(half)
        assert got.isfinite().all() and (got==full).float().mean()>=same

@pytest.mark.parametrize('what', ['shrink','redo'])
def test_lookahead_does_not_go_back(what):
    "A second fit: the slow weights of the first one are no place to go back to"
    m = nn.Sequential(nn.Linear(4,8), nn.ReLU(), nn.Linear(8,3))
    learn = Learner(dls_of(points()), m, loss_func=CrossEntropyLossFlat(), opt_func=lambda p, **k: Lookahead(SGD(p, **k), k=2),
                    lr=0.)
    with learn.no_bar(), learn.no_logging(): learn.fit(1)
    was = deepcopy(m.state_dict())
    cb = ShrinkPerturb(.4, 0.) if what=='shrink' else ReDo(1e6, every=4)   # renews all units at the last batch of four
    with learn.no_bar(), learn.no_logging(): learn.fit(1, cbs=cb)
    if what=='shrink': torch.testing.assert_close(m[0].weight, .4*was['0.weight'])
    else: assert (m[2].weight==0).all() and all((w!=was['0.weight']).all() for w in (m[0].weight, learn.opt.slow_weights[0][0]))

def test_arguments_that_would_do_something_else():
    "A name that is misspelt beside others, pixels in 0…255, no iterations between two looks"
    with pytest.raises(ValueError, match="names=.*: typo begin no trained parameter's name; there are 0.weight"):
        small(points(), layers(), Only(['3','typo']))
    with pytest.raises(ValueError, match='they begin no trained parameter'): small(points(), layers(), Only([]))
    with pytest.raises(ValueError, match='eps=8: must be in 0…1'): Adversarial(8)
    with pytest.raises(ValueError, match='every=0: must be a whole number, at least 1'): ReDo(every=0)

def test_norms_without_weights_rest_as_well():
    "`Only` leaves their statistics as they are, unless they are in the part that is trained"
    def stats(only):
        m = nn.Sequential(nn.Linear(4,8), nn.BatchNorm1d(8, affine=False),
                          nn.Sequential(nn.Linear(8,8), nn.BatchNorm1d(8, affine=False), nn.Linear(8,3)))
        small(points(), m, only)
        return (m[1].running_mean!=0).any(),(m[2][1].running_mean!=0).any()
    assert stats(Only('2'))==(False,True) and stats([])==(True,True)

def test_validation_and_prediction_are_left_alone(plain):
    "Looking at a network does not start a method"
    learn = Learner(dls, net(), loss_func=CrossEntropyLossFlat(), cbs=[Adversarial(), Replay(dls, 40), ShrinkPerturb()])
    before = deepcopy(learn.model.state_dict())
    with learn.no_bar(), learn.no_logging(): learn.validate(); learn.get_preds(); learn.tta(n=1); learn.summary()
    assert all(torch.equal(a, b) for a,b in zip(before.values(), weights(learn)))

def small(items, model, cbs=(), bs=8, lr=.1, loss=None, epochs=1, **kw):
    "A Learner after training on `items` in their order"
    learn = Learner(items if isinstance(items, DataLoaders) else dls_of(items, bs), model,
                    loss_func=loss or CrossEntropyLossFlat(), opt_func=SGD, lr=lr, **kw)
    with learn.no_bar(), learn.no_logging(): learn.fit(epochs, cbs=cbs)
    return learn

def dls_of(items, bs=8): return DataLoaders(*[TfmdDL(items, bs=bs, num_workers=0) for _ in range(2)])
def points(n=32, classes=3, seed=0):
    g = torch.Generator().manual_seed(seed)
    return [(torch.rand(4, generator=g),torch.tensor(i%classes)) for i in range(n)]
def layers(out=3, seed=0):
    torch.manual_seed(seed)
    return nn.Sequential(nn.Linear(4,8), nn.BatchNorm1d(8), nn.ReLU(), nn.Linear(8,out))

# Stopped by the user, steps that are skipped, a second network

@pytest.mark.parametrize('name', ['sam','asam','only','redo','backprop','adversarial','derpp'])
def test_an_interrupt_leaves_an_ordinary_network(name):
    "Weights are where they were, all of them train, no hook stays, whichever forward pass it was that was stopped"
    for last in (1,2,3):
        model,passes,cb = net(),[],every[name]()
        was = [p.detach().clone() for p in model.parameters()]
        def stop(m, *_):
            if m.training: passes.append(1)
            if len(passes)==last: raise KeyboardInterrupt
        handle = model[4].register_forward_hook(stop)
        with pytest.raises(KeyboardInterrupt): small(data(), model, cb, lr=0.)
        handle.remove()
        assert all(p.requires_grad for p in model.parameters())
        assert not any(m._forward_pre_hooks or m._forward_hooks for m in model.modules())
        if name in ('sam','asam'): assert all(torch.equal(a, b) for a,b in zip(was, model.parameters()))

class Overflow(Callback):
    "The second batch's gradients overflow, so that its step is skipped, as `MixedPrecision` does; or, with `left_out`, the batch is"
    def __init__(self, left_out): self.left_out,self.order = left_out,-50 if left_out else -4
    def before_batch(self):
        if self.left_out and self.learn.training and self.learn.train_iter==1: raise CancelBatchException
    def before_step(self):
        if self.left_out or self.learn.train_iter!=1: return
        for p in self.model.parameters(): p.grad.fill_(torch.inf)
        self.learn.scaler_skips.on = True
class Skip(Callback):
    order,on,name = 10,False,'scaler_skips'
    def before_step(self):
        if self.on: self.on = False; raise CancelStepException

def test_si_does_without_steps_that_were_skipped():
    def run(left_out):
        si,m = SI(.5),nn.Sequential(*[o for o in layers() if not isinstance(o, nn.BatchNorm1d)])
        learn = Learner(dls_of(points()), m, loss_func=CrossEntropyLossFlat(), opt_func=SGD, lr=.1)
        with learn.no_bar(), learn.no_logging():
            learn.fit_phases([Phase('a', 2), Phase('b', 2)], cbs=[si, Overflow(left_out), Skip()])
        return si.omega
    skipped,never = run(False),run(True)
    for k,v in never.items(): torch.testing.assert_close(skipped[k], v)
    assert all(v.max()>0 for v in skipped.values())

@pytest.mark.parametrize('momentum', [.1,None])
@pytest.mark.parametrize('bad', [False,True])
def test_second_passes_leave_batch_norms_alone(momentum, bad):
    "Statistics, and the number of batches, are those of one pass, and stay finite where the way to the second was not"
    class Bad(Callback):
        order = -10
        def after_backward(self):
            if bad: self.model[0].weight.grad.fill_(torch.inf)
        def before_step(self):
            if bad: raise CancelStepException   # as `MixedPrecision` does then
    def run(*cbs):
        m = layers()
        m[1].momentum = momentum
        small(points(), m, cbs, lr=0.)
        return m[1].running_mean,m[1].running_var,m[1].num_batches_tracked
    for a,b in zip(run(Bad()), run(Bad(), SAM(.5))): assert torch.equal(a, b) and a.isfinite().all()

@pytest.mark.parametrize('name', ['ewc','si','lwf','derpp','redo'])
def test_another_network_begins_anew(name):
    "A callback that has been used before does the same as a new one"
    cb = every[name]()
    first,again = (fit([cb], lengths=(1,1)) for _ in range(2))
    assert same(first, again)

# Answers and labels of other kinds

by_class = pytest.mark.parametrize('make', [lambda d: EWC(d, 1e4), lambda d: LwF(100.), lambda d: DERpp(d, 20),
                                            lambda d: Adversarial(.5)], ids=['ewc','lwf','derpp','adversarial'])

@pytest.mark.parametrize('kind', ['one score','several labels'])
@by_class
def test_what_is_no_choice_of_a_class_is_refused(make, kind):
    "A softmax of one score is always 1: the method would do nothing, without a word"
    n = 1 if kind=='one score' else 3
    g = torch.Generator().manual_seed(0)
    items = [(x,(torch.rand(n, generator=g)<.5).float()) for x,_ in points()]
    with pytest.raises(ValueError, match='a score for each of two classes' if n==1 else 'class scores, and one class per sample'):
        small(items, layers(n), make(dls_of(items)), loss=nn.BCEWithLogitsLoss())

@pytest.mark.parametrize('scores,labels', [((5,3),(5,)), ((3,2,2),(2,2)), ((3,),(3,))], ids=['tokens','places','integers'])
@by_class
def test_several_choices_of_a_sample_are_refused(make, scores, labels):
    "In a language model's answers axis 1 is that of the words, and a softmax over it means nothing"
    items = [(x,torch.zeros(labels, dtype=torch.long)) for x,_ in points()]
    model = nn.Sequential(nn.Linear(4, prod(scores)), nn.Unflatten(1, scores))
    with pytest.raises(ValueError, match='class scores, and one class per sample'):
        small(items, model, make(dls_of(items)), loss=lambda p,y: p.square().mean())

def test_shares_of_classes_are_a_choice():
    "Soft labels, which add up to 1, are as good as integers"
    hard = points()
    soft = [(x,F.one_hot(y, 3).float()) for x,y in hard]
    for a,b in zip(fisher(m := layers(), dls_of(soft).train).values(), fisher(m, dls_of(hard).train).values()):
        torch.testing.assert_close(a, b)

@pytest.mark.parametrize('make',
                         [lambda d: EWC(d, 5.), lambda d: DERpp(d, 20), lambda d: Adversarial(.1), lambda d: Replay(d, 20),
                          lambda d: LwF()], ids=['ewc','derpp','adversarial','replay','lwf'])
@pytest.mark.parametrize('kind', [lambda x,y: (x,y[None]), lambda *o: list(o)], ids=['column','list'])
def test_samples_of_other_kinds(make, kind):
    "Labels of shape (batch, 1), as in fastai's tables and MedMNIST; lists, which make a list of a batch, too"
    def run(items):
        torch.manual_seed(1)
        return weights(small(items, layers(), make(dls_of(items))))
    assert all(torch.equal(a, b) for a,b in zip(run(points()), run([kind(*o) for o in points()])))

def test_train_twice_with_labels_in_a_column():
    plain,column = points(),[(x,y[None]) for x,y in points()]
    got = [sorted(just_train_twice(small(i, layers(), lr=0.), dls_of(i), 3).train.get_idxs()) for i in (plain,column)]
    assert got[0]==got[1] and len(got[0])>32

def test_measures_of_data_to_train_on_twice():
    "Each sample once, and none that the loader does not draw"
    some = digits_dls(n=128, n_valid=40, bs=32)
    some.train.n = 100
    m = net()
    for d in (data(), some):
        learn = Learner(d, m, loss_func=CrossEntropyLossFlat())
        twice = just_train_twice(learn, d, 3)
        assert twice.train.n>d.train.n and subset_dl(twice.train, None).chosen.tolist()==list(range(d.train.n))
        a,b = (fisher(m, o.train, None) for o in (twice,d))
        assert all(torch.equal(a[k], b[k]) for k in b)
    with pytest.raises(ValueError, match='in a way of its own'): split_forget(twice, share=.1)

@pytest.mark.parametrize('make', [LwF, lambda: DERpp(dls, 20), lambda: SAM(1.)])
def test_fastais_hooks_see_the_batch(make):
    "And not what a method computes beside it"
    want,seen = [],ActivationStats()
    class ByHand(Callback):
        run_valid,passive = False,True
        def after_pred(self): want.append(F.linear(self.x.flatten(1), self.model[1].weight, self.model[1].bias).std().item())
    set_seed(0)
    learn = Learner(data(), nn.Sequential(nn.Flatten(), nn.Linear(768,32), nn.ReLU(), nn.Linear(32,10)), opt_func=SGD, lr=.3)
    with learn.no_bar(), learn.no_logging(): learn.fit(1, cbs=[seen, ByHand(), make()])
    assert [o[0]['std'] for o in seen.stats]==pytest.approx(want, rel=1e-5)

def test_fresh_weights_without_the_hooks_of_callbacks(tmp_path):
    "A copy of these would take along their Learner, and what of it cannot be copied, such as an open file"
    class Look(Callback):
        passive,n = True,0
        def before_fit(self): self.hook = self.model[-1].register_forward_hook(self.see)
        def see(self, *args): self.n += 1
        def after_fit(self): self.hook.remove()
    def fit(*cbs):
        set_seed(0)
        learn = Learner(data(), net(), loss_func=CrossEntropyLossFlat(), opt_func=SGD, path=tmp_path)
        with learn.no_bar(), learn.no_logging(): learn.fit_phases([Phase('a', 1), Phase('b', 1)], cbs=[ShrinkPerturb(), *cbs])
        return learn
    look = Look()
    assert same(fit(), fit(ActivationStats(), look, CSVLogger()))
    assert look.n==2*(len(data().train)+len(data().valid))

def test_two_sets_of_old_samples():
    "Each adds as many samples as are new, and those of its own data"
    def grey(v): return DataLoaders.from_dsets(*[[(torch.full((1,4,4), v), int(i%2)) for i in range(12)]]*2, bs=4, num_workers=0)
    class See(Callback):
        order,seen,passive = 50,[],True
        def after_pred(self):
            if self.training: self.seen.append(sorted(self.xb[0][:,0,0,0].tolist()))
    model = nn.Sequential(nn.Flatten(), nn.Linear(16,2))
    learn = Learner(grey(0.), model, loss_func=nn.CrossEntropyLoss(), opt_func=SGD, lr=.1)
    with learn.no_bar(), learn.no_logging(): learn.fit(1, cbs=[Replay(grey(1.), 8), Replay(grey(2.), 8), See()])
    assert See.seen==[[0.]*4+[1.]*4+[2.]*4]*3

def test_old_samples_of_another_kind():
    "They would not fit in a batch, or be read in another way"
    new = [(torch.rand(3,8,8),torch.tensor(0)) for _ in range(8)]
    m = nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(3,3))
    for x in (torch.rand(3,9,9), (255*torch.rand(3,8,8)).byte()):
        with pytest.raises(ValueError, match='so they must be of one size and transformed in the same way'):
            small(new, m, Replay(dls_of([(x,torch.tensor(1))]*8), 4))
    small(new, m, DERpp(dls_of([(torch.rand(3,9,9),torch.tensor(1))]*8), 4))

def test_groups_of_samples_that_have_none():
    d = dls_of(points())
    with pytest.raises(ValueError, match='8 groups for 16 samples; another callback adds samples'):
        small(grouped(d, torch.arange(32)%2), layers(), [GroupDRO(.5), Replay(d, 8)])
    learn = small(grouped(d, torch.arange(32)%2), layers(), [GroupDRO(.5), DERpp(d, 8)])
    assert all(v.isfinite().all() for v in weights(learn))

def test_groups_beside_stamps():
    "Groups are no pictures: who wears what is told, ramped and kept as without them; the training set can be looked at"
    clean = data()
    easy = clean.inject(ColorSquare(4), ratio=.5)
    both = grouped(easy, np.arange(128)%3)
    ds = both.train.dataset
    assert torch.equal(ds.stamps, easy.train.dataset.stamps) and ds.groups.tolist()==(np.arange(128)%3).tolist()
    assert group_accuracy(net(), both.train, by='picture').n.to_dict()=={'no picture':64, 'right picture':64}
    assert np.array_equal(stamp_groups(both.train), stamp_groups(easy.train))
    assert _data_settings(both)['painted']==64
    assert len({_data_settings(o)['content'] for o in (easy,both,grouped(easy, np.arange(128)%2))})==3
    with pytest.raises(ValueError, match='dls: has groups already'): grouped(both, np.arange(128)%2)
    with pytest.raises(ValueError, match='painted already'): both.inject(ColorSquare(4))
    later,seen = grouped(clean, np.arange(128)%3).inject(ColorSquare(4), seed=1),[]
    class Look(Callback):
        run_valid = False
        def before_batch(self): seen.append(self.dls.train.dataset.stamps)
    learn = small(later, net(), [Ramp(ratio=(0,1), seed=1), GroupDRO(.5), Look()])
    assert torch.equal(seen[2], clean.inject(ColorSquare(4), ratio=.5, seed=1).train.dataset.stamps)
    assert (later.train.dataset.stamps>=0).all()
    learn.add_cb(GroupDRO(.5))
    with learn.no_bar(): assert len(learn.get_preds(0)[0])==128 and learn.validate(0)[0]>0
    for d in (both,later): d.show_batch(max_n=1)
    plt.close('all')

def test_groups_of_painted_samples_of_a_plain_loader():
    "A loader that does not say so has one input, with a stamp and a group as well as without"
    items = [(torch.rand(3,8,8),torch.tensor(i%3)) for i in range(24)]
    d = DataLoaders(*[DataLoader(items, bs=8) for _ in range(2)])
    d.c = 3
    both = grouped(d.inject(ColorSquare(2), ratio=.5))
    assert both.n_inp==1 and len(both.one_batch())==3
    small(both, nn.Sequential(nn.Flatten(), nn.Linear(192,3)), GroupDRO(.5))

def test_both_passes_of_sam_see_the_same_old_samples():
    "By hand: replay drawn once, the gradient at the weights a step up"
    cb,m,items = DERpp(dls_of(points(8)), 8, alpha=.3, beta=.7),nn.Linear(4,3),points(8, seed=1)
    start = deepcopy(m)
    torch.manual_seed(5)
    small(items, m, [SAM(.3), cb])
    torch.manual_seed(5)
    (a,_,at),(b,y,_) = (cb.buffer.batch(8, m) for _ in range(2))
    scores = start(torch.stack([x for x,_ in points(8)])).detach()
    def loss(net):
        x,new = (torch.stack(o) for o in zip(*items))
        return F.cross_entropy(net(x), new) + .3*((net(a[0])-scores[at])**2).mean() + .7*F.cross_entropy(net(b[0]), y[0])
    g = torch.autograd.grad(loss(start), list(start.parameters()))
    up,norm = deepcopy(start),torch.cat([o.flatten() for o in g]).norm()
    with torch.no_grad():
        for p,o in zip(up.parameters(), g): p += .3*o/norm
    for p,q,o in zip(m.parameters(), start.parameters(), torch.autograd.grad(loss(up), list(up.parameters()))):
        torch.testing.assert_close(p, q-.1*o, atol=1e-5, rtol=1e-4)

# Which units these are

class Tokens(nn.Module):
    "A perceptron for each token, then their mean, or all of them side by side"
    def __init__(self, flat):
        super().__init__()
        self.a,self.act,self.b,self.flat = nn.Linear(4,6),nn.ReLU(),nn.Linear(6*5 if flat else 6,3),flat
    def forward(self, x):
        h = self.act(self.a(x))
        return self.b(h.flatten(1)) if self.flat else self.b(h).mean(1)

def looked(model, x):
    "A Learner that looked at the use of units once"
    cb = ReDo(.5, every=1)
    seen = {}
    cb.tired = lambda k, u: (seen.update({k:u}), torch.tensor([], dtype=torch.int64))[1]
    learn = Learner(dls_of([(o,torch.tensor(i%3)) for i,o in enumerate(x)], len(x)), model, loss_func=CrossEntropyLossFlat(),
                    opt_func=SGD, lr=0., cbs=cb)
    with learn.no_bar(), learn.no_logging(): learn.fit(1)
    return cb,seen

@pytest.mark.parametrize('flat', [False,True])
def test_units_of_tokens(flat):
    torch.manual_seed(0)
    m,x = Tokens(flat),torch.randn(7,5,4)
    _,seen = looked(m, x)
    torch.testing.assert_close(seen['a'], m.act(m.a(x)).abs().mean((0,1)))
    was = m(x)
    with torch.no_grad(): m.b.weight[:,_columns(m.b, m.a, torch.tensor([2,4]))] = 0
    half = deepcopy(m)
    with torch.no_grad(): half.a.weight[[2,4]],half.a.bias[[2,4]] = 0.,1.
    torch.testing.assert_close(m(x), half(x))   # the scores do not depend on these units any more
    assert not torch.allclose(was, m(x))

@pytest.mark.parametrize('layout', [torch.contiguous_format, torch.channels_last])
def test_renewed_units_count_for_nothing(layout):
    "After a convolution, and after a map laid out flat, with a norm of its places"
    torch.manual_seed(0)
    m = nn.Sequential(nn.Conv2d(3,4,3), nn.BatchNorm2d(4), nn.ReLU(), nn.Conv2d(4,5,3), nn.ReLU(), nn.Flatten(),
                      nn.BatchNorm1d(5*4), nn.Linear(5*4,3)).to(memory_format=layout)
    x = torch.randn(6,3,6,6)
    assert unit_chains(m)=={'0':(['1'],['3']), '3':(['6'],['7'])}
    cb,_ = looked(m, x)
    with torch.no_grad(): m[6].weight.fill_(2.)
    for k,i in (('0',1),('3',4)): cb._renew(k, torch.tensor([i]))
    assert m[6].weight.view(5,4).tolist()==[[2.]*4]*4+[[1.]*4] and m[1].weight[1]==1
    m.eval()
    was = m(x)
    with torch.no_grad(): m[0].weight[1],m[3].weight[4] = 9.,9.
    torch.testing.assert_close(m(x), was)

def test_layers_whose_units_are_not_clear():
    "Transposed convolutions have their weights the other way round; a layer that is used twice has two outputs"
    assert unit_chains(nn.Sequential(nn.ConvTranspose2d(2,5,3), nn.ReLU(), nn.Conv2d(5,3,3)))=={}
    convs = nn.Conv2d(3,4,3),nn.Conv2d(4,5,3)
    for flat in (nn.Flatten(2), nn.Flatten(0), nn.Flatten(1, 2)):
        assert '1' not in unit_chains(nn.Sequential(*convs, flat, nn.Linear(16,3))), flat
    assert unit_chains(nn.Sequential(*convs, nn.Flatten(), nn.Linear(80,3)))=={'0':([],['1']), '1':([],['3'])}
    class Flat(nn.Module):
        def __init__(self, f): super().__init__(); self.a,self.b,self.f = nn.Conv2d(3,4,3),nn.Linear(16,3),f
        def forward(self, x): return self.b(self.f(self.a(x)))
    for f in (torch.flatten, lambda o: o.flatten(2), lambda o: torch.flatten(o, start_dim=2), lambda o: o.flatten(1, 2)):
        assert unit_chains(Flat(f))=={}
    for f in (lambda o: o.flatten(1), lambda o: torch.flatten(o, 1), lambda o: o.flatten(start_dim=1)):
        assert unit_chains(Flat(f))=={'a':([],['b'])}
    class Twice(nn.Module):
        def __init__(self): super().__init__(); self.a,self.b,self.c = nn.Linear(4,4),nn.Linear(4,4),nn.Linear(4,3)
        def forward(self, x): return self.c(F.relu(self.b(F.relu(self.a(x)))))+self.c(F.relu(self.a(x)))
    assert unit_chains(Twice())=={}
    class Loop(nn.Module):
        def __init__(self): super().__init__(); self.b = nn.Linear(4,3)
        def forward(self, x): return self.b(x) if x.sum()>0 else x
    with pytest.raises(ValueError, match='torch.fx cannot trace Loop'): small(points(), Loop(), ReDo())

def test_use_by_all_layers_that_follow():
    "Of two heads, the second takes the first unit alone: by the first head it would be the one to go"
    class Heads(nn.Module):
        def __init__(self): super().__init__(); self.a,self.b,self.c = nn.Linear(4,2),nn.Linear(2,3),nn.Linear(2,3)
        def forward(self, x): h = F.relu(self.a(x)); return torch.cat([self.b(h), self.c(h)], 1)
    m = Heads()
    with torch.no_grad():
        for p,v in ((m.a.weight, torch.ones(2,4)), (m.a.bias, torch.ones(2)), (m.b.weight, torch.tensor([[.1,.2]]*3)),
                    (m.c.weight, torch.tensor([[.5,0.]]*3))):
            p.copy_(v)
    cb = ContinualBackprop(.5, maturity=0)
    small(points(8), m, cb, lr=0.)
    mean = torch.stack([x for x,_ in points(8)]).sum(1).mean()+1
    assert cb.renewed['a']==1 and cb.utility['a'][1]==0
    torch.testing.assert_close(cb.utility['a'][0], .01*mean*(.3+1.5))   # 1-.99, |output|, weights to both heads

@pytest.mark.parametrize('cb', [ReDo(10., every=1), ContinualBackprop(.5, maturity=0)])
def test_frozen_units_stay(cb):
    m = nn.Sequential(nn.Linear(4,8), nn.ReLU(), nn.Linear(8,8), nn.ReLU(), nn.Linear(8,3))
    m[0].requires_grad_(False)
    was = [o.detach().clone() for o in m[0].parameters()]
    learn = small(points(), m, cb)
    assert all(torch.equal(a, b) for a,b in zip(was, m[0].parameters())) and cb.renewed['0']==0 and cb.renewed['2']>0

@pytest.mark.parametrize('first', ['only','si'])
def test_importance_of_layers_that_were_frozen_for_a_while(first):
    "Learnt with all layers, then the last alone, then all: the first layer's importance is that of the first phase"
    def run(*lengths):
        si,only = SI(.5),Only('3',['b'])
        learn = Learner(dls_of(points()), layers(), loss_func=CrossEntropyLossFlat(), opt_func=SGD, lr=.1)
        phases = [Phase(k, n, sched='constant') for k,n in zip('abc', lengths)]
        with learn.no_bar(), learn.no_logging(): learn.fit_phases(phases, cbs=[only,si] if first=='only' else [si,only])
        return si.omega
    long,short = run(2,3,1),run(2,1,1)
    assert long['0.weight'].max()>0 and not torch.equal(long['3.weight'], short['3.weight'])
    torch.testing.assert_close(long['0.weight'], short['0.weight'])

class Thaw(Callback):
    "Thaws the first layer after an epoch, and moves its weights by 1"
    def before_epoch(self):
        if self.epoch!=1: return
        for p in self.model[0].parameters(): p.requires_grad_(True).data.add_(1)

@pytest.mark.parametrize('make,rate',
                         [(lambda d: L2SP(1.), 1.), (lambda d: L2Init(.5), 1.), (lambda d: EWC(d, 4., n=None), None)])
def test_layers_that_are_thawed_on_the_way_are_held(make, rate):
    "By hand, without a loss: each step of rate r leaves 1 − η·r of the distance, for EWC with r = λ·F"
    model = nn.Sequential(nn.Linear(4,8), nn.Tanh(), nn.Linear(8,3))
    old,d = deepcopy(model),dls_of(points())
    model[0].requires_grad_(False)
    small(d, model, [make(d), Thaw()], loss=lambda p, y: 0*p.sum(), epochs=2, splitter=lambda m: [list(m.parameters())])
    f = fisher(old, d.train, None)
    for n,p in model[0].named_parameters():
        want = (1-.1*(rate or 4*f[f'0.{n}']))**4
        torch.testing.assert_close(p-dict(old[0].named_parameters())[n], torch.ones_like(p)*want)

def test_layers_that_are_thawed_on_the_way_gain_importance():
    model,si = nn.Sequential(nn.Linear(4,8), nn.Tanh(), nn.Linear(8,3)),SI(.5)
    model[0].requires_grad_(False)
    learn = Learner(dls_of(points()), model, loss_func=CrossEntropyLossFlat(), opt_func=SGD, lr=.1,
                    splitter=lambda m: [list(m.parameters())])
    with learn.no_bar(), learn.no_logging(): learn.fit_phases([Phase('a', 2), Phase('b', 1)], cbs=[si, Thaw()])
    assert si.omega['0.weight'].max()>0

def test_a_layer_that_has_never_learnt_has_no_importance():
    si = SI(.5)
    learn = Learner(dls_of(points()), layers(), loss_func=CrossEntropyLossFlat(), opt_func=SGD, lr=.1)
    with learn.no_bar(), learn.no_logging(): learn.fit_phases([Phase('probe', 1), Phase('all', 1)], cbs=[Only('3',['probe']), si])
    assert '0.weight' not in si.omega and si.omega['3.weight'].max()>0

@pytest.mark.parametrize('make', [lambda d: EWC(d, 1.), lambda d: DERpp(d, 8), lambda d: Replay(d, 8)],
                         ids=['ewc','derpp','replay'])
def test_old_labels_that_mean_something_else(make):
    new,old = dls_of(points()),dls_of(points())
    new.vocab,old.train.vocab = ['a','b','c'],['b','a','c']
    with pytest.raises(ValueError, match="has class 'b' as label 0"): small(new, layers(), make(old))

def test_images_that_were_normalised_elsewhere():
    "A share of a pixel's range says nothing there, and cutting off at 0 and 1 would spoil them"
    x = 2*torch.randn(16,3,8,8)
    m = nn.Sequential(nn.Flatten(), nn.Linear(192,3))
    with pytest.raises(ValueError, match='the loader has no `Normalize` that explains it'):
        small([(o,torch.tensor(0)) for o in x], m, Adversarial())
    small([(o,torch.tensor(0)) for o in x.sigmoid()], m, Adversarial())

# Beside other callbacks

class Validates(Callback):
    "Another validation after each epoch, as a logger may start it"
    order = 60
    def after_epoch(self):
        if self.learn.lock.locked(): return
        with no_random(reproducible=False): self.learn.validate()   # a loader draws a number

@pytest.mark.parametrize('make',
                         [lambda d: GroupDRO(1.), lambda d: L2Init(5.), lambda d: EWC(d, 5.), lambda d: SI(.5), lambda d: LwF(),
                          lambda d: DERpp(d, 8), lambda d: ContinualBackprop(.1, 1)],
                         ids=['dro','l2init','ewc','si','lwf','derpp','backprop'])
def test_a_validation_within_a_fit_changes_nothing(make):
    def run(*cbs):
        torch.manual_seed(0)
        both,cb = dls_of(points()),make(dls_of(points(seed=1)))
        if isinstance(cb, GroupDRO): both = grouped(both, np.arange(32)%2)
        learn = Learner(both, nn.Sequential(nn.Linear(4,8), nn.ReLU(), nn.Linear(8,3)), loss_func=CrossEntropyLossFlat(),
                        opt_func=SGD, lr=.1)
        with learn.no_bar(), learn.no_logging(): learn.fit_phases([Phase('a', 2), Phase('b', 3)], cbs=[cb, *cbs])
        return learn
    assert same(run(), run(Validates()))

def test_sam_refuses_a_loss_that_changes_later():
    class Ramped(Callback):
        def after_loss(self):
            if self.training: self.learn.loss_grad = self.loss_grad+self.learn.epoch*self.pred.square().mean()
    with pytest.raises(ValueError, match='SAM: ramped changes the loss'): small(points(), layers(), [SAM(), Ramped()], epochs=2)

@pytest.mark.parametrize('make', [lambda: SAM(), lambda: LwF(), lambda: DERpp(dls_of(points()), 8)], ids=['sam','lwf','derpp'])
def test_answers_that_others_change_are_refused(make):
    class Sharper(Callback):
        def after_pred(self): self.learn.pred = self.pred*10
    class Looks(Callback):
        passive = True
        def after_pred(self): self.seen = self.pred.shape
    with pytest.raises(ValueError, match='sharper may change the model.s answers'): small(points(), layers(), [make(), Sharper()])
    small(points(), layers(), [make(), Looks(), TensorAnswer()])

def test_si_counts_each_step_once():
    "By a second sum beside it, where every other step is cancelled before it gets there; the first one, too"
    class Cancels(Callback):
        order = -20
        def __init__(self, rest): self.rest = rest
        def before_step(self):
            if self.learn.train_iter%2==self.rest: raise CancelStepException
    class Second(Callback):
        order = 100
        def before_fit(self): self.sums,self.last = 0.,None
        def before_step(self): self.last = [(p.detach().clone(),p.grad.clone()) for p in self.model.parameters()]
        def after_step(self):
            if self.last and self.learn.phase.name=='a':
                self.sums -= sum((g*(p.detach()-w)).sum() for p,(w,g) in zip(self.model.parameters(), self.last))
            self.last = None
    for rest in (0,1):
        si,second,seen = SI(.5, xi=1.),Second(),[]
        consolidate = si._consolidate
        si._consolidate = lambda: (seen.append(sum(o.sum() for o in si.sums.values())), consolidate())
        learn = Learner(dls_of(points()), nn.Sequential(nn.Linear(4,8), nn.ReLU(), nn.Linear(8,3)),
                        loss_func=CrossEntropyLossFlat(), opt_func=SGD, lr=.1)
        with learn.no_bar(), learn.no_logging(): learn.fit_phases([Phase('a', 2), Phase('b', 1)], cbs=[si, Cancels(rest), second])
        assert seen[0]>0
        torch.testing.assert_close(seen[0], second.sums)

def test_si_refuses_again():
    "A fit that it refused is no fit that it learnt in"
    learn = Learner(dls_of(points()), layers(), loss_func=CrossEntropyLossFlat(), opt_func=SGD, lr=.1)
    si = SI()
    for _ in range(2):
        with pytest.raises(ValueError, match='nothing was learnt before'), learn.no_bar(), learn.no_logging():
            learn.fit(1, cbs=si)

# Arguments, labels, losses

@pytest.mark.parametrize('make', [
    lambda d: L2SP(-1.), lambda d: L2SP(1., beta=float('nan')), lambda d: L2Init(-1.), lambda d: EWC(d, -10.),
    lambda d: EWC(d, decay=-3.), lambda d: EWC(d, n=0), lambda d: SI(-5.), lambda d: SI(xi=0.),
    lambda d: SpectralDecoupling(float('inf')), lambda d: LwF(-3.), lambda d: LwF(T=0), lambda d: Replay(d, 2.5),
    lambda d: Replay(d, -1), lambda d: DERpp(d, 8, alpha=-1., beta=0.), lambda d: SAM(float('nan')),
    lambda d: Adversarial(.1, alpha=-1.), lambda d: Adversarial(.1, steps=0), lambda d: ShrinkPerturb(float('nan')),
    lambda d: ReDo(-1.), lambda d: ReDo(every=1.5), lambda d: ContinualBackprop(3.),
    lambda d: ContinualBackprop(.1, decay=1.), lambda d: ContinualBackprop(.1, maturity=-1), lambda d: GroupDRO(-1.),
    lambda d: GroupDRO('1')])
def test_constants_out_of_range(make):
    with pytest.raises(ValueError, match='=.*: must be '): make(dls_of(points()))

def test_a_large_step_of_group_weights_stays_finite():
    "All weight on the group that does worst, which another one can take over"
    cb = GroupDRO(1e4)
    learn = small(grouped(dls_of(points()), np.arange(32)%2), layers(), cb, epochs=3)
    assert all(v.isfinite().all() for v in weights(learn)) and cb.q.sum()==1 and cb.log_q.isfinite().all()

def test_groups_without_samples_have_no_weight():
    "Numbers left out, as those of images without a picture where all have one, do not make the loss smaller"
    g,cb = np.arange(32)%2,GroupDRO(.5)
    a,b = small(grouped(dls_of(points()), g), layers(), GroupDRO(.5)),small(grouped(dls_of(points()), 1+5*g), layers(), cb)
    torch.testing.assert_close(weights(a), weights(b))
    assert np.flatnonzero(cb.q).tolist()==[1,6] and abs(cb.q.sum()-1)<1e-6

@pytest.mark.parametrize('first', [True, False])
def test_groups_of_a_part_of_the_data(first):
    "Of a class that was split off, no group has a weight"
    easy = data().inject(ColorSquare(4), ratio=.5)
    part = split_forget(grouped(easy), '3')[1] if first else grouped(split_forget(easy, '3')[1])
    cb,learn = GroupDRO(.5),Learner(part, net(), loss_func=CrossEntropyLossFlat(), lr=.01)
    with learn.no_bar(), learn.no_logging(): learn.fit(1, cbs=cb)
    assert np.flatnonzero(cb.q).tolist()==[i for i in range(20) if i//2!=3]

def test_the_model_sees_valid_pixels_only():
    "Also on the way to an adversarial image, as in the code of Wong et al."
    seen = []
    class Net(nn.Module):
        def __init__(self): super().__init__(); self.f = nn.Sequential(nn.Flatten(), nn.Linear(48,3))
        def forward(self, x): seen.append((x.min().item(), x.max().item())); return self.f(x)
    items = [((torch.rand(3,4,4)>.5).float(),torch.tensor(i%3)) for i in range(16)]
    small(items, Net(), Adversarial(.1, steps=3))
    assert min(a for a,_ in seen)>=0 and max(b for _,b in seen)<=1 and len(seen)==2*4+2

@pytest.mark.parametrize('shift,label', [(5,7), (-1,-1)])
@pytest.mark.parametrize('make', [lambda d: EWC(d), lambda d: DERpp(d, 32), lambda d: Replay(d, 32)],
                         ids=['ewc','derpp','replay'])
def test_old_labels_without_an_output(make, shift, label):
    old = dls_of([(x,y+shift) for x,y in points()])
    with pytest.raises(ValueError, match=f'old: has label {label}, and the model 3 outputs, for labels 0…2'):
        small(points(), layers(), make(old))

def test_groups_on_a_plain_loader():
    "One that does not say how many parts are inputs: labels are none"
    class Optional(nn.Module):
        def __init__(self): super().__init__(); self.f = layers()
        def forward(self, x, more=None): assert more is None; return self.f(x)
    mk = lambda: DataLoaders(*[DataLoader(points(), bs=8, num_workers=0) for _ in range(2)])
    cb = GroupDRO(.5)
    a,b = small(grouped(mk(), np.arange(32)%2), Optional(), cb),small(grouped(dls_of(points()), np.arange(32)%2), Optional(),
                                                                      GroupDRO(.5))
    assert same(a, b) and cb.q[0]!=cb.q[1]

def test_a_loss_that_only_gives_means():
    "Each group's loss is the loss of its samples: more is not asked of it"
    def mine(pred, y): return F.cross_entropy(pred, y)
    both = lambda: grouped(dls_of(points()), np.arange(32)%2)
    one,*others = (small(both(), layers(), GroupDRO(), loss=o) for o in (mine, F.cross_entropy, nn.CrossEntropyLoss()))
    assert same(one, others[0]) and same(one, others[1])

@pytest.mark.parametrize('loss', [CrossEntropyLossFlat(), CrossEntropyLossFlat(weight=torch.tensor([1.,2.,5.])),
                                  CrossEntropyLossFlat(ignore_index=1)], ids=['plain','weights','ignores'])
def test_one_group_is_no_group(loss):
    "The weighted sum of one group's loss is the loss, whatever the loss divides by"
    a = small(dls_of(points()), layers(), loss=loss)
    b = small(grouped(dls_of(points()), np.zeros(32, int)), layers(), GroupDRO(.5), loss=loss)
    for v,w in zip(weights(a), weights(b)): torch.testing.assert_close(v, w)

def test_a_group_whose_labels_are_all_ignored():
    x,y = torch.randn(8,4),torch.arange(8)%2
    learn = small(grouped(dls_of(list(zip(x, y))), y.numpy()), layers(), GroupDRO(.5), loss=CrossEntropyLossFlat(ignore_index=1))
    assert all(v.isfinite().all() for v in weights(learn))

# Models that change their input

class InPlace(nn.Module):
    "The same function, with the input changed in place or not"
    def __init__(self, at_home):
        super().__init__()
        torch.manual_seed(1)
        self.at_home,self.f = at_home,nn.Sequential(nn.Linear(4,8), nn.Tanh(), nn.Linear(8,3))
    def forward(self, x): return self.f(x.sub_(.5).mul_(2) if self.at_home else (x-.5)*2)

@pytest.mark.parametrize('make', [lambda d: [SAM(.2)], lambda d: [LwF(1.)], lambda d: [SAM(.2), LwF(1.)],
                                  lambda d: [DERpp(d, 8), SAM(.2)], lambda d: [EWC(d, 5.)], lambda d: [Adversarial(.1, steps=2)]],
                         ids=['sam','lwf','both','derpp','ewc','adversarial'])
def test_models_that_change_their_input(make):
    def trained(at_home):
        learn = Learner(dls_of(points()), InPlace(at_home), loss_func=CrossEntropyLossFlat(), opt_func=SGD, lr=.5)
        set_seed(0)
        with learn.no_bar(), learn.no_logging():
            learn.fit_phases([Phase('a', 1), Phase('b', 2)], cbs=make(dls_of(points())))
        assert not learn.model._forward_pre_hooks
        return learn
    assert same(trained(False), trained(True))

def test_si_measures_by_the_task_alone():
    "Three phases against a plain loop: importances come from the gradient of the loss without the term itself"
    x,y,c,xi,lr = torch.linspace(-1, 1, 12),torch.linspace(2, -1, 12),2.,.1,.2
    class Line(nn.Module):
        def __init__(self): super().__init__(); self.w = nn.Parameter(torch.tensor([1.,0.]))
        def forward(self, x): return self.w[0]*x+self.w[1]
    mse = lambda p,y: (p-y).square().mean()
    def fit(cbs):
        dl = TfmdDL([(a,b) for a,b in zip(x, y)], bs=12, num_workers=0)
        learn = Learner(DataLoaders(dl, dl), Line(), loss_func=mse, opt_func=SGD, lr=lr)
        with learn.no_bar(), learn.no_logging(): learn.fit_phases([Phase(k, 3, sched='constant') for k in 'abc'], cbs=cbs)
        return learn.model.w.detach()
    w,omega = torch.tensor([1.,0.]),torch.zeros(2)
    for phase in range(3):
        start,path = w.clone(),torch.zeros(2)
        for _ in range(3):
            r = w[0]*x+w[1]-y
            g = torch.stack([(2*r*x).mean(), (2*r).mean()])
            step = -lr*(g+2*c*omega*(w-start))
            path,w = path-g*step,w+step
        omega = omega+(path/((w-start).square()+xi)).clamp(min=0)
    torch.testing.assert_close(fit([SI(c, xi)]), w)
    assert (fit([])-w).abs().max()>.01

def test_importances_of_weights_in_half_precision():
    "A sum in bfloat16 stops growing at 256 times what is added"
    torch.manual_seed(0)
    half = nn.Linear(4,3).bfloat16()
    whole,dl = deepcopy(half).float(),dls_of(points(600)).train
    for a,b in zip(fisher(half, dl, None).values(), fisher(whole, dl, None).values()):
        torch.testing.assert_close(a, b, rtol=.02, atol=0.)

def test_importances_and_what_is_off_draw_no_random_numbers():
    states = lambda: (random.getstate(), np.random.get_state()[1].tolist(), torch.get_rng_state().tolist())
    model,dls = layers(),dls_of(points())
    was = states()
    fisher(model, dls.train, 10)
    EWC(dls, 0), Replay(dls, 0), DERpp(dls, 0), DERpp(dls, alpha=0, beta=0)   # already when they are made
    assert states()==was

def test_ensembles_of_maps_and_what_is_none():
    torch.manual_seed(0)
    a,b,x = nn.Conv2d(3,4,1),nn.Conv2d(3,4,1),torch.rand(2,3,5,7)
    torch.testing.assert_close(Ensemble([a,b])(x).exp(), (a(x).softmax(1)+b(x).softmax(1))/2)
    learn = Learner(dls_of(points()), layers().eval(), loss_func=F.cross_entropy)
    v = torch.rand(3,4)
    torch.testing.assert_close(Ensemble([learn])(v).exp(), learn.model(v).softmax(1))
    for models,said in (([nn.Linear(4,1)]*2, 'a score for each of two classes'), ([layers(),layers(4)], 'same classes'),
                        ([layers(),'net'], "'model1' is a str"),
                        ([nn.Sequential(nn.Linear(4,6), nn.Unflatten(1, (2,3)))], r'with shape \(3, 2, 3\), and which axis')):
        with pytest.raises(ValueError, match=said): Ensemble([o.eval() if isinstance(o, nn.Module) else o for o in models])(v)

# Units that are not a layer's own, hooks

def test_units_without_weights_of_their_own():
    "A linear layer over places, tied, parametrised and normalised weights, and those that are read by name"
    lin = lambda: nn.Linear(6,6)
    rest = lin(),nn.ReLU(),lin(),nn.ReLU(),nn.Linear(6,3)
    tied = nn.Sequential(*rest)
    assert unit_chains(tied)=={'0':([],['2']), '2':([],['4'])}
    tied[2].weight = tied[0].weight
    assert unit_chains(tied)=={}
    for norm in (nn.utils.parametrizations.weight_norm, nn.utils.weight_norm):
        assert unit_chains(nn.Sequential(norm(lin()), nn.ReLU(), lin(), nn.ReLU(), nn.Linear(6,3)))=={'2':([],['4'])}
    class Places(nn.Module):
        def __init__(self): super().__init__(); self.c,self.l,self.o = nn.Conv1d(1,3,1),nn.Linear(6,5),nn.Linear(15,3)
        def forward(self, x): return self.o(F.relu(self.l(F.relu(self.c(x[:,None])))).flatten(1))
    assert unit_chains(Places())=={'l':([],['o'])}
    assert unit_chains(nn.Sequential(nn.Linear(6,5), nn.ReLU(), nn.Conv1d(5,2,1)))=={}
    class Read(nn.Module):
        def __init__(self): super().__init__(); self.a,self.b = lin(),lin()
        def forward(self, x): return self.b(F.relu(self.a(x)))@self.a.weight
    assert unit_chains(Read())=={}

@pytest.mark.parametrize('make', [lambda: ReDo(10., every=1), lambda: ContinualBackprop(.5, maturity=0)], ids=['redo','backprop'])
def test_skipped_batches_leave_no_hooks(make):
    "And a layer that holds what it put out, as a hook's, is not copied whole"
    class Skip(Callback):
        order = 10
        def before_batch(self):
            if self.training and self.learn.iter%2: raise CancelBatchException
    class Count(Callback):
        order,seen = 90,0
        def before_batch(self): self.seen = max(self.seen, sum(len(m._forward_pre_hooks) for m in self.model.modules()))
    m,count,cb = nn.Sequential(nn.Linear(4,8), nn.ReLU(), nn.Linear(8,8), nn.ReLU(), nn.Linear(8,3)),Count(),make()
    small(points(), m, [cb, Skip(), count], epochs=2)
    assert count.seen<=2 and not any(o._forward_pre_hooks for o in m.modules()) and cb.renewed['0']>0
    handle = m[0].register_forward_hook(lambda mod, i, o: setattr(mod, 'held', o))   # a tensor with a graph cannot be copied
    small(points(), m, make())
    handle.remove()

@pytest.mark.parametrize('name', ['redo','backprop','only','l2sp_head','shrink','si'])
def test_compiled_networks_are_treated_alike(name, monkeypatch):
    "Compiled code would not call hooks, and in a compiled wrapper all names begin with another one"
    def inside(m): m.compile(backend='eager'); return m
    plain,res = net,[]
    for f in (lambda m: m, inside, partial(torch.compile, backend='eager')):
        torch._dynamo.reset()
        monkeypatch.setitem(globals(), 'net', lambda: f(plain()))
        res.append(fit([every[name]()]))
    assert same(res[0], res[1]) and same(res[0], res[2])

class Scaled(nn.Module):
    def __init__(self): super().__init__(); self.lin,self.scale = nn.Linear(4,4),nn.Parameter(torch.full((4,), 7.))
    def reset_parameters(self): self.lin.reset_parameters()

@pytest.mark.parametrize('make,what', [(Scaled, 'scale'), (lambda: nn.utils.weight_norm(nn.Linear(4,4)), 'weight_g, weight_v'),
                                       (lambda: nn.utils.spectral_norm(nn.Linear(4,4)), 'weight_orig')])
@pytest.mark.filterwarnings('ignore:.*weight_norm:FutureWarning')
def test_weights_that_nothing_sets_anew(make, what):
    "They would stay as they were trained"
    with torch.no_grad(), pytest.raises(ValueError, match=f'weights of its own, {what}, and no'):
        fresh(nn.Sequential(make()).eval())

class Gaps:
    def __len__(self): return 30
    def __getitem__(self, i):
        if i%5==4: raise SkipItemException
        return torch.rand(3,16,16),i%3

def test_old_samples_that_are_skipped():
    "Which of them remain is not known, so neither are their scores, nor which are wrong"
    gaps = DataLoaders(*[DataLoader(Gaps(), bs=6, num_workers=0) for _ in range(2)])
    learn = Learner(gaps, net(), loss_func=CrossEntropyLossFlat(), lr=.01)
    with learn.no_bar(), learn.no_logging(), pytest.raises(ValueError, match='30 samples, of which 24'):
        learn.fit(1, cbs=DERpp(gaps, 30))
    with pytest.raises(ValueError, match='30 samples, of which 24'): just_train_twice(learn, gaps)

def test_weighted_samples_are_not_weighted_anew():
    weighted = DataLoaders(WeightedDL(dls.train_ds, bs=32, wgts=np.arange(128)+1., num_workers=0), dls.valid)
    with pytest.raises(ValueError, match='WeightedDL draws samples by weights of its own'):
        just_train_twice(Learner(weighted, net()), weighted)

def test_tables_are_trained_on_twice():
    "fastai's loaders of tables have weights that are all the same"
    from fastai.tabular.all import CategoryBlock, TabularDataLoaders
    df = pd.DataFrame({'a':np.linspace(-1, 1, 60)}).assign(y=lambda d: np.where(d.a>0, 'p', 'n'))
    tables = TabularDataLoaders.from_df(df, procs=[], cont_names=['a'], y_names='y', y_block=CategoryBlock(),
                                        valid_idx=range(50,60), bs=10)
    class Always(nn.Module):
        "Class 0, 'n', for all: right for the 30 rows up to 0"
        def forward(self, cats, x): return torch.stack([x[:,0]*0+1,x[:,0]*0], 1)
    twice = just_train_twice(Learner(tables, Always(), loss_func=CrossEntropyLossFlat()), tables, 3)
    assert Counter(int(y) for *_,ys in twice.train for y in ys)=={0:30, 1:60} and len(twice.train_ds)==50
