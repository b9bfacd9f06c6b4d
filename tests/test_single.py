"Networks with one score, or none: their answers are no choice between classes, and no number is made of them."
import pytest, torch
from torch import nn
from fastai.vision.all import Learner
from feature_erosion.data import digits_dls
from feature_erosion.evalsets import EvalSets, evaluate, train_accuracy
from feature_erosion.paper.nets import perceptron
from feature_erosion.recover import recover
from feature_erosion.shortcut import find_shortcut
from feature_erosion.unlearning import sample_losses
from feature_erosion.watch import WatchErosion

class Flat(nn.Module):
    def __init__(self): super().__init__(); self.lin = nn.Linear(768,1)
    def forward(self, x): return self.lin(x.flatten(1))[:,0]

one = lambda: nn.Sequential(nn.Flatten(), nn.Linear(768,1))
two = dict(n=80, n_valid=40, bs=16)

@pytest.mark.works(kind='models', what='a model that answers with a single score, or with none for each class',
                   how='refused where classes are compared; `evaluate` and `EvalSets` take metrics that fit, and `WatchErosion()` '
                       'warns and compares layers')
@pytest.mark.parametrize('net', [one,Flat])
@pytest.mark.parametrize('use', ['evaluate','evalsets','recover','find_shortcut','losses','train_accuracy'])
def test_one_score_is_refused(net, use):
    dls,model = digits_dls(**two),net()
    learn = Learner(dls, model, loss_func=lambda p,y: p.float().sum(), lr=.1)
    def fit(cb):
        with learn.no_bar(), learn.no_logging(): learn.fit(1, cbs=cb)
    calls = dict(evaluate=lambda: evaluate(model, dls.valid), evalsets=lambda: fit(EvalSets({'valid':dls.valid})),
                 recover=lambda: recover({'a':model}, dls.train, dls.valid, few=(1,), progress=False),
                 find_shortcut=lambda: find_shortcut(model, dls), losses=lambda: sample_losses(model, dls.valid),
                 train_accuracy=lambda: train_accuracy()(learn))
    with pytest.raises(ValueError, match='answers with shape'): calls[use]()

def test_scores_with_axes_of_length_one_are_refused():
    "A convolution instead of a linear layer, without `nn.Flatten`: labels would be broadcast against its answers"
    dls,model = digits_dls(**two),nn.Conv2d(3, 10, 16)
    learn = Learner(dls, model, loss_func=lambda p,y: p.mean())
    for use in (lambda: find_shortcut(model, dls), lambda: sample_losses(model, dls.valid), lambda: train_accuracy()(learn)):
        with pytest.raises(ValueError, match=r'shape \(\d+, 10, 1, 1\).*`nn.Flatten\(\)`'): use()

@pytest.mark.parametrize('net', [one,Flat])
def test_layers_behind_one_score_are_watched(net):
    watch = WatchErosion()
    learn = Learner(digits_dls(**two), net(), loss_func=lambda p,y: p.float().mean(), lr=.1)
    with learn.no_bar(), learn.no_logging(), pytest.warns(UserWarning, match='only layers .* are watched'): learn.fit(1, cbs=watch)
    cka = watch.history['cka']   # without bias, so it can be below 0
    assert watch.columns==['cka','rank'] and cka.iloc[0]==pytest.approx(1) and cka.iloc[1:].lt(.999).any()

def test_a_metric_that_fits_is_computed():
    "By hand: the share of signs that agree with the labels"
    dls,model = digits_dls(**two),one()
    def right(p, y): return ((p[:,0]>0)==(y>4)).float().mean()
    x,y = next(iter(dls.valid.new(bs=40, shuffle=False)))
    want = ((model(x)[:,0]>0)==(y>4)).float().mean().item()
    assert evaluate(model, dls.valid, metrics=right)['right']==pytest.approx(want)

def test_an_exported_learner_has_no_samples():
    dls = digits_dls(**two)
    with pytest.raises(ValueError, match='no samples'):
        recover({'a':perceptron()}, dls.new_empty().train, dls.valid, few=(1,), progress=False)
