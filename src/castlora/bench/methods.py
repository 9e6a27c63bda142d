"""The methods of the quality benchmark, by the names that the results use."""

from dataclasses import replace
from functools import partial

from castlora.baselines.cross_lora import cross_lora
from castlora.baselines.direct_copy import direct_copy
from castlora.baselines.lora_x import lora_x
from castlora.bench.bridged import Bridged
from castlora.bench.trained import Distilled, DistilledNetworks, Labelled, Nonlinear, OtherSkill
from castlora.bench.untrained import Constrained, LogitDelta, Solved, Weighed
from castlora.config import Tuning

Method = Distilled | Labelled | Solved | Bridged | Weighed | Constrained | LogitDelta
PLAIN = Tuning(rehearsal_weight=0.0)
SINGLE = replace(PLAIN, candidates=8, sentences=1)
RUNNING = replace(PLAIN, write_answers=False)
GENERIC = replace(SINGLE, format_candidates=0)
METHODS: dict[str, Method] = {
    "default": Distilled("default", None),
    "default, prompts taught": Distilled("default", None, Tuning(context_weight=0.1)),
    "default, hidden states": Distilled("default", None, Tuning(mse_weight=1.0)),
    "default, last layer solved": Distilled("default", "readout"),
    "ridge start, rehearsed": Distilled("default", "ridge"),
    "fresh, rehearsed": Distilled("default", "fresh"),
    "ridge start": Distilled("default", "ridge", PLAIN),
    "readout start": Distilled("default", "readout", PLAIN),
    "paper start": Distilled("default", "paper", PLAIN),
    "fresh": Distilled("default", "fresh", PLAIN),
    "ridge start, generic formats": Distilled("default", "ridge", GENERIC, regimes=("general",)),
    "paper start, generic formats": Distilled("default", "paper", GENERIC, regimes=("general",)),
    "fresh, generic formats": Distilled("default", "fresh", GENERIC, regimes=("general",)),
    "ridge start, single sentences": Distilled("default", "ridge", SINGLE, regimes=("general", "format")),
    "paper start, single sentences": Distilled("default", "paper", SINGLE, regimes=("general", "format")),
    "fresh, single sentences": Distilled("default", "fresh", SINGLE, regimes=("general", "format")),
    "ridge start, single sentences, maps": Distilled("default", "ridge", replace(SINGLE, trained="maps")),
    "ridge start, any prompts": Distilled("default", "ridge", replace(SINGLE, candidates=1), regimes=("format",)),
    "ridge start, running text": Distilled("default", "ridge", RUNNING, regimes=("general",)),
    "paper": Distilled("paper", "paper"),
    "paper, KL alone": Distilled("paper", "paper", Tuning(mse_weight=0.0)),
    "paper, MSE alone": Distilled("paper", "paper", Tuning(kl_weight=0.0)),
    "paper, nonlinear": Nonlinear("paper", "paper"),
    "paper start, nonlinear": Nonlinear("default", "paper", PLAIN),
    "paper start, nonlinear, distilled": DistilledNetworks("default", "paper", PLAIN),
    "synthetic data": Labelled(),
    "closed form": Solved("ridge"),
    "closed form, last layer solved": Distilled("default", "readout", PLAIN, is_trained=False),
    "closed form, last layer solved, rehearsed": Distilled("default", "readout", is_trained=False),
    "bridge": Bridged(),
    "Theseus": Solved("theseus"),
    "direct copy": Weighed(direct_copy),
    "Cross-LoRA": Weighed(partial(cross_lora, form="aligned")),
    "Cross-LoRA, projected": Weighed(partial(cross_lora, form="projected")),
    "LoRA-X": Weighed(lora_x),
    "LoRA-X, constrained": Constrained(),
    "logit-delta oracle": LogitDelta(),
    "control: random maps": Solved("random"),
    "control: permuted positions": Solved("permuted"),
    "control: adapter of another skill": OtherSkill("default", "ridge", PLAIN),
}
"""The default, its variants, the paper's recipe as a whole, the rivals, what no adapter can hold, and controls."""


def depends_on_steps(name: str) -> bool:
    """Whether a method trains for the number of steps that a benchmark is given; one that is unknown does not."""
    method = METHODS.get(name)
    return isinstance(method, Labelled) or (isinstance(method, Distilled) and method.is_trained)
