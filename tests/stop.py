"A training that breaks off: for tests of what goes on afterwards."
from fastai.vision.all import Callback

class Boom(Exception): pass

class StopAt(Callback):
    "Raise an error after a batch of training"
    order,run_valid,passive = 999,False,True
    def __init__(self, at): self.at = at
    def after_batch(self):
        if self.learn.train_iter==self.at: raise Boom('here')
