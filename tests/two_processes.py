"Two phases on digits; alone, or under `torchrun` or `accelerate launch` as one of several: `two_processes.py FOLDER BATCH_SIZE`"
import atexit, json, os, sys
from contextlib import nullcontext
from pathlib import Path
import torch
from torch import nn
from fastai.distributed import *
from fastai.vision.all import Callback, Learner, accuracy, num_distrib, rank_distrib, set_seed
from feature_erosion.all import ColorSquare, KeepRun, Phase, RunStore, digits_dls, erosion_learner, evaluate

def tell_threads(folder):
    "Which of gloo's are left"
    names = [(o/'comm').read_text().strip() for o in Path('/proc/self/task').glob('*')]
    open(f'{folder}/threads{rank_distrib()}.json', 'w').write(json.dumps([o for o in names if 'gloo' in o]))

class Die(Callback):
    order,run_valid,passive = 2000,False,True
    def __init__(self, stop): self.stop = stop
    def after_batch(self):
        if self.learn.train_iter==self.stop: os._exit(9)

def one_of(rank, n, port, *args):
    "As `torchrun` would start it"
    os.environ.update(RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE=str(n), MASTER_ADDR='localhost', MASTER_PORT=str(port))
    main(*args)

def main(folder, bs, stop=None):
    "`stop`: kill itself after so many iterations"
    torch.set_num_threads(1)
    set_seed(0)
    dls = digits_dls(bs=bs)
    learn = erosion_learner(dls, nn.Sequential(nn.Flatten(), nn.Linear(768,64), nn.ReLU(), nn.Linear(64,10)))
    phases = [Phase('pretrain', 6, dls), Phase('erode', 8, dls.inject(ColorSquare(4)))]
    seen = []
    class Look(Callback):
        passive = True
        def after_batch(self): seen.append(len(self.yb[0])) if self.training else None
    several = num_distrib()>1
    with learn.distrib_ctx(cpu=True, sync_bn=False) if several else nullcontext(), learn.no_bar(), learn.no_logging():
        learn.fit_phases(phases, cbs=[KeepRun(RunStore(folder).run('digits'), minutes=0. if several else 9.), Die(stop), Look()])
    h = learn.recorder.history
    res = dict(history=h.astype(object).where(h.notna(), None).to_dict('list'),
               again=evaluate(learn.model, dls.valid)['accuracy'], samples=sum(seen),
               weights=float(sum(p.detach().double().abs().sum() for p in learn.model.parameters())))
    open(f'{folder}/result{rank_distrib()}.json', 'w').write(json.dumps(res))

if __name__=='__main__':
    atexit.register(tell_threads, sys.argv[1])   # before anybody else asks for it: so this runs last
    main(sys.argv[1], int(sys.argv[2]))
