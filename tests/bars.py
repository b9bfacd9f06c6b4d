"A small run with fastai's progress bars; `stop`: it sends itself Ctrl-C after so many iterations"
import os, signal
import torch
from torch import nn
from fastai.vision.all import Callback, Learner, SGD, accuracy, set_seed
from feature_erosion.all import ColorSquare, Phase, RunStore, digits_dls

def train(folder, stop=None):
    class CtrlC(Callback):
        run_valid,passive = False,True
        def after_batch(self):
            if self.learn.train_iter==stop: os.kill(os.getpid(), signal.SIGINT)
    torch.set_num_threads(1)
    set_seed(0)
    dls = digits_dls(n=160, n_valid=50, bs=32)
    learn = Learner(dls, nn.Sequential(nn.Flatten(), nn.Linear(768,10)), opt_func=SGD, metrics=accuracy, lr=.05)
    learn.fit_phases([Phase('pretrain', 3, dls), Phase('erode', 3, dls.inject(ColorSquare(4)))], run=RunStore(folder).run('a'),
                     cbs=CtrlC())
    print('sum', float(sum(p.detach().double().sum() for p in learn.model.parameters())))

def train_to(out, *args):
    "With `out`, a file or a terminal, as standard output and error"
    fd = os.open(out, os.O_RDWR|os.O_CREAT|os.O_NOCTTY)
    os.dup2(fd, 1), os.dup2(fd, 2)
    train(*args)
