"""Metric names: a public API."""

from __future__ import annotations

METRICS = {
    "train/step": "optimiser steps finished",
    "train/lr": "learning rate of the step",
    "train/grad_norm": "gradient norm before clipping",
    "train/policy_version": "version of the weights after the step",
    "train/staleness": "policy versions between drawing a trajectory and training on it, mean",
    "train/staleness_max": "the same, largest",
    "reward/first/mean": "score of the first image, mean over the batch",
    "reward/reflection/mean": "score of the verdict, mean over the batch",
    "reward/final/mean": "score of the last image, mean over the batch",
    "reward/": "scores by segment or by scorer, over the batch",
    "reward/trajectory/mean": "one number for the whole trajectory, mean over the batch",
    "loss/total": "the loss that is minimised",
    "loss/clip_fraction": "share of tokens whose ratio to the sampler is clipped, truncated or masked",
    "loss/": "terms of the loss",
    "rollout/share_yes": "share of first images that the policy said match the prompt",
    "rollout/images_per_s": "images drawn per second of drawing",
    "entropy/": "of the distributions that tokens were drawn from, nats per token, and its weights in the loss",
    "rollout/equal_groups": "groups replaced by others because their rewards were all equal",
    "decline/": "how far the reward curve lies below, and what was done about it",
    "rollout/": "what was drawn in the step",
    "kl/": "KL to the reference policy, estimated as loss.kl says (k3), nats per token",
    "mismatch/max_abs": "largest |sampler - learner| log-prob of a sampled token",
    "mismatch/mean_abs": "mean |sampler - learner| log-prob",
    "time/": "seconds of the phase in this step",
    "idle/": "share of the step in which the role waited",
    "canary/": "a judge that is never trained on: its mean score, and its correlation with the reward in a step",
    "credit/": "images without a reward, groups of the batch in which nothing can be compared",
    "cached/": "share of a scorer's requests that an equal one had been computed for",
    "failures/": "scores that are missing, groups that were dropped",
}
"""Names (or prefixes, ending in "/") and what they say; the report shows these words."""


def describe(name: str) -> str:
    """The words of `METRICS` for a metric, by its name or else its prefix; "" if neither is known."""
    return METRICS.get(name) or METRICS.get(name.split("/")[0] + "/", "")
