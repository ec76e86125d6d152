"""The plain loop: predict, draw, commit, for every step of the decoding."""

from __future__ import annotations

import time
from collections.abc import Mapping
from typing import Any

import torch

from varzoo.core.draws import AnyDraws
from varzoo.core.steps import at_step, of_phase, options_of_phase
from varzoo.generators.base import Condition, Generator
from varzoo.samplers.base import Callback, Counts, GuidanceSetting, Progress, Sampled, Sampler, check_options


class Autoregressive(Sampler):
    """Draw every step's tokens once, in the order of the decoding.

    Args:
        guidance: scale of classifier-free guidance per step (one schedule, or one per phase), None for none.
        plan: number of steps and mask law (one plan, or one per phase), for generators that leave them open.
        draw: options of the predictions' `draw` (temperature, top_k, top_p; solver, steps), for all phases alike or a
            mapping of options by phase; a Schedule is evaluated at every step.
    """

    def __init__(self, *, guidance: GuidanceSetting = None, plan: Any = None,
                 draw: Mapping[str, Any] | None = None) -> None:
        self.guidance, self.plan, self.draw = guidance, plan, dict(draw or {})

    def check(self, generator: Generator) -> None:
        super().check(generator)
        for setting in (self.guidance, self.plan):
            for phase in generator.predicts:
                of_phase(setting, phase, generator.predicts)
        check_options(self.draw, generator)
        generator.check_plan(self.plan)

    @torch.no_grad()
    def sample(self, generator: Generator, condition: Condition, draws: AnyDraws,
               callback: Callback | None = None) -> Sampled:
        self.check(generator)
        options = {phase: options_of_phase(self.draw, phase, generator.predicts) for phase in generator.predicts}
        start, steps, backbone_evaluations, head_evaluations = time.perf_counter(), 0, 0, 0
        decoding = generator.begin(condition, draws=draws, guidance=self.guidance, plan=self.plan)
        for step in decoding.steps:
            prediction = decoding.predict(step)
            at = {name: at_step(value, step) for name, value in options[step.phase].items()}
            drawn = prediction.draw(draws, **at)
            decoding.commit(step, drawn.tokens, prediction.carry)
            steps, head_evaluations = steps + 1, head_evaluations + drawn.evaluations
            backbone_evaluations += prediction.backbone_evaluations
            if callback is not None:
                callback(Progress(step=step, decoding=decoding))
        counts = Counts(steps=steps, backbone_evaluations=backbone_evaluations,
                        head_evaluations=head_evaluations, seconds=time.perf_counter() - start)
        return Sampled(tokens=decoding.tokens, counts=counts)
