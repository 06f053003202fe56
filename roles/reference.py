"""The reference actor: log-probs of drawn trajectories under the policy that the KL term holds on to."""

from __future__ import annotations

import time

import ray
import torch
from ray import ObjectRef

from rlpipe.config import Config
from rlpipe.learn.advantage import reference_items
from rlpipe.learn.reference import reference_options
from rlpipe.learn.replay import segment_logprobs
from rlpipe.policy.janus import JanusPolicy
from rlpipe.types import Rollout
from roles.rollout import actor_device
from roles.weights import install
from roles.work import Ack, Manifest


class ReferenceActor:
    """A frozen policy: reference.path, or policy.path as it was at the start of the run, or another that is asked for.

    actor = ray.remote(ReferenceActor).remote(config)
    seconds, logprobs = actor.logprobs.options(num_returns=2).remote([group_ref])
    """

    def __init__(self, config: Config) -> None:
        torch.set_num_threads(config.reference.threads)
        self.config = config
        self.path = config.reference.path or config.policy.path
        self.policy = self._load(self.path)
        by_policy = config.reference.context == "policy"
        self.options = reference_options(config)
        self.context: JanusPolicy | None = None
        if by_policy:
            self.context = JanusPolicy.from_config(config, *self._placed()).requires_grad_(False).embedder()

    def ready(self) -> str:
        return "reference"

    def _placed(self) -> tuple[torch.dtype, str]:
        return getattr(torch, self.config.policy.dtype), actor_device(self.config.reference.num_gpus)

    def _load(self, path: str) -> JanusPolicy:
        # policy.overlay belongs to policy.path alone.
        own = self.config.reference.path is None and path == self.config.policy.path
        return JanusPolicy.from_config(self.config, *self._placed(), None if own else path).requires_grad_(False)

    def load_weights(self, manifest: Manifest) -> Ack:
        """Take over the embeddings of a published policy: what a scored segment looks back at is embedded by them.

        Only with reference.context=policy. Raises WeightError.
        """
        parameters = dict(self.context.janus.named_parameters())
        return install(manifest, parameters, self.config.reference.timeout_s, some=True)

    def renew(self, path: str) -> None:
        """From now on the reference is the checkpoint at `path`."""
        if path != self.path:
            self.policy = self.path = None  # So that never two are held.
            self.policy, self.path = self._load(path), path

    def logprobs(self, groups: list[ObjectRef], renewed: str | None = None) -> tuple:
        """Seconds, then per group (call with num_returns) one tuple per member of float32 [T] arrays per segment.

        renewed: checkpoint of the reference that the caller wants, if it is not the configured one any more; every
                 call names it, so that an actor that was started again, or a run that was resumed, has it too.

        A token that the learner does not score either (an end-of-sentence out of the loss) has NaN.
        """
        started, section = time.monotonic(), self.config.learner
        self.renew(renewed or self.config.reference.path or self.config.policy.path)
        fetched: list[tuple[Rollout, ...]] = ray.get(groups, timeout=self.config.reference.timeout_s)
        items = [item for group in fetched for item in reference_items(group)]
        settings = (section.micro_batch, self.context, section.token_budget, section.head_chunk)
        arrays = iter(segment_logprobs(self.policy, items, self.options, *settings))
        nested = [tuple(next(arrays) for _ in group) for group in fetched]
        return time.monotonic() - started, *nested
