"""The Trainer on several processes, whatever engine runs them: seeds, and checkpoints that any number of them can load.

A checkpoint holds the model as `save_pretrained` writes it and the optimizer's state as one process would: what is
sharded is gathered when it is saved and dealt out again when it is loaded. DeepSpeed keeps a form of its own.

Randomness: parameters are drawn from the seed before anything is split, alike in every process. In training, process r
draws dropout and routing noise from seed + r, since its rows are its own. What is drawn for the parameters, such as the
masks of `dare`, follows from the seed and the number of the pass (`RoutingContext.seed`), alike in every process.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any, cast

import torch
from accelerate.utils import set_seed
from safetensors import safe_open
from torch import Tensor, nn
from torch.utils._pytree import tree_map_only
from transformers import PreTrainedModel

from camex_ft.training.checkpoint_folder import of_deepspeed, processes, rows_at_once
from camex_ft.training.distributed import (
    blocks,
    compute_in_autocast,
    deal,
    gather_layers,
    shard_on_cpu,
    share_embeddings,
    tied,
    whole,
)
from camex_ft.training.state_files import (
    loading,
)
from camex_ft.training.storing import StoringTrainer
from camex_ft.upcycling import expert_layers, keep_nothing
from camex_ft.upcycling.adapters import has_adapter, trained_state
from camex_ft.utils.errors import UserError


class EngineTrainer(StoringTrainer):
    """`transformers.Trainer` whose runs are the same on any number of processes."""

    def create_accelerator_and_postprocess(self) -> None:
        """Make the accelerator; a model is sharded block by block."""
        super().create_accelerator_and_postprocess()
        model = cast(PreTrainedModel, self.model)
        self.is_fsdp_enabled |= shard_on_cpu(self.accelerator)
        if self.is_fsdp_enabled:
            share_embeddings(model)
            plugin = self.accelerator.state.fsdp_plugin
            plugin.transformer_cls_names_to_wrap = plugin.transformer_cls_names_to_wrap or blocks(model)
            compute_in_autocast(model, self.accelerator)
        if self.is_deepspeed_enabled:
            self._check_precision(model)
        if self.engine == "zero3":
            gather_layers(model)
        if not self.whole_parameters:
            keep_nothing(model)

    def _check_precision(self, model: PreTrainedModel) -> None:
        layers = expert_layers(model).values()
        differences = any(layer.settings.base and layer.low_rank is None for layer in layers)
        if differences and self.accelerator.mixed_precision != "no":
            raise UserError(
                f"training.{self.accelerator.mixed_precision}: DeepSpeed would hold experts and base expert in half "
                "precision, in whose rounding their difference, the domain vector, is lost; expected --engine ddp or "
                "fsdp, which leave that to autocast, or float32"
            )

    @property
    def whole_parameters(self) -> bool:
        """Return whether every process has all parameters, and their gradients after each backward pass."""
        return not (self.is_fsdp_enabled or self.is_deepspeed_enabled)

    @property
    def engine(self) -> str | None:
        """The engine of several processes: ddp, fsdp, zero2 or zero3; None where there is one."""
        if self.is_deepspeed_enabled:
            return f"zero{self.accelerator.state.deepspeed_plugin.zero_stage}"
        if self.is_fsdp_enabled:
            return "fsdp"
        return "ddp" if self.args.world_size > 1 else None

    def train(self, *args: Any, **kwargs: Any) -> Any:
        """Train, each process with randomness of its own; a checkpoint that is loaded brings its own state of it."""
        if self.args.world_size > 1:
            set_seed(self.args.seed, device_specific=True)
        return super().train(*args, **kwargs)

    def full_state(self) -> dict[str, Tensor] | None:
        """Return the model's state where it has to be gathered, which every process takes part in; else None."""
        if self.whole_parameters:
            return None
        return tied(cast(nn.Module, self.model), self.accelerator.get_state_dict(self.model_wrapped))

    def check(self, checkpoint: Path) -> None:
        """Raise `UserError` where a run cannot go on from a checkpoint with the processes that it has now."""
        anew = "--force (make: FORCE=1) starts anew"
        count, now = processes(checkpoint), self.args.world_size
        if of_deepspeed(checkpoint) != self.is_deepspeed_enabled:
            raise UserError(
                f"{checkpoint.name} was written {'by' if of_deepspeed(checkpoint) else 'without'} DeepSpeed, whose "
                f"checkpoints it alone reads: expected the engine of before; {anew}"
            )
        if self.is_deepspeed_enabled and count != now:
            raise UserError(
                f"{checkpoint.name} was written by {count} processes, and here are {now}: DeepSpeed goes on with as "
                f"many alone; ddp and fsdp with any number; {anew}"
            )
        before = rows_at_once(checkpoint)
        size = before // count if self.args.auto_find_batch_size else self.args.train_batch_size
        rows = size * now
        if before and before != rows:
            raise UserError(
                f"{checkpoint.name} was written by a run that takes {before} rows at once, and {now} processes of "
                f"{size} take {rows}: expected {count} processes as before, or "
                f"training.global_batch_size from the start; {anew}"
            )

    # -- checkpoints --------------------------------------------------------------------------------------------------

    def _save(self, output_dir: str | None = None, state_dict: Any = None) -> None:
        """Write the model; of one with low-rank experts what is trained alone."""
        model = cast(PreTrainedModel, self.model)
        if state_dict:
            state_dict = tied(model, state_dict)
        if has_adapter(model):
            names = trained_state(model)
            state_dict = (
                {name: (state_dict or names)[name] for name in names} if self.args.should_save else {}
            )
        super()._save(output_dir, state_dict)

    def _issue_warnings_after_load(self, load_result: Any) -> None:
        """Stay silent of missing names that share their tensor with one that is there, or that never change."""
        tensors = cast(nn.Module, self.model).state_dict(keep_vars=True)
        missing = set(load_result.missing_keys)
        loaded = {t.data_ptr() for name, t in tensors.items() if name not in missing}
        if has_adapter(cast(PreTrainedModel, self.model)):
            frozen = {n for n, t in tensors.items() if isinstance(t, nn.Parameter) and not t.requires_grad}
            missing -= frozen
        load_result.missing_keys[:] = [n for n in missing if tensors[n].data_ptr() not in loaded]
        super()._issue_warnings_after_load(load_result)

    def optimizer_state(self) -> dict[str, Any]:
        """Return the optimizer's state as one process has it, in the processes that write."""
        state = super().optimizer_state()
        if not self.is_fsdp_enabled:
            return state
        writes = self.args.should_save
        # one tensor at a time, and in one process alone
        gathered: dict[str, Any] = tree_map_only(
            Tensor, lambda tensor: whole(tensor).cpu() if writes else whole(tensor).new_empty(0), state
        )
        return gathered

    def load_optimizer_state(self, state: dict[str, Any]) -> None:
        """Take up a state, of which each process keeps its part."""
        if self.is_fsdp_enabled:
            groups = cast(torch.optim.Optimizer, self.optimizer).param_groups
            parameters = [p for group in groups for p in group["params"]]
            state["state"] = {
                i: {key: deal(value, parameters[i]) for key, value in entries.items()}
                for i, entries in state["state"].items()
            }
        super().load_optimizer_state(state)

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: Any = None) -> None:
        with loading(Path(resume_from_checkpoint)):
            if self.is_fsdp_enabled:
                self._deal_out(Path(resume_from_checkpoint))
            else:
                super()._load_from_checkpoint(resume_from_checkpoint, model)

    def _load_best_model(self) -> None:
        best = Path(cast(str, self.state.best_model_checkpoint))
        with loading(best):
            if self.is_fsdp_enabled:
                self._deal_out(best)
            else:
                super()._load_best_model()

    @torch.no_grad()
    def _deal_out(self, checkpoint: Path) -> None:
        """Load a checkpoint's weights, of which every process keeps its part, one tensor at a time."""
        own = cast(nn.Module, self.model).state_dict()
        for file in sorted(checkpoint.glob("*.safetensors")):
            with safe_open(file, "pt") as saved:
                for name in saved.keys() & own.keys():
                    own[name].copy_(deal(saved.get_tensor(name), own[name]))

    def _shard_unprepared(self) -> None:
        """Shard a model that is evaluated without having been trained here."""
        if self.is_fsdp_enabled and not self.accelerator._models:
            self.model, self.optimizer = self.accelerator.prepare(self.model, self.create_optimizer())
            self.model_wrapped = cast(PreTrainedModel, self.model)
