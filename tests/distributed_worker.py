"""Run by torchrun from test_distributed.py: a few training steps for every way to spread a network.

Usage: distributed_worker.py OUT CASE...; a case is family:mode:way:schedule:checkpointing, and the way "one" takes the
whole batch in each process. The first process writes OUT/<case>.safetensors with the trained parameters, whole.
"""

from __future__ import annotations

import dataclasses
import sys
import warnings
from pathlib import Path

import torch
import torch.distributed as dist
from process_end import leave
from safetensors.torch import save_file

import apex_fast as af
from apex_fast.backbones.base import Backbone
from apex_fast.backbones.loading import backbone_class
from apex_fast.backbones.tiny import tiny_pipeline
from apex_fast.lora import LoraSettings, add_lora, lora_velocities
from apex_fast.training import distributed

BATCH, TOKENS, STEPS = 4, 16, 3


def make(family: str, mode: str) -> Backbone:
    torch.manual_seed(0)
    backbone = backbone_class(family)(tiny_pipeline(family).transformer, max_sequence_length=TOKENS)
    if mode == "lora":
        add_lora(backbone, LoraSettings(rank=2), seed=1)
        for name, parameter in backbone.transformer.named_parameters():
            if "lora_B" in name:  # zero at first, which leaves most gradients zero too
                torch.nn.init.normal_(parameter, std=0.1)
    else:
        unused = backbone.parameters_without_gradient()
        for name, parameter in backbone.transformer.named_parameters():
            parameter.requires_grad_(name not in unused)
    return backbone.train()


def samples(backbone: Backbone) -> tuple[torch.Tensor, af.Condition]:
    generator = torch.Generator().manual_seed(1)
    x = torch.randn(BATCH, backbone.latent_channels, 8, 8, generator=generator)
    config = backbone.transformer.config
    pooled = getattr(config, "pooled_projection_dim", None)
    tokens = backbone.token_count
    embeds = torch.randn(BATCH, tokens, backbone.text_width, generator=generator)
    mask = torch.arange(tokens)[None] < torch.tensor([[tokens], [5], [9], [2]]) if backbone.has_mask else None
    return x, af.Condition(embeds, mask, None if pooled is None else torch.randn(BATCH, pooled, generator=generator))


def train(case: str) -> dict[str, torch.Tensor]:
    family, mode, way, schedule, checkpointing = case.split(":")
    backbone = make(family, mode)
    if checkpointing == "checkpointed":
        backbone.enable_gradient_checkpointing()
    velocities = lora_velocities(backbone) if mode == "lora" else af.Velocities.from_module(backbone)
    no_sync, mine = None, slice(None)
    if way != "one":
        no_sync = {"ddp": distributed.replicate, "fsdp": distributed.shard}[way](velocities, backbone)
        share = BATCH // dist.get_world_size()
        mine = slice(dist.get_rank() * share, (dist.get_rank() + 1) * share)
    shift = af.ConditionShift(trainable=True)
    objective = af.ApexObjective(shift, warmup_steps=1, ramp_steps=0)
    parameters = [p for p in backbone.parameters() if p.requires_grad]
    optimizer = torch.optim.SGD([*parameters, *shift.parameters()], lr=0.05)
    x, condition = samples(backbone)
    for step in range(STEPS):
        draws = objective.draw(x, torch.Generator().manual_seed(step))
        given = {f.name: getattr(draws, f.name) for f in dataclasses.fields(draws)}
        draws = dataclasses.replace(draws, **{n: None if v is None else v[mine] for n, v in given.items()})
        objective.backward(
            velocities, x[mine], condition.index(mine), step=step, draws=draws, schedule=schedule, no_sync=no_sync
        )
        if way != "one":
            distributed.average_gradients(shift.parameters())
        optimizer.step()
        optimizer.zero_grad()
    found = {name: p.detach() for name, p in backbone.named_parameters() if p.requires_grad}
    found = {name: p.full_tensor() if hasattr(p, "full_tensor") else p.clone() for name, p in found.items()}
    return {**found, **{f"shift.{name}": p.detach().clone() for name, p in shift.named_parameters()}}


def main(out: str, cases: list[str]) -> None:
    torch.set_num_threads(1)
    warnings.filterwarnings("ignore")
    dist.init_process_group("gloo")
    for case in cases:
        found = train(case)
        if dist.get_rank() == 0:
            save_file(found, str(Path(out) / f"{case.replace(':', '-')}.safetensors"))
        dist.barrier()
    leave()


if __name__ == "__main__":
    main(sys.argv[1], sys.argv[2:])
