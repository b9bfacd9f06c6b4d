"""The paper's figures on one GPU: several networks at once, forward and backward passes as CUDA graphs

`python on_gpu.py OUT` makes the preset `cpu` in OUT, `python on_gpu.py OUT smoke fig3 fig6` another preset and some figures.
Each network and table is kept as soon as it is there: the same call goes on where the last one ended.
With NVIDIA's Multi-Process Service (`nvidia-cuda-mps-control -d`) processes share the GPU; without it they take turns."""
import os, sys, torch
from concurrent.futures import FIRST_COMPLETED, ProcessPoolExecutor, wait
from dataclasses import asdict
from multiprocessing import get_context
from pathlib import Path
from time import monotonic
from fastai.vision.all import Callback
import feature_erosion.paper.nets as nets
from feature_erosion.paper.figures import *   # registers the recipes
from feature_erosion.paper.recipes import _chain, _points, paper, recipes
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

def train(store, net, seed): nets.trained(RunStore(store), net, seed)

def measure(store, net, seed, figure, preset):
    recipe = recipes[figure]
    point,files,_ = _points(recipe, recipe.scales[preset])
    RunStore(store).once(point, files, tables=recipe.measure.__name__, net=asdict(net), seed=seed)

def tasks(figures, preset):
    "In order of the figures; each task with the one that it waits for"
    res = {}
    for f in figures:
        for seed in range((scale := recipes[f].scales[preset]).seeds):
            for net in recipes[f].nets(scale):
                before = None
                for o in _chain(net):
                    res.setdefault(('train', o, seed), before)
                    before = 'train',o,seed
                res['measure', net, seed, f, preset] = before
    return res

def run(store, todo, jobs):
    "Train and measure what is not in the store yet; what waits for a task that failed is left out"
    done,busy,start = {None},{},monotonic()
    with ProcessPoolExecutor(jobs, get_context('spawn'), initializer=begin) as pool:
        while (ready := [t for t,before in todo.items() if before in done][:jobs-len(busy)]) or busy:
            for t in ready:
                todo.pop(t)
                busy[pool.submit(globals()[t[0]], store, *t[1:])] = t
            for f in wait(busy, return_when=FIRST_COMPLETED).done:
                t = kind,net,seed,*_ = busy.pop(f)
                if not (e := f.exception()): done.add(t)
                what = f'{kind} {net.name}, ratio {net.ratio:g}, {net.opt}, {net.lengths}, seed {seed}'
                print(f'{monotonic()-start:.0f} s: {what}', *([f'failed: {e!r}'] if e else []), flush=True)

if __name__=='__main__':
    if len(sys.argv)<2: sys.exit(__doc__)
    out,preset,*figures = sys.argv[1:] if len(sys.argv)>2 else [*sys.argv[1:],'cpu']
    figures = figures or list(recipes)
    run(Path(out)/'runs', tasks(figures, preset), os.cpu_count())
    paper(preset, figures, out, n_jobs=1, progress=False)   # gathers what is in the store; what failed is tried once more
