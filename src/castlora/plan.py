"""What is known of a transfer before any model is loaded: both architectures, the adapter, and which modules pair."""

from collections.abc import Sequence
from dataclasses import dataclass

from transformers import PreTrainedConfig

from castlora.adapters.base import as_trained
from castlora.adapters.factors import PORTABLE_RANKS, LowRank, portable_rank, read_update
from castlora.adapters.files import AdapterFiles, open_adapter
from castlora.config import Recipe
from castlora.errors import UserError
from castlora.models.loading import context_length, load_config, skeleton
from castlora.models.modules import LinearSlot, linear_slots
from castlora.models.pairing import Pairing, branch_ranks, pair_modules


@dataclass(frozen=True)
class Plan:
    """What is known from configurations and the adapter alone, before any model is loaded."""

    adapter: AdapterFiles
    source: str
    source_revision: str | None
    target: str
    source_config: PreTrainedConfig
    """Of the base model, with the number of tokens that the adapter was trained with."""
    target_config: PreTrainedConfig
    factors: dict[str, LowRank]
    """Updates of the linear maps that the adapter changes in the source's layers."""
    beyond: tuple[str, ...]
    """What else it trains; no map carries that, but source + adapter teaches it."""
    source_slots: dict[str, LinearSlot]
    target_slots: dict[str, LinearSlot]
    pairing: Pairing

    @property
    def exact_rank(self) -> int:
        """Rank that holds every folded update: a fused target module adds the ranks of its branches."""
        ranks = {name: factors.rank for name, factors in self.factors.items()}
        return max(branch_ranks(pair, ranks) for pair in self.pairing.mapped)

    @property
    def adapter_rank(self) -> int:
        """Largest rank in the source adapter."""
        return max(factors.rank for factors in self.factors.values())

    @property
    def target_modules(self) -> list[str]:
        """Target modules that receive an update."""
        return [pair.target.name for pair in self.pairing.mapped]

    def state_bytes(self, recipe: Recipe) -> int:
        """Disk for two checkpoints: each trained number in fp32 and its two optimizer moments."""
        trained = 0
        for pair in self.pairing.mapped:
            for branch in pair.branches:
                a, b = self.factors[branch.source_module].a, self.factors[branch.source_module].b
                if recipe.start == "fresh" or recipe.trained == "factors":
                    trained += a.shape[0] * (pair.target.d_in + pair.target.d_out)
                else:
                    trained += a.shape[1] * pair.target.d_in + b.shape[0] * pair.target.d_out
        return 2 * 3 * 4 * trained + (16 << 20)

    def check_length(self, recipe: Recipe) -> None:
        """Raises a UserError if the passages are longer than either model can read."""
        for name, config in ((self.source, self.source_config), (self.target, self.target_config)):
            if recipe.max_length > context_length(config):
                raise UserError(
                    f"max_length is {recipe.max_length}, but {name!r} reads {context_length(config)} tokens; "
                    f"give --tuning.max-length {context_length(config)} or less."
                )
        # Where nothing is rehearsed the target still writes such passages, for its drift to be measured on.
        if recipe.rehearsal_tokens > context_length(self.target_config):
            raise UserError(
                f"rehearsal_tokens is {recipe.rehearsal_tokens}, but {self.target!r} reads "
                f"{context_length(self.target_config)} tokens; give --tuning.rehearsal-tokens "
                f"{context_length(self.target_config)} or less."
            )

    def rank(self, recipe: Recipe, wanted: int | None) -> int:
        """Rank of the adapter to write; where no rank that engines accept holds the update, the largest of them.

        Raises:
            UserError: the rank cannot hold maps that are trained, or engines do not accept it.
        """
        largest = PORTABLE_RANKS[-1]
        needed = self.adapter_rank if recipe.start == "fresh" else self.exact_rank
        if recipe.start != "fresh" and recipe.trained == "maps" and needed > largest:
            raise UserError(
                f"The folded maps need rank {needed}, above {largest}, the largest that all serving engines accept; "
                "give --start fresh, or --tuning.trained factors, whose start is cut to that rank."
            )
        needed = min(needed, largest)
        if wanted is None:
            return portable_rank(needed)
        if recipe.start != "fresh" and wanted < needed:
            raise UserError(f"--rank {wanted} cannot hold the folded update of rank {needed}; give {needed} or more.")
        if portable_rank(wanted) != wanted:
            raise UserError(
                f"--rank {wanted} is not a rank that all serving engines accept; give {portable_rank(wanted)}."
            )
        return wanted


def plan_transfer(adapter: str, target: str, source: str | None) -> Plan:
    """Reads the adapter and both configurations, and pairs the modules.

    Raises:
        UserError: something is missing, damaged or does not fit.
    """
    files = open_adapter(adapter)
    source_name = source or files.base_model
    if not source_name:
        raise UserError(f"Adapter {adapter!r} names no base model; name it with --source.")
    revision = None if source else files.config.revision
    source_config = load_config(
        source_name, revision, "name the adapter's base model, a folder or hub id, with --source"
    )
    source_config = as_trained(files.folder, source_config)
    target_config = load_config(target)
    update = read_update(files, source_config)
    source_slots = linear_slots(skeleton(source_config), source_config)
    target_slots = linear_slots(skeleton(target_config), target_config)
    if not target_slots:
        raise UserError(
            f"Target {target!r}: no linear module has a name that castlora knows; add its names to "
            "castlora.models.modules.MODULE_ROLES."
        )
    pairing = pair_modules(source_slots, target_slots, update.factors)
    return Plan(
        files, source_name, revision, target, source_config, target_config, update.factors, update.beyond,
        source_slots, target_slots, pairing,
    )  # fmt: skip


def describe_beyond(beyond: Sequence[str]) -> str:
    """What becomes of that which an adapter trains beside the linear maps of layers."""
    return (
        f"The adapter also trains {', '.join(beyond)}. No map carries that; the target's LoRA learns it from what "
        "source + adapter predicts about text."
    )
