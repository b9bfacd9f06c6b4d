"What training costs besides arithmetic: no waiting for the device, the same numbers as before, and the benchmark's own parts."
import subprocess, sys
from pathlib import Path
import pytest, torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode
from fastai.vision.all import Callback, OptimWrapper, SaveModelCallback, set_seed
from feature_erosion.data import digits_dls
from feature_erosion.evalsets import EvalSets, pattern_sets
from feature_erosion.callbacks import FewSyncs, StopOnNaN
from feature_erosion.learner import erosion_learner
from feature_erosion.patterns import ColorSquare
from feature_erosion.phases import Phase
from feature_erosion.measures.layers import watching

bench = Path(__file__).parent/'bench'

def net(): return nn.Sequential(nn.Flatten(), nn.Linear(768,32), nn.ReLU(), nn.Linear(32,10))

@pytest.fixture
def dls():
    set_seed(0)
    return digits_dls(n=640, bs=32)

class Fetches(TorchDispatchMode):
    "Counts the numbers that Python asks tensors for: on a GPU each one would wait for it, unless the tensor is the one that was fetched for the progress bar"
    def __init__(self, learn):
        super().__init__()
        self.learn,self.n = learn,0
    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if func is torch.ops.aten._local_scalar_dense.default and args[0].data_ptr()!=self.fetched(): self.n += 1
        return func(*args, **(kwargs or {}))

    def fetched(self): return next((o.shown.data_ptr() for o in self.learn.cbs if hasattr(o, 'shown')), None)

class CountFetches(Callback):
    "Fetches in each step, from the start of the loader's work on a batch to the end of the callbacks"
    order,run_valid = 1000,False
    def before_train(self): self.mode,self.steps,self.last = Fetches(self.learn),[],0; self.mode.__enter__()
    def after_batch(self): self.steps.append(self.mode.n-self.last); self.last = self.mode.n
    def after_train(self): self.mode.__exit__(None, None, None)

def fetches(dls, *cbs):
    count,learn = CountFetches(),erosion_learner(dls, net())
    assert hasattr(learn, 'progress')
    learn.fit(1, cbs=[count, *cbs])
    return count.steps

def test_no_fetch_per_step(dls):
    "With the progress bar on and squares painted, steps between two looks ask for nothing; fastai's own loop asks in each"
    easy = dls.inject(ColorSquare(4))
    easy.train.one_batch()
    steps = fetches(easy, FewSyncs(8), StopOnNaN(8))
    assert len(steps)==20 and [i for i,o in enumerate(steps) if o]==[7,15], steps   # is the loss finite?
    assert min(fetches(easy))>0

@pytest.mark.skipif(not torch.cuda.is_available(), reason='needs a GPU')
def test_no_sync_per_step_on_a_gpu():
    "PyTorch itself raises at any synchronisation between the first batch and the end of the epoch"
    class Strict(Callback):
        order,run_valid = 1000,False
        def after_batch(self):
            if self.train_iter==1: torch.cuda.set_sync_debug_mode('error')
        def after_cancel_train(self): torch.cuda.set_sync_debug_mode('default')
    class Relax(Callback):
        order,run_valid = -1000,False
        def after_train(self): torch.cuda.set_sync_debug_mode('default')
    learn = erosion_learner(digits_dls(n=640, bs=32).to('cuda').inject(ColorSquare(4)), net())
    sets = EvalSets(pattern_sets(learn.dls), at=[])   # which do ask, so not in between
    try: learn.fit_phases(Phase('erode', 1), cbs=[Strict(), Relax(), sets])
    finally: torch.cuda.set_sync_debug_mode('default')
    assert len(learn.recorder.losses)==20 and all(o.device.type=='cpu' for o in learn.recorder.losses)

def test_losses_are_complete_whatever_ends_the_fit():
    "Interrupted in the middle of an epoch, the Recorder has all losses, and its own smooth loss again"
    class Stop(Callback):
        def after_batch(self):
            if self.training and self.train_iter==13: raise KeyboardInterrupt
    def run(*cbs):
        set_seed(0)
        learn = erosion_learner(digits_dls(n=640, bs=32), net())
        with learn.no_bar(), learn.no_logging(), pytest.raises(KeyboardInterrupt): learn.fit(1, cbs=[*cbs, Stop()])
        return learn.recorder
    a,b = run(FewSyncs(50)),run()
    assert len(a.losses)==len(b.losses) and torch.equal(torch.stack(a.losses), torch.stack(b.losses))
    assert type(a.smooth_loss) is type(b.smooth_loss) and a.smooth_loss.count==b.smooth_loss.count
    assert a.smooth_loss.value==b.smooth_loss.value

def test_optimiser_is_fastai_like(dls, tmp_path):
    "Momentum and weight decay under fastai's names, saving and loading with momentum, SaveModel with the optimiser, lr_find"
    learn = erosion_learner(dls, net(), lr=.05, mom=.8, wd=1e-3, path=tmp_path)
    with learn.no_bar(), learn.no_logging():
        learn.fit_phases([Phase('a', 1, sched='one_cycle'), Phase('b', 1, wd=.01, sched='constant')],
                         cbs=SaveModelCallback(monitor='valid_loss', with_opt=True))
        assert set(torch.load(tmp_path/'models'/'model.pth', weights_only=True))=={'model','opt'}
        assert isinstance(learn.opt, OptimWrapper) and type(learn.opt.opt) is torch.optim.SGD
        h = learn.opt.hypers[0]
        assert (h['lr'],h['mom'],h['wd'])==(.05,.8,.01)
        learn.save('it', with_opt=True)
        before = [o['momentum_buffer'].clone() for o in learn.opt.opt.state.values()]
        learn.fit(1)
        learn.load('it', with_opt=True)
        assert len(before)==4 and all(torch.equal(a, o['momentum_buffer']) for a,o in zip(before, learn.opt.opt.state.values()))
        assert learn.lr_find(num_it=12, show_plot=False).valley>0

class Whole(nn.Module):
    "Torch 2.8 does not compile a `Sequential` itself"
    def __init__(self):
        super().__init__()
        self.layers = net()
    def forward(self, x): return self.layers(x)

def test_compiled_models_can_be_watched(dls):
    "Hooks see the layers of a compiled model, and afterwards it is compiled again, also after an error"
    learn = erosion_learner(dls, Whole(), compile=True)
    assert learn.model._compiled_call_impl is not None and erosion_learner(dls, net()).model._compiled_call_impl is None
    runs,seen = [],[]
    def backend(graph, inputs): runs.append(1); return graph.forward
    learn.model.compile(backend=backend)
    x = dls.valid.one_batch()[0][:4].as_subclass(torch.Tensor)
    want = learn.model(x); assert len(runs)==1
    with watching(learn.model, lambda name,m,o: seen.append(name)): got = learn.model(x)
    assert torch.equal(got, want) and {'layers.1','layers.2','layers.3'}<=set(seen) and learn.model._compiled_call_impl is not None
    with pytest.raises(ZeroDivisionError), watching(learn.model, lambda *o: 1/0): learn.model(x)
    assert learn.model._compiled_call_impl is not None

def test_gpu_benchmark_on_a_cpu(monkeypatch, dls):
    "Both sides of the GPU section train, on a narrow network; without a GPU its row says so"
    monkeypatch.syspath_prepend(str(bench))
    import gpu_rows, run
    peer,ours = gpu_rows.bare('resnet20', dls, 32, width=.25),gpu_rows.ours('resnet20', dls, width=.25)
    peer(); ours()
    x,y = gpu_rows.ready(dls, torch.float32)
    plain = dls.train.new(shuffle=False)
    with dls.train.dataset.set_split_idx(1): want,_ = plain.one_batch()
    assert torch.allclose(x[:32].cpu(), want.as_subclass(torch.Tensor).cpu(), atol=1e-5) and torch.equal(y.cpu(), dls.train_ds.y)
    got = list(gpu_rows.on_device(x, y, 32))
    assert len(got)==20 and sorted(torch.cat([o[1] for o in got]).tolist())==sorted(y.tolist()) and got[0][0].shape==(32,3,16,16)
    if torch.cuda.is_available(): return
    row, = gpu_rows.rows()
    assert row['skipped'] in run.line(row)

def test_ratios_of_the_benchmark(monkeypatch):
    "The median of the turns' ratios; of 20 turns the 6th and the 15th are its 95% interval, as tables of the sign test have it"
    monkeypatch.syspath_prepend(str(bench))
    import common, run
    assert common.compared([2.]*20, [2.*i for i in range(1, 21)])==dict(ratio=10.5, low=6, high=15)
    seven = dict(ours_s=[1.]*7, **common.compared([1.]*7, [1.,2.,3.,4.,5.,6.,7.]))
    assert (seven['ratio'],seven['low'],seven['high'])==(4,1,7)
    assert [run.verdict(dict(seven, target=t)) for t in (1, 2, 8)]==['met','not clear','missed']
    assert run.verdict(dict(ours_s=[1.], low=9, high=9, target=1))=='not clear'   # one turn tells nothing

def test_a_look_of_the_benchmark(monkeypatch, dls):
    "Both sides evaluate all three sets, with as many forward passes"
    monkeypatch.syspath_prepend(str(bench))
    import train_rows
    model,passes = net(),[]
    model.register_forward_pre_hook(lambda m,x: passes.append(len(x[0])))
    fs = train_rows.look(dls, model)
    for f in fs.values(): f()
    half = len(passes)//2
    assert passes[:half]==passes[half:] and sum(passes)==6*min(1000, len(dls.valid_ds))

def test_peers_of_the_benchmark_leave_no_hooks(monkeypatch):
    "Hooks on shared networks would be timed with whatever comes next"
    monkeypatch.syspath_prepend(str(bench))
    import cka_rows
    m = net()
    assert cka_rows.bare(lambda: 3, [m])()==3
    with pytest.raises(AssertionError): cka_rows.bare(lambda: m[1].register_forward_hook(print), [m])()

def test_steps_of_mitigations_in_the_benchmark(monkeypatch):
    "Steps with squares are timed, as many as are asked for, with their loading"
    monkeypatch.syspath_prepend(str(bench))
    import mitigation_rows as m
    clock = iter(range(10**6))
    monkeypatch.setattr(m, 'perf_counter', lambda: next(clock)**2)   # the k-th step takes 2k+1
    for method in 'plain finetuning','replay','last layer first (LP-FT)':
        clock = iter(range(10**6))
        assert m.seconds(method, m.few, 4, skip=2)==(5+7+9+11)/4, method

def test_growth_slopes(monkeypatch):
    "A square law has slope 2, whatever its factor"
    monkeypatch.syspath_prepend(str(bench))
    import growth
    assert growth.slope([1,10,100], [3,300,30_000])==pytest.approx(2) and growth.slope([5,50], [7,7])==pytest.approx(0)

def test_help_does_not_import_torch():
    "The command answers before anything heavy is loaded; no clock needed"
    out = subprocess.run([sys.executable, '-X', 'importtime', '-m', 'feature_erosion.cli', '--help'], capture_output=True,
                         text=True, check=True)
    assert 'demo' in out.stdout
    assert not [l for l in out.stderr.splitlines()
                if l.rsplit('|', 1)[-1].strip() in ('torch','fastai','pandas','numpy','matplotlib')]

def test_rows_measured_on_another_machine(monkeypatch):
    "They stay, and say where; a row that can't be measured here does not replace one that was measured elsewhere"
    monkeypatch.syspath_prepend(str(bench))
    import run
    there = dict(cpu='A', cores=1, threads=1, python='3', torch='2', fastai='2', sklearn='1', device='NVIDIA H200', data='noise')
    a,b = dict(module='a_rows', name='loading', peer='x'),dict(module='gpu_rows', name='an epoch', peer='y')
    old = dict(machine=there, rows=[a, b])
    now = run.merged(old, ['a_rows','gpu_rows'], [dict(a, on='here'), dict(b, on='here', skipped='no GPU here')])
    assert now==[dict(a, on='here'), dict(b, on=run.about(there))]
    assert run.merged(old, ['a_rows'], [dict(a, on='here')])==now
    assert [o for o,_ in run.by_machine(now+[dict(a, on='here')])]==['here',run.about(there)]
