"""Deep Q-learning: the data are played while it trains; a target net, returns logged by episode, validation without labels."""

from collections import deque

import lightning as L
import torch
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.loggers import CSVLogger
from observe import Diary, csv_columns, files, numbers, quiet, weights
from torch import nn
from torch.nn import functional as F
from torch.utils.data import DataLoader, IterableDataset


class Walk:
    """A walk on eight places; the reward waits at the end."""

    def __init__(self):
        self.place = 0

    def reset(self):
        self.place = 0
        return self.state()

    def state(self):
        return F.one_hot(torch.tensor(self.place), 8).float()

    def step(self, action):
        self.place = max(0, self.place + (1 if action else -1))
        done = self.place == 7
        return self.state(), 1.0 if done else -0.05, done


class Experience(IterableDataset):
    """Samples of what is in the buffer now."""

    def __init__(self, buffer, samples, generator):
        self.buffer, self.samples, self.generator = buffer, samples, generator

    def __iter__(self):
        for _ in range(self.samples):
            yield self.buffer[int(torch.randint(len(self.buffer), (), generator=self.generator))]


class DQN(L.LightningModule):
    def __init__(self, gamma: float = 0.9, lr: float = 0.02, sync_every: int = 5, epsilon: float = 0.5):
        super().__init__()
        self.save_hyperparameters()
        self.net = nn.Sequential(nn.Linear(8, 16), nn.ReLU(), nn.Linear(16, 2))
        self.target = nn.Sequential(nn.Linear(8, 16), nn.ReLU(), nn.Linear(16, 2)).requires_grad_(False)
        self.target.load_state_dict(self.net.state_dict())
        self.walk = Walk()
        self.random = torch.Generator().manual_seed(0)
        self.buffer = deque(maxlen=200)
        self.state, self.episode, self.total = self.walk.reset(), 0, 0.0
        self.play(50, 1.0)

    @torch.no_grad()
    def play(self, steps, epsilon):
        for _ in range(steps):
            explores = float(torch.rand((), generator=self.random)) < epsilon
            if explores:
                action = int(torch.randint(2, (), generator=self.random))
            else:
                action = int(self.net(self.state).argmax())
            following, reward, done = self.walk.step(action)
            self.buffer.append((self.state, action, reward, done, following))
            self.total += reward
            self.state = following
            if done:
                self.episode, self.total, self.state = self.episode + 1, 0.0, self.walk.reset()

    def forward(self, state):
        return self.net(state)

    def training_step(self, batch, batch_idx):
        state, action, reward, done, following = batch
        epsilon = max(0.05, self.hparams.epsilon - self.global_step * 0.01)
        self.play(4, epsilon)
        value = self(state).gather(1, action[:, None])[:, 0]
        with torch.no_grad():
            best = self.target(following).max(1).values * (~done)
        loss = F.smooth_l1_loss(value, reward.to(value.dtype) + self.hparams.gamma * best)
        if self.global_step % self.hparams.sync_every == 0:
            self.target.load_state_dict(self.net.state_dict())
        self.log_dict({"loss": loss, "epsilon": epsilon})
        self.log("episodes", float(self.episode), prog_bar=True, on_step=True, on_epoch=False)
        self.log("reward", reward.float().mean(), on_step=False, on_epoch=True)
        return loss

    def configure_optimizers(self):
        return torch.optim.Adam(self.net.parameters(), lr=self.hparams.lr)

    def train_dataloader(self):
        return DataLoader(Experience(self.buffer, 80, torch.Generator().manual_seed(1)), batch_size=16)


def main(folder):
    L.seed_everything(12, verbose=False)
    model, diary = DQN(), Diary()
    keeper = ModelCheckpoint(folder / "kept", "{epoch}-{reward:.2f}", monitor="reward", mode="max", save_top_k=2)
    options = {"logger": CSVLogger(folder, "dqn"), "log_every_n_steps": 4, "enable_checkpointing": True}
    trainer = quiet(folder, diary, keeper, max_epochs=4, **options)
    trainer.fit(model)
    return diary.pages() | {
        "weights": weights(model),
        "metrics": numbers(trainer.callback_metrics),
        "episodes": [model.episode, len(model.buffer), model.total],
        "csv": csv_columns(folder / "dqn" / "version_0" / "metrics.csv"),
        "files": files(folder),
        "batches": str(trainer.num_training_batches),
        "stepping": str(trainer.estimated_stepping_batches),
    }
