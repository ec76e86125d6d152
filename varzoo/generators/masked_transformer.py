"""What generators around MAR's masked autoencoder share (arXiv 2406.11838, 4), whatever their head draws."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from varzoo.core.draws import AnyDraws
from varzoo.core.keymap import Rename, Rule
from varzoo.core.spec import TokenSpec
from varzoo.core.steps import Schedule, Step, needs_null_branch, of_phase
from varzoo.generators.base import Condition, Decoding, Generator
from varzoo.generators.masked import MaskPlan, MaskRate, known_positions, masked_steps, require_plan, split_order
from varzoo.nn.masked_vit import MaskedViT
from varzoo.nn.rows import put_rows


class MaskedGenerator(Generator):
    """Class vectors, the vectors of masked positions in training, official names.

    Args:
        spec: the tokens it models.
        num_classes: class labels it knows.
        width: of the class vectors.
        class_drop: probability that a sample is trained without its class.

    A subclass makes the `backbone`.
    """

    backbone: MaskedViT
    num_classes: int

    def __init__(self, *, spec: TokenSpec, num_classes: int, width: int, class_drop: float) -> None:
        super().__init__()
        if not 0 <= class_drop <= 1:
            raise ValueError(f"need 0 <= class_drop <= 1, got {class_drop}.")
        self.spec, self.num_classes, self.class_drop = spec, num_classes, class_drop
        self.class_embed = nn.Embedding(num_classes, width)
        self.null_class = nn.Parameter(torch.empty(1, width))
        nn.init.normal_(self.class_embed.weight, std=0.02)
        nn.init.normal_(self.null_class, std=0.02)

    def values(self, tokens: Tensor) -> Tensor:
        """Tokens as the backbone reads them, `[B, N, channels]`: themselves unless they are ids."""
        return tokens

    def class_vectors(self, condition: Condition) -> Tensor:
        """Class vectors `[B, width]`; the null class where there are no labels."""
        if condition.labels is None:
            return self.null_class.expand(condition.size, -1)
        return self.class_embed(condition.labels)

    def training_vectors(self, condition: Condition, draws: AnyDraws, name: str) -> Tensor:
        """Class vectors, some of them dropped."""
        dropped = draws.uniform(name) < self.class_drop
        return torch.where(dropped[:, None], self.null_class, self.class_vectors(condition))

    def training_rows(self, tokens: Tensor, condition: Condition, draws: AnyDraws,
                      mask_rate: MaskRate) -> tuple[Tensor, Tensor]:
        """The positions `[B, n]` that a training step masks, ascending, and the backbone's vectors `[B, n, D]` there.

        The share of masked tokens is one draw for the batch, the rest is drawn per sample.
        """
        self.check_condition(condition)
        masked, visible = split_order(draws.permutation("order", self.spec.length), mask_rate(draws, "mask_rate"))
        vectors = self.training_vectors(condition, draws, "drop_label")
        return masked, self.backbone(self.values(tokens), visible, vectors, masked)

    def check_plan(self, plan: Any) -> None:
        require_plan(plan, MaskPlan, type(self).__name__, self.spec.length)

    def begun(self, condition: Condition, draws: AnyDraws, guidance: Schedule | Mapping[str, Schedule] | None,
              plan: Any) -> tuple[list[Step], Schedule | None]:
        """The steps of a decoding in one phase and its guidance; raises ValueError where `begin` must."""
        self.check_condition(condition)
        self.check_plan(plan)
        schedule: Schedule | None = of_phase(guidance)
        steps = list(masked_steps(plan, draws.permutation("order", self.spec.length)))
        needs_null_branch(schedule, steps)  # refuses what does not guide
        return steps, schedule

    def common_rules(self, output_positions: str = "diffusion_pos_embed_learned") -> list[Rule]:
        """Key map rules of what is not a head; `output_positions` is the official name of the last table."""
        names = {
            "fake_latent": "null_class",
            "class_emb.weight": "class_embed.weight",
            "z_proj.{p}": "backbone.token_embed.{p}",
            "z_proj_ln.{p}": "backbone.token_norm.{p}",
            "encoder_pos_embed_learned": "backbone.encoder_positions",
            "encoder_blocks.{rest*}": "backbone.encoder_blocks.{rest*}",
            "encoder_norm.{p}": "backbone.encoder_norm.{p}",
            "decoder_embed.{p}": "backbone.decoder_embed.{p}",
            "mask_token": "backbone.mask_token",
            "decoder_pos_embed_learned": "backbone.decoder_positions",
            "decoder_blocks.{rest*}": "backbone.decoder_blocks.{rest*}",
            "decoder_norm.{p}": "backbone.decoder_norm.{p}",
            output_positions: "backbone.output_positions",
        }
        return [Rename(official, ours) for official, ours in names.items()]


class MaskedDecoding(Decoding):
    """Known tokens and what is still to come, in one phase.

    There is no cache: every prediction runs the transformer anew on what is known, without the positions asked for, so
    that a position may be predicted again after it was drawn.

    Args:
        generator: whose backbone runs.
        tokens: `[B, N, ...]` zeros, of the type that is to be returned.
        vectors: class vectors `[B, width]`.
        steps, guidance: see `MaskedGenerator.begun`.
    """

    def __init__(self, generator: MaskedGenerator, tokens: Tensor, vectors: Tensor, steps: list[Step],
                 guidance: Schedule | None) -> None:
        self.generator, self.tokens, self.vectors, self.guidance = generator, tokens, vectors, guidance
        self._known = torch.zeros(tokens.shape[:2], dtype=torch.bool, device=tokens.device)
        self._steps = iter(steps)

    @property
    def steps(self) -> Iterator[Step]:
        return self._steps

    def rows(self, step: Step) -> tuple[Tensor, float]:
        """The backbone's vectors at the step's positions `[1, B, n, D]`, with the null branch's as a second one where
        the step is guided, and the scale.
        """
        scale = 1.0 if self.guidance is None else self.guidance(step)
        vectors = self.vectors
        if scale != 1:  # the two branches as one doubled batch
            vectors = torch.cat([vectors, self.generator.null_class.expand_as(vectors)])
        branches = len(vectors) // len(self.vectors)
        visible = known_positions(self._known.scatter(1, step.positions, False))
        rows = self.generator.backbone(self.generator.values(self.tokens).repeat(branches, 1, 1),
                                       visible.repeat(branches, 1), vectors, step.positions.repeat(branches, 1))
        return rows.unflatten(0, (branches, -1)), scale

    def commit(self, step: Step, tokens: Tensor, carry: Any = None) -> None:
        self.tokens = put_rows(self.tokens, step.positions, tokens.to(self.tokens.dtype))
        self._known = self._known.scatter(1, step.positions, True)
