"""A recurrent and a transformer model on streams; own clipping, own optimizer and scheduler steps; LBFGS."""

import math

import lightning as L
import torch
from observe import Diary, loader, numbers, quiet, weights
from torch import nn
from torch.nn import functional as F
from torch.utils.data import DataLoader, IterableDataset, TensorDataset


class Sentences(IterableDataset):
    """Counting sequences, as a stream without a length."""

    def __init__(self, number):
        self.number = number

    def __iter__(self):
        for start in range(self.number):
            yield (torch.arange(start, start + 9) * (1 + start % 3)) % 11


class Recurrent(L.LightningModule):
    def __init__(self, warmup: int = 4):
        super().__init__()
        self.save_hyperparameters()
        self.embedding = nn.Embedding(11, 8)
        self.rnn = nn.GRU(8, 12, batch_first=True)
        self.head = nn.Linear(12, 11)
        self.clips = []

    def forward(self, tokens):
        hidden, _ = self.rnn(self.embedding(tokens))
        return self.head(hidden)

    def training_step(self, batch, batch_idx):
        loss = F.cross_entropy(self(batch[:, :-1]).flatten(0, 1), batch[:, 1:].flatten())
        self.log("loss", loss, on_epoch=True)
        return loss

    def validation_step(self, batch, batch_idx):
        loss = F.cross_entropy(self(batch[:, :-1]).flatten(0, 1), batch[:, 1:].flatten())
        self.log("val_perplexity", loss.exp())

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=0.5)

    def optimizer_step(self, epoch, batch_idx, optimizer, optimizer_closure=None):
        scale = min(1.0, (self.trainer.global_step + 1) / self.hparams.warmup)
        for group in optimizer.param_groups:
            group["lr"] = 0.5 * scale
        optimizer.step(closure=optimizer_closure)

    def configure_gradient_clipping(self, optimizer, gradient_clip_val=None, gradient_clip_algorithm=None):
        self.clips.append([gradient_clip_val, gradient_clip_algorithm])
        self.clip_gradients(optimizer, gradient_clip_val=0.1 * (1 + self.current_epoch), gradient_clip_algorithm="norm")


class Noam:
    """A scheduler of one's own, which knows nothing of torch's."""

    def __init__(self, optimizer):
        self.optimizer = optimizer
        self.calls = 0

    def step(self, epoch=None):
        self.calls += 1
        for group in self.optimizer.param_groups:
            group["lr"] = 0.01 / math.sqrt(self.calls)

    def state_dict(self):
        return {"calls": self.calls}

    def load_state_dict(self, state):
        self.calls = state["calls"]


class Transformer(Recurrent):
    def __init__(self):
        super().__init__()
        layer = nn.TransformerEncoderLayer(8, 2, 16, dropout=0.0, batch_first=True, bias=False)
        self.rnn = None
        self.encoder = nn.TransformerEncoder(layer, 1, enable_nested_tensor=False)
        self.head = nn.Linear(8, 11)
        self.register_buffer("mask", nn.Transformer.generate_square_subsequent_mask(8), persistent=False)
        self.scheduler_calls = []

    def forward(self, tokens):
        return self.head(self.encoder(self.embedding(tokens), mask=self.mask, is_causal=True))

    def configure_optimizers(self):
        optimizer = torch.optim.AdamW(self.parameters(), lr=0.01, betas=(0.9, 0.95))
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": Noam(optimizer), "interval": "step"}}

    def lr_scheduler_step(self, scheduler, metric):
        self.scheduler_calls.append([type(scheduler).__name__, metric, self.trainer.global_step])
        scheduler.step(epoch=self.current_epoch)

    def configure_gradient_clipping(self, optimizer, gradient_clip_val=None, gradient_clip_algorithm=None):
        self.clips.append([gradient_clip_val, gradient_clip_algorithm])
        self.clip_gradients(optimizer, gradient_clip_val, gradient_clip_algorithm)

    optimizer_step = L.LightningModule.optimizer_step


class Quadratic(L.LightningModule):
    """Least squares by LBFGS, which evaluates the loss several times in a step."""

    def __init__(self):
        super().__init__()
        self.w = nn.Parameter(torch.zeros(3))
        self.calls = 0

    def training_step(self, batch, batch_idx):
        self.calls += 1
        x, y = batch
        loss = ((x @ self.w - y) ** 2).mean()
        self.log("loss", loss)
        return loss

    def configure_optimizers(self):
        return torch.optim.LBFGS(self.parameters(), lr=0.5, max_iter=4)


def main(folder):
    found = {}
    for kind in (Recurrent, Transformer):
        L.seed_everything(4, verbose=False)
        model, diary = kind(), Diary()
        options = {"max_epochs": 2, "val_check_interval": 3, "check_val_every_n_epoch": None}
        if kind is Transformer:
            options = {"max_epochs": 3, "gradient_clip_val": 0.5, "limit_train_batches": 5, "limit_val_batches": 2}
        trainer = quiet(folder, diary, **options)
        trainer.fit(model, DataLoader(Sentences(32), 4), DataLoader(Sentences(12), 4))
        found[kind.__name__] = diary.pages() | {
            "clips": model.clips,
            "weights": weights(model),
            "metrics": numbers(trainer.callback_metrics),
            "batches": [str(trainer.num_training_batches), [str(count) for count in trainer.num_val_batches]],
            "end": [trainer.current_epoch, trainer.global_step],
            "scheduler_calls": getattr(model, "scheduler_calls", None),
        }
    L.seed_everything(4, verbose=False)
    x = torch.randn(24, 3)
    y = x @ torch.tensor([1.0, -2.0, 0.5])
    model, diary = Quadratic(), Diary()
    trainer = quiet(folder, diary, max_epochs=2)
    trainer.fit(model, loader(TensorDataset(x, y), 12))
    found["LBFGS"] = diary.pages() | {"w": model.w, "calls": model.calls, "metrics": numbers(trainer.callback_metrics)}
    return found
