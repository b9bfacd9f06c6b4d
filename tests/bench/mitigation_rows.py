"A training step with each method of the recipe `resist`, against plain finetuning: VGG-19 of a quarter of the width, batches of 64."
from dataclasses import replace
from statistics import mean
from time import perf_counter
import common   # without warnings
from fastai.vision.all import Callback, no_random
from feature_erosion.evalsets import EvalSets
from feature_erosion.paper.nets import Net, net_dls, net_learner, net_pattern, net_phases
from feature_erosion.paper.questions import _methods

few = Net('Perceptron', 'perceptron', 'digits', n=128, n_valid=60, bs=32)
net = Net('VGG-19', 'vgg19', width=.25, n=2000, n_valid=64, bf16=True) if common.real else few

class Starts(Callback):
    "When each step with squares begins, its loading and all callbacks counted"
    order,run_valid = -100,False
    def __init__(self): self.at = []
    def before_batch(self):
        if self.learn.phase.name=='erode': self.at.append(perf_counter())

def seconds(method, net, steps, skip=3):
    "Of a step, the mean over `steps` after the first few"
    net = replace(net, ratio=.9, unit='iters', lengths=(0, 2*(skip+steps+1), 0))   # LP-FT halves its phase
    with no_random(0, reproducible=False):
        dls = net_dls(net, 0)
        learn,easy,starts = net_learner(net, dls),dls.inject(net_pattern(net), ratio=net.ratio, seed=0),Starts()
        with learn.no_bar(), learn.no_logging():
            cbs,phases = _methods(net)[method](learn, dls, net_phases(net, dls, easy))
            learn.fit_phases(phases, cbs=[EvalSets({'clean':easy.valid}, at=[10**6]), starts, *cbs], snapshots=[])
    at = starts.at[skip:skip+steps+1]
    return mean(b-a for a,b in zip(at, at[1:]))

def rows(repeats=3, net=net, steps=10):
    names = list(_methods(replace(net, ratio=.9)))
    took = {m:[] for m in names}
    for i in range(max(repeats, 7)):
        for m in names[::1 if i%2==0 else -1]: took[m].append(seconds(m, net, steps))
    plain = took.pop('plain finetuning')
    for m,s in took.items(): yield dict(name=f'a training step with {m}', peer='plain finetuning', ours_s=s, peer_s=plain)
