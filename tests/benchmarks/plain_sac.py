"""The SAC update as single-file implementations run it: the yardstick of `millrace bench learner`.

Two critics and their two targets are modules of their own, optimisers are torch's Adam as it comes, targets follow by a loop
over parameters, and each loss goes through autograd. Algorithm, order of steps and settings are those of CleanRL's SAC
(Huang et al. 2022, JMLR 23/274), written anew here. Like such programs it draws from torch's global generator.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor, nn, optim
from torch.distributions import Normal
from torch.nn import functional as F

LOG_STD_MIN, LOG_STD_MAX = -5.0, 2.0
POLICY_EVERY = 2  # the policy waits for so many critic updates, and then makes as many of its own


class PlainBatch(NamedTuple):
    """Transitions, float32 on the device."""

    observation: Tensor  # (batch, observation_dim)
    next_observation: Tensor  # (batch, observation_dim)
    action: Tensor  # (batch, action_dim), in [-1, 1]
    reward: Tensor  # (batch, 1)
    done: Tensor  # (batch, 1): 1 where the episode terminated

    @classmethod
    def random(cls, size: int, observation_dim: int, action_dim: int, device: str, *, seed: int) -> PlainBatch:
        """Made-up transitions."""
        generator = torch.Generator().manual_seed(seed)
        parts = (
            torch.randn(size, observation_dim, generator=generator),
            torch.randn(size, observation_dim, generator=generator),
            2.0 * torch.rand(size, action_dim, generator=generator) - 1.0,
            torch.randn(size, 1, generator=generator),
            (torch.rand(size, 1, generator=generator) < 0.01).float(),
        )
        return cls(*(part.to(device) for part in parts))


class SoftQNetwork(nn.Module):
    """Q(s, a)."""

    def __init__(self, observation_dim: int, action_dim: int, hidden: int) -> None:
        super().__init__()
        self.fc1 = nn.Linear(observation_dim + action_dim, hidden)
        self.fc2 = nn.Linear(hidden, hidden)
        self.fc3 = nn.Linear(hidden, 1)

    def forward(self, observation: Tensor, action: Tensor) -> Tensor:
        x = torch.cat([observation, action], 1)
        x = F.relu(self.fc1(x))
        x = F.relu(self.fc2(x))
        q: Tensor = self.fc3(x)
        return q


class Actor(nn.Module):
    """A tanh-squashed Gaussian with a head for means and one for log standard deviations."""

    action_scale: Tensor
    action_bias: Tensor

    def __init__(self, observation_dim: int, action_dim: int, hidden: int) -> None:
        super().__init__()
        self.fc1 = nn.Linear(observation_dim, hidden)
        self.fc2 = nn.Linear(hidden, hidden)
        self.fc_mean = nn.Linear(hidden, action_dim)
        self.fc_log_std = nn.Linear(hidden, action_dim)
        self.register_buffer("action_scale", torch.ones(action_dim))
        self.register_buffer("action_bias", torch.zeros(action_dim))

    def forward(self, observation: Tensor) -> tuple[Tensor, Tensor]:
        x = F.relu(self.fc1(observation))
        x = F.relu(self.fc2(x))
        log_std = torch.tanh(self.fc_log_std(x))
        return self.fc_mean(x), LOG_STD_MIN + 0.5 * (LOG_STD_MAX - LOG_STD_MIN) * (log_std + 1)

    def sample(self, observation: Tensor) -> tuple[Tensor, Tensor]:
        """Actions (batch, action_dim) and their log-probabilities (batch, 1)."""
        mean, log_std = self(observation)
        normal = Normal(mean, log_std.exp())
        u = normal.rsample()
        squashed = torch.tanh(u)
        action = squashed * self.action_scale + self.action_bias
        log_prob = normal.log_prob(u)  # type: ignore[no-untyped-call]
        log_prob -= torch.log(self.action_scale * (1 - squashed.pow(2)) + 1e-6)
        return action, log_prob.sum(1, keepdim=True)


class PlainSac:
    """The networks, their optimisers, and the body of the training loop."""

    def __init__(self, observation_dim: int, action_dim: int, *, hidden: int = 256, device: str = "cpu") -> None:
        self.gamma, self.tau = 0.99, 0.005
        self.updates = 0
        self.actor = Actor(observation_dim, action_dim, hidden).to(device)
        self.qf1, self.qf2, self.qf1_target, self.qf2_target = (
            SoftQNetwork(observation_dim, action_dim, hidden).to(device) for _ in range(4)
        )
        self.qf1_target.load_state_dict(self.qf1.state_dict())
        self.qf2_target.load_state_dict(self.qf2.state_dict())
        self.q_optimizer = optim.Adam([*self.qf1.parameters(), *self.qf2.parameters()], lr=1e-3)
        self.actor_optimizer = optim.Adam(self.actor.parameters(), lr=3e-4)
        self.target_entropy = -float(action_dim)
        self.log_alpha = torch.zeros(1, requires_grad=True, device=device)
        self.alpha = self.log_alpha.exp().item()
        self.alpha_optimizer = optim.Adam([self.log_alpha], lr=1e-3)

    def update(self, batch: PlainBatch) -> None:
        """One pass of the loop: critics always, the policy and the temperature twice every second time."""
        with torch.no_grad():
            next_action, next_log_prob = self.actor.sample(batch.next_observation)
            next_q1 = self.qf1_target(batch.next_observation, next_action)
            next_q2 = self.qf2_target(batch.next_observation, next_action)
            next_value = torch.min(next_q1, next_q2) - self.alpha * next_log_prob
            target = batch.reward.flatten() + (1 - batch.done.flatten()) * self.gamma * next_value.view(-1)
        q1 = self.qf1(batch.observation, batch.action).view(-1)
        q2 = self.qf2(batch.observation, batch.action).view(-1)
        q_loss = F.mse_loss(q1, target) + F.mse_loss(q2, target)
        self.q_optimizer.zero_grad()
        q_loss.backward()  # type: ignore[no-untyped-call]
        self.q_optimizer.step()

        if self.updates % POLICY_EVERY == 0:
            for _ in range(POLICY_EVERY):
                self._update_policy(batch)
        for online, target_network in ((self.qf1, self.qf1_target), (self.qf2, self.qf2_target)):
            for parameter, follower in zip(online.parameters(), target_network.parameters(), strict=True):
                follower.data.copy_(self.tau * parameter.data + (1 - self.tau) * follower.data)
        self.updates += 1

    def _update_policy(self, batch: PlainBatch) -> None:
        action, log_prob = self.actor.sample(batch.observation)
        q = torch.min(self.qf1(batch.observation, action), self.qf2(batch.observation, action))
        actor_loss = ((self.alpha * log_prob) - q).mean()
        self.actor_optimizer.zero_grad()
        actor_loss.backward()
        self.actor_optimizer.step()

        with torch.no_grad():
            _, log_prob = self.actor.sample(batch.observation)
        alpha_loss = (-self.log_alpha.exp() * (log_prob + self.target_entropy)).mean()
        self.alpha_optimizer.zero_grad()
        alpha_loss.backward()  # type: ignore[no-untyped-call]
        self.alpha_optimizer.step()
        self.alpha = self.log_alpha.exp().item()
