"""The paper's figures on one GPU: several networks at once, forward and backward passes as CUDA graphs

`python on_gpu.py OUT` makes the preset `cpu` in OUT, `python on_gpu.py OUT smoke fig3 fig6` another preset and some figures.
Run again, it goes on. With NVIDIA's Multi-Process Service (`nvidia-cuda-mps-control -d`) processes share the GPU;
without it they take turns."""
import os, sys, torch
from concurrent.futures import FIRST_COMPLETED, ProcessPoolExecutor, wait
from dataclasses import asdict
from multiprocessing import get_context
from pathlib import Path
from time import monotonic
import pandas as pd
from fastai.vision.all import Callback
import feature_erosion.paper.nets as nets
from feature_erosion.paper.figures import *   # registers the recipes
from feature_erosion.paper.recipes import Result, _chain, recipes
from feature_erosion.runs.store import RunStore

class Graphed(Callback):
    "The model's forward and backward pass in training as CUDA graphs, for batches of full size"
    order,passive,run_valid,graph = 15,True,False,None   # after mixed precision; passive: the losses are the same
    def before_batch(self):
        if self.graph is None and len(self.learn.xb[0])==self.dls.train.bs: self.capture()

    def capture(self):
        model,x = self.learn.model,self.learn.xb[0].as_subclass(torch.Tensor).clone()
        eager,state = model.forward,{k:v.clone() for k,v in model.state_dict().items()}
        amp = torch.is_autocast_enabled('cuda')
        with torch.autocast('cuda', torch.bfloat16, enabled=amp, cache_enabled=False):
            torch.cuda.make_graphed_callables(model, (x,))
        self.graph = model.forward
        model.load_state_dict(state)   # capturing has moved the averages of batch norm
        def forward(xb):
            whole = model.training and torch.is_grad_enabled() and xb.shape==x.shape
            return self.graph(xb.as_subclass(torch.Tensor)) if whole else eager(xb)
        model.forward = forward

    def after_fit(self):
        if self.graph is not None: del self.learn.model.forward
        self.graph = None
    def after_cancel_fit(self): self.after_fit()

def begin():
    "In each process: graphs if there is a GPU, and larger batches for validation"
    torch.set_num_threads(1)
    learner,data = nets.net_learner,nets.net_dls
    def net_learner(net, dls): return learner(net, dls).add_cb(Graphed()) if torch.cuda.is_available() else learner(net, dls)
    def net_dls(net, seed=0):
        dls = data(net, seed)
        dls.valid.bs = 1000
        return dls
    nets.net_learner,nets.net_dls = net_learner,net_dls

def train(out, net, seed): nets.trained(RunStore(out), net, seed)

def measure(out, net, seed, figure, scale):
    learn = nets.load_net(nets.trained(RunStore(out), net, seed))
    with learn.no_bar(): return recipes[figure].measure(learn, net, seed, scale)

def tasks(scales):
    "In order of the figures; each task with the one that it waits for"
    res = {}
    for figure,scale in scales.items():
        for seed in range(scale.seeds):
            for net in recipes[figure].nets(scale):
                before = None
                for o in _chain(net):
                    res.setdefault(('train', o, seed), before)
                    before = 'train',o,seed
                res['measure', net, seed, figure, scale] = before
    return res

def run(out, scales, jobs=16):
    "Train and measure everything; tables by task"
    todo,done,busy,start = tasks(scales),{None:None},{},monotonic()
    with ProcessPoolExecutor(jobs, get_context('spawn'), initializer=begin) as pool:
        while todo or busy:
            ready = [t for t,before in todo.items() if before in done][:jobs-len(busy)]
            for t in ready:
                todo.pop(t)
                busy[pool.submit(globals()[t[0]], out, *t[1:])] = t
            for f in wait(busy, return_when=FIRST_COMPLETED).done:
                t = busy.pop(f)
                done[t] = f.result()
                kind,net,seed,*_ = t
                what = f'{kind} {net.name}, ratio {net.ratio:g}, {net.opt}, {net.lengths}, seed {seed}'
                print(f'{monotonic()-start:.0f} s: {what}', flush=True)
    return {t:o for t,o in done.items() if o is not None}

def gathered(ran, figure, scale):
    "The tables of a figure, in the order of networks and seeds"
    res = {}
    for net in recipes[figure].nets(scale):
        for seed in range(scale.seeds):
            for k,t in ran['measure', net, seed, figure, scale].items():
                which = pd.DataFrame(dict(net=net.name, ratio=net.ratio, seed=seed), index=t.index)
                res.setdefault(k, []).append(pd.concat([which, t], axis=1))
    return {k:pd.concat(v, ignore_index=True) for k,v in res.items()}

def make(figures, preset, out, jobs):
    "A run by figure in `out`, and one for each phase of each network in `out/nets`"
    scales = {f:recipes[f].scales[preset] for f in figures}
    ran = run(Path(out)/'nets', scales, jobs)
    for f,scale in scales.items():
        kept = RunStore(out).run(f, figure=f, title=recipes[f].title, preset=preset, **asdict(scale))
        kept.begin()
        Result(recipes[f], gathered(ran, f, scale)).save(kept)
        kept.update(status='finished')

if __name__=='__main__':
    if len(sys.argv)<2: sys.exit(__doc__)
    out,preset,*figures = sys.argv[1:] if len(sys.argv)>2 else [*sys.argv[1:],'cpu']
    make(figures or list(recipes), preset, out, os.cpu_count())
